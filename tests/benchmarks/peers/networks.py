"""The networks of the comparison: how they are opened, calibrated, budgeted and judged.

    network = open_network("resnet20", seed=0, quick=False)
    budget = network.budget(0.5)          # numbers that the layers in scope may store
    network.judge(predict)                # {"accuracy": …, "stderr": …}

A budget is a share of the whole network for ResNet-20 and of the encoder's linear layers for MiniLM. Calibration uses
training data only: with seed 0 the first 1,024 images and evenly spaced sentences, with others a random draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompress import metrics, recipe
from lrcompress.data import Data
from lrcompress.metrics import Predict
from lrcompress.model import OpenedModel, open_model, tensors_of
from lrcompress.model.surgery import Layer, count_parameters, find_layers
from lrcompress.verbs.predict import predictor
from lrcompress.verbs.sources import for_model

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Profile:
    """What the comparison fixes for a network: recipe, scope, sample counts (whole run, quick run), metric, ratios."""

    recipe: str
    metric: str
    kept: tuple[float, ...]
    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    exclude: tuple[str, ...] = ()
    whole: bool = True
    #: What uniform rows leave dense, as is usual: a share of three input channels is no share at all.
    spared: tuple[str, ...] = ()


PROFILES = {
    "resnet20": Profile(
        "resnet20-cifar10", "accuracy", (0.5, 0.35), (1024, 128), (5000, 500), spared=("conv1", "linear")
    ),
    "minilm": Profile(
        "minilm-sts", "spearman", (0.5, 0.4), (2048, 128), (1380, 200), ("*embeddings*", "pooler*"), whole=False
    ),
}


@dataclass(frozen=True)
class Network:
    """`layers`: those in scope, in depth order; `calibration` has labels, which only AIMET's search asks for."""

    name: str
    profile: Profile
    opened: OpenedModel
    module: nn.Module
    layers: list[Layer]
    calibration: Data
    evaluation: Data
    seed: int
    quick: bool

    @property
    def params(self) -> int:
        return count_parameters(self.module)

    @property
    def in_scope(self) -> int:
        return sum(layer.weight.numel() for layer in self.layers)

    def budget(self, kept: float) -> int:
        """Return how many numbers the layers in scope may store."""
        fixed = self.params - self.in_scope if self.profile.whole else 0
        return math.floor(kept * (self.in_scope + fixed)) - fixed

    def ratio(self, kept: float) -> float:
        """Return the share of the whole network that the same budget leaves."""
        return (self.params - self.in_scope + self.budget(kept)) / self.params

    def judge(self, predict: Predict) -> dict[str, Any]:
        """Return the metric on held-out data with its standard error, and for sentences the cosine to the original."""
        found = metrics.get(self.profile.metric).evaluate(predict, self.evaluation, 250)
        result: dict[str, Any] = {"metric": found.name, "value": found.value, "n": found.n, "stderr": found.stderr}
        if self.profile.metric == "spearman":
            original = predictor(self.opened, self.module)
            cosine = metrics.get("cosine_to_original").evaluate(predict, self.evaluation, 250, original=original)
            result |= {"cosine": cosine.value, "cosine_stderr": cosine.stderr}
        return result

    def batches(self, samples: int, size: int = 64) -> list[dict[str, Tensor]]:
        """Return the first calibration samples as batches of tensors by input name."""
        data = self.calibration.take(slice(0, min(samples, len(self.calibration))))
        return [tensors_of(b.inputs, torch.device("cpu")) for b in data.batches(size)]


def open_network(name: str, *, seed: int, quick: bool) -> Network:
    """Open the network `name` with the calibration draw of `seed`; `quick` takes small data."""
    profile = PROFILES[name]
    found = recipe.load(ROOT / "recipes" / f"{profile.recipe}.yaml")
    assert found.model.source is not None
    arch = None if found.model.arch is None else recipe.resolve(found, found.model.arch)
    opened = open_model(recipe.resolve(found, found.model.source), arch=arch, inputs=found.inputs)
    assert opened.module is not None
    train = for_model(f"{found.path}:train", opened)
    calibration = train.take(_draw(train, profile.calibration[quick], seed))
    evaluation = for_model(f"{found.path}:test", opened)
    evaluation = evaluation.take(slice(0, min(profile.evaluation[quick], len(evaluation))))
    layers = [
        layer
        for layer in find_layers(opened.module)
        if layer.reason is None and not any(fnmatchcase(layer.name, p) for p in profile.exclude)
    ]
    return Network(name, profile, opened, opened.module, layers, calibration, evaluation, seed, quick)


def _draw(data: Data, samples: int, seed: int) -> np.ndarray:
    """Return sample indices; pairs stay together. Pairs are sorted by kind: seed 0 takes evenly spaced ones."""
    width = 2 if data.pairs else 1
    rows, wanted = len(data) // width, samples // width
    if seed:
        chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:wanted])
    elif data.pairs:
        chosen = np.linspace(0, rows - 1, wanted).round().astype(np.int64)
    else:
        chosen = np.arange(wanted)
    return np.asarray((chosen[:, None] * width + np.arange(width)).reshape(-1))
