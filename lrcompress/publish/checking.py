"""Look at a repository as a client would, with python-tuf's own client and nothing of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tuf.api.exceptions import DownloadError, DownloadHTTPError, RepositoryError
from tuf.ngclient import FetcherInterface, Updater

from ..errors import UpdateError
from ..files import contained
from .repository import Repository, now


class FolderFetcher(FetcherInterface):
    """Serve `folder:///…` from a folder, as a web server would: a missing file is a 404."""

    SCHEME = "folder:///"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield contained(self._folder, unquote(url.removeprefix(self.SCHEME))).read_bytes()
        except (OSError, ValueError) as e:
            raise DownloadHTTPError(f"{url}: {e}", 404) from e


def verify(repo: str | Path) -> dict[str, Any]:
    """Walk from the first root to every group's payload; return what was found and what expires first.

    Raises `UpdateError` with the first thing a device would refuse.
    """
    repository = Repository(Path(repo))
    first = repository.metadata / "1.root.json"
    groups = []
    with tempfile.TemporaryDirectory() as folder:
        state, targets = Path(folder) / "metadata", Path(folder) / "targets"
        state.mkdir()
        targets.mkdir()
        try:
            updater = Updater(
                str(state), f"{FolderFetcher.SCHEME}metadata/", str(targets), f"{FolderFetcher.SCHEME}targets/",
                fetcher=FolderFetcher(repository.folder), bootstrap=first.read_bytes(),
            )  # fmt: skip
            updater.refresh()
            for group in repository.groups():
                info = updater.get_targetinfo(repository.target_path(group))
                if info is None:
                    raise UpdateError(repository.folder, f"a release of group {group}", "none that a client finds")
                updater.download_target(info)
                groups.append({"group": group, "seq": (info.custom or {}).get("seq"), "bytes": info.length})
        except (RepositoryError, DownloadError, OSError, ValueError) as e:
            raise UpdateError(
                repository.folder,
                "a repository that a client accepts",
                f"{type(e).__name__}: {e}",
                "see 'lrcompress publish refresh'",
            ) from e
    roles = ["root", "targets", "snapshot", "timestamp", *repository.groups()]
    expires = {role: repository.read(role).signed.expires for role in roles}
    soonest = min(expires, key=lambda r: expires[r])
    days = (expires[soonest].replace(tzinfo=now().tzinfo) - now()).days
    return {
        "repository": str(repository.folder), "model": repository.model, "groups": groups,
        "expires_first": {"role": soonest, "at": expires[soonest].isoformat(), "days": days},
    }  # fmt: skip
