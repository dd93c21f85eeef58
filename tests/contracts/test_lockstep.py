"""Two networks side by side: what a stop shows is what plain runs give, and nothing stays behind afterwards."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from torch import nn

from lrcompress.errors import ModelError
from lrcompress.model import open_model
from lrcompress.model.lockstep import at_stop, flow_of, lockstep
from lrcompress.threads import Threads
from tests.support.residual import residual

NAMES = ["conv1", "conv2", "conv3", "down", "linear"]


def samples(n=6, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def inputs_of(net, x, names=NAMES):
    """Return what each layer reads and answers in a plain run."""
    seen = {}
    handles = [
        net.get_submodule(n).register_forward_hook(
            lambda _m, a, out, n=n: seen.update({n: (a[0].clone(), out.clone())})
        )
        for n in names
    ]
    with torch.no_grad():
        net(x)
    for h in handles:
        h.remove()
    return seen


def test_the_flow_of_a_residual_network():
    net = residual()
    flow = flow_of(open_model(net), net, {"x": samples(2)}, NAMES)
    assert flow.calls == tuple(NAMES) == flow.once
    # Normalizations stand between layers and sums: nothing is added to a layer's own answer yet.
    assert not flow.additions and not flow.ahead and not flow.rectified
    for n in ("bn1", "bn2", "bn3", "bn4"):
        setattr(net, n, nn.Identity())
    flow = flow_of(open_model(net), net, {"x": samples(2)}, NAMES)
    assert set(flow.additions) == {"conv2", "down"} and set(flow.ahead) == {"conv3"}
    assert flow.rectified == {"conv1", "conv2", "conv3", "down"}


def bare(seed=0):
    net = residual(seed)
    for n in ("bn1", "bn2", "bn3", "bn4"):
        setattr(net, n, nn.Identity())
    return net


def values(pair):
    return [pair.clean, pair.drifted, pair.answer, *(pair.beside or ())]


@pytest.mark.parametrize("threads", [1, 2])
def test_stops_show_what_plain_runs_give_and_follow_what_was_changed(threads):
    net, x = bare(), samples()
    changed = copy.deepcopy(net)
    flow = flow_of(open_model(net), net, {"x": x[:2]}, NAMES)
    clean = inputs_of(net, x)
    order = []
    for stop in lockstep(
        open_model(net), net, changed, [{"x": x[:3]}, {"x": x[3:]}], flow, flow.once, Threads(threads)
    ):
        order.append(stop.layer)
        reference = copy.deepcopy(net)
        with torch.no_grad():
            for n in order[:-1]:
                reference.get_submodule(n).weight.mul_(1.5)
        drifted, pairs = inputs_of(reference, x), list(stop.pairs())
        torch.testing.assert_close(torch.cat([p.clean for p in pairs]), clean[stop.layer][0])
        torch.testing.assert_close(torch.cat([p.answer for p in pairs]), clean[stop.layer][1])
        torch.testing.assert_close(torch.cat([p.drifted for p in pairs]), drifted[stop.layer][0])
        if stop.layer in ("conv2", "conv3", "down"):
            name = {"conv2": None, "conv3": "down", "down": "conv3"}[stop.layer]
            for k, run in enumerate((clean, drifted)):
                beside = torch.cat([p.beside[k] for p in pairs])
                torch.testing.assert_close(beside, run["conv2"][0] if name is None else run[name][1])
        else:
            assert all(p.beside is None for p in pairs)
        for few, all_of in zip(stop.pairs(0.4), pairs, strict=True):
            n = math.ceil(0.4 * len(all_of.clean))
            for part, whole in zip(values(few), values(all_of), strict=True):
                assert part.shape[0] == n < len(whole)
                torch.testing.assert_close(part, whole[:n])
        with torch.no_grad():
            changed.get_submodule(at_stop(stop.layer)).weight.mul_(1.5)
    assert order == NAMES
    with torch.no_grad():
        for n in NAMES:
            reference.get_submodule(n).weight.copy_(net.get_submodule(n).weight * 1.5)
        torch.testing.assert_close(changed(x), reference(x))
    assert [type(m).__name__ for m in changed.children()] == [type(m).__name__ for m in net.children()]


def test_what_a_rectifier_forgives():
    net, x = bare(), samples()
    changed = copy.deepcopy(net)
    flow = flow_of(open_model(net), net, {"x": x[:2]}, NAMES)
    for stop in lockstep(open_model(net), net, changed, [{"x": x}], flow, flow.once):
        [pair] = stop.pairs()
        said = pair.answer + 0.3
        wanted = pair.wanted(said)
        other = (0.0, 0.0) if pair.beside is None else pair.beside
        cut = pair.answer + other[0] <= 0
        torch.testing.assert_close((wanted + other[1])[~cut], (pair.answer + other[0])[~cut])
        # Where the network's sum is cut off, the copy's must only not be above zero.
        assert float((wanted + other[1])[cut].max()) <= 1e-6
        near = (said + other[1] <= 0) & cut
        assert torch.equal(wanted[near], said[near])


def test_nothing_stays_behind_an_abandoned_run_or_an_error():
    net, x = bare(), samples()
    changed, before = copy.deepcopy(net), threading.active_count()
    opened, flow = open_model(net), flow_of(open_model(net), net, {"x": x[:2]}, NAMES)
    run = lockstep(opened, net, changed, [{"x": x}, {"x": x}], flow, flow.once)
    next(run)
    next(run)
    run.close()

    def broken(_m, _a, _out):
        raise ValueError("the model's own")

    handle = changed.conv3.register_forward_hook(broken)
    with pytest.raises(ValueError, match="the model's own"):
        for _ in lockstep(opened, net, changed, [{"x": x}], flow, flow.once):
            pass
    handle.remove()
    assert threading.active_count() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*net.modules(), *changed.modules()))
    assert torch.equal(net(x), changed(x))


class Moody(nn.Module):
    """Calls its layers in an order that the data decide."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.a(self.b(x))


def test_layers_whose_order_depends_on_the_data_are_refused():
    net, ones = Moody().eval(), torch.ones(2, 4)
    flow = flow_of(open_model(net), net, {"x": ones}, ["a", "b"])
    with pytest.raises(ModelError, match="depend on the data"):
        list(lockstep(open_model(net), net, copy.deepcopy(net), [{"x": ones}, {"x": -ones}], flow, flow.once))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x)))


def test_a_layer_that_is_called_twice_is_no_stop():
    net = Twice().eval()
    flow = flow_of(open_model(net), net, {"x": torch.ones(2, 4)}, ["a", "b"])
    assert flow.calls == ("a", "a", "b") and flow.once == ("b",)
