"""What ``rank="auto"`` truncates: inputs that are most of what a step keeps, where a few directions hold most of them.

The first step says, without any further pass, which inputs are kept for the gradient of one weight and nothing else.
Where these are most of all that is kept, as in fine-tuning with fixed norms, the next steps find their subspaces. From
then on the energy that these hold is measured now and then.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from lightning_lance.compression.config import LanceConfig
from lightning_lance.compression.kept import Flags
from lightning_lance.compression.store import Saved
from lightning_lance.layers.compressed import Compressed
from lightning_lance.subspaces.ranks import SAFE
from lightning_lance.subspaces.subspace import CapturedEnergy, LayerSubspace

SHARE = 0.6
"""Part of all kept bytes that the inputs of weights have to be, so that projecting them is worth its while. Norms and
activations, whose share that leaves as it is, hold more than half of what training mode keeps."""

KEPT_ANYWAY = "its input is kept in any case, or computed from what is"
"""Why a layer is not projected by a rule that is to save memory."""

WATCH = 50
"""Steps from one look at the captured energy to the next."""

logger = logging.getLogger("lightning_lance")


def saves_little(inputs: int, total: int, config: LanceConfig) -> bool:
    """Whether ``"compact"`` projects nothing: inputs are less than :data:`SHARE` of what is kept, and none is named."""
    return config.layers == "trainable" and inputs < SHARE * total


def worth_looking(ledger: Sequence[Saved], names: Collection[str]) -> set[str]:
    """Layers whose inputs, with spatial or token modes, nobody else keeps, where these are most of what is kept.

    Args:
        ledger: what a step saved.
        names: of the layers that may be truncated.

    Returns:
        All such layers, or none.
    """
    users: dict[int, set[str]] = {}
    sizes: dict[int, int] = {}
    rows: set[str] = set()
    for saved in ledger:
        alive = None if saved.kept is None else saved.kept()
        if alive is None or (isinstance(alive, Flags) and alive.bits is None):
            continue  # flags are read from what another layer keeps, while it does
        if len(saved.shape) < 3:
            rows.add(saved.module)
        for identity, nbytes in alive.parts():
            users.setdefault(identity, set()).add(saved.module)
            sizes[identity] = nbytes
    shared = {name for found in users.values() if len(found) > 1 for name in found}
    alone = set(names) - shared - rows
    held = {identity: found for identity, found in users.items() if found <= alone}
    if sum(sizes[identity] for identity in held) < SHARE * sum(sizes.values()):
        return set()
    return {name for found in held.values() for name in found}


def pays(layer: Compressed, subspace: LayerSubspace) -> bool:
    """Whether truncating the input of a layer saves enough of it, and no time is lost."""
    return bool(subspace.spatial) and all(
        SAFE.pays(
            sizes,
            [size if factor is None else factor.shape[1] for size, factor in zip(sizes, group, strict=True)],
            layer.lance_work(),
            layer.lance_outputs(),
            layer.lance_pointwise(),
        )
        for sizes, group in subspace.spatial.items()
    )


class Watched:
    """The energy that truncated modes hold of the inputs of one step.

    Args:
        layers: name -> layer with a subspace.
    """

    def __init__(self, layers: Mapping[str, Compressed]) -> None:
        self.energies: dict[str, CapturedEnergy] = {}
        self._own: list[Compressed] = []
        for name, layer in layers.items():
            state = layer._lance
            if not isinstance(state.observer, CapturedEnergy):  # else a report asks for the same
                assert state.subspace is not None
                state.observer = CapturedEnergy(state.subspace, layer.channel_axis)
                self._own.append(layer)
            self.energies[name] = state.observer

    def stop(self) -> None:
        """Look no longer."""
        for layer in self._own:
            layer._lance.observer = None

    def drifted(self) -> dict[str, float]:
        """Layers whose inputs have left their subspaces, and the energy that is still held; NaN counts as that."""
        return {
            name: seen.fraction
            for name, seen in self.energies.items()
            if not seen.fraction >= SAFE.least(_truncated(seen.subspace))
        }


def _truncated(subspace: LayerSubspace) -> int:
    """How many modes are truncated, where most are."""
    return max(sum(factor is not None for factor in group) for group in subspace.spatial.values())


def tell(drifted: Mapping[str, float]) -> None:
    """Log which layers are looked at again, in one line."""
    names = ", ".join(f"{name} ({held:.2f})" for name, held in drifted.items())
    logger.info("rank='auto': inputs left their subspaces, which are found anew (energy held): %s", names)
