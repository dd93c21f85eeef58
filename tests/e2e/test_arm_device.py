"""The whole agent on emulated 64-bit ARM, beside one on this machine: the same commands, answers, states, bytes on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from lrcompress import publish
from lrcompress.cli.main import run as command
from lrcompress.errors import HostError
from lrcompress.golden import compare, load_golden
from lrcompress.manifest import Manifest
from lrcompress.validate.arm_root import arm_root
from tests.faults.test_network import Faulty, handler, serving
from tests.support.fleet import PASSPHRASE, Fleet, made, payload_bytes, release

pytestmark = [pytest.mark.arm, pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
#: What differs between two devices that do the same: names, places, times, and what is free on a disk.
OWN = {"ms", "seconds", "free_bytes", "device", "identity", "output", "warnings"}

FOLLOWER = """
import json, sys, time
import numpy as np
from lrcompress.edge import EdgeSession
x = np.load(sys.argv[2])["x"]
with EdgeSession(sys.argv[1], poll_s=0.05) as session:
    last = None
    while True:
        if session.serving != last:
            last = session.serving
            y = session.run({"x": x})["output"]
            print(json.dumps([last["seq"], y.tolist()]), flush=True)
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def root() -> Path:
    """A Python for ARM with all that `pip install lrcompress` brings."""
    needs = [Requirement(r) for r in metadata.requires("lrcompress") or ()]
    base = [f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}" for r in needs if r.marker is None]
    assert {"tuf", "securesystemslib[crypto]", "onnxruntime", "click"} <= set(base)
    try:
        return arm_root(packages=sorted(base))
    except HostError as e:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(e))


class Arm:
    """Commands on the emulated machine; files and network are the host's."""

    def __init__(self, root: Path, folder: Path, cpu: str = "cortex-a53") -> None:
        self.python, self.at, self.folder = str(root / "bin/arm-python"), folder / "arm", folder
        self.environment = {**os.environ, "QEMU_CPU": cpu, "ARM_PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, *args: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [self.python, *args], stdout=pipe, stderr=pipe, text=True, cwd=self.folder, env=self.environment
        )

    def device(self, verb: str, *args: str) -> tuple[int, dict[str, Any]]:
        process = self.start("-m", "lrcompress", "device", verb, str(self.at), *args, "--json", "--quiet")
        out, err = process.communicate()
        assert process.returncode >= 0 and out, err
        return process.returncode, json.loads(out)


class Here:
    """The same commands in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.at, self._capsys = folder / "x86", capsys

    def device(self, verb: str, *args: str) -> tuple[int, dict[str, Any]]:
        self._capsys.readouterr()
        code = command(["device", verb, str(self.at), *args, "--json", "--quiet"])
        return code, json.loads(self._capsys.readouterr().out)


def told(found: tuple[int, dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Return exit code and JSON of a command, without what is each device's own."""
    return found[0], {k: v for k, v in found[1].items() if k not in OWN}


def kept(folder: Path) -> dict[str, bytes]:
    """Return the files of a device that must be the same on both: state, metadata, payloads, what C++ loads."""
    wanted = ("state.", "metadata/", "store/", "dl/", "emit/", "factory/", "root.json")
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {n: p.read_bytes() for n, p in sorted(names.items()) if n.startswith(wanted)}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Fleet, str, list[int]]]:
    """A repository over HTTP; while the list holds a number above 0, payloads are cut after so many bytes."""
    fleet, cut = Fleet(tmp_path), [0]

    def fault(to: Faulty, path: str, n: int) -> bool:
        if cut[0] and path.startswith("/targets/") and "Range" not in to.headers:
            to.whole(cut=cut[0])
            return True
        return False

    with serving(handler(fault, fleet.repo)) as url:
        yield fleet, url, cut


def test_a_device_on_arm_is_what_one_is_here(
    root: Path, server: tuple[Fleet, str, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet, url, cut = server
    arm, here = Arm(root, tmp_path), Here(tmp_path, capsys)
    golden = load_golden(made() / "exported" / "golden.npz")
    tolerance = Manifest.load(made() / "exported").tolerances["arm64"]
    np.savez(tmp_path / "x.npz", **golden.inputs)
    steps: list[str] = []

    def both(verb: str, *args: str) -> tuple[int, dict[str, Any]]:
        there = told(arm.device(verb, *args))
        assert there == told(here.device(verb, *args)), verb
        steps.append(f"{verb}: {there[1].get('state', '')} exit {there[0]}".replace(":  ", ": "))
        return there

    def same() -> None:
        assert kept(arm.at) == kept(here.at)

    def answer() -> np.ndarray:
        """Return what is answered there, within the tolerance of what is answered here."""
        found = {}
        for name, device in (("arm", arm), ("x86", here)):
            code, _ = device.device(
                "infer", "--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / f"{name}.npz")
            )
            assert code == 0
            found[name] = np.load(tmp_path / f"{name}.npz")["output"]
        np.testing.assert_allclose(found["arm"], found["x86"], rtol=0, atol=1e-5)
        return found["arm"]

    options = ("--exported", str(made() / "exported"), "--root", str(fleet.root), "--url", url)
    assert both("init", *options)[0] == 0
    for device in (arm, here):
        (device.at / "device.json").write_text(json.dumps({"schema": 1, "emit": "onnx-adapter"}))
    served = [answer()]
    assert compare(golden.compressed, {"output": served[0]}, tolerance).passed
    assert both("update")[1]["state"] == "up_to_date"

    follower = arm.start("-c", FOLLOWER, str(arm.at), str(tmp_path / "x.npz"))
    assert follower.stdout is not None
    answered = {0: json.loads(follower.stdout.readline())}
    for seq, (name, encoding) in enumerate((("first", "f32"), ("second", "int8"), ("loha", "f16")), 1):
        cut[0] = 400 if seq == 2 else 0  # a link that breaks: the rest is asked for by range
        fleet.add(name, encoding=encoding)
        code, found = both("update")
        assert (code, found["state"], found["to_seq"]) == (0, "updated", seq)
        same()
        served.append(answer())
        answered[seq] = json.loads(follower.stdout.readline())
        assert answered[seq][0] == seq
        np.testing.assert_allclose(np.array(answered[seq][1], np.float32), served[-1], rtol=0, atol=1e-5)
        for device in (arm, here):  # how far each is from the golden outputs is its own
            code, found = device.device("validate")
            assert (
                code == 0 and found["base"]["passed"] and found["payload"]["passed"] and found["serving"]["seq"] == seq
            )
    follower.kill()
    follower.communicate()

    bad = payload_bytes("first", golden={"output": np.ones((8, 5), np.float32)})
    release(fleet, bad, seq=4)
    code, found = both("update")
    assert (code, found["state"], found["serving"]["seq"]) == (6, "rejected", 3)
    torn = payload_bytes("first")[:-4]
    release(fleet, torn, seq=5)
    assert both("update")[0] == 6
    assert len(both("status")[1]["refused"]) == 2
    same()
    np.testing.assert_array_equal(answer(), served[3])

    assert both("rollback")[1]["to_seq"] == 2
    same()
    np.testing.assert_array_equal(answer(), served[2])
    publish.rollback(fleet.repo, 1, passphrase=PASSPHRASE)
    assert both("update")[1]["serving"]["seq"] == 6
    np.testing.assert_array_equal(answer(), served[1])
    same()
    print("\n".join(steps))


def test_an_agent_on_arm_survives_being_killed(
    root: Path, server: tuple[Fleet, str, list[int]], tmp_path: Path
) -> None:
    """SIGKILL while it updates, wherever that falls; then the agent that polls, ended by systemd's SIGTERM."""
    fleet, url, _ = server
    arm = Arm(root, tmp_path, "cortex-a76")
    options = ("--exported", str(made() / "exported"), "--root", str(fleet.root), "--url", url)
    assert arm.device("init", *options)[0] == 0
    fleet.add("first")
    started = time.perf_counter()
    assert arm.device("update")[1]["to_seq"] == 1
    whole_s = time.perf_counter() - started
    fleet.add("second")
    for share in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        process = arm.start("-m", "lrcompress", "device", "update", str(arm.at))
        time.sleep(share * whole_s)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = arm.device("status")[1]
        assert found["state_readable"] and found["serving"]["seq"] in (1, 2)
    fleet.add("loha")
    (arm.at / "device.json").write_text(json.dumps({"schema": 1, "poll_s": 10}))
    agent = arm.start("-m", "lrcompress", "device", "agent", str(arm.at), "--json")
    until = time.monotonic() + 20 * whole_s + 120
    while arm.device("status")[1]["serving"]["seq"] != 3:
        assert time.monotonic() < until and agent.poll() is None
    agent.send_signal(signal.SIGTERM)
    out, err = agent.communicate()
    assert agent.returncode == 0 and json.loads(out)["polls"] >= 1, err
    assert not list((arm.at / "dl").iterdir()) and len(list((arm.at / "store").iterdir())) == 2
