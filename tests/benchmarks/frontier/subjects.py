"""The networks of the frontier: how they are opened, calibrated and judged, on data that neither calibration saw.

subject = open_subject("resnet20", quick=False)
subject.judge(predict)                # {"metric": "accuracy", "value": …, "stderr": …, "n": …}
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lrcompress import metrics, recipe
from lrcompress.data import Data, open_data
from lrcompress.metrics import MetricResult, Predict
from lrcompress.model import InputSpec, OpenedModel, open_model
from lrcompress.verbs.predict import predictor
from lrcompress.verbs.sources import for_model

ROOT = Path(__file__).resolve().parents[3]
ARCHS = ROOT / "tests" / "support" / "archs.py"
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
    #: How the network is judged where answers to single samples do not tell.
    judged: Callable[[Predict], MetricResult] | None = None

    @property
    def best(self) -> str:
        return metrics.get(self.metric).direction

    def judge(self, predict: Predict) -> dict[str, Any]:
        """Return the metric on held-out data with its standard error."""
        if self.judged is not None:
            return self.judged(predict).as_dict()
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


def _photos(name: str, folder: str, size: int, mean: float, std: float) -> Callable[[bool], Subject]:
    """ImageNet sample: every fifth image calibrates, the others judge (they are of the training set, as the readme says)."""

    def opened(quick: bool) -> Subject:
        spec = InputSpec("x", "float32", ("batch", 3, size, size))
        source = assets() / "models" / folder / "model.safetensors"
        model = open_model(source, arch=f"{ARCHS}:{name}", inputs=(spec,))
        scaled = {"x": {"layout": "nhwc_to_nchw", "scale": 1 / 255, "mean": [mean] * 3, "std": [std] * 3}}
        images = open_data(assets() / "data" / "imagenet_sample_a", inputs=(spec,), preprocess=scaled)
        at = np.arange(len(images))
        return Subject(name, model, *_cut(images.take(at[::5]), images.take(at[at % 5 != 0]), 400, quick), "accuracy")

    return opened


def _keywords(quick: bool) -> Subject:
    """Speech commands: every fifth clip calibrates, the others judge."""
    spec = InputSpec("x", "float32", ("batch", 1, 49, 10))
    source = assets() / "models" / "kws_dscnn" / "model.safetensors"
    model = open_model(source, arch=f"{ARCHS}:kws_dscnn", inputs=(spec,))
    with np.load(assets() / "data" / "kws01_a.npz") as found:
        x, y = found["x_int8"].astype(np.float32)[:, None], found["y"].astype(np.int64)
    clips = Data.of_arrays({"x": (x - 83) * np.float32(0.5847029089927673)}, y)
    at = np.arange(len(clips))
    return Subject("kws_dscnn", model, *_cut(clips.take(at[::5]), clips.take(at[at % 5 != 0]), 400, quick), "accuracy")


def _characters(quick: bool) -> Subject:
    """Shakespeare, which it was trained on: the last 500 rows of 200 characters judge, what it reads before them calibrates.

    Every network walks through the rows by itself, with its own states; the first 50 characters of a row do not count.
    """
    from tests.support import characters

    with tempfile.TemporaryDirectory() as folder:
        # Named by what it holds: what is factorized of it is built again from the architecture, not from this file.
        save_file(characters.weights(assets()), path := Path(folder) / "char.safetensors")
        model = open_model(path, arch=f"{ARCHS}:char_step", inputs=characters.INPUTS)
    ids = characters.rows(assets(), 50 if quick else 500, 200)
    earlier = characters.rows(assets(), 16, 64, before=500 * 200)
    assert model.module is not None
    data = characters.read_on(predictor(model, model.module), earlier)
    nll = metrics.get("nll")

    def judged(predict: Predict) -> MetricResult:
        losses = [loss for _, loss in characters.walk(predict, ids)]
        return nll.of(np.mean(losses[50:], 0), None)

    return Subject("char_lstm", model, data, data, "nll", judged)


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
    "mobilenet": _photos("mobilenet", "mobilenet_v1_0.5_160", 160, 0.5, 0.5),
    "tiny_darknet": _photos("tiny_darknet", "tiny_darknet", 224, 0.0, 1.0),
    "kws_dscnn": _keywords,
    "char_lstm": _characters,
    "stories260k": _stories,
    "minilm": _of_recipe("minilm-sts", "spearman", 1380),
}
