"""`torch.export` programs (`.pt2`): loaded as data, and turned into modules that hooks and surgery understand.

An exported graph calls `aten.linear(x, W, b)`; here each such call becomes a call of an `nn.Linear` that holds W and b
under the names they had, so that a program is treated like any other module.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from .tensors import check_finite, check_floating, digest_tensors

GRAPH = "graph.pt2"
_CONVS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


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
    _as_layers(network)
    network.graph.eliminate_dead_code()
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


def _as_layers(network: GraphModule) -> None:
    """Replace calls of layer operators whose weight is a parameter `PATH.weight` by calls of a module at PATH.

    Calls with the same weight and settings share a module. A second, different use of a weight (a tied output layer)
    gets a module of its own, named after its node, that holds the same parameter.
    """
    made: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
    for node in list(network.graph.nodes):
        builder = _builder(node)
        if builder is None:
            continue
        arguments = _arguments(node)
        weight, bias = arguments["weight"], arguments.get("bias")
        path = _parameter_path(network, weight)
        if path is None or (bias is not None and not _is_bias_of(network, bias, path)):
            continue
        holder = network.get_submodule(path)
        parameter = holder._parameters["weight"]
        assert parameter is not None
        bias_parameter = None if bias is None else holder._parameters["bias"]
        built = builder(arguments, parameter, bias_parameter)
        if built is None:
            continue
        layer, settings, source = built
        at = path
        if path in made and made[path][1] != settings:
            at = node.name
        if at not in made:
            made[at] = (layer, settings)
            _install(network, at, layer, holder if at == path else None)
        with network.graph.inserting_before(node):
            call = network.graph.call_module(at, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        network.graph.erase_node(node)


_Built = tuple[nn.Module, tuple[Any, ...], Node]
_Builder = Callable[[dict[str, Any], nn.Parameter, nn.Parameter | None], _Built | None]


def _builder(node: Node) -> _Builder | None:
    if (
        node.op != "call_function"
        or not isinstance(node.target, torch._ops.OpOverload)
        or node.target.namespace != "aten"
    ):
        return None
    name = node.target._opname
    if name == "linear":
        return _linear
    if name == "embedding":
        return _embedding
    return _conv(name) if name in _CONVS else None


def _arguments(node: Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    found.update(node.kwargs)
    return found


def _linear(arguments: dict[str, Any], weight: nn.Parameter, bias: nn.Parameter | None) -> _Built | None:
    if weight.dim() != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer, ("linear", bias is not None), arguments["input"]


def _embedding(arguments: dict[str, Any], weight: nn.Parameter, bias: nn.Parameter | None) -> _Built | None:
    padding = arguments["padding_idx"]
    layer = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=None if padding < 0 else padding, device="meta")
    layer.weight = weight
    return layer, ("embedding", padding), arguments["indices"]


def _conv(name: str) -> _Builder:
    axes = int(name[4])

    def build(arguments: dict[str, Any], weight: nn.Parameter, bias: nn.Parameter | None) -> _Built | None:
        def each(key: str) -> Any:
            value = arguments[key]
            if isinstance(value, str):
                return value
            value = [value] if isinstance(value, int) else list(value)
            return tuple(value * axes if len(value) == 1 else value)

        stride, padding, dilation, groups = each("stride"), each("padding"), each("dilation"), arguments["groups"]
        if not all(
            isinstance(v, int) for part in (stride, dilation, () if isinstance(padding, str) else padding) for v in part
        ):
            return None  # a size that depends on the input
        kind: Any = _CONVS[name]
        layer: Any = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride,
            padding,
            dilation,
            groups,
            bias is not None,
            device="meta",
        )
        layer.weight = weight
        if bias is not None:
            layer.bias = bias
        return layer, (name, stride, padding, dilation, groups, bias is not None), arguments["input"]

    return build


def _parameter_path(network: GraphModule, node: Any) -> str | None:
    """Return PATH if `node` reads the parameter `PATH.weight`, else None."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    path, dot, key = str(node.target).rpartition(".")
    if not dot or key != "weight":
        return None
    return path if network.get_submodule(path)._parameters.get("weight") is not None else None


def _is_bias_of(network: GraphModule, node: Any, path: str) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "get_attr"
        and node.target == f"{path}.bias"
        and network.get_submodule(path)._parameters.get("bias") is not None
    )


def _install(network: GraphModule, path: str, layer: nn.Module, holder: nn.Module | None) -> None:
    """Put `layer` at `path` with whatever else the holder of its weight held."""
    if holder is not None:
        _take_over(layer._parameters, holder._parameters)
        _take_over(layer._buffers, holder._buffers)
        _take_over(layer._modules, holder._modules)
        layer._non_persistent_buffers_set |= holder._non_persistent_buffers_set
    layer.training = False
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent)._modules[name] = layer


def _take_over(own: dict[str, Any], old: Mapping[str, Any]) -> None:
    for key, value in old.items():
        if own.get(key) is None:
            own[key] = value
