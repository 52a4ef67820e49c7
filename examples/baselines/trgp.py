"""TRGP: Lin, Yang, Fan & Zhang, *Trust Region Gradient Projection for Continual Learning*, ICLR 2022.

Ours, from the paper's description.

Gradients are projected out of the bases of all earlier tasks, as in GPM. Of the earlier tasks, those are in a layer's
*trust region* whose input subspace holds most of the new task's first gradient; along their bases the new task learns a
scaling of the frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.baselines.scaled_weights import ScaledWeightsPlugin, gram
from lightning_lance.continual import FeatureMoments, LayerMemory, project_out


class TRGPPlugin(ScaledWeightsPlugin):
    """TRGP in any Avalanche strategy with plain SGD.

    Args:
        threshold: fraction of an experience's input energy to protect after it.
        threshold_growth: added to the threshold after each experience, up to .999.
        trust: share of the norm of a gradient that an earlier task's subspace must hold (ε of the paper, .5 there).
        tasks: most earlier tasks in the trust region of a layer (2 in the paper).
        samples: random training samples of an experience that define its directions.
        heads: name prefixes of modules that train freely.
        seed: of the samples drawn.

    Attributes:
        memories: layer name -> basis of all tasks.
        columns: layer name -> task label -> columns of the basis that are the task's subspace.
    """

    def __init__(
        self,
        threshold: float = 0.97,
        threshold_growth: float = 0.003,
        trust: float = 0.5,
        tasks: int = 2,
        samples: int = 125,
        heads: Sequence[str] = ("classifier",),
        seed: int = 0,
    ) -> None:
        super().__init__(samples, heads, seed)
        self.threshold, self.threshold_growth = threshold, threshold_growth
        self.trust, self.tasks = trust, tasks
        self.memories: dict[str, LayerMemory] = {}
        self.columns: dict[str, dict[int, list[int]]] = {}

    def choose(self, name: str, gradient: Tensor, moments: FeatureMoments) -> list[Tensor]:
        bases = [self.memories[name].protected[0][:, columns] for columns in self.columns[name].values()]
        shares = [float((gradient @ basis).norm() / gradient.norm()) for basis in bases]
        trusted = sorted((i for i, share in enumerate(shares) if share >= self.trust), key=lambda i: -shares[i])
        return [bases[i] for i in trusted[: self.tasks]]

    def project(self, name: str, gradient: Tensor) -> Tensor:
        return project_out(gradient[None], self.memories[name].protected.to(gradient))[0]

    def consolidate(self, name: str, moments: FeatureMoments, task: int) -> None:
        side = moments.side
        memory = self.memories.setdefault(name, LayerMemory(side.width, side.groups, name, compact=False))
        threshold = min(self.threshold + self.threshold_growth * self.experience, max(self.threshold, 0.999))
        memory.reserve()
        memory.start()
        memory.protect(moments, threshold)
        # Old columns and new ones compete for being the task's: the fewest that hold the energy.
        second, basis = gram(moments), memory.protected[0].double()
        values, order = ((second @ basis) * basis).sum(0).sort(descending=True)
        needed = int((values.cumsum(0) < threshold * second.trace()).sum()) + 1
        self.columns.setdefault(name, {})[task] = torch.sort(order[:needed]).values.tolist()
