"""Statistics are the moments they say they are: of real positions, without cancellation, from any batching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrcompress.calibrate import Moments, collect, patches
from lrcompress.data import Data
from lrcompress.errors import DataError
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import find_layers
from lrcompress.model.views import walk_of


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
