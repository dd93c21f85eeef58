"""Who a device is, and what it tells its publisher: one signed record after each update, best effort.

    DIR/device.key        its private key, for its owner only; DIR/identity.json its id, public key, channel, where reports go
    DIR/report.counter    the number of the last report: written before it is sent, so that none is ever used twice

identity = Identity.create(folder, group="default", channel="stable", report_url="https://…")
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
from ..files import canonical_json, disk_errors, finite, sha256_bytes, write_atomic, write_json
from ..manifest import strict_json
from ..phases import CHANNELS

KEY, IDENTITY, COUNTER = "device.key", "identity.json", "report.counter"
TIMEOUT_S = 10.0
#: Refused payloads that a report names.
MOST_REFUSED = 8


def device_id(public: str) -> str:
    """Return the id that a public key (hex) gives its device."""
    return sha256_bytes(bytes.fromhex(public))[:32]


class Identity:
    """The identity in a device folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            about = strict_json((self.folder / IDENTITY).read_bytes())
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
    def find(cls, folder: str | Path) -> Identity | None:
        """Return the identity of a device folder; None for one without."""
        return cls(folder) if (Path(folder) / IDENTITY).exists() else None

    @classmethod
    def create(
        cls, folder: str | Path, *, group: str, channel: str = "stable", report_url: str | None = None
    ) -> Identity:
        """Make key and id in a device folder. Raises `DeviceStateError` rather than replace one."""
        folder = Path(folder)
        if channel not in CHANNELS:
            raise CommandError("--channel", " or ".join(CHANNELS), channel)
        if report_url is not None and not report_url.startswith(("http://", "https://")):
            raise CommandError("--report-url", "http:// or https://", report_url)
        if (folder / IDENTITY).exists():
            raise DeviceStateError(folder / IDENTITY, "a device without an identity", "one is there", "keep it")
        signer = CryptoSigner.generate_ed25519()
        public = str(signer.public_key.keyval["public"])
        write_atomic(folder / KEY, signer.private_bytes, mode=0o600)
        about = {"schema": 1, "id": device_id(public), "public": public, "group": group, "channel": channel}
        write_json(folder / IDENTITY, {**about, "report_url": report_url})
        return cls(folder)

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
        with disk_errors(path):
            # Digits alone: a counter that rotted starts at the clock, which is beyond all that were used.
            text = path.read_text() if path.exists() else "0"
            last = int(text) if text.isdecimal() else int(datetime.now(UTC).timestamp())
            write_atomic(path, str(last + 1).encode())
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
