"""When a rate is lowered and where a run begins again; batches of like length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lrcompress.data import Data
from lrcompress.recover.order import Order
from lrcompress.recover.trained import Trained
from lrcompress.recover.training import Training
from lrcompress.verbs.recover import recover
from tests.support.training import compressed, data, rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("white"))


# rates ----------------------------------------------------------------------------------------------------------------


def test_a_ruined_run_begins_again_with_a_lower_rate(place, monkeypatch):
    """The first evaluation finds ruin: what follows is a run from the start, at a rate √10 lower."""
    seen = []
    real_step, real_decide, ruin = Training.step, Training.decide, iter([False, True])

    def step(self, units, epoch, rate, share, **kw):
        if "name" not in kw:
            seen.append((rate, float(sum(p.detach().double().sum() for p in self.parameters))))
        return real_step(self, units, epoch, rate, share, **kw)

    def decide(self):
        return math.inf if next(ruin, False) else real_decide(self)

    monkeypatch.setattr(Training, "step", step)
    monkeypatch.setattr(Training, "decide", decide)
    found = recover(place / "small", data=data(), train="factors", steps=8, evaluations=4, threads=1).data
    rates = [r for r, _ in seen]
    assert rates == [3e-3] * 2 + [pytest.approx(3e-3 / math.sqrt(10))] * 8  # as many steps as were asked for
    assert seen[2][1] == seen[0][1] != seen[1][1]
    assert found["learning_rate"] == pytest.approx(rates[-1])


@pytest.mark.parametrize(("worse", "again"), [(0.06, True), (0.04, False)])
def test_a_run_that_has_gained_nothing_and_lost_much_begins_again(place, monkeypatch, worse, again):
    """By a score, too; a clock that is running does not let it take more time: it goes on from the start where it is."""
    real_step, real_decide = Training.step, Training.decide
    for seconds in (None, 1e6):
        told, seen = [], []

        def step(self, units, epoch, rate, share, seen=seen, **kw):
            if "name" not in kw:
                seen.append((rate, [int(u) for u in units]))
            return real_step(self, units, epoch, rate, share, **kw)

        def decide(self, told=told):
            told.append(real_decide(self))
            return told[0] + worse * abs(told[0]) if 2 <= len(told) <= 5 else told[-1]

        monkeypatch.setattr(Training, "step", step)
        monkeypatch.setattr(Training, "decide", decide)
        options = {"data": data(), "train": "factors", "steps": 20, "threads": 1, "max_seconds": seconds}
        found = recover(place / "small", evaluations=10, **options).data
        low = pytest.approx(3e-3 / math.sqrt(10))
        first = 8 if again else 20  # until then it has time to settle
        assert [r for r, _ in seen] == [3e-3] * first + [low] * ((20 if seconds is None else 12) if again else 0)
        if again and seconds is None:
            assert [u for _, u in seen[8:16]] == [u for _, u in seen[:8]]
        assert found["steps"] == 20 and found["learning_rate"] == (low if again else 3e-3)


def test_of_two_states_the_one_that_began_last_is_taken_up(tmp_path):
    from lrcompress.recover.state import Saved
    from lrcompress.work import Store
    from lrcompress.work.jobs import Packed

    with Store.open(tmp_path / "out", "k") as store:
        saved = Saved(store, "run")
        for begun, step in ((0, 90), (1, 5)):
            saved.save(Packed({}, {"begun": begun, "step": step}))
        found = Saved(store, "run").load()
    assert found is not None and found.about["step"] == 5


def test_a_rate_that_was_given_stays(place, monkeypatch):
    real_decide, ruin = Training.decide, iter([False, True])
    monkeypatch.setattr(Training, "decide", lambda self: math.inf if next(ruin, False) else real_decide(self))
    found = recover(
        place / "small", data=data(), train="factors", steps=8, evaluations=4, threads=1, learning_rate=1e-3
    ).data
    assert found["learning_rate"] == 1e-3


def test_a_start_is_what_it_was_where_nothing_was_won(place):
    """Whitening alone must not touch a network: an absurd rate loses everything it did, bit for bit."""
    import lrcompress

    found = recover(place / "small", data=data(), train="factors", steps=4, learning_rate=2.0, threads=1)
    assert found.data["best_step"] == 0
    before = lrcompress.load(place / "small").state_dict()
    assert all(torch.equal(v, before[n]) for n, v in found.model.state_dict().items())
    assert Trained({}, {}).roots == {}


# batches of like length ---------------------------------------------------------------------------------------------------


class _Ragged:
    """Samples of unequal length."""

    def __init__(self, lengths):
        self._lengths = np.array(lengths)

    def __len__(self):
        return len(self._lengths)

    def sizes(self):
        return self._lengths

    def read(self, index):
        return {"input_ids": np.ones((len(index), self._lengths[index].max()), np.int64)}


def test_a_batch_is_of_like_length_and_an_epoch_is_every_sample_once():
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    order = Order.of(Data(_Ragged(lengths)), 20, seed=1)
    first, second = order.epoch(0), order.epoch(1)
    assert all(sorted(np.concatenate(e).tolist()) == list(range(1000)) for e in (first, second))
    assert [len(b) for b in first] == [20] * 50
    assert [b.tolist() for b in first] == [b.tolist() for b in order.epoch(0)] != [b.tolist() for b in second]
    padding = {
        n: sum(len(b) * lengths[b].max() - lengths[b].sum() for b in batches) / lengths.sum()
        for n, batches in (("own", first), ("plain", Order(1000, 20, 1).epoch(0)))
    }
    assert padding["own"] < 0.15 < 0.5 < padding["plain"]
    # The lengths of successive batches are in no order.
    means = [lengths[b].mean() for b in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.4


def test_pairs_stay_together_by_the_longer_of_them():
    data = Data(_Ragged([9, 1, 2, 2, 8, 1, 3, 3]), pairs=True)
    order = Order.of(data, 4, seed=0)
    assert order.sizes.tolist() == [9, 2, 8, 3] and order.per_batch == 2
    assert sorted(sorted(b.tolist()) for b in order.epoch(0)) == [[0, 2], [1, 3]]
    assert Order.of(data.take(np.array([2, 3, 0, 1])), 4, 0).sizes.tolist() == [2, 9]
    assert Order.of(rows(), 4, 0).sizes is None


@pytest.mark.parametrize("train", ["factors", "adapters"])
def test_a_loss_that_is_no_number_lowers_a_rate_that_was_found(place, monkeypatch, train):
    """The third step diverges: the run goes on at a lower rate, and ends where any other does; a given rate is an error."""
    import lrcompress.recover.rates as rates
    from lrcompress.errors import ModelError

    plain, at = Training._gradients, []

    def gradients(self, units, epoch, where):
        found = plain(self, units, epoch, where)
        if where.startswith("step"):
            at.append(self.state.rate)
        return math.nan if len(at) == 3 and where.startswith("step") else found

    monkeypatch.setattr(Training, "_gradients", gradients)
    monkeypatch.setattr(rates, "_next", lambda *_, **__: (0, None))
    options = {"data": data(), "train": train, "steps": 8, "threads": 1, "closed": "off"}
    found = recover(place / "small", **options).data
    assert found["steps"] == 8 and at == [3e-3] * 3 + [pytest.approx(3e-3 / math.sqrt(10))] * 5
    assert math.isfinite(found["loss"]["after"]) and found["loss"]["after"] <= found["loss"]["before"]
    at.clear()
    with pytest.raises(ModelError, match="got nan at step 3; lower the learning rate: --lr"):
        recover(place / "small", learning_rate=3e-3, **options)
