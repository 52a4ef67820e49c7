"""What one step keeps, by layer and by operator, next to what plain training would keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lightning_lance.compression.advice import advice, in_bits
from lightning_lance.compression.kept import Kept, Stretch, View
from lightning_lance.compression.recipes import NormInput
from lightning_lance.compression.report import LayerReport, Report
from lightning_lance.compression.saved_bytes import Holder, ModuleNames, SavedBytes
from lightning_lance.compression.store import Saved
from lightning_lance.layers.registry import base_class
from lightning_lance.subspaces.subspace import CapturedEnergy, LayerStatistics

if TYPE_CHECKING:
    from lightning_lance.compression.session import LanceSession

OWN = 1 / 16
"""Where no more than this part of an input is kept for one layer alone, it is computed from what others keep."""


class Ledger:
    """What one step keeps: written by the store, read where that is most, before a backward pass or at the end.

    Args:
        session: whose step it is.

    Attributes:
        fixed: bytes of what is kept whatever the ranks, in the bits that are asked for.
        inputs: likewise, bytes of whole inputs with spatial or token modes that are to be projected, and that nobody
            else keeps.
        total: likewise, bytes of all that is kept, but for the cores of layers that are projected already.
        spared: names of layers whose whole inputs are computed from what is kept in any case.
    """

    def __init__(self, session: LanceSession) -> None:
        self.session = session
        self.store = session._store
        self.energies: dict[str, CapturedEnergy] = {}
        self._found: tuple[SavedBytes, SavedBytes] | None = None
        self._kept_in = self.store.bits
        self._read = 0
        self.fixed = 0
        self.inputs = self.total = 0
        self.spared: set[str] = set()

    @contextmanager
    def open(self) -> Iterator[None]:
        names = ModuleNames()
        store, layers = self.store, self.session.layers
        for name, layer in layers.items():
            if layer._lance.observer is None and layer._lance.subspace is not None:
                self.energies[name] = layer._lance.observer = CapturedEnergy(layer._lance.subspace, layer.channel_axis)
        store.ledger, store.names, store.on_backward = [], names, self.look
        try:
            with names.of(self.session.model):
                yield
            self.look()
        finally:
            store.ledger, store.names, store.on_backward = None, None, None
            for name in self.energies:
                layers[name]._lance.observer = None

    def look(self) -> None:
        """Count what is alive, if more was saved since the last time."""
        ledger = self.store.ledger
        if ledger is None or len(ledger) == self._read:
            return
        self._read = len(ledger)
        plain: list[Saved] = []
        kept: dict[int, Saved] = {}
        fixed: set[int] = set()
        users: dict[str, set[int]] = {name: set() for name in self.session.layers}
        for saved in ledger:
            if saved.kept is None:
                plain.append(saved)
                continue
            alive = saved.kept()
            if alive is None:
                continue
            if not saved.ours:
                plain.append(saved)
            bits = _bits(alive)
            for identity, nbytes in alive.parts():
                first = kept.setdefault(identity, saved._replace(nbytes=nbytes, bits=bits))
                for_weight = first.for_weight and saved.for_weight
                kept[identity] = first._replace(
                    for_weight=for_weight,
                    bits=first.bits or bits,
                    shared=first.shared or first.module != saved.module,
                )
                if saved.for_weight and saved.module in users:
                    users[saved.module].add(identity)
                else:
                    fixed.add(identity)
        found = SavedBytes.of(plain), SavedBytes.listed(kept.values())
        if self._found is None or found[0].total > self._found[0].total:
            self._found, self._kept_in = found, self.store.bits
            asked = self.session.config.kept_bits
            size = {name: in_bits(Holder.of(found), self.store.bits, asked).bytes for name, found in kept.items()}
            self.fixed = sum(size[identity] for identity in fixed)
            waiting = {name for name, layer in self.session.layers.items() if layer._lance.subspace is None}
            whole = set().union(*(users[name] for name in waiting))
            rows = set().union(*(users[name] for name in waiting if self._reads_rows(name)))
            self.inputs = sum(size[one] for one in whole - fixed - rows)
            self.total = sum(size[one] for one in whole | fixed)
            self.spared = {
                name
                for name in waiting
                if sum(size[i] for i in users[name] - fixed) < OWN * sum(size[i] for i in users[name])
            }

    def _reads_rows(self, name: str) -> bool:
        """Whether each sample is one row to a layer: compact keeps it whole. Saved tensors may be flattened."""
        seen = self.session.layers[name]._lance.observer
        return isinstance(seen, LayerStatistics) and seen.tensors() != [] and len(seen.channels_first_shape) < 3

    @property
    def plain(self) -> int:
        """Bytes that plain training would keep."""
        return 0 if self._found is None else self._found[0].total

    def report(self, resting: bool = False) -> Report | None:
        """What was found; ``None`` where nothing was kept at all.

        Args:
            resting: the steps to come run plainly.
        """
        if self._found is None:
            return None
        session, (plain, kept) = self.session, self._found
        if resting:
            return Report.of_little(plain)
        measured = kept.by_module()
        rows = []
        for name, layer in session.layers.items():
            seen, subspace = self.energies.get(name), layer._lance.subspace
            if seen is None or subspace is None or not seen.shapes:
                continue
            shape = seen.shapes[0]
            sizes = [(s[0], s[1], s[2:]) for s in seen.shapes]
            whole = sum(torch.Size(s).numel() * seen.itemsize for s in seen.shapes)
            core = subspace.core_shape(*sizes[0]) if subspace.shrinks(*sizes[0]) else shape
            formula = sum(subspace.formula_bytes(*size, seen.itemsize) for size in sizes)
            kind = base_class(layer).__name__  # type: ignore[arg-type]
            energy = dict(subspace.energy)
            rows.append(LayerReport(name, kind, shape, core, energy, whole, formula, measured.get(name, 0)))
        held, total = sum(e.kept for e in self.energies.values()), sum(e.total for e in self.energies.values())
        return Report(rows, list(session.left), plain, kept, held / total if total else None, self._notes(kept))

    def _notes(self, kept: SavedBytes) -> list[str]:
        session = self.session
        asked = [name for name, layer in session.layers.items() if not layer._lance.ranks.automatic]
        changes = advice(kept, session.config, session.model, asked, self._kept_in)
        return ["to keep less:", *(f"  {change}" for change in changes)] if changes else []


def _bits(kept: Kept | None) -> int | None:
    """Bits of an element of what stands for a tensor; ``None``: it is not rounded."""
    if isinstance(kept, NormInput):
        kept = kept.kept
    memory = kept.stretch if isinstance(kept, View) else None
    return memory.bits if isinstance(memory, Stretch) else None
