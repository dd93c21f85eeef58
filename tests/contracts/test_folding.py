"""Folding normalizations: exact in numbers, left alone wherever somebody would notice, found again in a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lrcompress.model import open_model
from lrcompress.model.folding import fold_norms, refold
from lrcompress.model.surgery import find_layers
from lrcompress.model.ties import lift_ties

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4), (5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), lambda: nn.BatchNorm1d(4), (5, 6)),
    "1d": (lambda: nn.Conv1d(6, 4, 3, bias=False), lambda: nn.BatchNorm1d(4), (2, 6, 9)),
    "2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), lambda: nn.BatchNorm2d(4), (2, 6, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), lambda: nn.BatchNorm2d(4), (2, 6, 5, 5)),
    "3d": (lambda: nn.Conv3d(6, 4, 2), lambda: nn.BatchNorm3d(4), (2, 6, 3, 4, 3)),
    "not affine": (lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4, affine=False), (5, 6)),
}


def settled(net, seed=0):
    """Give every normalization statistics and gains that are far from those of a new one."""
    g = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.copy_(torch.randn(m.num_features, generator=g))
            m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.2)
            if m.affine:
                with torch.no_grad():
                    m.weight.copy_(torch.randn(m.num_features, generator=g))
                    m.bias.copy_(torch.randn(m.num_features, generator=g))
    return net.eval()


def fold(net, x):
    layers, _ = lift_ties(net, find_layers(net))
    return fold_norms(open_model(net), net, {"x": x}, {n.name: n for n in layers})


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_folded_to_the_same_answers(name):
    torch.manual_seed(0)
    layer, norm, shape = LAYERS[name]
    net, x = settled(nn.Sequential(layer(), norm(), nn.ReLU())), torch.randn(shape)
    with torch.no_grad():
        expected = copy.deepcopy(net).double()(x.double())
        assert fold(net, x) == {"1": "0"}
        torch.testing.assert_close(net(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert type(net[1]) is nn.Identity and net[0].bias is not None


class Two(nn.Module):
    """Two layers with a normalization each, put together in the ways of the tests."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.na, self.nb, self.way = nn.BatchNorm1d(4), nn.BatchNorm1d(4), way
        if way == "tied":
            self.b.weight = self.a.weight
        if way == "one norm":
            self.nb = self.na
        if way == "no statistics":
            self.na = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        y = self.a(x)
        if self.way == "told":
            return {"early": y, "output": self.nb(self.b(self.na(y)))}
        if self.way == "read by an operation":
            return self.nb(self.b(self.na(y))) + y.mean()
        if self.way == "read by a layer":
            return self.nb(self.b(y)) + self.na(y)
        if self.way == "work between":
            y = torch.relu(y)
        if self.way == "in place between":
            y = torch.relu_(y)
        if self.way == "layer twice":
            return self.nb(self.b(self.na(self.a(y))))
        if self.way == "norm twice":
            return self.nb(self.b(self.na(self.na(y))))
        if self.way == "a copy":
            y = y.clone()
        return self.nb(self.b(self.na(y)))


@pytest.mark.parametrize(
    "way",
    [
        "told", "read by an operation", "read by a layer", "work between", "in place between", "layer twice", "norm twice",
        "a copy", "one norm", "no statistics", "tied",
    ],
)  # fmt: skip
def test_nothing_is_folded_that_somebody_else_reads(way):
    torch.manual_seed(0)
    net, x = settled(Two(way)), torch.randn(7, 4)
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    opened, before = open_model(net), sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        expected = {k: v.clone() for k, v in opened.outputs(net, {"x": x}).items()}
        found = fold(net, x)
        for name, value in opened.outputs(net, {"x": x}).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert "na" not in found
    assert all(torch.equal(kept[k], v) for k, v in net.state_dict().items() if k.startswith(("a.", "na.")))
    assert sum(p.numel() for p in net.parameters()) <= before, "folding stores no more numbers"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_layer_that_must_stay_as_it_is_keeps_its_normalization():
    torch.manual_seed(0)
    net, x = settled(Two("")), torch.randn(7, 4)
    layers = find_layers(net)
    kept = {n.name: n if n.name == "b" else replace(n, reason="in --exclude") for n in layers}
    assert fold_norms(open_model(net), net, {"x": x}, kept) == {"nb": "b"}


def test_a_layer_by_keyword_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.n(input=self.a(input=x))

    torch.manual_seed(0)
    net, x = settled(Named()), torch.randn(5, 4)
    with torch.no_grad():
        expected = net(x).clone()
        assert fold(net, x) == {"n": "a"}
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


def test_the_same_places_are_made_in_a_network_yet_to_be_filled():
    torch.manual_seed(0)
    net, x = settled(Two("")), torch.randn(7, 4)
    fresh = Two("").eval()
    found = fold(net, x)
    assert found == {"na": "a", "nb": "b"}
    refold(fresh, found)
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), net(x))
    with pytest.raises(AttributeError):
        refold(Two(""), {"nowhere": "a"})
    with pytest.raises(AttributeError):
        refold(Two(""), {"na": "nowhere"})
