"""Products of 4 bits (2, 8) in blocks along the inputs.

    MatMul(x, W)          =  MatMulNBits(x, codes, scales[, zeros])
    Gemm(x, W, b)         =  Add(MatMulNBits(…), b)

Codes are rows (out, blocks, bytes), two codes a byte, the first in the low half; the last block is filled with zeros.
Activations are rounded to int8 block by block (accuracy level 4): that is what makes it fast, and far below the error of
the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from . import MICROSOFT, Applied, Packed, Refusal, constant, nibbles, retire, scales, take_over, use

ACCURACY = 4


def pack(model: ir.Model, weights: Sequence[Packed]) -> Applied:
    graph, fired, refused = model.graph, 0, []
    for w in weights:
        assert w.coded is not None and w.coded.grid.block is not None
        name = w.product.weight
        readers = [u.node for u in graph.initializers[name].uses()]
        odd = next((n for n in readers if n.op_type not in ("MatMul", "Gemm")), None)
        if odd is not None:
            refused.append(Refusal(name, f"{odd.op_type} reads it, too"))
            continue
        first, shared = readers[0], _inputs(graph, w, readers)
        for node in sorted(readers, key=list(graph).index) if len(readers) > 1 else [first]:
            _replace(model, node, w, shared)
            fired += 1
        retire(graph, name)
    if fired:
        use(model)
    return Applied(fired, tuple(refused))


def _inputs(graph: ir.Graph, w: Packed, readers: Sequence[ir.Node]) -> list[ir.Value | None]:
    """Add codes, scales and zeros to the graph."""
    assert w.coded is not None
    grid, name = w.coded.grid, w.product.weight
    rows, columns = w.coded.codes.shape
    block = grid.width(columns)
    count = -(-columns // block)
    zeros = w.coded.zeros.numpy().astype(np.uint8)
    codes = np.repeat(zeros, block, axis=1)
    codes[:, :columns] = w.coded.codes.numpy()
    stored = codes.reshape(rows, count, block)
    packed = nibbles(stored) if grid.bits == 4 else _quarters(stored) if grid.bits == 2 else stored
    order = {n: i for i, n in enumerate(graph)}
    before = min(readers, key=lambda n: order[n])
    found: list[ir.Value | None] = [
        constant(graph, f"{name}_quantized", packed), scales(graph, name, w.coded.scales.numpy(), before)
    ]  # fmt: skip
    if not grid.symmetric:
        even = np.pad(zeros, ((0, 0), (0, count % 2)))
        found.append(constant(graph, f"{name}_zero_point", nibbles(even) if grid.bits == 4 else zeros))
    return found


def _quarters(codes: np.ndarray) -> np.ndarray:
    parts = [codes[..., i::4].astype(np.uint8) << (2 * i) for i in range(4)]
    return (parts[0] | parts[1] | parts[2] | parts[3]).astype(np.uint8)


def _replace(model: ir.Model, node: ir.Node, w: Packed, shared: Sequence[ir.Value | None]) -> None:
    assert w.coded is not None
    graph, out = model.graph, node.outputs[0]
    rows, columns = w.coded.codes.shape
    attributes = {
        "K": columns, "N": rows, "bits": w.coded.grid.bits, "block_size": w.coded.grid.width(columns),
        "accuracy_level": ACCURACY,
    }  # fmt: skip
    product = ir.node("MatMulNBits", [node.inputs[0], *shared], attributes, domain=MICROSOFT)
    last, bias = product, node.inputs[2] if len(node.inputs) > 2 else None
    graph.insert_before(node, product)
    if bias is not None:
        product.outputs[0].name = f"{out.name}_product"
        last = ir.node("Add", [product.outputs[0], bias])
        graph.insert_before(node, last)
    new = last.outputs[0]
    take_over(graph, node, out, new)
