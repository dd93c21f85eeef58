"""SIGKILL, for real: before every call to the disk, and at random moments, while ONNX Runtime answers requests.

Every answer that a device gives while it lives, and after its restart, must be that of a release bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fleet import Fleet, X, answers, payload_bytes, release

ROOT = Path(__file__).parents[2]


class Zygote:
    """See `zygote`."""

    def __init__(self, inputs: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.faults.zygote"]
        self._inputs = str(inputs)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def __call__(self, folder: Path, **task: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "input": self._inputs, **task}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert found["error"] is None, found
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Place:
    """A repository, a device folder before its newest release, and what every release answers."""

    def __init__(self, folder: Path, newest: str) -> None:
        self.fleet = Fleet(folder)
        self.known: dict[str, int] = {}
        self._note(0)
        for seq, name in ((1, "first"), (2, "second")):
            self.fleet.add(name)
            self.fleet.device().update()
            self._note(seq)
        self.before = folder / "before"
        shutil.copytree(self.fleet.at, self.before)
        self.ends = 3
        if newest == "good":
            self.fleet.add("loha")
        else:
            golden = {"output": np.ones((8, 5), np.float32)}
            data = payload_bytes("loha", golden=golden)
            release(self.fleet, data if newest == "bad" else data[:-4], seq=3)
            self.ends = 2
        self.fleet.device().update()
        self._note(self.ends)

    def _note(self, seq: int) -> None:
        self.known[hashlib.sha256(answers(self.fleet.device()).tobytes()).hexdigest()] = seq

    def again(self) -> Path:
        shutil.rmtree(self.fleet.at)
        shutil.copytree(self.before, self.fleet.at)
        return self.fleet.at


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    inputs = tmp_path_factory.mktemp("inputs") / "x.npy"
    np.save(inputs, X[:8])
    zygote = Zygote(inputs)
    yield zygote
    zygote.close()


def restarts(place: Place, zygote: Zygote, boots: int = 3) -> None:
    """Start the device again until it is where it must be, in at most three boots."""
    for _ in range(boots):
        found = zygote(place.fleet.at)
        assert {place.known[a] for a in found["answers"]} <= {2, place.ends}
        status = place.fleet.device().status()
        if status["serving"]["seq"] == place.ends and found["said"] in (
            "updated",
            "rolled_back",
            "up_to_date",
            "rejected",
        ):
            break
    else:
        raise AssertionError(f"not there after {boots} boots: {status}, {found}")
    assert not list((place.fleet.at / "dl").iterdir()) and len(list((place.fleet.at / "store").iterdir())) <= 2
    assert not list(place.fleet.at.rglob("*.tmp"))


def killed(place: Place, zygote: Zygote, **task: Any) -> bool:
    place.again()
    found = zygote(place.fleet.at, **task)
    assert {place.known[a] for a in found["answers"]} <= {2, place.ends}
    restarts(place, zygote)
    return bool(found["killed"])


@pytest.mark.parametrize(
    ("newest", "every"),
    [("good", 2), pytest.param("bad", 5, marks=pytest.mark.slow), pytest.param("truncated", 7, marks=pytest.mark.slow)],
)
def test_killed_before_calls_to_the_disk(tmp_path: Path, zygote: Zygote, newest: str, every: int) -> None:
    assert before_calls(tmp_path, zygote, newest, every) > 20


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("newest", ["good", "bad", "truncated"])
def test_killed_before_every_call(tmp_path: Path, zygote: Zygote, newest: str) -> None:
    calls = before_calls(tmp_path, zygote, newest, 1)
    assert calls > 20
    print(f"{newest}: killed before each of {calls} calls; 0 violations")


def before_calls(tmp_path: Path, zygote: Zygote, newest: str, every: int) -> int:
    place = Place(tmp_path, newest)
    place.again()
    calls: int = zygote(place.fleet.at)["calls"]
    for at in range(0, calls, every):
        assert killed(place, zygote, kill_at=at), at
    return calls


def test_killed_at_random_moments(tmp_path: Path, zygote: Zygote) -> None:
    chance, place = random.Random(1), Place(tmp_path, "good")
    assert sum(killed(place, zygote, after_s=chance.uniform(0, 0.06)) for _ in range(10)) >= 5


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_five_hundred_random_moments(tmp_path: Path, zygote: Zygote) -> None:
    """With the trial in a process of its own, as it ships."""
    chance, place, n = random.Random(2), Place(tmp_path, "good"), 0
    for i in range(500):
        child = i % 5 == 0
        n += killed(place, zygote, after_s=chance.uniform(0, 2.0 if child else 0.08), child=child)
    print(f"{n} of 500 were killed before they had finished; 0 violations")
    assert n >= 250
