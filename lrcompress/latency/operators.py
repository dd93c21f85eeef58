"""The operators that are timed: what a kind is called, how its sizes are written down, and a graph that has it.

    probe = Probe("matmul", 8, (64, 384, 1536))           # 64 rows by 384×1536 in int8
    graph = probe.graph(copies=4)                         # bytes for ONNX Runtime, with what to feed

A kind with its bits is one curve of the table. Graphs hold several copies of the operator with weights of their own, so
that one run of the graph can be taken apart into the operator and the rest.

    matmul    (rows, in, out)        constant weight; 8: dynamic int8 as quantize_dynamic writes it; 4: MatMulNBits
    bmm       (batch, rows, in, out) both operands computed
    conv      (in, out, kernel height, width, output height, width, stride); 8: static QDQ. conv_odd: output channels
              that are no multiple of 8; depthwise: in = out = groups
    others    (elements,) or (rows, columns)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .wire import BOOL, FLOAT, INT64, MICROSOFT, UINT8, Attribute, Node, model

BLOCK = 32
Dims = tuple[int, ...]
_Made = tuple[list[Node], dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]


@dataclass(frozen=True)
class Graph:
    """A graph of some copies of an operator: its bytes, what to feed, the names and element types of its outputs."""

    data: bytes
    feeds: Mapping[str, np.ndarray]
    outputs: Mapping[str, int]


@dataclass(frozen=True, order=True)
class Probe:
    """One operator at one size."""

    kind: str
    bits: int
    dims: Dims

    def graph(self, copies: int) -> Graph:
        """Return a graph of `copies` of it; with 0 only what surrounds them."""
        make = _KINDS.get(self.kind) or _elementwise(self.kind)
        nodes, feeds, constants, outputs = make(self.bits, self.dims, copies)
        inputs = {name: (_element_type(value), value.shape) for name, value in feeds.items()}
        return Graph(model(nodes, inputs=inputs, outputs=outputs, constants=constants), feeds, outputs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of constants that one copy reads."""
        if self.kind == "matmul":
            return self.dims[1] * self.dims[2] * self.bits // 8
        if self.kind in ("conv", "conv_odd"):
            return self.dims[0] * self.dims[1] * self.dims[2] * self.dims[3] * self.bits // 8
        return 0


def _element_type(value: np.ndarray) -> int:
    return {"float32": FLOAT, "uint8": UINT8, "int64": INT64, "bool": BOOL}[str(value.dtype)]


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return values of a usual size; their bytes decide nothing but that they are no zeros and no denormals."""
    few = np.random.default_rng(seed).standard_normal(min(int(np.prod(shape)), 4093)).astype(np.float32)
    return np.resize(few, shape) / np.float32(max(shape[-1], 1) ** 0.5)


def _matmul(bits: int, dims: Dims, copies: int) -> _Made:
    rows, inner, out = dims
    nodes, constants = [], {}
    for i in range(copies):
        if bits == 32:
            constants[f"w{i}"] = _random((inner, out), i)
            nodes.append(Node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
        elif bits == 8:
            constants |= {
                f"w{i}": _codes((inner, out), i),
                f"s{i}": np.full(out, 0.01, np.float32),
                f"z{i}": np.zeros(out, np.int8),
            }
            nodes += _dynamic(f"{i}")
        else:
            blocks = -(-inner // BLOCK)
            constants[f"w{i}"] = _codes((out, blocks, BLOCK // 2), i).view(np.uint8)
            constants[f"s{i}"] = np.full(out * blocks, 0.01, np.float32)
            about: dict[str, Attribute] = {"K": inner, "N": out, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
            nodes.append(Node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], about, MICROSOFT))
    feeds = {f"x{i}": _random((rows, inner), i) for i in range(copies)} if bits == 8 else {"x": _random((rows, inner))}
    return _surrounded(nodes, feeds, constants, {f"y{i}": FLOAT for i in range(copies)})


def _codes(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.resize(np.random.default_rng(seed).integers(-127, 127, 4093, np.int8), shape)


def _dynamic(i: str) -> list[Node]:
    """The products that quantize_dynamic writes; ONNX Runtime makes one operator of them, if each has its own input."""
    return [
        Node("DynamicQuantizeLinear", [f"x{i}"], [f"q{i}", f"qs{i}", f"qz{i}"]),
        Node("MatMulInteger", [f"q{i}", f"w{i}", f"qz{i}", f"z{i}"], [f"p{i}"]),
        Node("Cast", [f"p{i}"], [f"f{i}"], {"to": FLOAT}),
        Node("Mul", [f"qs{i}", f"s{i}"], [f"m{i}"]),
        Node("Mul", [f"f{i}", f"m{i}"], [f"y{i}"]),
    ]


def _bmm(bits: int, dims: Dims, copies: int) -> _Made:
    batch, rows, inner, out = dims
    feeds = {"a": _random((batch, rows, inner))} | {f"b{i}": _random((batch, inner, out), i) for i in range(copies)}
    nodes = [Node("MatMul", ["a", f"b{i}"], [f"y{i}"]) for i in range(copies)]
    return _surrounded(nodes, feeds, {}, {f"y{i}": FLOAT for i in range(copies)})


def _conv(bits: int, dims: Dims, copies: int) -> _Made:
    """Convolutions between others, as they stand in a network: what holds for one layout all along is not paid here."""
    c_in, c_out, high, wide, height, width, stride = dims
    return _convolutions(bits, (c_out, c_in, high, wide), (height, width), stride, 1, copies)


def _depthwise(bits: int, dims: Dims, copies: int) -> _Made:
    _, channels, high, wide, height, width, stride = dims
    return _convolutions(bits, (channels, 1, high, wide), (height, width), stride, channels, copies)


def _convolutions(
    bits: int, shape: tuple[int, int, int, int], out: tuple[int, int], stride: int, groups: int, copies: int
) -> _Made:
    c_in, (high, wide) = shape[1] * groups, shape[2:]
    size = out[0] * stride, out[1] * stride
    feeds = {"x": _random((1, 4, *size))}
    constants = {"w": _random((c_in, 4, 1, 1)), "b": np.zeros(c_in, np.float32)}
    nodes = [Node("Conv", ["x", "w", "b"], ["h"], {"kernel_shape": [1, 1]}), Node("Relu", ["h"], ["h_relu"])]
    source = "h_relu"
    if bits == 8:
        constants |= {"scale": np.array(0.02, np.float32), "zero": np.array(0, np.uint8)}
        nodes = [*_quantized("x", "x8"), *_int8_conv("", "x8", "h", constants, {"kernel_shape": [1, 1]})]
        source = "h"
    top, left = high - 1, wide - 1
    about: dict[str, Attribute] = {
        "kernel_shape": [high, wide], "strides": [stride, stride], "group": groups,
        "pads": [top // 2, left // 2, top - top // 2, left - left // 2],
    }  # fmt: skip
    outputs = {}
    for i in range(copies):
        constants |= {f"w{i}": _random(shape, i), f"b{i}": np.zeros(shape[0], np.float32)}
        if bits == 8:
            nodes += _int8_conv(f"{i}", source, f"c{i}", constants, about)
        else:
            nodes += [Node("Conv", [source, f"w{i}", f"b{i}"], [f"d{i}"], about), Node("Relu", [f"d{i}"], [f"c{i}"])]
        nodes += _pooled(bits, f"c{i}", f"y{i}")
        outputs[f"y{i}"] = FLOAT
    if not copies:
        nodes += _pooled(bits, source, "y")
        outputs["y"] = FLOAT
    return nodes, feeds, constants, outputs


def _quantized(x: str, y: str) -> list[Node]:
    return [
        Node("QuantizeLinear", [x, "scale", "zero"], [f"{y}_q"]),
        Node("DequantizeLinear", [f"{y}_q", "scale", "zero"], [y]),
    ]


def _int8_conv(i: str, x: str, y: str, constants: dict[str, np.ndarray], about: Mapping[str, Attribute]) -> list[Node]:
    """A convolution between quantizers, as quantize_static writes it: one scale per output channel."""
    weight = constants.pop(f"w{i}")
    constants[f"w{i}_q"] = np.clip(np.rint(weight * 100), -127, 127).astype(np.int8)
    constants[f"w{i}_s"] = np.full(len(weight), 0.01, np.float32)
    constants[f"w{i}_z"] = np.zeros(len(weight), np.int8)
    constants[f"b{i}_q"] = np.zeros(len(weight), np.int32)
    constants[f"b{i}_s"] = np.full(len(weight), 0.0002, np.float32)
    constants[f"b{i}_z"] = np.zeros(len(weight), np.int32)
    del constants[f"b{i}"]
    return [
        Node("DequantizeLinear", [f"w{i}_q", f"w{i}_s", f"w{i}_z"], [f"w{i}"], {"axis": 0}),
        Node("DequantizeLinear", [f"b{i}_q", f"b{i}_s", f"b{i}_z"], [f"b{i}"], {"axis": 0}),
        Node("Conv", [x, f"w{i}", f"b{i}"], [f"r{i}"], about),
        *_quantized(f"r{i}", y),
    ]


def _pooled(bits: int, x: str, y: str) -> list[Node]:
    """A mean per channel: an output that is small, so that writing it out costs little."""
    if bits == 8:
        return [Node("GlobalAveragePool", [x], [f"{y}_p"]), *_quantized(f"{y}_p", y)]
    return [Node("GlobalAveragePool", [x], [y])]


def _gather(bits: int, dims: Dims, copies: int) -> _Made:
    rows, width = dims
    ids = np.random.default_rng(0).integers(0, 256, rows).astype(np.int64)
    constants = {f"t{i}": _random((256, width), i) for i in range(copies)}
    nodes = [Node("Gather", [f"t{i}", "ids"], [f"y{i}"], {"axis": 0}) for i in range(copies)]
    return _surrounded(nodes, {"ids": ids}, constants, {f"y{i}": FLOAT for i in range(copies)})


def _layer_norm(bits: int, dims: Dims, copies: int) -> _Made:
    constants = {f"g{i}": np.full(dims[1], 1 + i / 64, np.float32) for i in range(copies)}
    nodes = [Node("LayerNormalization", [_at(i), f"g{i}"], [_at(i + 1)]) for i in range(copies)]
    return _surrounded(nodes, {"h0": _random(dims)}, constants, {_at(copies): FLOAT} if copies else {})


def _softmax(bits: int, dims: Dims, copies: int) -> _Made:
    nodes = [Node("Softmax", [_at(i)], [_at(i + 1)], {"axis": -1}) for i in range(copies)]
    return _surrounded(nodes, {"h0": _random(dims)}, {}, {_at(copies): FLOAT} if copies else {})


def _transpose(bits: int, dims: Dims, copies: int) -> _Made:
    """Rows to columns of blocks, (a, b, 32) to (b, a, 32): what attention does with its heads."""
    shape = (max(dims[0] // 256, 1), 8, 32) if dims[0] >= 256 else (1, 1, dims[0])
    feeds = {f"x{i}": _random(shape, i) for i in range(copies)}
    nodes = [Node("Transpose", [f"x{i}"], [f"y{i}"], {"perm": [1, 0, 2]}) for i in range(copies)]
    return _surrounded(nodes, feeds, {}, {f"y{i}": FLOAT for i in range(copies)})


def _moved(kind: str, dims: Dims, copies: int) -> _Made:
    """Operators that only move numbers, each copy with an input of its own: repeats would be merged."""
    (elements,) = dims
    width = 32 if elements >= 1024 else 2
    shape = elements // width, width
    feeds = {f"x{i}": _random(shape, i) for i in range(copies)}
    constants: dict[str, np.ndarray] = {}
    nodes = []
    for i in range(copies):
        x, y = f"x{i}", f"y{i}"
        if kind == "Slice":
            feeds[x] = _random((shape[0], 2 * width), i)
            constants = {
                "from": np.array([0], np.int64),
                "to": np.array([width], np.int64),
                "axis": np.array([1], np.int64),
            }
            nodes.append(Node("Slice", [x, "from", "to", "axis"], [y]))
        elif kind == "take":
            constants = {"order": np.random.default_rng(0).permutation(width).astype(np.int64)}
            nodes.append(Node("Gather", [x, "order"], [y], {"axis": 1}))
        elif kind == "Concat":
            feeds[x] = _random((shape[0], width // 2), i)
            nodes.append(Node("Concat", [x, x], [y], {"axis": 1}))
        elif kind == "Expand":
            feeds[x] = _random((1, shape[0], width), i)
            constants = {"shape": np.array([1, *shape], np.int64)}
            nodes.append(Node("Expand", [x, "shape"], [y]))
        elif kind == "Pad":
            feeds[x] = _random((1, width // 2, shape[0]), i)
            constants = {"pads": np.array([0, width // 4, 0, 0, width - width // 2 - width // 4, 0], np.int64)}
            nodes.append(Node("Pad", [x, "pads"], [y]))
        elif kind == "Where":
            feeds["c"] = np.ones(shape, bool)
            nodes.append(Node("Where", ["c", x, f"x{(i + 1) % copies}"], [y]))
        elif kind == "QuantizeLinear":
            constants = {"scale": np.array(0.01, np.float32), "zero": np.array(128, np.uint8)}
            nodes.append(Node("QuantizeLinear", [x, "scale", "zero"], [y]))
        elif kind == "DequantizeLinear":
            feeds[x] = _codes(shape, i).view(np.uint8)
            constants = {"scale": np.array(0.01, np.float32), "zero": np.array(128, np.uint8)}
            nodes.append(Node("DequantizeLinear", [x, "scale", "zero"], [y]))
        else:
            feeds[x] = _codes(shape, i).view(np.uint8)
            nodes.append(Node("Cast", [x], [y], {"to": FLOAT}))
    kept = UINT8 if kind == "QuantizeLinear" else FLOAT
    return _surrounded(nodes, feeds, constants if copies else {}, {f"y{i}": kept for i in range(copies)})


def _batch_norm(bits: int, dims: Dims, copies: int) -> _Made:
    """(channels, positions)."""
    channels, positions = dims
    four = {k: np.full(channels, v, np.float32) for k, v in (("g", 1.0), ("b", 0.0), ("m", 0.0), ("v", 1.0))}
    nodes = [Node("BatchNormalization", [f"x{i}", *four], [f"y{i}"]) for i in range(copies)]
    feeds = {f"x{i}": _random((1, channels, positions), i) for i in range(copies)}
    return _surrounded(nodes, feeds, four if copies else {}, {f"y{i}": FLOAT for i in range(copies)})


def _reorder(bits: int, dims: Dims, copies: int) -> _Made:
    """A convolution that does next to nothing, from and to the layout without blocks."""
    _, channels, _, _, height, width, _ = dims
    about: dict[str, Attribute] = {"kernel_shape": [1, 1], "group": channels}
    constants = {f"w{i}": _random((channels, 1, 1, 1), i) for i in range(copies)}
    nodes = [Node("Conv", [f"x{i}", f"w{i}"], [f"y{i}"], about) for i in range(copies)]
    feeds = {f"x{i}": _random((1, channels, height, width), i) for i in range(copies)}
    return _surrounded(nodes, feeds, constants, {f"y{i}": FLOAT for i in range(copies)})


def _reduce(bits: int, dims: Dims, copies: int) -> _Made:
    nodes = [Node("ReduceMean", [f"x{i}", "axes"], [f"y{i}"]) for i in range(copies)]
    feeds = {f"x{i}": _random(dims, i) for i in range(copies)}
    constants = {"axes": np.array([1], np.int64)} if copies else {}
    return _surrounded(nodes, feeds, constants, {f"y{i}": FLOAT for i in range(copies)})


def _quantize(bits: int, dims: Dims, copies: int) -> _Made:
    nodes: list[Node] = []
    outputs: dict[str, int] = {}
    for i in range(copies):
        nodes.append(Node("DynamicQuantizeLinear", [f"x{i}"], [f"y{i}", f"s{i}", f"z{i}"]))
        outputs |= {f"y{i}": UINT8, f"s{i}": FLOAT, f"z{i}": UINT8}
    return _surrounded(nodes, {f"x{i}": _random(dims, i) for i in range(copies)}, {}, outputs)


#: The operators of one block of a network: kind, bits, sizes, as they are priced.
Block = list[tuple[str, int, Dims]]


def network(width: int, blocks: int, rows: int = 16) -> tuple[Graph, Block]:
    """Return a small network of mixed operators, and what they are by themselves.

    Between operators of other kinds, with weights that push everything else out of the caches, an operator takes longer
    than among its like; by how much is what this graph is for.
    """
    wide, half = 4 * width, 2 * width
    constants: dict[str, np.ndarray] = {}
    nodes: list[Node] = []
    x = "x"
    for i in range(blocks):
        constants |= {f"u{i}": _random((width, wide), i), f"v{i}": _random((wide, width), i)}
        constants |= {f"b{i}": np.full(wide, 0.1, np.float32), f"g{i}": np.ones(width, np.float32)}
        nodes += [
            Node("LayerNormalization", [x, f"g{i}"], [f"n{i}"]),
            Node("MatMul", [f"n{i}", f"u{i}"], [f"a{i}"]),
            Node("Mul", [f"a{i}", f"b{i}"], [f"c{i}"]),
            Node("Split", [f"c{i}"], [f"d{i}", f"e{i}"], {"axis": 1, "num_outputs": 2}),
            Node("Sigmoid", [f"d{i}"], [f"f{i}"]),
            Node("Mul", [f"f{i}", f"e{i}"], [f"h{i}"]),
            Node("Softmax", [f"h{i}"], [f"j{i}"]),
            Node("Concat", [f"j{i}", f"e{i}"], [f"k{i}"], {"axis": 1}),
            Node("MatMul", [f"k{i}", f"v{i}"], [f"l{i}"]),
            Node("Sub", [x, f"l{i}"], [f"y{i}"]),
        ]
        x = f"y{i}"
    data = model(nodes, inputs={"x": (FLOAT, (rows, width))}, outputs={x: FLOAT}, constants=constants)
    block: Block = [
        ("LayerNormalization", 32, (rows, width)), ("matmul", 32, (rows, width, wide)), ("Mul", 32, (rows * wide,)),
        ("Slice", 32, (rows * wide,)), ("Sigmoid", 32, (rows * half,)), ("Mul", 32, (rows * half,)),
        ("Softmax", 32, (rows, half)), ("Concat", 32, (rows * wide,)), ("matmul", 32, (rows, wide, width)),
        ("Add", 32, (rows * width,)),
    ]  # fmt: skip
    return Graph(data, {"x": _random((rows, width))}, {x: FLOAT}), block


def _at(i: int) -> str:
    return f"h{i}"


def _surrounded(
    nodes: list[Node], feeds: dict[str, np.ndarray], constants: dict[str, np.ndarray], outputs: dict[str, int]
) -> _Made:
    """Add the smallest operator there is: a graph must have one even where no copy is wanted."""
    feeds = feeds or {"e": np.zeros(1, np.float32)}
    feeds = {**feeds, "e": np.ones(1, np.float32)}
    return [*nodes, Node("Neg", ["e"], ["end"])], feeds, constants, {**outputs, "end": FLOAT}


#: Operators of one input that work number by number, with what ONNX Runtime calls them.
UNARY = ("Relu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Neg", "Gelu", "Pow")
BINARY = ("Add", "Mul", "Div")
#: Operators that move numbers: (elements,) of what they write.
#: "take" is Gather along the last axis, which copies number by number: ten times what moving rows takes.
MOVES = ("Slice", "Concat", "Expand", "Pad", "Where", "Cast", "QuantizeLinear", "DequantizeLinear", "Transpose", "take")
#: Operators along the last axis: (rows, columns).
ROWWISE = ("LayerNormalization", "Softmax", "ReduceMean", "gather", "quantize", "BatchNormalization")
#: Precisions of products with a constant weight.
BITS = (32, 8, 4)


def _elementwise(kind: str) -> Callable[[int, Dims, int], _Made]:
    def make(bits: int, dims: Dims, copies: int) -> _Made:
        if kind in MOVES:
            return _moved(kind, dims, copies)
        if kind in UNARY:
            squares = kind == "Pow"  # the exponent that norms have
            nodes = [Node(kind, [_at(i), *(["two"] if squares else [])], [_at(i + 1)]) for i in range(copies)]
            constants = {"two": np.array(2, np.float32)} if squares and copies else {}
            return _surrounded(nodes, {"h0": np.abs(_random(dims))}, constants, {_at(copies): FLOAT} if copies else {})
        other = {f"c{i}": np.full(dims, 1.0 + i / 64, np.float32) for i in range(copies)}
        nodes = [Node(kind, [_at(i), f"c{i}"], [_at(i + 1)]) for i in range(copies)]
        return _surrounded(nodes, {"h0": np.abs(_random(dims)), **other}, {}, {_at(copies): FLOAT} if copies else {})

    return make


_KINDS: dict[str, Callable[[int, Dims, int], _Made]] = {
    "matmul": _matmul, "bmm": _bmm, "conv": _conv, "conv_odd": _conv, "depthwise": _depthwise, "gather": _gather,
    "LayerNormalization": _layer_norm, "Softmax": _softmax, "Transpose": _transpose, "quantize": _quantize,
    "ReduceMean": _reduce, "BatchNormalization": _batch_norm, "reorder": _reorder,
}  # fmt: skip
KINDS = tuple(dict.fromkeys((*_KINDS, *UNARY, *BINARY, *MOVES)))
