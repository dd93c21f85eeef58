"""The agent polls at its pace, spread over a fleet, sooner after a failure, and ends when it is told to."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from lrcompress.cli.main import run
from lrcompress.edge.agent import Agent, unit
from lrcompress.edge.disk import Disk
from lrcompress.edge.folder import locked
from lrcompress.edge.log import MAX_BYTES, StatusLog
from lrcompress.edge.trial import NoVerdict
from tests.support.fleet import Fleet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def polled(
    fleet: Fleet, n: int, between: Any = lambda i: None, **options: Any
) -> tuple[list[dict[str, Any]], list[float]]:
    """Let an agent poll `n` times; return what it came to and how long it waited."""
    said: list[dict[str, Any]] = []
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        between(len(waits) - 1)
        return len(waits) > n

    Agent(fleet.device(**options), told=said.append, chance=random.Random(1), wait=wait).run()
    return said, waits


def test_it_takes_every_release_and_waits_about_as_long_as_it_is_told(fleet: Fleet) -> None:
    names = iter(["first", "second"])
    said, waits = polled(fleet, 6, lambda i: fleet.add(next(names)) if i in (1, 3) else None)
    assert [s["state"] for s in said] == ["up_to_date", "updated", "up_to_date", "updated", "up_to_date", "up_to_date"]
    assert 0 <= waits[0] <= 60 and all(2880 <= w <= 4320 for w in waits[1:]) and len(set(waits)) == 7


def test_after_failures_it_comes_back_sooner_and_then_at_its_pace(fleet: Fleet) -> None:
    gone = fleet.repo.rename(fleet.folder / "gone")
    said, waits = polled(fleet, 9, lambda i: gone.rename(fleet.repo) if i == 9 else None)
    assert {s["state"] for s in said} == {"failed"}
    for k, w in enumerate(waits[1:]):
        usual = min(3600, 30 * 2**k)
        assert 0.8 * usual <= w <= 1.2 * usual
    assert polled(fleet, 1)[1][1] >= 2880


def test_another_one_at_work_is_no_reason_to_end(fleet: Fleet) -> None:
    with locked(fleet.at):
        said, _ = polled(fleet, 2)
    assert [(s["state"], s["error"]["code"]) for s in said] == [("failed", 7)] * 2


def test_it_comes_back_when_a_trial_is_due(fleet: Fleet) -> None:
    def none(data: bytes) -> None:
        raise NoVerdict("out of memory")

    fleet.add("first")
    said, waits = polled(fleet, 4, trial=none)
    assert [s["state"] for s in said] == ["failed"] * 3 + ["pending"]
    due = datetime.fromisoformat(fleet.device().status()["pending"]["retry_at"])
    assert timedelta(0) < due - datetime.now(UTC) <= timedelta(minutes=10)
    assert 0 < waits[-1] <= 602


def test_a_term_ends_it_at_once(fleet: Fleet) -> None:
    command = [sys.executable, "-m", "lrcompress", "device", "agent", str(fleet.at), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(6)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(out)["ok"]


def test_the_unit_is_in_the_package(capsys: Any, tmp_path: Path) -> None:
    capsys.readouterr()
    assert run(["device", "agent", "--unit"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == unit().strip() and "ExecStart=/usr/bin/env lrcompress device agent" in printed
    assert "StateDirectory=lrcompress" in printed and "Environment=LRCOMPRESS_STATE=/var/lib/lrcompress" in printed
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.service" in data["*"]


def test_the_log_starts_again_at_its_size(tmp_path: Path) -> None:
    """Whatever an agent writes for years takes two files of 256 KiB; the newest line is always there."""
    log, now = StatusLog(tmp_path, Disk()), datetime.now(UTC)
    for i in range(9000):
        log.write(now, "failed", reason="x" * 60, i=i)
    sizes = [p.stat().st_size for p in tmp_path.iterdir()]
    assert len(sizes) == 2 and max(sizes) <= MAX_BYTES
    found = [e["i"] for e in log.read()]
    assert found == list(range(found[0], 9000)) and len(found) > 2000


def test_a_log_line_does_not_hang_on_one_that_a_power_cut_tore(tmp_path: Path) -> None:
    log, now = StatusLog(tmp_path, Disk()), datetime.now(UTC)
    log.write(now, "one")
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"at": "2026')
    log.write(now, "two")
    assert [e["state"] for e in log.read()] == ["one", "two"]
    path.write_bytes(path.read_bytes() + bytes(50))
    log.write(now, "three")
    assert [e["state"] for e in log.read()] == ["one", "two", "three"]
