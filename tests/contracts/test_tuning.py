"""Judging, measuring and searching: what is compared is what is said, nothing stays changed, a search never loses."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lrcompress.factorize import Refused, form
from lrcompress.fit import Bench, Judge, calibrated, jointly, search, sensitivities
from lrcompress.fit.depth import plainer
from lrcompress.model import open_model
from lrcompress.model.surgery import Layer, find_layers
from lrcompress.plan import Choice, Menu, Option, allocate, menus_of
from tests.support.weights import randn


class Straight(nn.Module):
    def __init__(self, width=12, depth=3):
        super().__init__()
        for i in range(depth):
            setattr(self, f"l{i}", nn.Linear(width, width))
        self.depth = depth

    def forward(self, x):
        for i in range(self.depth):
            x = torch.tanh(getattr(self, f"l{i}")(x))
        return x


def net(seed=0):
    torch.manual_seed(seed)
    made = Straight().eval()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.mul_(1 + i % 3)
    return made


def bench_of(network, x, *, unit="params", method="svd"):
    opened = open_model(network)
    layers = find_layers(network)
    menus = menus_of(layers, method, {}, unit=unit)
    return Bench(Judge(opened, network, [{"x": x[:20]}, {"x": x[20:]}]), network, menus, {}), menus


X = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))


# the judge ------------------------------------------------------------------------------------------------------------


def test_the_judge_says_the_mean_centred_squared_difference():
    one, two = net(), net(1)
    judge = Judge(open_model(one), one, [{"x": X[:7]}, {"x": X[7:]}])
    with torch.no_grad():
        off = (one(X) - two(X)).double()
    expected = (off - off.mean(1, keepdim=True)).square().sum(1).mean()
    assert judge.loss(two) == pytest.approx(float(expected), rel=1e-6)
    assert judge.loss(one) == 0.0 and judge.evaluations == 2


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 4)

    def forward(self, x, attention_mask):
        return {"logits": self.l(x)}


def test_padded_tokens_are_not_judged():
    torch.manual_seed(0)
    one, two = Tokens().eval(), Tokens().eval()
    x, mask = torch.randn(3, 6, 5), torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [1] * 3 + [0] * 3])
    judge = Judge(open_model(one), one, [{"x": x, "attention_mask": mask}])
    with torch.no_grad():
        off = (one.l(x) - two.l(x))[mask.bool()].double()
    expected = (off - off.mean(1, keepdim=True)).square().sum(1).mean()
    assert judge.loss(two) == pytest.approx(float(expected), rel=1e-6)


# the bench ------------------------------------------------------------------------------------------------------------


def test_a_bench_changes_the_layers_it_is_asked_for_and_puts_them_back():
    network = net()
    bench, menus = bench_of(network, X)
    kept, modules = copy.deepcopy(network.state_dict()), dict(network.named_modules())
    options = {m.layer.name: m.options[1] for m in menus[:2]}
    loss = bench.loss(options)
    changed = net()
    with torch.no_grad():
        for name, option in options.items():
            layer = changed.get_submodule(name)
            layer.weight.copy_(form("svd").decompose(layer.weight.detach(), option.rank).to_tensor())
    assert loss == pytest.approx(bench.judge.loss(changed), rel=1e-4)
    assert dict(network.named_modules()) == modules
    assert all(torch.equal(kept[k], v) for k, v in network.state_dict().items())
    assert bench.loss({m.layer.name: m.dense for m in menus}) == 0.0


def test_an_error_of_the_network_leaves_the_layers_in_place():
    network = net()
    bench, menus = bench_of(network, X)
    modules = dict(network.named_modules())
    handle = network.l2.register_forward_pre_hook(lambda _m, _a: (_ for _ in ()).throw(RuntimeError("own")))
    with pytest.raises(RuntimeError, match="own"):
        bench.loss({"l0": menus[0].options[0]})
    handle.remove()
    assert dict(network.named_modules()) == modules


def test_factors_are_made_once_and_a_refusal_is_no_loss(monkeypatch):
    network = net()
    bench, menus = bench_of(network, X)
    asked = []
    plain = form("svd").decompose

    def counting(w, rank, statistics=None):
        asked.append(rank)
        if rank == menus[1].options[0].rank:
            raise refusal()
        return plain(w, rank, statistics)

    monkeypatch.setattr(form("svd"), "decompose", counting)
    other = next(o for o in menus[0].options if o.form != "dense" and o.rank != menus[1].options[0].rank)
    assert bench.loss({"l0": other}) == bench.loss({"l0": other}) and len(asked) == 1
    refused = {"l0": other, "l1": menus[1].options[0]}
    modules = dict(network.named_modules())
    assert bench.loss(refused) is None and bench.loss(refused) is None and len(asked) == 2
    assert dict(network.named_modules()) == modules


def refusal():
    try:
        form("pivoted_spatial").decompose(leaky(), 4)
    except Refused as e:
        return e
    raise AssertionError("the form no longer refuses this kernel")


def leaky():
    """A kernel whose terms live at one tap each: no tap alone has the rank that all have together."""
    second = randn(8, 4, 3)
    second[:, :3] *= torch.eye(3, dtype=torch.float64)
    return torch.einsum("rih,orw->oihw", randn(4, 6, 3, seed=1), second)


def test_a_refused_form_becomes_the_plain_one_that_stores_no_more():
    layer = Layer("k", "conv", leaky())
    choice = Choice("k", "pivoted_spatial", 4, 0)
    name, rank = plainer(choice, layer)
    most = form("pivoted_spatial").n_params(layer.shape, 4)
    assert name == "spatial_svd" and form(name).n_params(layer.shape, rank) <= most
    assert form(name).n_params(layer.shape, rank + 1) > most or rank == 4


# sensitivities --------------------------------------------------------------------------------------------------------


def test_one_point_a_layer_scales_its_losses_to_what_was_measured():
    bench, menus = bench_of(net(), X)
    factors, measured = sensitivities(bench)
    assert set(measured) == {"l0", "l1", "l2"} and bench.judge.evaluations == 3
    middle = sorted(measured[n] / point(bench, n).loss for n in measured)[1]
    for m, own in zip(calibrated(menus, factors), menus, strict=True):
        name = m.layer.name
        exact = measured[name] / point(bench, name).loss
        assert factors[name] == pytest.approx(min(max(exact, middle / 30), middle * 30))
        assert [o.loss for o in m.options] == pytest.approx([factors[name] * o.loss for o in own.options])
        assert [o.loss for o in m.forms["svd"]] == pytest.approx([factors[name] * o.loss for o in own.forms["svd"]])
        assert [(o.form, o.rank, o.n_params, o.n_bytes) for o in m.options] == [
            (o.form, o.rank, o.n_params, o.n_bytes) for o in own.options
        ]


def point(bench, name):
    from lrcompress.plan.options import half_priced

    return half_priced(bench.menus[name].options)


def test_points_that_lie_far_off_and_points_that_are_no_number_are_not_believed(monkeypatch):
    bench, menus = bench_of(net(), X)
    given = dict(zip(("l0", "l1", "l2"), (1e9, 1.0, float("nan")), strict=True))
    monkeypatch.setattr(
        bench, "loss", lambda options: given[next(iter(options))] * point(bench, next(iter(options))).loss
    )
    factors, measured = sensitivities(bench)
    assert "l2" not in measured and all(math.isfinite(f) for f in factors.values())
    assert factors["l0"] / factors["l1"] <= 30**2 + 1e-6
    assert all(math.isfinite(o.loss) for m in calibrated(menus, factors) for o in m.options)


# the search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.4, 0.6, 0.85])
@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_a_search_keeps_the_budget_and_never_loses_more(share, unit):
    bench, menus = bench_of(net(), X, unit=unit)
    limit = int(share * sum(m.dense.cost(unit) for m in menus))
    start = allocate([m.options for m in menus], limit, unit)
    found = search(bench, menus, start, limit, unit, trials=8)
    names = [m.layer.name for m in menus]
    assert bench.judge.evaluations <= 9
    assert sum(o.cost(unit) for o in found.chosen) <= limit
    assert found.before == bench.loss(dict(zip(names, start.chosen, strict=True)))
    assert found.loss == bench.loss(dict(zip(names, found.chosen, strict=True))) <= found.before
    joint = jointly(replace(start, cost=-1, loss=-1.0), found, unit)
    assert joint.cost == sum(o.cost(unit) for o in found.chosen) and joint.loss == sum(o.loss for o in found.chosen)
    assert (joint.bound, joint.price, joint.chosen) == (start.bound, start.price, found.chosen)


class Told:
    """A bench whose losses are those of a table: the sum over layers of what it says of each option."""

    def __init__(self, truth):
        self.truth, self.asked = truth, 0

    def loss(self, options):
        self.asked += 1
        return sum(self.truth[name][o] for name, o in options.items())


def test_trades_that_pay_are_found_where_the_predictions_mislead():
    """Predicted alike, measured unlike: the search moves numbers to the layer that needs them."""
    sizes = (10, 18, 20, 22, 40)
    options = {n: tuple(Option(c, 40.0 - c, "dense" if c == 40 else "svd", c, 4 * c) for c in sizes) for n in "ab"}
    menus = [Menu(Layer(n, "linear", torch.zeros(8, 5)), own) for n, own in options.items()]
    weigh = {"a": 10.0, "b": 1.0}
    bench = Told({n: {o: weigh[n] * o.loss for o in own} for n, own in options.items()})
    start = replace(allocate([m.options for m in menus], 40), chosen=(options["a"][2], options["b"][2]))
    found = search(bench, menus, start, 40, "params")
    best = min(
        bench.loss({"a": p, "b": q}) for p, q in itertools.product(*options.values()) if p.n_params + q.n_params <= 40
    )
    assert found.loss < found.before and sum(o.n_params for o in found.chosen) <= 40
    assert found.loss <= 1.3 * best and found.chosen[0].n_params > found.chosen[1].n_params


def test_a_search_from_what_is_refused_ends_where_it_started():
    bench, menus = bench_of(net(), X)
    start = allocate([m.options for m in menus], 300)
    bench.loss = lambda options: None
    found = search(bench, menus, start, 300, "params")
    assert found.chosen == start.chosen and math.isnan(found.loss)
