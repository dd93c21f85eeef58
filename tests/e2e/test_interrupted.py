"""A full disk and Ctrl-C: one line, the right exit code, and nothing half-written at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lrcompress.files import sha256_tree
from tests.support.workshop import ROOT, here, ready, tree

__all__ = ["here", "ready"]


FULL_DISK = """
    import resource, shutil, subprocess, sys
    from pathlib import Path
    from lrcompress.cli.main import run
    kind, disk = sys.argv[1], Path("disk")
    commands = [
        (["factorize", "model.pt", "--rank", "4"], "disk/a/compressed", (4, 8)),
        (["recover", "ok/compressed", "--data", "train.npz", "--rank", "4", "--steps", "1"], "disk/adapters/first", (4, 8)),
        (["export", "ok/compressed"], "disk/b/exported", (4, 12, 24, 36)),
    ]
    disk.mkdir()
    for argv, output, sizes in commands:
        for size in sizes:
            if kind == "tmpfs":
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", "disk"], check=True)
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size << 8, resource.RLIM_INFINITY))
            code = run([*argv, "-o", output, "--quiet", "--json"])
            if kind == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            for store in list(disk.rglob(".compressed.work-*")):  # what is whole stays, to continue with
                names = [p.name for p in store.iterdir()]
                assert any(n.endswith(".safetensors") for n in names) and not any(n.endswith(".tmp") for n in names), names
                shutil.rmtree(store)
                store.parent.rmdir()
            print(argv[0], size, code, [str(p) for p in disk.rglob("*")], flush=True)
            if kind == "tmpfs":
                subprocess.run(["umount", "disk"], check=True)
"""


@pytest.mark.parametrize("kind", [pytest.param("tmpfs", marks=pytest.mark.slow), "limit"])
def test_a_full_disk_leaves_nothing(here: Path, kind: str) -> None:
    """A disk of a few pages, or a limit on the size of a file, at several sizes, so that different writes fail."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"] if kind == "tmpfs" else []
    if inside:
        try:
            subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(here)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this machine lends no small disk (unshare)")
    script = [*inside, sys.executable, "-c", textwrap.dedent(FULL_DISK), kind]
    done = subprocess.run(
        script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=500
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16 and done.stderr.count("\n") == 8 and "Traceback" not in done.stderr, done.stderr
    for answer, summary, line in zip(lines[::2], lines[1::2], done.stderr.splitlines(), strict=True):
        error = json.loads(answer)["error"]
        assert error["code"] == 10 and error["kind"] == "environment" and line.startswith("error: ")
        assert error["where"].startswith(str(here / "disk")) and error["expected"] and error["remedy"], error
        assert ("No space left" if kind == "tmpfs" else "File too large") in error["got"], error
        assert summary.endswith(" 10 []"), summary


# interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["factorize", "recover"])
def test_ctrl_c_leaves_nothing_half_written(here: Path, command: str) -> None:
    """A signal in the middle of the work: exit 130, one line, one object, no file; what was there before stays."""
    shutil.copytree("ok", "state/ok")
    if command == "factorize":
        torch.save({f"fc{i}.weight": torch.randn(1500, 1500) for i in range(30)}, "big.pt")
        argv = ["factorize", "big.pt", "--rank", "400", "-o", "state/out"]
    else:
        argv = ["recover", "ok/compressed", "--data", "train.npz", "--steps", "1000000", "-o", "state/out"]
    before = sha256_tree(Path("state"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    script = [sys.executable, "-m", "lrcompress", *argv, "--threads", "1", "--json"]
    # A shell that puts a job in the background lets it ignore the signal, and its children inherit that.
    process = subprocess.Popen(
        script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    )
    try:
        until = time.monotonic() + 60
        # The maths starts well after the imports, which a signal would merely end.
        while time.monotonic() < until and process.poll() is None and not working(process.pid):
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, (process.returncode, err)
    assert "Traceback" not in err and err.strip().splitlines()[-1].startswith("error: interrupted"), err
    assert json.loads(out)["error"]["code"] == 130 and out.count("\n") == 1
    for store in Path("state").glob(".out.work-*"):  # what is whole stays, to continue with
        names = [p.name for p in store.iterdir()]
        assert any(n.endswith(".safetensors") for n in names), names
        assert not any(n.endswith(".tmp") for n in names), names
        shutil.rmtree(store)
    assert (
        sha256_tree(Path("state")) == before and tree(Path("state"))[0] == "ok" and not list(Path("state").glob(".*"))
    )


INSIDE_EXEC = """
    from lrcompress.cli.main import main, root
    def interrupted(*args, **kwargs):
        exec("raise KeyboardInterrupt")
    root.main = interrupted
    main(["factorize", "--json"])
"""


def test_an_interrupt_inside_an_exec_of_text_exits_130_too(here: Path) -> None:
    """CPython notes such an interrupt as unhandled and would end `python -m` by the signal."""
    Path("inside.py").write_text(textwrap.dedent(INSIDE_EXEC))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{here}"}
    done = subprocess.run([sys.executable, "-m", "inside"], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 130 and json.loads(done.stdout)["error"]["code"] == 130, (done.returncode, done.stderr)


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def working(pid: int) -> bool:
    """Tell whether torch is loaded and a second of processor time has gone into the process since."""
    try:
        mapped = "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    except (OSError, ValueError):
        return False
    return mapped and ticks / os.sysconf("SC_CLK_TCK") > 4.0
