"""What a rule is: which directions an experience may move and how fast, what is stored afterwards, and its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lance.continual.leftover import LEFT_OUT
from lightning_lance.continual.memory import LayerMemory
from lightning_lance.continual.moments import FeatureMoments
from lightning_lance.ops.features import FeatureSide
from lightning_lance.tensors.checked import Stored

if TYPE_CHECKING:
    from lightning_lance.continual.config import ContinualConfig


class Now(NamedTuple):
    """The experience that begins or ends.

    Attributes:
        experience: its index, from 0.
        own: name of what it alone is evaluated with, such as the label of its task; ``None``: it shares everything.
        damping: of steps outside of what is protected, for the optimisers that train it.
    """

    experience: int
    own: str | None = None
    damping: float = 0.0


class Layer(NamedTuple):
    """One layer, as a rule sees it.

    Attributes:
        module: the layer; ``module.weight`` is its weight.
        side: how the weight is cut into feature vectors.
        memory: what of them is protected.
        moments: second moments of its inputs in the experience; ``None`` where the rule has not asked for them.
        smaller: an optimiser can be given a smaller parameter in the place of the weight.
    """

    module: nn.Module
    side: FeatureSide
    memory: LayerMemory
    moments: FeatureMoments | None = None
    smaller: bool = False

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def rows(self) -> int:
        """Numbers of the weight along one direction of one group."""
        return self.weight.numel() // (self.side.width * self.side.groups)


class Rule:
    """Base of the rules. All layers are given at once, so that a rule can weigh them against each other.

    A subclass says in :meth:`directions` what may move and in :meth:`consolidate` what is stored; the others have an
    answer that is right where nothing but the memories is kept.

    Args:
        options: of the stream.
    """

    def __init__(self, options: ContinualConfig) -> None:
        self.options = options

    def memory(self, side: FeatureSide, label: str, dtype: torch.dtype, device: torch.device, own: bool) -> LayerMemory:
        """A memory for a layer that has none; ``own``: whether experiences come with names of their own."""
        return LayerMemory(side.width, side.groups, label, dtype, device)

    def needs_moments(self, now: Now) -> bool:
        """Whether :meth:`directions` wants the moments of the coming experience."""
        return False

    def directions(self, layers: Mapping[str, Layer], now: Now) -> None:
        """Before training: call :meth:`~lightning_lance.continual.LayerMemory.reserve` of each memory.

        Args:
            layers: those that will train; the memory of one that is new is empty.
            now: the experience.
        """
        raise NotImplementedError

    def freezes(self, layer: Layer, now: Now) -> bool:
        """Whether a layer is too full to train; asked after :meth:`directions`."""
        return layer.memory.capacity().fraction >= self.options.freeze_above

    def detach(self, layers: Mapping[str, Layer], now: Now) -> None:
        """After training, with the weights written out: take what is not shared out of them, and store it."""

    def threshold(self, now: Now) -> float:
        """Energy to protect after an experience."""
        return self.options.threshold_of(now.experience)

    def damped(self, layer: Layer, now: Now) -> tuple[float, int | None]:
        """Where steps are damped: energy, of 1 in all, in directions that are not, and how many are at most."""
        return LEFT_OUT, None

    def consolidate(self, name: str, layer: Layer, now: Now) -> None:
        """After training: store what the experience needs of a layer; its moments are those after training."""
        assert layer.moments is not None
        left_out, most = self.damped(layer, now)
        layer.memory.protect(layer.moments, self.threshold(now), now.damping > 0.0, left_out, most)

    def abandon(self, layers: Mapping[str, Layer]) -> None:
        """The experience has failed, and the weights are written out: take what is not shared out of them."""

    def owns(self, now: Now) -> bool:
        """Whether the experience trains norms and biases, which no basis protects, for itself."""
        return False

    def own_change(self, name: str, layer: Layer, own: str | None) -> Tensor | None:
        """What an experience alone adds to a weight, ``(groups, rows, K)`` in float64; ``None``: nothing."""
        return None

    def not_shared(self, name: str, layer: Layer, rows: Tensor) -> Tensor | None:
        """The part of a weight in training, ``(groups, rows, K)``, that only the running experience has."""
        return None

    def own_columns(self, own: str | None) -> dict[str, tuple[int, int]]:
        """Layer name -> directions that an experience has for itself, and the bytes of what is stored of them."""
        return {}

    @property
    def names(self) -> list[str]:
        """Names of the experiences that have something of their own, or may have."""
        return []

    @property
    def bytes(self) -> int:
        """Size of what the rule stores beside the memories."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and CPU tensors."""
        return {}

    def check_state(self, state: Stored, memories: Mapping[str, LayerMemory]) -> None:
        """Refuse what :meth:`state_dict` does not return; asked before :meth:`load_state_dict`.

        Args:
            state: the stored state.
            memories: layer name -> memory, as stored with it.

        Raises:
            StateError: a value of it is not allowed.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state."""

    def running_state(self) -> dict[str, Any]:
        """What the running experience has beside :meth:`state_dict`."""
        return {}

    def check_running(
        self, state: Stored, memories: Mapping[str, LayerMemory], opened: Mapping[str, list[list[int]]]
    ) -> None:
        """Refuse what :meth:`running_state` does not return; asked before :meth:`resume`.

        Args:
            state: the stored state.
            memories: layer name -> memory, as at the beginning of the experience.
            opened: layer name -> columns that the experience may move.

        Raises:
            StateError: a value of it is not allowed.
        """

    def rows(self, name: str) -> int | None:
        """Rows of a layer's weight that what is stored of it is for; ``None``: any."""
        return None

    def resume(self, layers: Mapping[str, Layer], state: dict[str, Any]) -> None:
        """Go on with :meth:`running_state`; the memories are calibrated."""
