"""The pivoted gauge of a convolution: the plain form without its redundant numbers, or refused."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch

from lrcompress.factorize import ConvGeometry, Refused, form
from lrcompress.factorize._linalg import convolve
from tests.support.served import loaded_and_exported
from tests.support.weights import randn, statistics

KERNELS = [(12, 8, 3, 3), (6, 9, 3, 3), (8, 8, 2, 2), (6, 5, 5, 5), (7, 6, 2, 3), (7, 6, 3, 2)]


def some_ranks(name, shape):
    top = form(name).full_rank(shape)
    if isinstance(top, tuple):
        return [(1, 1), (top[0] // 2, top[1]), (top[0], top[1] // 2), (top[0] - 1, top[1] - 2), top]
    return sorted({1, shape[0] // 2, shape[0] - 1, shape[0], min(shape[0] + 1, top), min(2 * shape[0], top)})


@pytest.mark.parametrize("shape", KERNELS)
@pytest.mark.parametrize(("name", "plain"), [("pivoted_spatial", "spatial_svd"), ("pivoted_tucker", "tucker")])
def test_the_gauge_is_the_plain_form_without_its_redundant_numbers(name, plain, shape):
    w = randn(*shape)
    for stats in (None, statistics(w, two_sided=True)):
        for rank in some_ranks(name, shape):
            f, g = form(name).decompose(w, rank, stats), form(plain).decompose(w, rank, stats)
            torch.testing.assert_close(f.to_tensor(), g.to_tensor(), rtol=0, atol=1e-9)
            assert f.loss == pytest.approx(g.loss, rel=1e-6, abs=1e-9)
            redundant = sum(r * r for r in rank) if isinstance(rank, tuple) else rank * min(rank, shape[0])
            assert f.n_params == form(name).n_params(shape, rank) == g.n_params - redundant
            assert all(float(f.factors[k].abs().max()) <= 2.0 for k in ("S", "T") if k in f.factors)


@pytest.mark.parametrize("shape", [(9, 6, 3, 3), (6, 9, 3, 3), (8, 8, 2, 2), (6, 5, 5, 5), (7, 6, 2, 3), (7, 6, 3, 2)])
@pytest.mark.parametrize("name", ["pivoted_spatial", "pivoted_tucker"])
def test_every_walk_over_every_tap(name, shape, monkeypatch):
    """Any stride, padding and dilation, unlike along the two axes, whichever tap is the trivial one."""
    from lrcompress.factorize import pivoted_spatial

    w, x, seen = randn(*shape), randn(2, shape[1], 15, 14, seed=4), set()
    every = pivoted_spatial._choices(max(shape[2:])) if name == "pivoted_spatial" else [None]
    for i in range(len(every)):
        monkeypatch.setattr(
            pivoted_spatial, "_choices", lambda taps, i=i, f=pivoted_spatial._choices: f(taps)[i : i + 1] or f(taps)[:1]
        )
        for rank in some_ranks(name, shape):
            f = form(name).decompose(w, rank)
            seen |= set(f.factors)
            for stride, padding, dilation in itertools.product(
                ((1, 1), (2, 3)), ((0, 0), (1, 1), (2, 0), (0, 3)), ((1, 1), (1, 2))
            ):
                geometry = ConvGeometry(stride, padding, dilation)
                torch.testing.assert_close(
                    f.apply(x, geometry), convolve(x, f.to_tensor(), geometry), rtol=0, atol=1e-8
                )
        monkeypatch.undo()
    if name == "pivoted_spatial":
        assert {"before", "after", "T", "order"} <= seen and ("around" in seen) == (shape[3] == 3)


def test_both_orders_of_the_filters_are_taken():
    """A kernel of low rank with its height first, or with its width first, keeps that order, and its rank."""
    for swap, axes in ((False, (2, 3)), (True, (3, 2))):
        w = torch.einsum("rih,orw->oihw", randn(5, 8, 3), randn(12, 5, 3, seed=1))
        w = w.transpose(2, 3).contiguous() if swap else w
        f = form("pivoted_spatial").decompose(w, 5)
        assert f.rel_error < 1e-6 and [f.factors["first"].shape[i] for i in axes] == [3, 1]


@pytest.mark.parametrize("leak", [0.0, 1e-6, 0.1])
def test_a_gauge_that_float32_would_feel_is_refused(leak):
    """Terms that live at one tap each, but for a leak: no tap alone has the rank that all have together."""
    second = randn(8, 4, 3)
    second[:, :3] *= leak + (1 - leak) * torch.eye(3, dtype=torch.float64)
    w = torch.einsum("rih,orw->oihw", randn(4, 6, 3, seed=1), second)
    offered = {p.rank for p in form("pivoted_spatial").curve(w)}
    assert form("spatial_svd").decompose(w, 4).rel_error < 1e-6
    if leak > 0.01:
        assert form("pivoted_spatial").decompose(w, 4).rel_error < 1e-6 and 4 in offered
        return
    with pytest.raises(Refused, match="use spatial_svd") as refusal:
        form("pivoted_spatial").decompose(w, 4)
    assert 4 not in offered and ("inf" in refusal.value.got) == (leak == 0)


def test_what_is_accepted_holds_in_float32():
    for seed in range(6):
        w = randn(16, 12, 3, 3, seed=seed) * 0.5 ** torch.arange(3)
        for rank in (5, 15, 16, 20):
            plain = form("spatial_svd").decompose(w, rank).to_tensor()
            f = form("pivoted_spatial").decompose(w.float(), rank)
            assert float((f.to_tensor() - plain).abs().max()) < 1e-4 * float(w.abs().max())


@pytest.mark.parametrize(
    ("method", "rank"), [("pivoted_spatial", 6), ("pivoted_spatial", 40), ("pivoted_tucker", 6), ("pivoted_tucker", 16)]
)
def test_the_gauge_from_weights_to_the_runtime(tmp_path, method, rank):
    import lrcompress
    from lrcompress.data import Data
    from lrcompress.model import InputSpec
    from lrcompress.runtime import Session
    from tests.support.nets import images, small

    torch.save(small().state_dict(), tmp_path / "m.pt")
    x, _ = images(120)
    about = {"inputs": (InputSpec("x", "float32", ("batch", 3, 8, 8)),), "arch": "tests.support.nets:small"}
    made = lrcompress.factorize(
        tmp_path / "m.pt", rank=rank, method=method, calib=Data.of_arrays({"x": x}), output=tmp_path / "c", **about
    )
    rows = {r["name"]: r for r in made.data["layers"]}
    assert rows["conv2"]["form"] == method and rows["conv2"]["params_after"] < rows["conv2"]["params_before"]
    back, expected = loaded_and_exported(made, tmp_path / "c", torch.as_tensor(x), tmp_path / "e")
    have = {t.name for t in onnx.load(str(tmp_path / "e" / "model.onnx")).graph.initializer}
    assert {f"conv2.{k}" for k in back.conv2.factors} <= have
    for n in (1, 7):
        np.testing.assert_allclose(
            Session(tmp_path / "e").run({"x": x[:n]})["output"], expected[:n].numpy(), rtol=1e-4, atol=1e-5
        )
