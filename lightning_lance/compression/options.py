"""A dataclass is the one list of options, whoever takes them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, get_type_hints

Options = ParamSpec("Options")
Init = TypeVar("Init", bound=Callable[..., None])
Made = TypeVar("Made")


def takes(
    options: Callable[Options, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, Options], None]]:
    """Say that an ``__init__(self, *args, **kwargs)`` hands its arguments to a dataclass of options.

    Type checkers, ``inspect.signature``, ``help`` and command lines then show the fields of the dataclass, with the
    defaults, types and help texts that they have there.

    Args:
        options: the dataclass; it and those it inherits from explain their fields under ``Attributes:``.
    """
    return also_takes(options)


def also_takes(options: Any) -> Callable[[Init], Init]:
    """As :func:`takes`, for one with keyword arguments of its own; type checkers do not see the fields.

    Args:
        options: see :func:`takes`.
    """

    def declare(init: Init) -> Init:
        types, texts, declared = get_type_hints(options), _texts(options), cast(Any, init)
        given = [p.replace(annotation=types[name]) for name, p in inspect.signature(options).parameters.items()]
        described = [f"    {found.name}: {texts[found.name]}" for found in given if found.name in texts]
        first, *own = inspect.signature(init).parameters.values()
        if any(parameter.kind is parameter.KEYWORD_ONLY for parameter in own):
            given = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in given]
            given = [*own[:-1], *given, own[-1]]  # the last one is **kwargs
        declared.__signature__ = inspect.Signature([first, *given])
        declared.__annotations__ = {parameter.name: parameter.annotation for parameter in given}
        declared.__doc__ = "\n".join(["Options.", "", "Args:", *described])
        return init

    return declare


def made(owner: object, options: Callable[..., Made], args: Sequence[Any], given: Mapping[str, Any]) -> Made:
    """The dataclass of options that somebody was given.

    Args:
        owner: who; named in the error.
        options: the dataclass.
        args: its arguments.
        given: those by name.

    Raises:
        TypeError: there is no such option.
    """
    allowed = list(inspect.signature(options).parameters)
    for name in given:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{type(owner).__name__} has no option {name!r}.{meant} Allowed: {', '.join(allowed)}.")
    return options(*args, **given)


def _texts(options: Any) -> dict[str, str]:
    """Field -> its lines under ``Attributes:``, those of a class before those of the classes it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(options.__mro__):
        section = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        name = ""
        for line in section.splitlines():
            if line.startswith("     "):
                found[name] += f"\n{line}"
            else:
                name, _, text = line.strip().partition(": ")
                found[name] = text
    return found
