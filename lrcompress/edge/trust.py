"""What the signed metadata offer: python-tuf decides, from the factory's root on; the release's own record is checked here."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadError as TufDownloadError
from tuf.api.exceptions import DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Timestamp
from tuf.ngclient import FetcherInterface, Updater

from ..errors import DownloadError, UpdateError
from ..manifest import is_sha256
from .offers import choose, shortcut
from .transport import Broken, Transport, Unavailable

_PREFIX = "repository:///"


@dataclass(frozen=True)
class Offer:
    """A signed release: what to fetch, what it is for, and its place in the order of releases."""

    seq: int
    sha256: str
    length: int
    path: str
    base_ids: tuple[str, ...]
    min_version: str
    rollback_of: int | None
    #: (base, sha256, path, length) of a delta from a payload that is here.
    shortcut: tuple[str, str, str, int] | None = None


class _Fetcher(FetcherInterface):
    """Let python-tuf read through our transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from self._transport.get(url.removeprefix(_PREFIX)).blocks
        except Unavailable as e:
            raise DownloadHTTPError(str(e), e.status) from e


def newest(
    metadata: Path,
    root: bytes,
    transport: Transport,
    *,
    model: str,
    group: str,
    device: str | None = None,
    channel: str = "stable",
    have: Collection[str] = (),
) -> tuple[Offer | None, datetime | None]:
    """Return the newest release of a group (None: there is none) and when the metadata were issued.

    Raises `DownloadError` where bytes did not arrive, `UpdateError` where they cannot be trusted.
    """
    shorter = None
    where = f"update metadata of group {group}"
    try:
        updater = Updater(str(metadata), f"{_PREFIX}metadata/", fetcher=_Fetcher(transport), bootstrap=root)
        updater.refresh()
        issued = _issued(metadata / "timestamp.json")
        info, target_path = choose(updater, model=model, group=group, device=device, channel=channel)
        if info is not None:
            result = str(info.hashes.get("sha256"))
            shorter = shortcut(updater, model=model, group=group, result=result, have=have)
    except ExpiredMetadataError as e:
        remedy = "the publisher runs 'lrcompress publish refresh'; check this device's clock too"
        raise UpdateError(where, "signatures that have not expired", e, remedy) from e
    except RepositoryError as e:
        raise UpdateError(
            where, "metadata signed for this device, never older than before", f"{type(e).__name__}: {e}"
        ) from e
    except (TufDownloadError, Broken) as e:
        raise DownloadError(
            where,
            "a repository that answers",
            str(e) or type(e).__name__,
            "check the URL and the link; it is tried again with the next update",
        ) from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UpdateError(where, "metadata in TUF's form", f"{type(e).__name__}: {e}") from e
    if info is None:
        return None, issued
    return replace(_offer(info.custom, info.length, info.hashes, target_path), shortcut=shorter), issued


def _issued(path: Path) -> datetime | None:
    """Return the signed time of issue; python-tuf has verified the file it left here."""
    value = Metadata[Timestamp].from_file(str(path)).signed.unrecognized_fields.get("issued")
    if value is None:
        return None
    found = datetime.fromisoformat(str(value))
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _offer(custom: Any, length: int, hashes: dict[str, str], target_path: str) -> Offer:
    def need(good: object, key: str, expected: str) -> None:
        if not good:
            got = custom.get(key, "nothing") if isinstance(custom, dict) else custom
            raise UpdateError(
                f"release record: {key}", expected, got, "the publisher must sign a release of this version"
            )

    need(isinstance(custom, dict), "custom", "an object")
    seq, ids, undone = custom.get("seq"), custom.get("base_ids"), custom.get("rollback_of")
    need(type(seq) is int and seq > 0, "seq", "a positive whole number")
    sha256 = hashes.get("sha256")
    need(is_sha256(sha256) and custom.get("sha256") == sha256, "sha256", "the hash of the signed target")
    need(isinstance(ids, list) and ids and all(map(is_sha256, ids)), "base_ids", "a list of hex sha256")
    need(isinstance(custom.get("min_version"), str), "min_version", "a version")
    need(undone is None or (type(undone) is int and 0 < undone < seq), "rollback_of", "an earlier seq")
    folder, _, name = target_path.rpartition("/")
    return Offer(
        seq, str(sha256), length, f"targets/{folder}/{sha256}.{name}", tuple(ids), custom["min_version"], undone
    )
