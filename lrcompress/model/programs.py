"""`torch.export` programs (`.pt2`): loaded as data, and turned into modules that hooks and surgery understand.

A program calls operators on stored tensors; `placing.put_modules` makes each layer among them a module that holds its
weight and bias under the names they had, so that a program is treated like any other module.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from ..errors import ModelError
from ..files import canonical_json
from .archive import Archive, Unsafe, read_archive, tensor_of, write_graph
from .inputs import InputSpec
from .opened import OpenedModel
from .placing import put_modules
from .tensors import check_finite, check_floating, digest_tensors

GRAPH = "graph.pt2"


def open_program(path: Path, *, trust_pickle: bool = False) -> OpenedModel:
    """Open a `.pt2`; what could run code is refused, or left to torch where the caller trusts the file."""
    try:
        archive = read_archive(path)
    except (Unsafe, ModelError) as e:
        if trust_pickle:
            return _open_trusted(path)
        if isinstance(e, ModelError):
            raise
        remedy = "export it again from its source, or --trust-pickle if you trust where it comes from"
        raise ModelError(path, "a program of plain operators and tensors", f"{e}, which could run code", remedy) from e
    program = _load(archive)
    tensors = {name: tensor_of(archive, "weights", name) for name in sorted(archive.weights)}
    check_finite(tensors, path)
    check_floating(tensors, path)
    constants = {name: tensor_of(archive, "constants", name) for name in sorted(archive.constants)}
    graph = _without_example({k: v for k, v in archive.graph.items() if k != "torch_version"})
    digest = digest_tensors({**constants, **tensors}, canonical_json(graph))
    with torch.no_grad():
        for name, value in tensors.items():
            program.state_dict[name].copy_(value)
    module, inputs = as_module(program, path)
    return OpenedModel(path, "pt2", digest, module, inputs=inputs, extra={"graph": write_graph(archive)})


def _without_example(value: Any) -> Any:
    """Return a graph without the sizes of the example that it was traced with."""
    if isinstance(value, dict):
        return {k: _without_example(v) for k, v in value.items() if k != "hint"}
    return [_without_example(v) for v in value] if isinstance(value, list) else value


def open_graph(path: Path) -> OpenedModel:
    """Open a weightless graph that `open_program` left in a checkpoint; the weights are zeros."""
    try:
        archive = read_archive(path)
    except Unsafe as e:
        raise ModelError(
            path, "a program of plain operators and tensors", f"{e}, which could run code", "factorize again"
        ) from e
    module, inputs = as_module(_load(archive), path)
    return OpenedModel(path, "pt2", "", module, inputs=inputs, extra={"graph": write_graph(archive)})


def _load(archive: Archive) -> torch.export.ExportedProgram:
    """Let torch read the program from an archive written anew from the checked parts."""
    from torch.export.pt2_archive._package import load_pt2

    try:
        with _quiet():
            contents = load_pt2(io.BytesIO(write_graph(archive)))
        program = contents.exported_programs["model"]
    except MemoryError:
        raise
    except Exception as e:  # the reader of torch raises whatever a malformed graph leads it to
        got = f"{type(e).__name__}: {e}"
        raise ModelError(
            archive.path, "a program this torch can read", got, f"export it again with torch {torch.__version__}"
        ) from e
    return program


def _open_trusted(path: Path) -> OpenedModel:
    """Open with torch's own reader, which may run code. Such a program has no graph that a checkpoint could keep."""
    try:
        with path.open("rb") as f, _quiet():
            program = torch.export.load(f)
    except Exception as e:  # trusted code may raise anything
        raise ModelError(path, "a program this torch can read", f"{type(e).__name__}: {e}", "export it again") from e
    tensors = {k: v for k, v in program.state_dict.items() if isinstance(v, Tensor)}
    check_finite(tensors, path)
    check_floating(tensors, path)
    digest = digest_tensors(tensors, str(program.graph).encode())
    module, inputs = as_module(program, path)
    return OpenedModel(path, "pt2", digest, module, inputs=inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def as_module(program: torch.export.ExportedProgram, where: object) -> tuple[nn.Module, tuple[InputSpec, ...]]:
    """Return the program as a module called with its inputs by name, and those inputs.

    Layers are `nn` modules at the paths of their weights; outputs keep the structure that the program records.
    """
    network = as_network(program)
    put_modules(network)
    network.graph.lint()
    network.recompile()
    inputs = _inputs(network, where)
    # An exported program refuses train() and eval(): its mode was fixed when it was traced.
    for name in ("train", "eval"):
        vars(network).pop(name, None)
    network.training = False
    for module in network.modules():
        module.training = False
    return network, inputs


def as_network(program: torch.export.ExportedProgram) -> GraphModule:
    """Return the program as a graph that calls operators on stored tensors, takes its inputs flat and by name."""
    network = program.module(check_guards=False)
    assert isinstance(network, GraphModule)
    out_spec = network._out_spec
    assert out_spec is not None
    network._forward_pre_hooks.clear()  # they compare with the example inputs, which are gone
    _share_tied(network)
    _drop_constant_inputs(network)
    for node in network.graph.nodes:
        if node.op == "output":
            (flat,) = node.args
            node.args = (torch.utils._pytree.tree_unflatten(list(flat), out_spec),)
    network.graph.set_codegen(CodeGen())
    network.recompile()
    return network


def _share_tied(network: GraphModule) -> None:
    """Let parameters that are one tensor in the file be one parameter."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], nn.Parameter] = {}
    for module in network.modules():
        for key, value in module._parameters.items():
            if value is not None and value.numel():
                place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
                module._parameters[key] = first.setdefault(place, value)


def _drop_constant_inputs(network: GraphModule) -> None:
    """Put the values of inputs that are no tensors where they are used; the inputs go away."""
    for node in list(network.graph.nodes):
        if node.op != "placeholder" or isinstance(node.meta.get("val"), Tensor):
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            continue
        for user in list(node.users):
            put = functools.partial(_put, node, value)
            user.args, user.kwargs = torch.fx.node.map_arg(user.args, put), torch.fx.node.map_arg(user.kwargs, put)
        network.graph.erase_node(node)


def _put(node: Node, value: Any, found: Node) -> Any:
    return value if found is node else found


def _inputs(network: GraphModule, where: object) -> tuple[InputSpec, ...]:
    words: dict[str, str] = {}
    found = []
    for node in network.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{where}: {node.target}",
                "inputs that are tensors",
                type(value).__name__,
                "export it with fixed numbers",
            )
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                shape.append(size)
                continue
            fresh = "batch" if axis == 0 and "batch" not in words.values() else f"dim{len(words)}"
            shape.append(words.setdefault(str(size), fresh))
        found.append(InputSpec(str(node.target), str(value.dtype).removeprefix("torch."), tuple(shape)))
    return tuple(found)
