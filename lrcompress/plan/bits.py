"""What fewer bits take and lose: how a weight is rounded, the bytes that are stored, the error that rounding adds.

    16   half precision, widened when the model is loaded
     8   codes of one scale per output; products quantize their input on the way, convolutions with ranges seen before
     4   products and tables: blocks along the inputs with a scale each, 32 wide or, for fewer bytes, 128; convolutions:
         blocks of equal length, at most 64 wide

`rounded` is what ONNX Runtime's quantizers do to a weight, to nearest; what a refit after rounding wins is not counted.

Source: maths.md §6.3 (noise of rounding, and that of factors adds up).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..factorize import Rank, Statistics, form
from ..model.surgery import Layer
from .options import bias_cost

BITS = (32, 16, 8, 4)
#: Inputs that share a scale at 4 bits, how many may, and the widths that are planned with.
BLOCK, BLOCKS, PLANNED_BLOCKS = 32, (16, 32, 64, 128, 256), (32, 128)
_LONGEST_CONV_BLOCK = 64
#: Bytes of graph that a constant of a product, a table or a convolution brings: nodes, names, where it lies, what is left empty before it. Measured on
#: exports of two and of six equal layers.
_GRAPH: Mapping[str, Mapping[int, int]] = {
    "linear": {32: 190, 16: 290, 8: 600, 4: 500}, "embedding": {32: 190, 16: 330, 8: 600, 4: 500},
    "conv": {32: 190, 16: 290, 8: 1000, 4: 800},
}  # fmt: skip
#: What is smaller keeps more bits: halves of so many numbers, codes of 4 bits of a convolution.
_LEAST_HALVES, _LEAST_CODES = 256, 1024


#: How often the graph spells the name of a constant, and the length of the names that the bytes above were measured with.
_SPELLED: Mapping[int, int] = {32: 3, 16: 6, 8: 16, 4: 12}
_USUAL_NAME = len("l.0")


def graph_bytes(layer: Layer, bits: int = 32) -> int:
    """Return the bytes of graph that one constant of a layer brings."""
    longer = max(len(layer.name) - _USUAL_NAME, 0)
    return _GRAPH["conv" if layer.kind == "grouped" else layer.kind][bits] + _SPELLED[bits] * longer


class Precision(NamedTuple):
    """How numbers are stored. `block`: inputs that share a scale at 4 bits, 0 at others."""

    bits: int
    block: int = 0

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f", blocks of {self.block}" if self.block > BLOCK else "")


def precisions(bits: Sequence[int]) -> list[Precision]:
    """Return the precisions that are planned with, where so many bits are allowed."""
    return [Precision(b, w) for b in bits for w in (PLANNED_BLOCKS if b == 4 else (0,))]


def rounded(weight: Tensor, bits: int, kind: str, block: int = BLOCK) -> Tensor:
    """Return `weight` (out, …) as it is after a way through `bits` bits. Positions and 32 bits are left alone."""
    if bits == 32 or not weight.is_floating_point() or not weight.numel():
        return weight
    if bits == 16:
        return weight.half().to(weight.dtype)
    rows = weight.reshape(weight.shape[0], -1)
    if bits == 8:
        return _symmetric(rows, 127.0).reshape(weight.shape)
    width = conv_block(rows.shape[1]) if kind in ("conv", "grouped") else row_block(rows.shape[1], block)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % width))
    blocks = padded.reshape(-1, width)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # with its sign: −8 is a code, 8 is none
    scale = torch.where(largest == 0, 1.0, largest / -8)
    codes = (blocks / scale).round().clamp(-8, 7)
    return (codes * scale).reshape(padded.shape)[:, : rows.shape[1]].reshape(weight.shape)


def _symmetric(rows: Tensor, top: float) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True) / top
    scale = torch.where(scale == 0, 1.0, scale)
    return (rows / scale).round().clamp(-top, top) * scale


def stored_bytes(
    name: str, layer: Layer, rank: Rank, bits: int, statistics: Statistics | None = None, block: int = BLOCK
) -> int:
    """Return the bytes of a layer in the exported file: numbers, scales, and its part of the graph."""
    module = form(name)
    shapes = module.factor_shapes(layer.shape, rank)
    integer: frozenset[str] = getattr(module, "INTEGER", frozenset())
    total = 0
    for factor, shape in shapes.items():
        if factor in integer:
            total += 4 * math.prod(shape) + graph_bytes(layer)
            continue
        outputs = shape[0] * (shape[1] if layer.kind == "grouped" and len(shape) > 2 else 1)
        own = _kept(math.prod(shape), bits, layer.kind)
        total += _bytes(math.prod(shape), outputs, own, layer.kind, block) + graph_bytes(layer, own)
    return total if name == "dense" else total + 4 * bias_cost(layer, statistics)


def _kept(numbers: int, bits: int, kind: str) -> int:
    """Return the bits that an export gives so many numbers: small constants are not worth what codes bring along."""
    if bits == 16 and numbers < _LEAST_HALVES:
        return 32
    return 8 if bits == 4 and kind in ("conv", "grouped") and numbers < _LEAST_CODES else bits


def _bytes(numbers: int, outputs: int, bits: int, kind: str, block: int) -> int:
    if bits in (32, 16):
        return numbers * bits // 8
    if bits == 4:
        columns = -(-numbers // max(outputs, 1))
        if kind in ("conv", "grouped"):
            return outputs * (columns // 2 + 2 * (columns // conv_block(columns)))
        return outputs * _row_bytes(columns, row_block(columns, block))
    scales = outputs * (4 if kind == "embedding" else 5)  # a scale, and a zero point where the quantizer writes one
    extra = outputs * 4 if kind in ("conv", "grouped") else 0  # the scales of the bias
    return numbers + scales + extra


def row_block(columns: int, most: int) -> int:
    """Return how many of so many inputs share a scale of a product or table: at most `most`, the fewest bytes, then the finest."""
    return min((b for b in BLOCKS if b <= most), key=lambda b: (_row_bytes(columns, b), b))


def conv_block(columns: int) -> int:
    """Return how many inputs of a convolution share a scale: blocks are equal, and at most 64 long."""
    return max((b for b in range(16, _LONGEST_CONV_BLOCK + 1) if columns % b == 0), default=columns)


def _row_bytes(columns: int, block: int) -> int:
    """Return the bytes of a row of 4 bits: codes of whole blocks, and a scale of 16 bits each; there are no zero points."""
    return -(-columns // block) * (block // 2 + 2)


def rounding_loss(layer: Layer, bits: int, statistics: Statistics | None, block: int = BLOCK) -> float:
    """Return what rounding the dense weight loses in the metric of the statistics."""
    if bits == 32:
        return 0.0
    kind = layer.kind
    weight = layer.weight.flatten(0, 1) if kind == "grouped" else layer.weight
    return (statistics or Statistics()).loss(
        layer.weight - rounded(weight, bits, kind, block).reshape(layer.weight.shape)
    )


def input_loss(layer: Layer, step: float, statistics: Statistics | None) -> float:
    """Return what rounding the inputs in steps of `step` loses: E‖W δ‖² in the output metric, δ uniform."""
    if layer.kind == "embedding":
        return 0.0
    own = statistics or Statistics()
    only_outputs = Statistics(output_gram=own.output_gram, groups=own.groups)
    return step**2 / 12 * only_outputs.loss(layer.weight)


def parts(name: str, layer: Layer, rank: Rank) -> int:
    """Return how many rounded factors stand one after the other."""
    module = form(name)
    integer: frozenset[str] = getattr(module, "INTEGER", frozenset())
    return sum(n not in integer for n in module.factor_shapes(layer.shape, rank))
