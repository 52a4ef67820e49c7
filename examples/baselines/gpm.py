"""Gradient Projection Memory and its scaled variant, as Avalanche plugins.

GPM: Saha, Garg & Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021. SGP: Saha & Roy, *Continual
Learning with Scaled Gradient Projection*, AAAI 2023. Both share the growth of protected bases and the projection with
LANCE; while training they differ: the full activations are kept, and the full weight gradient is computed and then
projected, which holds its promise for plain gradient descent only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from lightning_lance.compression.isolation import isolated
from lightning_lance.continual import FeatureMoments, LayerMemory, project_out
from lightning_lance.continual.layers import reserved_variant
from lightning_lance.ops.features import FeatureSide


class GradientProjectionMemory:
    """Projects weight gradients out of the input directions that earlier experiences need (GPM, algorithm 1).

    Args:
        threshold: fraction of an experience's input energy to protect after it.
        threshold_growth: added to the threshold after each experience, up to .999.
        scale: coefficient α of SGP: the most important direction of a layer is projected out whole, the others in part,
            the less the smaller α. `None` projects all of them out whole, which is GPM.
        heads: name prefixes of modules that train freely.

    Attributes:
        experience: number of experiences that have ended.
        memories: layer name -> protected basis.
        importances: layer name -> fraction of each direction to project out, shape `(groups, m)`; SGP only.
    """

    def __init__(
        self,
        threshold: float = 0.97,
        threshold_growth: float = 0.003,
        scale: float | None = None,
        heads: Sequence[str] = ("classifier",),
    ) -> None:
        self.threshold = threshold
        self.threshold_growth = threshold_growth
        self.scale = scale
        self.heads = tuple(heads)
        self.experience = 0
        self.memories: dict[str, LayerMemory] = {}
        self.importances: dict[str, Tensor] = {}

    def _is_head(self, name: str) -> bool:
        return any(name == head or name.startswith(f"{head}.") for head in self.heads)

    def layers(self, model: nn.Module) -> dict[str, tuple[Any, FeatureSide, Any]]:
        """Name -> layer, feature side, geometry, of the layers whose gradients are projected."""
        found = {}
        for name, module in model.named_modules():
            variant = None if self._is_head(name) else reserved_variant(module)
            if variant is not None:
                found[name] = (module, *variant.side(module, patch=True))
        return found

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Between backward and the optimiser's step: project the gradients, drop those of biases and norms.

        The first experience trains freely.
        """
        if self.experience == 0:
            return
        weights = set()
        for name, (layer, side, _) in self.layers(model).items():
            weights.add(id(layer.weight))
            if layer.weight.grad is None:
                continue
            basis = self.memories[name].protected.to(layer.weight)
            if name in self.importances:
                # M Λ Mᵀ of SGP is the projection with columns shortened to the root of their importance.
                basis = basis * self.importances[name].to(basis).sqrt().unsqueeze(1)
            projected = project_out(side.rows(layer.weight.grad), basis)
            layer.weight.grad.copy_(side.weight(projected, layer.weight.shape))
        for name, parameter in model.named_parameters():
            if id(parameter) not in weights and not self._is_head(name):
                parameter.grad = None

    def consolidate(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        """After an experience: enlarge the bases by what its inputs need (GPM, algorithm 1).

        Args:
            model: the trained model.
            forward: runs it on samples of the experience; run in evaluation mode.
        """
        layers = self.layers(model)
        moments = {name: FeatureMoments(side, shape, name) for name, (_, side, shape) in layers.items()}

        def see(found: FeatureMoments) -> Callable[..., None]:
            return lambda module, args: found.update(args[0])

        handles = [layers[name][0].register_forward_pre_hook(see(found)) for name, found in moments.items()]
        try:
            with isolated(model), torch.no_grad():
                model.eval()
                forward()
        finally:
            for handle in handles:
                handle.remove()
        threshold = min(self.threshold + self.threshold_growth * self.experience, max(self.threshold, 0.999))
        for name, (layer, side, _) in layers.items():
            memory = self.memories.get(name)
            if memory is None:
                memory = self.memories[name] = LayerMemory(
                    side.width, side.groups, name, device=layer.weight.device, compact=False
                )
            memory.reserve()
            memory.start()
            memory.protect(moments[name], threshold)
            if self.scale is not None:
                self._weigh(name, moments[name])
        self.experience += 1

    def _weigh(self, name: str, moments: FeatureMoments) -> None:
        """Importance of each direction for the experience, added to what it had (SGP, algorithm 1)."""
        assert self.scale is not None
        bases = self.memories[name].protected
        # The singular value of a direction: the norm of the samples along it. For new directions it is that of the
        # residual's decomposition, for old ones the surrogate of SGP.
        values = torch.stack([_norms_along(basis, found) for basis, found in zip(bases, moments.groups(), strict=True)])
        largest = values.amax(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        importance = (self.scale + 1) * values / (self.scale * values + largest)
        before = self.importances.get(name)
        if before is not None:
            importance[:, : before.shape[1]] += before
        self.importances[name] = importance.clamp(max=1.0)


def _norms_along(basis: Tensor, moments: Any) -> Tensor:
    """`‖mᵢᵀ R‖` for each column of a basis `(K, m)` and the samples `R` behind second moments `R Rᵀ`."""
    matrix = moments.matrix.to(basis)
    if moments.is_root:
        return (basis.T @ matrix).norm(dim=1)
    return (basis * (matrix @ basis)).sum(0).clamp(min=0).sqrt()


class GPMPlugin(SupervisedPlugin):
    """GPM in any Avalanche strategy with plain SGD.

    Args:
        threshold: see :class:`GradientProjectionMemory`.
        threshold_growth: likewise.
        samples: random training samples of an experience that define its directions; 125 in the paper's CIFAR-100.
        heads: name prefixes of modules that train freely.
        seed: of the samples drawn.
    """

    def __init__(
        self,
        threshold: float = 0.97,
        threshold_growth: float = 0.003,
        samples: int = 125,
        heads: Sequence[str] = ("classifier",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.memory = GradientProjectionMemory(threshold, threshold_growth, None, heads)
        self.samples = samples
        self.generator = torch.Generator().manual_seed(seed)

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        self.memory.project(strategy.model)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        data = strategy.experience.dataset
        chosen = torch.randperm(len(data), generator=self.generator)[: self.samples].tolist()
        rows = [data[index] for index in chosen]
        images = torch.stack([row[0] for row in rows]).to(strategy.device)
        tasks = torch.tensor([row[-1] for row in rows], device=strategy.device)
        self.memory.consolidate(strategy.model, lambda: avalanche_forward(strategy.model, images, tasks))


class SGPPlugin(GPMPlugin):
    """Scaled gradient projection in any Avalanche strategy with plain SGD.

    Args:
        threshold: see :class:`GradientProjectionMemory`.
        threshold_growth: likewise.
        scale: coefficient α; 10 in the paper's CIFAR-100.
        samples: random training samples of an experience that define its directions.
        heads: name prefixes of modules that train freely.
        seed: of the samples drawn.
    """

    def __init__(
        self,
        threshold: float = 0.97,
        threshold_growth: float = 0.003,
        scale: float = 10.0,
        samples: int = 125,
        heads: Sequence[str] = ("classifier",),
        seed: int = 0,
    ) -> None:
        super().__init__(threshold, threshold_growth, samples, heads, seed)
        self.memory = GradientProjectionMemory(threshold, threshold_growth, scale, heads)
