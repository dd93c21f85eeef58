"""Files that are whole or absent: atomic writes, staged folders, hashes, contained paths, canonical JSON.

A folder that a command writes is built beside its destination and renamed into place; a destination that the
same command did not make is refused. The caller's loop:

    with staged_folder(dest, made_by="lrcompress factorize", marker="lrcompress.json") as stage:
        (stage / "model.safetensors").write_bytes(...)
        write_json(stage / "lrcompress.json", {"made_by": "lrcompress factorize", ...})
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CommandError, HostError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


def canonical_json(value: Any) -> bytes:
    """Return the one byte form of `value`: sorted keys, no blanks, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def finite(value: Any) -> Any:
    """Return `value` with every NaN and infinity as None, as `--json` prints it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return sha256_bytes(canonical_json(value))


def sha256_tree(folder: Path) -> str:
    """Return one hash for all regular files below `folder`: their relative names and contents."""
    entries = {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return sha256_json(entries)


def fsync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to a sibling temporary file, fsync it, rename it over `path`, fsync the folder."""
    with disk_errors(path):
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(fd, "wb") as f:
                os.fchmod(f.fileno(), mode)
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented, key-sorted JSON, atomically."""
    text = json.dumps(finite(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


@contextlib.contextmanager
def disk_errors(where: object) -> Iterator[None]:
    """Turn the errors of a full or forbidden disk into `HostError` (exit 10)."""
    try:
        yield
    except Exception as e:
        number = _system_error(e)
        if number is None or number not in _DISK:
            raise
        remedy = "free some space" if number in (errno.ENOSPC, errno.EDQUOT) else "choose a folder you may write to"
        raise HostError(where, "a disk that takes the output", os.strerror(number), remedy) from e


def _system_error(e: Exception) -> int | None:
    """Return the errno of an error of the system; safetensors hides its own in a text: "… (os error 28)"."""
    if isinstance(e, OSError):
        return e.errno
    found = re.search(r"\(os error (\d+)\)", str(e)) if type(e).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def contained(root: Path, name: str) -> Path:
    """Return `root/name`; raise `ValueError` if that leads out of `root`, also through a link."""
    if not name or name.startswith(("/", "\\")) or "\0" in name or ":" in name.split("/")[0]:
        raise ValueError(f"not a relative path: {name!r}")
    base = root.resolve()
    path = (base / name).resolve()
    if not path.is_relative_to(base) or path == base:
        raise ValueError(f"{name!r} leads out of {root}")
    return path


def made_by(folder: Path, marker: str) -> str | None:
    """Return the `made_by` line of the JSON file `marker` in `folder`, or None."""
    try:
        value = json.loads((folder / marker).read_text()).get("made_by")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def _absolute(path: Path) -> Path:
    """Return `path` from the root, `..` taken by text: a link stays the link that was named."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def check_output(dest: Path, *, maker: str, marker: str) -> None:
    """Refuse a destination that `maker` did not make (exit 2); a missing or empty folder is fine."""
    _recover_interrupted(dest)
    if not os.path.lexists(dest):
        nearest = next(p for p in _absolute(dest).parents if os.path.lexists(p))
        if not nearest.is_dir():
            raise CommandError(
                dest, "a place below folders", f"{nearest.name} is a file", "choose another place with -o"
            )
        return
    if dest.is_dir() and (made_by(dest, marker) == maker or not any(dest.iterdir())):
        return
    got = "a folder made by something else" if dest.is_dir() else "a file"
    raise CommandError(
        dest, f"an output that '{maker}' made, or none", got, "choose another place with -o, or move it away"
    )


@contextlib.contextmanager
def staged_folder(dest: Path, *, maker: str, marker: str) -> Iterator[Path]:
    """Yield an empty folder beside `dest`; on success it becomes `dest`, on any error it and new parents vanish."""
    dest = _absolute(dest)
    check_output(dest, maker=maker, marker=marker)
    new_parents = [p for p in dest.parents if not p.exists()]
    stage = None
    try:
        with disk_errors(dest):
            dest.parent.mkdir(parents=True, exist_ok=True)
            _sweep(dest)
            stage = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}.stage-"))
            stage.chmod(0o755)
            yield stage
            if made_by(stage, marker) != maker:
                raise RuntimeError(f"{marker} in {stage} does not say made_by {maker!r}")
            for p in (stage, *stage.rglob("*")):
                fsync_folder(p) if p.is_dir() else _fsync_file(p)
            install_folder(stage, dest)
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        if not dest.exists():
            for parent in new_parents:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    parent.rmdir()


def install_folder(stage: Path, dest: Path) -> None:
    """Rename `stage` to `dest`, an old `dest` going to `.NAME.old` for the moment between the two renames."""
    old = dest.parent / f".{dest.name}.old"
    if dest.exists():
        shutil.rmtree(old, ignore_errors=True)
        dest.rename(old)
    try:
        stage.rename(dest)
    except BaseException:
        if old.exists() and not dest.exists():
            old.rename(dest)
        raise
    fsync_folder(dest.parent)
    shutil.rmtree(old, ignore_errors=True)


def _recover_interrupted(dest: Path) -> None:
    """Finish what a kill between the two renames of `install_folder` left."""
    old = dest.parent / f".{dest.name}.old"
    if old.is_dir() and not os.path.lexists(dest):
        old.rename(dest)


def _sweep(dest: Path) -> None:
    """Remove the staging folders that killed runs left beside `dest`."""
    for left in dest.parent.glob(f".{dest.name}.stage-*"):
        shutil.rmtree(left, ignore_errors=True)


def _fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
