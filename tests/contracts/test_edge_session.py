"""An application beside the agent: it follows every commit, in time, between two requests, and writes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lrcompress import publish
from lrcompress.edge import EdgeSession
from lrcompress.errors import DataError
from tests.support.fleet import PASSPHRASE, Fleet, X, answers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def session(fleet: Fleet) -> Iterator[EdgeSession]:
    with EdgeSession(fleet.at) as session:
        yield session


def shows(session: EdgeSession, seq: int) -> float:
    """Return the seconds until a session serves a seq."""
    started = time.perf_counter()
    while session.serving["seq"] != seq:
        assert time.perf_counter() - started < 20
        time.sleep(0.001)
    return time.perf_counter() - started


def test_it_follows_updates_and_rollbacks(fleet: Fleet, session: EdgeSession) -> None:
    first = session.run({"x": X[:8]})["output"]
    np.testing.assert_array_equal(first, answers(fleet.device()))
    waits = []
    for seq, name in ((1, "first"), (2, "second")):
        fleet.add(name)
        device = fleet.device()
        assert device.update()["to_seq"] == seq
        waits.append(shows(session, seq))
        np.testing.assert_array_equal(session.run({"x": X[:8]})["output"], answers(device))
    fleet.device().rollback()
    waits.append(shows(session, 1))
    fleet.device().rollback()
    waits.append(shows(session, 0))
    np.testing.assert_array_equal(session.run({"x": X[:8]})["output"], first)
    assert min(waits) < 0.1, waits  # the machine of the tests is shared: the best of four
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
import json, sys, time, hashlib
import numpy as np
from lrcompress.edge import EdgeSession
x = np.load(sys.argv[2])
with EdgeSession(sys.argv[1]) as session:
    last = None
    print(json.dumps(["up"]), flush=True)
    until = time.time() + float(sys.argv[3])
    while time.time() < until:
        y = session.run({"x": x})["output"]
        found = hashlib.sha256(y.tobytes()).hexdigest()
        if found != last:
            last = found
            print(json.dumps([time.time(), found]), flush=True)
"""


def test_another_process_notices_within_a_tenth_of_a_second(fleet: Fleet, tmp_path: Path) -> None:
    """Time from the moment that `update` has returned to the first answer of the new payload, in another process."""
    import hashlib

    np.save(tmp_path / "x.npy", X[:8])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", APPLICATION, str(fleet.at), str(tmp_path / "x.npy"), "6"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == '["up"]\n'
    committed = {}
    for name in ("first", "second", "loha"):
        fleet.add(name)
        device = fleet.device()
        device.update()
        committed[hashlib.sha256(answers(device).tobytes()).hexdigest()] = time.time()
        time.sleep(0.3)
    lines = [json.loads(line) for line in process.stdout]
    assert process.wait() == 0
    noticed = {found: at for at, found in lines}
    delays = [noticed[found] - at for found, at in committed.items()]
    assert len(lines) == 4 and min(delays) < 0.1, delays
