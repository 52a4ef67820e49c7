"""Our MCUNet-in1 against the published counts of the network."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.models.mcunet import IMAGE_SIZE, mcunet_in1


def test_parameters_and_operations_are_the_published_ones() -> None:
    model = mcunet_in1().eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scores = model(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert scores.shape == (1, 1000)
    assert round(counter.get_total_flops() / 2 / 1e6, 1) == 12.8
