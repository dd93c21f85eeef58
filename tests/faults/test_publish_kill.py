"""Publishing is atomic: killed, or out of disk, at every change of it, a repository is one that clients accept."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from lrcompress import publish
from lrcompress.errors import CommandError, HostError
from lrcompress.files import sha256_tree
from lrcompress.publish import releases
from lrcompress.publish.encoding import Encoded
from lrcompress.publish.repository import Repository
from tests.support.bases import base
from tests.support.fleet import PASSPHRASE, made, payload_bytes
from tests.support.killing import Killed, stops


def _init(work: Path) -> None:
    publish.init_repository(work / "repo", made() / "exported", work / "keys", passphrase=PASSPHRASE)


def _add(name: str, **options: object):
    def act(work: Path) -> None:
        publish.add(work / "repo", made() / "adapters" / name, passphrase=PASSPHRASE, **options)

    return act


def _rollback(work: Path) -> None:
    publish.rollback(work / "repo", 1, passphrase=PASSPHRASE)


def _rotate(*roles: str):
    return lambda work: publish.rotate_keys(work / "repo", roles, passphrase=PASSPHRASE)


def _revoke(work: Path) -> None:
    keyid = Repository(work / "repo").role("timestamp").keyids[0]
    publish.revoke(work / "repo", keyid, passphrase=PASSPHRASE)


ACTS = {
    "a first release": (0, _add("first")),
    "a second release": (1, _add("second")),
    "a new group": (1, _add("second", group="kitchen")),
    "a rollback": (2, _rollback),
    "a refresh": (1, lambda work: publish.refresh(work / "repo", passphrase=PASSPHRASE)),
    "new keys": (1, _rotate("targets", "timestamp", "default")),
    "a new root": (1, _rotate("root", "snapshot")),
    "a revoked key": (1, _revoke),
    "a new base": (1, lambda work: publish.base(work / "repo", base("B"), made() / "adapters" / "second", passphrase=PASSPHRASE)),
    "pruning": (3, lambda work: publish.prune(work / "repo", keep=1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Return folders with a repository after 0…3 releases."""
    top, found = tmp_path_factory.mktemp("before"), []
    for n, act in enumerate((_init, _add("first"), _add("second"), _add("loha"))):
        work = top / str(n)
        if n:
            shutil.copytree(top / str(n - 1), work)
        else:
            work.mkdir()
        act(work)
        found.append(work)
    return found


@functools.cache
def _encoded(name: str) -> Encoded:
    data = payload_bytes(name, encoding="int8")
    return Encoded(data, "int8", {"int8": len(data)}, {"ab" * 32: b"a delta"} if name == "second" else {})


@pytest.fixture(autouse=True, scope="module")
def _no_runtime():
    """Which encoding is chosen is nothing to this file, and what the runtime takes most of the time for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(releases, "_tensors", lambda source, manifest: (source.name, {}))
        patch.setattr(releases, "choose", lambda exported, manifest, kind, *args, **options: _encoded(kind))
        yield


def seqs(work: Path) -> list[tuple[str, int]]:
    return [(g["group"], g["seq"]) for g in publish.verify(work / "repo")["groups"]]


@pytest.mark.parametrize("what", ACTS)
def test_a_kill_anywhere_leaves_the_old_or_the_new_state(before, tmp_path, what):
    start, act = ACTS[what]
    old = seqs(before[start])
    done = tmp_path / "done"
    shutil.copytree(before[start], done)
    act(done)
    new = seqs(done)
    seen, cases, k = set(), 0, 0
    while True:
        k += 1
        work = tmp_path / f"{k}"
        shutil.copytree(before[start], work)
        with stops(k) as made_calls:
            try:
                act(work)
            except Killed:
                pass
            else:
                break
        assert len(made_calls) >= k
        if (state := sha256_tree(work / "repo")) not in seen:
            seen.add(state)
            assert seqs(work) in (old, new), f"after {k - 1} changes"
            cases += 1
        if k % 5 == 1:  # and the publisher goes on: the same command, then any other
            try:
                act(work)
            except CommandError:  # its work is done: the payload is served, the key is gone
                assert seqs(work) == new
            publish.refresh(work / "repo", passphrase=PASSPHRASE)
            assert not list(work.rglob("*.tmp")) and len(seqs(work)) == len(new)
        shutil.rmtree(work)
    assert k > 4 and cases > 1


@pytest.mark.parametrize("what", ["a second release", "a new root", "a first release"])
def test_a_full_disk_is_named_and_changes_nothing_that_clients_see(before, tmp_path, what):
    start, act = ACTS[what]
    k = 0
    while True:
        k += 1
        work = tmp_path / f"{k}"
        shutil.copytree(before[start], work)
        with stops(k, full=True) as grown:
            try:
                act(work)
            except HostError as e:
                assert e.exit_code == 10 and "space" in str(e)
        if len(grown) < k:
            break
        seqs(work)
        assert not list((work / "repo").rglob("*.tmp"))
        shutil.rmtree(work)
    assert k > 4


def test_a_killed_init_is_done_again(tmp_path):
    k = 0
    while True:
        k += 1 if k < 3 else 2
        work = tmp_path / f"{k}"
        work.mkdir()
        with stops(k):
            try:
                _init(work)
            except Killed:
                pass
            else:
                break
        if not (work / "repo").exists():
            _init(work)
        assert seqs(work) == []
        shutil.rmtree(work)
    assert k > 20
