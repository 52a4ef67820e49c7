"""The rule without anything of one's own: what is above a threshold does not move, what is below moves damped.

Saha, Garg & Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021; LANCE, arXiv 2509.21617.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_lance.continual.basis import UpTo
from lightning_lance.continual.rules.rule import Layer, Now, Rule


class Threshold(Rule):
    """The leading directions of each experience, up to a fraction of its energy, are closed for all later ones.

    ``reserved`` of the options restricts what an experience may move further, ``damping`` makes its steps shorter where
    earlier ones have energy below the threshold.
    """

    def needs_moments(self, now: Now) -> bool:
        return self.options.reserved != "full" or now.damping > 0.0

    def directions(self, layers: Mapping[str, Layer], now: Now) -> None:
        reserved = self.options.reserved
        rank = UpTo(self.threshold(now)) if reserved == "threshold" else reserved
        for layer in layers.values():
            memory = layer.memory
            if any(memory.counts):
                memory.reserve(layer.moments, rank, now.damping)
            else:
                memory.reserve()
            if memory.reserved is None and memory.free is not None and layer.smaller:
                # All that is free, and fewer directions than are protected: fewer numbers to train, and to keep.
                memory.reserved = memory.free
