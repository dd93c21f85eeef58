"""One run of training: its clock, where it may be broken off, when it ends, and what remains of it."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lrcompress.adapt._files import TENSORS
from lrcompress.cli.main import run as run_command
from lrcompress.data import Data
from lrcompress.errors import DataError, LrcompressError
from lrcompress.files import sha256_tree
from lrcompress.recover import losses, rates
from lrcompress.recover import training as module
from lrcompress.recover.training import Training
from lrcompress.verbs.recover import recover
from tests.support.nets import images, small
from tests.support.training import RATE, compressed, data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("training"))


# time, and being broken off -----------------------------------------------------------------------------------------


class Ticks:
    """A clock that a test moves: one tick for every step."""

    now = 0.0

    def __init__(self) -> None:
        self.restart(0.0)

    @property
    def seconds(self) -> float:
        return self._used + Ticks.now - self._since

    def restart(self, used_seconds: float) -> None:
        self._used, self._since = used_seconds, Ticks.now


@pytest.fixture
def ticking(monkeypatch):
    """Let time pass with steps alone; return what each step was given, and a number of steps after which all ends."""
    steps = types.SimpleNamespace(shares=[], dies_after=None)
    plain = Training.step

    def step(self, units, epoch, rate, share, **options):
        if options.get("name") == "look ahead":
            return plain(self, units, epoch, rate, share, **options)
        if steps.dies_after is not None and len(steps.shares) >= steps.dies_after:
            raise KeyboardInterrupt
        Ticks.now += 1.0
        steps.shares.append(share)
        return plain(self, units, epoch, rate, share, **options)

    monkeypatch.setattr(Training, "step", step)
    monkeypatch.setattr("lrcompress.verbs.recovering.Clock", Ticks)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: Ticks.now))
    return steps


def test_a_run_that_the_clock_ends_keeps_its_remaining_time(place, tmp_path, ticking):
    """Broken off after 14 of 40 seconds, and a day later taken up again: 26 are left, at the rates that belong to them."""
    options = {"data": data(), "max_seconds": 40.0, "batch_size": 16, "save_seconds": 0.0, **RATE}
    whole = recover(place / "small", output=tmp_path / "whole", **options).data
    assert whole["steps"] == 40 and whole["stopped"] == "time"
    expected, ticking.shares, ticking.dies_after = list(ticking.shares), [], 14
    with pytest.raises(KeyboardInterrupt):
        recover(place / "small", output=tmp_path / "broken", **options)
    ticking.dies_after = None
    Ticks.now += 86400
    found = recover(place / "small", output=tmp_path / "broken", **options).data
    assert found["resumed_at"] == 14 and found["steps"] == 40 and found["stopped"] == "time"
    assert found["train_seconds"] == 40 and ticking.shares == expected
    assert sha256_tree(tmp_path / "broken") == sha256_tree(tmp_path / "whole")


def test_the_time_of_the_search_counts_even_if_the_run_is_broken_off_behind_it(place, tmp_path, ticking, monkeypatch):
    """Two steps to measure, trials of five until 10.8 seconds are over, and 12 for training; a search is not done twice."""
    monkeypatch.setattr(rates, "time", types.SimpleNamespace(perf_counter=lambda: Ticks.now))
    options = {
        "data": data(),
        "max_seconds": 24.0,
        "batch_size": 16,
        "save_seconds": 0.0,
        "threads": 1,
        "closed": "off",
    }
    whole = recover(place / "small", output=tmp_path / "whole", **options).data
    assert whole["steps"] == 12 and len(whole["rates"]) == 2
    expected, ticking.shares, ticking.dies_after = ticking.shares[12:], [], 12
    with pytest.raises(KeyboardInterrupt):
        recover(place / "small", output=tmp_path / "broken", **options)
    ticking.shares, ticking.dies_after = [], None
    found = recover(place / "small", output=tmp_path / "broken", **options).data
    assert found["resumed_at"] == 0 and found["steps"] == 12 and found["rates"] == whole["rates"]
    assert ticking.shares == expected and sha256_tree(tmp_path / "broken") == sha256_tree(tmp_path / "whole")


@pytest.mark.parametrize(("train", "metric"), [("adapters", None), ("factors", None), ("adapters", "accuracy")])
def test_broken_off_anywhere_it_ends_with_the_same_bytes(place, tmp_path, train, metric, ticking):
    """Four batches an epoch: in the first step, at the end of an epoch, and in the middle of the third, again and again."""
    options = {
        "metric": metric,
        "data": data(), "select": data(20, 9), "train": train, "steps": 14, "batch_size": 16, "accumulate": 2,
        "augment": train == "adapters", "save_seconds": 0.0, "evaluations": 5, "closed": "off", **RATE,
    }  # fmt: skip
    whole = recover(place / "small", output=tmp_path / "whole", **options).data
    for after in (0, 1, 3, 6):
        ticking.shares, ticking.dies_after = [], after
        with pytest.raises(KeyboardInterrupt):
            recover(place / "small", output=tmp_path / "broken", **options)
        assert not (tmp_path / "broken").exists()
    ticking.dies_after = None
    found = recover(place / "small", output=tmp_path / "broken", **options).data
    assert found["resumed_at"] == 10 and found["steps"] == 14
    assert found["loss"] == whole["loss"] and found["best_step"] == whole["best_step"] > 0
    assert sha256_tree(tmp_path / "broken") == sha256_tree(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "whole"]


# where it ends --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Let evaluations give the values that a test wrote down, then the best of them."""

    def play(*values):
        left = list(values)
        monkeypatch.setattr(Training, "decide", lambda self: left.pop(0) if left else min(values, key=_last_if_nan))

    return play


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def test_patience_counts_from_the_last_better_state(place, scripted):
    """Three in a row that are not better, of which an equal one is one, end it; a better one in between starts anew."""
    scripted(1.0, 0.9, 0.95, 0.91, 0.8, 0.85, 0.8, math.nan)
    found = recover(place / "small", data=data(), steps=24, evaluations=12, patience=3, batch_size=20, **RATE).data
    assert found["stopped"] == "patience" and found["steps"] == 14 and found["best_step"] == 8
    assert found["loss"]["after"] == 0.8
    assert [step for step, _ in found["loss"]["history"]] == list(range(0, 16, 2))


def test_without_patience_nothing_ends_it(place, scripted):
    scripted(1.0, *[2.0] * 12)
    found = recover(place / "small", data=data(), steps=24, evaluations=12, batch_size=20, **RATE).data
    assert found["stopped"] == "steps" and found["steps"] == 24 and found["best_step"] == 0


def test_the_command_says_that_patience_ended_it(place, tmp_path, monkeypatch, capsys, scripted):
    monkeypatch.chdir(tmp_path)
    x, y = images(60, 1)
    np.savez("train.npz", x=x, y=y)
    words = ["recover", str(place / "small"), "--data", "train.npz", "--lr", "0.01", "--steps", "24", "--quiet"]
    scripted(1.0, *[2.0] * 12)
    assert run_command([*words, "-o", "a", "--patience", "2"]) == 0
    assert "at step 0 of 4 (ended by patience)" in capsys.readouterr().out
    scripted(1.0, *[2.0] * 12)
    assert run_command([*words, "-o", "b"]) == 0
    assert "patience" not in capsys.readouterr().out


def test_what_remains_is_the_best_state_not_the_last(place, scripted, monkeypatch):
    """The parameters are copied at every evaluation; what is there in the end are those of the best one."""
    seen, plain = [], Training._evaluate

    def evaluate(self, place):
        seen.append({n: p.detach().clone() for n, p in self.trained.parameters.items()})
        return plain(self, place)

    monkeypatch.setattr(Training, "_evaluate", evaluate)
    scripted(1.0, 0.7, 0.4, 0.6, 0.5)
    found = recover(place / "small", data=data(), steps=4, evaluations=4, batch_size=30, **RATE)
    assert found.data["best_step"] == 2
    state = found.model.state_dict()
    now = {n: state[n.replace(".lora", ".adapters.recover.lora")] for n in seen[1]}
    assert all(torch.equal(now[n], seen[1][n]) for n in now) and any(not torch.equal(now[n], seen[3][n]) for n in now)


@pytest.mark.parametrize(
    ("scores", "after_each", "step"),
    [
        ([-0.5, -0.5, -0.5, -0.5], [3.0, 2.0, 1.0, 2.0], 2),  # the surest of equals, the start among them
        ([-0.5, -0.5, -0.5, -0.5], [1.0, 2.0, 1.0, 2.0], 0),
        ([-0.5, -0.6, -0.5, -0.6], [3.0, 2.0, 0.5, 1.0], 3),  # a score is never given for a loss
        ([-0.5, -0.6, -0.6, -0.6], [3.0, math.nan, 0.5, 0.7], 1),  # and better than no number there is nothing
    ],
)
def test_of_equal_scores_the_loss_decides(place, monkeypatch, scripted, scores, after_each, step):
    def loss(self, _):
        return after_each[len(self.state.history) - 1 if self.state.history else 0]

    monkeypatch.setattr(Training, "_loss", loss)
    scripted(*scores)
    options = {"data": data(), "metric": "accuracy", "evaluations": 3, "batch_size": 20, "closed": "off", **RATE}
    found = recover(place / "small", steps=3, **options).data
    assert found["best_step"] == step and [s for _, s in found["loss"]["history"]] == scores
    assert (found["loss"]["before"], found["loss"]["after"]) == (
        after_each[0],
        pytest.approx(after_each[step], nan_ok=True),
    )


def test_a_score_that_cannot_move_leaves_what_has_the_lowest_loss(place):
    """One sample, answered as its label says: the loss goes down and the accuracy stays."""
    x, _ = images(1, 3)
    y = small()(torch.as_tensor(x)).argmax(1).numpy()
    select = Data.of_arrays({"x": x}, y)
    options = {
        "data": data(),
        "select": select,
        "loss": "labels",
        "steps": 12,
        "batch_size": 20,
        "closed": "off",
        **RATE,
    }
    by_loss, by_score = (recover(place / "small", metric=m, **options) for m in (None, "accuracy"))
    assert by_score.data["before"] == by_score.data["after"] == 1.0 and by_score.data["loss"]["decides"] == "metric"
    assert by_score.data["best_step"] == by_loss.data["best_step"] > 0
    told = [{k: d["loss"][k] for k in ("before", "after")} for d in (by_loss.data, by_score.data)]
    assert told[0] == told[1] and told[0]["after"] < told[0]["before"], "the loss is told where a score decides, too"
    one, other = by_loss.model.state_dict(), by_score.model.state_dict()
    assert all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("metric", [None, "accuracy"])
@pytest.mark.parametrize("train", ["adapters", "factors"])
@pytest.mark.parametrize("rate", [0.3, 10.0, 1e4])
def test_it_never_ends_below_its_start(place, tmp_path, rate, train, metric):
    """However high the rate, what is written is as good as what was there; if it cannot be computed, nothing is."""
    select = data(40, 5)
    options = {"train": train, "metric": metric, "steps": 12, "threads": 1, "learning_rate": rate, "save_seconds": 0.0}
    try:
        found = recover(place / "small", data=data(), select=select, output=tmp_path / "out", **options)
    except LrcompressError as e:
        assert rate > 1 and "lower the learning rate: --lr" in str(e) and "\n" not in str(e)
        assert not list(tmp_path.iterdir())
        return
    d = found.data
    assert d["after"] >= d["before"] if metric else d["loss"]["after"] <= d["loss"]["before"]
    batch = next(iter(select.batches(40)))
    x, y = torch.as_tensor(batch.inputs["x"]), torch.as_tensor(batch.labels)
    with torch.no_grad():
        scores = found.model.eval()(x)
        if metric:
            assert float((scores.argmax(1) == y).float().mean()) == pytest.approx(d["after"])
        else:
            assert float(losses.logits(scores, small()(x), temperature=math.inf).mean()) == pytest.approx(
                d["loss"]["after"], rel=1e-3
            )


# samples and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([0, 1, 2, 5], "class numbers 0…4, got 0…5"),
        ([0, 1, 2, -1], "class numbers 0…4, got -1…2"),
        # Of a whole sample there is nothing that could be left out.
        ([0, 1, 2, losses.IGNORED], "class numbers 0…4, got -100…2"),
        ([[0], [1], [2], [3]], "scores (4, 5), labels (4, 1)"),
    ],
)
def test_labels_of_held_out_samples_outside_the_classes_are_refused_too(place, tmp_path, y, words):
    select = Data.of_arrays({"x": images(4)[0]}, np.array(y))
    with pytest.raises(DataError) as e:
        recover(
            place / "small", data=data(), select=select, loss="labels", steps=2, output=tmp_path / "out", **RATE
        )  # fmt: skip
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_positions_without_a_label_and_padding_count_for_nothing():
    scores = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 2, losses.IGNORED, 4], [0, losses.IGNORED, losses.IGNORED, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    log = F.log_softmax(scores, -1)
    expected = torch.stack([-(log[0, 0, 1] + log[0, 1, 2]) / 2, -(log[1, 0, 0] + log[1, 3, 3]) / 2])
    torch.testing.assert_close(losses.labels(scores, y, mask), expected)
    assert torch.equal(losses.checked_labels(y, scores), y)
    with pytest.raises(DataError, match="classes 0…4, got 0…9"):
        losses.checked_labels(torch.where(y == 4, 9, y), scores)


def test_one_sample_to_train_on_and_one_to_select_on(place, tmp_path):
    """Two samples are the fewest; every tenth is held out, so that is one of each, and the batch is that one."""
    found = recover(place / "small", data=data(2), steps=6, output=tmp_path / "a", closed="off", **RATE).data
    assert found["steps"] == 6 and found["loss"]["after"] <= found["loss"]["before"]
    assert found["loss"]["history"][-1][0] == 6 and (tmp_path / "a" / TENSORS).is_file()
    found = recover(place / "small", data=data(20), select=data(1, 3), steps=6, closed="off", **RATE).data
    assert found["loss"]["after"] < found["loss"]["before"]
    with pytest.raises(DataError, match="at least 2 samples to train on, got 1"):
        recover(place / "small", data=data(1), steps=6, output=tmp_path / "b", **RATE)
    assert sorted(p.name for p in tmp_path.iterdir() if "tensorboard" not in p.name) == ["a"]
