"""A network with one linear head per task, grown by Avalanche as tasks arrive."""

from __future__ import annotations

from avalanche.models import MultiHeadClassifier, MultiTaskModule
from torch import Tensor, nn


class MultiHead(MultiTaskModule):
    """A shared trunk and a head for each task.

    The trunk sees a batch whole, whatever its tasks; only the heads split it.

    Args:
        trunk: maps inputs to `(B, features)`.
        features: width of the trunk's output.
        classes: outputs of a new head. It grows where an experience has more classes.
    """

    def __init__(self, trunk: nn.Module, features: int, classes: int = 2) -> None:
        super().__init__()
        self.trunk = trunk
        # Masking fails on classes given as sets, and labels that count from 0 need none.
        self.classifier = MultiHeadClassifier(features, classes, masking=False)

    def forward(self, images: Tensor, task_labels: Tensor) -> Tensor:
        return self.classifier(self.trunk(images), task_labels)
