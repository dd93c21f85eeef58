"""Joint moments of what layers see and answer, and normalizations estimated anew: exact, in any order, padding left out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lrcompress.data import Data
from lrcompress.factorize import Statistics
from lrcompress.fit import Judge, read_batches, reestimated
from lrcompress.fit._moments import JointMoments
from lrcompress.model import open_model
from lrcompress.model.surgery import Layer
from lrcompress.model.views.walk import patches, walk_of
from lrcompress.plan import menus_of
from tests.support.weights import randn

# joint moments --------------------------------------------------------------------------------------------------------


def explicit(t, x):
    t, x = t.double(), x.double()
    a, b, n = t - t.mean(0), x - x.mean(0), len(x)
    return b.T @ b / n, x.mean(0), a.T @ b / n, a.T @ a / n, t.mean(0)


def same(drift, expected, **tolerance):
    found = (drift.drifted, drift.drifted_mean, drift.cross, drift.answers, drift.answer_mean)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **tolerance)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_moments_of_rows_merge_in_any_order(order):
    x, t = randn(400, 9) + 2, randn(400, 5, seed=2) + randn(400, 9) @ randn(9, 5, seed=3) - 3
    cuts = [slice(0, 1), slice(1, 150), slice(150, 151), slice(151, 400)]
    whole, copies = JointMoments(), []
    for i in order:
        part = JointMoments()
        part.add(t[cuts[i]], x[cuts[i]], None, None)
        copies.append((i, part.copy()))
        whole.merge(part)
    same(whole.drift(), explicit(t, x), rtol=1e-9, atol=1e-9)
    for i, kept in copies:
        same(kept.drift(), explicit(t[cuts[i]], x[cuts[i]]), rtol=1e-9, atol=1e-9)


def test_batches_in_which_all_is_padding_change_nothing():
    x, t, mask = randn(4, 5, 3), randn(4, 5, 2, seed=1), torch.zeros(4, 5, dtype=torch.bool)
    moments = JointMoments()
    moments.add(t, x, None, mask)
    some = mask.clone()
    some[1:, :3] = True
    moments.add(t, x, None, some)
    moments.add(t, x, None, mask)
    same(moments.drift(), explicit(t[some], x[some]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision_are_summed_in_more(dtype):
    x, t = (randn(3000, 6) + 4).to(dtype), (randn(3000, 4, seed=1) + 2).to(dtype)
    t = (t.double() + x.double() @ randn(6, 4, seed=2)).to(dtype)
    moments = JointMoments()
    moments.add(t, x, None, None)
    same(moments.drift(), explicit(t, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", dilation=2), nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), nn.Conv2d(4, 6, 1), nn.Conv3d(4, 6, 2, padding=1), nn.Conv1d(4, 6, 4, stride=3),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_of_patches_lose_no_digits_to_a_mean(layer, offset):
    """A mean of a thousand deviations: products of what is not centred would lose six digits of seven."""
    axes = len(layer.kernel_size)
    x = torch.randn(6, 4, *(7, 8, 6)[:axes], generator=torch.Generator().manual_seed(1)) + offset
    with torch.no_grad():
        t = torch.tanh(layer(x - offset)) + offset
    walk, moments = walk_of(layer), JointMoments()
    parts = [JointMoments() for _ in range(3)]
    for part, cut in zip(parts, (slice(0, 1), slice(1, 4), slice(4, 6)), strict=True):
        part.add(t[cut], x[cut], walk, None)
    for i in (2, 0, 1):
        moments.merge(parts[i])
    drift, groups = moments.drift(), layer.groups
    rows = patches(x.double(), walk)
    rows = rows.reshape(len(rows), groups, -1)
    answers = t.double().movedim(1, -1).reshape(len(rows), groups, -1)
    for g in range(groups):
        expected = explicit(answers[:, g], rows[:, g])
        found = (drift.drifted, drift.drifted_mean, drift.cross, drift.answers, drift.answer_mean)
        p, a = (float(expected[i].diagonal().max()) ** 0.5 for i in (0, 3))  # deviations, borders of zeros included
        for f, e, scale in zip(found, expected, (p * p, p + offset, p * a, a * a, a + offset), strict=True):
            torch.testing.assert_close(f[g] if groups > 1 else f, e, rtol=0, atol=5e-6 * scale)


# norms ----------------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A normalization of its input, which nothing can be folded into."""

    def __init__(self):
        super().__init__()
        self.n, self.l = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.l(self.n(x))


@pytest.mark.parametrize("count", [1, 2, 128, 129, 257])
def test_any_number_of_samples_estimates_or_leaves_alone(count):
    """A last batch of one sample has no variance: it must not end the run."""
    torch.manual_seed(0)
    original = Normed().eval()
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(2)) * 2 + 1
    opened, changed = open_model(original), copy.deepcopy(original)
    changed.n.running_mean.add_(0.7)
    judged = [{"x": x}]
    before = Judge(opened, original, judged)
    had, kept = before.loss(changed), copy.deepcopy(changed.state_dict())
    done = reestimated(opened, original, changed, Data.of_arrays({"x": x.numpy()}), judged)
    assert not changed.training and not changed.n.training and changed.n.momentum == original.n.momentum
    if done:
        assert before.loss(changed) < had
    else:
        assert all(torch.equal(kept[k], v) for k, v in changed.state_dict().items())
    if count >= 128:
        reference = copy.deepcopy(original)
        with torch.no_grad():
            reference.n.running_mean.copy_(x.mean(0))
        torch.testing.assert_close(changed.n.running_mean if done else x.mean(0), x.mean(0), rtol=0, atol=0.2)


def test_evenly_read_batches_are_all_the_data():
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    found = read_batches(Data.of_arrays({"x": x}), 4)
    assert [len(b["x"]) for b in found] == [4, 4, 2]
    assert torch.equal(torch.cat([b["x"] for b in found]), torch.as_tensor(x))


def test_statistics_of_the_output_side_decide_what_is_chosen():
    """With output moments in hand losses are compared as they are, without them relative to each layer's energy."""
    layers = [Layer(n, "linear", randn(8, 10, seed=i)) for i, n in enumerate("ab")]
    stats = {n: Statistics(output_gram=(100.0 if n == "a" else 1.0) * torch.eye(8, dtype=torch.float64)) for n in "ab"}
    two, alone = menus_of(layers, "svd", stats), menus_of(layers, "svd", {})
    ratio = two[0].options[0].loss / two[1].options[0].loss
    assert ratio == pytest.approx(100 * float(tail(layers[0]) / tail(layers[1])), rel=1e-6)
    assert alone[0].options[0].loss == pytest.approx(float(tail(layers[0]) / layers[0].weight.square().sum()), rel=1e-6)


def test_a_bias_for_the_mean_is_part_of_what_an_option_costs():
    bare = Layer("a", "linear", randn(32, 48).float(), has_bias=False)
    stats = {"a": Statistics(gram=torch.eye(48, dtype=torch.float64), mean=torch.ones(48, dtype=torch.float64))}
    [with_mean], [without] = menus_of([bare], "svd", stats), menus_of([bare], "svd", {})
    pairs = [(a, b) for a in with_mean.options for b in without.options if a.form != "dense" and a.rank == b.rank]
    assert pairs and all(a.n_params == b.n_params + 32 and a.n_bytes == b.n_bytes + 128 for a, b in pairs)


def tail(layer):
    return torch.linalg.svdvals(layer.weight)[1:].square().sum()
