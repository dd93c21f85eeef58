"""What a model is worth on data: a value, a direction, n, and a standard error.

    result = get("accuracy").evaluate(predict, data, batch_size=250)
    print(f"{result.value:.4f} ± {result.stderr:.4f} (n = {result.n})")

`predict` maps arrays by input name to arrays by output name, whatever computes them. The standard error is binomial
for shares, σ/√n for means, a seeded bootstrap for Spearman and perplexity. `paired` compares two models on the
same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import numpy as np

from .data import Data
from .data._callables import is_callable_source, load_callable
from .errors import CommandError, DataError

Arrays = Mapping[str, np.ndarray]
Predict = Callable[[dict[str, np.ndarray]], Arrays]
#: (outputs, reference outputs of the original or None, inputs, labels) -> one number per sample, or per pair
PerSample = Callable[[Arrays, Arrays | None, Arrays, np.ndarray | None], np.ndarray]
#: (numbers per sample, labels) -> the value
Reduce = Callable[[np.ndarray, np.ndarray | None], float]

#: Outputs that stand for the answer, most telling first.
TELLING = ("logits", "sentence_embedding", "output", "pooler_output", "last_hidden_state")
_RESAMPLES = 400


@dataclass(frozen=True)
class MetricResult:
    """`per_sample`: the numbers that `value` was made of (scores for Spearman, hits for accuracy, …)."""

    name: str
    direction: str
    value: float
    n: int
    stderr: float
    per_sample: np.ndarray
    labels: np.ndarray | None = None
    reduce: Reduce = field(default=lambda v, _: float(np.mean(v)), compare=False)
    is_mean: bool = True

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "direction": self.direction, "value": self.value, "n": self.n, "stderr": self.stderr}


@dataclass(frozen=True)
class Paired:
    """How much worse the second is than the first on the same samples: `drop` > 0 is a loss either direction."""

    drop: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Metric:
    """One measure. `direction`: "max" or "min" is better."""

    name: str
    direction: str
    needs_labels: bool
    per_sample: PerSample
    reduce: Reduce
    kind: str = "mean"
    needs_original: bool = False

    def evaluate(
        self, predict: Predict, data: Data, batch_size: int = 250, *, original: Predict | None = None
    ) -> MetricResult:
        """Return the metric of `predict` on `data`; raises `DataError` for missing labels or answers not finite."""
        if self.needs_labels and data.labels is None:
            raise DataError(data.origin, f"labels for the metric {self.name}", "none", "add an array y")
        if self.needs_original and original is None:
            raise CommandError(
                f"metric {self.name}", "the original model to compare with", "none", "name it with --original"
            )
        parts = []
        for batch in data.batches(batch_size):
            outputs = predict(batch.inputs)
            reference = original(batch.inputs) if original is not None and self.needs_original else None
            parts.append(np.asarray(self.per_sample(outputs, reference, batch.inputs, batch.labels), dtype=np.float64))
        if not parts:
            raise DataError(data.origin, "at least one sample", "none")
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise DataError(f"metric {self.name} on {data.origin}", "finite answers", "NaN or infinity")
        return self.of(values, data.labels)

    def of(self, values: np.ndarray, labels: np.ndarray | None) -> MetricResult:
        """Return the result for numbers per sample."""
        value, n = self.reduce(values, labels), len(values)
        if self.kind == "share":
            stderr = float(np.sqrt(value * (1 - value) / n))
        elif self.kind == "mean":
            stderr = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
        else:
            stderr = float(
                np.std(_bootstrap(lambda i: self.reduce(values[i], None if labels is None else labels[i]), n), ddof=1)
            )
        return MetricResult(
            self.name, self.direction, value, n, stderr, values, labels, self.reduce, self.kind != "bootstrap"
        )


def paired(first: MetricResult, second: MetricResult) -> Paired:
    """Return the drop from `first` to `second`, with the standard error of the paired difference."""
    if first.name != second.name or first.n != second.n:
        raise ValueError(f"{first.name} on {first.n} and {second.name} on {second.n} samples are no pair")
    sign = 1.0 if first.direction == "max" else -1.0
    drop = sign * (first.value - second.value)
    if first.is_mean:
        difference = first.per_sample - second.per_sample
        return Paired(drop, float(difference.std(ddof=1) / np.sqrt(first.n)) if first.n > 1 else 0.0, first.n)

    def resampled(i: np.ndarray) -> float:
        labels = None if first.labels is None else first.labels[i]
        return first.reduce(first.per_sample[i], labels) - second.reduce(second.per_sample[i], labels)

    return Paired(drop, float(np.std(_bootstrap(resampled, first.n), ddof=1)), first.n)


def _bootstrap(statistic: Callable[[np.ndarray], float], n: int, seed: int = 0) -> np.ndarray:
    """Return `statistic` on resampled indices; the same seed for every result of one size."""
    generator = np.random.default_rng(seed)
    return np.asarray([statistic(generator.integers(0, n, n)) for _ in range(_RESAMPLES)])


def get(name: str) -> Metric:
    """Return the metric `name`, or the one that `pkg.mod:callable` makes; raises `CommandError` with the nearest name.

    A callable takes (outputs, labels) and returns one number per sample; their mean is the value, and its attribute
    `direction` ("max" unless it says "min") tells what is better.
    """
    if name in METRICS:
        return METRICS[name]
    if is_callable_source(name):
        function = load_callable(name)
        return Metric(
            name,
            getattr(function, "direction", "max"),
            False,
            lambda out, _, __, labels: np.asarray(function(out, labels)),
            _mean,
        )
    near = get_close_matches(name, METRICS, 1)
    raise CommandError(
        "metric",
        f"one of {', '.join(METRICS)}, or pkg.mod:callable",
        name,
        f"did you mean {near[0]!r}?" if near else "",
    )


def answer_name(outputs: Arrays) -> str:
    """Return the name of the output that stands for the answer."""
    return next((n for n in TELLING if n in outputs), next(iter(outputs)))


def answer(outputs: Arrays) -> np.ndarray:
    """Return the output that stands for the answer."""
    return np.asarray(outputs[answer_name(outputs)])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two rows of numbers; ties share their mean rank, a constant row gives 0."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_rank = (ends - counts + 1 + ends) / 2
    return np.asarray(mean_rank[inverse.reshape(-1)], dtype=np.float64)


def _mean(values: np.ndarray, _: np.ndarray | None) -> float:
    return float(np.mean(values))


def _classes(outputs: Arrays, labels: np.ndarray | None, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (samples, classes) and class numbers, checked against each other."""
    scores = answer(outputs)
    assert labels is not None
    if scores.ndim != 2 or labels.ndim != 1 or len(scores) != len(labels):
        raise DataError(
            f"metric {metric}",
            "one row of scores and one class per sample",
            f"scores {scores.shape}, labels {labels.shape}",
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise DataError(
            f"metric {metric}: labels", f"class numbers 0…{scores.shape[1] - 1}", f"{labels.min()}…{labels.max()}"
        )
    return scores, labels


def _finite(scores: np.ndarray, hits: np.ndarray) -> np.ndarray:
    # A row of NaN must not count as a wrong (or right) answer: it surfaces as not finite.
    return np.where(np.isfinite(scores).all(-1), hits.astype(np.float64), np.nan)


def _accuracy(outputs: Arrays, _: Arrays | None, __: Arrays, labels: np.ndarray | None) -> np.ndarray:
    scores, classes = _classes(outputs, labels, "accuracy")
    return _finite(scores, scores.argmax(-1) == classes)


def _top5(outputs: Arrays, _: Arrays | None, __: Arrays, labels: np.ndarray | None) -> np.ndarray:
    scores, classes = _classes(outputs, labels, "top5")
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :5]
    return _finite(scores, (best == classes[:, None]).any(-1))


def _cosines(outputs: Arrays, _: Arrays | None, __: Arrays, labels: np.ndarray | None) -> np.ndarray:
    """Return the cosine of each pair's two answers, or the answer itself where samples are scored one by one."""
    y = answer(outputs).astype(np.float64)
    if labels is not None and len(labels) == len(y) and y.reshape(len(y), -1).shape[1] == 1:
        return y.reshape(-1)
    if labels is None or 2 * len(labels) != len(y) or y.ndim != 2:
        raise DataError("metric spearman", "pairs of embeddings, or one score per sample", f"answers {y.shape}")
    return _cosine(y[0::2], y[1::2])


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.where(scale > 0, scale, 1.0))


def _nll(outputs: Arrays, _: Arrays | None, inputs: Arrays, labels: np.ndarray | None) -> np.ndarray:
    """Return the mean negative log-likelihood of each sample: of its class, or of its next tokens."""
    scores = answer(outputs).astype(np.float64)
    if scores.ndim == 2:
        if labels is None:
            raise DataError("metric nll", "labels", "none", "add an array y")
        scores, classes = _classes({"logits": scores}, labels, "nll")
        return np.asarray(-_log_softmax(scores)[np.arange(len(scores)), classes])
    ids = inputs.get("input_ids")
    if labels is None and ids is None:
        raise DataError("metric nll", "labels, or an input called input_ids", "neither")
    if labels is None:
        assert ids is not None
        scores, targets = scores[:, :-1], ids[:, 1:]
        mask = (
            inputs["attention_mask"][:, 1:].astype(bool) if "attention_mask" in inputs else np.ones(targets.shape, bool)
        )
    else:
        targets, mask = np.maximum(labels, 0), labels >= 0
    picked = np.take_along_axis(_log_softmax(scores), targets[..., None].astype(np.int64), -1)[..., 0]
    return np.asarray(-(picked * mask).sum(-1) / np.maximum(mask.sum(-1), 1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _mse(outputs: Arrays, reference: Arrays | None, _: Arrays, labels: np.ndarray | None) -> np.ndarray:
    y = answer(outputs).astype(np.float64)
    assert labels is not None
    if y.size != labels.size:
        raise DataError("metric mse", f"labels of shape {y.shape}", labels.shape)
    return np.asarray(np.square(y.reshape(len(y), -1) - labels.reshape(len(y), -1)).mean(-1))


def _cosine_to_original(outputs: Arrays, reference: Arrays | None, _: Arrays, __: np.ndarray | None) -> np.ndarray:
    assert reference is not None
    a, b = (answer(o).astype(np.float64) for o in (outputs, reference))
    return _cosine(a.reshape(len(a), -1), b.reshape(len(b), -1))


def _spearman(values: np.ndarray, labels: np.ndarray | None) -> float:
    assert labels is not None
    return spearman(values, labels)


def _perplexity(values: np.ndarray, _: np.ndarray | None) -> float:
    return float(np.exp(np.mean(values)))


_ALL: Sequence[Metric] = (
    Metric("accuracy", "max", True, _accuracy, _mean, "share"),
    Metric("top5", "max", True, _top5, _mean, "share"),
    Metric("spearman", "max", True, _cosines, _spearman, "bootstrap"),
    Metric("nll", "min", False, _nll, _mean),
    Metric("perplexity", "min", False, _nll, _perplexity, "bootstrap"),
    Metric("mse", "min", True, _mse, _mean),
    Metric("cosine_to_original", "max", False, _cosine_to_original, _mean, needs_original=True),
)
METRICS: dict[str, Metric] = {m.name: m for m in _ALL}
