"""What a layer takes in a form at a rank: the form's own forward pass, watched on tensors without content, priced.

    place = Place(rows=32)                                        # a linear layer that sees 32 tokens
    steps = steps_of("svd", layer, 96, place)                     # [Step("matmul", (32, 384, 96)), …]
    ms = layer_ms(steps, bits=8, prices)

So a form's time follows from the form's one file. Products with a constant take the bits of the constant; what else
the forward pass does costs what it costs in 32 bits. What a form can leave to the loading of the graph costs nothing
(`…_as_loaded`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..factorize import ConvGeometry, Rank, form
from ..latency import Dims
from ..model.surgery import Layer
from .graph_time import conv_kind, taken
from .prices import Prices


@dataclass(frozen=True)
class Place:
    """Where a layer stands in one request: rows that a product sees, or the size of an image and how it is walked."""

    rows: int = 1
    image: tuple[int, ...] = ()
    geometry: ConvGeometry | None = None


@dataclass(frozen=True)
class Step:
    """One operator of a form. `weighted`: whether it reads a constant, which may be of fewer bits; `times`: how often."""

    kind: str
    dims: Dims
    weighted: bool = False
    times: int = 1


def steps_of(name: str, layer: Layer, rank: Rank, place: Place) -> tuple[Step, ...] | None:
    """Return what a form runs for a layer; None where the form does not say the shapes of its factors."""
    if not hasattr(form(name), "factor_shapes"):
        return None
    return _steps(name, layer.kind, layer.shape, rank, place)


def layer_ms(steps: Sequence[Step], kind: str, bits: int, prices: Prices) -> float:
    """Return the ms of one layer. 16 bits are widened when the model is loaded; so are 4 bits of a convolution."""
    run = 32 if bits == 16 or (bits == 4 and kind in ("conv", "grouped")) else bits
    total = 0.0
    convolved = [s for s in steps if s.kind in ("conv", "conv_odd", "depthwise")]
    for s in steps:
        own = run if s.weighted else 32
        name = "conv" if s.kind == "conv_odd" and own == 8 else s.kind
        total += s.times * prices.ms(name, own, s.dims)
    if run == 8 and convolved:  # codes are made before the first and unmade after the last, in another layout
        first, last = convolved[0].dims, convolved[-1].dims
        before = first[0] * convolved[0].times * first[4] * first[5] * first[6] ** 2
        after = last[1] * convolved[-1].times * last[4] * last[5]
        total += prices.ms("QuantizeLinear", 32, (before,)) + prices.ms("DequantizeLinear", 32, (after,))
        if prices.table.blocked:
            total += prices.ms("Transpose", 32, (before,)) + prices.ms("Transpose", 32, (after,))
    return total


@functools.lru_cache(maxsize=200_000)
def _steps(name: str, kind: str, shape: tuple[int, ...], rank: Rank, place: Place) -> tuple[Step, ...]:
    module = form(name)
    plain = name == "dense"
    integer: frozenset[str] = getattr(module, "INTEGER", frozenset())
    stored = shape if not (plain and kind == "grouped") else (shape[0] * shape[1], *shape[2:])
    factors = {
        n: torch.empty(s, device="meta", dtype=torch.int64 if n in integer else torch.float32)
        for n, s in module.factor_shapes(stored, rank).items()
    }
    grouped = (shape[0],) if plain and kind == "grouped" else ()
    if kind == "embedding":
        x = torch.empty((place.rows,), device="meta", dtype=torch.int64)
        run: Callable[[], Any] = functools.partial(module.embedding, factors, x)
    elif kind == "linear":
        linear = getattr(module, "linear_as_loaded", module.linear)
        run = functools.partial(linear, factors, torch.empty((place.rows, shape[-1]), device="meta"))
    else:
        channels = shape[2] * shape[0] if kind == "grouped" else shape[1]
        x = torch.empty((1, channels, *place.image), device="meta")
        walk = place.geometry or ConvGeometry.default(len(place.image))
        conv = getattr(module, "conv_as_loaded", module.conv)
        run = functools.partial(conv, factors, x, walk, *grouped)
    watch = _Watch(factors.values())
    with watch, torch.no_grad():
        run()
    return tuple(watch.steps)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operators of a forward pass. What is made of constants alone is done before the first request."""

    def __init__(self, constants: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._constants = {id(t) for t in constants}
        self._kept: list[Tensor] = list(constants)  # an id is only good as long as its tensor lives
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in _flat(args) if isinstance(a, Tensor)]
        constant = [id(t) in self._constants for t in tensors]
        made = [t for t in _flat([out]) if isinstance(t, Tensor)]
        self._kept += made
        if all(constant):  # of no tensor at all, too: an identity
            self._constants.update(id(t) for t in made)
        elif made:
            name = func.overloadpacket.__name__
            self.steps += _STEPS.get(name, _moved)(name, tensors, constant, made[0], args)
        return out


def _flat(values: Any) -> list[Any]:
    return [v for a in values for v in (_flat(a) if isinstance(a, list | tuple) else [a])]


_Make = Callable[[str, list[Tensor], list[bool], Tensor, Any], list[Step]]


def _moved(name: str, tensors: list[Tensor], constant: list[bool], out: Tensor, args: Any) -> list[Step]:
    """Anything that is no product: by the numbers that it writes."""
    if name == "index_select":
        picked, _, dims, _ = taken(
            out.numel(), math.prod(out.shape[int(args[1]) % out.dim() + 1 :]), int(args[2].numel())
        )
        return [Step(picked, dims)]
    kind = {"cat": "Concat", "index": "gather", "embedding": "gather", "mul": "Mul"}.get(name)
    if kind == "gather":
        width = out.shape[-1]
        return [Step("gather", (max(out.numel() // max(width, 1), 1), width))]
    if kind is None:
        kind = "Add" if name in ("add", "sum") else "Transpose"
    return [Step(kind, (max(out.numel(), 1),))]


def _viewed(name: str, tensors: list[Tensor], constant: list[bool], out: Tensor, args: Any) -> list[Step]:
    return [Step("Relu", (4,))]


def _permuted(name: str, tensors: list[Tensor], constant: list[bool], out: Tensor, args: Any) -> list[Step]:
    return [Step("Transpose", (max(out.numel(), 1),))]


def _product(name: str, tensors: list[Tensor], constant: list[bool], out: Tensor, args: Any) -> list[Step]:
    a, b = tensors[-2:]
    if constant[-1] and b.dim() == 2:
        return [Step("matmul", (max(a.numel() // max(b.shape[0], 1), 1), b.shape[0], b.shape[1]), weighted=True)]
    batch = max(out.numel() // max(out.shape[-1] * out.shape[-2], 1), 1)
    return [Step("bmm", (batch, out.shape[-2], a.shape[-1], out.shape[-1]))]


def _convolved(name: str, tensors: list[Tensor], constant: list[bool], out: Tensor, args: Any) -> list[Step]:
    w = tensors[1]
    stride, groups = max(args[3]), int(args[8])
    kernel, space = (1, *w.shape[2:])[-2:], (1, *out.shape[2:])[-2:]
    place = (kernel[0], kernel[1], space[0] * out.shape[0], space[1], int(stride))
    return [
        Step(kind, dims, weighted=constant[1], times=times)
        for kind, _, dims, times in conv_kind(32, int(w.shape[0]), int(w.shape[1]) * groups, groups, place)
    ]


_STEPS: dict[str, _Make] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "slice", "select", "expand", "detach", "alias"), _viewed),
    **dict.fromkeys(("t", "transpose", "permute"), _viewed), "clone": _permuted,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "matmul"), _product), "convolution": _convolved,
}  # fmt: skip
