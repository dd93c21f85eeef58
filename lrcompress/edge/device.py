"""A device: one folder with a base model, a trusted root, and what was installed since.

Device.init("device", "exported", "1.root.json", "https://updates.example/", "default")
device = Device("device")
y = device.infer({"x": x})["output"]       # thread-safe, also while
device.update()                            # ... this brings and swaps in a new payload

What lies in the folder stands in `folder`, the state machine in `updater`. The model is loaded for the first request:
a device that only updates never holds it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DeviceStateError, LrcompressError, PayloadError
from ..golden import compare, load_golden
from ..manifest import GOLDEN, MANIFEST, Manifest
from ..payload import Payload, parse
from ..runtime.session import Session
from .bases import Base, Bases
from .disk import Disk
from .folder import FACTORY, ROOT, check_folder, locked, state_folder
from .health import boot_id
from .install import check_hash, install, read_config, read_root
from .log import StatusLog
from .mending import mend
from .settings import exported_settings, load_settings
from .staging import tidy
from .state import Entry, State, StateFiles
from .store import Store
from .transport import Traffic, open_transport
from .trial import ChildTrial, Trial, check_golden
from .updater import Outcome, Updater, describe_serving

if TYPE_CHECKING:
    from .identity import Identity


class Device:
    """An opened device folder. Many threads may infer; one process at a time updates."""

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        disk: Disk | None = None,
        clock: Callable[[], datetime] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        trial: Trial | None = None,
    ) -> None:
        self.folder = state_folder(folder)
        self._disk, self._clock, self._sleep = disk or Disk(), clock or (lambda: datetime.now(UTC)), sleep
        check_folder(self.folder)
        self._config = read_config(self.folder, self._disk)
        factory = Manifest.load(self.folder / FACTORY)
        raw = self._disk.read(self.folder / FACTORY / MANIFEST)
        check_hash(self.folder, f"{FACTORY}/{MANIFEST}", raw, self._config)
        self.settings = exported_settings(self.folder)
        self._wrong_settings: DeviceStateError | None = None
        try:
            self.settings = load_settings(self.folder, self._disk)
        except DeviceStateError as e:  # a slip of the operator stops updates, never serving
            self._wrong_settings = e
        self._trial = trial
        self._files, self._store = StateFiles(self.folder, self._disk), Store(self.folder, self._disk)
        self._bases = Bases(self.folder, self._disk, factory)
        self._log = StatusLog(self.folder, self._disk)
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._serving: Entry | None = None
        self._payload: Payload | None = None
        self._base: Base = self._bases.factory
        #: When a payload on probation stops to be served, unless somebody sees it through.
        self.serves_until: datetime | None = None
        self.refresh()

    @classmethod
    def init(
        cls,
        folder: str | Path | None,
        exported: str | Path,
        root: str | Path,
        url: str,
        group: str = "default",
        *,
        disk: Disk | None = None,
        channel: str = "stable",
        report_url: str | None = None,
    ) -> Device:
        """Make a device folder from an exported model and the root it shall trust; whole or not at all.

        A folder that is a device already is refused: its `seq` is what protects it from old releases.
        """
        from .identity import new_identity  # keys and links: nothing that serving needs

        made = new_identity(group=group, channel=channel, report_url=report_url)
        install(state_folder(folder), Path(exported), Path(root), url, group, disk or Disk(), made)
        return cls(folder, disk=disk)

    @property
    def url(self) -> str:
        return self.settings.url or str(self._config["url"])

    @property
    def group(self) -> str:
        return str(self._config["group"])

    @property
    def serving(self) -> Entry | None:
        """The payload that the next request will see; None is the factory's model."""
        return self._serving

    @property
    def manifest(self) -> Manifest:
        """The manifest of the base that the next request will see."""
        return self._base.manifest

    # serving ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Serve what the folder names: its active payload, else the one before, else the factory's model; each on its base.

        Raises `ManifestError` or `HostError` for a base that cannot be loaded now: what was served still is.
        """
        for _ in range(5):
            state = self._files.read()
            entry, payload, base = self._chosen(state)
            # Where what the state names is not here, another process may have moved on between the two reads.
            if entry == state.active or self._files.read().generation == state.generation:
                break
        with self._lock:
            if self._session is not None and base.name != self._base.name:
                session = self._load(base)
                session.swap(payload)
                self._session = session  # a request has the one or the other, with its payload
            elif self._session is not None and (payload is None or entry != self._serving):
                self._session.swap(payload)
            self._serving, self._payload, self._base = entry, payload, base
            tried = state.probation
            self.serves_until = None if tried is None else datetime.fromisoformat(tried.until)

    def _load(self, base: Base) -> Session:
        return Session(base.folder, threads=int(self.settings.threads), manifest=base.manifest, verify=False)

    def _chosen(self, state: State) -> tuple[Entry | None, Payload | None, Base]:
        """Return the first payload of the state that is whole and fits, with its base; none at all is the factory's model."""
        candidates = [state.active, state.previous]
        if state.probation is not None and not self._in_probation(state):
            candidates = [state.previous]  # nobody has seen it through, and nobody watches over it
        for entry in filter(None, candidates):
            data, base = self._store.read(entry.sha256), self._bases.find(entry.base)
            if data is not None and base is not None:
                with contextlib.suppress(PayloadError):
                    payload = parse(data)
                    payload.verify(base.manifest)
                    return entry, payload, base
            self._log.write(self._clock(), "rotted", sha256=entry.sha256, seq=entry.seq)
        return None, None, self._bases.factory

    def _in_probation(self, state: State) -> bool:
        tried = state.probation
        return tried is not None and tried.boot == boot_id() and self._clock() <= datetime.fromisoformat(tried.until)

    def _loaded(self) -> Session:
        """Return the model, loaded once."""
        with self._lock:
            if self._session is None:
                session = self._load(self._base)
                session.swap(self._payload)
                self._session = session
            return self._session

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs for `inputs`. Raises `DataError` for inputs that the model does not take."""
        return (self._session or self._loaded()).run(inputs)

    def status(self) -> dict[str, Any]:
        """Return what is served and what is known, as `lrcompress device status --json` prints it."""
        state = self._files.read()
        pending = state.pending
        return {
            "serving": describe_serving(self._serving),
            "previous": None if state.previous is None else describe_serving(state.previous),
            "pending": None if pending is None else {"sha256": pending.sha256, "seq": pending.seq, "trials": pending.trials, "retry_at": pending.retry_at},
            "probation": None if state.probation is None else {"until": state.probation.until},
            "refused": [{"sha256": r.sha256, "seq": r.seq, "reason": r.reason} for r in state.refused],
            "model": self.manifest.model, "group": self.group, "url": self.url,
            "base_id": self.manifest.base_id, "factory_base_id": self._bases.factory.manifest.base_id, "seq": state.seq, "state_readable": state.readable,
            "last_trusted_time": state.trusted_time, "free_bytes": self._disk.free_bytes(self.folder),
        }  # fmt: skip

    def validate(self) -> dict[str, Any]:
        """Check the base against its golden set, and the payload that is served against its own.

        Raises nothing for a miss: `passed` says so.
        """
        session = self._loaded()
        golden = load_golden(self._base.folder / GOLDEN)
        alone = session.run_with(session.prepare(None), golden.inputs)
        base = compare(golden.compressed, alone, session.manifest.tolerance)
        found: dict[str, Any] = {
            "serving": describe_serving(self._serving),
            "base": base.as_dict(),
            "payload": None,
            "passed": base.passed,
        }
        payload = session.payload
        if payload is not None:
            try:
                report = check_golden(payload, session, session.run(golden.inputs))
                found["payload"] = report.as_dict()
            except PayloadError as e:
                found |= {"payload": {"passed": False, "reason": str(e)}, "passed": False}
        return found

    # changing -----------------------------------------------------------------------------------------------------

    def update(self, *, emit: str | None = None) -> dict[str, Any]:
        """Bring the newest healthy release, try it, serve it; return the JSON object of `lrcompress device update`.

        An update that is refused or fails is a result with `error`, not an exception: the device goes on serving.
        `emit` is the setting of that name, for this once.
        """
        if emit is not None:
            self.settings = replace(self.settings, emit=emit)
        started, before_disk, traffic = time.perf_counter(), self._disk.tally.copy(), Traffic()
        with locked(self.folder):
            before = self._files.read()
            try:
                outcome, traffic = self._updated()
            except LrcompressError as e:  # this device's own files: nothing was asked of anybody
                self._log.write(self._clock(), "failed", reason=str(e))
                outcome = Outcome("failed", str(e), e)
            after = self._files.read()
            if after.active != self._serving:  # what rotted was mended, or what was on probation went back
                self._switched()
            else:
                self._emit()
        wear = self._disk.tally.since(before_disk)
        return {
            "state": outcome.state, "serving": describe_serving(self._serving), "from_seq": before.seq, "to_seq": after.seq,
            "bytes_downloaded": traffic.bytes, "requests": traffic.requests,
            "ms": round((time.perf_counter() - started) * 1000, 3), "fsyncs": wear.fsyncs, "bytes_written": wear.bytes,
            "reason": outcome.reason, "error": None if outcome.error is None else outcome.error.as_dict(),
        }  # fmt: skip

    def _updated(self) -> tuple[Outcome, Traffic]:
        if self._wrong_settings is not None:
            raise self._wrong_settings
        root = check_hash(self.folder, ROOT, read_root(self.folder / ROOT), self._config)
        transport = open_transport(self.url, self.settings, sleep=self._sleep)
        updater = Updater(
            folder=self.folder, files=self._files, store=self._store, bases=self._bases, log=self._log,
            disk=self._disk, settings=self.settings, trial=self._trial_on, transport=transport,
            root=root, group=self.group, clock=self._clock, sleep=self._sleep, switched=self._switched,
            identity=self._identity(),
        )  # fmt: skip
        return updater.run(), transport.traffic

    def _trial_on(self, base: Base, before: Base | None) -> Trial:
        """Return the trial of a payload on a base; `before` is the one that serves, where that is another."""
        told, other = self.settings, None if before is None else before.folder
        return self._trial or ChildTrial(base.folder, told.limits, int(told.threads), told.trial_timeout_s, other)

    def _identity(self) -> Identity | None:
        """Return who this device is; one that has rotted keeps no update from it: it is then anybody's turn."""
        from .identity import Identity

        try:
            return Identity.find(self.folder, self._disk)
        except DeviceStateError as e:
            self._log.write(self._clock(), "no_identity", reason=str(e))
            return None

    def _switched(self) -> None:
        """Serve what was committed. A base that cannot be loaded now (it needs memory beside the old one) is tried again later."""
        try:
            self.refresh()
        except LrcompressError as e:
            self._log.write(self._clock(), "not_loaded", reason=str(e))
        self._emit()

    def _emit(self) -> None:
        """Write what other languages load, where that is wanted; a disk that refuses it takes nothing back."""
        if self.settings.emit is None:
            return
        from .emit import emit

        try:
            emit(self.folder, self._base, self._serving, self._payload, self._disk)
        except LrcompressError as e:
            self._log.write(self._clock(), "not_emitted", reason=str(e))

    def rollback(self) -> dict[str, Any]:
        """Serve the payload before this one, on its base (else the factory's model), until the next release; return the new state.

        Raises `DeviceStateError` if the factory's model is served already.
        """
        with locked(self.folder):
            now = self._clock()
            state = mend(self._files, self._store, self._bases, self._log, self._disk, now, self.folder)
            if state.active is None:
                raise DeviceStateError(
                    self.folder, "a payload to roll back from", "the factory's model", "there is nothing before it"
                )
            back, undone = state.previous, state.active
            # What is declined is what the newest release brings: only a higher seq may bring it again.
            state = self._files.write(
                replace(state, active=back, previous=None, pending=None, declined=state.seq_sha256)
            )
            self._log.write(self._clock(), "rolled_back", seq=undone.seq, sha256=undone.sha256)
            tidy(self._store, self._bases, state)
            self._switched()
        return {
            "state": "rolled_back",
            "serving": describe_serving(self._serving),
            "from_seq": undone.seq,
            "to_seq": 0 if back is None else back.seq,
        }

    def history(self) -> list[dict[str, Any]]:
        """Return the status log, oldest first."""
        return self._log.read()
