"""Who a device is, and what it tells its publisher: one signed record after each update, best effort.

    DIR/device.key        its private key, for its owner only; DIR/identity.json its id, public key, channel, where reports go
    DIR/report.counter    the number of the last report: written before it is sent, so that none is ever used twice

identity = Identity(folder)
identity.report(device.status(), outcome)      # never raises: what could not be sent is sent as news with the next one
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import urllib3
from securesystemslib.signer import CryptoSigner, SSlibKey

from .._version import __version__
from ..errors import CommandError, DeviceStateError
from ..files import canonical_json, finite, sha256_bytes
from ..manifest import strict_json
from ..phases import CHANNELS
from .disk import Disk
from .folder import COUNTER, IDENTITY, KEY

TIMEOUT_S = 10.0
#: Refused payloads that a report names.
MOST_REFUSED = 8
_MOST_BYTES = 64 << 10


def device_id(public: str) -> str:
    """Return the id that a public key (hex) gives its device."""
    return sha256_bytes(bytes.fromhex(public))[:32]


def new_identity(*, group: str, channel: str, report_url: str | None) -> dict[str, tuple[bytes, int]]:
    """Return the files of a new key and id with their modes. Raises `CommandError`."""
    if channel not in CHANNELS:
        raise CommandError("--channel", " or ".join(CHANNELS), channel)
    if report_url is not None and not report_url.startswith(("http://", "https://")):
        raise CommandError("--report-url", "http:// or https://", report_url)
    signer = CryptoSigner.generate_ed25519()
    public = str(signer.public_key.keyval["public"])
    about = {"schema": 1, "id": device_id(public), "public": public, "group": group, "channel": channel}
    text = json.dumps({**about, "report_url": report_url}, indent=1, sort_keys=True)
    return {KEY: (signer.private_bytes, 0o600), IDENTITY: (text.encode() + b"\n", 0o644)}


class Identity:
    """The identity in a device folder."""

    def __init__(self, folder: str | Path, disk: Disk | None = None) -> None:
        self.folder, self._disk = Path(folder), disk or Disk()
        try:
            about = strict_json(self._disk.read(self.folder / IDENTITY, _MOST_BYTES))
            self.public, self.channel = str(about["public"]), str(about["channel"])
            self.id, self.report_url = device_id(self.public), about.get("report_url")
            if about["id"] != self.id or self.channel not in CHANNELS:
                raise ValueError("id and key do not belong together")
        except (OSError, ValueError, KeyError, TypeError) as e:
            got = e.strerror if isinstance(e, OSError) else str(e)
            raise DeviceStateError(
                self.folder / IDENTITY, "the identity that 'lrcompress device init' made", got, "make the device again"
            ) from e

    @classmethod
    def find(cls, folder: str | Path, disk: Disk | None = None) -> Identity | None:
        """Return the identity of a device folder; None for one without."""
        return cls(folder, disk) if (Path(folder) / IDENTITY).exists() else None

    def record(
        self,
        status: Mapping[str, Any],
        outcome: Mapping[str, Any] | None = None,
        *,
        healthy: bool = True,
        reason: str = "",
        at: datetime | None = None,
    ) -> dict[str, Any]:
        """Return the next signed record. Its number is used up, whether or not it is sent.

        `status`, `outcome`: what `Device.status` and `Device.update` return; `healthy` False: what the payload does in
        the field is not what it should, for `reason`.
        """
        outcome = outcome or {}
        body = {
            "schema": 1, "device": self.id, "counter": self._next(), "at": (at or datetime.now(UTC)).isoformat(timespec="seconds"),
            "model": status["model"], "group": status["group"], "channel": self.channel, "base_id": status["base_id"],
            "version": __version__, "serving": status["serving"], "refused": list(status["refused"])[-MOST_REFUSED:],
            "state": outcome.get("state"), "reason": str(reason or outcome.get("reason") or "")[:300],
            "bytes": int(outcome.get("bytes_downloaded") or 0), "requests": int(outcome.get("requests") or 0),
            "ms": float(outcome.get("ms") or 0.0), "healthy": bool(healthy),
        }  # fmt: skip
        body = finite(body)
        try:
            uri = f"file2:{self.folder / KEY}"
            key = SSlibKey(self.id, "ed25519", "ed25519", {"public": self.public})
            with _no_prefix():
                signature = CryptoSigner.from_priv_key_uri(uri, key).sign(canonical_json(body)).signature
        except (OSError, ValueError) as e:
            raise DeviceStateError(self.folder / KEY, "this device's key", e, "make the device again") from e
        return {"record": body, "signature": signature}

    def _next(self) -> int:
        path = self.folder / COUNTER
        try:
            text = self._disk.read(path, _MOST_BYTES).decode("ascii", "replace")
        except FileNotFoundError:
            text = "0"
        except OSError:
            text = ""
        # Digits alone: a counter that rotted starts at the clock, which is beyond all that were used.
        last = int(text) if text.isdecimal() else int(datetime.now(UTC).timestamp())
        self._disk.replace(path, str(last + 1).encode())
        self._disk.sync_folder(self.folder)
        return last + 1

    def report(self, status: Mapping[str, Any], outcome: Mapping[str, Any] | None = None, **about: Any) -> bool:
        """Send the next record; tell whether it was accepted. A publisher who does not answer never disturbs a device."""
        if self.report_url is None:
            return False
        with contextlib.suppress(Exception):
            signed = self.record(status, outcome, **about)
            with urllib3.PoolManager(num_pools=1) as pool:  # a report is rare: no connection is kept
                answer = pool.request(
                    "POST", self.report_url, body=json.dumps(signed).encode(),
                    headers={"Content-Type": "application/json", "Connection": "close"}, timeout=TIMEOUT_S, retries=False,
                )  # fmt: skip
            return 200 <= answer.status < 300
        return False


@contextlib.contextmanager
def _no_prefix() -> Any:
    """Keep the prefix that securesystemslib may put before paths out of it."""
    old = os.environ.pop(CryptoSigner.PREFIX_ENV_VAR, None)
    try:
        yield
    finally:
        if old is not None:
            os.environ[CryptoSigner.PREFIX_ENV_VAR] = old
