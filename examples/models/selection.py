"""Which layers the paper trains: the last n, as it counts them."""

from __future__ import annotations

from torch import nn

from lightning_lance import ConfigError
from lightning_lance.compression.skipping import counted_layers


def select_published(model: nn.Module, last: int, classifier: str | None = None) -> list[str]:
    """Names of the last ``n`` layers to train and to compress, as the paper counts them.

    Counted are convolutions that are not depthwise, and linear layers; not the classifier, which trains plainly, nor
    the output projection inside of :class:`torch.nn.MultiheadAttention`, which is never called.

    Args:
        model: any module.
        last: how many.
        classifier: name of the classifier; by default the last of all of these layers.

    Returns:
        Names, in the order of the model.

    Raises:
        ConfigError: the number is not allowed, there are not so many layers, or no layer has that name.
    """
    if isinstance(last, bool) or last < 1:
        raise ConfigError(f"last={last!r} is not allowed. Allowed: an int of at least 1.")
    counted = counted_layers(model)
    if classifier is None:
        found = counted[:-1]
    elif any(name == classifier for name, _ in model.named_modules()):
        found = [name for name in counted if not f"{name}.".startswith(f"{classifier}.")]
    else:
        raise ConfigError(
            f"classifier={classifier!r} is not the name of a module. Allowed: such as "
            f"{', '.join(counted[-2:]) or 'fc'}."
        )
    if last > len(found):
        raise ConfigError(
            f"last={last} is not allowed: {type(model).__name__} has {len(found)} convolutions and linear layers "
            "beside its classifier and depthwise convolutions. Allowed: at most that many."
        )
    return found[-last:]
