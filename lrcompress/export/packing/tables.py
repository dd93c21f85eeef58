"""Tables of 4 bits (8) in blocks along their rows: only the rows that are read are multiplied out.

    Gather(W, i)  =  GatherBlockQuantized(codes, i, scales)

Codes are (entries, columns/2) bytes. Refused: an odd number of columns, which do not fill bytes, and tables that are also
read in another way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from . import MICROSOFT, Applied, Packed, Refusal, constant, nibbles, retire, scales, take_over, use


def pack(model: ir.Model, weights: Sequence[Packed]) -> Applied:
    graph, fired, refused = model.graph, 0, []
    for w in weights:
        assert w.coded is not None and w.coded.grid.block is not None
        name, grid = w.product.weight, w.coded.grid
        readers = [u.node for u in graph.initializers[name].uses()]
        reason = _reason(w, readers)
        if reason is not None:
            refused.append(Refusal(name, reason))
            continue
        order = {n: i for i, n in enumerate(graph)}
        readers.sort(key=lambda n: order[n])
        codes = w.coded.codes.numpy().astype(np.uint8)
        stored = constant(graph, f"{name}_quantized", nibbles(codes) if grid.bits == 4 else codes)
        wide = scales(graph, name, w.coded.scales.numpy(), readers[0])
        for node in readers:
            out = node.outputs[0]
            attributes = {
                "bits": grid.bits,
                "block_size": grid.width(codes.shape[1]),
                "gather_axis": 0,
                "quantize_axis": 1,
            }
            new = ir.node("GatherBlockQuantized", [stored, node.inputs[1], wide], attributes, domain=MICROSOFT)
            graph.insert_before(node, new)
            take_over(graph, node, out, new.outputs[0])
            fired += 1
        retire(graph, name)
    if fired:
        use(model)
    return Applied(fired, tuple(refused))


def _reason(w: Packed, readers: Sequence[ir.Node]) -> str | None:
    assert w.coded is not None
    other = next((n for n in readers if n.op_type != "Gather"), None)
    if other is not None:
        return f"{other.op_type} reads it, too"
    if w.coded.grid.bits == 4 and w.coded.codes.shape[1] % 2:
        return f"rows of {w.coded.codes.shape[1]} codes do not fill bytes"
    return None if w.coded.grid.symmetric else "a zero per block"
