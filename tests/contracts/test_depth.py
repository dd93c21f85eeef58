"""Folding, fitting in depth order and re-estimation: exact where they must be, better where they promise to be."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress.data import Data
from lrcompress.errors import LrcompressWarning
from lrcompress.factorize import form
from lrcompress.fit import Judge, apply_in_depth, read_batches, reestimated
from lrcompress.fit._moments import JointMoments, answers_of
from lrcompress.model import InputSpec, open_model
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.folding import fold_norms
from lrcompress.model.surgery import find_layers
from lrcompress.model.views.walk import patches, walk_of
from lrcompress.plan import Choice
from lrcompress.runtime import Session
from tests.support.residual import residual

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(192, 40, generator=torch.Generator().manual_seed(99)) / 40**0.5
    return (torch.randn(n, 40, generator=generator) @ mixing.T).reshape(n, 3, 8, 8)


def folded(net):
    opened = open_model(net)
    found = fold_norms(opened, net, {"x": images(2)}, {n.name: n for n in find_layers(net)})
    return opened, found


def test_folding_changes_the_parts_and_not_the_answers():
    net, x = residual(), images(8)
    before = net(x).detach()
    _, found = folded(net)
    assert found == {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3", "bn4": "down"}
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize("how", ["read elsewhere", "shared", "called twice"])
def test_what_cannot_be_folded_is_left(how):
    net = residual()
    if how == "read elsewhere":
        forward = net.forward
        net.forward = lambda x: forward(x) + net.conv1(x).sum() * 0
    elif how == "shared":
        net.bn2 = net.bn1
    else:
        net.forward = lambda x, f=net.forward: f(f(x)[:, :3, None, None].expand(-1, -1, 8, 8))
    kept = copy.deepcopy(net.state_dict())
    _, found = folded(net)
    assert "bn1" not in found
    assert all(torch.equal(kept[k], v) for k, v in net.state_dict().items() if k.startswith(("conv1", "bn1")))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 6, 5),
    ],
)  # fmt: skip
def test_joint_moments_of_convolutions(layer):
    """Equal those of explicit patches in float64, batch by batch merged, with a mean that is no small one."""
    size = (7,) if isinstance(layer, nn.Conv1d) else (7, 8)
    x = torch.randn(10, 4, *size, generator=torch.Generator().manual_seed(1)) + 3
    t = layer(x).detach() ** 2
    walk, moments = walk_of(layer), JointMoments()
    for part in (slice(0, 3), slice(3, 10)):
        moments.add(t[part], x[part], walk, None)
    drift = moments.drift()
    rows = patches(x.double(), walk)
    answers = t.double().movedim(1, -1).reshape(len(rows), -1)
    groups = layer.groups
    for g in range(groups):
        p = rows.reshape(len(rows), groups, -1)[:, g]
        a = answers.reshape(len(rows), groups, -1)[:, g]
        pick = (lambda v, g=g: v[g]) if groups > 1 else (lambda v: v)
        pc, ac = p - p.mean(0), a - a.mean(0)
        torch.testing.assert_close(pick(drift.drifted), pc.T @ pc / len(p), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pick(drift.cross), ac.T @ pc / len(p), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(pick(drift.answers), ac.T @ ac / len(p), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(pick(drift.answer_mean), a.mean(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Linear(4, 6)])
def test_other_answers_to_the_same_inputs(layer):
    """Moments of new answers over kept inputs equal those of a fresh pass; a batch of padding only counts for nothing."""
    generator = torch.Generator().manual_seed(2)
    linear = isinstance(layer, nn.Linear)
    size = (9, 4) if linear else (4, 6, 6)
    reads = [torch.randn(n, *size, generator=generator) + 2 for n in (3, 2, 5)]
    walk = None if linear else walk_of(layer)
    masks = (
        [torch.ones(3, 9).bool(), torch.zeros(2, 9).bool(), torch.rand(5, 9, generator=generator) > 0.3]
        if linear
        else [None] * 3
    )
    first, fresh = JointMoments(), JointMoments()
    for x, mask in zip(reads, masks, strict=True):
        with torch.no_grad():
            first.add(layer(x), x, walk, mask)
            fresh.add(layer(x).relu() - x.mean(), x, walk, mask)
    with torch.no_grad():
        others = [answers_of(layer(x).relu() - x.mean(), x, walk, m) for x, m in zip(reads, masks, strict=True)]
    again = first.answering(others)
    for name in ("drifted", "drifted_mean", "cross", "answers", "answer_mean"):
        torch.testing.assert_close(getattr(again.drift(), name), getattr(fresh.drift(), name), rtol=1e-9, atol=1e-9)


def test_joint_moments_leave_padding_out():
    x, t = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    moments = JointMoments()
    moments.add(t, x, None, mask)
    a, b = t[mask].double(), x[mask].double()
    expected = (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
    torch.testing.assert_close(moments.drift().cross, expected, rtol=1e-5, atol=1e-6)


def in_depth(choices, data, **how):
    net = residual()
    opened, _ = folded(net)
    layers = [n for n in find_layers(net) if n.reason is None]
    changed = copy.deepcopy(net)
    made = apply_in_depth(opened, net, changed, layers, choices(layers), {}, data, **how)
    return opened, net, changed, made


def test_full_ranks_change_no_answer():
    data = Data.of_arrays({"x": images(64).numpy()})
    full = lambda layers: {n.name: Choice(n.name, "svd", min(n.shape[0], n.columns), 0) for n in layers}  # noqa: E731
    _, net, changed, made = in_depth(full, data)
    x = images(16, seed=5)
    torch.testing.assert_close(changed(x), net(x), rtol=1e-3, atol=1e-3)
    assert all(f.factors is not None for f in made.values()) and len(made) == 5


def test_layers_that_stay_dense_make_up_for_the_others():
    """Only the first layer is factorized; refitting the rest loses less than leaving them."""
    data = Data.of_arrays({"x": images(256).numpy()})

    def first(layers):
        return {
            n.name: Choice(n.name, "svd" if n.name == "conv1" else "dense", 4 if n.name == "conv1" else 0, 0)
            for n in layers
        }

    opened, net, changed, made = in_depth(first, data)
    judge = Judge(opened, net, [{"x": images(256, seed=7)}])
    alone = copy.deepcopy(net)
    from lrcompress.model.surgery import replace_layer

    replace_layer(alone, "conv1", made["conv1"].factors)
    assert judge.loss(changed) < 0.9 * judge.loss(alone)
    assert [n for n, f in made.items() if f.factors is None] == ["conv2", "conv3", "down", "linear"]


def test_depth_order_beats_layers_by_themselves_on_held_out_inputs():
    train, held = Data.of_arrays({"x": images(512).numpy()}), images(512, seed=11)
    losses = {}
    for anchor in (True, False):
        found = lrcompress.factorize(residual(), ratio=0.45, calib=train, anchor=anchor, cache=False)
        assert found.data["params_after"] <= 0.45 * found.data["params_before"]
        losses[anchor] = Judge(open_model(residual()), residual(), [{"x": held}]).loss(found.model)
    assert losses[True] < 0.8 * losses[False], losses


def test_layers_that_the_user_left_out_keep_their_bytes():
    net = residual()
    data = Data.of_arrays({"x": images(64).numpy()})
    found = lrcompress.factorize(net, ratio=0.8, calib=data, exclude=["linear", "down"], cache=False)
    for name in ("linear", "down"):
        assert torch.equal(found.model.get_submodule(name).weight, net.get_submodule(name).weight)
    # A layer that is left out keeps its normalization too.
    assert isinstance(found.model.bn4, nn.BatchNorm2d) and isinstance(found.model.bn3, nn.Identity)


def test_from_weights_through_depth_order_to_the_runtime(tmp_path):
    torch.save(residual().state_dict(), tmp_path / "m.pt")
    data, x = Data.of_arrays({"x": images(128).numpy()}), images(9, seed=3)
    how = {"ratio": 0.5, "calib": data, "inputs": SPEC, "arch": "tests.support.residual:residual", "cache": False}
    made = lrcompress.factorize(tmp_path / "m.pt", **how, output=tmp_path / "c")
    again = lrcompress.factorize(tmp_path / "m.pt", **how, output=tmp_path / "d")
    one, two = ((tmp_path / f / "model.safetensors").read_bytes() for f in "cd")
    assert one == two and made.data["layers"] == again.data["layers"]
    compressed = load_compressed(tmp_path / "c")
    assert compressed.spec["folded"] == {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3", "bn4": "down"}
    assert not any("bn" in name for name in compressed.module.state_dict())
    with torch.no_grad():
        expected = made.model(x)
        assert torch.equal(compressed.module(x), expected)
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    np.testing.assert_allclose(
        Session(tmp_path / "e").run({"x": x.numpy()})["output"], expected.numpy(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("off", [True, False])
def test_normalizations_are_estimated_again_only_where_that_helps(off):
    net, data = residual(), Data.of_arrays({"x": images(256).numpy()})
    opened = open_model(net)
    reestimated(opened, net, net, data, [{"x": images(4)}])
    with torch.no_grad():  # a network whose statistics are those of the data
        changed = copy.deepcopy(net)
        for m in (net, changed):
            for part in m.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.reset_running_stats()
                    part.momentum = None
            m.train()
            m(images(256))
            m.eval()
        if off:
            changed.conv2.weight.mul_(1.7)
    kept = copy.deepcopy(changed.state_dict())
    judged = read_batches(Data.of_arrays({"x": images(64, seed=2).numpy()}), 32)
    assert reestimated(opened, net, changed, data.take(slice(0, 32)) if not off else data, judged) is off
    same = all(torch.equal(kept[k], v) for k, v in changed.state_dict().items())
    assert same is not off


class Leaky(nn.Module):
    """A kernel that `pivoted_spatial` refuses: its terms live at one tap each."""

    def __init__(self):
        super().__init__()
        self.first, self.leaky = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        g = torch.Generator().manual_seed(0)
        second = torch.randn(8, 4, 3, generator=g)
        second[:, :3] *= torch.eye(3)
        with torch.no_grad():
            self.leaky.weight.copy_(torch.einsum("rih,orw->oihw", torch.randn(4, 6, 3, generator=g), second) / 4)

    def forward(self, x):
        return self.leaky(torch.tanh(self.first(x))).mean((2, 3))


def test_a_refused_form_falls_back_and_the_report_says_so(tmp_path):
    torch.manual_seed(0)
    plan = {"schema": 1, "layers": [{"name": "leaky", "form": "pivoted_spatial", "rank": 4}]}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    data = Data.of_arrays({"x": images(64).numpy()})
    made = lrcompress.factorize(Leaky().eval(), plan=tmp_path / "p.json", calib=data, cache=False)
    row, layer = {n["name"]: n for n in made.data["layers"]}["leaky"], made.model.leaky
    stored = sum(t.numel() for t in layer.factors.values() if t.is_floating_point())
    most = form("pivoted_spatial").n_params((8, 6, 3, 3), 4)
    assert (layer.form, layer.rank) == (row["form"], row["rank"]) and row["form"] == "spatial_svd"
    assert stored == row["params_after"] <= most


def texts(n, seed=0):
    """Ids that follow each other, and masks of which some pad nothing."""
    g = torch.Generator().manual_seed(seed)
    ids = (torch.randint(0, 50, (n, 1), generator=g) + torch.randint(1, 4, (n, 1), generator=g) * torch.arange(8)) % 50
    lengths = torch.where(torch.rand(n, generator=g) < 0.5, 8, torch.randint(2, 9, (n,), generator=g))
    return ids.numpy(), (torch.arange(8) < lengths[:, None]).long().numpy()


def transformer():
    from tests.contracts.test_lockstep_hard import bert

    net = bert()
    with torch.no_grad():
        for layer in find_layers(net):
            layer.weight.mul_(8)  # answers that turn, as trained networks give
    return net


@pytest.mark.parametrize("how", [{"ratio": 0.6, "exclude": ["*embeddings*"]}, {"rank": 6}])
def test_a_transformer_is_fitted_along_its_residual_stream(how):
    """Padded or not, with embeddings dense or factorized before: depth order wins on texts it never saw."""
    spec = tuple(InputSpec(n, "int64", ("b", "s")) for n in ("input_ids", "attention_mask"))
    named = lambda t: dict(zip(("input_ids", "attention_mask"), t, strict=True))  # noqa: E731
    data, held = Data.of_arrays(named(texts(400))), named(map(torch.as_tensor, texts(300, 5)))
    losses = {}
    for anchor in (True, False):
        made = lrcompress.factorize(
            transformer(), method="svd", calib=data, anchor=anchor, inputs=spec, quick=True, cache=False, **how
        )
        losses[anchor] = Judge(open_model(transformer()), transformer(), [held]).loss(made.model)
    assert losses[True] < 0.9 * losses[False], losses


def test_full_ranks_change_no_answer_of_a_transformer():
    net = transformer()
    opened, layers = open_model(net), [n for n in find_layers(net) if n.kind == "linear"]
    data = Data.of_arrays(dict(zip(("input_ids", "attention_mask"), texts(64), strict=True)))
    changed = copy.deepcopy(net)
    full = {n.name: Choice(n.name, "svd", min(n.shape), 0) for n in layers}
    made = apply_in_depth(opened, net, changed, layers, full, {}, data)
    ids, mask = map(torch.as_tensor, texts(20, 3))
    with torch.no_grad():
        torch.testing.assert_close(changed(ids, mask)[0], net(ids, mask)[0], rtol=1e-3, atol=1e-3)
    assert len(made) == 12


@pytest.mark.parametrize("count", [1, 2, 9])
def test_few_samples_are_enough_to_run(count):
    data = Data.of_arrays({"x": images(count).numpy()})
    with pytest.warns(LrcompressWarning, match="fewer positions"):
        found = lrcompress.factorize(residual(), ratio=0.6, calib=data, cache=False)
    assert found.data["params_after"] <= 0.6 * found.data["params_before"]
    assert all(torch.isfinite(p).all() for p in found.model.parameters())


def test_a_program_is_fitted_in_depth_order_like_its_module(tmp_path):
    program = torch.export.export(residual(), (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "m.pt2")
    data, held = Data.of_arrays({"x": images(256).numpy()}), images(256, seed=11)
    losses = {}
    for anchor in (True, False):
        found = lrcompress.factorize(tmp_path / "m.pt2", ratio=0.5, calib=data, anchor=anchor, cache=False)
        losses[anchor] = Judge(open_model(residual()), residual(), [{"x": held}]).loss(found.model)
    assert losses[True] < 0.95 * losses[False], losses  # its normalizations are not folded
