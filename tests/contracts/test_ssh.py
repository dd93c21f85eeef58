"""`--on ssh://…`: what ssh is started with, what is refused before, and what is said when it fails.

A program called `ssh` on the PATH records its arguments and plays the machine: it runs the remote command in a shell.
With an sshd (on the PATH, in /usr/sbin, or named by LRCOMPRESS_SSHD) the same goes through the real one on loopback.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lrcompress import payload as payloads
from lrcompress.cli.main import run as command
from lrcompress.errors import CommandError, HostError, ParityError
from lrcompress.golden import project
from lrcompress.manifest import Manifest
from lrcompress.validate import remote_runner, validate
from lrcompress.validate.targets import check, ssh
from tests.support.graphs import adapter, mlp, run, write_exported


def inputs(n: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, slots = mlp("matmul")
    folder = write_exported(tmp_path_factory.mktemp("ssh") / "exported", model, slots, inputs())
    tensors = adapter(model, slots, rank=3)
    golden = project({"output": run(model, x=inputs(), **tensors)})
    (folder / "payloads").mkdir()
    data = payloads.build(tensors, manifest=Manifest.load(folder), kind="lora", encoding="f32", golden=golden)
    (folder / "payloads" / "first.safetensors").write_bytes(data)
    return folder


class Fake:
    """The program `ssh`, and the Python of the machine behind it."""

    def __init__(self, folder: Path) -> None:
        self.record, self.bin = folder / "argv", folder / "remote-bin"
        self.bin.mkdir()
        # Not a link: through one, a virtual environment is not found.
        (self.bin / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (self.bin / "python3").chmod(0o755)
        self.program = folder / "bin" / "ssh"
        self.program.parent.mkdir()
        self.plays('PATH={bin}:/usr/bin:/bin exec sh -c "$last"')

    def plays(self, script: str) -> None:
        """Say what the machine does; `$last` is the remote command."""
        script = script.replace("{bin}", str(self.bin))
        record = f'for last in "$@"; do printf \'%s\\0\' "$last" >> {self.record}; done'
        self.program.write_text(f"#!/bin/sh\n{record}\n{script}\n")
        self.program.chmod(0o755)

    def python(self, code: str) -> None:
        """Give the machine a Python that runs `code` first."""
        (self.bin / "python3").unlink()
        (self.bin / "first.py").write_text(code)
        argument = f"exec(open({str(self.bin / 'first.py')!r}).read());import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"
        (self.bin / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{argument}"\n')
        (self.bin / "python3").chmod(0o755)

    @property
    def argv(self) -> list[str]:
        return self.record.read_text().split("\0")[:-1] if self.record.exists() else []


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path)
    monkeypatch.setenv("PATH", f"{made.program.parent}:{os.environ['PATH']}")
    return made


def test_it_answers_with_payloads_and_its_own_times_and_nothing_stays(
    fake: Fake, exported: Path, tmp_path: Path
) -> None:
    """One connection, started with exactly these words; what a shell there greets with does no harm."""
    there = tmp_path / "there"
    there.mkdir()
    fake.plays(f'echo "Welcome to the board"; TMPDIR={there} PATH={{bin}}:/usr/bin:/bin exec sh -c "$last"')
    rows = {t["against"]: t for t in validate(exported, on=("ssh://pi@board.local:2222",)).data["targets"]}
    assert set(rows) == {"compressed", "payload first.safetensors"} and all(t["passed"] for t in rows.values())
    assert (
        rows["compressed"]["max_abs_diff"] < 1e-6 and 0 < rows["compressed"]["p50_ms"] <= rows["compressed"]["p95_ms"]
    )
    assert not list(there.glob("lrcompress*"))
    boot = 'python3 -c "import sys;exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))"'
    options = ["BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4", "ClearAllForwardings=yes",
               "ForwardAgent=no", "PermitLocalCommand=no", "RequestTTY=no", "RemoteCommand=none"]  # fmt: skip
    pairs = [word for option in options for word in ("-o", option)]
    assert fake.argv == ["-T", "-a", "-x", *pairs, "-p", "2222", "-l", "pi", "--", "board.local", boot]


HOSTILE = [
    "//-oProxyCommand=touch pwned", "//-oProxyCommand=id", "//host;rm -rf x", "//host rm", "//$(id)", "//`id`", "//host|id", "//host&id",
    "//host\nid", "//a@b@c", "//-l@host", "//u;id@host", "//u v@host", "//host:0", "//host:65536", "//host:-1", "//host:22x", "//host:22:23", "",
    "host", "//", "//host/path", "//host?python=python;id", "//host?python=$(id)", "//host?python=a b", "//host?python=-c", "//host?x=y",
    "//[::1", "//[::1;id]", "//host\0", "//hôst", "//.host", "//host-", "//" + "a" * 300, "//user:secret@host",
]  # fmt: skip


@pytest.mark.parametrize("detail", HOSTILE)
def test_what_is_no_host_never_reaches_ssh(
    fake: Fake, exported: Path, detail: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError, match=r"ssh://|path of a Python"):
        check(f"ssh:{detail}")
    with pytest.raises(CommandError):
        validate(exported, on=("cpu", f"ssh:{detail}"))
    assert fake.argv == [] and not Path("pwned").exists()
    assert command(["validate", str(exported), "--on", f"ssh:{detail}", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == 2 and fake.argv == []


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        ("//host", ["--", "host"]),
        ("//host/", ["--", "host"]),
        ("//10.0.0.7:22", ["-p", "22", "--", "10.0.0.7"]),
        ("//me@[fe80::1]:2200", ["-p", "2200", "-l", "me", "--", "fe80::1"]),
        ("//my_user.x-1@a-b.c", ["-l", "my_user.x-1", "--", "a-b.c"]),
    ],
)
def test_names_that_are_names(detail: str, words: list[str]) -> None:
    assert ssh.Place.of(detail).command()[-len(words) - 1 : -1] == words


def test_a_python_elsewhere_is_named() -> None:
    assert ssh.Place.of("//board?python=/opt/venv/bin/python").command()[-1].startswith("/opt/venv/bin/python -c ")


FAILURES = {
    "refused": ("echo 'ssh: connect to host board port 22: Connection refused' >&2; exit 255", "Connection refused", "is sshd running"),
    "key": ("echo 'Host key verification failed.' >&2; exit 255", "Host key verification failed", "connect once by hand"),
    "denied": ("echo 'pi@board: Permission denied (publickey).' >&2; exit 255", "Permission denied", "ssh-copy-id board"),
    "late": ("echo 'ssh: connect to host board port 22: Connection timed out' >&2; exit 255", "timed out", "is the host on"),
    "unknown": ("echo 'ssh: Could not resolve hostname board' >&2; exit 255", "Could not resolve", "the host's name"),
    "no python": ("PATH=/nowhere; /bin/sh -c \"$last\"", "not found", "?python="),
    "silent": ("exit 3", "exit 3", "by hand: ssh board"),
    "greeting": ("echo welcome; cat >/dev/null", "exit 0", "by hand"),
    "rubbish": (f"printf '{remote_runner.MARK.decode().strip()}\\nnot json\\n'; cat >/dev/null", "Expecting value", "run it again"),
    "garbage": (f"printf '{remote_runner.MARK.decode().strip()}\\n{{}}\\nPK garbage'; cat >/dev/null", "", "run it again"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_connection_that_fails_says_why_and_what_to_do(fake: Fake, exported: Path, case: str) -> None:
    script, got, remedy = FAILURES[case]
    fake.plays(script)
    with pytest.raises(HostError) as e:
        validate(exported, on=("ssh://pi@board",))
    assert got in e.value.got and remedy in e.value.remedy and e.value.where == "ssh://pi@board"
    assert e.value.exit_code == 10 and "\n" not in str(e.value)


def test_a_machine_that_never_answers_is_given_up(fake: Fake, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "_TIMEOUT_S", 0.5)
    fake.plays("exec sleep 60")
    began = time.monotonic()
    with pytest.raises(HostError, match=r"answers within 0\.5 s"):
        validate(exported, on=("ssh://board",))
    assert time.monotonic() - began < 30


def test_a_machine_without_the_runtime_or_with_another_says_so(fake: Fake, exported: Path) -> None:
    fake.python("import sys; sys.modules['onnxruntime'] = None")
    with pytest.raises(HostError, match=r"numpy and ONNX Runtime 1\.22\.0 or newer for Python 3") as e:
        validate(exported, on=("ssh://board",))
    assert "pip install onnxruntime, there" in e.value.remedy
    fake.python("import onnxruntime; onnxruntime.__version__ = '1.19.2'")
    with pytest.raises(HostError, match=r"ONNX Runtime 1\.22\.0 or newer, got 1\.19\.2; update onnxruntime there"):
        validate(exported, on=("ssh://board",))
    fake.python("import sys, platform; sys.modules['numpy'] = None; platform.machine = lambda: 'armv7l'")
    with pytest.raises(HostError, match="no wheels for 32-bit systems"):
        validate(exported, on=("ssh://board",))


def test_an_arm_board_is_held_to_what_holds_on_arm(fake: Fake, tmp_path: Path) -> None:
    model, slots = mlp("matmul")
    folder = write_exported(
        tmp_path / "e", model, slots, inputs(), expected=run(model, x=inputs()) + 5e-3,
        edit=lambda m: m.update(tolerances={"cpu": 1e-4, "arm64": 1e-2}),
    )  # fmt: skip
    fake.python("import platform; platform.machine = lambda: 'aarch64'")
    assert validate(folder, on=("ssh://board",)).passed, "4e-3 off, which the tolerance of a cpu would not allow"


def test_a_model_that_does_not_load_there_is_a_miss(fake: Fake, exported: Path) -> None:
    fake.python(
        "import onnxruntime\ndef broken(*a, **k): raise RuntimeError('no such kernel')\nonnxruntime.InferenceSession = broken"
    )
    with pytest.raises(ParityError, match="no such kernel"):
        validate(exported, on=("ssh://board",))


def test_without_ssh_it_says_what_to_install(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="install openssh-client"):
        validate(exported, on=("ssh://board",))


# The real one.


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """An sshd on a loopback port, and the configuration of a client that knows it."""
    program = os.environ.get("LRCOMPRESS_SSHD") or shutil.which(
        "sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    )
    if program is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no sshd here: install openssh-server, or name one with LRCOMPRESS_SSHD")
    folder = tmp_path_factory.mktemp("sshd")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile none\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nPrintMotd no\n"
    )
    empty = Path("/run/sshd")  # where root's sshd locks its children up
    own = os.geteuid() == 0 and not empty.exists()
    if own:
        empty.mkdir()
    log = folder / "log"
    with log.open("wb") as f:
        server = subprocess.Popen(
            [program, "-D", "-e", "-f", str(folder / "sshd_config")], stdout=f, stderr=f, stdin=subprocess.DEVNULL
        )
    try:
        for _ in range(100):
            if server.poll() is not None:
                pytest.skip(f"sshd does not start here: {log.read_text().strip().splitlines()[-1:]}")
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port, folder
    finally:
        server.terminate()
        server.wait(20)
        if own:
            empty.rmdir()


@pytest.fixture
def client(sshd: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A target on loopback, and a client whose whole configuration is its own: keys and known hosts."""
    port, folder = sshd
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (tmp_path / "config").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {known}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking ask\n"
    )
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/config "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    return f"ssh://{getpass.getuser()}@127.0.0.1:{port}?python={sys.executable}", known


def test_through_a_real_sshd(client: tuple[str, Path], exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["validate", str(exported), "--on", "cpu", "--on", client[0], "--json", "--quiet"]) == 0
    rows = json.loads(capsys.readouterr().out)["targets"]
    there = [t for t in rows if t["target"] == client[0]]
    assert len(there) == 2 and all(t["passed"] for t in there) and there[0]["p50_ms"] > 0


def test_a_host_that_is_not_known_is_not_trusted(client: tuple[str, Path], exported: Path) -> None:
    client[1].write_text("")
    with pytest.raises(HostError, match=r"Host key verification failed.*connect once by hand"):
        validate(exported, on=(client[0],))


def test_a_host_that_is_another_than_it_was_is_not_trusted(
    client: tuple[str, Path], exported: Path, tmp_path: Path
) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    name = client[1].read_text().split()[0]
    client[1].write_text(f"{name} {(tmp_path / 'other.pub').read_text()}")
    with pytest.raises(HostError, match="Host key verification failed"):
        validate(exported, on=(client[0],))


def test_a_key_that_is_not_known_there_is_refused(
    client: tuple[str, Path], sshd: tuple[int, Path], exported: Path
) -> None:
    kept = (sshd[1] / "authorized").read_text()
    (sshd[1] / "authorized").write_text("")
    try:
        with pytest.raises(HostError, match=r"Permission denied.*ssh-copy-id"):
            validate(exported, on=(client[0],))
    finally:
        (sshd[1] / "authorized").write_text(kept)


def test_nobody_listens(client: tuple[str, Path], exported: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(HostError, match="Connection refused"):
        validate(exported, on=(f"ssh://127.0.0.1:{port}",))
