"""The table of our operators: what each computes, next to the stock operator that plain autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lance.ops.conv import Geometry, LowRankConv, geometry
from lightning_lance.ops.factors import Factors, compress
from lightning_lance.ops.features import FeatureSide
from lightning_lance.ops.linear import LowRankLinear
from lightning_lance.ops.reserved import Form, Parts, reserved_conv, reserved_linear
from lightning_lance.tensors.linalg import contrast_scale
from tests.oracles import batch_mode, orthonormal, projected_input

Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]
MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMS = ("plain", "complement", "subspace", "steady")


@dataclass(frozen=True)
class Case:
    """A layer as torch.nn takes it, and the shape of an input. Without a kernel it is linear."""

    shape: tuple[int, ...]
    out: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: Any = 0
    dilation: tuple[int, ...] = ()
    groups: int = 1
    mode: str = "zeros"
    bias: bool = True

    @property
    def channel_axis(self) -> int:
        return 1 if self.kernel else len(self.shape) - 1

    @property
    def first_spatial(self) -> int:
        return 2 if self.kernel else 1

    @property
    def modes(self) -> tuple[int, ...]:
        """Sizes of batch, channel and spatial modes."""
        sizes = self.shape[2:] if self.kernel else self.shape[1:-1]
        return (self.shape[0], self.shape[self.channel_axis], *sizes)

    def module(self, dtype: torch.dtype = torch.float64) -> Any:
        if not self.kernel:
            return nn.Linear(self.shape[-1], self.out, self.bias).to(dtype)
        settings = (self.kernel, self.stride, self.padding, self.dilation, self.groups, self.bias, self.mode)
        return MODULES[len(self.kernel)](self.shape[1], self.out, *settings).to(dtype)

    def geometry(self) -> Geometry:
        made = self.module()
        return geometry(made.kernel_size, made.stride, made.padding, made.dilation, made.groups, made.padding_mode)

    def side(self, patch: bool) -> FeatureSide:
        return FeatureSide(self.groups, self.modes[1] // self.groups, self.kernel, patch or not self.kernel)

    def with_batch(self, size: int) -> Case:
        return replace(self, shape=(size, *self.shape[1:]))

    def factors(
        self, ranks: list[int | None], unbiased: bool = True, dtype: torch.dtype = torch.float64, order: Any = None
    ) -> Factors:
        """Random factors with ranks of batch, channel and spatial modes; ``None`` keeps a mode whole."""
        size, channels, *sizes = self.modes
        batch, channel, *spatial = ranks
        if unbiased and order is None:
            order = torch.randperm(size)
        return Factors(
            *((None, None) if batch is None else batch_mode(size, batch, order, dtype)),
            contrast_scale(size, batch) if unbiased and batch is not None and batch > 1 else 1.0,
            None if channel is None else orthonormal(channels, channel, dtype),
            tuple(None if r is None else orthonormal(n, r, dtype) for n, r in zip(sizes, spatial, strict=True)),
        )


@dataclass(frozen=True)
class Operator:
    """One of our operators: a layer whose weight is trained as it is, or in one of the reserved forms."""

    case: Case
    form: str = "plain"
    columns: int = 3
    patch: bool = True

    @property
    def exact(self) -> bool:
        """Whether the output is that of the stock operator bit by bit."""
        return self.form in ("plain", "steady")

    def draw(self, dtype: torch.dtype = torch.float64) -> Problem:
        """Random tensors."""
        case = self.case
        module, side = case.module(torch.float64), case.side(self.patch)
        start = module.weight.detach()
        rows = side.rows(start)
        columns = (
            max(1, min(self.columns, side.width)) if self.form == "subspace" else min(self.columns, side.width - 1)
        )
        basis = torch.stack([orthonormal(side.width, columns) for _ in range(side.groups)])
        trained, anchor = start, rows @ basis
        if self.form == "complement":
            trained = start + torch.randn_like(start)
        elif self.form == "subspace":
            trained, anchor = torch.randn(rows.shape[0] * rows.shape[1], columns, dtype=torch.float64), start
        input = torch.randn(case.shape, dtype=torch.float64)
        with torch.no_grad():
            grad = torch.randn_like(module(input))
        bias = None if module.bias is None else module.bias.detach()
        made = Problem(self, input, trained, bias, grad, basis, anchor, start.shape)
        return made if dtype == torch.float64 else made.to(dtype)


@dataclass(frozen=True)
class Problem:
    """An operator and its tensors."""

    operator: Operator
    input: Tensor
    trained: Tensor
    bias: Tensor | None
    grad: Tensor
    basis: Tensor
    anchor: Tensor
    weight_shape: torch.Size

    def to(self, dtype: torch.dtype) -> Problem:
        """In another dtype; the basis, and what belongs to it, at least in float32."""
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        return replace(
            self,
            input=self.input.to(dtype),
            trained=self.trained.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
            grad=self.grad.to(dtype),
            basis=self.basis.to(wide),
            anchor=self.anchor.to(dtype if self.operator.form == "subspace" else wide),
        )

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input, self.trained, self.bias

    def ours(self, factors: Factors) -> Function:
        """Our operator, as a function of input, trained weight and bias."""
        case, form = self.operator.case, self.operator.form
        where = case.geometry() if case.kernel else None
        static = Form(case.side(self.operator.patch), self.weight_shape, form != "subspace", form == "steady")

        def run(x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
            if form != "plain":
                parts = Parts(t, self.basis, self.anchor)
                if where is None:
                    return reserved_linear(x, parts, b, static, factors)
                return reserved_conv(x, parts, b, where, static, factors)
            with torch.no_grad():
                core = compress(x, factors, case.channel_axis, case.first_spatial)
            rotation, groups, scale, channel, spatial = factors  # compilers up to torch 2.6 take no slices of these
            flat = (core, rotation, groups, scale, channel, *spatial)
            return LowRankLinear.apply(x, t, b, *flat) if where is None else LowRankConv.apply(x, t, b, where, *flat)

        return run

    def stock(self) -> Function:
        """The stock operator on the weight that the trained tensor stands for."""
        case = self.operator.case
        module = case.module(self.input.dtype)

        def run(x: Tensor, t: Tensor, b: Tensor | None) -> Tensor:
            weight = self.written(t)
            return module._conv_forward(x, weight, b) if case.kernel else nn.functional.linear(x, weight, b)

        return run

    def written(self, trained: Tensor) -> Tensor:
        """The weight, by its definition."""
        side, form = self.operator.case.side(self.operator.patch), self.operator.form
        if form == "plain":
            return trained
        basis = self.basis
        if form == "subspace":
            rows = side.rows(self.anchor).to(basis.dtype)
            update = trained.view(*rows.shape[:2], -1).to(basis.dtype)
            return side.weight(rows + update @ basis.mT, self.weight_shape).to(trained.dtype)
        rows = side.rows(trained).to(basis.dtype)
        inside = side.weight(rows @ basis @ basis.mT, self.weight_shape)
        if form == "steady":  # the value is the trained tensor itself, the gradient has no part in the basis
            return trained - (inside - inside.detach()).to(trained.dtype)
        return (trained - inside + side.weight(self.anchor @ basis.mT, self.weight_shape)).to(trained.dtype)

    def projected(self, factors: Factors) -> Tensor:
        """The input that the core stands for, in float64."""
        return projected_input(self.input, factors, self.operator.case.channel_axis, self.operator.case.first_spatial)


GRID = (8, 6, 7, 5)
LINEAR = {
    "rows": Case((8, 10), 7),
    "few rows": Case((8, 24), 24, bias=False),
    "tokens": Case((8, 6, 10), 7),
    "grid": Case((8, 5, 4, 6), 7),
}
CONVOLUTIONS = {
    "dense": Case(GRID, 4, (3, 2), (2, 1), (1, 2), (1, 2)),
    "pointwise": Case(GRID, 4, (1, 1), (1, 1), 0, (1, 1)),
    "strided pointwise": Case(GRID, 4, (1, 1), (2, 3), 0, (1, 1), bias=False),
    "many positions": Case((8, 6, 9, 8), 4, (1, 1), (1, 1), 0, (1, 1)),
    "grouped": Case(GRID, 4, (3, 3), (1, 2), 1, (1, 1), 2, bias=False),
    "depthwise": Case(GRID, 12, (3, 3), (1, 1), "same", (1, 1), 6),
    "even same": Case(GRID, 4, (2, 4), (1, 1), "same", (1, 1)),
    "circular": Case(GRID, 4, (3, 3), (2, 1), (2, 1), (1, 1), 1, "circular"),
    "reflected": Case(GRID, 3, (3, 3), (1, 1), (1, 2), (1, 1), 3, "reflect", False),
    "replicated": Case((8, 6, 7), 4, (3,), (2,), (2,), (2,), 1, "replicate"),
    "volume": Case((8, 4, 5, 4, 6), 2, (2, 3, 1), (1, 2, 1), (0, 1, 0), (2, 1, 1), 2),
}
NAMED: dict[str, Operator] = {
    **{name: Operator(case) for name, case in (LINEAR | CONVOLUTIONS).items()},
    **{
        f"{form} {name}": Operator((LINEAR | CONVOLUTIONS)[name], form, 4, patch)
        for form in FORMS[1:]
        for name, patch in (("few rows", True), ("tokens", True), ("dense", False), ("grouped", True))
    },
}


@st.composite
def linear_cases(draw: st.DrawFn, batches: st.SearchStrategy[int] = st.integers(0, 7)) -> Case:  # noqa: B008
    """Linear layers on inputs of two to five axes, with few rows and with many."""
    tokens = draw(st.lists(st.integers(1, 5), max_size=3))
    return Case((draw(batches), *tokens, draw(st.integers(1, 12))), draw(st.integers(1, 12)), bias=draw(st.booleans()))


@st.composite
def cases(draw: st.DrawFn, batches: st.SearchStrategy[int] = st.integers(0, 7)) -> Case:  # noqa: B008
    """Convolutions, in settings that torch.nn accepts."""
    axes = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    kernel, dilation = per_axis(1, 4 if axes < 3 else 2), per_axis(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "int", "tuple", "tuple"]))
    stride = (1,) * axes if padding == "same" else per_axis(1, 3)
    if padding == "int":
        padding = draw(st.integers(0, 2))
    elif padding == "tuple":
        padding = per_axis(0, 3)
    # Long enough for the kernel without padding, and for padding by reflection.
    sizes = tuple(
        max(d * (k - 1) + 1, 4) + extra
        for k, d, extra in zip(kernel, dilation, per_axis(0, 3 if axes < 3 else 1), strict=True)
    )
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 2))
    if draw(st.booleans()) and groups > 1:
        channels = groups  # depthwise
    shape = (draw(batches), channels, *sizes)
    return Case(shape, out, kernel, stride, padding, dilation, groups, mode, draw(st.booleans()))


@st.composite
def operators(draw: st.DrawFn, batches: st.SearchStrategy[int] = st.integers(0, 7)) -> Operator:  # noqa: B008
    """Any of our operators."""
    case = draw(linear_cases(batches) | cases(batches))
    return Operator(case, draw(st.sampled_from(FORMS)), draw(st.integers(0, 5)), draw(st.booleans()))
