"""An application beside the agent: it follows every commit, in time, between two requests, and writes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lrcompress import publish
from lrcompress.edge import EdgeSession
from lrcompress.edge.disk import Disk
from lrcompress.edge.health import boot_id
from lrcompress.edge.state import Probation, StateFiles
from lrcompress.errors import DataError, HostError
from tests.support.fleet import PASSPHRASE, Fleet, X, answers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def session(fleet: Fleet) -> Iterator[EdgeSession]:
    with EdgeSession(fleet.at) as session:
        yield session


def shows(session: EdgeSession, seq: int) -> None:
    """Wait until a session serves a seq."""
    started = time.perf_counter()
    while session.serving["seq"] != seq:
        assert time.perf_counter() - started < 20
        time.sleep(0.001)


def test_it_follows_updates_and_rollbacks(fleet: Fleet, session: EdgeSession) -> None:
    first = session.run({"x": X[:8]})["output"]
    np.testing.assert_array_equal(first, answers(fleet.device()))
    for seq, name in ((1, "first"), (2, "second")):
        fleet.add(name)
        device = fleet.device()
        assert device.update()["to_seq"] == seq
        shows(session, seq)
        np.testing.assert_array_equal(session.run({"x": X[:8]})["output"], answers(device))
    fleet.device().rollback()
    shows(session, 1)
    fleet.device().rollback()
    shows(session, 0)
    np.testing.assert_array_equal(session.run({"x": X[:8]})["output"], first)
    with pytest.raises(DataError):
        session.run({"y": X})


def test_it_writes_nothing(fleet: Fleet) -> None:
    fleet.add("first")
    fleet.device().update()
    sha = fleet.device().status()["serving"]["sha256"]
    (fleet.at / "store" / sha).write_bytes(b"rot")
    before = {p: p.stat().st_mtime_ns for p in fleet.at.rglob("*")}
    with EdgeSession(fleet.at) as session:
        assert session.serving["kind"] == "factory"
        session.run({"x": X[:8]})
    assert {p: p.stat().st_mtime_ns for p in fleet.at.rglob("*")} == before


def test_a_folder_that_goes_away_ends_no_service(fleet: Fleet, session: EdgeSession) -> None:
    fleet.add("first")
    fleet.device().update()
    shows(session, 1)
    expected = session.run({"x": X[:8]})["output"]
    for name in ("state.0", "state.1"):
        (fleet.at / name).unlink()
    fleet.at.rename(fleet.folder / "moved")
    time.sleep(0.2)
    assert session.run({"x": X[:8]})["output"].shape == expected.shape


def test_a_probation_that_nobody_ends_is_read_once(fleet: Fleet) -> None:
    """The agent died while a payload was on probation: the one before it serves, and the folder is left alone."""
    for name in ("first", "second"):
        fleet.add(name)
        fleet.device().update()
    files = StateFiles(fleet.at, Disk())
    until = (datetime.now(UTC) + timedelta(seconds=0.3)).isoformat()
    files.write(replace(files.read(), probation=Probation(boot_id(), until, 1)))
    with EdgeSession(fleet.at) as session:
        assert session.serving["seq"] == 2
        calls, real = [], session._device.refresh
        session._device.refresh = lambda: (calls.append(1), real())[1]  # type: ignore[method-assign]
        shows(session, 1)
        time.sleep(0.3)
        assert len(calls) == 1
        files.write(replace(files.read(), probation=None))
        shows(session, 2)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad allocation"), HostError("x", "y", "z")])
def test_what_cannot_be_taken_now_is_taken_later(fleet: Fleet, session: EdgeSession, error: Exception) -> None:
    """Whatever goes wrong in the thread that follows, it goes on following, and not as fast as it can."""
    calls, real = [], session._device.refresh

    def fails() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise error
        real()

    session._device.refresh = fails  # type: ignore[method-assign]
    fleet.add("first")
    fleet.device().update()
    shows(session, 1)
    assert len(calls) == 2


def test_requests_while_it_follows_are_of_one_release_each(fleet: Fleet, session: EdgeSession) -> None:
    known, seen, wrong, stop = {session.run({"x": X[:8]})["output"].tobytes(): 0}, set(), [], threading.Event()
    fleet.add("first")
    fleet.device().update()
    known[answers(fleet.device()).tobytes()] = 1
    fleet.add("second")
    fleet.device().update()
    known[answers(fleet.device()).tobytes()] = 2

    def ask() -> None:
        while not stop.is_set():
            seq = known.get(session.run({"x": X[:8]})["output"].tobytes())
            seen.add(seq) if seq is not None else wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for to in (1, 2, 1, 2):
        publish.rollback(fleet.repo, to, passphrase=PASSPHRASE) if to == 1 else fleet.add("second")
        device = fleet.device()
        device.update()
        shows(session, device.status()["serving"]["seq"])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and {1, 2} <= seen


APPLICATION = """
import hashlib, json, sys, time
import numpy as np
from lrcompress.edge import EdgeSession
from lrcompress.edge.disk import Disk
from lrcompress.edge.state import StateFiles
x = np.load(sys.argv[2])
with EdgeSession(sys.argv[1]) as session:
    last, late, before = session.serving["sha256"], 0.0, time.time()
    started, cpu = time.time(), time.process_time()
    time.sleep(1)
    print(json.dumps((time.process_time() - cpu) / (time.time() - started)), flush=True)
    before = time.time()
    while True:
        time.sleep(0.001)
        now, sha256 = time.time(), session.serving["sha256"]
        late, before = max(late, now - before), now
        if sha256 != last:
            found = hashlib.sha256(session.run({"x": x})["output"].tobytes()).hexdigest()
            print(json.dumps([now, late, sha256, found]), flush=True)
            last, late, before = sha256, 0.0, time.time()
"""
COMMITS, AGAIN = 20, 2


def test_another_process_notices_every_commit_within_a_tenth_of_a_second(fleet: Fleet, tmp_path: Path) -> None:
    """Time from the moment that a commit is on the disk to the moment that an idle application serves it, each of them.

    The application's own millisecond sleeps are the witness: what they overslept, the machine took, not the session. Two
    of the commits may be asked again, for a machine that takes without its witness noticing.
    """
    np.save(tmp_path / "x.npy", X[:8])
    entries, hashes = [], {}
    for name in ("first", "second"):
        fleet.add(name)
        device = fleet.device()
        device.update()
        entries.append(device.serving)
        hashes[device.serving.sha256] = hashlib.sha256(answers(device).tobytes()).hexdigest()
    files = StateFiles(fleet.at, Disk())
    state, delays, late = files.read(), [], []
    command = [sys.executable, "-c", APPLICATION, str(fleet.at), str(tmp_path / "x.npy")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        idle = json.loads(process.stdout.readline())
        chance = random.Random(0)
        while len(delays) < COMMITS:
            time.sleep(chance.uniform(0.02, 0.08))
            entry, other = entries[len(delays + late) % 2], entries[1 - len(delays + late) % 2]
            files.write(replace(state, active=entry, previous=other))
            committed = time.time()
            noticed, overslept, sha256, found = json.loads(process.stdout.readline())
            assert sha256 == entry.sha256 and found == hashes[sha256]
            delay = noticed - committed - overslept
            (delays if delay < 0.1 else late).append(delay)
            assert len(late) <= AGAIN, (late, delays)
    finally:
        process.kill()
        process.wait()
    assert idle < 0.05, f"{idle:.1%} of a processor for looking"
    print(f"delays of {COMMITS} commits: at most {max(delays) * 1000:.0f} ms; idle {idle:.2%}; late {late}")
