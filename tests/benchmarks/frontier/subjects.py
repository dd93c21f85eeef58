"""The networks of the frontier: how they are opened, calibrated and judged, on data that neither calibration saw.

subject = open_subject("resnet20", quick=False)
subject.judge(predict)                # {"metric": "accuracy", "value": …, "stderr": …, "n": …}
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress import metrics, recipe
from lrcompress.data import Data, open_data
from lrcompress.metrics import Predict
from lrcompress.model import InputSpec, OpenedModel, open_model
from lrcompress.verbs.sources import for_model

ROOT = Path(__file__).resolve().parents[3]
ARCHS = Path(__file__).with_name("archs.py")
_BATCH = 100


def assets() -> Path:
    """Return the folder of pretrained networks and data."""
    return Path(os.environ.get("LRCOMPRESS_ASSETS", ROOT / ".." / "shared" / "assets")).resolve()


@dataclass(frozen=True)
class Subject:
    """`best`: whether more ("max") or less ("min") of the metric is better. `evaluation` is judged on, nothing else is."""

    name: str
    opened: OpenedModel
    calibration: Data
    evaluation: Data
    metric: str

    @property
    def best(self) -> str:
        return metrics.get(self.metric).direction

    def judge(self, predict: Predict) -> dict[str, Any]:
        """Return the metric on held-out data with its standard error."""
        return metrics.get(self.metric).evaluate(predict, self.evaluation, _BATCH).as_dict()

    def request(self) -> dict[str, np.ndarray]:
        """Return one sample of usual length as a batch of one, which is what is timed."""
        batch = next(iter(self.evaluation.take(slice(0, 64)).batches(64))).inputs
        mask = batch.get("attention_mask")
        if mask is None:
            return {k: np.asarray(v[:1]) for k, v in batch.items()}
        lengths = np.asarray(mask).sum(1)
        at = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
        return {k: np.ascontiguousarray(v[at : at + 1, : int(lengths[at])]) for k, v in batch.items()}


def open_subject(name: str, *, quick: bool = False) -> Subject:
    """Open a network; `quick` takes a tenth of the samples."""
    return SUBJECTS[name](quick)


def _of_recipe(name: str, metric: str, samples: int) -> Callable[[bool], Subject]:
    def opened(quick: bool) -> Subject:
        found = recipe.load(ROOT / "recipes" / f"{name}.yaml")
        assert found.model.source is not None
        arch = None if found.model.arch is None else recipe.resolve(found, found.model.arch)
        model = open_model(recipe.resolve(found, found.model.source), arch=arch, inputs=found.inputs)
        calibration = for_model(f"{found.path}:calibration", model)
        evaluation = for_model(f"{found.path}:test", model)
        return Subject(found.name, model, *_cut(calibration, evaluation, samples, quick), metric)

    return opened


def _cut(calibration: Data, evaluation: Data, samples: int, quick: bool) -> tuple[Data, Data]:
    few = 10 if quick else 1
    return calibration.take(slice(0, max(len(calibration) // few, 64))), evaluation.take(slice(0, samples // few))


def _mobilenet(quick: bool) -> Subject:
    """ImageNet sample: every fifth image calibrates, the others judge (they are of the training set, as the readme says)."""
    spec = InputSpec("x", "float32", ("batch", 3, 160, 160))
    source = assets() / "models" / "mobilenet_v1_0.5_160" / "model.safetensors"
    model = open_model(source, arch=f"{ARCHS}:mobilenet", inputs=(spec,))
    scaled = {"x": {"layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3}}
    images = open_data(assets() / "data" / "imagenet_sample_a", inputs=(spec,), preprocess=scaled)
    at = np.arange(len(images))
    return Subject(
        "mobilenet", model, *_cut(images.take(at[::5]), images.take(at[at % 5 != 0]), 400, quick), "accuracy"
    )


def _resnet8(quick: bool) -> Subject:
    spec = InputSpec("x", "float32", ("batch", 3, 32, 32))
    source = assets() / "models" / "resnet8_cifar10" / "model.safetensors"
    model = open_model(source, arch=f"{ARCHS}:resnet8", inputs=(spec,))
    plain = {"x": {"layout": "nhwc_to_nchw", "scale": 1.0}}
    train = open_data(assets() / "data" / "cifar10_train_a.npz", inputs=(spec,), preprocess=plain, limit=512)
    test = open_data(assets() / "data" / "cifar10_test_a.npz", inputs=(spec,), preprocess=plain)
    return Subject("resnet8", model, *_cut(train, test, 5000, quick), "accuracy")


def _stories(quick: bool) -> Subject:
    """TinyStories in rows of 256 tokens: the first 64 rows calibrate, the last judge."""
    model = open_model(assets() / "models" / "stories260k")
    tokens = np.load(assets() / "data" / "tinystories_val_a.tokens512.npy").astype(np.int64)
    rows = tokens[: len(tokens) // 256 * 256].reshape(-1, 256)

    def data(part: np.ndarray) -> Data:
        return Data.of_arrays({"input_ids": part, "attention_mask": np.ones_like(part)})

    return Subject("stories260k", model, *_cut(data(rows[:64]), data(rows[-200:]), 200, quick), "nll")


SUBJECTS: dict[str, Callable[[bool], Subject]] = {
    "resnet20": _of_recipe("resnet20-cifar10", "accuracy", 5000),
    "resnet8": _resnet8,
    "mobilenet": _mobilenet,
    "stories260k": _stories,
    "minilm": _of_recipe("minilm-sts", "spearman", 1380),
}
