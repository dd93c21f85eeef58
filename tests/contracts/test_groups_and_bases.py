"""Grouped convolutions, a basis that layers share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrcompress.factorize import ConvGeometry, Statistics, form
from lrcompress.factorize._linalg import convolve
from lrcompress.factorize.grouped_svd import apart
from lrcompress.factorize.shared import decompose_group, group_params
from tests.support.served import loaded_and_exported
from tests.support.weights import randn, statistics, weight


def test_a_grouped_convolution_is_factorized_group_by_group():
    groups, w = 3, weight((12, 4, 3, 3))
    split = apart(w, groups)
    f = form("grouped_svd").decompose(split, 2)
    tails = sum(float(torch.linalg.svdvals(g.flatten(1))[2:].square().sum()) for g in split)
    assert float((split - f.to_tensor()).square().sum()) == pytest.approx(tails, rel=1e-9)
    x, geometry = randn(2, 12, 8, 8), ConvGeometry((2, 2), (1, 1), (1, 1))
    torch.testing.assert_close(
        form("grouped_svd").conv(f.factors, x, geometry), convolve(x, f.to_tensor().reshape(w.shape), geometry, groups)
    )
    assert (
        f.n_params
        == sum(t.numel() for _, t in f.named_factors())
        == form("grouped_svd").n_params(tuple(split.shape), 2)
    )


def test_every_group_has_its_own_metric():
    split = apart(weight((8, 3, 3, 3)), 2)
    own = [statistics(g, seed=i, two_sided=True) for i, g in enumerate(split)]
    stacked = {k: torch.stack([getattr(s, k) for s in own]) for k in ("gram", "mean", "output_gram")}
    stats = Statistics(**stacked, groups=2)
    f = form("grouped_svd").decompose(split, 2, stats)
    alone = [form("svd").decompose(g, 2, s) for g, s in zip(split, own, strict=True)]
    assert f.loss == pytest.approx(sum(a.loss for a in alone), rel=1e-8)
    torch.testing.assert_close(f.bias_shift, torch.cat([a.bias_shift for a in alone]), rtol=1e-7, atol=1e-9)
    assert form("grouped_svd").curve(split, stats)[1].loss == pytest.approx(f.loss, rel=1e-8)
    with pytest.raises(ValueError, match="expected shape"):
        form("grouped_svd").decompose(split, 2, Statistics(gram=stats.gram[:, :5, :5], groups=2))


def test_a_shared_basis_is_the_best_one_for_the_stack():
    weights = [weight((n, 16), seed=i) for i, n in enumerate((10, 10, 6))]
    base = statistics(weights[0])
    stats = [Statistics(gram=base.gram, mean=base.mean) for _ in weights]
    found = decompose_group(weights, 5, stats)
    assert all(f.factors["V"] is found[0].factors["V"] for f in found)
    stacked = torch.cat(weights)
    tail = torch.linalg.eigvalsh(stacked @ Statistics(gram=base.gram).s @ stacked.T).flip(0)[5:].sum()
    assert sum(f.loss for f in found) == pytest.approx(float(tail), rel=1e-7)
    assert group_params([w.shape for w in weights], 5) == 5 * (16 + 26) < sum(f.n_params for f in found)
    with pytest.raises(ValueError, match="one width"):
        decompose_group([weight((4, 5)), weight((4, 6))], 2)


def test_importance_moves_a_shared_basis_towards_a_layer():
    weights = [weight((8, 12), seed=i) for i in range(2)]
    even, first = decompose_group(weights, 3), decompose_group(weights, 3, importance=(10.0, 1.0))
    assert first[0].loss < even[0].loss and first[1].loss > even[1].loss


def test_a_network_with_groups_from_weights_to_the_runtime(tmp_path):
    import lrcompress
    from lrcompress.data import Data
    from lrcompress.model import InputSpec
    from lrcompress.runtime import Session
    from tests.support.nets import grouped

    torch.save(grouped().state_dict(), tmp_path / "m.pt")
    x = randn(64, 8, 9, 9).float().numpy()
    spec = (InputSpec("x", "float32", ("batch", 8, 9, 9)),)
    made = lrcompress.factorize(
        tmp_path / "m.pt",
        rank=4,
        method="svd",
        calib=Data.of_arrays({"x": x}),
        inputs=spec,
        arch="tests.support.nets:grouped",
        output=tmp_path / "c",
    )
    rows = {r["name"]: r for r in made.data["layers"]}
    assert (rows["wide"]["form"], rows["wide"]["shape"]) == ("grouped_svd", [24, 4, 3, 3])
    assert rows["wide"]["norm"] == "two_sided" and rows["wide"]["params_after"] == 2 * 4 * (12 + 36)
    assert (rows["deep"]["form"], rows["deep"]["reason"]) == ("dense", "depthwise: nothing to save")
    _, expected = loaded_and_exported(made, tmp_path / "c", torch.as_tensor(x), tmp_path / "e")
    np.testing.assert_allclose(Session(tmp_path / "e").run({"x": x})["output"], expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"rank": 6}, {"ratio": 0.6}])
def test_projections_of_one_input_share_a_basis_from_weights_to_the_runtime(tmp_path, how):
    import lrcompress
    from lrcompress.data import Data
    from lrcompress.errors import CommandError
    from lrcompress.model import InputSpec
    from lrcompress.model.checkpoint import load_compressed
    from lrcompress.runtime import Session
    from tests.support.nets import attending

    torch.save(attending().state_dict(), tmp_path / "m.pt")
    x = randn(80, 6, 24).float().numpy()
    about = {
        "inputs": (InputSpec("x", "float32", ("batch", 6, 24)),),
        "arch": "tests.support.nets:attending",
        "method": "shared",
    }
    with pytest.raises(CommandError, match="--calib"):
        lrcompress.factorize(tmp_path / "m.pt", **how, **about)
    made = lrcompress.factorize(
        tmp_path / "m.pt", calib=Data.of_arrays({"x": x}), output=tmp_path / "c", **how, **about
    )
    rows = {r["name"]: r for r in made.data["layers"]}
    rank = rows["q"]["rank"]
    assert [rows[n]["params_after"] for n in "qkv"] == [rank * 48, rank * 24, rank * 16]
    back = load_compressed(tmp_path / "c").module
    for net in (made.model, back):
        assert net.q.factors["V"] is net.k.factors["V"] is net.v.factors["V"]
        assert sum(p.numel() for p in net.parameters()) == made.data["params_after"]
    if "ratio" in how:
        assert made.data["params_after"] <= 0.6 * made.data["params_before"]
    with torch.no_grad():
        expected = made.model(torch.as_tensor(x))
        assert torch.equal(back(torch.as_tensor(x)), expected)
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    np.testing.assert_allclose(Session(tmp_path / "e").run({"x": x})["output"], expected.numpy(), rtol=1e-4, atol=1e-5)
