"""`ssh://USER@HOST[:PORT][?python=PATH]`: a machine that ssh reaches, with its own Python and ONNX Runtime.

One connection: the files go through stdin, the answers come back through stdout, nothing stays there. The command that
the machine's shell sees is a constant but for the path of its Python, which has no character that a shell reads. Names
are checked before ssh is started; ssh asks nothing (BatchMode), so keys and the host's key have to be known to it.

Times are those of that machine, unlike those of an emulated one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CommandError, HostError, ParityError
from ...manifest import DATA, GRAPH
from ...progress import Progress
from .. import remote_runner
from ..jobs import RESULT, read_answers, write_job
from . import WHERE, Answers, Job
from .cpu import one_sample

#: Taken where the machine does not say what it is; it does in its answer.
CPU_CLASS = "cpu"
_HERE = Path(__file__).parent.parent
_CONNECT_S, _TIMEOUT_S = 15, 1800
_OPTIONS = (
    "BatchMode=yes", f"ConnectTimeout={_CONNECT_S}", "ServerAliveInterval=15", "ServerAliveCountMax=4",
    "ClearAllForwardings=yes", "ForwardAgent=no", "PermitLocalCommand=no", "RequestTTY=no", "RemoteCommand=none",
)  # fmt: skip
#: Reads a program of a told length from stdin and runs it; what follows on stdin is the program's.
_BOOT = "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
_TARGET = re.compile(
    r"//(?:(?P<user>[A-Za-z_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?(?:\?python=(?P<python>[A-Za-z0-9_./+-]{1,200}))?"
)
#: What ssh says, and what to do about it. It has one exit status for everything.
_REMEDIES = (
    ("host key verification failed", "connect once by hand and check the key: ssh HOST"),
    ("identification has changed", "the host is another one than it was: check it, then ssh-keygen -R HOST"),
    ("permission denied", "give ssh a key that the host knows: ssh-copy-id HOST"),
    ("connection refused", "is sshd running there, on this port?"),
    ("timed out", "is the host on, and reachable from here?"),
    ("could not resolve", "check the host's name"),
    ("no route to host", "is the host on, and reachable from here?"),
)


@dataclass(frozen=True)
class Place:
    """Where to connect to, each part free of anything that ssh or a shell would read as more than a name."""

    user: str | None
    host: str
    port: int | None
    python: str = "python3"

    @classmethod
    def of(cls, detail: str) -> Place:
        """Read what stands behind `ssh:`; `CommandError` for anything else than names and numbers."""
        target = f"ssh:{detail}"
        found = _TARGET.fullmatch(detail)
        if found is None or (found["port"] is not None and not 0 < int(found["port"]) < 65536):
            raise CommandError(
                WHERE, "ssh://USER@HOST[:PORT][?python=PATH]", target, "for example ssh://pi@board.local"
            )
        python = found["python"] or "python3"
        if python.startswith("-"):
            raise CommandError(WHERE, "the path of a Python", python, "for example ?python=/opt/venv/bin/python")
        port = int(found["port"]) if found["port"] else None
        return cls(found["user"], found["host"].strip("[]"), port, python)

    def command(self) -> list[str]:
        """Return the words that start ssh. The host stands behind `--`: it is no option, whatever it looks like."""
        words = ["ssh", "-T", "-a", "-x"]
        for option in _OPTIONS:
            words += ["-o", option]
        if self.port is not None:
            words += ["-p", str(self.port)]
        if self.user is not None:
            words += ["-l", self.user]
        return [*words, "--", self.host, f'{self.python} -c "{_BOOT}"']

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"ssh://{user}{self.host}{f':{self.port}' if self.port else ''}"


def check(detail: str) -> None:
    """Refuse what is no host, before ssh could see it."""
    Place.of(detail)


def run(detail: str, job: Job, progress: Progress) -> Answers:
    """Answer all cases over one connection, and time single samples there."""
    place = Place.of(detail)
    if shutil.which("ssh") is None:
        raise HostError(WHERE, "an ssh client on this machine", "none", "install openssh-client")
    with tempfile.TemporaryDirectory() as scratch, progress.task(f"validate on {place}", total=1) as advance:
        folder = Path(scratch)
        sent = _pack(folder, job)
        told = _ask(place, sent, folder / "answer", folder / RESULT)
        _check_told(place, told, job)
        outputs = read_answers(folder / RESULT, job, where=place)
        advance(1, str(told.get("machine")))
    machine = str(told.get("machine")).lower()
    ms = [float(v) for v in told.get("one_ms", ())] if isinstance(told.get("one_ms"), list) else []
    p50, p95 = (float(np.percentile(ms, 50)), float(np.percentile(ms, 95))) if ms else (None, None)
    return Answers(outputs, p50, p95, "arm64" if machine in ("aarch64", "arm64") else "cpu")


def _pack(folder: Path, job: Job) -> Path:
    """Write what is sent: the length of the program, the program, and a tar of the job's files."""
    files = folder / "files"
    files.mkdir()
    names = write_job(files, job, model=GRAPH, at=".")
    np.savez(files / "one.npz", **{f"tensor/{k}": v for k, v in one_sample(job).items()})  # type: ignore[arg-type]
    task = json.loads((files / "job.json").read_text())
    (files / "job.json").write_text(json.dumps({**task, "one": "one.npz"}))
    limits = {"min": job.manifest.raw["ort"]["min"], "max": job.manifest.raw["ort"]["max"]}
    (files / "limits.json").write_text(json.dumps(limits))
    program = Path(remote_runner.__file__).read_bytes()
    sent = folder / "sent"
    with sent.open("wb") as f:
        f.write(f"{len(program)}\n".encode() + program)
        with tarfile.open(fileobj=f, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            for path in [*(files / n for n in (*names, "one.npz", "limits.json")), _HERE / "golden_runner.py"]:
                archive.add(path, path.name, filter=_anonymous)
            for name in (GRAPH, DATA):
                archive.add(job.exported / name, name, filter=_anonymous)
    return sent


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _ask(place: Place, sent: Path, answer: Path, result: Path) -> dict[str, Any]:
    """Run ssh; leave the answers' bytes in `result` and return what the machine told of itself."""
    with sent.open("rb") as stdin, answer.open("wb") as stdout:
        try:
            done = subprocess.run(
                place.command(), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=_TIMEOUT_S, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired as e:
            raise HostError(place, f"answers within {_TIMEOUT_S} s", "none", "validate a smaller model there") from e
    with answer.open("rb") as f:
        for line in f:  # a shell there may greet before the program speaks
            if line == remote_runner.MARK:
                break
        else:
            raise _silent(place, done)
        try:
            told = json.loads(f.readline())
            if not isinstance(told, dict):
                raise ValueError("no object")
        except ValueError as e:
            raise HostError(place, "what the program there tells, as JSON", str(e), "run it again") from e
        with result.open("wb") as out:
            shutil.copyfileobj(f, out)
    return told


def _silent(place: Place, done: subprocess.CompletedProcess[bytes]) -> HostError:
    """Return the error of a connection that brought no answer."""
    said = [text for text in done.stderr.decode(errors="replace").splitlines() if text.strip()]
    last = said[-1].strip() if said else f"exit {done.returncode}"
    if done.returncode == 127 or "not found" in last:
        return HostError(
            place, f"a Python called {place.python} there", last, "name it: ssh://…?python=/path/to/python"
        )
    everything = " ".join(said).lower()
    remedy = next((r for part, r in _REMEDIES if part in everything), "try it by hand: ssh HOST")
    expected = "a host that ssh reaches without asking" if done.returncode == 255 else "a program that answers there"
    return HostError(place, expected, last, remedy.replace("HOST", str(place.host)))


def _check_told(place: Place, told: dict[str, Any], job: Job) -> None:
    failed, what = told.get("failed"), str(told.get("what", ""))
    ort = job.manifest.raw["ort"]
    wanted = f"ONNX Runtime {ort['min']} or newer" + (f", at most {ort['max']}" if ort["max"] else "")
    if failed == "missing":
        machine = str(told.get("machine"))
        remedy = f"{place.python} -m pip install onnxruntime, there"
        if "64" not in machine:
            remedy = "there are no wheels for 32-bit systems: install a 64-bit one"
        raise HostError(place, f"numpy and {wanted} for Python {told.get('python')} on {machine}", what, remedy)
    if failed == "version":
        raise HostError(place, wanted, str(told.get("onnxruntime")), "update onnxruntime there")
    if failed == "disk":
        raise HostError(place, "room for the model in its temporary folder", what, "free some space there")
    if failed is not None:
        raise ParityError(place, "a model that loads and answers", what)
