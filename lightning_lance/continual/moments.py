"""Streaming second moments of a layer's feature vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_lance.continual.basis import Moments
from lightning_lance.errors import CalibrationError
from lightning_lance.ops.conv import Geometry
from lightning_lance.ops.features import FeatureSide, feature_rows
from lightning_lance.tensors.gram import NystromSketch

EXACT_UP_TO = 2048
"""Widest feature side whose Gram matrix is accumulated exactly (16.8 MB in float32); a wider one is sketched."""

ROWS_PER_UPDATE = 16_384
"""Feature vectors taken from one input; a random subset where there are more, as in a wide early feature map."""

SKETCH_ENERGY = 0.99
"""Energy that a sketch is made wide enough for, unless another is asked for."""


class FeatureMoments:
    """Second moments of the feature vectors of one layer, over the inputs given to :meth:`update`.

    The vectors themselves are kept while there are fewer of them than they are long, which makes their spectrum cheap.
    Then their ``K x K`` Gram matrix is, in one accumulation for each group, or above :data:`EXACT_UP_TO` a one-pass
    sketch of ``2 K k`` floats.

    Args:
        side: how inputs are cut into feature vectors.
        geometry: of a convolution; ``None`` for a linear layer.
        label: names the layer in messages.
        max_rows: feature vectors taken from one input.
        energy: fraction of the energy that a sketch is made wide enough for.
        seed: seed of the subsets.
    """

    def __init__(
        self,
        side: FeatureSide,
        geometry: Geometry | None,
        label: str,
        max_rows: int = ROWS_PER_UPDATE,
        energy: float = SKETCH_ENERGY,
        seed: int = 0,
    ) -> None:
        self.side = side
        self.geometry = geometry
        self.label = label
        self.max_rows = max_rows
        self.energy = energy
        self.count = 0
        self._rows: list[Tensor] = []
        self._gram: Tensor | None = None
        self._sketches: list[NystromSketch] = []
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def update(self, input: Tensor) -> None:
        """Add the feature vectors of one input."""
        input = input.detach()
        if self.geometry is not None and input.dim() == len(self.geometry.kernel) + 1:
            input = input.unsqueeze(0)
        for rows in feature_rows(input, self.side, self.geometry, self.max_rows, self._generator):
            rows = rows if rows.dtype == torch.float64 else rows.float()
            self.count += rows.shape[1]
            if self._gram is None and not self._sketches:
                self._rows.append(rows)
                if self.count >= self._row_limit:
                    self.collapse()
            else:
                self._accumulate(rows)

    @property
    def _row_limit(self) -> int:
        # A sketch judges its width on its first update: it should see many vectors there.
        return self.side.width if self.side.width <= EXACT_UP_TO else max(EXACT_UP_TO // 2, self.side.width // 4)

    def _accumulate(self, rows: Tensor) -> None:
        if self._gram is not None:
            self._gram.baddbmm_(rows.mT, rows)
        for sketch, part in zip(self._sketches, rows, strict=False):
            sketch.update(part, 1)

    def collapse(self) -> None:
        """Turn kept vectors into their Gram matrix, or sketch, which can be summed over processes."""
        if not self._rows:
            return
        rows = torch.cat(self._rows, 1)
        self._rows = []
        if self.side.width <= EXACT_UP_TO:
            self._gram = rows.new_zeros(self.side.groups, self.side.width, self.side.width)
        else:
            self._sketches = [
                NystromSketch(self.side.width, self.energy, rows.dtype, rows.device, self.label)
                for _ in range(self.side.groups)
            ]
        self._accumulate(rows)

    def tensors(self) -> list[Tensor]:
        """Every accumulator, to be summed in place over the processes of a distributed run."""
        self.collapse()
        grams = [] if self._gram is None else [self._gram]
        return grams + [tensor for sketch in self._sketches for tensor in sketch.tensors()]

    def check(self) -> None:
        """Look for NaN and Inf.

        Raises:
            CalibrationError: there are some.
        """
        tensors = [*self._rows, *([] if self._gram is None else [self._gram]), *(s.sample for s in self._sketches)]
        # One pass: adding makes NaN and Inf no finite number again, and where a sum overflows, so do the squares.
        if not all(math.isfinite(float(tensor.sum())) for tensor in tensors):
            raise CalibrationError(
                f"{self.label} received NaN or Inf. Finite inputs are needed: check the data, its normalisation, and "
                "whether training diverged."
            )

    def groups(self) -> list[Moments]:
        """Moments of each group.

        Raises:
            CalibrationError: the inputs hold NaN or Inf.
        """
        self.check()
        return [self._moments(group) for group in range(self.side.groups)]

    def _moments(self, group: int) -> Moments:
        if self._gram is not None:
            return Moments.of(self._gram[group])
        if self._sketches:
            sketch = self._sketches[group]
            values, vectors = sketch.eigh()
            return Moments(vectors.double() * values.sqrt(), True, sketch.trace)
        if not self._rows:
            return Moments(torch.zeros(self.side.width, 0), True, 0.0)
        rows = torch.cat([rows[group] for rows in self._rows])
        return Moments(rows.T, True, float(rows.double().square().sum()))
