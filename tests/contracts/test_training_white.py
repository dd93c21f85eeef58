"""Training in white coordinates, on blends, against scores: the algebra of each, and what it must not change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrcompress.data import Data
from lrcompress.errors import CommandError
from lrcompress.model import tensors_of
from lrcompress.recover import losses, mixing
from lrcompress.recover.mixing import Mix
from lrcompress.recover.order import read_units
from lrcompress.recover.trained import factors_of, whitened
from lrcompress.recover.whitening import Root, Whitened, roots_of
from lrcompress.verbs.recover import recover
from tests.support.training import compressed, data, rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("white"))


def inputs(n: int, width: int, *, spread: float = 1.0) -> torch.Tensor:
    """Rows whose directions have deviations from 1 to 1/spread."""
    g = torch.Generator().manual_seed(n + width)
    basis = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    return torch.randn(n, width, generator=g) * torch.logspace(0, -math.log10(spread), width) @ basis


# roots and where they come from -----------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_a_root_squares_to_the_moment_and_its_inverse_undoes_it(width, n):
    x = inputs(n, width, spread=100).double()
    moment = x.T @ x
    root = Root.of(moment)
    expected = moment / moment.diagonal().mean() + 1e-3 * torch.eye(width)
    assert torch.allclose(root.root.double() @ root.root.double(), expected, atol=1e-5)
    assert torch.allclose(root.root @ root.inverse, torch.eye(width), atol=1e-4)


def test_inputs_that_are_all_zero_have_no_root():
    assert Root.of(torch.zeros(3, 3).double()) is None
    layer = nn.Linear(3, 2)
    assert roots_of({"w": layer.weight}, [torch.zeros(5, 3)], layer) == {}


def _root_of_rows(rows):
    return Root.of(rows.double().T @ rows.double()).root


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        (1, {"padding": 2, "stride": 2}),
        (2, {"padding": (1, 0), "dilation": (1, 2)}),
        (2, {"stride": 2}),
        (2, {"padding": "same"}),
        (3, {}),
    ],
)
def test_moments_are_those_of_the_patches_that_a_convolution_sees(axes, options):
    g = torch.Generator().manual_seed(1)
    kernel = nn.Parameter(torch.randn(4, 3, *(3, 3, 2)[:axes], generator=g))
    x = torch.randn(2, 3, *(9, 8, 5)[:axes], generator=g)
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    found = roots_of({"k": kernel}, [x[:1], x[1:]], lambda b: call(b, kernel, **options))["k"].root
    # Each patch entry is the answer of a kernel that is one there and zero elsewhere.
    n = kernel[0].numel()
    rows = call(x, torch.eye(n).reshape(n, *kernel.shape[1:]), **options).movedim(1, -1).reshape(-1, n)
    assert torch.allclose(found, _root_of_rows(rows), atol=1e-4)


def test_only_weights_of_whole_products_are_listened_to():
    g = torch.Generator().manual_seed(2)
    named = {
        n: nn.Parameter(torch.randn(*s, generator=g)) for n, s in {"a": (4, 6), "b": (4, 1, 3, 3), "c": (6, 6)}.items()
    }
    named["v"] = nn.Parameter(torch.randn(6, generator=g))

    def ask(x):
        y = F.linear(x, named["a"], named["v"][:4])
        F.conv2d(y.reshape(-1, 4, 1, 1), named["b"], padding=1, groups=4)
        return y @ named["c"][:4] + F.linear(x, named["c"].T)

    assert list(roots_of(named, [inputs(7, 6)], ask)) == ["a"]


def test_both_factors_of_every_layer_of_a_network_are_whitened(place):
    import lrcompress

    module = lrcompress.load(place / "small")
    found = factors_of(module)
    x = tensors_of(next(iter(data().batches(60))).inputs, "cpu")["x"]
    white = whitened(found, [x[:30], x[30:]], module)
    factors = {n for n, p in found.parameters.items() if p.dim() > 1}
    assert factors and set(white.roots) == factors
    assert all(white.scales[n] == found.scales[n] for n in found.parameters if n not in factors)
    for n in factors:
        seen = found.parameters[n].detach().flatten(1) @ white.roots[n].root
        assert white.scales[n] == pytest.approx(max(float(seen.square().mean().sqrt()), 1e-2))


# steps ----------------------------------------------------------------------------------------------------------------


def _problem(spread: float = 30.0):
    x = inputs(200, 8, spread=spread)
    g = torch.Generator().manual_seed(3)
    target, start = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
    root = Root.of((x.T @ x).double())
    return x, target, start, root


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_white_step_is_the_optimizers_own_in_other_coordinates(decay):
    x, target, start, root = _problem()
    p, bias = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(5))
    own = Whitened({"p": p, "b": bias}, {"p": 0.5, "b": 1.0}, {"p": root}, weight_decay=decay)
    latent, other = nn.Parameter(start @ root.root), nn.Parameter(torch.zeros(5))
    adam = torch.optim.AdamW([{"params": [latent], "lr": 0.01}, {"params": [other], "lr": 0.02}], weight_decay=decay)
    for _ in range(20):
        for q, b in ((p, bias), (latent, other)):
            weight = q if q is p else q @ root.inverse
            loss = (F.linear(x, weight, b) - x @ target.T).square().mean()
            q.grad = b.grad = None
            loss.backward()
        own.step(0.02, 1e9)
        adam.step()
    assert torch.allclose(p, latent @ root.inverse, atol=2e-4) and torch.allclose(bias, other, atol=1e-5)
    assert (p - start).norm() > 0.1


def test_without_roots_steps_are_those_of_adamw_bit_for_bit():
    x, target, start, _ = _problem()
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = Whitened({"p": p}, {"p": 1.0}, {}, weight_decay=0.1)
    adam = torch.optim.AdamW([q], lr=0.02, weight_decay=0.1, fused=True)
    for _ in range(10):
        for r in (p, q):
            r.grad = None
            (F.linear(x, r) - x @ target.T).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([q], 1.0)
        own.step(0.02, 1.0)
        adam.step()
    assert torch.equal(p, q)


def test_the_length_that_is_cut_is_that_of_the_white_gradient():
    _, _, start, root = _problem()
    p = nn.Parameter(start.clone())
    own = Whitened({"p": p}, {"p": 1.0}, {"p": root}, weight_decay=0.0)
    p.grad = torch.full_like(p, 100.0)
    own.step(0.0, 1.0)
    assert torch.equal(p.detach(), start)  # a rate of zero moves nothing, not by one bit
    first = own.state_of("p")["exp_avg"] / 0.1
    assert float(first.norm()) == pytest.approx(1.0, rel=1e-4)
    assert torch.allclose(
        F.normalize(first.flatten(), dim=0), F.normalize((p.grad @ root.inverse).flatten(), dim=0), atol=1e-5
    )


def test_white_steps_reach_what_plain_steps_do_not():
    """Inputs with deviations from 1 to 1/30: forty steps at any of four rates leave plain AdamW more than twice as far."""
    x, target, start, root = _problem()

    def reached(roots, rate):
        p = nn.Parameter(start.clone())
        own = Whitened({"p": p}, {"p": 1.0}, roots, weight_decay=0.0)
        for i in range(40):
            p.grad = None
            loss = (F.linear(x, p) - x @ target.T).square().mean()
            loss.backward()
            own.step(rate * (1 - i / 40), 1e9)
        return float(loss.detach())

    rates = (0.01, 0.03, 0.1, 0.3)
    assert min(reached({"p": root}, r) for r in rates) < 0.5 * min(reached({}, r) for r in rates)


# blends ---------------------------------------------------------------------------------------------------------------


def test_a_blend_depends_on_its_sample_and_epoch_alone():
    train = rows(40)
    whole = read_units(train, np.arange(40)).inputs["x"]
    mix = Mix(train, seed=3)

    def blended(units, epoch):
        return mix(tensors_of(read_units(train, units).inputs, "cpu"), units, epoch)["x"]

    once = blended(np.arange(40), 0)
    shuffled = np.random.default_rng(0).permutation(40)
    again = torch.empty_like(once)
    for part in np.array_split(shuffled, 7):
        again[part] = blended(part, 0)
    assert torch.equal(once, again) and not torch.equal(once, blended(np.arange(40), 1))
    assert not torch.equal(once, Mix(train, 4)(tensors_of({"x": whole}, "cpu"), np.arange(40), 0)["x"])
    # Every row lies between its own sample and one other.
    x = torch.from_numpy(whole)
    for i, row in enumerate(once):
        ways = x - x[i]
        part = ((row - x[i]) @ ways.T) / ways.square().sum(1).clamp_min(1e-9)
        distance = (x[i] + part[:, None] * ways - row).norm(dim=1)
        j = int(distance.argmin())
        assert float(distance[j]) < 1e-4 and -1e-5 <= float(part[j]) <= 1 + 1e-5
    assert float((once - x).norm(dim=1).median()) > 0.5


def test_tokens_and_labels_are_not_blended():
    tokens = Data.of_arrays({"input_ids": np.zeros((4, 5), np.int64)})
    assert mixing.wanted(None, rows(), labels=False) and not mixing.wanted(False, rows(), labels=False)
    assert not mixing.wanted(None, tokens, labels=False) and not mixing.wanted(None, rows(), labels=True)
    with pytest.raises(CommandError, match=r"--mix: expected distillation.*got input_ids int64; leave --mix out"):
        mixing.wanted(True, tokens, labels=False)
    with pytest.raises(CommandError, match="got the loss labels"):
        mixing.wanted(True, rows(), labels=True)


def test_what_a_run_blends_is_what_both_networks_are_asked(place, monkeypatch):
    """Blends change the steps; a run with labels takes none, whatever its inputs are."""
    kept = {}
    for mix in (None, False, True):
        kept[mix] = recover(
            place / "small", data=data(), steps=3, learning_rate=1e-2, closed="off", threads=1, mix=mix
        ).data["loss"]
    assert kept[None] == kept[True] != kept[False]
    with pytest.raises(CommandError, match="the loss labels"):
        recover(place / "small", data=data(), steps=3, learning_rate=1e-2, loss="labels", mix=True)


# scores ---------------------------------------------------------------------------------------------------------------


def test_an_infinite_temperature_is_the_limit():
    g = torch.Generator().manual_seed(4)
    s, t = torch.randn(6, 5, generator=g).double(), torch.randn(6, 5, generator=g).double()
    limit = losses.logits(s, t, temperature=math.inf)
    errors = [float((losses.logits(s, t, temperature=k) - limit).abs().max()) for k in (1e2, 1e3)]
    assert errors[0] < 0.05 and errors[1] < errors[0] / 5
    assert torch.allclose(losses.logits(s + 3, t, temperature=math.inf), limit)  # a constant is no answer
    assert not losses.logits(t, t, temperature=math.inf).any()


@pytest.mark.parametrize("temperature", [2.0, math.inf])
def test_one_score_is_held_against_zero(temperature):
    s, t = torch.tensor([0.5, -1.0]), torch.tensor([1.0, -1.0])
    two = losses.logits(*(torch.stack([v, torch.zeros(2)], 1) for v in (s, t)), temperature=temperature)
    assert torch.equal(losses.logits(s, t, temperature=temperature), two) and float(two[0]) > 0 == float(two[1])
    assert torch.equal(losses.logits(s[:, None], t[:, None], temperature=temperature), two)


def test_the_temperature_fits_the_answers():
    assert losses.temperature_for(torch.zeros(2, 5)) == math.inf and losses.temperature_for(torch.zeros(2, 3, 5)) == 2.0


@pytest.mark.parametrize("value", ["warm", "0", "-1", "nan"])
def test_a_temperature_that_is_none_is_refused(place, value):
    with pytest.raises(CommandError, match="--temperature: expected"):
        recover(place / "small", data=data(), temperature=value)
