"""CODE-CL: Apolinario, Choudhary & Roy, *Conceptor-Based Gradient Projection for Deep Continual Learning*, ICCV 2025,
arXiv 2411.15235. Ours, from the paper's description.

A conceptor `C = R (R + α⁻² I)⁻¹` of mean second moments `R` of a layer's inputs says softly which directions a task
uses. Gradients are multiplied with `I - C`, `C` that of all earlier tasks (their OR). Where the new task's conceptor
overlaps with it (their AND), the leading directions of the overlap are free to be scaled by the new task alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.baselines.scaled_weights import ScaledWeightsPlugin, gram
from lightning_lance.continual import FeatureMoments

_TINY = 1e-7


def conceptor(second: Tensor, aperture: float) -> Tensor:
    """`R (R + α⁻² I)⁻¹` of second moments `(K, K)`."""
    eye = torch.eye(len(second), dtype=second.dtype)
    return torch.linalg.solve(second + aperture**-2 * eye, second)


def either(first: Tensor, second: Tensor) -> Tensor:
    """OR of two conceptors of one aperture: that of the sum of their moments."""
    eye = torch.eye(len(first), dtype=first.dtype)
    sizes = [torch.linalg.solve(eye - found + _TINY * eye, found) for found in (first, second)]
    total = sizes[0] + sizes[1]
    return torch.linalg.solve(eye + total, total)


def both(first: Tensor, second: Tensor) -> Tensor:
    """AND of two conceptors, `(C⁻¹ + B⁻¹ - I)⁻¹`."""
    eye = torch.eye(len(first), dtype=first.dtype)
    inverses = [torch.linalg.inv(found + _TINY * eye) for found in (first, second)]
    return torch.linalg.inv(inverses[0] + inverses[1] - eye)


class CodeCLPlugin(ScaledWeightsPlugin):
    """CODE-CL in any Avalanche strategy with plain SGD.

    Args:
        aperture: `α`; the larger, the more directions count as used.
        overlap: mean eigenvalue of the overlap, relative to that of what earlier tasks use, from which on it is freed.
        directions: most directions that are freed in a layer.
        samples: random training samples of an experience that define its directions.
        heads: name prefixes of modules that train freely.
        seed: of the samples drawn.

    Attributes:
        conceptors: layer name -> `C` of all tasks so far, `(K, K)`.
    """

    def __init__(
        self,
        aperture: float = 6.0,
        overlap: float = 0.5,
        directions: int = 80,
        samples: int = 125,
        heads: Sequence[str] = ("classifier",),
        seed: int = 0,
    ) -> None:
        super().__init__(samples, heads, seed)
        self.aperture, self.overlap, self.directions = aperture, overlap, directions
        self.conceptors: dict[str, Tensor] = {}

    def choose(self, name: str, gradient: Tensor, moments: FeatureMoments) -> list[Tensor]:
        known = self.conceptors[name].double()
        shared = both(conceptor(gram(moments).cpu(), self.aperture), known)
        if float(shared.trace() / known.trace()) <= self.overlap:
            return []
        values, vectors = torch.linalg.eigh((shared + shared.T) / 2)
        count = min(self.directions, len(values))
        return [vectors[:, -count:].flip(1).to(gradient)]

    def project(self, name: str, gradient: Tensor) -> Tensor:
        return gradient - gradient @ self.conceptors[name].to(gradient)

    def consolidate(self, name: str, moments: FeatureMoments, task: int) -> None:
        fresh = conceptor(gram(moments).cpu(), self.aperture)
        known = self.conceptors.get(name)
        self.conceptors[name] = (fresh if known is None else either(known.double(), fresh)).float()
