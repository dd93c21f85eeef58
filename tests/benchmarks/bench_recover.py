"""Training adapters: speed against other packages, recovery, adaptation: `make bench-recover`.

Each part is a module of `recovering` with `add_options(parser)`, `run(options, tell)` and `text(found)`. Written to
--output: recover.json (every number, machine, versions) and recover.txt (the tables).

    python -m tests.benchmarks.bench_recover --only speed --kinds loha,lokr --rounds 31
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lrcompress.errors import LrcompressError
from lrcompress.files import write_json

from .peers.networks import ROOT
from .recovering.choices import some_of

JSON, TEXT = "recover.json", "recover.txt"
_PARTS = ("speed", "recovery", "adaptation")
_PACKAGES = ("torch", "peft", "lycoris_lora", "numpy")


def main() -> int:
    """Run the parts that were asked for and write the files as they come."""
    known = {n: m for n in _PARTS if (m := _part(n)) is not None}
    options = _options(known)
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": _machine(), "versions": _versions()}
    tables = []
    for name in options.only:
        found[name] = known[name].run(options, lambda line: print(line, file=sys.stderr, flush=True))
        tables.append(known[name].text(found[name]))
        write_json(options.output / JSON, found)
        (options.output / TEXT).write_text("\n\n".join(tables) + "\n")
    print((options.output / TEXT).read_text(), end="")
    return 0


def _part(name: str) -> ModuleType | None:
    path = f"{__package__}.recovering.{name}"
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


def _options(known: dict[str, ModuleType]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the training of adapters.")
    parser.add_argument("--only", type=some_of(known), default=list(known), help=f"of {','.join(known)}")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench-recover")
    for part in known.values():
        part.add_options(parser)
    return parser.parse_args()


def _machine() -> dict[str, Any]:
    models = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if n.startswith("model name")]
    return {
        "system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in _PACKAGES}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LrcompressError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
