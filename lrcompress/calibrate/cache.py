"""Statistics on disk, named by everything that decides them: asked again, they are read instead of collected.

    $LRCOMPRESS_CACHE, or $XDG_CACHE_HOME/lrcompress, or ~/.cache/lrcompress
        statistics/<key>/                      a folder of `stored`
        statistics/<key>.partial.safetensors   the state of a pass under way, written every `seconds`

The key covers the model (its digest, the tensors and structure of the module, its answers to the first samples), the
data, the layers, the settings, and the versions and threads that decide rounding. An entry is whole or absent, is
hashed before it is used, and is collected again if it is damaged; the oldest go when all hold more than `most_bytes`
($LRCOMPRESS_CACHE_BYTES). A folder that cannot be written costs a warning, never the work.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._version import __version__
from ..errors import CommandError, DataError, HostError, LrcompressWarning
from ..factorize import Statistics
from ..files import fsync_folder, sha256_json
from ..model import OpenedModel, digest_tensors
from ..progress import Progress
from .collected import Collected
from .running import Pass
from .stored import MARKER, read_statistics, write_statistics

#: Changed whenever the same question gets other numbers.
FORMAT = 1
#: Bytes that all entries may hold, and seconds of work that a kill may cost.
MOST_BYTES, CHECKPOINT_SECONDS = 5_000_000_000, 10.0
#: A checkpoint may take this share of the time.
_SHARE = 0.05
#: What is left of a killed writer is swept after this many seconds.
_STALE_SECONDS = 86_400.0
#: Counts up where the same data give other statistics than before.
_REVISION = 3
#: Packages whose version may change a number.
_PACKAGES = ("numpy", "torch", "transformers", "onnxruntime")
#: What a disk that cannot be written or read says.
_DISK = (OSError, HostError, CommandError, SafetensorError)


@dataclass(frozen=True)
class Cache:
    """A folder of statistics. `seconds`: between two checkpoints of a pass; 0: after every batch."""

    folder: Path
    most_bytes: int = MOST_BYTES
    seconds: float = CHECKPOINT_SECONDS

    @classmethod
    def usual(cls) -> Cache:
        """Return the cache that the environment names. Raises `CommandError` for a bound that is no number."""
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = os.environ.get("LRCOMPRESS_CACHE") or f"{home}/lrcompress"
        bound = os.environ.get("LRCOMPRESS_CACHE_BYTES") or str(MOST_BYTES)
        if not bound.isascii() or not bound.isdigit():
            raise CommandError("LRCOMPRESS_CACHE_BYTES", "a whole number of bytes", bound, f"for example {MOST_BYTES}")
        return cls(Path(folder), int(bound))

    def answer(self, work: Pass, opened: OpenedModel, module: nn.Module, progress: Progress) -> dict[str, Statistics]:
        """Return the statistics of a pass: from here, or collected and kept here."""
        parts = key_parts(work, opened, module)
        key = sha256_json(parts)
        entry = self._entries / key
        found = self._read(entry, opened.digest, work)
        if found is not None:
            return found
        with self._alone(key) as alone:
            partial = Partial(self._entries / f"{key}.partial.safetensors", self.seconds, self.most_bytes)
            collected, start = partial.resumed(work.device) if alone else (Collected(), 0)
            found = work.run(collected, progress, start=start, checkpoint=partial.keep if alone else None)
            del collected
            if sum(t.nbytes for t in distinct_tensors(found)) > self.most_bytes:
                partial.drop()
                return found
            try:
                write_statistics(entry, found, model=opened.digest, layers=work.layers, about=parts)
                partial.drop()
                self._evict()
            except _DISK as e:
                note = (
                    f"the calibration cache {self.folder} cannot be written ({_line(e)}); the work goes on without it"
                )
                warnings.warn(note, LrcompressWarning, stacklevel=4)
                return found
        # What was collected makes room for what is mapped from the files: the same numbers.
        return self._read(entry, opened.digest, work, written=True) or found

    @property
    def _entries(self) -> Path:
        return self.folder / "statistics"

    def _read(self, entry: Path, model: str, work: Pass, *, written: bool = False) -> dict[str, Statistics] | None:
        """Return an entry, or None where there is none or it is damaged, which removes it."""
        try:
            if not (entry / MARKER).is_file():
                return None
            found = read_statistics(entry, model=model, layers=work.layers, hashed=written)
            os.utime(entry / MARKER)
        except OSError:
            return None
        except DataError as e:
            note = f"an entry of the calibration cache is damaged ({e.where}: {e.got}); it is collected again"
            warnings.warn(note, LrcompressWarning, stacklevel=5)
            _remove(entry)
            return None
        return found

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[bool]:
        """Yield whether this process may checkpoint `key`: one at a time, and only where the disk takes it."""
        path = self._entries / f"{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def _evict(self) -> None:
        """Remove the entries that were used longest ago until all fit into `most_bytes`, and what killed writers left."""
        now, ages = time.time(), []
        for path in self._entries.iterdir():
            with contextlib.suppress(OSError):  # another process removed it
                marker = path / MARKER if path.is_dir() else path
                age = now - (marker if marker.exists() else path).stat().st_mtime
                if path.name.startswith(".") or path.suffix == ".lock":
                    if age > _STALE_SECONDS:
                        _remove(path)
                else:
                    ages.append((age, _bytes(path), path))
        total = sum(size for _, size, _ in ages)
        for _, size, path in sorted(ages, key=lambda row: row[0], reverse=True):
            if total <= self.most_bytes:
                return
            _remove(path)
            total -= size


@dataclass
class Partial:
    """The state of a pass under way, one file that is replaced as a whole."""

    path: Path
    seconds: float
    most_bytes: int

    def __post_init__(self) -> None:
        self._due = time.monotonic() + self.seconds

    def resumed(self, device: torch.device) -> tuple[Collected, int]:
        """Return what a killed pass had collected and the number of its next batch; nothing and 0 without one."""
        if not self.path.exists():
            return Collected(), 0
        try:
            with safe_open(self.path, framework="pt") as f:
                tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
                about = json.loads((f.metadata() or {})["about"])
            if digest_tensors(tensors, json.dumps(about["state"], sort_keys=True).encode()) != about["digest"]:
                raise ValueError("other bytes than were written")
            return Collected.of_state(tensors, about["state"], device), int(about["next"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
            note = f"the checkpoint of a killed calibration is damaged ({_line(e)}); it starts again"
            warnings.warn(note, LrcompressWarning, stacklevel=5)
            self.drop()
            return Collected(), 0

    def keep(self, collected: Collected, following: int) -> None:
        """Write the state if it is time; a disk that does not take it is not tried again."""
        started = time.monotonic()
        if started < self._due:
            return
        try:
            self._write(collected, following)
        except _DISK:
            self._due = float("inf")
            return
        ended = time.monotonic()
        self._due = ended + max(self.seconds, (ended - started) / _SHARE if self.seconds else 0.0)

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, collected: Collected, following: int) -> None:
        found, state = collected.state()
        tensors = {name: t.cpu().contiguous() for name, t in found.items()}
        if sum(t.nbytes for t in tensors.values()) > self.most_bytes:
            return
        digest = digest_tensors(tensors, json.dumps(state, sort_keys=True).encode())
        about = json.dumps({"state": state, "next": following, "digest": digest})
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata={"about": about})
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(self.path.parent)


def key_parts(work: Pass, opened: OpenedModel, module: nn.Module) -> dict[str, Any]:
    """Return everything that decides the numbers of a pass, as JSON."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    if work.device.type == "cuda":
        machine.append(torch.cuda.get_device_name(work.device))
    return {
        "format": FORMAT,
        "lrcompress": __version__,
        "revision": _REVISION,
        "model": {"digest": opened.digest, "tensors": digest_tensors(tensors), "answers": work.answers},
        "structure": sha256_json([type(work.view).__name__, repr(module)]),
        "data": work.data.digest(),
        "layers": sha256_json([[n.name, n.kind, list(n.shape)] for n in work.layers]),
        "settings": work.settings.as_dict(),
        "versions": versions,
        "machine": machine,
    }


def distinct_tensors(statistics: dict[str, Statistics]) -> list[Tensor]:
    """Return the tensors of all statistics, shared ones once."""
    fields = ("gram", "mean", "output_gram", "row_weights")
    found = {id(t): t for s in statistics.values() for name in fields if (t := getattr(s, name)) is not None}
    return list(found.values())


def _bytes(path: Path) -> int:
    files = list(path.iterdir()) if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def _remove(path: Path) -> None:
    """Remove an entry at once for every reader: it is renamed before its files go."""
    gone = path.with_name(f".{path.name}.gone-{os.getpid()}")
    with contextlib.suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def _line(e: BaseException) -> str:
    return " ".join(str(getattr(e, "got", "") or e).split())[:120]
