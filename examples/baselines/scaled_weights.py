"""What TRGP and CODE-CL share: a task may rescale the weight along directions of earlier ones, and keeps how.

With ``S`` such directions, a task works with ``W + W S Q Sᵀ``: ``Q`` is trained with the weight, stored for the task,
and used when it is evaluated. The weight itself is trained with projected gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lance.compression.isolation import isolated
from lightning_lance.continual import FeatureMoments
from lightning_lance.continual.layers import reserved_variant
from lightning_lance.ops.features import FeatureSide


class ScaledWeight(nn.Module):
    """Parametrisation `W + Σ W S Q Sᵀ` of the weight of a layer.

    Args:
        side: feature side of the layer.
        bases: the `S`, each `(K, s)`.

    Attributes:
        scales: the `Q`, each `(s, s)`; zero at first.
    """

    def __init__(self, side: FeatureSide, bases: Sequence[Tensor]) -> None:
        super().__init__()
        self.side = side
        self.bases = [basis.detach() for basis in bases]
        self.scales = nn.ParameterList(basis.new_zeros(basis.shape[1], basis.shape[1]) for basis in bases)

    def forward(self, weight: Tensor) -> Tensor:
        rows = self.side.rows(weight)
        for basis, scale in zip(self.bases, self.scales, strict=True):
            rows = rows + (self.side.rows(weight) @ basis @ scale) @ basis.T
        return self.side.weight(rows, weight.shape)


class ScaledWeightsPlugin(SupervisedPlugin):
    """Base of the two, for any Avalanche strategy with plain SGD and a head for each task.

    Args:
        samples: random training samples of an experience that define its directions.
        heads: name prefixes of modules that train freely.
        seed: of the samples drawn.

    Attributes:
        experience: number of experiences that have ended.
        scales: task label -> layer name -> bases and scales of the task.
    """

    def __init__(self, samples: int = 125, heads: Sequence[str] = ("classifier",), seed: int = 0) -> None:
        super().__init__()
        self.samples = samples
        self.heads = tuple(heads)
        self.generator = torch.Generator().manual_seed(seed)
        self.experience = 0
        self.scales: dict[int, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._plain: dict[str, Tensor] = {}

    def choose(self, name: str, gradient: Tensor, moments: FeatureMoments) -> list[Tensor]:
        """Before an experience: bases `(K, s)` along which a layer's weight may be rescaled.

        Args:
            name: of the layer.
            gradient: of its weight on samples of the experience, `(rows, K)`.
            moments: of its inputs on them.
        """
        raise NotImplementedError

    def project(self, name: str, gradient: Tensor) -> Tensor:
        """The part `(rows, K)` of a gradient that the weight is trained with."""
        raise NotImplementedError

    def consolidate(self, name: str, moments: FeatureMoments, task: int) -> None:
        """After an experience, with the weights that it is evaluated with: store what it needs."""
        raise NotImplementedError

    def layers(self, model: nn.Module) -> dict[str, tuple[Any, FeatureSide, Any]]:
        """Name -> layer, feature side, geometry, of the layers whose gradients are projected."""
        found = {}
        for name, module in model.named_modules():
            head = any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.heads)
            variant = None if head else reserved_variant(module)
            if variant is not None and name:
                side, geometry = variant.side(module, patch=True)
                if side.groups != 1:
                    raise ValueError(f"{name} has {side.groups} groups, each with inputs of its own. Allowed: 1 group.")
                found[name] = (module, side, geometry)
        return found

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if self.experience == 0:
            return
        layers = self.layers(strategy.model)
        images, labels, tasks = self._draw(strategy)
        with self._seen(layers) as moments, isolated(strategy.model):
            loss = strategy._criterion(avalanche_forward(strategy.model, images, tasks), labels)
            weights = [layer.weight for layer, *_ in layers.values()]
            gradients = torch.autograd.grad(loss, weights)
        trained: list[nn.Parameter] = []
        for (name, (layer, side, _)), gradient in zip(layers.items(), gradients, strict=True):
            bases = self.choose(name, side.rows(gradient)[0], moments[name])
            parametrize.register_parametrization(layer, "weight", ScaledWeight(side, bases))
            trained += list(layer.parametrizations.weight[0].scales)
        self._optimizer = _like(strategy.optimizer, trained) if trained else None

    @torch.no_grad()
    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.experience == 0:
            return
        own = set()
        for name, (layer, side, _) in self.layers(strategy.model).items():
            weight = layer.parametrizations.weight.original
            own |= {id(weight), *(id(scale) for scale in layer.parametrizations.weight[0].scales)}
            if weight.grad is not None:
                found = self.project(name, side.rows(weight.grad)[0])
                weight.grad.copy_(side.weight(found[None], weight.shape))
        for name, parameter in strategy.model.named_parameters():
            if id(parameter) not in own and not any(name.startswith(f"{prefix}.") for prefix in self.heads):
                parameter.grad = None

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        task = strategy.experience.task_label
        layers = self.layers(strategy.model)
        images, _, tasks = self._draw(strategy)
        with self._seen(layers) as moments, isolated(strategy.model), torch.no_grad():
            strategy.model.eval()
            avalanche_forward(strategy.model, images, tasks)
        stored = self.scales.setdefault(task, {})
        for name, (layer, _, _) in layers.items():
            if parametrize.is_parametrized(layer, "weight"):
                held = layer.parametrizations.weight[0]
                stored[name] = [(b, q.detach().clone()) for b, q in zip(held.bases, held.scales, strict=True)]
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            self.consolidate(name, moments[name], task)
        self.experience += 1
        self._optimizer = None

    @torch.no_grad()
    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        stored = self.scales.get(strategy.experience.task_label, {})
        for name, (layer, side, _) in self.layers(strategy.model).items():
            if name in stored:
                self._plain[name] = layer.weight.detach().clone()
                layer.weight.copy_(scaled(side, layer.weight, stored[name]))

    @torch.no_grad()
    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        plain, self._plain = self._plain, {}
        for name, weight in plain.items():
            strategy.model.get_submodule(name).weight.copy_(weight)

    def _draw(self, strategy: Any) -> tuple[Tensor, Tensor, Tensor]:
        data = strategy.experience.dataset
        chosen = torch.randperm(len(data), generator=self.generator)[: self.samples].tolist()
        rows = [data[index] for index in chosen]
        images = torch.stack([row[0] for row in rows]).to(strategy.device)
        labels, tasks = (torch.tensor([int(row[k]) for row in rows], device=strategy.device) for k in (1, -1))
        return images, labels, tasks

    @contextmanager
    def _seen(self, layers: dict[str, tuple[Any, FeatureSide, Any]]) -> Iterator[dict[str, FeatureMoments]]:
        moments = {name: FeatureMoments(side, shape, name) for name, (_, side, shape) in layers.items()}

        def see(found: FeatureMoments) -> Callable[..., None]:
            return lambda module, args: found.update(args[0])

        handles = [layers[name][0].register_forward_pre_hook(see(found)) for name, found in moments.items()]
        try:
            yield moments
        finally:
            for handle in handles:
                handle.remove()


def _like(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One with the same options; `defaults` may hold more than the constructor takes, as those of AdamW do."""
    taken = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(trained, **{name: value for name, value in optimizer.defaults.items() if name in taken})


def scaled(side: FeatureSide, weight: Tensor, stored: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`W + Σ W S Q Sᵀ` for stored pairs of `S` and `Q`."""
    rows = plain = side.rows(weight)
    for basis, scale in stored:
        rows = rows + (plain @ basis @ scale) @ basis.T
    return side.weight(rows, weight.shape)


def gram(moments: FeatureMoments) -> Tensor:
    """Mean second moments `(K, K)` of the feature vectors, float64."""
    [found] = moments.groups()
    matrix = found.matrix.double()
    return (matrix @ matrix.T if found.is_root else matrix) / moments.count
