"""Bytes of an update, by kind and encoding, as a share of the model, with the accuracy each carries: `make bench-payload`.

A network meets data that moved (noise for ResNet-20, dusk for MobileNetV1, a new task for MiniLM). Full fine-tune
and adapters of each kind learn from the same samples; every payload is built as `publish add` builds it, with its golden
outputs, and its accuracy is that of what a device decodes, in ONNX Runtime, on test data that nothing else saw. Deltas are from the payload of half as many steps to the final one. Beside them stand
bsdiff4 and zstd of the whole fine-tuned model against the one before, where those packages are there.

    python -m tests.benchmarks.bench_payload --only resnet20 --steps 200 -o payload.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

import lrcompress
from lrcompress import deltas
from lrcompress import payload as payloads
from lrcompress.data import Data
from lrcompress.encodings import ENCODINGS
from lrcompress.errors import BudgetError, LrcompressError
from lrcompress.export.payloads import payload_tensors
from lrcompress.files import write_json
from lrcompress.golden import load_golden, project
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec
from lrcompress.runtime import Session
from lrcompress.verbs.recover import recover

from .recovering import photos
from .recovering.adaptation import ASSETS, Shift, accuracy, noise, percent, regained, sentences

KINDS = ("lora", "lokr", "core", "loha")
#: What an update must carry to count: a share of what full fine-tuning regains, in a share of the model's bytes.
REGAINED, SHARES = 0.8, {"minilm": 0.005, "resnet20": 0.015, "mobilenet": 0.015}


def dusk(place: Path) -> Shift:
    """Return MobileNetV1 at 70 % of its numbers with a head for CIFAR-10, and those images dark and with little contrast."""
    train, test = (np.load(ASSETS / "data" / f"cifar10_{n}_a.npz") for n in ("train", "test"))
    known = photos.small_photos(train["x"][:3000], train["y"][:3000])
    net = photos.trained(load_file(ASSETS / "models" / "mobilenet_v1_0.5_160" / "model.safetensors"), known)
    torch.save(net.state_dict(), place / "things.pt")
    lrcompress.factorize(
        place / "things.pt", ratio=0.7, calib=known.take(slice(0, 1024)), arch=f"{photos.__name__}:things",
        output=place / "things", inputs=(InputSpec("x", "float32", ("batch", 3, 96, 96)),), exclude=("classifier",),
    )  # fmt: skip

    def part(split: Any, which: slice, seed: int) -> Data:
        return photos.small_photos(split["x"][which], split["y"][which], dusk=seed)

    return Shift(
        place / "things", part(train, slice(3000, 6000), 1), part(train, slice(6000, 6500), 2), part(test, slice(0, None, 2), 3),
        steps=150, batch_size=32,
    )  # fmt: skip


MODELS: dict[str, Callable[[Path], Shift]] = {
    "resnet20": noise,
    "minilm": sentences,
    "mobilenet": dusk,
}


def measure(name: str, options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the rows of one network."""
    with tempfile.TemporaryDirectory(prefix="lrcompress-payload-") as folder:
        place = Path(folder)
        shift = MODELS[name](place)
        steps = options.steps or shift.steps or 200
        training: dict[str, Any] = {
            "select": shift.select, "metric": "accuracy", "batch_size": shift.batch_size,
        }  # fmt: skip
        before = accuracy(lrcompress.load(shift.compressed), shift.test)
        full = recover(shift.compressed, data=shift.train, train="factors", loss="labels", steps=steps, **training)
        ceiling = accuracy(full.model, shift.test)
        plain = place / "exported-plain"
        lrcompress.export(shift.compressed, adapters=[], output=plain)
        model_bytes = (plain / "base.data").stat().st_size + (plain / "model.onnx").stat().st_size
        fp32 = _original_bytes(shift.compressed)
        tell(
            f"{name}: before {before:.4f}, full fine-tune {ceiling:.4f}; fp32 model {fp32} B, factorized {model_bytes} B"
        )
        rows = []
        for kind in options.kinds:
            for budget in options.budgets:
                try:
                    rows += _kind(kind, budget, shift, steps, training, plain, before, ceiling, fp32)
                except (BudgetError, LrcompressError) as e:
                    rows.append({"kind": kind, "budget_bytes": budget, "skipped": str(e)})
                tell(f"{name} {kind} {budget} B: " + _brief(rows[-1]))
        n = len(shift.test)
        return {
            "before": before, "full": ceiling, "n": n, "stderr": float(np.sqrt(ceiling * (1 - ceiling) / n)), "fp32_bytes": fp32,
            "factorized_bytes": model_bytes, "steps": steps, "rows": rows, "whole": _whole(shift.compressed, full.model, fp32),
        }  # fmt: skip


def _original_bytes(compressed: Path) -> int:
    """Return what the original's numbers take in float32."""
    return 4 * int(json.loads((compressed / "lrcompress.json").read_text())["report"]["params_before"])


def _kind(
    kind: str, budget: int, shift: Shift, steps: int, training: dict[str, Any], plain: Path, before: float, ceiling: float, fp32: int
) -> list[dict[str, Any]]:  # fmt: skip
    """Train one kind at one budget; return a row per encoding, and one for the delta from an earlier state."""
    folders = []
    for part, share in (("early", 0.5), ("late", 1.0)):
        folder = shift.compressed.parent / f"{kind}-{budget}-{part}"
        lrcompress.adapt(
            shift.compressed, data=shift.train, adapter_kinds=(kind,), max_bytes=budget, steps=max(1, int(steps * share)),
            output=folder, name=part, **training,
        )  # fmt: skip
        folders.append(folder)
    manifest, session = Manifest.load(plain), Session(plain)
    golden = load_golden(plain / "golden.npz")
    _, late = payload_tensors(folders[1], manifest)
    _, early = payload_tensors(folders[0], manifest)

    def built(tensors: Any, encoding: str, scales: Any = None) -> bytes:
        bare = payloads.build(tensors, manifest=manifest, kind=kind, encoding=encoding, scales=scales)
        session.swap(payloads.parse(bare))
        outputs = project(session.run(golden.inputs), max(1024, len(bare) // 10) // 2)
        return payloads.build(tensors, manifest=manifest, kind=kind, encoding=encoding, scales=scales, golden=outputs)

    rows = []
    for encoding in ENCODINGS:
        data = built(late, encoding)
        rows.append(_row(kind, budget, encoding, data, len(data), session, shift.test, before, ceiling, fp32))
    old = built(early, "int8")
    data = built(late, "int8", payloads.scales_of(old))
    delta = deltas.build(old, data)
    rows.append(_row(kind, budget, "delta", data, len(delta), session, shift.test, before, ceiling, fp32))
    return rows


def _row(
    kind: str, budget: int, encoding: str, data: bytes, sent: int, session: Session, test: Data, before: float, ceiling: float, fp32: int
) -> dict[str, Any]:  # fmt: skip
    session.swap(payloads.parse(data))
    right = 0
    for batch in test.batches(250):
        found = session.run({k: np.asarray(v) for k, v in batch.inputs.items()})
        right += int((found["output"].argmax(-1) == batch.labels).sum())
    value = right / len(test)
    return {
        "kind": kind, "budget_bytes": budget, "encoding": encoding, "bytes": sent, "share": sent / fp32, "accuracy": value,
        "regained": regained(before, value, ceiling, float(np.sqrt(ceiling * (1 - ceiling) / len(test)))), "zlib_bytes": len(zlib.compress(data, 9)),
    }  # fmt: skip


def _whole(compressed: Path, tuned: nn.Module, fp32: int) -> list[dict[str, Any]]:
    """Return what sending the whole fine-tuned model takes: as it is, compressed, and as differences to the one before."""
    old = _bytes(lrcompress.load(compressed))
    new = _bytes(tuned)
    rows = [{"way": "as it is", "bytes": len(new)}, {"way": "zlib", "bytes": len(zlib.compress(new, 9))}]
    with np.errstate(over="ignore"):
        half = [np.frombuffer(b, "<f4").astype(np.float16).tobytes() for b in (old, new)]
    if importlib.util.find_spec("bsdiff4"):
        import bsdiff4

        rows += [
            {"way": "bsdiff4, f32", "bytes": len(bsdiff4.diff(old, new))},
            {"way": "bsdiff4, f16", "bytes": len(bsdiff4.diff(*half))},
        ]
    else:
        rows.append({"way": "bsdiff4", "skipped": "pip install 'lrcompress[deltas]'"})
    if importlib.util.find_spec("zstandard"):
        import zstandard

        rows.append({"way": "zstd -19", "bytes": len(zstandard.ZstdCompressor(level=19).compress(new))})
        dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        rows.append(
            {
                "way": "zstd -19 --patch-from",
                "bytes": len(zstandard.ZstdCompressor(level=19, dict_data=dictionary).compress(new)),
            }
        )
    else:
        rows.append({"way": "zstd", "skipped": "pip install 'lrcompress[deltas]'"})
    return [{**r, "share": r["bytes"] / fp32} if "bytes" in r else r for r in rows]


def _bytes(module: nn.Module) -> bytes:
    with torch.no_grad():
        return b"".join(
            p.float().contiguous().numpy().tobytes()
            for _, p in sorted(module.state_dict().items())
            if p.is_floating_point()
        )


def _brief(row: dict[str, Any]) -> str:
    return (
        str(row["skipped"])
        if "skipped" in row
        else f"{row['bytes']} B as {row['encoding']}, accuracy {row['accuracy']:.4f}"
    )


def text(found: dict[str, Any]) -> str:
    """Return the tables."""
    lines = []
    for name, one in found.items():
        lines.append(
            f"{name}: accuracy on {one['n']} test samples (± {one['stderr']:.3f}); before {one['before']:.3f}, full fine-tune "
            f"{one['full']:.3f}; fp32 model {one['fp32_bytes']:,} B; {one['steps']} steps"
        )
        lines.append(f"{'kind':<6}{'encoding':<10}{'bytes':>9}{'share':>9}{'accuracy':>10}{'regained':>10}")
        for r in one["rows"]:
            if "skipped" in r:
                lines.append(f"{r['kind']:<6}skipped: {r['skipped']}")
                continue
            useful = " useful" if (r["regained"] or 0) >= REGAINED and r["share"] <= SHARES[name] else ""
            lines.append(
                f"{r['kind']:<6}{r['encoding']:<10}{r['bytes']:>9,}{r['share']:>9.2%}{r['accuracy']:>10.3f}{percent(r['regained']):>10}{useful}"
            )
        lines += [
            f"whole model, {w['way']:<22}"
            + (f"{w['bytes']:>10,}{w['share']:>9.1%}" if "bytes" in w else f" skipped: {w['skipped']}")
            for w in one["whole"]
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    def names(value: str) -> list[str]:
        return value.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=names, default=list(MODELS))
    parser.add_argument("--kinds", type=names, default=list(KINDS))
    parser.add_argument("--budgets", type=lambda v: [int(x) for x in v.split(",")], default=[8_000])
    parser.add_argument("--steps", type=int, default=0, help="0: those of the shift")
    parser.add_argument("-o", "--output", type=Path, default=Path("payload.json"))
    options = parser.parse_args(argv)
    found = {}
    for name in options.only:
        found[name] = measure(name, options, lambda line: print(line, file=sys.stderr, flush=True))
        write_json(options.output, found)
    print(text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
