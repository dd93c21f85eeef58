"""The layers of a traced program: which calls of its graph multiply by a stored weight, and modules in their place.

A program knows no modules. It calls `aten.linear(x, W, b)`, or what that was decomposed into (`addmm`, `mm` of a
transposed weight), or a convolution, or an embedding. A call whose weight is stored in the program is a layer; its
name is the path of the weight without `.weight`. `placing.put_modules` makes each of them an `nn` module there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

_PEELED = {"detach", "alias", "lift_fresh", "lift_fresh_copy"}


@dataclass(frozen=True)
class Call:
    """One use of a stored weight. `read` is the node that reads `source`; `answer` the one whose value it gives.

    `weight`: the path of the tensor; `transposed`: it is stored as (in, out). `settings` tell two uses apart.
    """

    kind: str
    read: Node
    answer: Node
    source: Node
    weight: str
    transposed: bool
    bias: Node | None
    settings: tuple[Any, ...]


def find_calls(network: GraphModule) -> list[Call]:
    """Return the calls of `network` whose weight is a stored floating-point tensor, in the order they run."""
    found = []
    for node in network.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace != "aten" or node.target._opname not in _READERS:
            continue
        call = _READERS[node.target._opname](network, node, _arguments(node))
        if call is not None:
            found.append(call)
    uses: dict[str, set[tuple[bool, tuple[Any, ...]]]] = {}
    for call in found:
        uses.setdefault(call.weight, set()).add((call.transposed, call.settings))
    # A weight stored as (in, out) is turned round for its module: nothing else may read it.
    return [
        c
        for c in found
        if not c.transposed or (len(uses[c.weight]) == 1 and not other_readers(network, c.weight, found))
    ]


def other_readers(network: GraphModule, weight: str, calls: Sequence[Call]) -> list[str]:
    """Return the names of the nodes that read a stored tensor without being one of `calls`."""
    mine = {c.read for c in calls if c.weight == weight}
    found = []
    waiting = [n for n in network.graph.nodes if n.op == "get_attr" and n.target == weight]
    while waiting:
        for user in waiting.pop().users:
            if user in mine:
                continue
            if _turned(user) is not None or _is_peeled(user):
                waiting.append(user)
            else:
                found.append(user.name)
    return sorted(set(found))


def stored(network: nn.Module, path: str) -> Tensor | None:
    """Return the parameter or persistent buffer at a dotted path, None for anything else."""
    parent, _, key = path.rpartition(".")
    try:
        holder = network.get_submodule(parent)
    except AttributeError:
        return None
    if key in holder._non_persistent_buffers_set:
        return None  # a constant of the graph, which a checkpoint keeps with the graph
    found = holder._parameters.get(key)
    return found if found is not None else holder._buffers.get(key)


def _arguments(node: Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    found.update(node.kwargs)
    return found


def _is_peeled(node: Any) -> bool:
    return _operator(node) in _PEELED


def _operator(node: Any) -> str:
    if isinstance(node, Node) and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname if node.target.namespace == "aten" else ""
    return ""


def _turned(node: Any) -> Node | None:
    """Return the matrix that `node` transposes, None if it does not."""
    name = _operator(node)
    if name not in ("t", "numpy_T", "permute", "transpose"):
        return None
    a = _arguments(node)
    source = a["self"]
    value = source.meta.get("val")
    if isinstance(value, Tensor) and value.dim() != 2:
        return None
    if name == "permute" and [d % 2 for d in a["dims"]] != [1, 0]:
        return None
    if name == "transpose" and {a["dim0"] % 2, a["dim1"] % 2} != {0, 1}:
        return None
    return source if isinstance(source, Node) else None


def _weight(network: GraphModule, node: Any, axes: Callable[[int], bool]) -> tuple[str, bool] | None:
    """Return the path of the stored tensor behind `node`, and whether it is transposed on the way."""
    turned = False
    while isinstance(node, Node) and node.op != "get_attr":
        below = _turned(node)
        if below is not None:
            node, turned = below, not turned
        elif _is_peeled(node):
            node = node.args[0]
        else:
            return None
    if not isinstance(node, Node):
        return None
    value = stored(network, str(node.target))
    if value is None or not value.is_floating_point() or not axes(value.dim()):
        return None
    return str(node.target), turned


def _linear(network: GraphModule, node: Node, a: Mapping[str, Any]) -> Call | None:
    found = _weight(network, a["weight"], lambda n: n == 2)
    return None if found is None else _matrix(node, node, a["input"], found[0], found[1], a["bias"])


def _addmm(network: GraphModule, node: Node, a: Mapping[str, Any]) -> Call | None:
    found = _weight(network, a["mat2"], lambda n: n == 2)
    if found is None or a["beta"] != 1 or a["alpha"] != 1:
        return None
    return _matrix(node, node, a["mat1"], found[0], not found[1], a["self"])


def _product(network: GraphModule, node: Node, a: Mapping[str, Any]) -> Call | None:
    """`mm` or `matmul`; where all that follows is the addition of a stored vector, that is its bias."""
    x, matrix = a["self"], a.get("mat2", a.get("other"))
    found = _weight(network, matrix, lambda n: n == 2)
    if found is None:
        return None
    path, transposed = found[0], not found[1]
    value = stored(network, path)
    assert value is not None
    after = next(iter(node.users)) if len(node.users) == 1 else None
    if after is not None and _operator(after) == "add" and _arguments(after).get("alpha", 1) == 1:
        term = next((v for v in after.args if isinstance(v, Node) and v is not node), None)
        vector = stored(network, str(term.target)) if term is not None and is_attribute(term) else None
        if vector is not None and tuple(vector.shape) == (value.shape[1 if transposed else 0],):
            return _matrix(node, after, x, path, transposed, term)
    return _matrix(node, node, x, path, transposed, None)


def _matrix(read: Node, answer: Node, source: Any, weight: str, transposed: bool, bias: Node | None) -> Call | None:
    if not isinstance(source, Node):
        return None
    return Call("linear", read, answer, source, weight, transposed, bias, ("linear", name_of(bias)))


def _embedding(network: GraphModule, node: Node, a: Mapping[str, Any]) -> Call | None:
    found = _weight(network, a["weight"], lambda n: n == 2)
    if found is None or found[1]:
        return None
    return Call("embedding", node, node, a["indices"], found[0], False, None, ("embedding", a["padding_idx"]))


def _conv(network: GraphModule, node: Node, a: Mapping[str, Any]) -> Call | None:
    found = _weight(network, a["weight"], lambda n: 3 <= n <= 5)
    if found is None or found[1] or a.get("transposed"):
        return None
    value = stored(network, found[0])
    assert value is not None
    axes = value.dim() - 2

    def each(key: str) -> Any:
        given = a[key]
        if isinstance(given, str):
            return given
        given = [given] if isinstance(given, int) else list(given)
        return tuple(given * axes if len(given) == 1 else given)

    stride, padding, dilation = each("stride"), each("padding"), each("dilation")
    numbers = (*stride, *dilation, *(() if isinstance(padding, str) else padding))
    if not all(isinstance(v, int) for v in numbers):
        return None  # a size that depends on the input
    settings = ("conv", stride, padding, dilation, a["groups"], name_of(a["bias"]))
    return Call("conv", node, node, a["input"], found[0], False, a["bias"], settings)


_READERS: dict[str, Callable[[GraphModule, Node, Mapping[str, Any]], Call | None]] = {
    "linear": _linear, "addmm": _addmm, "mm": _product, "matmul": _product, "embedding": _embedding,
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "convolution": _conv,
}  # fmt: skip


def is_attribute(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def name_of(node: Node | None) -> str:
    """Name a bias: a stored one by its path, a computed one by its node."""
    if node is None:
        return ""
    return str(node.target) if node.op == "get_attr" else f"%{node.name}"


def attributes(network: GraphModule) -> Iterator[Node]:
    return (n for n in network.graph.nodes if n.op == "get_attr")


__all__ = ["Call", "attributes", "find_calls", "is_attribute", "name_of", "other_readers", "stored"]
