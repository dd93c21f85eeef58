"""Statistics are the moments they say they are: of real positions, without cancellation, from any batching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrcompress.calibrate import Moments, collect, patches
from lrcompress.calibrate.batches import BATCH_BYTES, Batches, Order
from lrcompress.calibrate.gradients import cotangent
from lrcompress.calibrate.moments import gram, product
from lrcompress.calibrate.patch_moments import patch_moments
from lrcompress.data import Data
from lrcompress.errors import DataError, LrcompressWarning, ModelError
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import find_layers
from lrcompress.model.views import Walk, walk_of


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.out = nn.Embedding(9, 6), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, ids, attention_mask):
        x = self.embed(ids)
        h = torch.relu_(self.q(x)) * self.k(x)  # in place: the hooks must not mind
        h = (h * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.out(h)


def text(n=40):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    mask = (np.arange(5) < rng.integers(2, 6, (n, 1))).astype(np.int64)
    ids = rng.integers(1, 8, (n, 5)) * mask
    opened = open_model(
        Text(), inputs=(InputSpec("ids", "int64", ("b", "s")), InputSpec("attention_mask", "int64", ("b", "s")))
    )
    return opened, Data.of_arrays({"ids": ids, "attention_mask": mask}), ids, mask


def gather(opened, data, **options):
    return collect(opened, opened.module, data, find_layers(opened.module), **options)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_padding_is_left_out_whatever_the_batches(batch_size):
    opened, data, ids, mask = text()
    stats = gather(opened, data, batch_size=batch_size)
    x = opened.module.embed.weight.detach().double()[torch.as_tensor(ids)][torch.as_tensor(mask).bool()]
    mean = x.mean(0)
    for name in ("q", "k"):
        torch.testing.assert_close(stats[name].mean, mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(stats[name].gram, (x - mean).T @ (x - mean) / len(x), rtol=1e-5, atol=1e-7)
        assert stats[name].count == len(x) and stats[name].positions == pytest.approx(len(x) / 40)
    counts = np.bincount(ids[mask.astype(bool)], minlength=9)
    weights = counts + 0.01 * counts.mean()
    np.testing.assert_allclose(stats["embed"].row_weights.numpy(), weights / weights.sum(), rtol=1e-12)


def test_output_gradients_are_those_of_the_answer():
    """tr(G) at the last layer is known: the probe is Gaussian, the answer is centred over its 3 entries."""
    opened, data, _, _ = text(500)
    stats = gather(opened, data, seed=1)
    centred = torch.eye(3, dtype=torch.float64) - 1 / 3
    assert float((stats["out"].output_gram - centred).norm()) < 0.15  # 500 samples of a Gaussian: about 0.08
    assert stats["out"].norm == "two_sided"
    again = gather(opened, data, seed=1)
    assert torch.equal(stats["q"].output_gram, again["q"].output_gram)
    assert gather(opened, data, gradient_samples=0)["q"].output_gram is None


def test_calibration_changes_nothing_in_the_model():
    opened, data, _, _ = text()
    before = {k: v.clone() for k, v in opened.module.state_dict().items()}
    gather(opened, data)
    assert all(torch.equal(v, before[k]) for k, v in opened.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in opened.module.parameters())
    assert not any(m._forward_hooks for m in opened.module.modules())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv1d(3, 4, 4, padding="same"),
    ],
)  # fmt: skip
def test_patches_are_what_the_convolution_reads(layer):
    layer = layer.double()
    x = torch.randn(2, 3, *(9,) * len(layer.kernel_size), dtype=torch.float64)
    y = patches(x, walk_of(layer)) @ layer.weight.flatten(1).T + layer.bias
    expected = layer(x).movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(y, expected)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and layer.padding != "same":
        unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        torch.testing.assert_close(patches(x, walk_of(layer)), unfolded.reshape(-1, unfolded.shape[-1]))


def test_moments_lose_no_digits_far_from_zero():
    """A mean a million times the deviation: sums of squares in float64 would keep 4 digits, the merge keeps 10."""
    g = torch.Generator().manual_seed(0)
    x = 1e6 + torch.randn(50_000, 3, generator=g, dtype=torch.float64)
    m = Moments()
    for part in x.split(997):
        m.add(part)
    exact = (x - x.mean(0)).T @ (x - x.mean(0))
    torch.testing.assert_close(m.second, exact, rtol=1e-9, atol=1e-5)
    torch.testing.assert_close(m.mean, x.mean(0), rtol=1e-14, atol=0)
    assert m.count == len(x)


def test_float32_activations_with_a_large_mean_are_centred_before_they_are_squared():
    g = torch.Generator().manual_seed(0)
    x = (1000 + torch.randn(20_000, 2, generator=g)).float()
    m = Moments()
    for part in x.split(512):
        m.add(part)
    d = x.double() - x.double().mean(0)
    torch.testing.assert_close(m.second / m.count, d.T @ d / len(x), rtol=2e-5, atol=1e-5)


def test_layers_with_one_input_share_one_accumulator_and_others_do_not():
    opened, data, _, _ = text()
    stats = gather(opened, data)
    assert torch.equal(stats["q"].gram, stats["k"].gram) and stats["q"].count == stats["k"].count
    assert not torch.allclose(stats["q"].gram[:4, :4], stats["out"].gram)


def test_no_data_and_activations_that_explode_are_refused():
    opened, data, _ids, _mask = text()
    with pytest.raises(DataError, match="at least one sample"):
        gather(opened, data.take(slice(0, 0)))
    with torch.no_grad():
        opened.module.embed.weight[1] = 3e38
        opened.module.q.weight.fill_(10.0)
    with pytest.raises(DataError, match="finite"):
        gather(opened, data)


WALKS = st.builds(
    lambda kernel, dilation, pads, stride, groups: (kernel, dilation, pads, stride, groups),
    st.tuples(st.integers(2, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.tuples(st.integers(0, 2), st.integers(0, 3)), st.tuples(st.integers(0, 2), st.integers(0, 1))),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
)


@given(WALKS, st.sampled_from(["zeros", "reflect", "replicate"]), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_shifted_products_are_the_moments_of_the_patches(shape, mode, extra):
    kernel, dilation, pads, stride, groups = shape
    walk = Walk(kernel, (1, stride), dilation, pads, mode=mode, groups=groups)
    size = [d * (k - 1) + 1 + extra for k, d in zip(kernel, dilation, strict=True)]
    if mode == "reflect" and any(max(p) >= n for p, n in zip(pads, size, strict=True)):
        return
    g = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(2, 4, *size, generator=g, dtype=torch.float64)
    rows = patches(x, walk)
    rows = rows if groups == 1 else rows.reshape(len(rows), groups, -1).movedim(1, 0)
    found, mean = patch_moments(x, walk), rows.mean(-2)
    d = rows - mean.unsqueeze(-2)
    assert found.count == rows.shape[-2]
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.second, d.mT @ d, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 5, padding=2), nn.Conv3d(2, 3, (2, 3, 2), padding=1)])
def test_other_axes_are_shifted_alike(layer):
    x = torch.randn(2, layer.in_channels, *(6,) * len(layer.kernel_size), dtype=torch.float64)
    rows, found = patches(x, walk_of(layer)), patch_moments(x, walk_of(layer))
    torch.testing.assert_close(found.second, torch.cov(rows.T, correction=0) * len(rows), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_tokens_lose_no_digits_in_any_order_of_shards(dtype):
    """The reference is whole-number arithmetic: values are multiples of a unit, their sums of squares fit 63 bits."""
    rng = np.random.default_rng(0)
    n = 1_000_000
    step, centre = (1 / 64, 64_000) if dtype == torch.float32 else (8.0, 160)
    k = centre + rng.integers(-32, 33, (n, 3))
    k[:, 1] += k[:, 0] - centre
    x = torch.from_numpy(k * step).to(dtype)
    assert torch.equal(x.double(), torch.from_numpy(k * step).double()), "every value is one that the dtype holds"
    j = k - centre
    sums, squares = j.sum(0), j.T @ j  # exact
    exact = np.array([[squares[a, b] - sums[a] * sums[b] / n for b in range(3)] for a in range(3)]) * step**2
    for seed in range(2):
        shards = [Moments() for _ in range(4)]
        for i, part in enumerate(x.split(2048)):
            shards[i % 4].add(part)
        total = Moments()
        for i in np.random.default_rng(seed).permutation(4):
            total.merge(shards[i])
        scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
        assert total.count == n
        assert np.abs(total.second.numpy() - exact).max() < 5e-7 * scale.max(), "four roundings of float32"
        np.testing.assert_allclose(total.mean.numpy(), (centre + sums / n) * step, rtol=1e-12)


def test_wide_grams_are_symmetric_and_whole():
    x = torch.randn(300, 1100, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(product(x, x[:, :7]), x.T @ x[:, :7], rtol=1e-10, atol=1e-10)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def classifier(n, scale=1.0):
    torch.manual_seed(0)
    net = Classifier()
    x = np.random.default_rng(0).standard_normal((n, 6)).astype(np.float32) * scale
    labels = np.random.default_rng(1).integers(0, 5, n)
    return open_model(net, inputs=(InputSpec("x", "float32", ("b", 6)),)), Data.of_arrays({"x": x}, labels), x, labels


def test_the_metrics_of_the_answer_are_those_of_theory():
    """At the last layer J = I, so G is H: known for `labels`, known in expectation for `kl`."""
    opened, data, x, labels = classifier(4000)
    p = opened.module(torch.from_numpy(x)).softmax(-1).double().detach()
    miss = p - torch.nn.functional.one_hot(torch.from_numpy(labels), 5)
    found = gather(opened, data, gradient_samples=4000, loss="labels")["b"].output_gram
    torch.testing.assert_close(found, miss.T @ miss / 4000, rtol=1e-5, atol=1e-7)
    curvature = torch.diag(p.mean(0)) - p.T @ p / 4000
    found = gather(opened, data, gradient_samples=4000, loss="kl")["b"].output_gram
    assert float((found - curvature).norm() / curvature.norm()) < 0.06  # 4,000 Gaussian probes: about 0.03
    assert float(found.sum(0).abs().max()) < 1e-6, "a common shift of all logits costs nothing"


@pytest.mark.parametrize("layer", ["a", "b"])
def test_half_the_loss_is_the_kl_in_nats_per_sample(layer):
    opened, data, x, _ = classifier(4000)
    stats = gather(opened, data, gradient_samples=4000, loss="kl")[layer]
    module = getattr(opened.module, layer)
    exact = opened.module(torch.from_numpy(x)).log_softmax(-1).double().detach()
    torch.manual_seed(1)
    error = 0.05 * torch.randn_like(module.weight)
    second = stats.gram + torch.outer(stats.mean, stats.mean)
    loss = float(torch.trace(stats.output_gram @ error.double() @ second @ error.double().T)) * stats.positions
    with torch.no_grad():
        module.weight += error
        changed = opened.module(torch.from_numpy(x)).log_softmax(-1).double()
    kl = float((exact.exp() * (exact - changed)).sum(-1).mean())
    assert 0.85 < loss / 2 / kl < 1.2, (loss / 2, kl)


def test_the_squared_logit_error_is_the_loss_of_logits():
    opened, data, x, _ = classifier(3000)
    stats = gather(opened, data, gradient_samples=3000)["a"]
    before = opened.module(torch.from_numpy(x)).double().detach()
    torch.manual_seed(1)
    error = 0.01 * torch.randn_like(opened.module.a.weight)
    second = stats.gram + torch.outer(stats.mean, stats.mean)
    loss = float(torch.trace(stats.output_gram @ error.double() @ second @ error.double().T))
    with torch.no_grad():
        opened.module.a.weight += error
    moved = opened.module(torch.from_numpy(x)).double().detach() - before
    moved -= moved.mean(-1, keepdim=True)
    assert 0.85 < loss / float(moved.square().sum(-1).mean()) < 1.2


def test_losses_that_the_answer_cannot_have_are_refused():
    opened, data, _, labels = classifier(8)
    with pytest.raises(ValueError, match="one of logits, kl, labels"):
        gather(opened, data, loss="mse")
    for wrong in (None, labels + 0.5, labels + 5):
        bare = Data(data._store, wrong)
        with pytest.raises(DataError, match="one class below 5 per answer"):
            gather(opened, bare, loss="labels")
    opened.module.b = nn.Linear(12, 1)
    with pytest.raises(ModelError, match="answers with logits"):
        gather(opened, data, loss="kl")


def test_padded_answers_count_for_nothing():
    y = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    v = cotangent("kl", {"logits": y}, generator=torch.Generator().manual_seed(0), mask=mask)
    assert bool((v[~mask] == 0).all()) and bool((v[mask] != 0).all())


def test_batches_follow_the_tokens_and_spread_their_gradients():
    lengths = np.arange(100, 0, -1)
    order = Order(np.arange(100), lengths)
    cut = Batches.of(order, None, BATCH_BYTES // 10, 30)
    assert [int(i) for s in cut.samples for i in s] == list(range(100))
    assert all(len(s) * lengths[s[0]] <= 1000 or len(s) == 1 for s in cut.samples)
    assert len(cut.samples[0]) == 10 and max(map(len, cut.samples)) > 20
    cut = Batches.of(order, 5, 1, 30)
    assert sorted(cut.gradients) == [1, 5, 8, 11, 15, 18] and sum(len(cut.samples[i]) for i in cut.gradients) == 30
    assert not Batches.of(order, 5, 1, 0).gradients and len(Batches.of(order, 5, 1, 1000).gradients) == 20


def test_a_layer_that_the_data_never_reach_is_named():
    class Two(Classifier):
        def forward(self, x):
            return self.a(x)

    opened = open_model(Two(), inputs=(InputSpec("x", "float32", ("b", 6)),))
    data = classifier(8)[1]
    with pytest.warns(LrcompressWarning, match="never reach b:"):
        assert gather(opened, data)["b"].gram is None


def test_inputs_that_cannot_be_used_are_named():
    opened, _, x, _ = classifier(40)
    bad = x.copy()
    bad[[17, 30], 2] = np.nan, np.inf
    with pytest.raises(DataError, match=r"data: x: expected finite numbers, got NaN or infinity in sample 17;"):
        gather(opened, Data.of_arrays({"x": bad}))
    with pytest.raises(DataError, match="inputs that the network runs on, got mat1 and mat2 shapes"):
        gather(opened, Data.of_arrays({"x": x[:, :5]}))
    ids, masks = text()[2:]
    with pytest.raises(DataError, match="index out of range"):
        gather(text()[0], Data.of_arrays({"ids": ids + 9, "attention_mask": masks}))


def test_a_fault_of_ours_is_no_fault_of_the_data(monkeypatch):
    opened, data, _, _ = classifier(8)
    monkeypatch.setattr("lrcompress.calibrate.collected.real_rows", lambda *_: [][1])
    with pytest.raises(IndexError):
        gather(opened, data)
