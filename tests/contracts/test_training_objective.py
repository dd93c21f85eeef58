"""What a run minimises and what it steps by: means over samples that count, and rates that mean what they say."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lrcompress.adapt._files import TENSORS
from lrcompress.data import Data
from lrcompress.errors import DataError
from lrcompress.factorize import form
from lrcompress.model.adapting import fresh
from lrcompress.model.surgery import replace_layer
from lrcompress.recover import losses
from lrcompress.recover.blocks import rebuilt_kernels
from lrcompress.recover.objective import Asked, Held, Objective
from lrcompress.recover.rates import _length, _next, rate_at
from lrcompress.recover.training import Training
from lrcompress.recover.world import World
from lrcompress.verbs.recover import recover
from tests.support.nets import images, small
from tests.support.training import RATE, compressed, data

GENERATOR = 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("objective"))


# terms ----------------------------------------------------------------------------------------------------------------


def test_energies_are_of_an_element_or_of_a_row():
    answer = 3 * torch.ones(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert losses.energy_of(answer, None, rows=False) == 9 and losses.energy_of(answer, None, rows=True) == 36
    # What is padding has no energy, and every sample counts alike.
    answer[0, 3:] = 1e6
    assert losses.energy_of(answer, mask, rows=True) == 36 and losses.energy_of(answer, None, rows=True) > 1e6
    answer[1] = 0
    assert losses.energy_of(answer, mask, rows=False) == 4.5
    assert losses.energy_of(torch.zeros(2, 3), None, rows=True) > 0


def test_the_highest_class_is_one_and_the_next_is_none():
    scores = torch.zeros(3, 5)
    assert losses.checked_labels(np.array([0, 4, 2]), scores).tolist() == [0, 4, 2]
    with pytest.raises(DataError, match="classes 0…4, got 0…5"):
        losses.checked_labels(np.array([0, 5, 2]), scores)


@pytest.mark.parametrize("name", ["logits", "embedding", "hidden", "labels"])
def test_padding_counts_for_nothing_in_any_term(name):
    """Two samples of lengths 3 and 5: whatever lies beyond changes neither the losses nor the energies."""
    g = torch.Generator().manual_seed(GENERATOR)
    student, teacher = ({n: torch.randn(2, 5, 4, generator=g) for n in ("answer", "block")} for _ in range(2))
    mask = (torch.arange(5) < torch.tensor([[3], [5]])).long()
    y = torch.randint(0, 4, (2, 5), generator=g)
    inputs = {"ids": torch.zeros(2, 5), "attention_mask": mask}

    def loss(student, teacher, inputs):
        objective = Objective({name: 1.0}, 2.0, ["block"], {})
        objective.measure(teacher, inputs)
        return objective.per_sample(student, teacher, y, inputs)

    found = loss(student, teacher, inputs)
    noise = {n: v + 50 * (1 - mask[..., None]) * torch.randn(2, 5, 4, generator=g) for n, v in student.items()}
    other = {n: v + 30 * (1 - mask[..., None]) for n, v in teacher.items()}
    torch.testing.assert_close(loss(noise, other, inputs), found)
    # The first sample by itself, cut to its length, loses what it lost among others.
    short = [{n: v[:1, :3] for n, v in d.items()} for d in (student, teacher, inputs)]
    y = y[:1, :3]
    if name in ("logits", "labels"):
        torch.testing.assert_close(loss(*short), found[:1])
    assert not torch.allclose(found[0], found[1])


def test_terms_are_added_by_their_weights():
    g = torch.Generator().manual_seed(GENERATOR)
    student, teacher = ({"answer": torch.randn(3, 4, generator=g)} for _ in range(2))
    y = torch.tensor([0, 3, 1])

    def loss(**mix):
        return Objective(mix, 2.0, [], {"answer": 2.0}).per_sample(student, teacher, y, {})

    expected = 0.5 * loss(logits=1.0) + 3 * loss(labels=1.0) + 0.25 * loss(embedding=1.0)
    torch.testing.assert_close(loss(logits=0.5, labels=3.0, embedding=0.25), expected)


def test_the_held_out_loss_is_the_mean_over_samples_not_over_batches(place):
    """Three hundred samples are two batches, of 250 and 50, whose means differ."""
    x, y = images(300, 8)
    x[250:] *= 3
    found = recover(place / "small", data=data(), select=Data.of_arrays({"x": x}, y), steps=2, **RATE)
    with torch.no_grad():
        each = losses.logits(found.model(torch.as_tensor(x)), small()(torch.as_tensor(x)), temperature=math.inf)
    assert found.data["loss"]["after"] == pytest.approx(float(each.mean()), rel=1e-4)
    assert float((each[:250].mean() + each[250:].mean()) / 2) != pytest.approx(float(each.mean()), rel=0.05)


def test_processes_share_the_held_out_batches_and_know_all_losses(monkeypatch):
    """Three batches, two processes: what each has is not the other's, and their sum is what one process finds."""
    objective = Objective({"labels": 1.0}, 1.0, (), {})
    x, y = images(11, 3)
    student = Asked(lambda inputs: small()(inputs["x"]), (), {}, None)

    def held(world):
        return Held(objective, student, None, Data.of_arrays({"x": x}, y), 4, world).losses()

    told = []
    monkeypatch.setattr(World, "sum", lambda self, value: told.append(value) or value)
    whole, first, second = (held(w) for w in (World(), World(0, 2), World(1, 2)))
    assert torch.equal(whole, first + second) and len(told) == 3
    assert [int((v != 0).sum()) for v in (whole, first, second)] == [11, 7, 4]


# rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["logits", "embedding=1,hidden=1"])
def test_a_rate_that_was_searched_is_trained_at_as_if_it_had_been_given(place, tmp_path, loss):
    """The search leaves nothing behind: neither steps, nor an optimizer's memory, nor the energies of what it probes."""
    options = {
        "data": data(),
        "select": data(300, 8),
        "loss": loss,
        "steps": 20,
        "batch_size": 30,
        "threads": 1,
        "closed": "off",
    }
    searched = recover(place / "small", output=tmp_path / "searched", **options).data
    rate, rates = searched["learning_rate"], dict(searched["rates"])
    assert len(rates) >= 2 and rate in rates
    given = recover(place / "small", output=tmp_path / "given", learning_rate=rate, **options).data
    assert given["loss"] == searched["loss"] and not given["rates"]
    one, other = ((tmp_path / n / TENSORS).read_bytes() for n in ("searched", "given"))
    assert one == other


def test_every_trial_of_a_search_begins_at_the_start(place, monkeypatch):
    plain, starts = Training.step, {}

    def step(self, units, epoch, rate, share, **options):
        if options and rate not in starts:
            starts[rate] = [p.detach().clone() for p in self.parameters], self.optimizer.known
        return plain(self, units, epoch, rate, share, **options)

    monkeypatch.setattr(Training, "step", step)
    recover(place / "small", data=data(), steps=20, threads=1)
    (first, memory), *others = starts.values()
    assert not memory and len(others) >= 2
    for values, memory in others:
        assert not memory and all(torch.equal(a, b) for a, b in zip(values, first, strict=True))


def walked(losses, start=1.0):
    """Return the rate that a search ends at, and those that it tried; `losses`: per sample, by half decades."""
    trials = {}
    while (found := _next(trials, start))[1] is not None and len(trials) < 6:
        trials[found[1]] = torch.as_tensor(losses(found[1]), dtype=torch.float64).reshape(-1)
    return found[0], sorted(trials)


@pytest.mark.parametrize("best", [-2, 0, 3])
def test_a_search_walks_to_the_lowest_and_looks_at_both_of_its_sides(best):
    chosen, tried = walked(lambda k: 0.1 * abs(k - best))
    # Downhill first, so that a lowest one at or below the centre costs nothing above it.
    assert chosen == best and tried == list(range(min(best, 0) - 1, max(best, -1) + 2))
    assert rate_at(1e-3, 1) == 3.2e-3 and rate_at(3e-3, -2) == 3e-4


def test_what_few_samples_cannot_tell_apart_stays_and_a_higher_rate_that_is_better_is_believed():
    """Lower by 1.9 standard errors of the paired difference is chance, by 2.1 it is not, however much all rates share."""
    noise = np.random.default_rng(0).standard_normal((2, 200))
    own = (noise[1] - noise[1].mean()) / noise[1].std(ddof=1) * 0.1
    common = 0.5 + 0.2 * noise[0]
    for side, errors, chosen in ((-1, 1.9, 0), (-1, 2.1, -1), (1, 0.1, 1), (1, -0.1, 0)):
        by_rate = {0: common, side: common + own - errors * 0.1 / math.sqrt(200)}
        assert walked(lambda k, r=by_rate: r.get(k, common + 1.0), start=0.9)[0] == chosen


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ((0.97, 0.95, 0.9), 0), ((1.001, 1.005, 1.01, 1.02, 1.03, 1.04), 0), ((1.02, 1.01, 1.04, 2.0), -1), ((1.5, 1.6, 1.7, 1.8, 1.9, 2.0), -5),
        ((0.5, math.inf), -1), ((1.049, 1.051), -1), ((0.9, 1.049), -1),
    ],
)  # fmt: skip
def test_a_rate_that_does_harm_is_left_and_a_lower_one_that_gains_nothing_is_not_taken(losses, chosen):
    """From the lowest to the centre: the lowest rate loses least in a few steps, and learns nothing in all of them."""
    found, _ = walked(lambda k: losses[k - 1] if -len(losses) < k <= 0 else 3.0)
    assert found == chosen


@pytest.mark.parametrize(
    ("scores", "tried", "chosen"),
    [((0.9,), 1, 0), ((1.04,), 1, 0), ((1.1, 0.9), 2, -1), ((float("inf"), 2.0, 0.5), 3, -2), ((2.0,) * 6, 6, -6)],
)
def test_factors_get_the_highest_rate_that_does_no_harm(place, monkeypatch, scores, tried, chosen):
    """Downhill from the centre, and no further; where every trial did harm, the rate below them all."""
    from lrcompress.recover import rates as module

    values = iter(scores)
    monkeypatch.setattr(module, "_try", lambda *_: torch.tensor([next(values)]))
    monkeypatch.setattr(module.Held, "mean", lambda self: 1.0)
    monkeypatch.setattr(Training, "step", lambda self, *_, **__: (1.0, 0.0))
    found = recover(place / "small", data=data(), train="factors", steps=120, threads=1).data
    assert found["learning_rate"] == rate_at(3e-3, chosen) and len(found["rates"]) == tried


@pytest.mark.parametrize(
    ("total", "batch", "steps"),
    [(10, 64, 5), (40, 64, 13), (100, 64, 20), (120, 64, 20), (120, 16, 40), (60, 16, 20), (120, 32, 40), (120, 8, 40), (120, 48, 27), (120, 256, 20), (400, 64, 20), (600, 64, 30), (800, 64, 40), (5000, 64, 40), (None, 64, 40)],
)  # fmt: skip
def test_trials_of_adapters_are_long_enough_to_tell_and_a_small_part_of_long_runs(total, batch, steps):
    settings = SimpleNamespace(most_steps=total, max_seconds=None, batch_size=batch)
    assert _length(SimpleNamespace(settings=settings)) == steps


def test_a_run_too_short_for_a_trial_that_tells_takes_the_centre(place, monkeypatch):
    from lrcompress.recover import rates as module

    monkeypatch.setattr(module, "_try", lambda *_: torch.zeros(1))
    for steps, tried in ((119, 0), (120, 1)):
        found = recover(place / "small", data=data(), train="factors", steps=steps, evaluations=1, threads=1).data
        assert found["learning_rate"] == 3e-3 and len(found["rates"]) == tried


@pytest.mark.parametrize("train", ["adapters", "factors"])
def test_steps_are_taken_at_the_rates_of_the_schedule(place, train):
    """A line up to the rate that was asked for, a cosine down from it: two steps of twenty are warming up."""
    seen = []

    def look(optimizer, *_):
        seen.append({g["lr"] / g["scale"] for g in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(look)
    try:
        recover(place / "small", data=data(), train=train, steps=20, warmup=0.1, closed="off", **RATE)
    finally:
        handle.remove()
    down = [0.5 * (1 + np.cos(np.pi * (i / 20 - 0.1) / 0.9)) for i in range(2, 20)]
    # Factors look at eight gradients first, without a step.
    first = [0.0] * (8 if train == "factors" else 0)
    for found, share in zip(seen, [*first, 0.5, 1.0, *down], strict=True):
        assert list(found) == pytest.approx([1e-2 * share] * len(found))


def test_a_rate_of_factors_is_a_part_of_their_size(place, monkeypatch):
    """The first step of Adam is the rate itself, for a factor times its root mean square, to a quarter of an octave.

    In coordinates of their own, and with an optimizer that knows nothing: white ones are tested by themselves.
    """
    monkeypatch.setattr("lrcompress.verbs.recovering._FORESEEN", 0)
    monkeypatch.setattr("lrcompress.recover.trained.whitened", lambda found, *_: found)
    before, scales, moved = {}, {}, {}

    def look(optimizer, *_):
        for g in optimizer.param_groups:
            for p in g["params"]:
                before[id(p)], scales[id(p)] = p.detach().clone(), g["scale"]

    seen = []
    plain = Training._evaluate

    def evaluate(self, place):
        for n, p in self.trained.parameters.items():
            if p.grad is not None and bool(p.grad.any()):
                moved[n] = float((p.detach() - before[id(p)]).abs().max()), before[id(p)], scales[id(p)]
        seen.append(place)
        return plain(self, place)

    handle = register_optimizer_step_pre_hook(look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_evaluate", evaluate)
        try:
            recover(place / "small", data=data(), train="factors", steps=1, threads=1, learning_rate=1e-3)
        finally:
            handle.remove()
    assert seen == [1.0] and any(n.endswith(".U") for n in moved)
    for step, value, scale in moved.values():
        size = max(float(value.double().square().mean().sqrt()), 1e-2)
        assert 2**-0.26 < scale / size < 2**0.26
        assert step == pytest.approx(1e-3 * scale, rel=0.02)


# kernels --------------------------------------------------------------------------------------------------------------

WALKS = {
    "same": {"padding": 1},
    "strided": {"stride": (2, 1), "padding": (0, 2)},
    "far": {"dilation": 2, "padding": 2},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "unbiased": {"bias": False},
}


@pytest.mark.parametrize("name", ["svd", "tucker", "spatial_svd", "cp"])
@pytest.mark.parametrize("walk", WALKS)
def test_a_kernel_that_is_multiplied_out_answers_as_its_factors_do(walk, name):
    torch.manual_seed(GENERATOR)
    layer = nn.Conv2d(4, 6, 3, **WALKS[walk]).double()
    net, x = nn.ModuleDict({"a": layer}), torch.randn(3, 4, 9, 8, dtype=torch.float64)
    rank = (3, 2) if name == "tucker" else 3
    made = replace_layer(net, "a", form(name).decompose(layer.weight.detach(), rank))
    adapter = fresh("lora", made.target, 2, 3.0).double()
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.3)
    made.add_adapter("one", adapter, 0.5)
    made.active = {"one": 0.5}
    expected = made(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(adapter.parameters()))
    with rebuilt_kernels(net):
        assert "forward" in vars(made), "it is another function now"
        found = net["a"](x)
        gradients = torch.autograd.grad(found.square().sum(), list(adapter.parameters()))
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert "forward" not in vars(made), "afterwards the layer goes its own way again"
