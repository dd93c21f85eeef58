"""Signing keys: ed25519, one file per role, encrypted with a passphrase, readable by their owner only, outside REPO."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from ..errors import CommandError, HostError, UpdateError
from ..files import write_atomic

PASSPHRASE = "LRCOMPRESS_KEY_PASSPHRASE"
ROLES = ("root", "targets", "snapshot", "timestamp")


def passphrase_from_environment() -> str | None:
    """Return the passphrase of the environment; None if there is none."""
    return os.environ.get(PASSPHRASE) or None


class KeyStore:
    """The key files of one publisher."""

    def __init__(self, folder: Path, passphrase: str) -> None:
        if not passphrase:
            raise CommandError(
                "signing keys", "a passphrase", "an empty one", f"set {PASSPHRASE}, or type one at the prompt"
            )
        self.folder, self._passphrase = folder, passphrase.encode()

    def path(self, role: str) -> Path:
        return self.folder / f"{role}.key"

    def create(self, role: str) -> CryptoSigner:
        """Make and store a new key; raise `HostError` rather than replace one."""
        if self.path(role).exists():
            raise HostError(
                self.path(role), "no key of that name", "one is there", "keys are never overwritten: move it away"
            )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = Ed25519PrivateKey.generate()
        data = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(self._passphrase),
        )
        write_atomic(self.path(role), data, mode=0o600)
        return CryptoSigner(key)

    def load(self, role: str) -> CryptoSigner:
        """Return the signer of `role`. Raises `UpdateError` for a lost key or a wrong passphrase, `HostError` for a loose file."""
        path = self.path(role)
        try:
            mode, data = path.stat().st_mode, path.read_bytes()
        except OSError as e:
            raise UpdateError(path, f"the {role} key", e.strerror or str(e), "bring the key folder back") from e
        if mode & 0o077:
            raise HostError(path, "a key that only its owner can read (0600)", oct(mode & 0o777), f"chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(data, self._passphrase)
        except (ValueError, TypeError) as e:
            raise UpdateError(
                path, "the passphrase of this key", "another one, or a damaged file", f"check {PASSPHRASE}"
            ) from e
        if not isinstance(key, Ed25519PrivateKey):
            raise UpdateError(path, "an ed25519 key", type(key).__name__)
        return CryptoSigner(key)
