"""Which stock layers have a variant, and how a module's class becomes that variant and back.

A variant is a mixin put in front of the module's own class, on the module itself: parameters, hooks, buffers,
``state_dict`` keys, aliases and ``isinstance`` stay as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn

from lightning_lance.errors import StateError


class Variant:
    """Base of the mixins."""

    lance_base: ClassVar[type[nn.Module]]
    lance_variant: ClassVar[type[Variant]]

    def lance_leave(self) -> None:
        """Called before the module gets its own class back."""

    def lance_stock(self) -> dict[str, Any]:
        """The ``__dict__`` of a stock module that computes the same."""
        return {name: value for name, value in self.__dict__.items() if name != "_lance"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy, by pickle or deepcopy, is a stock module: nobody would give it its class back.
        return _rebuild, (stock_class(self),), self.lance_stock()  # type: ignore[arg-type]


_VARIANTS: dict[type[nn.Module], type[Variant]] = {}
_CLASSES: dict[tuple[type[nn.Module], type[Variant]], type[nn.Module]] = {}

V = TypeVar("V", bound=type[Variant])


def register(*stock: type[nn.Module]) -> Callable[[V], V]:
    """Class decorator: the mixin is the variant of modules that run the forward of one of these classes."""

    def decorate(variant: V) -> V:
        for cls in stock:
            _VARIANTS[cls] = variant
        return variant

    return decorate


def supported() -> list[str]:
    """Names of the stock classes whose input can be compressed, for messages."""
    return sorted(cls.__name__ for cls in _VARIANTS)


def registered() -> dict[type[nn.Module], type[Variant]]:
    """Stock class -> its variant."""
    return dict(_VARIANTS)


def find(module: nn.Module) -> type[Variant] | None:
    """Variant for the forward that would run: a subclass with a ``forward`` of its own has none."""
    base = base_class(module)
    for cls in base.__mro__:
        if cls in _VARIANTS:
            same = all(getattr(base, name) is getattr(cls, name) for name in _forward_names(cls))
            return _VARIANTS[cls] if same else None
    return None


def overrides(module: nn.Module) -> str | None:
    """Name of the supported class whose forward the module's class replaces by its own, or ``None``."""
    if find(module) is not None:
        return None
    found = [cls for cls in base_class(module).__mro__ if cls in _VARIANTS]
    return found[0].__name__ if found else None


def _forward_names(cls: type[nn.Module]) -> list[str]:
    return [name for name in ("forward", "_conv_forward", "_check_input_dim") if hasattr(cls, name)]


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be swapped whatever its type, or ``None``."""
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if getattr(module, "parametrizations", None) is not None:
        return "its parameters are parametrized (torch.nn.utils.parametrize)"
    if any(hook.__class__.__module__.startswith("torch.nn.utils") for hook in module._forward_pre_hooks.values()):
        return "its parameters are recomputed by a torch.nn.utils hook (weight_norm, spectral_norm or prune)"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "it is lazy and not initialised yet"
    return None


def is_variant(module: nn.Module) -> bool:
    """Whether the module's class holds one of our mixins."""
    return isinstance(module, Variant)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, without our mixin."""
    return module.lance_base if isinstance(module, Variant) else type(module)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without our mixin, and with what another tool has put on top of ours since."""
    return _without(type(module))


def variant_class(base: type[nn.Module], variant: type[Variant]) -> type[nn.Module]:
    """The class ``(variant, base)``, made once."""
    key = (base, variant)
    if key not in _CLASSES:
        namespace = {"lance_base": base, "lance_variant": variant, "__module__": base.__module__}
        namespace["__doc__"] = f"{base.__name__} with {variant.__name__}."
        namespace["__signature__"] = inspect.signature(base)
        _CLASSES[key] = type(f"Lance{base.__name__}", (variant, base), namespace)
    return _CLASSES[key]


def install(module: nn.Module, variant: type[Variant]) -> None:
    """Make the module an instance of the variant of its own class."""
    if isinstance(module, Variant):
        raise StateError(f"{type(module).__name__} is swapped already; restore it first.")
    module.__class__ = variant_class(type(module), variant)


def uninstall(module: nn.Module) -> None:
    """Give the module its own class back, also where another tool has put a class on top of ours since."""
    if isinstance(module, Variant):
        module.lance_leave()
        module.__class__ = _without(type(module))
    module.__dict__.pop("_lance", None)


def _without(cls: type[Any]) -> type[Any]:
    if cls.__dict__.get("lance_base") is not None:
        return cls.__dict__["lance_base"]  # type: ignore[no-any-return]
    if not issubclass(cls, Variant):
        return cls
    bases = tuple(_without(base) for base in cls.__bases__)
    namespace = {key: value for key, value in cls.__dict__.items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__.replace("Lance", ""), bases, namespace)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)
