"""Continual-learning metrics from the accuracy matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lance.compression.drawing import axis
from lightning_lance.errors import ConfigError


def continual_metrics(matrix: Tensor, baseline: Tensor | None = None) -> dict[str, Tensor]:
    r"""Summaries of an accuracy matrix, after the last experience that it has a row for.

    Let :math:`R_{i,j}` be the accuracy on experience :math:`j` after training on experiences :math:`0..i`,
    :math:`b_j` the accuracy before any training, :math:`T` the last row that holds a value:

    - ``ACC`` :math:`= \frac{1}{T+1}\sum_{j \le T} R_{T,j}`, average final accuracy (Lopez-Paz & Ranzato, *Gradient
      Episodic Memory for Continual Learning*, NeurIPS 2017, eq. 2). In the middle of a stream it is the average
      accuracy :math:`A_k` of Chaudhry et al., *Riemannian Walk for Incremental Learning*, ECCV 2018.
    - ``BWT`` :math:`= \frac{1}{T}\sum_{j<T} (R_{T,j} - R_{j,j})`, backward transfer (Lopez-Paz & Ranzato, eq. 3);
      negative where earlier experiences are forgotten.
    - ``FWT`` :math:`= \frac{1}{T}\sum_{1 \le j \le T} (R_{j-1,j} - b_j)`, forward transfer (same, eq. 4).
    - ``forgetting`` :math:`= \frac{1}{T}\sum_{j<T} (\max_{i<T} R_{i,j} - R_{T,j})` (Chaudhry et al.).
      The maximum is over the rows that were evaluated; Avalanche's metric of that name compares with
      :math:`R_{j,j}` only and equals :math:`-` ``BWT``.
    - ``learning_accuracy`` :math:`= \frac{1}{T+1}\sum_{j \le T} R_{j,j}`, the accuracy on an experience right after
      learning it (Riemer et al., *Learning to Learn without Forgetting by Maximizing Transfer and
      Minimizing Interference*, ICLR 2019): plasticity.
    - ``stream_accuracy`` :math:`= \frac{2}{(T+1)(T+2)}\sum_{j \le i \le T} R_{i,j}`, accuracy over the whole
      stream (Díaz-Rodríguez et al., *Don't forget, there is more than forgetting: new metrics for Continual
      Learning*, 2018; their A).

    A summary that needs a missing cell is NaN, and so is one that is not defined yet: ``BWT``, ``FWT`` and
    ``forgetting`` after the first experience, ``FWT`` without a baseline.

    Args:
        matrix: :math:`R`, floating, shape ``(N, N)``, fractions in [0, 1], NaN where nothing was evaluated.
        baseline: :math:`b`, shape ``(N,)``, NaN where nothing was evaluated.

    Returns:
        Name -> scalar of the dtype and on the device of the matrix.

    Raises:
        ConfigError: a shape or dtype is wrong.

    Example:
        >>> import torch
        >>> from lightning_lance.trainer.metrics import continual_metrics
        >>> found = continual_metrics(torch.tensor([[0.9, 0.5], [0.7, 0.8]]), torch.tensor([0.5, 0.5]))
        >>> {name: round(value.item(), 3) for name, value in found.items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'ACC': 0.75, 'BWT': -0.2, 'FWT': 0.0, 'forgetting': 0.2, 'learning_accuracy': 0.85, 'stream_accuracy': 0.8}
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.is_floating_point():
        raise ConfigError(
            f"the accuracy matrix is {matrix.dtype} of shape {tuple(matrix.shape)}; give a square floating-point one, "
            "row i the accuracies after training on experience i."
        )
    if baseline is not None and baseline.shape != matrix.shape[:1]:
        raise ConfigError(
            f"the baseline has shape {tuple(baseline.shape)}; give one accuracy per experience, shape "
            f"({matrix.shape[0]},)."
        )
    nan = matrix.new_tensor(torch.nan)
    names = ("ACC", "BWT", "FWT", "forgetting", "learning_accuracy", "stream_accuracy")
    rows = (~matrix.isnan()).any(1).nonzero()
    if not len(rows):
        return dict.fromkeys(names, nan)
    last = int(rows[-1])
    seen = matrix[: last + 1, : last + 1]
    final, learned = seen[-1], seen.diagonal()
    backward = forward = forgetting = nan
    if last > 0:
        backward = (final - learned)[:-1].mean()
        # Rows before an experience was learned may be missing, its own may not.
        best = seen[:-1, :-1].nan_to_num(nan=-torch.inf).amax(0)
        forgetting = torch.where(learned[:-1].isnan(), nan, best - final[:-1]).mean()
        if baseline is not None:
            forward = (seen.diagonal(1) - baseline[1 : last + 1].to(seen)).mean()
    lower = seen[torch.ones_like(seen, dtype=torch.bool).tril()]
    values = (final.mean(), backward, forward, forgetting, learned.mean(), lower.mean())
    return dict(zip(names, values, strict=True))


class ContinualMetrics(Metric):
    """The accuracy matrix of a stream, filled batch by batch, and the summaries of :func:`continual_metrics`.

    Counts are summed over the processes of a distributed run and saved in ``state_dict``, so that the matrix of a
    stream survives a checkpoint between two experiences.

    Args:
        num_experiences: length ``N`` of the stream.
        kwargs: arguments of :class:`torchmetrics.Metric`.

    Raises:
        ConfigError: ``num_experiences`` is not a positive int.

    Example:
        >>> import torch
        >>> from lightning_lance import ContinualMetrics
        >>> metrics = ContinualMetrics(num_experiences=2)
        >>> target = torch.tensor([0, 1, 1, 0])
        >>> metrics.update(torch.tensor([0, 1, 1, 0]), target, trained=0, evaluated=0)
        >>> metrics.update(torch.tensor([0, 1, 0, 0]), target, trained=1, evaluated=0)
        >>> metrics.update(torch.tensor([0, 1, 1, 1]), target, trained=1, evaluated=1)
        >>> {name: metrics.compute()[name].item() for name in ("ACC", "BWT", "learning_accuracy")}
        {'ACC': 0.75, 'BWT': -0.25, 'learning_accuracy': 0.875}
    """

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    correct: Tensor
    total: Tensor

    def __init__(self, num_experiences: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(num_experiences, int) or isinstance(num_experiences, bool) or num_experiences < 1:
            raise ConfigError(f"num_experiences={num_experiences!r} is not allowed. Allowed: an int of at least 1.")
        self.num_experiences = num_experiences
        # Row 0 is the state before any training, row i + 1 the one after experience i.
        for name in ("correct", "total"):
            counts = torch.zeros(num_experiences + 1, num_experiences, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum", persistent=True)

    def update(self, preds: Tensor, target: Tensor, *, trained: int | None, evaluated: int) -> None:
        """Add a batch of predictions.

        Args:
            preds: scores of shape ``(B, C)``, or class indices of shape ``(B,)``.
            target: class indices, shape ``(B,)``.
            trained: index of the last experience trained on; ``None`` before any training, which is the baseline
                of forward transfer.
            evaluated: index of the experience that the batch is from.

        Raises:
            ConfigError: an index is not in ``0..N-1``, or the shapes do not fit each other.
        """
        row = 0 if trained is None else self._index("trained", trained) + 1
        column = self._index("evaluated", evaluated)
        found = preds.argmax(1) if preds.dim() == 2 else preds
        if target.dim() != 1 or found.shape != target.shape or found.is_floating_point():
            raise ConfigError(
                f"preds is {preds.dtype} of shape {tuple(preds.shape)}, target has shape {tuple(target.shape)}. "
                "Allowed: scores (B, C) or class indices (B,), with targets (B,)."
            )
        self.correct[row, column] += (found == target).sum().to(self.correct)
        self.total[row, column] += target.numel()

    def _index(self, name: str, value: int) -> int:
        if not 0 <= value < self.num_experiences:
            raise ConfigError(
                f"{name}={value} is not an experience of this stream. Allowed: 0 to {self.num_experiences - 1}; make "
                "the metric with the length of the whole stream."
            )
        return value

    def _accuracies(self) -> Tensor:
        # 0 / 0 is NaN: not evaluated.
        return self.correct.to(torch.get_default_dtype()) / self.total

    @property
    def matrix(self) -> Tensor:
        """:math:`R`, shape ``(N, N)``, NaN where nothing was evaluated."""
        return self._accuracies()[1:]

    @property
    def baseline(self) -> Tensor:
        """Accuracies before any training, shape ``(N,)``, NaN where nothing was evaluated."""
        return self._accuracies()[0]

    def compute(self) -> dict[str, Tensor]:
        """The summaries of :func:`continual_metrics` over what was evaluated so far."""
        return continual_metrics(self.matrix, self.baseline)

    def plot(self, val: Tensor | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Heat map of the accuracy matrix in percent: rows trained up to, columns evaluated on.

        Args:
            val: a matrix of shape ``(N, N)`` to draw instead of :attr:`matrix`.
            ax: a matplotlib axis to draw into; a new figure by default.

        Returns:
            ``(figure, axis)``.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        matrix = (self.matrix if val is None else val).detach().float().cpu()
        size = matrix.shape[0]
        figure, ax = axis(ax, (1.5 + 0.45 * size, 1.2 + 0.4 * size), "plot")
        image = ax.imshow((100 * matrix).numpy(), vmin=0.0, vmax=100.0, cmap="viridis")
        figure.colorbar(image, ax=ax, label="accuracy (%)")
        ax.set_xlabel("evaluated on experience")
        ax.set_ylabel("trained up to experience")
        ax.set_xticks(range(size))
        ax.set_yticks(range(size))
        for row, column in (~matrix.isnan()).nonzero().tolist():
            value = float(matrix[row, column])
            ax.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", color="black" if value > 0.6 else "white"
            )
        return figure, ax
