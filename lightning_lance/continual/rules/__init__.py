"""Which rules there are: a name for each, and the file that it is in.

A new rule is a file here with a class that is a :class:`~lightning_lance.continual.rules.rule.Rule`, and a line below;
docs/continual.md builds one.
"""

from __future__ import annotations

from lightning_lance.continual.rules.columns import Columns
from lightning_lance.continual.rules.rule import Layer, Now, Rule
from lightning_lance.continual.rules.scaled import Scaled
from lightning_lance.continual.rules.threshold import Threshold

RULES: dict[str, type[Rule]] = {
    "columns": Columns,
    "threshold": Threshold,
    "scaled": Scaled,
}

__all__ = ["RULES", "Layer", "Now", "Rule"]
