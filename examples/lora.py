"""LoRA with peft: frozen weights, small adapters, rounded activations.

Run it with `python -m examples.lora`.

Adapters make the optimiser's state small; what is kept of the forward pass stays nearly as large as before, for the
gradient still flows through the whole network. LANCE is for that part.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from examples.huggingface_model import Classifier, trained
from lightning_lance import LanceCallback


class Adapted(Classifier):
    """The same network with adapters of rank 8 in its attention."""

    def __init__(self) -> None:
        super().__init__()
        config = LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"], lora_dropout=0.1)
        self.model = get_peft_model(self.model, config)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def adapters(module: Adapted) -> dict[str, Tensor]:
    """What is worth saving: the adapters and the classifier."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def main(arguments: Sequence[str] | None = None) -> tuple[Adapted, LanceCallback]:
    """Returns the module and the callback."""
    options = parser().parse_args(arguments)
    L.seed_everything(0, verbose=False)
    module = Adapted()
    callback = trained(module, options.steps)
    print(f"{sum(p.numel() for p in adapters(module).values()):,} numbers are trained")
    return module, callback


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Train LoRA adapters with LANCE.")
    result.add_argument("--steps", type=int, default=60)
    return result


if __name__ == "__main__":
    main()
