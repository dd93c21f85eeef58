"""The folder of a device: where it is, whom it may belong to, one writer at a time.

DIR/config.json, root.json   model, address, group; whom updates are signed by; never changed
DIR/device.json              the operator's settings, if there are any (see `settings`)
DIR/factory/                 the exported model; always there to fall back to
DIR/store/<sha256>           at most two payloads that passed their trial
DIR/bases/<sha256>/          at most two further models, for these payloads; named by their manifest (see `bases`)
DIR/dl/<sha256>.part         a payload or a pack that is on its way, or a payload that waits for its verdict
DIR/dl/<sha256>.base/        a model that waits for its verdict
DIR/state.0, state.1, metadata/, log.jsonl
DIR/device.key, identity.json, report.counter   who it is, and the number of its last report
DIR/emit/                    what applications in C and C++ load, where the operator wants that (see `emit`)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import DeviceStateError

CONFIG, ROOT, FACTORY, SETTINGS = "config.json", "root.json", "factory", "device.json"
STORE, DOWNLOADS, METADATA, ROOTS = "store", "dl", "metadata", "metadata/root_history"
EMITTED, BASES = "emit", "bases"
KEY, IDENTITY, COUNTER = "device.key", "identity.json", "report.counter"
#: Folders that a device has, each a real one.
FOLDERS = (FACTORY, STORE, DOWNLOADS, METADATA, ROOTS)
STATE_VARIABLE, DEFAULT = "LRCOMPRESS_STATE", "/var/lib/lrcompress"


def state_folder(folder: str | Path | None = None) -> Path:
    """Return `folder`, else what $LRCOMPRESS_STATE says, else /var/lib/lrcompress."""
    return Path(folder if folder is not None else os.environ.get(STATE_VARIABLE) or DEFAULT)


def check_folder(folder: Path) -> None:
    """Refuse a folder that somebody else could have filled. Raises `DeviceStateError`.

    A link, an owner who is neither this user nor root, or a mode that lets everybody write: of the folder, of the
    folders in it, and of the files that a device believes.
    """
    try:
        _check(folder, stat.S_ISDIR, "folder")
        for name in FOLDERS:
            _check(folder / name, stat.S_ISDIR, "folder")
        for name in (EMITTED, BASES):  # made when they are needed
            if os.path.lexists(folder / name):
                _check(folder / name, stat.S_ISDIR, "folder")
        for name in (CONFIG, ROOT, SETTINGS, KEY, IDENTITY, "state.0", "state.1"):
            if os.path.lexists(folder / name):
                _check(folder / name, stat.S_ISREG, "file")
    except OSError as e:
        raise DeviceStateError(
            folder, f"a device folder ({CONFIG})", e.strerror or str(e), "make one with 'lrcompress device init'"
        ) from e


def _check(path: Path, kind: object, what: str) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or not kind(found.st_mode):  # type: ignore[operator]
        got = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "something else"
        raise DeviceStateError(path, f"a {what} itself", got, f"give the {what} that it leads to, or restore it")
    if found.st_uid not in (os.geteuid(), 0):
        raise DeviceStateError(
            path,
            "an owner that is this user or root",
            f"user {found.st_uid}",
            f"chown -R {os.geteuid()} it, or be that user",
        )
    if found.st_mode & stat.S_IWOTH:
        raise DeviceStateError(
            path,
            f"a {what} that not everybody may write",
            oct(stat.S_IMODE(found.st_mode)),
            "chmod o-w it, and check what is in it",
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second writer. Raises `DeviceStateError` if there is one; a kill lets go of it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise DeviceStateError(folder, "a device folder", e.strerror or str(e), "see where it has gone") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DeviceStateError(
                folder, "one update at a time", "another one is at work", "try again when it is done"
            ) from e
        yield
    finally:
        os.close(fd)
