"""The stored state of a stream, and of its running experience, checked as a whole before any of it is used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from lightning_lance.continual.account import Account, LayerAccount
from lightning_lance.continual.memory import LayerMemory
from lightning_lance.continual.own_values import OwnValues, Values, read_values, weight_of
from lightning_lance.continual.rules import Now, Rule
from lightning_lance.continual.stored_memory import ADVICE, read_columns
from lightning_lance.errors import StateError
from lightning_lance.tensors.checked import Stored

if TYPE_CHECKING:
    from lightning_lance.continual.config import ContinualConfig

CONTINUAL_STATE_VERSION = 6


class StoredStream(NamedTuple):
    """A stream between two experiences, see :class:`~lightning_lance.continual.ContinualSession`.

    Attributes:
        experience: experiences that have ended.
        history: what each had taken of each layer; none of those that ended before there was a history.
        memories: layer name -> what it protects.
        known: names of modules that were there.
        said: what has been warned of.
        rule: the rule, with its state.
        own: values of norms and biases that single experiences have for themselves.
        selected: name of the experience that the model was of.
        shared: name of a tensor that is its own -> what all share of it.
        merged: name of such a tensor -> fingerprint of what it has.
        pending: what the weights have that is not shared, of a state that was taken within an experience.
    """

    experience: int
    history: list[Account]
    memories: dict[str, LayerMemory]
    known: set[str]
    said: set[str]
    rule: Rule
    own: OwnValues
    selected: str | None
    shared: dict[str, Tensor]
    merged: dict[str, float]
    pending: dict[str, Any] | None


def read_stream(state: Any, options: ContinualConfig, fresh: Rule) -> StoredStream:
    """Read what ``ContinualSession.state_dict`` returned, or raise before anything is changed.

    Args:
        state: plain containers and tensors.
        options: of the stream that is to go on.
        fresh: its rule, which is copied.

    Raises:
        StateError: a value is missing, of another type, shape or dtype, not finite or out of range, a basis is not
            orthonormal, or the state is of another version, feature side or rule.
    """
    stored = Stored(state, "the stored stream", ADVICE)
    (version,) = stored.fields("version")
    if type(version.value) is not int or version.value != CONTINUAL_STATE_VERSION:
        version.refuse(
            f"version {CONTINUAL_STATE_VERSION}, the one that this package reads; continue another with the version of "
            "the package that wrote it"
        )
    side, experience, memories, known, said, rule, own, selected, pending = stored.fields(
        "feature_side", "experience", "memories", "known", "said", "rule", "own", "selected", "pending"
    )
    if side.text() != options.feature_side:
        side.refuse(f"feature_side={options.feature_side!r}, as asked for; give the stored one to go on")
    found = {name: LayerMemory.read(item, name) for name, item in memories.named()}
    name, kept = rule.items(2)
    if name.text() != options.rule:
        name.refuse(f"rule={options.rule!r}, as asked for; give the stored one to go on")
    fresh.check_state(kept, found)
    following = copy.deepcopy(fresh)
    try:
        following.load_state_dict(kept.value)
    except StateError:
        raise
    except Exception as error:  # of a rule that does not check
        raise StateError(f"{kept.place} cannot be read ({type(error).__name__}: {error}). {ADVICE}") from error
    if pending.value is not None:
        opened, running, before = pending.fields("opened", "rule", "shared")
        following.check_running(running, found, _opened(opened, found))
        read_values(before)
    values = OwnValues.read(own)
    chosen, shared, merged = _selected(selected, following, found, values)
    return StoredStream(
        experience.integer(0),
        _history(stored.fields("history")[0]) if "history" in state else [],
        found,
        {item.text() for item in known.items()},
        {item.text() for item in said.items()},
        following,
        values,
        chosen,
        shared,
        merged,
        pending.value,
    )


def _history(stored: Stored) -> list[Account]:
    history = []
    for account in stored.items():
        rows = []
        for row in account.items():
            layer, width, protected, own, size, frozen = row.items(len(LayerAccount._fields))
            taken = protected.integer(0, width.integer(1))
            numbers = width.integer(1), taken, own.integer(0, taken), size.integer(0)
            rows.append(LayerAccount(layer.text(), *numbers, frozen.flag()))
        history.append(rows)
    return history


def _known_layer(stored: Stored, name: str, memories: Mapping[str, LayerMemory]) -> LayerMemory:
    if name not in memories:
        stored.refuse("entries of layers in ['memories']", f"an entry of {name!r}")
    return memories[name]


def _opened(stored: Stored, memories: Mapping[str, LayerMemory]) -> dict[str, list[list[int]]]:
    found = {}
    for name, item in stored.named():
        memory = _known_layer(item, name, memories)
        found[name] = read_columns(item, memory.counts)
        if not memory.has_columns:
            item.refuse("columns of a layer that stores some")
    return found


def _selected(
    stored: Stored, rule: Rule, memories: Mapping[str, LayerMemory], values: OwnValues
) -> tuple[str | None, dict[str, Tensor], dict[str, float]]:
    if stored.value is None:
        return None, {}, {}
    own, shared, merged = stored.items(3)
    if own.text() not in rule.names:
        own.refuse(f"None or the name of an experience that has ended: {', '.join(map(repr, rule.names)) or 'none'}")
    weights, layers = read_values(shared), {weight_of(name): memory for name, memory in memories.items()}
    theirs = values.of(own.text())
    for name, item in shared.named():
        if name in theirs:
            item.tensor(theirs[name].shape, (theirs[name].dtype,))
            continue
        memory = _known_layer(item, name, layers)
        if not weights[name].is_floating_point() or weights[name].numel() % (memory.width * memory.groups):
            item.refuse(f"a weight for {memory.groups} groups of width {memory.width}")
    sums = {name: item.number() for name, item in merged.named()}
    if sums.keys() != weights.keys():
        merged.refuse(f"numbers for {', '.join(weights) or 'no layer'}", f"numbers for {', '.join(sums) or 'no layer'}")
    return own.text(), weights, sums


class StoredExperience(NamedTuple):
    """A running experience, see :meth:`ContinualSession.running_state`.

    Attributes:
        now: the experience.
        before: module name -> fingerprint at its beginning.
        layers: layer name -> its state.
        compression: state of the compression, to be checked by it; ``None``: there is none.
        rule: state of the rule.
        shared: what all experiences share of the norms and biases that it has for itself.
    """

    now: Now
    before: dict[str, float]
    layers: dict[str, StoredLayer]
    compression: Any
    rule: Any
    shared: Values


class StoredLayer(NamedTuple):
    """One layer: columns that are opened, ``U``, sizes of steps beside ``M``, and the state of its reservation."""

    opened: list[list[int]] | None
    reserved: Tensor | None
    steps: Tensor | None
    reservation: Stored


def read_experience(state: Any, experience: int, memories: Mapping[str, LayerMemory], rule: Rule) -> StoredExperience:
    """Read what ``ContinualSession.running_state`` returned, or raise before anything is changed.

    Args:
        state: plain containers and tensors.
        experience: index of the experience that is to go on.
        memories: of the session, in its state at the beginning of the experience; layers that are new have none.
        rule: its rule, in that state too.

    Raises:
        StateError: a value is missing, of another type, shape or dtype, not finite or out of range, or it is the state
            of another experience. The shapes of reservations are for
            :meth:`~lightning_lance.continual.reservation.Reservation.check`.
    """
    stored = Stored(state, "the stored experience", "Load another checkpoint, or begin the experience again.")
    layers, compression, before, now, kept, shared = stored.fields(
        "layers", "compression", "before", "now", "rule", "shared"
    )
    index, own, damping = now.items(3)
    if index.integer(0) != experience:
        index.refuse(f"{experience}, the experience that the stored stream is in")
    following = Now(experience, None if own.value is None else own.text(), damping.number(0.0))
    found, opened = {}, {}
    for name, item in layers.named():
        if isinstance(item.value, dict):  # of before they were stored
            item = Stored({"steps": None, **item.value}, item.place, item.advice)
        columns, reserved, steps, reservation = item.fields("opened", "reserved", "steps", "reservation")
        memory = memories.get(name)
        directions = None
        if reserved.value is not None:
            if memory is None:
                reserved.refuse("None for a layer that protects nothing")
            directions = reserved.tensor((memory.groups, memory.width, None), (memory.dtype,))
            for part in directions:
                reserved.orthonormal(part, zeros=True)
        if columns.value is not None:
            if memory is None or not memory.has_columns:
                columns.refuse("None for a layer that stores no columns")
            opened[name] = read_columns(columns, memory.counts)
        sizes = None
        if steps.value is not None:
            if memory is None or not memory.has_columns or directions is not None:
                steps.refuse("None for a layer that stores no directions beside its basis")
            sizes = steps.tensor((memory.groups, memory.beside), (memory.dtype,))
            if bool(((sizes < 0.0) | (sizes > 1.0)).any()):
                steps.refuse("sizes from 0 to 1", f"a tensor from {float(sizes.min()):.3g} to {float(sizes.max()):.3g}")
        found[name] = StoredLayer(opened.get(name), directions, sizes, reservation)
    rule.check_running(kept, memories, opened)
    if not isinstance(compression.value, (dict, type(None))):
        compression.refuse("None, or the state of a session")
    sums = {name: item.real() for name, item in before.named()}
    return StoredExperience(following, sums, found, compression.value, kept.value, read_values(shared))


__all__ = [
    "CONTINUAL_STATE_VERSION",
    "StoredExperience",
    "StoredLayer",
    "StoredStream",
    "read_experience",
    "read_stream",
]
