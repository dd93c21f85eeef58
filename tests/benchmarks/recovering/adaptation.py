"""Accuracy regained on shifted data against bytes shipped, kind by kind, with a full fine-tune as the ceiling.

Shifts: `noise`, CIFAR-10 images with Gaussian noise (σ 0.08) on ResNet-20 at half its numbers; `speaker`, spoken digits of
a voice that a small network never heard; `sentences`, a new task: MiniLM at half of its encoder, which learnt to tell what
is alike, tells what is praise in film sentences (SST-2; its head is fitted to the frozen encoder); `reviews`, the same
network on IMDB's reviews, each quarter judged by what learnt from the other three, for there are few. Adapters are
rounded as their bytes are counted (`--encoding`) and judged on test data that nothing else saw. *Regained*: of what the
full fine-tune regains; nothing is said of that where the full fine-tune gains less than two standard errors.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lrcompress
from lrcompress.adapt import kinds
from lrcompress.data import Data
from lrcompress.errors import BudgetError
from lrcompress.model import InputSpec
from lrcompress.verbs.adapt import ENCODINGS
from lrcompress.verbs.recover import recover

from ..peers.networks import ROOT
from . import sentiment, speech
from .choices import some_of

ASSETS = ROOT.parent / "shared" / "assets"
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_SIGMA = 0.08


@dataclass(frozen=True)
class Shift:
    """A compressed model, and the data of another domain."""

    compressed: Path
    train: Data
    select: Data
    test: Data
    #: Where not what was asked for: a transformer is slower.
    steps: int | None = None
    batch_size: int = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this part's options."""
    group = parser.add_argument_group("adaptation")
    group.add_argument("--shifts", type=some_of(SHIFTS), default=list(SHIFTS), help=f"of {','.join(SHIFTS)}")
    group.add_argument("--budgets", default="1,4,16,64", help="thousands of bytes, separated by commas")
    group.add_argument("--adapters", type=some_of(kinds()), default=list(kinds()), help="kinds, separated by commas")
    group.add_argument("--encoding", choices=ENCODINGS, default=ENCODINGS[0], help="what bytes are counted as")
    group.add_argument("--adapt-steps", type=int, default=300, help="steps of training for each")


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure every shift, kind and budget."""
    found: dict[str, Any] = {"steps": options.adapt_steps}
    with tempfile.TemporaryDirectory() as place:
        for name in options.shifts:
            shifts = SHIFTS[name](Path(place))
            found[name] = _measured(shifts, options, lambda line, name=name: tell(f"adaptation {name}: {line}"))
    return found


def _measured(shifts: Sequence[Shift], options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure one shift; where there are several, their test data are parts of one set that is judged as a whole."""
    n = sum(len(s.test) for s in shifts)
    steps = shifts[0].steps or options.adapt_steps
    before = sum(accuracy(lrcompress.load(s.compressed), s.test) * len(s.test) for s in shifts) / n
    ceiling, numbers = 0.0, 0
    for s in shifts:
        full = recover(s.compressed, data=s.train, train="factors", loss="labels", **_training(s, steps))
        ceiling += accuracy(full.model, s.test) * len(s.test) / n
        numbers = full.data["trainable_params"]
    tell(f"before {before:.4f}, full fine-tune {ceiling:.4f} ({numbers:,} numbers)")
    stderr = math.sqrt(ceiling * (1 - ceiling) / n)
    rows = []
    for budget in map(float, options.budgets.split(",")):
        for kind in options.adapters:
            try:
                row = _adapted(shifts, kind, round(budget * 1000), options.encoding, steps)
            except BudgetError as e:
                tell(f"{kind} at {budget:g} kB: {e}")
                continue
            row["regained"] = regained(before, row["accuracy"], ceiling, stderr)
            rows.append(row)
            tell(
                f"{kind} at {budget:g} kB: {row['accuracy']:.4f}, {percent(row['regained'])} regained ({row['seconds']:.0f} s)"
            )
    return {"before": before, "full": ceiling, "steps": steps, "n": n, "stderr": stderr, "rows": rows}


def _training(shift: Shift, steps: int) -> dict[str, Any]:
    return {"steps": steps, "select": shift.select, "metric": "accuracy", "batch_size": shift.batch_size}


def _adapted(shifts: Sequence[Shift], kind: str, budget_bytes: int, encoding: str, steps: int) -> dict[str, Any]:
    """Return the row of one kind at one budget."""
    row: dict[str, Any] = {"kind": kind, "budget_bytes": budget_bytes, "encoding": encoding}
    row |= {"accuracy": 0.0, "seconds": 0.0}
    for s in shifts:
        found = lrcompress.adapt(
            s.compressed, data=s.train, adapter_kinds=(kind,), max_bytes=budget_bytes, encoding=encoding, **_training(s, steps)
        )  # fmt: skip
        told = found.data["kinds"][0]
        row |= {"bytes": told["bytes"], "layers": len(told["ranks"]), "learning_rate": told["learning_rate"]}
        row["seconds"] += told["seconds"]
        row["accuracy"] += accuracy(found.model, s.test) * len(s.test) / sum(len(o.test) for o in shifts)
    return row


def regained(before: float, after: float, ceiling: float, stderr: float) -> float | None:
    """Return what share of the full fine-tune's gain is there; None where that gain is within two standard errors."""
    return (after - before) / (ceiling - before) if ceiling - before > 2 * stderr else None


def percent(share: float | None) -> str:
    """Return a share as a person reads it."""
    return "–" if share is None else f"{share:.0%}"


def text(found: dict[str, Any]) -> str:
    """Return the tables: a row per kind, a column per budget."""
    lines = []
    for name, one in found.items():
        if name == "steps":
            continue
        budgets = sorted({r["budget_bytes"] for r in one["rows"]})
        lines.append(
            f"adaptation, {name}: accuracy on {one['n']} test samples (± {one['stderr']:.3f}); before {one['before']:.3f}, "
            f"full fine-tune {one['full']:.3f}; {one['steps']} steps each"
        )
        lines.append("kind    " + "".join(f"{b / 1000:>10g} kB" + " " * 8 for b in budgets))
        for kind in sorted({r["kind"] for r in one["rows"]}):
            cells = []
            for b in budgets:
                row = next((r for r in one["rows"] if r["kind"] == kind and r["budget_bytes"] == b), None)
                cells.append(
                    " " * 20 + "–" if row is None else f"{row['accuracy']:>13.3f} ({percent(row['regained']):>4})"
                )
            lines.append(f"{kind:<8}" + "".join(f"{c:>21}" for c in cells))
        lines.append("")
    return "\n".join(lines).rstrip()


def accuracy(module: nn.Module, data: Data) -> float:
    """Return the share of right answers."""
    module.eval()
    right = 0
    with torch.no_grad():
        for batch in data.batches(250):
            said = module(*(torch.as_tensor(v) for v in batch.inputs.values())).argmax(-1)
            right += int((said == torch.as_tensor(batch.labels)).sum())
    return right / len(data)


def noise(place: Path) -> Shift:
    """Return ResNet-20 at half its numbers and noisy CIFAR-10."""
    train, test = (np.load(ASSETS / "data" / f"cifar10_{n}_a.npz") for n in ("train", "test"))

    def data(x: np.ndarray, y: np.ndarray, seed: int, sigma: float = _SIGMA) -> Data:
        x = x.astype(np.float32) / 255
        x = np.clip(x + np.random.RandomState(seed).normal(0, sigma, x.shape).astype(np.float32), 0, 1)
        moved = np.ascontiguousarray(((x - _MEAN) / _DEVIATION).transpose(0, 3, 1, 2))
        return Data.of_arrays({"x": moved}, y.astype(np.int64))

    x, y = train["x"], train["y"]
    lrcompress.factorize(
        ASSETS / "models" / "resnet20_cifar10" / "model.safetensors", ratio=0.5, calib=data(x[:1024], y[:1024], 0, 0.0),
        arch=f"{ROOT / 'recipes' / 'archs' / 'cifar_resnet.py'}:resnet20", output=place / "noise",
        inputs=(InputSpec("x", "float32", ("batch", 3, 32, 32)),),
    )  # fmt: skip
    return Shift(
        place / "noise", data(x[:5000], y[:5000], 1), data(x[5000:6000], y[5000:6000], 2), data(test["x"], test["y"], 3)
    )


def speaker(place: Path) -> Shift:
    """Return a network of spoken digits and a voice that it never heard."""
    heard, new = speech.voices(ASSETS / "data" / "fsdd_a.npz", apart="george")
    torch.save(speech.trained(heard).state_dict(), place / "speech.pt")
    lrcompress.factorize(
        place / "speech.pt", ratio=0.5, calib=heard, arch=f"{speech.__name__}:digit_net", output=place / "speaker",
        inputs=(InputSpec("x", "float32", ("batch", 1, speech.BANDS, speech.FRAMES)),),
    )  # fmt: skip
    order = np.random.RandomState(0).permutation(len(new))
    return Shift(place / "speaker", new.take(order[:200]), new.take(order[200:280]), new.take(order[280:]))


def _sentiment(place: Path, name: str, known: Data) -> Path:
    """Write MiniLM with a head for sentiment, at half of its encoder."""
    net = sentiment.trained(known)
    torch.save(net.state_dict(), place / "sentiment.pt")
    layers = sum(m.weight.numel() for m in net.encoder.encoder.modules() if isinstance(m, nn.Linear))
    whole = sum(p.numel() for p in net.parameters())
    lrcompress.factorize(
        place / "sentiment.pt", ratio=1 - 0.5 * layers / whole, calib=known.take(slice(0, 1024)),
        arch=f"{sentiment.__name__}:classifier", exclude=("*embeddings*", "head"), output=place / name,
        inputs=sentiment.INPUTS,
    )  # fmt: skip
    return place / name


def sentences(place: Path) -> Shift:
    """Return MiniLM with a head on its frozen embeddings, and the sentences that this head learnt from, to learn more."""
    known, test = (sentiment.texts(ASSETS / "data" / f"sst2_{n}.tsv", 32) for n in ("train", "test_a"))
    order = np.random.RandomState(0).permutation(len(known))
    return Shift(
        _sentiment(place, "sentences", known), known.take(order[:4000]), known.take(order[4000:4500]), test,
        steps=200, batch_size=32,
    )  # fmt: skip


def reviews(place: Path) -> tuple[Shift, ...]:
    """Return MiniLM with a head for sentences, and reviews, which are longer and of another kind than what it learnt.

    Four times: each quarter of the reviews is judged by what learnt from the others, for there are few.
    """
    known = sentiment.texts(ASSETS / "data" / "sst2_train.tsv")
    new = sentiment.texts(ASSETS / "data" / "imdb_test_a.tsv", 128)
    compressed = _sentiment(place, "reviews", known)
    quarters = np.array_split(np.random.RandomState(0).permutation(len(new)), 4)
    shifts = []
    for i, judged in enumerate(quarters):
        rest = np.concatenate([q for j, q in enumerate(quarters) if j != i])
        learnt, held = new.take(rest[200:]), new.take(rest[:200])
        shifts.append(Shift(compressed, learnt, held, new.take(judged), steps=120, batch_size=16))
    return tuple(shifts)


SHIFTS: dict[str, Callable[[Path], tuple[Shift, ...]]] = {
    "noise": lambda place: (noise(place),),
    "speaker": lambda place: (speaker(place),),
    "sentences": lambda place: (sentences(place),),
    "reviews": reviews,
}
