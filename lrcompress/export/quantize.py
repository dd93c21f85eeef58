"""Bits per tensor: each weight of a graph in 32, 16, 8 or 4 bits, refitted, and the adapter slots as they were.

    bits  products (MatMul, Gemm)        convolutions                       tables
    16    stored halved, cast at load    the same                           rows are cast as they are read
    8     dynamic (`int8`)               static, with calibration data      rows of s8 with one scale each
    4     MatMulNBits in blocks          constants, dense when loaded       GatherBlockQuantized

What is named as `stored` has 8 bits in the file only: multiplied out when the graph is loaded, nothing that it reads or
makes is rounded.

What rounding costs is first made up for (`refit`); then ONNX Runtime's tools and operators take the values, whose grids
reproduce them. The tools would turn a slot's empty default into a constant and so delete the slot, silently. So the
defaults are held back while they work (a slot is then a plain input), the nodes of the branches are left out by name,
and at the end every slot must be what it was.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from ..errors import LrcompressWarning, ModelError
from ..plan.bits import BLOCK, row_block
from .int8 import CHANNELS_FROM, MIN_TABLE_BYTES, dynamic_matrices, quantize_tables, quiet, static_convs
from .packing import Packed, constants, halves, nbits, tables
from .products import Product, inner_reads, products, put, readers
from .refit import Refit, refit, round_only
from .refit.grids import ROW8, Coded, Grid, blocks, signed
from .refit.moments import lookups, observe
from .rewrites import Refusal

#: A constant of 4 bits comes with four nodes: smaller ones stay at 8.
MIN_CONSTANT = 1024
#: What a constant is called that a transposition was folded into.
_TURNED = "_Transposed"
#: What is stored in 16 bits comes with a cast.
_MIN_HALF_BYTES = 1024


@dataclass
class Quantized:
    """`model`, what each weight became, and what stayed as it was, with the reason."""

    model: onnx.ModelProto
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    coded: dict[str, Coded] = field(default_factory=dict)


def quantize_int8(
    src_model: onnx.ModelProto, *, slots: Sequence[str], calibration: Iterable[dict[str, np.ndarray]] | None
) -> onnx.ModelProto:
    """Return `src_model` with every weight in 8 bits."""
    return quantize(src_model, 8, slots=slots, calibration=calibration).model


def quantize(
    src_model: onnx.ModelProto, bits: int | Mapping[str, int], *, slots: Sequence[str],
    calibration: Iterable[dict[str, np.ndarray]] | None, block: int | Mapping[str, int] = BLOCK, refits: bool = True,
    may_raise: bool = True, stored: Collection[str] = (),
) -> Quantized:  # fmt: skip
    """Return `src_model` with weights in `bits`, all alike or by name (others stay); the source is not changed.

    `slots` name the inputs whose defaults and branches stay as they are. `calibration`: feeds of the model's own inputs;
    needed for convolutions in 8 bits, and for the best refits. `block`: inputs that share a scale at 4 bits, of all or by
    name. `may_raise`: whether the graph may become one of opset 21, which convolutions of 4 bits need; they get 8 otherwise.
    `stored`: weights, of fewer than 16 bits, that get 8 and are computed with in 32.
    Factor `name` becomes `name_quantized` (see `renamed`).
    Raises `ModelError` if a slot did not survive.
    """
    model = onnx.ModelProto()
    model.CopyFrom(src_model)
    name_nodes(model.graph)
    fold_transposes(model.graph, bits)
    bits, block = _with_turned(bits, model.graph), _with_turned(block, model.graph)
    stored = {t.name for t in model.graph.initializer if t.name.removesuffix(_TURNED) in set(stored)}
    branches = branch_nodes(model.graph, slots)
    found = products(model.graph, branches)
    batches = None if calibration is None else list(calibration)
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    static = bool(batches) and opset >= CHANNELS_FROM
    wanted = _wanted(found, bits, static, may_raise, stored)
    result = Quantized(model)
    _check_slots(model, slots)
    eight = [p for p, b in wanted if b == 8 and (p.weight not in stored or p.kind == "table")]
    if not static and any(p.kind == "conv" for p in eight):
        needed = f"a graph of opset {CHANNELS_FROM} or later" if batches else "calibration data for them (--calib)"
        warnings.warn(f"convolutions stay in 16 bits: int8 needs {needed}", LrcompressWarning, stacklevel=2)
        wanted = [(p, 16 if p in eight and p.kind == "conv" else b) for p, b in wanted]
        eight = [p for p in eight if p.kind != "conv"]
    fitted = _fitted(model, found, wanted, batches or [], block, refits, stored)
    put(model.graph, fitted.arrays.items())
    result.coded = fitted.coded
    by_node = {o: n.name for n in model.graph.node for o in n.output}
    held = [t for t in model.graph.initializer if t.name in set(slots)]
    for tensor in held:
        model.graph.initializer.remove(tensor)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        convs = [by_node[p.output] for p in eight if p.kind == "conv"]
        model = static_convs(model, convs, batches or [], held, branches, Path(scratch))
        matrices = {p.weight for p in eight if p.kind in ("matmul", "gemm")}
        nodes = [n.name for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and matrices & set(n.input[:2])]
        model = dynamic_matrices(model, nodes, Path(scratch))
    quantize_tables(model.graph, {p.weight for p in eight if p.kind == "table"})
    wanted += _left_over(model, src_model, wanted, bits, slots)
    model.graph.initializer.extend(held)
    model = _packed(model, wanted, fitted, result, stored)
    drop_unused(model.graph, keep=set(slots))
    restore_header(model, src_model)
    _check_inputs(model, src_model, slots)
    if _is_checked(src_model):
        onnx.checker.check_model(model)
    result.model = model
    errors = {r.weight: r for r in fitted.rows}
    result.rows = [_row(p, b, errors.get(p.weight), result) for p, b in wanted]
    return result


def _is_checked(source: onnx.ModelProto) -> bool:
    """Return whether the checker takes the source: runtimes take graphs whose outputs have no shape, it does not."""
    try:
        onnx.checker.check_model(source)
    except onnx.checker.ValidationError:
        return False
    return True


def _row(p: Product, bits: int, error: Any, result: Quantized) -> dict[str, Any]:
    stays = next((r.reason for r in result.refused if r.where == p.weight), None)
    row: dict[str, Any] = {"name": p.weight, "kind": p.kind, "bits": 32 if stays else bits}
    if error is not None and not stays:
        row |= {"rel_error": float(f"{error.rel_error:.6g}"), "gauge": error.gauge}
    return row | ({"reason": stays} if stays else {})


def _wanted(
    found: Sequence[Product], bits: int | Mapping[str, int], calibrated: bool, four: bool, stored: Collection[str]
) -> list[tuple[Product, int]]:
    """Return the products that leave 32 bits, and to how many; what is too small to gain stays with the next wider."""
    wanted = []
    for p in found:
        b = bits if isinstance(bits, int) else bits.get(p.weight, 32)
        n = int(np.prod(p.shape))
        if p.kind == "table" and 4 * n < MIN_TABLE_BYTES and b < 16:
            b = 16
        if p.kind == "table" and b == 4 and p.shape[1] % 2:
            b = 8  # two codes fill a byte
        if p.kind in ("conv", "conv_transpose") and b == 4 and (n < MIN_CONSTANT or not four):
            b = 8 if p.kind == "conv" and calibrated else 16
        if p.weight in stored and b < 16:
            b = 8
        if p.kind == "conv_transpose" and b < 16:
            b = 16
        if b != 32:
            wanted.append((p, b))
    return wanted


def _left_over(
    model: onnx.ModelProto, source: onnx.ModelProto, wanted: Sequence[tuple[Product, int]], bits: int | Mapping[str, int],
    slots: Sequence[str],
) -> list[tuple[Product, int]]:  # fmt: skip
    """Return what no operator reads in fewer bits (cores of einsums, left operands): it is stored in 16."""
    done, inputs = {p.weight for p, _ in wanted}, {i.name for i in source.graph.input} | set(slots)
    network = {t.name for t in source.graph.initializer}
    found = []
    for t in model.graph.initializer:
        asked = bits if isinstance(bits, int) else bits.get(t.name, 32)
        large = t.data_type == onnx.TensorProto.FLOAT and 4 * int(np.prod(t.dims)) >= _MIN_HALF_BYTES
        if large and asked < 32 and t.name in network and t.name not in done | inputs:
            found.append((Product("other", t.name, "", "", tuple(t.dims)), 16))
    return found


def grid_of(p: Product, bits: int, block: int, *, stored: bool = False) -> Grid | None:
    """Return the grid that the runtime reads this product's weight from; None where there is none."""
    columns = int(np.prod(p.shape)) // p.n_rows
    if stored and bits == 8 and p.kind != "table":
        return signed(8, columns)
    if bits == 8:
        return ROW8
    if bits != 4:
        return None
    if p.kind == "conv":
        return signed(4, columns)
    return blocks(4, row_block(columns, block))  # short rows are padded to whole blocks


def _fitted(
    model: onnx.ModelProto, found: Sequence[Product], wanted: Sequence[tuple[Product, int]],
    batches: Sequence[dict[str, np.ndarray]], block: int | Mapping[str, int], refits: bool, stored: Collection[str],
) -> Refit:  # fmt: skip
    widths = {p.weight: block if isinstance(block, int) else block.get(p.weight, BLOCK) for p in found}
    grids = {
        p.weight: g for p, b in wanted if (g := grid_of(p, b, widths[p.weight], stored=p.weight in stored)) is not None
    }
    if not refits:
        return round_only(model, found, grids)
    seen = observe(model, found, batches)
    eight = {p.kind for p, b in wanted if b == 8 and p.weight not in stored}
    counts = lookups(found, batches)
    return refit(model, found, grids, seen, counts=counts, rounds_activations=bool(eight - {"table"}))


def _packed(
    model: onnx.ModelProto,
    wanted: Sequence[tuple[Product, int]],
    fitted: Refit,
    result: Quantized,
    stored: Collection[str],
) -> onnx.ModelProto:
    """Put what ONNX Runtime's tools do not write into the graph."""
    four = [Packed(p, fitted.coded[p.weight]) for p, b in wanted if b == 4]
    half = [Packed(p) for p, b in wanted if b == 16]
    dense = [
        Packed(p, fitted.coded[p.weight]) for p, b in wanted if b == 8 and p.weight in stored and p.kind != "table"
    ]
    if not four and not half and not dense:
        return model
    graph = ir.from_proto(model)
    groups = (
        (nbits, [w for w in four if w.product.kind in ("matmul", "gemm")]),
        (tables, [w for w in four if w.product.kind == "table"]),
        (constants, [*(w for w in four if w.product.kind == "conv"), *dense]),
        (halves, half),
    )
    for writer, weights in groups:
        if weights:
            result.refused += writer.pack(graph, weights).refused
    return ir.to_proto(graph)


def _check_slots(model: onnx.ModelProto, slots: Sequence[str]) -> None:
    lost = sorted(set(slots) - {t.name for t in model.graph.initializer})
    if lost:
        raise ModelError(f"export --quantize: slot {lost[0]}", "a graph input with a default", "none")


def _check_inputs(model: onnx.ModelProto, source: onnx.ModelProto, slots: Sequence[str]) -> None:
    """Raise `ModelError` unless every input is what it was and every slot kept its default."""
    before, after = (
        {i.name: (i.type.SerializeToString(deterministic=True)) for i in m.graph.input} for m in (source, model)
    )
    if after != before or not set(slots) <= {t.name for t in model.graph.initializer}:
        gone = sorted(set(before) ^ set(after)) or sorted(n for n in before if before[n] != after[n])
        raise ModelError(
            f"export --quantize: {gone[0] if gone else 'slots'}", "inputs that survive quantization", "a changed graph"
        )


def renamed(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, str]:
    """Return where each constant of `names` is now: under its own name, or with the suffixes of the quantizers."""
    have = {t.name for t in model.graph.initializer}
    found = {}
    for name in names:
        for candidate in (name, f"{name}_quantized", f"{name}{_TURNED}", f"{name}{_TURNED}_quantized"):
            if candidate in have:
                found[name] = candidate
                break
    return found


def branch_nodes(graph: onnx.GraphProto, slots: Sequence[str]) -> set[str]:
    """Return the names of the nodes that only exist for the adapters: from a slot to the sum with its layer.

    A product or convolution whose other operand comes out of a branch belongs to it; the addition ends it.
    """
    inside, names = set(slots), set()
    for node in graph.node:
        if inside & set(node.input):
            names.add(node.name)
            if node.op_type not in ("Add", "Sum"):
                inside.update(node.output)
    return names


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name: exclusion works by name."""
    taken = {n.name for n in graph.node if n.name}
    for i, node in enumerate(graph.node):
        if not node.name:
            name = f"{node.op_type}_{i}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)


def fold_transposes(graph: onnx.GraphProto, bits: int | Mapping[str, int]) -> None:
    """Turn `Transpose(constant)`, which is how a traced linear layer holds its weight, into a constant of its own.

    The quantizers look for constant operands and would leave these products alone. A table that is also read as it
    stands (tied embeddings) then exists twice, in int8 still half of what it was; in 16 and 32 bits it stays one.
    """
    constants = {t.name: t for t in graph.initializer}
    outputs = {o.name for o in graph.output} | inner_reads(graph)
    for node in [
        n for n in graph.node if n.op_type == "Transpose" and n.input[0] in constants and n.output[0] not in outputs
    ]:
        source = constants[node.input[0]]
        if len(source.dims) != 2 or source.data_type != onnx.TensorProto.FLOAT or _axes(node) != [1, 0]:
            continue
        asked = bits if isinstance(bits, int) else bits.get(source.name, 32)
        if asked >= 16 and any(r.op_type != "Transpose" for r in readers(graph, source.name)):
            continue
        name = f"{source.name}{_TURNED}"
        if name not in constants:
            constants[name] = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(source).T), name)
            graph.initializer.append(constants[name])
        for reader in graph.node:
            for i, value in enumerate(reader.input):
                if value == node.output[0]:
                    reader.input[i] = name
        graph.node.remove(node)
    drop_unused(graph, keep=set())


def _with_turned(by_name: int | Mapping[str, int], graph: onnx.GraphProto) -> int | Mapping[str, int]:
    """Return what is asked by name with what `fold_transposes` made of it, for which the same is asked."""
    if isinstance(by_name, int):
        return by_name
    turned = {t.name: t.name.removesuffix(_TURNED) for t in graph.initializer if t.name.endswith(_TURNED)}
    return {**{n: by_name[source] for n, source in turned.items() if source in by_name}, **by_name}


def _axes(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])


def drop_unused(graph: onnx.GraphProto, *, keep: set[str]) -> None:
    """Remove constants that nothing reads any more."""
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output} | keep
    read |= inner_reads(graph)
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def restore_header(model: onnx.ModelProto, source: onnx.ModelProto) -> None:
    """Keep the source's header and input order; remove what the tools noted about themselves."""
    four = {o.version for o in model.opset_import if o.domain in ("", "ai.onnx")} >= {constants.OPSET}
    model.ir_version = max(source.ir_version, constants.IR if four else 0)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    model.doc_string = model.graph.doc_string = ""
    model.graph.name = source.graph.name
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
