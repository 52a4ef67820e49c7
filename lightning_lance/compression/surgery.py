"""Plan, swap, restore: which layers become variants, without a Trainer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_lance import layers as _layers  # noqa: F401  (fills the registry)
from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.skipping import skipped_layers
from lightning_lance.errors import PlanError, StateError
from lightning_lance.layers import registry
from lightning_lance.layers.compressed import Compressed, LayerState
from lightning_lance.subspaces.ranks import ModeRanks, closest, matches
from lightning_lance.tensors.orders import SampleOrder


@dataclass(frozen=True)
class Planned:
    """One module to be swapped.

    Attributes:
        name: qualified name.
        module: the module.
        variant: mixin that it gets.
        ranks: rank rules.
    """

    name: str
    module: nn.Module
    variant: type[registry.Variant]
    ranks: ModeRanks


@dataclass(frozen=True)
class LeftAlone:
    """One module with trainable parameters that stays as it is, and why."""

    name: str
    type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.type}): {self.reason}"


@dataclass(frozen=True)
class Plan:
    """What :func:`swap` would do.

    Attributes:
        entries: modules to be swapped, whose inputs are projected.
        left: modules with a trainable weight matrix or kernel that are left alone, where anything is projected.
        config: the options that it was made from.
        automatic: modules whose inputs are projected if that turns out to cost nothing.
    """

    entries: list[Planned]
    left: list[LeftAlone] = field(default_factory=list)
    config: LanceConfig = field(default_factory=LanceConfig)
    automatic: list[Planned] = field(default_factory=list)


def plan(model: nn.Module, config: LanceConfig | None = None, heads: Collection[str] = ()) -> Plan:
    """Check the whole model against the options; change nothing.

    A module is swapped where the forward that would run is a stock one. Modules with a forward of their own,
    with parametrizations, lazy or scripted ones are left alone.

    Args:
        model: any module.
        config: the options.
        heads: names of modules that ``skip`` takes for classifiers; the last layer by default.

    Returns:
        What would be swapped, which is nothing where no rank or budget asks for it, and why the rest with trainable
        parameters is not.

    Raises:
        PlanError: something is to be projected and nothing can be, or a pattern matches nothing.
    """
    config = config or LanceConfig()
    rules = config.rules()
    skipped = skipped_layers(model, config.skip, heads)
    candidates: list[Planned] = []
    left: list[LeftAlone] = []
    for name, module in _layers_of(model):
        variant = registry.find(module)
        reason = None if variant is None else skipped.get(name) or registry.refusal(module)
        weight = _weight(module)
        if reason is None and variant is not None and weight is not None and weight.requires_grad:
            ranks = rules.for_layer(name)
            if ranks.automatic and config.budget is not None:
                ranks = ModeRanks()  # what is truncated is then for the budget to say
            candidates.append(Planned(name, module, variant, ranks))
        elif _trains_a_matrix(module):
            why = reason or _unsupported(module)
            left.append(LeftAlone(name or "the model itself", registry.base_class(module).__name__, why))
    asked = config.budget is not None or any(ranks.projects for ranks in rules.all_rules())
    if not candidates:
        if asked:
            raise PlanError(_nothing(model, left))
        return Plan([], [], config)
    chosen = _select(candidates, config.layers, left, _frozen_names(model))
    _check_rank_patterns(rules.patterns, [*(entry.name for entry in candidates), *_frozen_names(model)])
    automatic = [entry for entry in candidates if entry.ranks.automatic and entry.name in chosen]
    if not asked:
        return Plan([], [], config, automatic)
    entries = []
    for entry in candidates:
        if entry in automatic:
            continue
        why = f"not in layers={config.layers!r}" if entry.name not in chosen else ""
        if not why and config.budget is None and not entry.ranks.projects:
            why = "its rank rules keep every mode whole"
        if why:
            left.append(LeftAlone(entry.name, registry.base_class(entry.module).__name__, why))
        else:
            entries.append(entry)
    return Plan(entries, left, config, automatic)


def _layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, without those that compute the parameters of others (torch.nn.utils.parametrize)."""
    for name, module in model.named_modules():
        if ".parametrizations." not in f".{name}.":
            yield name, module


def _weight(module: nn.Module) -> Any:
    """The weight of a layer; ``None`` where it is parametrized: computing it may move buffers (spectral norm)."""
    return None if parametrize.is_parametrized(module, "weight") else getattr(module, "weight", None)


def _trains_a_matrix(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        parameters += module.parametrizations.parameters()  # type: ignore[union-attr]
    matrix = any(nn.parameter.is_lazy(parameter) or parameter.dim() > 1 for parameter in parameters)
    return matrix and any(parameter.requires_grad for parameter in parameters)


def _unsupported(module: nn.Module) -> str:
    kind = registry.base_class(module)
    if isinstance(module, nn.MultiheadAttention):
        return "it computes its projections by itself, without calling layers"
    stock = registry.overrides(module)
    if stock is not None:
        return f"{kind.__module__}.{kind.__name__} has a forward of its own, not that of {stock}"
    own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    if own and any(True for _ in module.children()):
        return f"its forward uses parameters of its own beside those of its layers: {', '.join(own)}"
    return f"no variant for {kind.__name__}"


def _nothing(model: nn.Module, left: list[LeftAlone]) -> str:
    allowed = ", ".join(registry.supported())
    frozen = _frozen_names(model)
    text = (
        f"no layer of {type(model).__name__} can be projected. Supported, with a weight that requires grad: {allowed}."
    )
    if frozen:
        text += (
            f" {len(frozen)} supported layers are frozen, such as {frozen[-1]}: set requires_grad on those to train."
        )
    if left:
        text += " Left alone: " + "; ".join(map(str, left[:5])) + "."
    return text


def _frozen_names(model: nn.Module) -> list[str]:
    """Supported layers whose weight is frozen; they may join when a fine-tuning schedule unfreezes them."""
    return [name for name, module in model.named_modules() if registry.find(module) and _is_frozen(module)]


def _is_frozen(module: nn.Module) -> bool:
    weight = _weight(module)
    return weight is not None and not weight.requires_grad and registry.find(module) is not None


def _select(candidates: list[Planned], layers: object, left: list[LeftAlone], frozen: list[str]) -> set[str]:
    names = [entry.name for entry in candidates]
    if layers == "trainable":
        return set(names)
    if isinstance(layers, int):
        return set(names[-layers:])
    patterns = [layers] if isinstance(layers, str) else list(layers)  # type: ignore[call-overload]
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if matches(name, pattern)}
        if not found and not any(matches(name, pattern) for name in frozen):
            barred = [str(item) for item in left if matches(item.name, pattern)]
            because = f" It names only what is left alone: {'; '.join(barred[:3])}." if barred else ""
            raise PlanError(
                f"layers={pattern!r} matches no layer that can be projected.{because} There are {len(names)}, "
                f"such as {closest(pattern, names)}. Patterns are shell-style ('layer4.*') or the name of a container."
            )
        chosen |= found
    if not chosen:
        raise PlanError(
            f"layers={layers!r} names only layers whose weight is frozen, such as {closest(patterns[0], frozen)}. Set "
            f"requires_grad on those to train, or name others: there are {len(names)}, such as {', '.join(names[:3])}."
        )
    return chosen


def _check_rank_patterns(patterns: dict[str, ModeRanks], names: list[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise PlanError(
                f"rank[{pattern!r}] matches no layer that can be projected. There are {len(names)}, such as "
                f"{closest(pattern, names)}. Allowed keys: such a pattern, or the modes batch, channel, spatial."
            )


def swap(model: nn.Module, what: Plan | LanceConfig | None = None) -> Plan:
    """Swap layers in place, as planned. Until :func:`~lightning_lance.calibrate` they run the stock path.

    Args:
        model: the model that the plan was made for.
        what: a plan, or the options to make one from.

    Returns:
        The plan.

    Raises:
        StateError: the model is swapped already, or the plan is one of another model.
        PlanError: see :func:`plan`.
    """
    if is_swapped(model):
        raise StateError("the model is swapped already. Call restore(model) first.")
    made = what if isinstance(what, Plan) else plan(model, what)
    _check_same_model(model, made)
    order = SampleOrder(made.config.seed)
    try:
        for entry in made.entries:
            _install(entry, made.config, order)
    except BaseException:
        restore(model)
        raise
    return made


def _check_same_model(model: nn.Module, made: Plan) -> None:
    own = set(model.modules())
    foreign = [entry.name for entry in made.entries if entry.module not in own]
    if foreign:
        raise StateError(
            f"the plan is one of another model: {len(foreign)} of its {len(made.entries)} layers, such as "
            f"{foreign[0]!r}, are not in this one. Make a new one with plan(model)."
        )


def join(model: nn.Module, made: Plan) -> list[str]:
    """Swap, in a swapped model, the layers of a newer plan that are not compressed yet.

    Args:
        model: a swapped model.
        made: a plan of the model as it is now, after the weights of some layers were unfrozen.

    Returns:
        Names of the layers that joined. They run the stock path until calibrated.

    Raises:
        StateError: the model is not swapped.
    """
    order = next((layer._lance.order for layer in _swapped(model)), None)
    if order is None:
        raise StateError("the model is not swapped. Call swap(model) first.")
    joined = [entry for entry in made.entries if not isinstance(entry.module, Compressed)]
    for entry in joined:
        _install(entry, made.config, order)
    return [entry.name for entry in joined]


def _install(entry: Planned, config: LanceConfig, order: SampleOrder) -> None:
    registry.install(entry.module, entry.variant)
    unbiased, learned = config.batch == "unbiased", config.batch == "learned"
    state = LayerState(entry.name, True, entry.ranks, unbiased, order, learned=learned)
    entry.module.__dict__["_lance"] = state


def restore(model: nn.Module) -> None:
    """Give every module its own class back. Does nothing to a model that is not swapped."""
    for module in model.modules():
        registry.uninstall(module)


def is_swapped(model: nn.Module) -> bool:
    """Whether any module is one of our variants."""
    return any(registry.is_variant(module) for module in model.modules())


def compressed_layers(model: nn.Module) -> dict[str, Compressed]:
    """Name -> layer, for the layers whose input is, or is to be, compressed."""
    return {layer._lance.name: layer for layer in _swapped(model) if layer._lance.selected}


def _swapped(model: nn.Module) -> Iterator[Compressed]:
    for module in walk(model):
        if isinstance(module, Compressed):
            yield module


def walk(model: nn.Module) -> list[nn.Module]:
    """The modules of a model in the order of :meth:`torch.nn.Module.modules`, several times as fast: no names."""
    found, seen, waiting = [], set(), [model]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            found.append(module)
            if module._modules:
                waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return found
