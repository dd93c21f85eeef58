"""An ONNX file is factorized in its own graph: by theory, by ONNX Runtime's own answers, and without torch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from lrcompress.data import Data
from lrcompress.errors import BudgetError, DataError
from lrcompress.factorize import Statistics, form
from lrcompress.graphs import Feeds, Run, find_layers, open_graph
from lrcompress.graphs.fitting import fit, fit_plain, measure
from lrcompress.graphs.forms import FORMS, Metric, Option, decompose, flat, full_rank, n_params, options
from lrcompress.graphs.layers import weight_of
from lrcompress.graphs.moments import Drift, Moments
from lrcompress.graphs.planning import by_ratio, hull
from lrcompress.graphs.rewriting import Change, rewrite
from tests.support.onnx_files import branching, conv_net, correlated, mlp, model, node, run, save, w


def conv(*shape, **attributes):
    return [node("Conv", ["x", "c.weight", "c.bias"], ["y"], name="c", **attributes)], shape


CASES = {
    "matmul": ([node("MatMul", ["x", "fc.weight"], ["y"], name="n")], {"fc.weight": w(8, 12)}, (5, 8)),
    "batched": ([node("MatMul", ["x", "fc.weight"], ["y"], name="n")], {"fc.weight": w(8, 12)}, (2, 5, 8)),
    "added": ([node("MatMul", ["x", "fc.weight"], ["p"]), node("Add", ["b", "p"], ["y"])], {"fc.weight": w(8, 12), "b": w(12)}, (5, 8)),
    "turned": (
        [node("Transpose", ["fc.weight"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])], {"fc.weight": w(12, 8)}, (5, 8)
    ),
    "gemm": ([node("Gemm", ["x", "fc.weight", "b"], ["y"])], {"fc.weight": w(8, 12), "b": w(12)}, (5, 8)),
    "gemm_t": ([node("Gemm", ["x", "fc.weight", "b"], ["y"], transB=1)], {"fc.weight": w(12, 8), "b": w(12)}, (5, 8)),
    "gemm_bare": ([node("Gemm", ["x", "fc.weight"], ["y"], transB=1)], {"fc.weight": w(12, 8)}, (5, 8)),
    "gemm_row": ([node("Gemm", ["x", "fc.weight", "b"], ["y"], transB=1)], {"fc.weight": w(12, 8), "b": w(1, 12)}, (5, 8)),
    "conv": ([node("Conv", ["x", "c.weight", "b"], ["y"], pads=[1, 0, 2, 1], strides=[2, 1])], {"c.weight": w(12, 4, 3, 3), "b": w(12)}, (2, 4, 9, 8)),
    "same": ([node("Conv", ["x", "c.weight"], ["y"], auto_pad="SAME_LOWER", strides=[2, 2])], {"c.weight": w(12, 4, 3, 3)}, (2, 4, 9, 8)),
    "dilated": ([node("Conv", ["x", "c.weight"], ["y"], dilations=[2, 1], kernel_shape=[2, 3])], {"c.weight": w(12, 4, 2, 3)}, (2, 4, 9, 8)),
    "one_axis": ([node("Conv", ["x", "c.weight"], ["y"], pads=[1, 1])], {"c.weight": w(12, 4, 3)}, (2, 4, 9)),
    "three_axes": ([node("Conv", ["x", "c.weight"], ["y"])], {"c.weight": w(12, 4, 2, 2, 2)}, (1, 4, 5, 5, 5)),
    "pointwise": ([node("Conv", ["x", "c.weight"], ["y"])], {"c.weight": w(12, 4, 1, 1)}, (2, 4, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_at_full_rank_the_numbers_are_equal_and_the_rest_is_as_it_was(case, form_name, fp16, tmp_path):
    nodes, constants, shape = CASES[case]
    dtype, kind = (np.float16, TensorProto.FLOAT16) if fp16 else (np.float32, TensorProto.FLOAT)
    made = model(
        [*nodes[:-1], nodes[-1], node("Relu", ["x"], ["other"])], {k: v.astype(dtype) for k, v in constants.items()}, shape,
        dtype=kind, out_dtype=kind,
    )  # fmt: skip
    made.graph.output.append(onnx.helper.make_tensor_value_info("other", kind, None))
    made.metadata_props.add(key="k", value="v")
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    (layer,) = find_layers(graph)
    if form_name == "tucker" and (layer.kind != "conv" or case == "pointwise"):
        pytest.skip("serves kernels only")
    weight = weight_of(graph, layer)
    rank = full_rank(form_name, layer.shape)
    factors = decompose(form_name, weight, rank, Metric())
    np.testing.assert_allclose(factors.dense(), weight, atol=1e-6 if not fp16 else 1e-3)
    found = rewrite(graph, [layer], {layer.name: Change(factors)})
    x = w(*shape, seed=9).astype(dtype)
    np.testing.assert_allclose(
        run(found.model, x=x), run(made, x=x), atol=1e-2 if fp16 else 2e-6, rtol=1e-2 if fp16 else 1e-5
    )
    a, b = made, found.model
    assert [o.SerializeToString() for o in b.graph.output] == [o.SerializeToString() for o in a.graph.output]
    assert (b.ir_version, b.opset_import, b.metadata_props, b.graph.input) == (
        a.ir_version,
        a.opset_import,
        a.metadata_props,
        a.graph.input,
    )
    stored = {t.name for t in b.graph.initializer}
    assert layer.weight not in stored and set(found.factors[layer.name].values()) <= stored, (
        "factors, and no dense weight"
    )
    assert {t.name for t in a.graph.initializer} - stored == {layer.weight}
    assert len(b.graph.node) == len(a.graph.node) + (2 if form_name == "tucker" else 1) - (case == "turned")
    assert next(n for n in b.graph.node if n.output[0] == nodes[-1].output[0]).name == nodes[-1].name


def test_embeddings_in_both_directions_of_counting(tmp_path):
    made = model([node("Gather", ["e.weight", "x"], ["y"])], {"e.weight": w(20, 6)}, ("n", 3), dtype=TensorProto.INT64)
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    (layer,) = find_layers(graph)
    ids = np.array([[0, 19, -1], [-20, 3, 5]])
    seen = measure(graph, [layer], [{"x": ids}])["e"]
    assert seen.counts[[0, 3, 5, 19]].tolist() == [2, 1, 1, 2] and seen.count == 6
    full = rewrite(graph, [layer], {"e": Change(decompose("svd", weight_of(graph, layer), 6, Metric()))}).model
    np.testing.assert_allclose(run(full, x=ids), run(made, x=ids), atol=1e-6)
    factors = fit_plain(graph, layer, Option("svd", 2, 0, 0.0), seen).change.factors
    error = ((weight_of(graph, layer) - factors.dense()) ** 2).sum(1)
    plain = ((weight_of(graph, layer) - decompose("svd", weight_of(graph, layer), 2, Metric()).dense()) ** 2).sum(1)
    assert error[[0, 19]].sum() < plain[[0, 19]].sum(), "rows that are read often are kept better"


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 6, 3, 3), (6, 16, 3)])
@pytest.mark.parametrize("name", FORMS)
def test_forms_are_those_of_torch(name, shape):
    if name == "tucker" and len(shape) < 3:
        pytest.skip("serves kernels only")
    weight = w(*shape)
    columns = int(np.prod(shape[1:]))
    s = np.cov(correlated(500, columns).T.astype(np.float64))
    rank = 3 if name == "svd" else (4, 3)
    mine = decompose(name, weight, rank, Metric(s))
    theirs = form(name).decompose(torch.as_tensor(weight), rank, Statistics(gram=torch.as_tensor(s)))
    loss = Metric(s).loss(flat(weight - mine.dense()))
    assert mine.params == n_params(name, shape, rank) == theirs.n_params
    if name == "svd":
        np.testing.assert_allclose(mine.dense(), theirs.to_tensor().numpy(), atol=1e-5)
    else:  # of two input bases torch takes the better one
        assert theirs.loss <= loss * (1 + 1e-6) <= 1.2 * theirs.loss
    curve = {
        o.rank: o.loss for o in options(name, "conv" if len(shape) > 2 else "linear", weight, Metric(s), every=True)
    }
    if rank in curve:
        np.testing.assert_allclose(curve[rank], loss, rtol=1e-6)


def test_the_loss_is_what_theory_says():
    """K = W S Wᵀ: the loss at rank r is the tail of its eigenvalues, for more rows than columns and for fewer."""
    for shape in ((10, 24), (24, 10)):
        weight, s = w(*shape).astype(np.float64), np.cov(correlated(300, shape[1]).T.astype(np.float64))
        tail = np.linalg.eigvalsh(weight @ s @ weight.T)[::-1]
        for rank in (1, 4, 9):
            found = Metric(s).loss(weight - decompose("svd", weight, rank, Metric(s)).dense())
            np.testing.assert_allclose(found, tail[rank:].clip(0).sum(), rtol=1e-8, atol=1e-12)


def test_moments_merge_without_cancellation():
    rows = correlated(400, 7) + 1000
    one, parts = Moments(), Moments()
    one.add(rows)
    for chunk in np.array_split(rows, 9):
        parts.add(chunk)
    wanted = np.cov(rows.T.astype(np.float64), bias=True)
    for m in (one, parts):
        np.testing.assert_allclose(m.covariance, wanted, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(m.mean, rows.mean(0, dtype=np.float64), rtol=1e-7)
    assert parts.count == 400


@pytest.mark.parametrize("make", [mlp, conv_net])
def test_layers_read_what_torch_says_they_read(make, tmp_path):
    """The Gram of every layer against the one of the other reader of graphs, which feeds torch."""
    from lrcompress.calibrate import measure as torch_measure
    from lrcompress.model.views.onnx_graph import OnnxView

    path = save(make(), tmp_path / "m.onnx")
    x = correlated(60, 32) if make is mlp else w(20, 3, 12, 12, scale=1.0)
    graph = open_graph(path)
    seen = measure(graph, find_layers(graph), [{"x": part} for part in np.array_split(x, 3)])
    theirs = torch_measure(OnnxView(path), Data.of_arrays({"x": x}), OnnxView(path).layers)
    assert set(seen) == set(theirs)
    for name, found in seen.items():
        np.testing.assert_allclose(found.moments.shrunk, theirs[name].gram, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.moments.mean, theirs[name].mean, rtol=1e-4, atol=1e-6)
        assert found.count == theirs[name].count


def test_padding_of_token_sequences_is_left_out(tmp_path):
    made = model([node("MatMul", ["x", "fc.weight"], ["y"])], {"fc.weight": w(8, 8)}, ("n", "s", 8))
    made.graph.input.append(onnx.helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["n", "s"]))
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    x, mask = w(2, 3, 8), np.array([[1, 1, 0], [1, 0, 0]])
    seen = measure(graph, find_layers(graph), [{"x": x, "attention_mask": mask}])["fc"]
    assert seen.count == 3
    np.testing.assert_allclose(seen.moments.mean, x[mask.astype(bool)].mean(0), rtol=1e-5)


def layer_means(made, factored, x):
    return (run(made, x=x) - run(factored, x=x)).mean(0)


def test_the_bias_makes_the_mean_residual_zero(tmp_path):
    made = model([node("Gemm", ["x", "fc.weight", "b"], ["y"])], {"fc.weight": w(32, 24), "b": w(24)}, ("n", 32))
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    layers, x = find_layers(graph), correlated(200, 32, rank=12)
    seen = measure(graph, layers, [{"x": x}])
    fitted = fit_plain(graph, layers[0], Option("svd", 2, 0, 0.0), seen["fc"])
    found = rewrite(graph, layers, {"fc": fitted.change}).model
    np.testing.assert_allclose(layer_means(made, found, x), 0, atol=1e-5)
    assert "b" not in {t.name for t in found.graph.initializer}
    residual = run(made, x=x) - run(found, x=x)
    spread = run(made, x=x) - run(made, x=x).mean(0)
    np.testing.assert_allclose(np.linalg.norm(residual) / np.linalg.norm(spread), fitted.rel_error, rtol=1e-3)


def test_a_bias_is_added_where_it_pays_only(tmp_path):
    made = model([node("MatMul", ["x", "fc.weight"], ["y"])], {"fc.weight": w(32, 24)}, ("n", 32))
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    layers = find_layers(graph)
    for shift, pays in ((3.0, True), (0.0, False)):
        x = np.random.default_rng(0).standard_normal((300, 32)).astype(np.float32) * 0.3
        x = x - x.mean(0) + np.float32(shift) * w(32, scale=1.0)
        seen = measure(graph, layers, [{"x": x}])
        fitted = fit_plain(graph, layers[0], Option("svd", 1, 0, 0.0), seen["fc"])
        assert (fitted.change.bias is not None) == pays
        found = rewrite(graph, layers, {"fc": fitted.change}).model
        assert {n.op_type for n in found.graph.node} == ({"MatMul", "Add"} if pays else {"MatMul"})
        if pays:
            np.testing.assert_allclose(layer_means(made, found, x), 0, atol=1e-4)


def test_depth_makes_up_for_what_came_before(tmp_path):
    graph = open_graph(save(mlp(), tmp_path / "m.onnx"))
    layers, x, fresh = find_layers(graph), correlated(600, 32, rank=20), correlated(300, 32, rank=20, seed=77)
    batches = [{"x": part} for part in np.array_split(x, 12)]
    seen = measure(graph, layers, batches)
    chosen = {n.name: Option("svd", 5 if n.name != "fc2" else 4, 0, 0.0) for n in layers}

    def error(anchor, on):
        changes = fit(graph, layers, chosen, seen, batches, anchor=anchor)
        made = rewrite(graph, layers, {n: f.change for n, f in changes.items()}).model
        return float(np.linalg.norm(run(made, x=on) - run(graph.model, x=on)))

    assert error(True, fresh) < 0.97 * error(False, fresh), "on data that nothing was fitted to"


def test_without_drift_depth_changes_nothing(tmp_path):
    graph = open_graph(save(mlp(), tmp_path / "m.onnx"))
    layers, x = find_layers(graph), correlated(300, 32)
    batches = [{"x": part} for part in np.array_split(x, 6)]
    seen = measure(graph, layers, batches)
    only = {"fc0": Option("svd", 6, 0, 0.0)}
    for anchor in (True, False):
        found = fit(graph, layers, only, seen, batches, anchor=anchor)
        np.testing.assert_array_equal(
            found["fc0"].change.factors.dense(),
            fit_plain(graph, layers[0], only["fc0"], seen["fc0"]).change.factors.dense(),
        )
    # Biases of dense layers behind it carry the drift of the mean.
    assert set(fit(graph, layers, only, seen, batches)) == {"fc0", "fc1"}


def test_the_drift_is_split_from_joint_moments():
    x, y = correlated(200, 5), correlated(200, 5, seed=8)
    joint = Moments()
    joint.add(np.concatenate([x, y], 1))
    d = Drift.of(joint)
    wanted = np.cov(np.concatenate([x, y], 1).T.astype(np.float64), bias=True)
    np.testing.assert_allclose(d.cross, wanted[:5, 5:], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(d.drifted_mean, y.mean(0), rtol=1e-5)


def test_a_ratio_is_kept_and_one_that_cannot_be_is_told(tmp_path):
    graph = open_graph(save(mlp(), tmp_path / "m.onnx"))
    layers, x = find_layers(graph), correlated(200, 32)
    batches = [{"x": x}]
    seen = measure(graph, layers, batches)
    for ratio in (0.9, 0.5, 0.2):
        for some in ((), batches):
            chosen = by_ratio(graph, layers, ratio, "auto", seen, some)
            after = graph.n_params - sum(
                layer.params - c.params for layer in layers if isinstance(c := chosen[layer.name], Option)
            )
            assert after <= ratio * graph.n_params
    for multiple in (4,):
        chosen = by_ratio(graph, layers, 0.5, "svd", seen, multiple=multiple)
        assert all(c.rank % multiple == 0 or c.rank < multiple for c in chosen.values() if isinstance(c, Option))
    with pytest.raises(BudgetError, match=r"a ratio of at least 0\.0"):
        by_ratio(graph, layers, 0.01, "auto", seen)


def test_the_hull_is_convex():
    points = [
        Option("svd", r, p, l)
        for r, (p, l) in enumerate([(10, 9.0), (20, 8.9), (30, 3.0), (35, 3.5), (60, 1.0), (100, 0.0)])
    ]
    assert [o.params for o in hull(points)] == [10, 30, 60, 100]


def test_values_inside_branches_are_seen(tmp_path):
    graph = open_graph(save(branching(), tmp_path / "m.onnx"))
    layers = {n.name: n for n in find_layers(graph)}
    x = np.abs(w(10, 8, scale=1.0))
    seen = measure(graph, list(layers.values()), [{"x": x}, {"x": x}])
    assert (seen["up"].count, seen["down"].count, seen["last"].count) == (20, 0, 20)
    np.testing.assert_allclose(seen["up"].moments.mean, x.mean(0), rtol=1e-5)
    both = measure(graph, list(layers.values()), [{"x": x}, {"x": -x}])
    assert both["down"].count == 10 and float(np.abs(both["down"].moments.mean).max()) == 0
    changes = {n: Change(decompose("svd", weight_of(graph, layers[n]), 8, Metric())) for n in ("up", "down")}
    made = rewrite(graph, list(layers.values()), changes).model
    for sign in (1, -1):
        np.testing.assert_allclose(run(made, x=sign * x), run(graph.model, x=sign * x), atol=1e-5)


def test_one_weight_in_two_places_is_one_layer(tmp_path):
    nodes = [
        node("MatMul", ["x", "s.weight"], ["a"]),
        node("Tanh", ["a"], ["b"]),
        node("MatMul", ["b", "s.weight"], ["y"]),
    ]
    graph = open_graph(save(model(nodes, {"s.weight": w(8, 8)}), tmp_path / "m.onnx"))
    (layer,) = find_layers(graph)
    x = w(30, 8, scale=1.0)
    seen = measure(graph, [layer], [{"x": x}])["s"]
    both = np.concatenate([x, np.tanh(x @ graph.array("s.weight"))])
    np.testing.assert_allclose(
        seen.moments.covariance, np.cov(both.T.astype(np.float64), bias=True), rtol=1e-3, atol=1e-6
    )
    made = rewrite(graph, [layer], {"s": Change(decompose("svd", weight_of(graph, layer), 8, Metric()))}).model
    assert len(made.graph.initializer) == 2
    np.testing.assert_allclose(run(made, x=x), run(graph.model, x=x), atol=1e-5)


def test_old_files_that_list_weights_as_inputs_come_out_as_newer_ones(tmp_path):
    made = model([node("MatMul", ["x", "fc.weight"], ["y"])], {"fc.weight": w(8, 8)}, ir=3, opset=9)
    made.graph.input.append(onnx.helper.make_tensor_value_info("fc.weight", TensorProto.FLOAT, [8, 8]))
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    found = rewrite(graph, find_layers(graph), {"fc": Change(decompose("svd", w(8, 8).T, 8, Metric()))}).model
    assert [i.name for i in found.graph.input] == ["x"] and found.ir_version == 4 and found.opset_import[0].version == 9
    np.testing.assert_allclose(run(found, x=w(3, 8)), run(made, x=w(3, 8)), atol=1e-5)


def test_what_nothing_ever_read_stays(tmp_path):
    made = model([node("MatMul", ["x", "fc.weight"], ["y"])], {"fc.weight": w(8, 8), "spare": w(3)})
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    layers = find_layers(graph)
    found = rewrite(graph, layers, {"fc": Change(decompose("svd", weight_of(graph, layers[0]), 8, Metric()))}).model
    assert {t.name for t in found.graph.initializer} == {"spare", "fc.U", "fc.V"}


def test_the_batch_axis_is_found_wherever_it_stands(tmp_path):
    nodes = [
        node("Gather", ["state", "zero"], ["s"]),
        node("Add", ["x", "s"], ["a"]),
        node("MatMul", ["a", "fc.weight"], ["m"]),
        node("Mul", ["m", "gain"], ["y"]),
    ]
    made = model(nodes, {"zero": np.array(0), "fc.weight": w(8, 8)}, ("batch", 8))
    made.graph.input.append(onnx.helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, "batch", 8]))
    made.graph.input.append(onnx.helper.make_tensor_value_info("gain", TensorProto.FLOAT, []))
    made.graph.input.append(onnx.helper.make_tensor_value_info("last", TensorProto.FLOAT, [2, 3, "batch"]))
    graph = open_graph(save(made, tmp_path / "m.onnx"))
    feeds = Feeds(graph)
    assert [p.shape for p in feeds.ports] == [("batch", 8), ("batch", 2, 8), ("batch",), ("batch", 2, 3)]
    given = {"x": w(5, 8), "state": w(5, 2, 8), "gain": np.full(5, 2, np.float32), "last": w(5, 2, 3)}
    placed = feeds(given)
    assert placed["state"].shape == (2, 5, 8) and placed["gain"].shape == ()
    np.testing.assert_array_equal(placed["last"], given["last"].transpose(1, 2, 0))
    got = Run(graph)(placed)[0]["y"]
    np.testing.assert_allclose(got, 2 * (given["x"] + given["state"][:, 0]) @ w(8, 8), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="one value for all samples"):
        feeds({**given, "gain": np.arange(5, dtype=np.float32)})
    with pytest.raises(DataError, match="name an array after the input state"):
        feeds({"x": given["x"], "gain": given["gain"]})
