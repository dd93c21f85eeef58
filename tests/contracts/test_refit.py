"""Refits against theory: error feedback, least squares, gauges; and codes that are, bit for bit, what the runtime reads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lrcompress.export.products import products
from lrcompress.export.refit import GAUGES, refit
from lrcompress.export.refit.gauges import orthonormal, rotation
from lrcompress.export.refit.gptq import quantize
from lrcompress.export.refit.grids import ROW8, Grid, blocks, limits, signed
from lrcompress.export.refit.joint import Joint, lost, refitted
from lrcompress.export.refit.moments import Seen, Walk, observe
from tests.support.graphs import Graph

GRIDS = {
    "int8 rows": ROW8, "int4 blocks": blocks(4, 32), "int4 with zeros": blocks(4, 16, symmetric=False),
    "int4 constants": signed(4, 96), "int4 rows": signed(4, 97), "int2 blocks": blocks(2, 16),
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(n, seed=1):
    x = normal(4 * n, n, seed=seed) @ normal(n, n, seed=seed + 1)
    return x.T @ x / len(x)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_and_scales_are_what_can_be_stored(grid):
    coded = quantize(normal(10, 97) * 10.0 ** normal(10, 1, seed=2), grid, moments(97))
    low, high = limits(grid)
    assert coded.codes.min() >= low and coded.codes.max() <= high
    assert coded.scales.shape == coded.zeros.shape == (10, -(-97 // grid.width(97)))
    if grid.half_scales:
        assert torch.equal(coded.scales.half().float(), coded.scales)
    assert coded.values().dtype == torch.float32 and torch.isfinite(coded.values()).all()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_diagonal_metric_is_rounding_to_nearest_bit_by_bit(grid):
    w = normal(8, 96)
    plain = quantize(w, grid)
    same = quantize(w, grid, 3.0 * torch.eye(96, dtype=torch.float64))
    assert torch.equal(plain.codes, same.codes) and torch.equal(plain.scales, same.scales)
    error = (plain.values().double() - w).abs()
    steps = plain.scales.abs().double().repeat_interleave(grid.width(96), 1)[:, :96]
    inside = (plain.codes > limits(grid)[0]) & (plain.codes < limits(grid)[1])
    assert bool((error[inside] <= 0.5 * steps[inside] * (1 + 1e-6)).all())


def test_after_every_column_nothing_is_left_for_the_columns_after_it():
    """The gradient with respect to what is not rounded yet is zero: the definition of the update."""
    w, h = normal(5, 12), moments(12)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    q = quantize(w, ROW8, h).values().double()
    nearest = quantize(w, ROW8).values().double()
    fed = (q != nearest).any(1)
    assert int(fed.sum()) > 2
    for j in range(1, 12):
        # The best values of the others, given the first j, are what error feedback made of them.
        best = w[:, j:] - (q[:, :j] - w[:, :j]) @ damped[:j, j:] @ torch.linalg.inv(damped[j:, j:])
        step = w.abs().amax(1) / 127
        pinned = w.abs().argmax(1) == j
        assert bool(((best[:, 0] - q[:, j]).abs() <= 0.5 * step * (1 + 1e-5))[~pinned & fed].all())


def test_feeding_errors_forward_pays_in_its_metric():
    w, h = normal(40, 64), moments(64)
    loss = [float((((q.values().double() - w) @ h) * (q.values().double() - w)).sum()) for q in (quantize(w, blocks(4)), quantize(w, blocks(4), h))]  # fmt: skip
    assert loss[1] < 0.7 * loss[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 10_000), st.sampled_from(sorted(GRIDS)))
def test_any_matrix_is_rounded_to_something_finite(rows, columns, seed, name):
    w = normal(rows, columns, seed=seed)
    w[seed % rows] *= 10.0 ** ((seed % 60) - 30)
    w[:, seed % columns] = 0
    coded = quantize(w, GRIDS[name], moments(columns, seed) if seed % 2 else torch.zeros(columns, columns))
    assert torch.isfinite(coded.values()).all() and coded.codes.shape == w.shape


def test_what_is_not_finite_is_refused():
    w = normal(3, 8)
    w[1, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        quantize(w, ROW8)


def test_the_largest_entry_keeps_the_largest_code():
    """That is what lets the tools find the scale again."""
    w, h = normal(30, 48), moments(48)
    coded = quantize(w, ROW8, h)
    top = w.abs().argmax(1)
    rows = torch.arange(30)
    assert torch.equal(coded.codes[rows, top].abs(), torch.full((30,), 127, dtype=torch.int16))
    values = coded.values()
    scale = values.abs().amax(1) / 127
    torch.testing.assert_close(scale, coded.scales[:, 0], rtol=1e-6, atol=0)
    assert torch.equal(torch.round(values / scale[:, None]).short(), coded.codes)


def test_no_row_loses_more_than_rounding_to_nearest_would():
    """The entry that keeps its code comes last, where nothing is left to make up for what was fed to it."""
    h = torch.full((12, 12), 0.999, dtype=torch.float64) + 0.001 * torch.eye(12, dtype=torch.float64)
    w = normal(64, 12, seed=5)
    w[:, -1] = 3 * w.abs().amax(1)
    losses = [((q.values().double() - w) @ h * (q.values().double() - w)).sum(1) for q in (quantize(w, ROW8, h), quantize(w, ROW8))]  # fmt: skip
    assert bool((losses[0] <= losses[1] * (1 + 1e-9)).all())
    assert float(losses[0].sum()) < 0.8 * float(losses[1].sum()), "and feeding pays where it can"
    coded = quantize(w, ROW8, h)
    assert torch.equal(coded.codes[:, -1].abs(), torch.full((64,), 127, dtype=torch.int16))


# joint moments and refits -------------------------------------------------------------------------------------------


def test_a_refit_is_least_squares_and_pythagoras_holds():
    """loss(W_q V_q) = loss(W* V_q) + tr(δ G δᵀ), with W* the refit without a ridge."""
    u, v, s = normal(20, 6), normal(6, 30, seed=3), moments(30)
    v_q = quantize(v, blocks(4, 16), s).values()
    joint = Joint(s[None], s[None], s[None], normal(1, 30), normal(1, 30)).through(v, v_q)
    s1, c1, g1 = joint.group(0)
    best = refitted(u, c1, g1, ridge=0.0)
    gradient = u @ c1 - best @ g1
    assert float(gradient.abs().max()) < 1e-8 * float((u @ c1).abs().max())
    u_q = quantize(best, blocks(4, 16), g1).values().double()
    whole, least = lost(u, u_q, s1, c1, g1)[0], lost(u, best, s1, c1, g1)[0]
    d = u_q - best
    assert whole == pytest.approx(least + float(((d @ g1) * d).sum()), rel=1e-9)
    assert least <= lost(u, u, s1, c1, g1)[0]


def test_joint_moments_are_those_of_the_data():
    x = normal(500, 30) + 1.0
    a, b = normal(6, 30, seed=3), normal(6, 30, seed=4)
    s = x.T @ x / len(x)
    root = Joint(s[None], s[None], s[None], x.mean(0)[None], x.mean(0)[None])
    found = root.through(a, b)
    z, zh = x @ a.T, x @ b.T
    for got, expected in zip(found.group(0), (z.T @ z, z.T @ zh, zh.T @ zh), strict=True):
        torch.testing.assert_close(got, expected / len(x), rtol=1e-10, atol=1e-10)
    centred = found.centred().group(0)[1]
    torch.testing.assert_close(centred, (z - z.mean(0)).T @ (zh - zh.mean(0)) / len(x), rtol=1e-8, atol=1e-8)


def test_a_ridge_pulls_to_the_weight_that_was_there():
    u, g = normal(5, 4), torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(refitted(u, g, g), u), "no data, no change"
    torch.testing.assert_close(refitted(u, moments(4), moments(4)), u, rtol=1e-8, atol=1e-8)


# gauges ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [1, 3])
def test_gauges_keep_the_product_and_make_the_second_factor_orthonormal(taps):
    v, u = normal(7, 30), normal(12, 7, taps)
    for rotate in (False, True):
        first, second = orthonormal(v, u, rotate=rotate)
        product = torch.einsum("mrt,rn->mnt", second, first)
        torch.testing.assert_close(product, torch.einsum("mrt,rn->mnt", u, v), rtol=1e-10, atol=1e-10)
        flat = second.permute(0, 2, 1).reshape(-1, 7)
        torch.testing.assert_close(flat.T @ flat, torch.eye(7, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_a_rotation_spreads_what_one_direction_carries():
    v = torch.diag(10.0 ** -torch.arange(8, dtype=torch.float64))
    u = normal(20, 8, 1)
    plain, turned = (orthonormal(v, u, rotate=r)[0].square().sum(1) for r in (False, True))
    assert float(turned.max() / turned.mean()) < 0.6 * float(plain.max() / plain.mean())
    assert torch.equal(rotation(9), rotation(9)) and not torch.equal(rotation(9), rotation(9, 1))


@pytest.mark.parametrize("shape", [(2, 7, 1), (12, 7, 1)])
def test_gauges_refuse_what_has_no_inverse(shape):
    u = normal(*shape)
    if shape[0] > 7:
        u[:, 3] = u[:, 2]
    assert orthonormal(normal(7, 30), u, rotate=False) is None


# moments in the runtime -------------------------------------------------------------------------------------------------


def test_moments_of_rows_leave_padding_out():
    g = Graph()
    table = g.weight("t", 20, 8)
    x = g.node("Gather", [table, "ids"], "rows", axis=0)
    y = g.node("MatMul", [x, g.weight("w", 8, 5)], "y")
    model = g.model("ids", TensorProto.INT64, ["batch", "sequence"], y, 5)
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 20, (6, 4)), (rng.random((6, 4)) < 0.6).astype(np.int64)
    found = observe(model, products(model.graph), [{"ids": ids, "attention_mask": mask}])["w"]
    rows = numpy_helper.to_array(model.graph.initializer[0])[ids][mask.astype(bool)].astype(np.float64)
    np.testing.assert_allclose(found.second[0].numpy(), rows.T @ rows / len(rows), rtol=1e-6)
    np.testing.assert_allclose(found.mean[0].numpy(), rows.mean(0), rtol=1e-6)
    assert found.count == int(mask.sum())


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (1, 2, 2), (4, 1, 1), (8, 2, 1)])
def test_patches_are_what_the_convolution_reads(groups, stride, dilation):
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], strides=[stride] * 2, dilations=[dilation] * 2, pads=[1, 2, 0, 1], group=groups
    )
    w = normal(16, 8 // groups, 3, 2).float()
    walk = Walk.of(node, tuple(w.shape))
    x = normal(2, 8, 9, 10, seed=5).float()
    patches = walk.patches(x)
    rows = w.reshape(groups, 16 // groups, -1)
    y = torch.einsum("nhwgk,gok->ngohw", patches, rows).flatten(1, 2)
    torch.testing.assert_close(y, walk.run(x, w), rtol=1e-5, atol=1e-5)


# a whole graph ----------------------------------------------------------------------------------------------------------


def pair_model(middle=(), r=12, seed=0):
    """x → V → (middle) → U, with a bias."""
    g = Graph(seed)
    x = g.node("Relu", ["x"], "x0")
    z = g.node("MatMul", [x, g.weight("l.V", 48, r)], "z")
    for i, op in enumerate(middle):
        z = g.node(op, [z], f"z{i}")
    p = g.node("MatMul", [z, g.weight("l.U", r, 40)], "p")
    y = g.node("Add", [p, g.constant("l.bias", np.zeros(40, np.float32))], "y0")
    return g.model("x", TensorProto.FLOAT, ["batch", 48], y, 40)


def feeds(n=64, seed=3):
    mix = np.random.default_rng(7).standard_normal((48, 48))
    x = np.random.default_rng(seed).standard_normal((n, 48)) @ mix / 7 + 0.3
    return [{"x": x[i : i + 16].astype(np.float32)} for i in range(0, n, 16)]


def test_two_factors_take_the_gauge_that_measures_best_and_keep_their_product():
    model = pair_model()
    found = products(model.graph)
    grids = {"l.V": blocks(4), "l.U": blocks(4, 16)}
    got = refit(model, found, grids, observe(model, found, feeds()))
    assert {r.weight: r.gauge for r in got.rows}["l.V"] == {r.weight: r.gauge for r in got.rows}["l.U"]
    plain = {
        p.weight: quantize(torch.from_numpy(p.rows(_array(model, p.weight)).copy()), grids[p.weight]).values()
        for p in found
    }
    x = np.maximum(np.concatenate([f["x"] for f in feeds(400, seed=9)]), 0)
    y = x @ _array(model, "l.V") @ _array(model, "l.U")
    mine = x @ got.arrays["l.V"] @ got.arrays["l.U"] + got.arrays["l.bias"]
    theirs = x @ plain["l.V"].numpy().T @ plain["l.U"].numpy().T
    assert np.linalg.norm(mine - y) < 0.75 * np.linalg.norm(theirs - y), "on data it has not seen"
    for p in found:
        assert np.array_equal(p.rows(got.arrays[p.weight]), got.coded[p.weight].values().numpy())


@pytest.mark.parametrize("middle", [("Relu",), ("Identity",)])
def test_a_space_that_something_else_reads_is_not_turned(middle):
    model = pair_model(middle)
    if middle == ("Identity",):
        model = pair_model()
        model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    found = products(model.graph)
    got = refit(model, found, {"l.V": blocks(4), "l.U": blocks(4, 16)}, observe(model, found, feeds()))
    assert {r.gauge for r in got.rows} == {GAUGES[0]}


def test_the_bias_takes_the_mean():
    model = pair_model()
    found = products(model.graph)
    got = refit(model, found, {"l.V": blocks(2, 16), "l.U": blocks(2, 16)}, observe(model, found, feeds()))
    x = np.maximum(np.concatenate([f["x"] for f in feeds()]), 0)
    y = x @ _array(model, "l.V") @ _array(model, "l.U")
    mine = x @ got.arrays["l.V"] @ got.arrays["l.U"] + got.arrays["l.bias"]
    np.testing.assert_allclose(mine.mean(0), y.mean(0), atol=1e-4 * np.abs(y).max())


def test_without_data_what_remains_is_the_gauge():
    model = pair_model()
    found = products(model.graph)
    got = refit(model, found, {"l.V": blocks(4), "l.U": blocks(4, 16)}, {})
    assert set(got.arrays) == {"l.V", "l.U"} and all(0 < r.rel_error < 0.5 for r in got.rows)


def _array(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).astype(np.float64)


def test_bytes_are_counted_as_they_are_stored():
    assert blocks(4, 32).n_bytes(10, 96) == 10 * (48 + 3 * 2)
    assert blocks(4, 32).n_bytes(10, 97) == 10 * (64 + 4 * 2), "the last block is filled"
    assert blocks(4, 32, symmetric=False).n_bytes(10, 96) == 10 * (48 + 3 * 2 + 2)
    assert ROW8.n_bytes(10, 97) == 10 * (97 + 4)
    assert signed(4, 576) == Grid(4, 64, half_scales=True, signed=True) and signed(4, 97).block is None


def test_seen_of_nothing_is_nothing():
    assert Seen(torch.zeros(1, 2, 2), torch.zeros(1, 2), 0).samples is None
    model = pair_model()
    assert observe(model, products(model.graph), []) == {}
