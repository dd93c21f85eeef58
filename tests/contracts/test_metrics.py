"""Metrics: equal to their definitions, with a standard error that the theory or scipy confirms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lrcompress import metrics
from lrcompress.data import Data
from lrcompress.errors import CommandError, DataError


def replay(key: str = "logits"):
    """Return a predictor that answers with its own input."""
    return lambda inputs: {key: inputs["x"]}


def scores(hits: int, n: int, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(n) % classes
    told = np.where(np.arange(n) < hits, labels, (labels + 1) % classes)
    return np.eye(classes, dtype=np.float32)[told], labels


@pytest.mark.parametrize(("hits", "n"), [(0, 9), (30, 40), (40, 40)])
def test_accuracy_is_the_share_of_hits_with_its_binomial_error(hits: int, n: int) -> None:
    x, y = scores(hits, n)
    found = metrics.get("accuracy").evaluate(replay(), Data.of_arrays({"x": x}, y), 8)
    p = hits / n
    assert found.value == pytest.approx(p) and found.n == n and found.direction == "max"
    assert found.stderr == pytest.approx(np.sqrt(p * (1 - p) / n))


def test_top5_counts_the_five_best() -> None:
    x = np.tile(np.arange(8, 0, -1, dtype=np.float32), (8, 1))
    found = metrics.get("top5").evaluate(replay(), Data.of_arrays({"x": x}, np.arange(8)), 3)
    assert found.value == pytest.approx(5 / 8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
def test_spearman_equals_scipy_also_with_ties(rows: list[tuple[int, int]]) -> None:
    a, b = np.asarray(rows, dtype=float).T
    ours = metrics.spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert ours == 0.0
    else:
        assert ours == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_of_pairs_ranks_their_cosines() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)).astype(np.float32)
    labels = rng.normal(size=40)
    data = Data.of_arrays({"x": x}, labels, pairs=True)
    found = metrics.get("spearman").evaluate(replay("sentence_embedding"), data, 10)
    cosines = F.cosine_similarity(torch.from_numpy(x[0::2]), torch.from_numpy(x[1::2])).numpy()
    assert found.value == pytest.approx(stats.spearmanr(cosines, labels).statistic, abs=1e-6)
    assert found.n == 40
    # The error of a rank correlation near 0 is about 1/√(n − 1).
    assert found.stderr == pytest.approx(1 / np.sqrt(39), rel=0.35)
    again = metrics.get("spearman").evaluate(replay("sentence_embedding"), data, 80)
    assert again.stderr == found.stderr


def test_nll_and_perplexity_equal_torch() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 5)).astype(np.float32), rng.integers(0, 5, 30)
    data = Data.of_arrays({"x": x}, y)
    expected = float(F.cross_entropy(torch.from_numpy(x).double(), torch.from_numpy(y)))
    nll, ppl = (metrics.get(n).evaluate(replay(), data, 7) for n in ("nll", "perplexity"))
    assert nll.value == pytest.approx(expected) and nll.direction == "min"
    assert ppl.value == pytest.approx(np.exp(expected))
    assert ppl.stderr == pytest.approx(ppl.value * nll.stderr, rel=0.25)


def test_nll_of_next_tokens_ignores_padding() -> None:
    ids, mask = np.array([[1, 2, 3], [3, 1, 0]]), np.array([[1, 1, 1], [1, 1, 0]])
    x = np.random.default_rng(2).normal(size=(2, 3, 4))
    data = Data.of_arrays({"x": x, "input_ids": ids, "attention_mask": mask})
    logp = torch.log_softmax(torch.from_numpy(x), -1).numpy()
    expected = [-(logp[0, 0, 2] + logp[0, 1, 3]) / 2, -logp[1, 0, 1]]
    found = metrics.get("nll").evaluate(replay(), data, 2)
    np.testing.assert_allclose(found.per_sample, expected)


def test_mse_and_cosine_to_original() -> None:
    x = np.array([[1.0], [2.0], [4.0]])
    found = metrics.get("mse").evaluate(replay("output"), Data.of_arrays({"x": x}, np.array([1.0, 1.0, 1.0])), 2)
    assert found.value == pytest.approx((0 + 1 + 9) / 3)
    data = Data.of_arrays({"x": np.array([[1.0, 0.0], [1.0, 1.0]])})
    other = lambda inputs: {"output": np.tile([[1.0, 0.0]], (len(inputs["x"]), 1))}  # noqa: E731
    found = metrics.get("cosine_to_original").evaluate(replay("output"), data, 1, original=other)
    assert found.value == pytest.approx((1 + np.sqrt(0.5)) / 2)
    with pytest.raises(CommandError, match="--original"):
        metrics.get("cosine_to_original").evaluate(replay("output"), data, 1)


def test_the_paired_difference_is_tighter_than_two_separate_errors() -> None:
    x, y = scores(50, 100)
    other, _ = scores(47, 100)
    first, second = (metrics.get("accuracy").evaluate(replay(), Data.of_arrays({"x": v}, y), 10) for v in (x, other))
    found = metrics.paired(first, second)
    assert found.drop == pytest.approx(0.03)
    # Only the three samples that changed carry variance.
    assert found.stderr == pytest.approx(np.std([1.0] * 3 + [0.0] * 97, ddof=1) / 10)
    assert metrics.paired(first, first) == metrics.Paired(0.0, 0.0, 100)
    assert metrics.paired(second, first).drop == pytest.approx(-0.03)


def test_paired_spearman_and_direction() -> None:
    rng = np.random.default_rng(3)
    labels = rng.normal(size=200)
    good, bad = labels + 0.1 * rng.normal(size=200), labels + 1.0 * rng.normal(size=200)
    metric = metrics.get("spearman")
    found = metrics.paired(metric.of(good, labels), metric.of(bad, labels))
    assert found.drop > 5 * found.stderr > 0
    nll = metrics.get("nll")
    assert metrics.paired(nll.of(np.ones(3), None), nll.of(np.full(3, 2.0), None)).drop == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no pair"):
        metrics.paired(nll.of(np.ones(3), None), nll.of(np.ones(4), None))


def test_nan_never_counts_as_an_answer() -> None:
    x, y = scores(4, 8)
    x[3, 0] = np.nan
    for name in ("accuracy", "top5", "nll"):
        with pytest.raises(DataError, match="finite"):
            metrics.get(name).evaluate(replay(), Data.of_arrays({"x": x}, y), 8)


def test_labels_that_do_not_fit() -> None:
    x, y = scores(4, 8)
    with pytest.raises(DataError, match="labels"):
        metrics.get("accuracy").evaluate(replay(), Data.of_arrays({"x": x}), 8)
    with pytest.raises(DataError, match=r"0…6"):
        metrics.get("accuracy").evaluate(replay(), Data.of_arrays({"x": x}, y + 3), 8)


def test_names_and_callables(tmp_path) -> None:
    with pytest.raises(CommandError, match="did you mean 'accuracy'"):
        metrics.get("acuracy")
    (tmp_path / "own.py").write_text(
        "def wrong(outputs, labels):\n    return outputs['logits'].argmax(-1) != labels\nwrong.direction = 'min'\n"
    )
    own = metrics.get(f"{tmp_path}/own.py:wrong")
    x, y = scores(6, 8)
    found = own.evaluate(replay(), Data.of_arrays({"x": x}, y), 8)
    assert found.value == pytest.approx(0.25) and found.direction == "min"
