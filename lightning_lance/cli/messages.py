"""What is wrong with an argument, in one line: the key, the value, what is allowed.

jsonargparse explains a rejected value by the tree of types that it tried, one line for each. This module reads that
text, and falls back on the text itself where it does not know it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lance.compression.config import LanceConfig
from lightning_lance.continual import ContinualConfig
from lightning_lance.errors import ConfigError, LanceError
from lightning_lance.trainer.callback import LanceCallback

MANY = 24
"""More options than this in a group are not all listed: the closest ones are."""

TRAINER_ERRORS = (ValueError, TypeError, MisconfigurationException)
"""What a Trainer raises where it does not take an argument."""

_UNION = "Does not validate against any of the Union subtypes"
_UNSPECIFIC = ("Expected a ", "Not a valid subclass of", _UNION)


@dataclass(frozen=True)
class _Problem:
    """A rejected value; ``value`` and ``allowed`` are ``None`` where the message itself says it all.

    Attributes:
        unknown: the key itself is not an option.
    """

    key: str
    message: str
    value: str | None = None
    allowed: str | None = None
    unknown: bool = False


def shorten(message: str, options: Sequence[str] = ()) -> str:
    """One line for a message of jsonargparse.

    Args:
        message: the message.
        options: every option of the command, such as ``"lance.rank"``.
    """
    unknown = _unknown_option(message)
    if unknown is not None:
        return _no_such_option(unknown, options)
    problem = _read("", message.strip())
    if problem.unknown:
        group = problem.key.rpartition(".")[0]
        names = inspect.signature(LanceCallback).parameters if "LanceCallback" in message else ()
        return _no_such_option(problem.key, [*options, *(f"{group}.{name}" for name in names)])
    own = _own_message(problem, message)
    if own is not None:
        return own
    if problem.value is None:
        return f"{problem.key}: {problem.message}" if problem.key else problem.message
    return f"{problem.key}={problem.value} is not allowed. Allowed: {problem.allowed}."


def explain(error: BaseException) -> str | None:
    """One line for an error of a class that jsonargparse builds from the configuration, or ``None`` if it is no such.

    A union of classes hides our own error in the text of another one.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, LanceError):
            return str(found)
        found = found.__cause__ or found.__context__
    return shorten(str(error)) if _UNION in str(error) else None


def with_group(message: str, options: Sequence[str]) -> str:
    """The message, with ``rank=...`` at its beginning made ``lance.rank=...`` where only one option is called so."""
    found = re.match(r"(\w+)[=\[]", message)
    names = [option for option in options if found and option.rpartition(".")[2] == found[1] and "." in option]
    return f"{names[0].rpartition('.')[0]}.{message}" if len(names) == 1 else message


def about_trainer(error: Exception) -> ConfigError:
    """What a Trainer has against its arguments, in one line."""
    return ConfigError(f"trainer: {_line(str(error))}")


def _read(key: str, text: str) -> _Problem:
    """The most specific problem that a message tells of."""
    text = textwrap.dedent(text).strip()
    named = re.match(r'Parser key "([^"]+)":\s*', text)
    if named:
        return _read(_join(key, named[1]), text[named.end() :])
    expected = re.match(r"Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)", text, re.DOTALL)
    if expected:
        return _Problem(key, text, expected["value"].strip(), readable(expected["type"]))
    option = re.match(r"Option '([^']+)' is not accepted", text)
    if option:
        return _Problem(_join(key, option[1]), text, unknown=True)
    group = re.match(r"Group '([^']+)' does not accept option '([^']+)'", text)
    if group:
        return _Problem(_join(key, _join(group[1], group[2])), text, unknown=True)
    function = re.match(
        r"Type \S+Callable\S* (?:.*?)expects a function.*?: (?P<why>.*)\. Got value: (?P<value>.*)", text
    )
    if function:
        return _Problem(f"{key}={function['value']} is not allowed", f"{function['why']}.")
    path = re.match(r"Problem with given class_path '([^']+)':\s*(.*)", text, re.DOTALL)
    if path and path[2].startswith(('Parser key "', "Option '")):
        return _read(key, path[2])
    if path:
        return _Problem(key, f"{path[1]} cannot be used: {_line(path[2])}")
    if _UNION in text:
        return _read_union(key, text)
    return _Problem(key, _line(text))


def _read_union(key: str, text: str) -> _Problem:
    errors = _items(text)
    for error in errors:
        if not error.startswith(_UNSPECIFIC):
            return _read(key, error)
    types = re.search(r"Subtypes: \[(.*)\]$", text, re.MULTILINE)
    value = text.rpartition("Given value: ")[2].strip()
    return _Problem(key, text, value, readable(types[1]) if types else "see --help")


def _items(text: str) -> list[str]:
    """The items of the outermost list of errors."""
    start = re.search(r"^( *)Errors:\n", text, re.MULTILINE)
    if start is None:
        return []
    indent = len(start[1])
    block: list[str] = []
    for line in text[start.end() :].splitlines():
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line)
    body = textwrap.dedent("\n".join(block))
    return [textwrap.dedent("  " + item).strip() for item in re.split(r"^- ", body, flags=re.MULTILINE) if item.strip()]


def readable(types: str) -> str:
    """Types as jsonargparse prints them, in words: ``"<class 'int'>, typing.Literal['a']"`` -> ``"int, 'a'"``."""
    found = []
    for part in _split(types):
        literal = re.fullmatch(r"typing\.Literal\[(.*)\]", part)
        simple = re.fullmatch(r"<class '(.*)'>", part)
        if literal:
            found += _split(literal[1])
        elif simple:
            found.append({"NoneType": "null", "bool": "true, false", "dict": "a mapping"}.get(simple[1], simple[1]))
        elif part.startswith("dict["):
            found.append("a mapping")
        else:
            found.append(re.sub(r"<class '(.*?)'>", r"\1", part))
    return ", ".join(dict.fromkeys(found))


def _split(types: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in types:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _unknown_option(message: str) -> str | None:
    for pattern in (
        r"unrecognized arguments: (\S+)",
        r"[Ss]ubcommand '\w+' does not accept option '([^']+)'",
        r"^Option '([^']+)' is not accepted",
        r"^Key '([^']+)' is not expected",
    ):
        found = re.search(pattern, message)
        if found:
            return found[1]
    return None


def _no_such_option(given: str, options: Sequence[str]) -> str:
    key, _, value = given.lstrip("-").partition("=")
    key = key.rstrip("+")
    group = key.rpartition(".")[0]
    while group and not any(option.startswith(f"{group}.") for option in options):
        group = group.rpartition(".")[0]
    text = f"{key}{f'={value}' if value else ''} is not an option."
    names = [option.rpartition(".") for option in options]
    siblings = [name for prefix, _, name in names if prefix == group and name != "help"]
    if group and 0 < len(siblings) <= MANY:
        return f"{text} Allowed in {group}: {', '.join(siblings)}."
    near = difflib.get_close_matches(key, options, n=3, cutoff=0.5)
    return f"{text} Close to it: {', '.join(near)}." if near else f"{text} --help lists what is allowed."


def _own_message(problem: _Problem, message: str) -> str | None:
    """What our own check of an option of the callback says: it knows more than its type."""
    group, _, name = problem.key.rpartition(".")
    ours = group == "lance" or "LanceCallback" in message or "ContinualCallback" in message
    if not ours or problem.value is None:
        return None
    for config in (LanceConfig, ContinualConfig):
        if name in config.__dataclass_fields__:
            try:
                config(**{name: _value(problem.value)})
            except ConfigError as error:
                return f"{group}.{error}"
            except TypeError:
                return None
    return None


def _value(text: str) -> Any:
    """The value that a message shows."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _join(outer: str, inner: str) -> str:
    return f"{outer}.{inner}" if outer else inner


def _line(text: str) -> str:
    return " ".join(text.split())
