"""A device: one folder with a base model, a trusted root, and what was installed since.

Device.init("device", "exported", "1.root.json", "https://updates.example/", "default")
device = Device("device")
y = device.infer({"x": x})["output"]       # thread-safe, also while
device.update()                            # ... this brings and swaps in a new payload

DIR/config.json, root.json   where updates come from and whom they are signed by; never changed
DIR/factory/                 the exported model; always there to fall back to
DIR/store/, dl/, state.0, state.1, metadata/, log.jsonl
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CommandError, DeviceStateError, PayloadError, UpdateError
from ..files import disk_errors, staged_folder, write_atomic, write_json
from ..golden import compare, load_golden
from ..manifest import GOLDEN, MANIFEST, Manifest, is_safe_name, load_limits, strict_json
from ..payload import parse
from ..runtime import Session
from ..runtime.session import Active
from .disk import Disk
from .identity import Identity
from .log import StatusLog
from .state import Entry, State, StateFiles
from .store import Store
from .transport import open_transport
from .trial import Limits, check_golden
from .updater import Outcome, Updater, describe_serving

MAKER = "lrcompress device"
CONFIG, ROOT, FACTORY = "config.json", "root.json", "factory"


class Device:
    """An opened device folder. Many threads may infer; one process at a time updates."""

    def __init__(
        self,
        folder: str | Path,
        *,
        disk: Disk | None = None,
        clock: Callable[[], datetime] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder = Path(folder)
        self._disk, self._clock, self._sleep = disk or Disk(), clock or (lambda: datetime.now(UTC)), sleep
        self._config = _read_config(self.folder)
        factory = self.folder / FACTORY
        self.manifest = Manifest.load(factory)
        limits = load_limits(factory)
        self._limits = Limits(limits["max_payload_bytes"], limits["latency_factor"], limits.get("max_distance"))
        self._session = Session(factory, threads=int(limits["threads"]), manifest=self.manifest, verify=False)
        self._files, self._store = StateFiles(self.folder, self._disk), Store(self.folder, self._disk)
        self._log = StatusLog(self.folder, self._disk)
        self._serving: Entry | None = None
        self.refresh()

    @classmethod
    def init(
        cls,
        folder: str | Path,
        exported: str | Path,
        root: str | Path,
        url: str,
        group: str = "default",
        *,
        channel: str = "stable",
        report_url: str | None = None,
    ) -> Device:
        """Make a device folder from an exported model and the root it shall trust; whole or not at all.

        A folder that is a device already is refused: its `seq` is what protects it from old releases.
        """
        folder, exported = Path(folder), Path(exported)
        if (folder / CONFIG).exists():
            raise DeviceStateError(folder, "a new folder", "a device", "move it away to start over")
        if not is_safe_name(group):
            raise CommandError("--group", "a name of a-z, 0-9, '.', '_', '-'", group)
        open_transport(url)
        manifest = Manifest.load(exported)
        trusted = _read_root(Path(root))
        with staged_folder(folder, maker=MAKER, marker=CONFIG) as stage:
            (stage / FACTORY).mkdir()
            for name in (MANIFEST, *manifest.files):
                shutil.copyfile(exported / name, stage / FACTORY / name)
            Manifest.load(stage / FACTORY)
            for name in ("store", "dl", "metadata"):
                (stage / name).mkdir()
            write_atomic(stage / ROOT, trusted, mode=0o444)
            for _ in range(2):
                StateFiles(stage, Disk()).write(State())
            url = url if "://" in url else str(Path(url).resolve())
            write_json(
                stage / CONFIG,
                {
                    "schema": 1,
                    "made_by": MAKER,
                    "model": manifest.model,
                    "base_id": manifest.base_id,
                    "url": url,
                    "group": group,
                },
            )
            Identity.create(stage, group=group, channel=channel, report_url=report_url)
        return cls(folder)

    # serving ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Serve what the folder names: its active payload, else the one before, else the factory's model."""
        state = self._files.read()
        for entry in (state.active, state.previous):
            prepared = None if entry is None else self._prepared(entry)
            if prepared is not None:
                self._serving = entry
                self._session.activate(prepared)
                return
        self._serving = None
        self._session.swap(None)

    def _prepared(self, entry: Entry) -> Active | None:
        """Return a payload ready to serve, or None for one that is no longer whole."""
        data = self._store.read(entry.sha256)
        if data is not None:
            with contextlib.suppress(PayloadError):
                return self._session.prepare(parse(data))
        self._log.write(self._clock(), "rotted", sha256=entry.sha256, seq=entry.seq)
        return None

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs for `inputs`. Raises `DataError` for inputs that the model does not take."""
        return self._session.run(inputs)

    def status(self) -> dict[str, Any]:
        """Return what is served and what is known, as `lrcompress device status --json` prints it."""
        state = self._files.read()
        pending = state.pending
        return {
            "serving": describe_serving(self._serving),
            "previous": None if state.previous is None else describe_serving(state.previous),
            "pending": None if pending is None else {"sha256": pending.sha256, "seq": pending.seq, "trials": pending.trials, "retry_at": pending.retry_at},
            "refused": [{"sha256": r.sha256, "seq": r.seq, "reason": r.reason} for r in state.refused],
            "model": self.manifest.model, "group": self._config["group"], "url": self._config["url"],
            "base_id": self.manifest.base_id, "seq": state.seq, "state_readable": state.readable,
            "last_trusted_time": state.trusted_time, "free_bytes": self._disk.free_bytes(self.folder),
        }  # fmt: skip

    def validate(self) -> dict[str, Any]:
        """Check the base against its golden set, and the payload that is served against its own.

        Raises nothing for a miss: `passed` says so.
        """
        golden = load_golden(self.folder / FACTORY / GOLDEN)
        factory = self._session.run_with(self._session.prepare(None), golden.inputs)
        base = compare(golden.compressed, factory, self.manifest.tolerance)
        found: dict[str, Any] = {
            "serving": describe_serving(self._serving),
            "base": base.as_dict(),
            "payload": None,
            "passed": base.passed,
        }
        payload = self._session.payload
        if payload is not None:
            try:
                report = check_golden(payload, self._session, self._session.run(golden.inputs))
                found["payload"] = report.as_dict()
            except PayloadError as e:
                found |= {"payload": {"passed": False, "reason": str(e)}, "passed": False}
        return found

    # changing -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self.folder), open(self.folder / "lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DeviceStateError(
                    self.folder, "one update at a time", "another one is at work", "try again when it is done"
                ) from e
            yield

    def update(self) -> dict[str, Any]:
        """Bring the newest healthy release, try it, serve it; return the JSON object of `lrcompress device update`.

        An update that is refused or fails is a result with `error`, not an exception: the device goes on serving.
        """
        started = time.perf_counter()
        transport = open_transport(self._config["url"])
        with self._locked():
            before = self._files.read()
            updater = Updater(
                folder=self.folder, files=self._files, store=self._store, log=self._log, disk=self._disk, session=self._session,
                golden=load_golden(self.folder / FACTORY / GOLDEN), limits=self._limits, transport=transport,
                root=_read_root(self.folder / ROOT), group=self._config["group"], clock=self._clock, sleep=self._sleep,
                identity=Identity.find(self.folder),
            )  # fmt: skip
            outcome: Outcome = updater.run()
            after = self._files.read()
        if outcome.activate is not None:
            self._serving = after.active
            self._session.activate(outcome.activate)
        elif after.active != self._serving:
            self.refresh()
        ms = (time.perf_counter() - started) * 1000
        return {
            "state": outcome.state, "serving": describe_serving(self._serving), "from_seq": before.seq, "to_seq": after.seq,
            "bytes_downloaded": transport.traffic.bytes, "requests": transport.traffic.requests, "ms": round(ms, 3), "reason": outcome.reason,
            "error": None if outcome.error is None else outcome.error.as_dict(),
        }  # fmt: skip

    def rollback(self) -> dict[str, Any]:
        """Serve the payload before this one (else the factory's model) until the next release; return the new state.

        Raises `DeviceStateError` if the factory's model is served already.
        """
        with self._locked():
            state = self._files.read()
            if state.active is None:
                raise DeviceStateError(
                    self.folder, "a payload to roll back from", "the factory's model", "there is nothing before it"
                )
            back = state.previous
            if back is not None and self._store.read(back.sha256) is None:
                back = None
            undone = state.active
            # What is declined is what the newest release brings: only a higher seq may bring it again.
            state = self._files.write(
                replace(state, active=back, previous=None, pending=None, declined=state.seq_sha256)
            )
            self._log.write(self._clock(), "rolled_back", seq=undone.seq, sha256=undone.sha256)
            self._store.clean(state.named)
        self.refresh()
        return {
            "state": "rolled_back",
            "serving": describe_serving(self._serving),
            "from_seq": undone.seq,
            "to_seq": 0 if back is None else back.seq,
        }

    def history(self) -> list[dict[str, Any]]:
        """Return the status log, oldest first."""
        return self._log.read()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        value = strict_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as e:
        got = e.strerror if isinstance(e, OSError) else str(e)
        raise DeviceStateError(
            folder, f"a device folder ({CONFIG})", got, "make one with 'lrcompress device init'"
        ) from e
    good = isinstance(value, dict) and value.get("schema") == 1 and value.get("made_by") == MAKER
    if not good or not all(isinstance(value.get(k), str) for k in ("model", "base_id", "url", "group")):
        raise DeviceStateError(
            folder / CONFIG, "the configuration that 'lrcompress device init' wrote", "something else", "restore it"
        )
    return dict(value)


def _read_root(path: Path) -> bytes:
    """Return the bytes of a root that is one. Raises `UpdateError`."""
    from tuf.api.exceptions import RepositoryError  # for an update only: serving does without
    from tuf.api.metadata import Metadata, Root

    try:
        data = path.read_bytes()
        if not isinstance(Metadata[Root].from_bytes(data).signed, Root):
            raise ValueError("another role")
    except OSError as e:
        raise UpdateError(
            path, "the publisher's root.json", e.strerror or str(e), "copy REPO/metadata/1.root.json"
        ) from e
    except (RepositoryError, ValueError) as e:
        raise UpdateError(path, "the publisher's root.json", str(e), "copy REPO/metadata/1.root.json") from e
    return data
