"""Files are whole or absent, and never somebody else's."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompress.errors import CommandError, HostError
from lrcompress.files import (
    canonical_json,
    contained,
    finite,
    sha256_bytes,
    sha256_file,
    sha256_tree,
    staged_folder,
    write_atomic,
    write_json,
)

MAKER, MARKER = "lrcompress test", "lrcompress.json"


def make(dest: Path, text: str = "x") -> None:
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        (stage / "data").write_text(text)
        write_json(stage / MARKER, {"made_by": MAKER})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_staged_folder_appears_at_once_and_replaces_its_own(tmp_path):
    dest = tmp_path / "out"
    make(dest, "one")
    make(dest, "two")
    assert (dest / "data").read_text() == "two" and names(tmp_path) == ["out"]


def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path):
    dest = tmp_path / "out"
    make(dest, "one")
    with pytest.raises(RuntimeError, match="stop"), staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        (stage / "data").write_text("half")
        raise RuntimeError("stop")
    assert (dest / "data").read_text() == "one" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("what", ["file", "folder", "other maker", "damaged marker"])
def test_what_is_not_ours_is_never_touched(tmp_path, what):
    dest = tmp_path / "out"
    if what == "file":
        dest.write_text("mine")
    else:
        dest.mkdir()
        (dest / "thesis.txt").write_text("mine")
        if what == "other maker":
            (dest / MARKER).write_text(json.dumps({"made_by": "lrcompress export"}))
        if what == "damaged marker":
            (dest / MARKER).write_text("{")
    before = sha256_tree(tmp_path)
    with pytest.raises(CommandError, match="made") as e:
        make(dest)
    assert e.value.exit_code == 2 and sha256_tree(tmp_path) == before


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert names(tmp_path / "out") == ["data", MARKER]


@pytest.mark.parametrize("after", ["stage", "old"])
def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path, after):
    """Kill a real process before and between the two renames; the next run repairs and finishes."""
    dest = tmp_path / "out"
    make(dest, "one")
    code = f"""
import os, signal, pathlib
from lrcompress import files
real = pathlib.Path.rename
def rename(self, target):
    if {after!r} == "stage" and self.name == "out": os.kill(os.getpid(), signal.SIGKILL)
    found = real(self, target)
    if {after!r} == "old" and self.name == "out": os.kill(os.getpid(), signal.SIGKILL)
    return found
pathlib.Path.rename = rename
with files.staged_folder(pathlib.Path({str(dest)!r}), maker={MAKER!r}, marker={MARKER!r}) as stage:
    (stage / "data").write_text("two"); files.write_json(stage / {MARKER!r}, {{"made_by": {MAKER!r}}})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    make(dest, "three")
    assert (dest / "data").read_text() == "three" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_forbidden_disk_is_the_machines_fault(tmp_path, number):
    with pytest.raises(HostError) as e, staged_folder(tmp_path / "out", maker=MAKER, marker=MARKER):
        raise OSError(number, os.strerror(number))
    assert e.value.exit_code == 10 and names(tmp_path) == []


def test_atomic_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one" and sha256_file(tmp_path / "a") == sha256_bytes(b"one")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError):
        write_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one" and names(tmp_path) == ["a"]


@given(st.text(max_size=40))
def test_contained_paths_never_leave(name):
    root = Path("/tmp/root-of-contained")
    try:
        path = contained(root, name)
    except ValueError:
        return
    assert path != root.resolve() and path.is_relative_to(root.resolve())


@pytest.mark.parametrize("name", ["..", "a/../..", "/etc/passwd", "", ".", "a\0b", "../root2", "C:/x"])
def test_paths_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"path|leads"):
        contained(tmp_path, name)


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("/etc")
    with pytest.raises(ValueError, match="leads out"):
        contained(tmp_path / "in", "link/passwd")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_canonical_json_has_one_form(value):
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data
    assert canonical_json(dict(reversed(list(value.items())))) == data


def test_json_has_no_nan():
    assert finite({"a": [math.nan, 1.0, (math.inf,)], 3: -math.inf}) == {"a": [None, 1.0, [None]], "3": None}
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(math.nan)
