"""Stages of a run: a folder per stage, named by the digest of everything that decides its content.

A stage is finished or absent: it is built in a staging folder and renamed, and `stage.json` inside lists the hashes of
its files. A stage whose record and files agree is not built again; whatever a killed run left is swept away.

    run/ run.json                      the resolved recipe, seeds, versions, the stages and their digests
         stages/<name>-<key>/stage.json
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import CommandError, HostError
from ..files import disk_errors, finite, made_by, sha256_file, sha256_json, staged_folder, write_json
from ..progress import Progress

MAKER = "lrcompress run"
MARKER = "run.json"
RECORD = "stage.json"
#: Packages whose version may change a result.
_PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxscript", "safetensors", "torch")


@dataclass(frozen=True)
class Stage:
    """A finished stage: where it lies, what it found, whether this run had to build it."""

    name: str
    key: str
    folder: Path
    result: dict[str, Any]
    outputs: dict[str, str]
    seconds: float
    reused: bool

    @property
    def digest(self) -> str:
        """One hash of all output files."""
        return sha256_json(self.outputs)


def versions() -> dict[str, str]:
    """Return the versions that go into every key."""
    return {"lrcompress": __version__, **{p: importlib.metadata.version(p) for p in _PACKAGES}}


@dataclass
class Store:
    """The stages of one run directory."""

    folder: Path
    progress: Progress
    total: int
    done: list[Stage] = field(default_factory=list)

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        build: Callable[[Path], dict[str, Any]],
        *,
        needs: tuple[Path, ...] = (),
    ) -> Stage:
        """Return the stage `name` for `inputs`, building it in a staging folder unless it is there, whole.

        `build` fills the folder it is given and returns what it found. `needs` are paths outside the stage that must
        exist too for it to count as done.
        """
        key = sha256_json({"stage": name, "inputs": finite(dict(inputs)), "versions": versions()})
        dest = self.folder / "stages" / f"{name}-{key[:16]}"
        found = _finished(dest, name, key) if all(p.exists() for p in needs) else None
        if found is None:
            found = self._build(dest, name, key, build)
        self.done.append(found)
        return found

    def _build(self, dest: Path, name: str, key: str, build: Callable[[Path], dict[str, Any]]) -> Stage:
        if dest.exists():
            # Inside stages/ everything is ours: a folder without a true record is what rot or a stranger left.
            shutil.rmtree(dest)
        started = time.perf_counter()
        with self.progress.task(f"{len(self.done) + 1}/{self.total} {name}", total=1) as advance:
            with staged_folder(dest, maker=MAKER, marker=RECORD) as stage:
                result = finite(build(stage))
                outputs = _hashes(stage)
                seconds = time.perf_counter() - started
                record = {
                    "schema": 1,
                    "made_by": MAKER,
                    "stage": name,
                    "key": key,
                    "outputs": outputs,
                    "result": result,
                    "seconds": seconds,
                }
                write_json(stage / RECORD, record)
            advance(1)
        return Stage(name, key, dest, result, outputs, seconds, False)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): sha256_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / RECORD
    }


def _finished(dest: Path, name: str, key: str) -> Stage | None:
    """Return the stage in `dest` if its record is this one's and every file is what the record says."""
    if made_by(dest, RECORD) != MAKER:
        return None
    try:
        record = json.loads((dest / RECORD).read_text())
        whole = record["key"] == key and record["outputs"] == _hashes(dest)
        return Stage(name, key, dest, record["result"], record["outputs"], record["seconds"], True) if whole else None
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` ours for one run: refuse a stranger's folder and a second run beside this one (both exit 2)."""
    if folder.exists() and not folder.is_dir():
        raise CommandError(folder, "a folder for the run", "a file", "choose another one with --run-dir")
    if (
        folder.is_dir()
        and made_by(folder, MARKER) != MAKER
        and any(p.name != ".lock" and p.suffix != ".tmp" for p in folder.iterdir())
    ):
        raise CommandError(
            folder,
            f"a folder that '{MAKER}' made, or none",
            "a folder made by something else",
            "choose another one with --run-dir",
        )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise CommandError(
                folder, "one run at a time", "another one is at work", "wait for it, or choose another --run-dir"
            ) from e
        except OSError as e:
            raise HostError(folder, "a file system with locks", e.strerror or str(e), "choose another --run-dir") from e
        yield
    finally:
        os.close(handle)
