"""Griffe extension: the roles of our docstrings, such as ``:class:`~a.b.C```, as links of the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([^`]+)`")


def _link(found: re.Match[str]) -> str:
    short, target = found.groups()
    name = target.rsplit(".", 1)[-1] if short else target
    return f"`{name.lstrip('.')}`"


class Roles(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
