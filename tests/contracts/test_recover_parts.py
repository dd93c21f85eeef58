"""The parts of a recovery: losses, the teacher, the order of samples, clocks, rates, hidden states."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from lrcompress.data import Data
from lrcompress.model.checkpoint import load_compressed
from lrcompress.recover import losses
from lrcompress.verbs.recover import recover
from tests.support.nets import images
from tests.support.recovering import data, run, small_compressed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_compressed(tmp_path_factory.mktemp("base"))


def test_losses_are_zero_at_the_teacher_and_positive_elsewhere():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    for loss in (losses.logits, losses.embedding, losses.hidden):
        assert float(loss(a, a).abs().max()) == pytest.approx(0, abs=1e-6) and float(loss(a, b).min()) > 0.01
    p, q = torch.softmax(b / 2, -1), torch.softmax(a / 2, -1)
    kl = (p * (p / q).log()).sum(-1).mean() * 4
    torch.testing.assert_close(losses.logits(a, b).mean(), kl)
    assert losses.auto("sentence_embedding", a) == "embedding" and losses.auto("output", a) == "logits"
    assert losses.auto("output", torch.nn.functional.normalize(a, dim=-1)) == "embedding"


@pytest.mark.parametrize("train", ["factors", "adapters"])
def test_pieces_checkpoints_and_rebuilt_kernels_change_no_gradient(base, train, monkeypatch):
    """A batch in three pieces, kernels multiplied out: the step of the plain batch up to rounding."""
    from lrcompress.verbs import recovering

    def after(**options):
        found = recover(
            base / "compressed",
            data=data(),
            train=train,
            steps=3,
            learning_rate=1e-3,
            threads=1,
            batch_size=50,
            **options,
        )
        return {n: v for n, v in found.model.state_dict().items() if v.is_floating_point()}

    monkeypatch.setattr(recovering, "turn", lambda *_, **__: None)  # rounding turns directions that are equally strong
    one, three = after(), after(accumulate=3)
    monkeypatch.setattr(recovering, "rebuilt_kernels", lambda module: contextlib.nullcontext())
    factored = after()
    for other in (three, factored):
        assert any(not torch.equal(one[n], other[n]) for n in one)
        for n in one:
            torch.testing.assert_close(one[n], other[n], rtol=1e-3, atol=2e-5)


def test_the_teacher_is_asked_once_for_every_sample(base, monkeypatch):
    from lrcompress.recover import teacher

    asked = []
    plain = teacher.Teacher.__init__

    def counting(self, ask, *args, **kwargs):
        plain(self, lambda inputs: (asked.append(len(inputs["x"])), ask(inputs))[1], *args, **kwargs)

    monkeypatch.setattr(teacher.Teacher, "__init__", counting)
    run(base, steps=30, batch_size=32, learning_rate=1e-3, select=data(20, 9))
    assert sum(asked) == 160
    asked.clear()
    run(base, steps=30, batch_size=32, learning_rate=1e-3, select=data(20, 9), augment=True)
    assert sum(asked) == (2 + 30) * 32, "two looks at a gradient, and thirty steps"


def test_answers_that_are_kept_are_those_of_the_first_batches():
    from lrcompress.recover.teacher import Teacher

    inputs = torch.arange(10.0)

    def ask(given):  # depends on the batch, as a matrix product's last bits do
        return {"answer": given["x"] + 100 * len(given["x"])}

    first = [np.array([3, 1, 4]), np.array([0, 2]), np.array([5, 6, 7, 8, 9])]
    whole = Teacher(ask, lambda u: {"x": inputs[u]}, first, units=10)
    for piece in first:
        whole.answers(piece, {"x": inputs[piece]})
    resumed = Teacher(ask, lambda u: {"x": inputs[u]}, first, units=10)
    later = np.array([9, 0, 3, 1])
    for t in (whole, resumed):
        assert t.answers(later, {"x": inputs[later]})["answer"].tolist() == [509, 200, 303, 301]
    small_ = Teacher(ask, lambda u: {"x": inputs[u]}, first, units=10, most_bytes=39)
    assert small_.answers(later, {"x": inputs[later]})["answer"].tolist() == [409, 400, 403, 401]


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    from lrcompress.recover.order import Augment, Order

    order = Order(10, 4, seed=3)
    assert [b.tolist() for b in order.epoch(2)] == [b.tolist() for b in Order(10, 4, 3).epoch(2)]
    assert np.array_equal(np.sort(np.concatenate(order.epoch(5))), np.arange(10)) and order.batches == 3
    assert not np.array_equal(order.epoch(1)[0], order.epoch(2)[0]) or not np.array_equal(
        order.epoch(1)[1], order.epoch(2)[1]
    )
    x, _ = images(10)
    augment = Augment.of(Data.of_arrays({"x": x}), 7)
    every = augment({"x": torch.as_tensor(x)}, np.arange(10), 4)["x"]
    some = augment({"x": torch.as_tensor(x[[8, 2]])}, np.array([8, 2]), 4)["x"]
    assert torch.equal(some, every[[8, 2]])
    draws = augment._draws(4)[:, 0]
    for i, (flip, down, right) in enumerate(draws):
        padded = np.pad(x[i], ((0, 0), (1, 1), (1, 1)), mode="reflect")
        shifted = padded[:, int(down * 3) :, int(right * 3) :][:, :8, :8]
        assert np.array_equal(every[i].numpy(), shifted[:, :, ::-1] if flip < 0.5 else shifted)


def test_a_run_that_the_clock_ends_reaches_the_end_of_its_schedule():
    from lrcompress.recover.schedule import Schedule

    by_clock = Schedule(None, 10.0, 0.05)
    assert by_clock.rate(by_clock.position(700, 10.0)) == 0 and by_clock.rate(by_clock.position(700, 0.5)) == 1
    both = Schedule(100, 10.0, 0.05)
    assert (
        both.position(50, 2.0) == 0.5 and both.position(50, 8.0) == 0.8 and both.remaining(50, 8.0) == pytest.approx(2)
    )
    assert Schedule(10, None, 0.05).rate(0.0) == 1 and [
        Schedule(100, None, 0.05).rate(i / 100) for i in range(3)
    ] == pytest.approx([0.2, 0.4, 0.6])


def test_time_is_kept(base):
    import time

    before = time.perf_counter()
    d = run(base, max_seconds=2.0, steps=None).data
    assert d["stopped"] == "time" and 1.5 < time.perf_counter() - before < 4 and not d["same_anywhere"] and d["rates"]


def test_patience(base):
    d = run(base, learning_rate=20.0, steps=400, patience=2).data
    assert d["stopped"] == "patience" and d["steps"] < 200


def test_hidden_states_are_those_of_blocks(base):
    from lrcompress.recover.blocks import blocks_of, hidden_states
    from recipes.archs.cifar_resnet import resnet20

    assert blocks_of(resnet20()) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    found = load_compressed(base / "compressed")
    # No block repeats here: layer by layer, and where a normalization was folded, behind it.
    assert hidden_states(found.module, (), found.spec["folded"])[0] == "bn" and not blocks_of(found.module)
    assert run(base, loss="auto=1,hidden=0.5", hidden=("mix", "fc*"), steps=8).data["loss"]["weights"] == {
        "logits": 1.0,
        "hidden": 0.5,
    }


def test_energies_make_a_loss_free_of_units():
    """A teacher ten times as large, and a student with it, have the same losses."""
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(6, 7, 5, generator=g), torch.randn(6, 7, 5, generator=g)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1], [7], [2]])).long()
    for rows, loss in ((False, losses.hidden), (True, losses.embedding)):
        a = loss(s, t, mask, energy=losses.energy_of(t, mask, rows=rows))
        b = loss(10 * s, 10 * t, mask, energy=losses.energy_of(10 * t, mask, rows=rows))
        torch.testing.assert_close(a, b)
        changed = s + 100 * (1 - mask[..., None])
        torch.testing.assert_close(loss(changed, t, mask, energy=2.0), loss(s, t, mask, energy=2.0))


def test_answers_beyond_the_room_for_them_are_asked_for_again(base, monkeypatch):
    """Held-out data whose answers do not fit into memory give the same losses."""
    from lrcompress.recover import objective

    options = {"steps": 6, "learning_rate": 1e-3, "loss": "logits=1,hidden=1"}
    monkeypatch.setattr(objective, "KEPT_BYTES", 1 << 30)
    kept = run(base, **options).data["loss"]["history"]
    monkeypatch.setattr(objective, "KEPT_BYTES", 0)
    assert run(base, **options).data["loss"]["history"] == kept
