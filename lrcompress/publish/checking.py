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
from ..files import contained, sha256_file
from ..manifest import MANIFEST, Manifest
from ..packs import BLOCK_BYTES, Pack
from ..phases import CANDIDATE, PACK, PLACES, STABLE
from .repository import Repository
from .upkeep import expiries


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


def verify(repo: str | Path, *, within_days: int = 0) -> dict[str, Any]:
    """Walk from the first root to every file that groups offer; return what was found and when what expires.

    Raises `UpdateError` with the first thing a device would refuse, or for what expires in `within_days`.
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
                groups += _walk(repository, updater, group)
        except (RepositoryError, DownloadError, OSError, ValueError) as e:
            raise UpdateError(
                repository.folder,
                "a repository that a client accepts",
                f"{type(e).__name__}: {e}",
                "see 'lrcompress publish refresh'",
            ) from e
    expires = expiries(repository)
    first_to_go = expires[0]
    if first_to_go["days"] < within_days:
        raise UpdateError(
            repository.folder, f"signatures that hold for {within_days} days", f"{first_to_go['role']}: {first_to_go['days']} days",
            "run 'lrcompress publish refresh' with its key",
        )  # fmt: skip
    return {
        "repository": str(repository.folder), "model": repository.model, "groups": groups,
        "expires_first": first_to_go, "expires": expires,
    }  # fmt: skip


def _walk(repository: Repository, updater: Updater, group: str) -> list[dict[str, Any]]:
    """Download every target of a group as a client; return one row for what everybody and what some are offered."""
    rows, seqs, packed, brought = [], dict[int, str](), dict[str, str](), list[dict[str, Any]]()
    for release in repository.on_record(group):
        if seqs.setdefault(release.seq, release.sha256) != release.sha256:
            raise UpdateError(repository.folder, f"one payload for seq {release.seq} of {group}", "two")
    offered = repository.read(group).signed.targets
    for path in sorted(offered):
        info = updater.get_targetinfo(path)
        if info is None:
            raise UpdateError(repository.folder, f"the target {path}", "none that a client finds")
        file = Path(updater.target_dir or ".") / "file"
        updater.download_target(info, filepath=str(file))
        name = path.rpartition("/")[2]
        if name.endswith(PACK) and (info.custom or {}).get("from") is None:
            packed[str((info.custom or {}).get("to"))] = _unpacked(file)
        if name in (STABLE, CANDIDATE):
            about = info.custom or {}
            if about.get("base"):
                brought.append(about["base"])
            row = {"group": group, "seq": about.get("seq"), "bytes": info.length}
            rows.append(row if name == STABLE else {**row, "percent": about.get("places", 0) * 100 / PLACES})
    for base in brought:
        if packed.get(base["base_id"]) != base["manifest"]:
            raise UpdateError(
                repository.folder, f"a whole pack of base {base['base_id'][:16]}", "none that leads there"
            )
    return rows


def _unpacked(pack: Path) -> str:
    """Unpack a whole base as a device would; return the hash of its manifest. Raises `TrustError` for one that does not hold."""
    with tempfile.TemporaryDirectory() as folder, open(pack, "rb") as f:
        opened = Pack(iter(lambda: f.read(BLOCK_BYTES), b""), most_bytes=1 << 40)
        opened.check(start=None, result=opened.recipe.result, sizes={})
        for file, content in opened.files(lambda name, offset, length: iter(())):
            with open(Path(folder) / file.name, "wb") as out:
                out.writelines(content)
        manifest = Manifest.load(Path(folder))
        if manifest.base_id != opened.recipe.result:
            raise UpdateError("pack", f"base {opened.recipe.result[:16]}", manifest.base_id[:16])
        return sha256_file(Path(folder) / MANIFEST)
