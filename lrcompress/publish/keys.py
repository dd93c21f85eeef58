"""Signing keys: files that only their owner can read, encrypted with a passphrase, outside REPO; or signers by URI.

    KEYS/<role>.key, <role>@2.key …     ed25519, PKCS#8, encrypted; a line above the key says its keyid
    KEYS/<role>@3.signer                {uri, keyid, key}: a token or a service that signs (securesystemslib's URIs)
    KEYS/<role>@4.key.new               made for a rotation that has not happened yet

Which of them count is what the metadata say: a role names keyids. Key files of the past may stay where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import CryptoSigner, Key, Signer, SSlibKey

from ..errors import CommandError, HostError, UpdateError
from ..files import disk_errors, write_atomic, write_json

PASSPHRASE, PIN = "LRCOMPRESS_KEY_PASSPHRASE", "LRCOMPRESS_KEY_PIN"
ROLES = ("root", "targets", "snapshot", "timestamp")
_KEYID = b"keyid: "


def passphrase_from_environment() -> str | None:
    """Return the passphrase of the environment; None if there is none."""
    return os.environ.get(PASSPHRASE) or None


class KeyStore:
    """The keys of one publisher: those of `folder`, which new ones go to, and of further folders (an offline stick)."""

    def __init__(self, folder: Path, passphrase: str, further: Sequence[Path] = ()) -> None:
        if not passphrase:
            raise CommandError(
                "signing keys", "a passphrase", "an empty one", f"set {PASSPHRASE}, or type one at the prompt"
            )
        self.folder, self._folders, self._passphrase = folder, [folder, *further], passphrase.encode()

    def path(self, role: str, number: int = 1) -> Path:
        return self.folder / (f"{role}.key" if number == 1 else f"{role}@{number}.key")

    # making -------------------------------------------------------------------------------------------------------

    def create(self, role: str, number: int = 1) -> CryptoSigner:
        """Make and store a new key; raise `HostError` rather than replace one."""
        return self._create(self.path(role, number))

    def _create(self, path: Path) -> CryptoSigner:
        if path.exists():
            raise HostError(path, "no key of that name", "one is there", "keys are never overwritten: move it away")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        signer = CryptoSigner(key := Ed25519PrivateKey.generate())
        data = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(self._passphrase),
        )
        write_atomic(path, _KEYID + signer.public_key.keyid.encode() + b"\n" + data, mode=0o600)
        return signer

    def prepare(self, role: str, count: int) -> list[Signer]:
        """Return `count` keys for a rotation of `role`; those of one that was interrupted are used first."""
        waiting = [self._open(p) for p in sorted(self.folder.glob(f"{role}@*.key.new"))][:count]
        number = 1 + max((_number(p) for p in self._files(role)), default=0)
        made = [self._create(Path(f"{self.path(role, max(2, number) + i)}.new")) for i in range(count - len(waiting))]
        return [*waiting, *made]

    def settle(self, role: str) -> None:
        """Give the keys of a rotation that has happened their names."""
        for path in sorted(self.folder.glob(f"{role}@*.key.new")):
            with disk_errors(path):
                path.rename(path.with_suffix(""))

    def attach(self, role: str, number: int, uri: str, public: Path | None = None) -> Signer:
        """Record a signer by its URI. A PKCS#11 token (`hsm:`) tells its public key; others need it as a PEM file."""
        try:
            if public is not None:
                pem = serialization.load_pem_public_key(public.read_bytes())
                key: Key = SSlibKey.from_crypto(pem)  # type: ignore[arg-type]
            elif uri.startswith("hsm:"):
                from securesystemslib.signer import HSMSigner

                asked = urlsplit(uri)
                label = dict(parse_qsl(asked.query)).get("label")
                uri, key = HSMSigner.import_(int(asked.path) if asked.path else None, label, self._secret)
            else:
                raise ValueError("no public key")
            signer = Signer.from_priv_key_uri(uri, key, self._secret)
        except (OSError, ValueError, UnsupportedLibraryError, UnsupportedAlgorithm) as e:
            raise CommandError(
                f"--signer {role}={uri}", "a signer that securesystemslib opens, as ROLE=URI#PUBLIC.pem (hsm: needs no PEM)", f"{type(e).__name__}: {e}",
                "for PKCS#11: pip install 'lrcompress[hsm]', and set PYKCS11LIB",
            ) from e  # fmt: skip
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = {"schema": 1, "uri": uri, "keyid": key.keyid, "key": key.to_dict()}
        write_json(self.path(role, number).with_suffix(".signer"), about)
        return signer

    def _secret(self, name: str) -> str:
        found = os.environ.get(PIN)
        if found is None:
            raise UpdateError("signing keys", f"the {name} of the signer in {PIN}", "none", f"export {PIN}=…")
        return found

    # using --------------------------------------------------------------------------------------------------------

    def _files(self, role: str) -> list[Path]:
        """Return every key file of a role, those that wait for a rotation last."""
        patterns = (f"{role}.key", f"{role}.signer", f"{role}@*.key", f"{role}@*.signer", f"{role}@*.key.new")
        return [p for pattern in patterns for folder in self._folders for p in sorted(folder.glob(pattern))]

    def load(self, role: str) -> Signer:
        """Return the first signer of a role. Raises `UpdateError` for a lost key or a wrong passphrase, `HostError` for a loose file."""
        files = self._files(role)
        if not files:
            raise self._lost(role)
        return self._open(files[0])

    def signers(self, role: str, keyids: Collection[str]) -> Iterator[Signer]:
        """Yield the signers of `role` that are here, of those that its metadata name."""
        seen: set[str] = set()
        for path in self._files(role):
            keyid = _keyid(path)
            if keyid is not None and keyid not in keyids:
                continue
            signer = self._open(path)
            if signer.public_key.keyid in keyids and signer.public_key.keyid not in seen:
                seen.add(signer.public_key.keyid)
                yield signer

    def enough(self, role: str, keyids: Collection[str], threshold: int) -> list[Signer]:
        """Return signers of `role`. Raises `UpdateError` where they are fewer than its threshold."""
        found = list(self.signers(role, keyids))
        if not found and not self._files(role):
            raise self._lost(role)
        if len(found) < threshold:
            raise UpdateError(
                f"the {role} key" + "s" * (threshold > 1), f"{threshold} of the {len(keyids)} keys of the role", f"{len(found)} in {', '.join(map(str, self._folders))}",
                "bring the others, or name their folder with --keys",
            )  # fmt: skip
        return found

    def _lost(self, role: str) -> UpdateError:
        return UpdateError(
            self.path(role), f"the {role} key", "No such file", "bring the key folder back, or name it with --keys"
        )

    def _open(self, path: Path) -> Signer:
        try:
            mode, data = path.stat().st_mode, path.read_bytes()
        except OSError as e:
            raise UpdateError(path, "a signing key", e.strerror or str(e), "bring the key folder back") from e
        if path.suffix == ".signer":
            return self._remote(path, data)
        if mode & 0o077:
            raise HostError(path, "a key that only its owner can read (0600)", oct(mode & 0o777), f"chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(data, self._passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm) as e:
            raise UpdateError(
                path, "the passphrase of this key", "another one, or a damaged file", f"check {PASSPHRASE}"
            ) from e
        if not isinstance(key, Ed25519PrivateKey):
            raise UpdateError(path, "an ed25519 key", type(key).__name__)
        return CryptoSigner(key)

    def _remote(self, path: Path, data: bytes) -> Signer:
        try:
            about: dict[str, Any] = json.loads(data)
            key = Key.from_dict(about["keyid"], dict(about["key"]))
            return Signer.from_priv_key_uri(about["uri"], key, self._secret)
        except (KeyError, TypeError, ValueError, OSError, UnsupportedLibraryError, UnsupportedAlgorithm) as e:
            raise UpdateError(
                path, "a signer that answers", f"{type(e).__name__}: {e}", "plug the token in, or repair the file"
            ) from e


def _number(path: Path) -> int:
    head = path.name.split(".key")[0].split(".signer")[0]
    tail = head.rpartition("@")[2]
    return int(tail) if "@" in head and tail.isdecimal() else 1


def _keyid(path: Path) -> str | None:
    """Return the keyid that a key file states, without opening the key; None where it states none."""
    try:
        if path.suffix == ".signer":
            return str(json.loads(path.read_bytes())["keyid"])
        with open(path, "rb") as f:
            line = f.readline(200)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return line.removeprefix(_KEYID).strip().decode("ascii", "replace") if line.startswith(_KEYID) else None
