"""Closed forms on networks: what is reported is what is measured, nothing gets worse, and the runtime answers alike."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lrcompress.adapt import kinds
from lrcompress.data import Data
from lrcompress.factorize import Statistics, form
from lrcompress.fit import Judge, read_batches
from lrcompress.model import InputSpec, open_model
from lrcompress.model.adapting import every_target, fresh
from lrcompress.model.surgery import attach, find_layers, replace_layer, wrap_dense
from lrcompress.model.ties import share_factors
from lrcompress.recover import closed_adapters
from lrcompress.recover.closed_adapters import correct
from lrcompress.recover.closed_refits import refit
from tests.support.nets import grouped, images, small, words

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)


def pictures(n: int = 160, seed: int = 0) -> Data:
    return Data.of_arrays({"x": images(n, seed)[0]})


def chain(*widths: int, bias: bool = True) -> nn.Sequential:
    """Return linear layers with a bend between, on (batch, widths[0])."""
    torch.manual_seed(0)
    parts = [nn.Linear(a, b, bias) for a, b in itertools.pairwise(widths)]
    bent = [p for pair in ((p, nn.Tanh()) for p in parts) for p in pair][:-1]
    return nn.Sequential(*bent).eval()


def rows(n: int, width: int, seed: int) -> Data:
    """Return inputs of very unequal directions, and a mean."""
    g = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((width, width)) * np.logspace(0.5, -1, width)
    return Data.of_arrays({"input": (g.standard_normal((n, width)) @ mix.T + 0.5).astype(np.float32)})


def crude(net: nn.Module, rank: int = 3, method: str = "svd") -> nn.Module:
    """Return a copy whose layers are factorized by their weights alone."""
    out = copy.deepcopy(net)
    for layer in find_layers(net):
        if layer.reason is None and layer.kind in form(method).LAYERS:
            kept = form(method).clip(layer.shape, rank)
            replace_layer(out, layer.name, form(method).decompose(layer.weight, kept))
    return out


def attached(module: nn.Module, kind: str = "lora", rank: int = 2, only=None, **options) -> dict:
    layers = [n for n, t in every_target(module).items() if (only is None or n in only) and (kind != "core" or t.core)]
    g = torch.Generator().manual_seed(0)
    make = lambda n, _: fresh(kind, wrap_dense(module, n).target, rank, generator=g, **options)  # noqa: E731
    return attach(module, "a", make, layers)


def heard(net: nn.Module, module: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the measured relative error of every layer's answers, in a run of both networks."""
    answers: dict[str, list[torch.Tensor]] = {}
    for model in (net, module):
        hooks = [
            model.get_submodule(layer.name).register_forward_hook(
                lambda _m, _a, out, n=layer.name: answers.setdefault(n, []).append(out.detach().double())
            )
            for layer in find_layers(net)
        ]
        with torch.no_grad():
            model(**inputs)
        for h in hooks:
            h.remove()
    found = {}
    for name, (t, y) in answers.items():
        flat = t.movedim(1, -1).flatten(0, -2) if t.dim() == 4 else t
        found[name] = float((t - y).square().sum() / (flat - flat.mean(0)).square().sum()) ** 0.5
    return found


@pytest.mark.parametrize("kind", ["lora", "core"])
@pytest.mark.parametrize("make", [lambda: chain(12, 16, 10, 6), small, grouped])
def test_reported_errors_are_those_of_a_run(make, kind):
    """Of every layer, in depth order: each error is measured on what the corrected layers before deliver."""
    net = make()
    module = crude(net, method="tucker" if make is grouped and kind == "lora" else "svd")
    if isinstance(net, nn.Sequential):
        fit, held = rows(600, 12, 1), rows(200, 12, 2)
    elif make is small:
        fit, held = pictures(300, 1), pictures(100, 2)
    else:
        x = torch.randn(300, 8, 9, 9, generator=torch.Generator().manual_seed(0)).numpy()
        fit, held = Data.of_arrays({"x": x[:200]}), Data.of_arrays({"x": x[200:]})
    adapters = attached(module, kind, 4 if make is grouped else 2)
    opened = open_model(net)
    found = correct(opened, net, module, adapters, fit=fit, held=held)
    batch = {k: torch.as_tensor(v) for k, v in next(iter(held.batches(len(held)))).inputs.items()}
    measured = heard(net, module, batch)
    assert found.applied and found.after < found.before and [r["layer"] for r in found.rows] == list(adapters)
    for row in found.rows:
        if row["error_after"] is not None and (row["applied"] or row["error_after"] == row["error_before"]):
            assert row["error_after"] == pytest.approx(measured[row["layer"]], rel=2e-4, abs=5e-4), row
        assert row["applied"] == (row["error_after"] is not None and row["error_after"] <= 0.99 * row["error_before"])
    judge = Judge(opened, net, read_batches(held, 128))
    assert found.after == pytest.approx(judge.loss(module), rel=1e-6)


def test_a_residual_on_weights_alone_pays_and_says_what_rank_would_do():
    net = chain(12, 16, 10, 6)
    module = crude(net)
    found = correct(open_model(net), net, module, attached(module), fit=rows(600, 12, 1), held=rows(200, 12, 2))
    assert found.after < 0.5 * found.before
    first = found.rows[0]
    assert first["applied"] and first["error_after"] < 0.9 * first["error_before"]
    assert first["error_of_rank"] <= first["error_after"] and "rank 5 leaves" in first["reason"]
    assert first["bytes"] == 4 * 2 * (12 + 16)


def test_on_an_optimal_base_the_same_bytes_spent_on_rank_do_as_well():
    """The base is the best of its rank about zero, its bias stays: exactly the worthless case."""
    net = chain(12, 9)
    fit = rows(500, 12, 1)
    x = torch.as_tensor(next(iter(fit.batches(500))).inputs["input"]).double()
    module = copy.deepcopy(net)
    best = form("svd").decompose(net[0].weight.detach(), 3, Statistics(gram=x.T @ x / len(x)))
    replace_layer(module, "0", best)
    found = correct(open_model(net), net, module, attached(module), fit=fit, held=rows(300, 12, 2))
    [row] = found.rows
    assert row["applied"] and row["reason"].startswith("the same bytes spent on rank do as well: rank 5")
    assert row["error_of_rank"] == pytest.approx(row["error_after"], rel=1e-3)


def test_what_is_exact_stays_untouched():
    """Layers that lose nothing keep their fresh adapter, bit for bit; a dense copy has nothing to correct."""
    net = small()
    module = copy.deepcopy(net)
    adapters = attached(module)
    before = {n: {k: t.clone() for k, t in a.tensors().items()} for n, a in adapters.items()}
    found = correct(open_model(net), net, module, adapters, fit=pictures(64, 1), held=pictures(64, 2))
    assert not found.applied and found.after == found.before < 1e-9
    assert all(torch.equal(t, before[n][k]) for n, a in adapters.items() for k, t in a.tensors().items())
    assert {r["reason"] for r in found.rows} == {"nothing is lost here beyond rounding"}


def test_all_together_are_kept_only_if_the_network_loses_less():
    net = chain(12, 16, 10, 6)
    module = crude(net)
    adapters = attached(module)
    before = {n: {k: t.clone() for k, t in a.tensors().items()} for n, a in adapters.items()}
    losses = iter([1.0, 1.0])
    found = correct(
        open_model(net), net, module, adapters, fit=rows(300, 12, 1), held=rows(99, 12, 2), decide=lambda: next(losses)
    )
    assert not found.applied and found.after == found.before == 1.0
    assert all(torch.equal(t, before[n][k]) for n, a in adapters.items() for k, t in a.tensors().items())
    assert all("all corrections together" in r["reason"] for r in found.rows if r["error_after"] < r["error_before"])


def test_what_only_fits_its_own_data_is_not_applied():
    """Eight samples solve, for 24 inputs each; on others, of another mean, no adapter may lose more than none."""
    net = chain(24, 24, 24)
    module = crude(net, 8)
    held = Data.of_arrays({"input": -3 * next(iter(rows(200, 24, 2).batches(200))).inputs["input"]})
    found = correct(open_model(net), net, module, attached(module), fit=rows(8, 24, 1), held=held)
    assert all(r["error_after"] <= r["error_before"] for r in found.rows)
    assert found.after <= found.before


def test_what_is_not_worth_its_bytes_stays_fresh(monkeypatch):
    """A correction that lowers the error, by less than it should, leaves no trace in the adapter."""
    monkeypatch.setattr(closed_adapters, "WORTH", 1.0)
    net = chain(12, 9)
    module = crude(net)
    adapters = attached(module)
    before = {k: t.clone() for k, t in adapters["0"].tensors().items()}
    [row] = correct(open_model(net), net, module, adapters, fit=rows(300, 12, 1), held=rows(99, 12, 2)).rows
    assert not row["applied"] and row["error_after"] < row["error_before"] and "not worth its bytes" in row["reason"]
    assert all(torch.equal(t, before[k]) for k, t in adapters["0"].tensors().items())


def test_scaling_is_divided_out():
    net = chain(12, 9)
    deltas = []
    for options in ({}, {"alpha": 7.0}, {"alpha": 7.0, "rslora": True}):
        module = crude(net)
        adapters = attached(module, **options)
        correct(open_model(net), net, module, adapters, fit=rows(300, 12, 1), held=rows(99, 12, 2))
        deltas.append(adapters["0"].delta_weight(module.get_submodule("0")).detach())
    assert float(deltas[0].norm()) > 0.1
    for other in deltas[1:]:
        torch.testing.assert_close(other, deltas[0], rtol=1e-5, atol=1e-6)


def test_tables_and_layers_called_twice():
    """Rows are weighed by how often they are looked up; a layer called twice is solved for both calls."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(40, 12), nn.Linear(12, 12), nn.Linear(12, 5)

        def forward(self, ids):
            return self.out(self.mix(torch.tanh(self.mix(self.embed(ids)))))

    torch.manual_seed(0)
    net = Twice().eval()
    ids = (torch.rand(400, 6, generator=torch.Generator().manual_seed(1)) ** 3 * 40).long().numpy()
    module = crude(net, 4)
    adapters = attached(module, rank=3)
    fit, held = Data.of_arrays({"ids": ids[:300]}), Data.of_arrays({"ids": ids[300:]})
    found = {r["layer"]: r for r in correct(open_model(net), net, module, adapters, fit=fit, held=held).rows}
    assert all(found[n]["applied"] for n in ("embed", "mix")) and found["embed"]["error_after"] < 1
    e = (net.embed.weight - module.embed.weight).detach().double()
    counts = torch.bincount(torch.as_tensor(ids[:300]).flatten(), minlength=40).double()
    p = counts + 0.01 * counts.mean()
    p = p / p.sum()
    left = e - adapters["embed"].plain_delta().detach().double()
    tail = torch.linalg.eigvalsh(e.T @ (p[:, None] * e))[:-3].sum()
    assert float((p[:, None] * left.square()).sum()) == pytest.approx(float(tail), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        *[(k, {}, "no closed form") for k in kinds() if k not in ("lora", "core")],
        ("lora", {"rank": 3}, "shared by groups"), ("core", {"rank": 2}, "whole core"),
    ],
)  # fmt: skip
def test_what_has_no_closed_form_says_so_and_stays(kind, options, words):
    net = grouped() if kind == "lora" else small()
    module = crude(net, 4, "spatial_svd" if kind == "core" else "svd")
    layers = {"lora": ["wide"], "core": ["conv2"]}.get(kind)
    adapters = attached(module, kind, only=layers, **options)
    before = {n: {k: t.clone() for k, t in a.tensors().items()} for n, a in adapters.items()}
    data = (
        pictures(40)
        if kind != "lora"
        else Data.of_arrays({"x": np.random.default_rng(0).random((40, 8, 9, 9), np.float32)})
    )
    found = correct(open_model(net), net, module, adapters, fit=data, held=data)
    assert not found.applied and all(words in r["reason"] for r in found.rows)
    assert all(torch.equal(t, before[n][k]) for n, a in adapters.items() for k, t in a.tensors().items())


def test_a_decomposed_adapter_and_a_missing_layer_say_so():
    net = chain(12, 16, 12, 12)
    module = crude(net)
    adapters = attached(module)
    adapters["0"].decompose(module.get_submodule("0").weight)
    found = correct(open_model(net), net, module, adapters, fit=rows(50, 12, 1), held=rows(50, 12, 2))
    assert "weight-decomposed" in found.rows[0]["reason"] and found.rows[1]["applied"]
    net[4] = nn.Identity()  # an original that has changed
    found = correct(open_model(net), net, module, {"4": adapters["4"]}, fit=rows(50, 12, 1), held=rows(50, 12, 2))
    assert "of this name" in found.rows[0]["reason"]


# refits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "method", "changed"),
    [
        (lambda: chain(12, 16, 10, 6), "svd", {"U V", "U"}), (lambda: chain(12, 16, 10, 6, bias=False), "svd", {"U V", "U"}),
        (lambda: chain(12, 16, 10, 6), "kronecker", {"factors"}), (lambda: chain(12, 16, 10, 6), "pivoted", {"factors"}),
    ],
)  # fmt: skip
def test_refits_lower_what_the_network_loses(make, method, changed):
    net = make()
    module = crude(net, method=method)
    fit, held = rows(600, 12, 1), rows(200, 12, 2)
    found = refit(open_model(net), net, module, fit=fit, held=held)
    assert found.after < 0.8 * found.before and {r["changed"] for r in found.rows if r["applied"]} & changed
    batch = {"input": torch.as_tensor(next(iter(held.batches(200))).inputs["input"])}
    measured = heard(net, module, batch)
    for row in found.rows:
        assert row["error_after"] == pytest.approx(measured[row["layer"]], rel=2e-4), row
        new_bias = net.get_submodule(row["layer"]).bias is None
        assert row["bytes"] == (
            4 * len(module.get_submodule(row["layer"]).weight) if new_bias and row["applied"] else 0
        )


def test_layers_that_stay_dense_are_refitted_and_shared_factors_stay():
    net = chain(12, 12, 12, 12)
    module = copy.deepcopy(net)
    found = form("svd").decompose(net[0].weight.detach(), 3)
    for name in ("0", "2"):
        replace_layer(module, name, found)
    share_factors(module, "0", ["2"], ["V"])
    shared = module.get_submodule("0").V
    kept = shared.clone()
    done = {
        r["layer"]: r for r in refit(open_model(net), net, module, fit=rows(500, 12, 1), held=rows(200, 12, 2)).rows
    }
    assert module.get_submodule("0").V is module.get_submodule("2").V is shared and torch.equal(shared, kept)
    assert done["0"]["changed"] == "bias" and done["4"]["changed"] in ("weight", "affine", "bias")


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_a_blend_of_wanted_answers_keeps_the_bias_of_the_original(beta):
    """However the products are blended, a refitted bias carries the whole mean of what the original answers."""
    net = chain(12, 9)
    with torch.no_grad():
        net[0].bias += 5.0
    module, samples = crude(net), rows(300, 12, 1)
    found = refit(open_model(net), net, module, fit=samples, held=samples, betas=(beta,))
    x = torch.as_tensor(next(iter(samples.batches(300))).inputs["input"])
    with torch.no_grad():
        apart = net(x) - module(x)
    assert found.applied == ["0"] and found.after < found.before
    assert float(apart.mean(0).abs().max()) < 1e-4 < 1e-2 < float(apart.abs().mean())


def test_a_refit_that_helps_nothing_changes_nothing(monkeypatch):
    net = chain(12, 16, 6)
    module = crude(net)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(Judge, "loss", lambda self, network: next(losses))
    found = refit(open_model(net), net, module, fit=rows(300, 12, 1), held=rows(99, 12, 2))
    assert not found.applied and list(module.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_padding_is_left_out():
    """Rows of padding hold what no text holds; with them in, the error of the layer behind would be another."""
    net = words()
    module = crude(net, 3)
    g = np.random.default_rng(0)
    ids, mask = g.integers(1, 40, (300, 6)), (np.arange(6) < g.integers(1, 7, 300)[:, None]).astype(np.int64)
    fit = Data.of_arrays({"ids": ids * mask, "attention_mask": mask})
    found = correct(open_model(net), net, module, attached(module, rank=2), fit=fit, held=fit)
    row = next(r for r in found.rows if r["layer"] == "embed")
    e = (net.embed.weight - module.embed.weight).detach().double()
    counts = np.bincount(ids[mask.astype(bool)], minlength=40)
    p = torch.as_tensor(counts + 0.01 * counts.mean())
    p, w = p / p.sum(), net.embed.weight.detach().double()
    total = (p[:, None] * (w - p @ w).square()).sum()
    assert row["error_before"] == pytest.approx(float((p[:, None] * e.square()).sum() / total) ** 0.5, rel=1e-5)


class Tokens(nn.Module):
    """Two layers over every token of (batch, tokens, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 6)

    def forward(self, x, attention_mask):
        return self.two(torch.tanh(self.one(x)))


def test_tokens_that_are_padding_count_for_nothing():
    """What stands in the padding, even where it is a thousand times larger, changes no adapter and no error."""
    torch.manual_seed(0)
    net = Tokens().eval()
    x = next(iter(rows(1200, 12, 1).batches(1200))).inputs["input"].reshape(200, 6, 12)
    mask = (np.arange(6) < np.random.default_rng(0).integers(1, 7, 200)[:, None]).astype(np.int64)
    found = []
    for filler in (0.0, 1000.0):
        filled = np.where(mask[..., None] > 0, x, np.float32(filler))
        module = crude(net)
        adapters = attached(module)
        data = [Data.of_arrays({"x": filled[p], "attention_mask": mask[p]}) for p in (slice(0, 150), slice(150, 200))]
        rows_ = correct(open_model(net), net, module, adapters, fit=data[0], held=data[1]).rows
        found.append((rows_, [a.plain_delta().detach() for a in adapters.values()]))
    assert found[0][0] == found[1][0] and all(r["applied"] for r in found[0][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
