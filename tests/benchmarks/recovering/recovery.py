"""Accuracy won back by distillation from the original, no labels, within a time: ResNet-20 and MiniLM.

Each network is factorized on calibration data to a share of its numbers (of the encoder's, for MiniLM), then trained for
the given seconds. Held-out training data decide what is kept; the metric is of the test half that nothing else saw, with
the standard error of the paired difference where samples can be paired.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lrcompress
from lrcompress import recipe
from lrcompress.adapt import kinds
from lrcompress.data import Data
from lrcompress.verbs.predict import predictor
from lrcompress.verbs.recover import recover
from lrcompress.verbs.sources import for_model

from ..peers.networks import PROFILES, ROOT, Network, open_network
from .choices import some_of

#: network → (shares kept, seconds, what is trained)
RUNS: dict[str, tuple[tuple[float, ...], float, tuple[str, ...]]] = {
    "resnet20": ((0.5, 0.35, 0.25), 60.0, ("factors", "lora")),
    "minilm": ((0.5,), 300.0, ("factors", "lora")),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this part's options."""
    group = parser.add_argument_group("recovery")
    group.add_argument("--networks", type=some_of(RUNS), default=list(RUNS), help=f"of {','.join(RUNS)}")
    group.add_argument("--shares", help="shares kept, instead of the usual ones")
    group.add_argument("--seconds", type=float, help="seconds of training, instead of the usual ones")
    trained = ("factors", *kinds())
    group.add_argument("--trained", type=some_of(trained), help=f"of {', '.join(trained)}, instead of the usual ones")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Factorize, train and judge every case."""
    rows = []
    for name in options.networks:
        shares, seconds, trained = RUNS[name]
        shares = tuple(map(float, options.shares.split(","))) if options.shares else shares
        network = open_network(name, seed=0, quick=False)
        train, select = _samples(network)
        for share in shares:
            with tempfile.TemporaryDirectory() as place:
                base = Path(place) / "compressed"
                lrcompress.factorize(
                    network.opened, ratio=network.ratio(share), calib=network.calibration, exclude=network.profile.exclude,
                    output=base,
                )  # fmt: skip
                for what in options.trained or trained:
                    rows.append(_trained(network, base, what, options.seconds or seconds, train, select))
                    rows[-1] |= {"network": name, "kept": share}
                    tell(f"recovery: {_line(rows[-1])}")
    return {"rows": rows, "threads": torch.get_num_threads()}


def _samples(network: Network) -> tuple[Data, Data]:
    """Return what to train and what to select on: never the test half."""
    found = recipe.load(ROOT / "recipes" / f"{PROFILES[network.name].recipe}.yaml")
    return for_model(f"{found.path}:train", network.opened), for_model(f"{found.path}:select", network.opened)


def _trained(network: Network, base: Path, what: str, seconds: float, train: Data, select: Data) -> dict[str, Any]:
    kind = {"train": "factors"} if what == "factors" else {"adapter_kind": what, "rank": 8}
    before = judged(network, lrcompress.load(base))
    started = time.perf_counter()
    found = recover(
        base, data=train, select=select, original=network.opened, max_seconds=seconds, closed="off", **kind,  # type: ignore[arg-type]
    )  # fmt: skip
    spent = time.perf_counter() - started
    after = judged(network, found.model)
    return {
        "trained": what, "metric": after["metric"], "n": after["n"], "before": before["value"], "after": after["value"],
        "stderr": _paired(before, after), "loss_before": found.data["loss"]["before"], "loss_after": found.data["loss"]["after"],
        "steps": found.data["steps"], "best_step": found.data["best_step"], "seconds": spent,
        "learning_rate": found.data["learning_rate"], "numbers": found.data["trainable_params"],
    }  # fmt: skip


def judged(network: Network, module: nn.Module) -> dict[str, Any]:
    """Return the metric on the test half, and for classes what was right."""
    predict = predictor(network.opened, module.eval())
    found = network.judge(predict)
    if found["metric"] == "accuracy":
        said = [next(iter(predict(b.inputs).values())).argmax(-1) == b.labels for b in network.evaluation.batches(250)]
        found["right"] = np.concatenate([np.asarray(s) for s in said])
    return found


def _paired(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return the standard error of the difference; of the metric itself where samples cannot be paired."""
    if "right" not in after:
        return float(after["stderr"])
    difference = after["right"].astype(float) - before["right"]
    return float(difference.std(ddof=1) / math.sqrt(len(difference)))


def text(found: dict[str, Any]) -> str:
    """Return the table."""
    return "\n".join([f"recovery by distillation, {found['threads']} threads", *map(_line, found["rows"])])


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['network']:<9} {row['kept']:<5} {row['trained']:<8} {row['metric']} {row['before']:.4f} → {row['after']:.4f} "
        f"± {row['stderr']:.4f} (n = {row['n']:,}), loss {row['loss_before']:.4g} → {row['loss_after']:.4g}, "
        f"{row['numbers']:,} numbers, {row['steps']} steps at {row['learning_rate']:.1g} in {row['seconds']:.0f} s"
    )
