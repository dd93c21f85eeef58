"""Every form of the directory listing in ONNX: factors apart and named, as few bytes as its count says, few nodes.

All forms of one kind of layer are the branches of one network, so that each kind is traced and exported once.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import lrcompress
from lrcompress.factorize import form, forms
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import replace_layer
from lrcompress.runtime import Session

LINEAR, CONV, GROUPED, EMBEDDING = "linear", "conv", "grouped", "embedding"
SPECS = {
    LINEAR: InputSpec("x", "float32", ("batch", "sequence", 48)),
    CONV: InputSpec("x", "float32", ("batch", 16, "height", "width")),
    GROUPED: InputSpec("x", "float32", ("batch", 16, "height", "width")),
    EMBEDDING: InputSpec("x", "int64", ("batch", "sequence")),
}
#: How a pivoted basis is made whole, before the first request.
WHOLE = {"Equal": 1, "Cast": 1, "Concat": 1, "Gather": 1}
#: What a form runs, all of it, bias included.
NODES: dict[tuple[str, str], dict[str, int]] = {
    (LINEAR, "als"): {"Add": 1, "MatMul": 2},
    (LINEAR, "nmf"): {"Add": 1, "MatMul": 2},
    (LINEAR, "pivoted"): {"Add": 1, "MatMul": 2, **WHOLE, "Transpose": 1},
    (LINEAR, "shared"): {"Add": 1, "MatMul": 2},
    (LINEAR, "svd"): {"Add": 1, "MatMul": 2},
    (CONV, "als"): {"Conv": 2},
    (CONV, "cp"): {"Conv": 4},
    (CONV, "nmf"): {"Conv": 2},
    (CONV, "pivoted"): {"Conv": 2, **WHOLE, "Reshape": 1},
    (CONV, "pivoted_spatial"): {"Conv": 2, **WHOLE, "Reshape": 1, "Split": 1, "Concat": 2},
    # Two bases, and one order turned round.
    (CONV, "pivoted_tucker"): {
        "Conv": 3,
        "Equal": 1,
        "Cast": 2,
        "Concat": 2,
        "Gather": 2,
        "Reshape": 3,
        "TopK": 1,
        "Transpose": 1,
    },
    (CONV, "spatial_svd"): {"Conv": 2},
    (CONV, "svd"): {"Conv": 2},
    (CONV, "tucker"): {"Conv": 3},
    (GROUPED, "grouped_svd"): {"Conv": 2},
    (EMBEDDING, "als"): {"Gather": 1, "MatMul": 1},
    (EMBEDDING, "nmf"): {"Gather": 1, "MatMul": 1},
    (EMBEDDING, "svd"): {"Gather": 1, "MatMul": 1},
}
#: Forms whose products are of reshaped operands: at most so many nodes.
AT_MOST: dict[tuple[str, str], int] = {
    (LINEAR, "hadamard"): 7,
    (LINEAR, "khatri_rao"): 5,
    (LINEAR, "kronecker"): 18,
    (LINEAR, "tensor_train"): 14,
    (CONV, "hadamard"): 6,
    (CONV, "khatri_rao"): 4,
    (CONV, "kronecker"): 28,
    (EMBEDDING, "hadamard"): 5,
    (EMBEDDING, "khatri_rao"): 17,
    (EMBEDDING, "kronecker"): 24,
    (EMBEDDING, "tensor_train"): 33,
}


def serving(kind: str) -> list[str]:
    return [n for n in forms() if kind in form(n).LAYERS]


class Branches(nn.Module):
    """One layer per form, all on the same input; the answer of each has its name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {
            LINEAR: lambda: nn.Linear(48, 64),
            CONV: lambda: nn.Conv2d(16, 32, 3, padding=1, stride=2),
            GROUPED: lambda: nn.Conv2d(16, 32, 3, padding=1, groups=4),
            EMBEDDING: lambda: nn.Embedding(120, 48),
        }[kind]
        self.forms = nn.ModuleDict({n: made() for n in serving(kind)})

    def forward(self, x):
        return {name: layer(x) for name, layer in self.forms.items()}


def low(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight that every form can come near to."""
    u, d, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    return ((u * d * 0.9 ** torch.arange(len(d))) @ v).reshape(weight.shape)


@pytest.fixture(scope="module", params=list(SPECS))
def exported(request, tmp_path_factory):
    kind = request.param
    network = Branches(kind).eval()
    for name in serving(kind):
        layer = network.forms[name]
        weight = low(layer.weight)
        if kind == GROUPED:
            weight = weight.reshape(4, 8, *weight.shape[1:])
        f = form(name)
        rank = f.clip(tuple(weight.shape), 3 if name in ("kronecker", "khatri_rao") else 6)
        replace_layer(network, f"forms.{name}", f.decompose(weight, rank))
    folder = tmp_path_factory.mktemp(kind) / "exported"
    opened = open_model(network, inputs=(SPECS[kind],))
    report = lrcompress.export(opened, slots=("none",), output=folder).data
    return kind, network, folder, report


def branch(model: onnx.ModelProto, output: str) -> list[onnx.NodeProto]:
    """Return the nodes that `output` needs."""
    made = {o: n for n in model.graph.node for o in n.output}
    todo, found = [output], {}
    while todo:
        node = made.get(todo.pop())
        if node is not None and id(node) not in found:
            found[id(node)] = node
            todo += list(node.input)
    return list(found.values())


def sizes(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    if kind == EMBEDDING:
        return rng.integers(0, 120, (n, n + 2))
    shape = (n, n + 2, 48) if kind == LINEAR else (n, 16, 7 + n, 8 + 2 * n)
    return rng.standard_normal(shape).astype(np.float32)


def test_the_runtime_answers_what_torch_answers_at_any_batch_and_length(exported):
    kind, network, folder, _ = exported
    session = Session(folder)
    for n in (1, 2, 5):
        x = sizes(kind, n)
        with torch.no_grad():
            expected = network(torch.from_numpy(x))
        got = session.run({"x": x})
        for name in serving(kind):
            scale = max(1.0, float(expected[name].abs().max()))
            assert np.abs(got[name] - expected[name].numpy()).max() <= 2e-5 * scale, name


def test_the_factors_are_constants_of_their_own_and_nothing_else_is_stored(exported):
    kind, network, folder, report = exported
    model = onnx.load(str(folder / "model.onnx"))
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert not {i.name for i in model.graph.input} & set(arrays)
    for name in serving(kind):
        layer = network.forms[name]
        own = {k: v for k, v in arrays.items() if k.startswith(f"forms.{name}.")}
        factors = {f"forms.{name}.{f}": v for f, v in layer.factors.items() if v.numel()}
        assert set(own) == set(factors) | ({f"forms.{name}.bias"} if layer.bias is not None else set()), name
        stored = sum(v.size for k, v in own.items() if v.dtype == np.float32 and not k.endswith(".bias"))
        assert stored == form(name).n_params(_shape(layer, kind), layer.rank), name
        for key, value in factors.items():
            # A factor may be stored as it is read; its numbers are the module's, each of them once.
            assert np.array_equal(np.sort(own[key].reshape(-1)), np.sort(value.detach().numpy().reshape(-1))), key
    shared = [v for k, v in arrays.items() if not k.startswith("forms.")]
    assert all(v.size <= 8 for v in shared), "shapes and axes only: no identity, no second copy"
    floating = sum(v.nbytes for k, v in arrays.items() if k.startswith("forms."))
    assert report["bytes"]["base"] <= floating * 1.02 + 64 * len(arrays)


def _shape(layer, kind):
    shape = layer.shape
    return (4, shape[0] // 4, *shape[1:]) if kind == GROUPED else shape


def test_as_many_products_as_factors_and_few_nodes_around_them(exported):
    kind, _, folder, _ = exported
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    assert {n for k, n in (*NODES, *AT_MOST) if k == kind} == set(serving(kind)), "every form has its row"
    for name in serving(kind):
        found = Counter(n.op_type for n in branch(model, name))
        if (kind, name) in NODES:
            assert found == NODES[kind, name], name
        else:
            assert sum(found.values()) <= AT_MOST[kind, name], (name, found)


def test_what_is_rebuilt_when_it_is_loaded_says_so(exported):
    kind, _, folder, _ = exported
    manifest = Manifest.load(folder)
    rebuilt = [f"forms.{n}" for n in serving(kind) if getattr(form(n), "DENSE_AT_RUN_TIME", False)]
    # Rows of an embedding are rebuilt as they are looked up: nothing dense is ever held.
    assert manifest.raw["dense_at_run_time"] == ([] if kind == EMBEDDING else sorted(rebuilt))


def test_pivoted_forms_store_fewer_numbers_than_their_plain_gauge(exported):
    kind, network, folder, _ = exported
    model = onnx.load(str(folder / "model.onnx"))
    stored = {t.name: math.prod(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    for name in serving(kind):
        plain = getattr(form(name), "PLAIN", None)
        if plain is None or name not in ("pivoted", "pivoted_spatial", "pivoted_tucker"):
            continue
        layer = network.forms[name]
        mine = sum(n for k, n in stored.items() if k.startswith(f"forms.{name}.") and not k.endswith("bias"))
        assert mine < form(plain).n_params(_shape(layer, kind), layer.rank)
