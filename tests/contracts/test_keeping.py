"""Which state of a run remains where a score on few samples decides: the last that nobody can tell from the best."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrcompress import metrics
from lrcompress.data import Data
from lrcompress.recover.keeping import clearly_more, clearly_worse
from lrcompress.recover.objective import Held
from lrcompress.recover.training import Training
from lrcompress.verbs.recover import recover
from lrcompress.verbs.scoring import Scorer
from tests.support.training import RATE, compressed, data

N = 100


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return compressed(tmp_path_factory.mktemp("keeping"))


def hits(right: int, moved: int = 0) -> np.ndarray:
    """Return so many right answers of a hundred; `moved` of them where another state is wrong."""
    return np.roll(np.arange(N) < right, moved).astype(np.float64)


def losses(mean: float, spread: float = 0.0) -> torch.Tensor:
    """Return losses of exactly this mean."""
    noise = np.random.default_rng(int(1e6 * mean)).standard_normal(N)
    return mean + spread * torch.as_tensor(noise - noise.mean())


@pytest.fixture
def played(monkeypatch):
    """Let evaluations find what a test wrote down: the hits of each, and the losses."""

    def play(answers, losses_of):
        seen = iter(answers)

        def decide(self):
            self.numbers = torch.as_tensor(next(seen))
            return -float(self.numbers.mean())

        def found(self):
            return losses_of[len(runs[0].state.history) - 1 if runs[0].state.history else 0]

        runs, plain = [], Training._run

        def run(self, find_rate):
            runs.append(self)
            return plain(self, find_rate)

        monkeypatch.setattr(Training, "_run", run)
        monkeypatch.setattr(Scorer, "decide", decide)
        monkeypatch.setattr(Held, "losses", found)

    return play


def ran(place, steps, **options):
    common = {
        "data": data(400, 1),
        "select": data(N, 2),
        "metric": "accuracy",
        "loss": "labels",
        "batch_size": 200,
        "closed": "off",
    }
    return recover(place / "small", steps=steps, evaluations=steps, **{**common, **RATE, **options}).data


@pytest.mark.parametrize(
    ("answers", "of_losses", "step"),
    [
        # 9 lost and 4 won: 0.05 ± 0.036 less than the best, which nobody can tell from it.
        ([hits(70), hits(83), hits(78, 9)], [1.0, 0.5, 0.5], 2),
        # 10 lost and none won: 0.10 ± 0.030.
        ([hits(70), hits(83), hits(73)], [1.0, 0.5, 0.5], 1),
        # Told from the best there was, not from what is kept: small steps do not add up.
        ([hits(50), hits(83), hits(81), hits(79), hits(77)], [1.0, 0.5, 0.5, 0.5, 0.5], 2),
        # Clearly worse than the best, and better than what is kept.
        ([hits(70), hits(83), hits(78, 9), hits(79)], [1.0, 0.5, 0.5, 0.5], 2),
        # As good by its score, and surer of what is wrong.
        ([hits(70), hits(83), hits(78, 9)], [1.0, 0.5, 0.9], 1),
        # As good as the best, and no better than the start.
        ([hits(70), hits(72), hits(69)], [1.0, 0.9, 0.8], 1),
        ([hits(70), hits(72), hits(70)], [1.0, 0.9, 1.0], 1),
        ([hits(70), hits(72), hits(70)], [1.0, 0.9, 0.91], 1),
        # The best of a run is the best again where it comes last.
        ([hits(70), hits(83), hits(81), hits(84)], [1.0, 0.5, 0.5, 0.5], 3),
    ],
)  # fmt: skip
def test_a_later_state_is_kept_unless_it_is_clearly_worse(place, played, answers, of_losses, step):
    played([*answers, *answers], [losses(m) for m in of_losses])
    found = ran(place, len(answers) - 1)
    assert found["best_step"] == step
    assert found["loss"]["before"] == pytest.approx(of_losses[0])
    assert found["loss"]["after"] == pytest.approx(of_losses[step])


def test_losses_that_vary_hide_a_small_difference(place, played):
    """0.02 more in the mean: ten standard errors where each sample says so, half a one where they say this and that."""
    answers = [hits(70), hits(83), hits(82)]
    for spread, step in ((0.002, 1), (0.03, 1), (0.4, 2)):
        played([*answers, *answers], [losses(1.0), losses(0.5, spread), losses(0.52, spread)])
        found, of_losses = ran(place, 2), (losses(0.5, spread), losses(0.52, spread))
        assert found["best_step"] == step
        assert found["loss"]["after"] == pytest.approx(float(of_losses[step - 1].mean()))


def test_no_better_than_the_start_is_not_good_enough(place, played):
    """As many hits as the start and no lower loss: not told from the best, and not kept."""
    played([hits(70), hits(71), hits(70, 2)] * 2, [losses(m, 0.4) for m in (1.0, 0.99, 1.01)])
    found = ran(place, 2)
    assert found["best_step"] == 1


def test_what_seems_worse_by_chance_lowers_no_rate(place, played, monkeypatch):
    """A tenth less than the start may be chance; a third is not."""
    lowered = []
    monkeypatch.setattr(Training, "_lower", lambda self: lowered.append(self.state.step))
    for now, expected in ((hits(64, 16), []), (hits(47), [2])):
        lowered.clear()
        played([hits(70), hits(70), now, hits(70), hits(70), hits(70)], [losses(1.0)] * 5)
        ran(place, 4, learning_rate=None)
        assert lowered == expected


def test_where_nothing_was_counted_the_best_alone_counts():
    now = {"score": torch.zeros(3), "loss": torch.zeros(3)}
    assert clearly_worse("score", {}, {}, None) and clearly_worse("loss", now, {}, None)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_losses_are_compared_sample_by_sample(n):
    few = torch.linspace(0, 5, n, dtype=torch.float64)
    assert not clearly_more(few, few) and not clearly_more(few - 0.1, few)
    assert clearly_more(few + 1e-6, few), "each sample says the same"
    assert clearly_more(few * float("nan"), few)


@pytest.mark.parametrize(("name", "sign"), [("accuracy", 1.0), ("nll", -1.0), ("spearman", 1.0)])
def test_a_score_of_either_direction_is_told_apart(name, sign):
    """By two standard errors of the paired difference, whatever the metric counts."""
    generator = np.random.default_rng(0)
    y = generator.standard_normal(400)
    numbers = {
        "accuracy": [(generator.random(400) < p).astype(float) for p in (0.9, 0.6)],
        "nll": [np.abs(generator.standard_normal(400)) + m for m in (1.0, 2.0)],
        "spearman": [y + s * generator.standard_normal(400) for s in (0.1, 2.0)],
    }[name]
    select = Data.of_arrays({"x": np.zeros((400, 1), np.float32)}, y)
    scorer = Scorer(metrics.get(name), None, torch.nn.Identity(), select, "cpu")  # type: ignore[arg-type]
    good, bad = map(torch.as_tensor, numbers)
    assert (
        scorer.clearly_worse(bad, good) and not scorer.clearly_worse(good, bad) and not scorer.clearly_worse(good, good)
    )
    found = metrics.paired(*(scorer.metric.of(n.numpy(), y) for n in (good, bad)))
    assert found.drop > 2 * found.stderr


def test_a_run_that_was_broken_off_knows_the_best_it_has_seen(place, tmp_path, played, monkeypatch):
    """Broken off behind the best state, and gone on with one that cannot be told from it: the same state is kept."""
    answers, plain, alive = [hits(70), hits(83), hits(78, 9), hits(60)], Training.step, [True, False]

    def step(self, *args, **options):
        if not alive.pop(0):
            raise KeyboardInterrupt
        return plain(self, *args, **options)

    monkeypatch.setattr(Training, "step", step)
    played(answers[:2], [losses(1.0), losses(0.5)])
    options = {"output": tmp_path / "out", "save_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        ran(place, 3, **options)
    alive.extend([True] * 3)
    played(answers[2:], [losses(1.0), losses(0.5), losses(0.5), losses(0.5)])
    found = ran(place, 3, **options)
    assert found["resumed_at"] == 1 and found["best_step"] == 2


def test_a_score_leaves_its_numbers(place, monkeypatch):
    kept, plain = [], Training._run

    def run(self, find_rate):
        found = plain(self, find_rate)
        kept.append(self.state)
        return found

    monkeypatch.setattr(Training, "_run", run)
    ran(place, 4)
    (state,) = kept
    assert len(state.seen["score"]) == N and float(state.seen["score"].mean()) == -state.top
    assert float(state.seen["loss"].mean()) == pytest.approx(state.top_loss, rel=1e-12)
