"""One view, three back ends: modules, traced programs and ONNX graphs read the same statistics off one network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lrcompress.calibrate import collect, measure
from lrcompress.data import Data
from lrcompress.errors import DataError, ModelError
from lrcompress.factorize import form
from lrcompress.model import InputSpec, open_model
from lrcompress.model.views import ModuleView, ProgramView, Walk, patches, view_of
from lrcompress.model.views.onnx_graph import OnnxView

SPECS = (
    InputSpec("ids", "int64", ("batch", 6)),
    InputSpec("attention_mask", "int64", ("batch", 6)),
    InputSpec("image", "float32", ("batch", 3, 11, 9)),
)


class Every(nn.Module):
    """Every kind of layer that a view knows, one input that three of them read, and tokens that are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 10)
        self.q, self.k, self.v = (nn.Linear(10, 10, bias=i != 1) for i in range(3))
        self.out = nn.Linear(10, 6)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 7, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False)
        self.group = nn.Conv2d(8, 6, 3, groups=2, padding=1)
        self.mix = nn.Conv2d(7, 5, 1)
        self.line = nn.Conv1d(10, 4, 3, padding="same")
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(15 + 4, 3)

    def forward(self, ids, attention_mask, image):
        mask = attention_mask[..., None].to(torch.float32)
        x = self.embed(ids)
        a = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 4 - 9 * (1 - mask.transpose(1, 2)), -1)
        h = torch.tanh(self.twice(torch.relu(self.twice(self.out(a @ self.v(x) + x)))))
        h = (h * mask).sum(1) / mask.sum(1)
        line = self.line((x * mask).transpose(1, 2)).mean(2)
        y = torch.relu(self.conv(image))
        z = self.mix(torch.relu(self.wide(y))).mean((2, 3))
        return self.head(torch.cat([h, z, line, self.group(y).mean((2, 3))[:, :4]], 1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Every().eval()


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(2, 7, (30, 1))).astype(np.int64)
    image = (rng.standard_normal((30, 3, 11, 9)) + 2).astype(np.float32)
    return Data.of_arrays({"ids": rng.integers(1, 17, (30, 6)) * mask, "attention_mask": mask, "image": image})


@pytest.fixture(scope="module")
def expected(net, data):
    opened = open_model(net, inputs=SPECS)
    view = view_of(opened)
    assert isinstance(view, ModuleView)
    return measure(view, data, view.layers, batch_size=8, seed=3)


def example() -> tuple[torch.Tensor, ...]:
    return torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long), torch.randn(2, 3, 11, 9)


@pytest.fixture(scope="module")
def program(net) -> torch.export.ExportedProgram:
    n = torch.export.Dim("n")
    return torch.export.export(net, example(), dynamic_shapes=({0: n}, {0: n}, {0: n}))


def same(found, expected, *, gradients: bool) -> None:
    assert set(found) == set(expected)
    for name, e in expected.items():
        f = found[name]
        assert (f.count, f.groups) == (e.count, e.groups), name
        assert f.positions == pytest.approx(e.positions)
        for key in ("gram", "mean", "row_weights") + (("output_gram",) if gradients else ()):
            a, b = getattr(f, key), getattr(e, key)
            assert (a is None) == (b is None), (name, key)
            if a is not None:
                assert float((a - b).norm()) <= 1e-5 * float(b.norm()), (name, key)
        assert gradients or f.output_gram is None


def test_the_expected_moments_are_those_of_the_rows(net, data, expected):
    """Not only equal: right. The inputs of q and of the dilated convolution, taken by hand."""
    arrays = next(iter(data.batches(30))).inputs
    ids, mask, image = (torch.as_tensor(arrays[k]) for k in ("ids", "attention_mask", "image"))
    rows = net.embed(ids)[mask.bool()].double().detach()
    centred = rows - rows.mean(0)
    torch.testing.assert_close(expected["q"].gram, centred.T @ centred / len(rows), rtol=1e-5, atol=1e-7)
    assert expected["q"].gram is expected["k"].gram is expected["v"].gram, "one input, one matrix in memory"
    y = torch.relu(net.conv(image)).detach()
    unfolded = F.unfold(y, (3, 2), (2, 1), (2, 1), 1).transpose(1, 2).reshape(-1, 48).double()
    torch.testing.assert_close(expected["wide"].mean, unfolded.mean(0), rtol=1e-5, atol=1e-7)
    assert expected["twice"].count == 2 * expected["q"].count, "both uses of a shared module"
    channels = F.unfold(y, 3, 1, 1, 1).transpose(1, 2).reshape(-1, 8, 9).double()
    second = channels[:, 4:].reshape(-1, 36)
    assert expected["group"].gram.shape == (2, 36, 36)
    torch.testing.assert_close(expected["group"].mean[1], second.mean(0), rtol=1e-5, atol=1e-7)


def test_a_program_reads_what_its_modules_read(program, data, expected, tmp_path):
    torch.export.save(program, tmp_path / "m.pt2")
    opened = open_model(tmp_path / "m.pt2")
    view = view_of(opened)
    assert isinstance(view, ProgramView) and {n.name for n in view.layers} == set(expected)
    same(measure(view, data, view.layers, batch_size=8, seed=3), expected, gradients=True)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_graph_of_operators_reads_the_same(program, data, expected, decomposed):
    """Straight from torch.export, without a single module; decomposed into addmm, mm and convolution."""
    view = ProgramView.of(program.run_decompositions() if decomposed else program)
    assert not list(view.network.graph.find_nodes(op="call_module", target="q"))
    names = {n.op == "call_function" and n.target._opname for n in view._reads}
    assert names >= ({"mm", "addmm", "convolution", "embedding"} if decomposed else {"linear", "conv2d"})
    found = measure(view, data, view.layers, batch_size=8, seed=3)
    same(found, expected, gradients=True)
    assert found["q"].gram is found["v"].gram


def export_onnx(net, path, **options):
    n = torch.export.Dim("n")
    names = [s.name for s in SPECS]
    torch.onnx.export(
        net,
        example(),
        str(path),
        dynamo=True,
        input_names=names,
        dynamic_shapes=({0: n}, {0: n}, {0: n}),
        verbose=False,
        **options,
    )


@pytest.mark.parametrize(
    "options", [{"optimize": False}, {"optimize": True, "external_data": True}], ids=["plain", "optimized"]
)
def test_an_onnx_graph_reads_the_same(net, data, expected, tmp_path, options):
    export_onnx(net, tmp_path / "m.onnx", **options)
    view = OnnxView(tmp_path / "m.onnx")
    by_weight = {layer.name: _like(net, layer) for layer in view.layers}
    assert sorted(by_weight.values()) == sorted(expected), "every layer, found by its numbers whatever it is called"
    found = measure(view, data, view.layers, batch_size=8)
    same({by_weight[n]: s for n, s in found.items()}, expected, gradients=False)
    q, v = (next(n for n, m in by_weight.items() if m == name) for name in ("q", "v"))
    assert found[q].gram is found[v].gram
    assert {view.layer(q).has_bias, view.layer(next(n for n, m in by_weight.items() if m == "k")).has_bias} == {
        True,
        False,
    }
    with pytest.raises(ModelError, match="ONNX graph"):
        view.replace(q, form("svd").decompose(view.layer(q).weight, 2))


def _like(net, layer) -> str:
    """Name the layer of `net` that has this weight."""
    for name, module in net.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.shape == layer.weight.shape and torch.equal(weight.detach(), layer.weight):
            return name
    raise AssertionError(f"{layer.name}: a weight that no layer has")


def hand_made(nodes, constants, shape, out=None, dtype=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(out or nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def w(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("how", ["gemm", "gemm_t", "matmul", "matmul_t"])
def test_products_however_the_weight_is_stored(tmp_path, how):
    weight, x = w(5, 4), w(40, 4, seed=1)
    node = helper.make_node
    nodes = {
        "gemm": [node("Gemm", ["x", "fc.weight", "b"], ["y"])], "gemm_t": [node("Gemm", ["x", "fc.weight", "b"], ["y"], transB=1)],
        "matmul": [node("MatMul", ["x", "fc.weight"], ["p"]), node("Add", ["p", "b"], ["y"])],
        "matmul_t": [node("Transpose", ["fc.weight"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["p"]), node("Add", ["b", "p"], ["y"])],
    }[how]  # fmt: skip
    stored = weight if how.endswith("_t") else weight.T.copy()
    onnx.save(hand_made(nodes, {"fc.weight": stored, "b": w(5)}, ["n", 4]), tmp_path / "m.onnx")
    view = OnnxView(tmp_path / "m.onnx")
    (layer,) = view.layers
    assert (layer.name, layer.kind, layer.reason, layer.has_bias) == ("fc", "linear", None, True)
    np.testing.assert_array_equal(layer.weight.numpy(), weight)
    assert view.initializers("fc") == ["fc.weight", "b"] and len(view.consumers("fc.weight")) == 1
    found = measure(view, Data.of_arrays({"whatever": x}), view.layers)["fc"]
    np.testing.assert_allclose(found.gram, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("size", [(9, 8), (7, 10)])
def test_patches_are_what_the_runtime_convolves(tmp_path, auto, size):
    """Through the weight: patches times kernel is what ONNX Runtime computes, padded unevenly or by itself."""
    attributes = {"strides": [2, 3], "dilations": [2, 1], "kernel_shape": [2, 3]}
    attributes |= {"pads": [1, 0, 2, 1]} if auto == "NOTSET" else {"auto_pad": auto}
    if auto.startswith("SAME"):
        attributes["dilations"] = [1, 1]
    onnx.save(
        hand_made(
            [helper.make_node("Conv", ["x", "c.weight"], ["y"], **attributes)],
            {"c.weight": w(4, 3, 2, 3)},
            ["n", 3, *size],
        ),
        tmp_path / "m.onnx",
    )
    view = OnnxView(tmp_path / "m.onnx")
    x = w(2, 3, *size, seed=2)
    readings = []
    out = view.read({"x": torch.as_tensor(x)}, ["c"], readings.append)["y"]
    rows = patches(readings[0].value, view.walks["c"])
    np.testing.assert_allclose(
        (rows @ view.layers[0].weight.flatten(1).T).numpy(), out.movedim(1, -1).reshape(-1, 4), rtol=1e-4, atol=1e-5
    )


def test_walks_without_padding_and_of_one_axis():
    x = torch.randn(2, 3, 8)
    walk = Walk((3,), (2,), (1,), auto="upper")
    assert walk.around((8,)) == [(0, 1)] and Walk((3,), (2,), (1,), auto="lower").around((8,)) == [(1, 0)]
    assert patches(x, walk).shape == (8, 9)


def test_an_embedding_in_a_graph_counts_from_both_ends(tmp_path):
    ids = np.array([[0, 1, -1], [1, 1, 2]])
    node = helper.make_node("Gather", ["e.weight", "x"], ["y"])
    onnx.save(hand_made([node], {"e.weight": w(5, 2)}, ["n", 3], dtype=TensorProto.INT64), tmp_path / "m.onnx")
    view = OnnxView(tmp_path / "m.onnx")
    weights = measure(view, Data.of_arrays({"x": ids}), view.layers)["e"].row_weights.numpy()
    counts = np.array([1, 3, 1, 0, 1]) + 0.01 * 6 / 5
    np.testing.assert_allclose(weights, counts / counts.sum())


def test_weights_of_a_graph_that_must_stay_say_why(tmp_path):
    node = helper.make_node
    nodes = [
        node("Gather", ["e.weight", "x"], ["h"]), node("Transpose", ["e.weight"], ["et"]), node("MatMul", ["h", "et"], ["logits"]),
        node("Gemm", ["flat", "s.weight"], ["s"], alpha=0.5), node("Mul", ["h", "h"], ["flat3"]), node("Reshape", ["flat3", "shape"], ["flat"]),
        node("MatMul", ["flat", "r.weight"], ["r"]), node("ReduceSum", ["r.weight"], ["sum"], keepdims=0), node("MatMul", ["flat", "nan.weight"], ["n"]),
    ]  # fmt: skip
    order = [0, 1, 2, 4, 5, 3, 6, 7, 8]
    constants = {
        "e.weight": w(5, 4),
        "s.weight": w(4, 3),
        "r.weight": w(4, 3),
        "nan.weight": w(4, 2) * np.float32("nan"),
        "shape": np.array([-1, 4]),
    }
    onnx.save(
        hand_made([nodes[i] for i in order], constants, ["n", 3], out="logits", dtype=TensorProto.INT64),
        tmp_path / "m.onnx",
    )
    reasons = {n.name: n.reason for n in OnnxView(tmp_path / "m.onnx").layers}
    assert reasons.pop("e").startswith("tied: one tensor serves e, ")
    tied = next(r for n, r in reasons.items() if n not in ("s", "r", "nan"))
    assert tied.startswith("tied") and "scaled" in reasons["s"] and "sum" in reasons["r"] and "finite" in reasons["nan"]


def test_files_that_are_no_graph_or_lack_their_data(net, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x08\x0a nothing")
    with pytest.raises(ModelError, match="valid ONNX graph"):
        OnnxView(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="nowhere"):
        OnnxView(tmp_path / "nowhere.onnx")
    export_onnx(net, tmp_path / "m.onnx", external_data=True)
    view = OnnxView(tmp_path / "m.onnx")
    with pytest.raises(DataError, match="inputs named"):
        view.read({"ids": torch.ones(1, 6)}, [], print)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError, match="data"):
        OnnxView(tmp_path / "m.onnx")


def test_a_shared_module_does_not_spill_into_its_neighbours():
    """`one` reads x only; `twice` reads x and something else: x is common, the rest is not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.one = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.twice(100 * self.twice(x)) + self.one(input=x)

    torch.manual_seed(0)
    opened = open_model(Net(), inputs=(InputSpec("x", "float32", ("n", 3)),))
    x = w(50, 3)
    found = measure(view_of(opened), Data.of_arrays({"x": x}), view_of(opened).layers, batch_size=9)
    np.testing.assert_allclose(found["one"].gram, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-5, atol=1e-7)
    both = np.concatenate([x, 100 * opened.module.twice(torch.as_tensor(x)).detach().numpy()])
    np.testing.assert_allclose(found["twice"].gram, np.cov(both.T.astype(np.float64), bias=True), rtol=1e-4)
    assert found["twice"].count == 100 and found["one"].count == 50


def test_replacing_in_a_graph_of_operators(program):
    view = ProgramView.of(program)
    inputs = dict(zip([s.name for s in SPECS], example(), strict=True))
    inputs["ids"] = torch.arange(12).reshape(2, 6)
    before = view.read(inputs, [], print)["output"]
    for name, rank in (("out", 6), ("twice", 6), ("conv", 8)):
        view.replace(name, form("svd").decompose(view.layer(name).weight, rank))
        assert view.network.get_submodule(name).form == "svd" and name not in {n.name for n in view.layers}
    torch.testing.assert_close(view.read(inputs, [], print)["output"], before, rtol=1e-4, atol=1e-5)
    view.replace("head", form("svd").decompose(view.layer("head").weight, 1))
    assert float((view.read(inputs, [], print)["output"] - before).abs().max()) > 0.01, "the factors are what runs"


def test_names_of_another_model_are_refused(net, data, expected):
    view = view_of(open_model(net, inputs=SPECS))
    other = view_of(open_model(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ModelError, match="another model"):
        measure(view, data, other.layers)
    with pytest.raises(ValueError, match="expected shape"):
        form("svd").decompose(other.layers[0].weight, 1, expected["q"])
    same(collect(open_model(net, inputs=SPECS), net, data, view.layers, batch_size=8, seed=3), expected, gradients=True)
