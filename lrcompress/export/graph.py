"""Trace a live module into an ONNX graph whose initializers carry the names of its tensors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelError
from ..model import InputSpec, OpenedModel
from .cleaning import drop_zero_biases
from .slots import CORE_SLOT, DORA_SLOT, SLOT

OPSET = 20
#: What it takes to say where a tensor lies; offsets of large tensors are those of pages, of others those of vectors.
_POINTER_BYTES, _LARGE_BYTES, _PAGE, _LINE = 96, 1 << 20, 4096, 64
_ROOT = "network."
#: Joins the names of axes whose lengths add up.
PLUS = "_plus_"


class _Answers(nn.Module):
    """Positional inputs in, the named outputs as a tuple out."""

    def __init__(self, opened: OpenedModel, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._opened, self._names = opened, tuple(names)
        self.output_names: tuple[str, ...] = ()

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        with _BoundsAlike():
            outputs = self._opened.outputs(self.network, dict(zip(self._names, args, strict=True)))
        self.output_names = tuple(outputs)
        return tuple(outputs.values())


_CLAMPS = {torch.clamp, torch.clip, Tensor.clamp, Tensor.clip, Tensor.clamp_, Tensor.clip_}


class _BoundsAlike(TorchFunctionMode):
    """Makes both bounds of a clamp floating where the tensor is: the exporter (torch 2.13) fails on `x.clamp(0, 6.0)`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _CLAMPS and args and args[0].is_floating_point():
            args = (args[0], *map(_floating, args[1:]))
            kwargs = {k: _floating(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _floating(bound: Any) -> Any:
    return float(bound) if isinstance(bound, int) and not isinstance(bound, bool) else bound


def example_inputs(
    specs: Sequence[InputSpec], module: nn.Module, *, batch: int = 2, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return seeded inputs of the declared shapes; a word is a dynamic axis, the first of them the batch."""
    rng = np.random.default_rng(seed)
    rows = [n for m in module.modules() if isinstance(n := getattr(m, "num_embeddings", None), int)]
    top = min(rows) if rows else 2
    sizes: dict[str, int] = {}
    out = {}
    for spec in specs:
        shape = []
        for i, d in enumerate(spec.shape):
            if isinstance(d, str):
                # An axis that is two others in one, `past_plus_sequence`, is as long as both.
                d = sum(sizes.setdefault(part, batch if i == 0 else 12 + len(sizes)) for part in d.split(PLUS))
            shape.append(d)
        if np.issubdtype(np.dtype(spec.dtype), np.floating):
            out[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif "mask" in spec.name:
            out[spec.name] = np.ones(shape, spec.dtype)
        elif "position" in spec.name:
            out[spec.name] = np.broadcast_to(np.arange(shape[-1], dtype=spec.dtype), shape).copy()
        else:
            out[spec.name] = rng.integers(0, max(2, min(top, 1000)) if "type" not in spec.name else 1, shape).astype(
                spec.dtype
            )
    return out


def trace(opened: OpenedModel, module: nn.Module, *, where: str) -> onnx.ModelProto:
    """Export `module` with the inputs of `opened`; initializers are named by module path, slots `<layer>.lora_A|B`.

    Raises `ModelError` without inputs, or where the exporter cannot follow the network.
    """
    specs = opened.inputs
    if not specs:
        raise ModelError(where, "the model's inputs", "none are known", "give --input NAME:DTYPE:DIMS when factorizing")
    wrapper = _Answers(opened, module, [s.name for s in specs]).eval()
    example = example_inputs(specs, module)
    args = tuple(torch.as_tensor(example[s.name]) for s in specs)
    words = {d for s in specs for d in s.shape if isinstance(d, str)}
    # The exporter cannot be told of a sum of axes; it finds the relation itself.
    dims: dict[str, Any] = {d: torch.export.Dim.AUTO if PLUS in d else torch.export.Dim(d) for d in sorted(words)}
    shapes = tuple({i: dims[d] for i, d in enumerate(s.shape) if isinstance(d, str)} for s in specs)
    with torch.no_grad():
        wrapper(*args)
    names = wrapper.output_names
    try:
        with warnings.catch_warnings(), _hushed("torch.onnx"):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                wrapper, args, dynamo=True, optimize=False, external_data=False, verbose=False, opset_version=OPSET,
                input_names=[s.name for s in specs], output_names=list(names), dynamic_shapes=(shapes,),
            )  # fmt: skip
    except Exception as e:  # the exporter's own family is private and changes; the cause goes along
        raise ModelError(
            where, "a network that torch.onnx can export", _reason(e), "check the dynamic axes of --input"
        ) from e
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for port, spec in zip(model.graph.input, specs, strict=True):
        for dim, word in zip(port.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(word, str):
                dim.dim_param = word
    _rename(model.graph, _first_names(wrapper))
    drop_zero_biases(model.graph)
    return model


@contextlib.contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Silence a logger that reports what nobody here can act on (missing torchvision)."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{type(e).__name__}: {lines[0] if lines else ''}"


def _first_names(module: nn.Module) -> dict[str, str]:
    """Return {name: first name} of tensors that the module holds under several; a checkpoint keeps the first."""
    first: dict[int, str] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {n: f for n, t in named if (f := first.setdefault(id(t), n)) != n}


def _rename(graph: onnx.GraphProto, first: Mapping[str, str]) -> None:
    used = {t.name for t in graph.initializer}
    # The exporter calls a tied tensor by any of its names.
    own = {n: first[n] if n in first and first[n] not in used else n for n in used}
    names = {n: own[n].removeprefix(_ROOT) for n in used}
    for slot in (SLOT, CORE_SLOT, DORA_SLOT):
        names = {n: bare.replace(f".adapters.{slot}.", ".") for n, bare in names.items()}
    taken = {o for n in graph.node for o in n.output} | {i.name for i in graph.input}
    clash = sorted(set(names.values()) & taken)
    if len(set(names.values())) != len(names) or clash:
        raise ModelError("export", "tensor names that stay unique without their prefix", clash[:1] or "a duplicate")
    for t in graph.initializer:
        t.name = names[t.name]
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


def strip(model: onnx.ModelProto) -> None:
    """Remove what a stranger need not read and what makes equal models differ: source paths, stack traces, names, shapes."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    for holder in (model, model.graph):
        holder.ClearField("doc_string")
    model.producer_name = "lrcompress"
    model.ClearField("producer_version")
    for holder in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del holder.metadata_props[:]
        holder.ClearField("doc_string")
    for node in model.graph.node:
        node.ClearField("name")
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]


def store_external(model: onnx.ModelProto, data_name: str) -> bytes:
    """Move initializers into one byte string; the graph points at `data_name`. Large ones begin at a page.

    Slot defaults stay in the graph: they are no constants. Shapes stay too: the runtime reads them while it builds the
    graph; and what is shorter than the words that would point at it.
    """
    blob, slots = bytearray(), {i.name for i in model.graph.input}
    for t in sorted(model.graph.initializer, key=lambda t: t.name):
        array = numpy_helper.to_array(t)
        if array.size == 0 or t.name in slots or (array.dtype.kind in "iub" and array.nbytes < 256 and array.ndim <= 1):
            continue
        if len(t.raw_data) <= _POINTER_BYTES and t.HasField("raw_data"):
            continue
        raw = t.raw_data if t.HasField("raw_data") else np.ascontiguousarray(array).tobytes()
        blob.extend(b"\0" * (-len(blob) % (_PAGE if len(raw) >= _LARGE_BYTES else _LINE)))
        entries = {"location": data_name, "offset": str(len(blob)), "length": str(len(raw))}
        blob.extend(raw)
        name, dtype, dims = t.name, t.data_type, list(t.dims)
        t.Clear()
        t.name, t.data_type, t.data_location = name, dtype, onnx.TensorProto.EXTERNAL
        t.dims.extend(dims)
        for key, value in entries.items():
            t.external_data.add(key=key, value=value)
    return bytes(blob)


def tensors_of(model: onnx.ModelProto) -> Mapping[str, np.ndarray]:
    """Return the initializers of an in-memory model by name."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
