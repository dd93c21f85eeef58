"""Modules in the place of layer calls: where each goes, what it takes along, and what is left to drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from .calls import Call, attributes, find_calls, is_attribute, name_of, stored

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def places(network: GraphModule, calls: Sequence[Call]) -> list[str]:
    """Return the path of each call's layer: of its weight, or where a second name of a tied weight stands unused.

    A further use of one weight with other settings is named after its node.
    """
    chosen: dict[tuple[str, tuple[Any, ...]], str] = {}
    taken: set[str] = set()
    for call in calls:
        key = (call.weight, call.settings)
        if key in chosen:
            continue
        names = (call.weight, *_aliases(network, call.weight))
        # A holder of its own before a place inside a holder that others need.
        free = sorted((_base(network, call, n) for n in names), key=lambda p: p in names)
        path = next((p for p in free if not _in_the_way(p, taken)), call.read.name)
        while path not in free and hasattr(network, path):
            path += "_"
        taken.add(path)
        chosen[key] = path
    return [chosen[c.weight, c.settings] for c in calls]


def put_modules(network: GraphModule) -> None:
    """Replace every layer call of `network` by a call of a module that holds the weight and the bias, in place.

    Calls with one weight and the same settings share a module. A second, different use of a weight (a tied output
    layer) gets a module of its own that holds the same parameter.
    """
    calls = find_calls(network)
    paths = places(network, calls)
    biases = [_own_bias(network, c) for c in calls]
    names = {c.weight: [c.weight, *_aliases(network, c.weight)] for c in calls}
    weights = {c.weight: _turned_weight(network, c) for c in calls}
    absorbed: dict[str, str] = {}
    made: set[str] = set()
    now: dict[Node, Node] = {}
    for call, path, bias in zip(calls, paths, biases, strict=True):
        if path not in made:
            made.add(path)
            for name in names[call.weight]:
                _drop(network, name)  # its place may be where the module goes
                absorbed.setdefault(name, f"{path}.weight")
            _put(network, path, _module(call, weights[call.weight], bias))
            if bias is not None and call.bias is not None:
                absorbed.setdefault(str(call.bias.target), f"{path}.bias")
        added = call.bias if bias is None and call.bias is not None else None
        now[call.answer] = _redirect(
            network, call, path, now.get(call.source, call.source), added and now.get(added, added)
        )
    _settle(network, absorbed)


def _base(network: GraphModule, call: Call, weight: str) -> str:
    """Return where a module for a weight may stand: at the holder, if that holds nothing that others need."""
    owner, dot, key = weight.rpartition(".")
    if not dot or key != "weight":
        return weight
    holder = network.get_submodule(owner)
    held = {k for k, v in (*holder._parameters.items(), *holder._buffers.items()) if v is not None}
    if held - {"weight", "bias"} or holder._modules:
        return weight
    mine = name_of(call.bias) == f"{owner}.bias" and _own_bias(network, call) is not None
    return weight if "bias" in held and not mine and f"{owner}.bias" in _read(network) else owner


def _read(network: GraphModule) -> set[str]:
    """Return the paths of stored tensors whose value some node takes."""
    return {str(n.target) for n in attributes(network) if n.users}


def _in_the_way(path: str, taken: set[str]) -> bool:
    return any(path == t or path.startswith(f"{t}.") or t.startswith(f"{path}.") for t in taken)


def _aliases(network: GraphModule, weight: str) -> list[str]:
    """Return the other paths of a stored tensor that no node reads: second names of a tied weight."""
    value = stored(network, weight)
    readers = _read(network)
    found = [n for n, p in network.named_parameters(remove_duplicate=False) if p is value and n != weight]
    return sorted(n for n in found if n not in readers)


def _own_bias(network: GraphModule, call: Call) -> nn.Parameter | None:
    """Return the bias if it is a stored vector that a module can hold; any other is added after the call."""
    if not is_attribute(call.bias):
        return None
    assert call.bias is not None
    found, weight = stored(network, str(call.bias.target)), stored(network, call.weight)
    assert weight is not None
    if found is None or tuple(found.shape) != (weight.shape[1 if call.transposed else 0],):
        return None
    return found if isinstance(found, nn.Parameter) else nn.Parameter(found, requires_grad=False)


def _turned_weight(network: GraphModule, call: Call) -> nn.Parameter:
    """Return the weight as its module holds it, (out, in, *k)."""
    value = stored(network, call.weight)
    assert value is not None
    if call.transposed:
        return nn.Parameter(value.detach().T.contiguous(), value.requires_grad)
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def _drop(network: GraphModule, path: str) -> None:
    """Remove a stored tensor, if it is still there."""
    owner, _, key = path.rpartition(".")
    holder = network.get_submodule(owner)
    if not _is_layer(holder):
        for own in (holder._parameters, holder._buffers):
            own.pop(key, None)


def _put(network: GraphModule, path: str, layer: nn.Module) -> None:
    layer.training = False
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent)._modules[name] = layer


def _module(call: Call, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    layer: Any
    if call.kind == "linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif call.kind == "embedding":
        padding = call.settings[1]
        layer = nn.Embedding(
            weight.shape[0], weight.shape[1], padding_idx=None if padding < 0 else padding, device="meta"
        )
    else:
        _, stride, around, dilation, groups, _ = call.settings
        kernel = tuple(weight.shape[2:])
        layer = _CONVS[len(kernel)](
            weight.shape[1] * groups, weight.shape[0], kernel, stride, around, dilation, groups, bias is not None, device="meta"
        )  # fmt: skip
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer  # type: ignore[no-any-return]


def _redirect(network: GraphModule, call: Call, path: str, source: Node, added: Node | None) -> Node:
    """Let the call's users read the module instead; `added`: a bias that no module can hold. Return the new answer."""
    with network.graph.inserting_before(call.answer):
        node = network.graph.call_module(path, (source,))
        node.meta = dict(call.answer.meta)
        if added is not None:
            term: Any = added
            if call.kind == "conv":
                axes = len(call.settings[1])
                term = network.graph.call_function(torch.ops.aten.reshape.default, (added, [-1, *[1] * axes]))
            node = network.graph.call_function(torch.ops.aten.add.Tensor, (node, term))
            node.meta = dict(call.answer.meta)
    call.answer.replace_all_uses_with(node)
    network.graph.erase_node(call.answer)
    return node


def _settle(network: GraphModule, absorbed: Mapping[str, str]) -> None:
    """Point what still reads a moved tensor at its new place, and drop what nothing but a module reads now."""
    for node in attributes(network):
        if str(node.target) in absorbed and stored(network, str(node.target)) is None:
            node.target = absorbed[str(node.target)]
    network.graph.eliminate_dead_code()
    for old, new in absorbed.items():
        if old != new and old not in _read(network):
            _drop(network, old)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d)
