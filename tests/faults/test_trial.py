"""The trial in a process of its own, and the operator's program: what ends them takes nobody with it, and says no more than it knows."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress.edge import device as device_module
from lrcompress.edge import updater as updater_module
from lrcompress.edge.device import Device
from lrcompress.edge.health import check_health
from lrcompress.edge.trial import ChildTrial, Limits, NoVerdict, judge
from lrcompress.errors import PayloadError
from lrcompress.golden import load_golden
from lrcompress.runtime import Session
from tests.support.fleet import Fleet, answers, made, payload_bytes

LIMITS = Limits(1 << 20, 1000.0, None)


def child(timeout_s: float = 120.0, **limits: Any) -> ChildTrial:
    return ChildTrial(made() / "exported", Limits(**{**vars(LIMITS), **limits}), timeout_s=timeout_s)


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that has every child run some code before anything else."""

    def prepare(code: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return prepare


def test_a_good_payload_passes_and_a_bad_one_fails_with_its_reason() -> None:
    child()(payload_bytes("first"))
    with pytest.raises(PayloadError, match="golden output output: expected a difference of at most"):
        child()(payload_bytes("first", golden={"output": np.ones((8, 5), np.float32)}))
    with pytest.raises(PayloadError, match="at most 10 bytes"):
        child(max_payload_bytes=10)(payload_bytes("first"))


def test_a_payload_that_is_larger_than_allowed_is_not_read() -> None:
    session, golden = Session(made() / "exported"), load_golden(made() / "exported" / "golden.npz")
    data = payload_bytes("first")
    judge(data, session, golden, replace(LIMITS, max_payload_bytes=len(data)))
    with pytest.raises(PayloadError, match=f"at most {len(data) - 1} bytes"):
        judge(data, session, golden, replace(LIMITS, max_payload_bytes=len(data) - 1))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os; os.abort()", "SIGABRT"),
        ("import os; os._exit(0)", "exit code 0 and no answer"),
        ("import os; os._exit(3)", "exit code 3 and no answer"),
        ("import os, sys; sys.stdout.write('nonsense'); sys.stdout.flush(); os._exit(0)", "no answer"),
        ("import os, sys; sys.stdout.write('{\"passed\": true}'); sys.stdout.flush(); os._exit(0)", "no answer"),
        ("import os, sys; sys.stdout.write('x' * 10**6); sys.stdout.flush(); os._exit(0)", "no answer"),
        ("import numpy; numpy.load = lambda *a, **k: (_ for _ in ()).throw(MemoryError('no memory'))", "no memory"),
        ("import time; time.sleep(60)", "within 1 s"),
    ],
)
def test_a_child_that_ends_without_an_answer_is_no_verdict(sabotage: Any, code: str, word: str) -> None:
    sabotage(code)
    started = time.monotonic()
    with pytest.raises(NoVerdict, match=word):
        child(timeout_s=1.0 if "sleep" in code else 120.0)(payload_bytes("first"))
    assert time.monotonic() - started < 40


def test_a_runtime_that_crashes_is_survived_by_the_service(tmp_path: Path, sabotage: Any) -> None:
    """The service goes on answering; the payload waits, is not refused, and is taken when the crash is over."""
    fleet = Fleet(tmp_path)
    fleet.add("first")
    fleet.options.pop("trial")
    device = fleet.device()
    before = answers(device)
    sabotage("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    d = device.update()
    assert (d["state"], d["error"]["code"]) == ("failed", 10) and "SIGSEGV" in d["reason"]
    np.testing.assert_array_equal(answers(device), before)
    status = device.status()
    assert (status["pending"]["trials"], status["refused"]) == (1, [])
    sabotage("")
    assert device.update()["state"] == "updated"


def test_a_child_that_is_refused_a_process_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(NoVerdict, match="No such file"):
        child()(payload_bytes("first"))


# without a verdict ----------------------------------------------------------------------------------------------------


def test_the_wait_for_another_trial_grows_and_is_capped_and_told(tmp_path: Path) -> None:
    """Three trials in a row, then 10 minutes, 20, 40, … and never more than a day; the payload is never refused."""
    fleet, now, waits = Fleet(tmp_path), [datetime.now(UTC)], []
    fleet.add("first")

    def none(data: bytes) -> None:
        raise NoVerdict("out of memory")

    device = fleet.device(clock=lambda: now[0], trial=none)
    for _ in range(12):
        while (d := device.update())["state"] != "pending":
            assert (d["state"], d["error"]["code"]) == ("failed", 10)
        due = datetime.fromisoformat(device.status()["pending"]["retry_at"])
        assert device.status()["pending"]["retry_at"] in d["reason"]
        waits.append((due - now[0]).total_seconds() / 60)
        now[0] += timedelta(seconds=(due - now[0]).total_seconds() + 1)
    assert [round(w) for w in waits[:8]] == [10, 20, 40, 80, 160, 320, 640, 1280]
    assert max(waits) <= 24 * 60 and device.status()["pending"]["trials"] == 36
    now[0] += timedelta(days=2)
    assert fleet.device(clock=lambda: now[0]).update()["state"] in ("updated", "pending")
    assert fleet.device().status()["refused"] == []


# on probation ---------------------------------------------------------------------------------------------------------


def settings(fleet: Fleet, script: str, **more: Any) -> None:
    value = {
        "schema": 1,
        "health_command": ["/bin/sh", "-c", script],
        "probation_s": 60,
        "health_interval_s": 10,
        **more,
    }
    (fleet.at / "device.json").write_text(json.dumps(value))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A device that serves release 1 and is offered release 2."""
    fleet = Fleet(tmp_path)
    fleet.add("second")
    fleet.device().update()
    fleet.add("first")
    return fleet


def test_a_healthy_payload_is_kept_after_its_window(fleet: Fleet, tmp_path: Path) -> None:
    """The program is asked once before and at every interval, and told which payload is served."""
    settings(fleet, f'echo "$LRCOMPRESS_SEQ $LRCOMPRESS_SHA256 $LRCOMPRESS_STATE" >> {tmp_path}/asked')
    slept: list[float] = []
    d = fleet.device(sleep=slept.append).update()
    assert (d["state"], d["to_seq"]) == ("updated", 2) and slept == [10.0] * 6
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert [a[0] for a in asked] == ["1"] + ["2"] * 6
    assert asked[1][1] == d["serving"]["sha256"] and asked[0][2] == str(fleet.at)
    assert fleet.device().status()["probation"] is None


def test_an_application_serves_the_payload_while_it_is_on_probation(fleet: Fleet) -> None:
    settings(fleet, "exit 0")
    before, during = answers(fleet.device()), []
    device = fleet.device(sleep=lambda s: during.append((device.status()["serving"]["seq"], fleet.device().status()["serving"]["seq"])))  # fmt: skip
    answers(device)
    assert device.update()["state"] == "updated"
    assert during == [(2, 2)] * 6
    assert np.abs(answers(device) - before).max() > 0.05


def test_an_ill_payload_is_refused_for_good_and_the_one_before_serves(fleet: Fleet) -> None:
    settings(fleet, 'test "$LRCOMPRESS_SEQ" = 1 || { echo the camera is blind >&2; exit 3; }')
    device = fleet.device()
    before = answers(device)
    d = device.update()
    assert (d["state"], d["error"]["code"], d["serving"]["seq"]) == ("rejected", 6, 1)
    assert "3: the camera is blind" in d["reason"]
    np.testing.assert_array_equal(answers(device), before)
    assert [r["seq"] for r in fleet.device().status()["refused"]] == [2]
    assert fleet.device().update()["state"] == "rejected"
    assert len(list((fleet.at / "store").iterdir())) == 1


@pytest.mark.parametrize(
    ("script", "word"),
    [("exit 1", "already before"), ('test "$LRCOMPRESS_SEQ" = 1 || kill -9 $$', "signal 9"), ('test "$LRCOMPRESS_SEQ" = 1 || sleep 30', "no answer")],
)  # fmt: skip
def test_a_program_that_says_nothing_about_the_payload_is_no_verdict(fleet: Fleet, script: str, word: str) -> None:
    settings(fleet, script, health_timeout_s=0.5)
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"], d["serving"]["seq"]) == ("failed", 10, 1) and word in d["reason"], d
    status = fleet.device().status()
    assert (status["refused"], status["pending"]["trials"], status["serving"]["seq"]) == ([], 1, 1)
    settings(fleet, "exit 0")
    assert fleet.device().update()["to_seq"] == 2


def test_a_program_that_does_not_exist_is_told(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "health_command": ["/nowhere/check"]}))
    d = fleet.device().update()
    assert (d["state"], d["serving"]["seq"]) == ("failed", 1) and "/nowhere/check" in d["reason"]


def test_nobody_serves_what_is_on_probation_after_a_reboot_or_after_its_window(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload that makes the machine reboot is not served by the boot after."""

    class Cut(BaseException):
        pass

    def cut(seconds: float) -> None:
        raise Cut

    settings(fleet, "exit 0")
    with pytest.raises(Cut):
        fleet.device(sleep=cut).update()
    assert fleet.device().status()["serving"]["seq"] == 2  # the same boot, within the window
    later = datetime.fromisoformat(fleet.device().status()["probation"]["until"]) + timedelta(seconds=1)
    assert fleet.device(clock=lambda: later).status()["serving"]["seq"] == 1
    for module in (device_module, updater_module):
        monkeypatch.setattr(module, "boot_id", lambda: "another")
    assert fleet.device().status()["serving"]["seq"] == 1
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 2)
    assert [e["state"] for e in fleet.device().history()].count("trial") == 3


def test_the_operators_program_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(NoVerdict):
        check_health(["/bin/sh", "-c", f"sleep 300 & echo $! > {pid}; wait"], 0.5, {})
    child_pid = int(pid.read_text())
    for _ in range(50):
        try:
            os.kill(child_pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child_pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("it still runs")


def test_a_device_that_only_updates_never_loads_the_model(fleet: Fleet) -> None:
    device = Device(fleet.at, **fleet.options)
    assert device.update()["state"] == "updated"
    assert device._session is None
    answers(device)
    assert device._session is not None
