"""Bad input on the command line: one clear line, the right exit code, nothing executed, nothing half-written.

`tests/attacks` has the depth, `test_interrupted.py` full disks and Ctrl-C.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrcompress.cli.main import run
from lrcompress.files import sha256_tree
from tests.support.nets import small
from tests.support.workshop import ARCH, ROOT, X, Y, here, ready, tree

__all__ = ["here", "ready"]

NET = (*ARCH, "--input", "x:float32:batch,3,8,8")
FACTORIZE = ("factorize", "model.pt", "--rank", "4")


def refused(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, *words: str) -> dict[str, Any]:
    """Run `argv` with and without --json: the same one line, all four parts, and nothing changed on the disk."""
    folder = Path.cwd()
    before, digest = tree(folder), sha256_tree(folder)
    capsys.readouterr()
    assert run([*argv, "--quiet"]) == code, capsys.readouterr()
    plain = capsys.readouterr()
    assert plain.out == "" and plain.err.startswith("error: ") and plain.err.count("\n") == 1, plain
    assert run([*argv, "--quiet", "--json"]) == code
    out, err = capsys.readouterr()
    assert err == plain.err and out.count("\n") == 1
    answer = json.loads(out)
    error: dict[str, Any] = answer["error"]
    assert answer["ok"] is False and answer["schema"] == 1 and error["code"] == code
    assert all(error[part] for part in ("kind", "where", "expected", "got", "remedy")), error
    assert all(str(error[part]) in plain.err for part in ("where", "expected", "got", "remedy"))
    for word in words:
        assert word in plain.err, plain.err
    assert tree(folder) == before and sha256_tree(folder) == digest
    return error


# models ---------------------------------------------------------------------------------------------------------


class Planted:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("planted",)


def cut_checkpoint() -> None:
    data = Path("model.pt").read_bytes()
    Path("bad.pt").write_bytes(data[: len(data) // 2])


def zip_of_something() -> None:
    with zipfile.ZipFile("bad.pt", "w") as z:
        z.writestr("notes.txt", "hello")


def diverged() -> None:
    state = small().state_dict()
    state["fc1.weight"][3, 4] = torch.nan
    torch.save(state, "bad.pt")


def program_with_a_pickle() -> None:
    from torch.export import Dim, export, save

    hostile = io.BytesIO()
    torch.save(Planted(), hostile)
    save(export(small(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: Dim("n")},)), "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, hostile.getvalue() if name.endswith("sample_inputs/model.pt") else old.read(name))
    Path("whole.pt2").unlink()


MODELS: dict[str, tuple[Callable[[], object], str, list[str]]] = {
    "a truncated .pt": (cut_checkpoint, "bad.pt", ["whole torch file", "fetch it again"]),
    "an empty file": (lambda: Path("bad.pt").touch(), "bad.pt", ["empty file"]),
    "a text": (lambda: Path("bad.pt").write_text("hello\n"), "bad.pt", ["text file"]),
    "a zip that is no checkpoint": (zip_of_something, "bad.pt", ["zip with notes.txt"]),
    "a hostile .pt": (lambda: torch.save(Planted(), "bad.pt"), "bad.pt", ["mkdir", "--trust-pickle"]),
    "a hostile .bin": (lambda: torch.save({"state_dict": {"w": Planted()}}, "bad.bin"), "bad.bin", ["mkdir", "--trust-pickle"]),
    "a hostile legacy .pth": (lambda: torch.save(Planted(), "bad.pth", _use_new_zipfile_serialization=False), "bad.pth", ["mkdir", "--trust-pickle"]),
    "a plain pickle": (lambda: Path("bad.pkl").write_bytes(pickle.dumps(Planted())), "bad.pkl", ["--trust-pickle"]),
    "a hostile .pt2": (program_with_a_pickle, "bad.pt2", ["mkdir"]),
    "NaN weights": (diverged, "bad.pt", ["fc1.weight", "1 NaN", "earlier checkpoint"]),
    "a broken .safetensors": (lambda: Path("bad.safetensors").write_bytes(b"\xff" * 64), "bad.safetensors", ["a model"]),
    "whole numbers": (lambda: torch.save({"fc.weight": torch.ones(8, 8, dtype=torch.int64)}, "bad.pt"), "bad.pt", ["floating-point"]),
    "nothing there": (lambda: None, "missing.pt", ["no such file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_none(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    make, path, words = MODELS[name]
    make()
    error = refused(capsys, ("factorize", path, "--rank", "4"), 4, path, *words)
    assert error["kind"] == "model" and not Path("planted").exists()
    assert "weights_only" not in error["got"], "torch's advice to load it unsafely is not ours"


def test_the_planted_payloads_are_real(here: Path) -> None:
    """With trust they run: so it is the defence, and not a dud, that the tests above see."""
    torch.save(Planted(), "bad.pt")
    assert run(["factorize", "bad.pt", "--rank", "4", "--trust-pickle", "--quiet"]) == 4
    assert Path("planted").is_dir()


# arguments, plans, architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rank", "0"), ["--rank", "at least 1"]), (("--rank", "-3"), ["--rank", "got -3"]), (("--ratio", "0"), ["--ratio"]), (("--ratio", "1.5"), ["--ratio"]),
        (("--energy", "-0.5"), ["--energy"]), (("--rank", "4", "--ratio", "0.5"), ["exactly one", "--rank and --ratio"]), ((), ["exactly one"]),
        (("--rank", "4", "--method", "tuker"), ["did you mean 'tucker'"]), (("--rank", "4", "--include", "zz*"), ["zz*", "matches"]),
        (("--rank", "4", "--compute", "gpu"), ["--compute", "gpu"]), (("--rank", "4", "--arch-arg", "width"), ["--arch-arg"]),
        (("--rank", "4", "--input", "x:float32"), ["--input"]), (("--rank", "4", "--input", "x:floaty:batch,3"), ["--input", "floaty"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)  # fmt: skip
def test_options_that_make_no_sense(
    here: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: list[str]
) -> None:
    refused(capsys, ("factorize", "model.pt", *options), 2, *words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "fc2", "form": "svd", "rank": 6}, ["layers[0] (fc2)", "1…5", "got 6"]), ({"name": "fc9", "form": "svd", "rank": 2}, ["fc9"]),
        ({"name": "fc2", "form": "svdd", "rank": 2}, ["svdd"]), ({"name": ["fc2"], "form": "svd", "rank": 2}, ["layers[0]"]), ({}, ["name, form"]),
    ],
)  # fmt: skip
def test_a_plan_that_its_model_cannot_follow(
    here: Path, capsys: pytest.CaptureFixture[str], entry: dict[str, Any], words: list[str]
) -> None:
    Path("plan.json").write_text(json.dumps({"schema": 1, "layers": [entry]}))
    error = refused(capsys, ("factorize", "model.pt", "--plan", "plan.json"), 3, "plan.json", *words)
    assert error["kind"] == "plan"


@pytest.mark.parametrize("text", [None, "", "[]", '{"schema": 2, "layers": []}', "\x00"])
def test_a_plan_that_is_none(here: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    if text is not None:
        Path("plan.json").write_text(text)
    refused(capsys, ("factorize", "model.pt", "--plan", "plan.json"), 3, "plan.json")


def test_a_state_dict_that_does_not_fit_its_architecture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, (*FACTORIZE, *ARCH, "--arch-arg", "width=8"), 4, "conv1.weight")
    refused(capsys, (*FACTORIZE, "--arch", "tests.support.nets:words"), 4, "model.pt")


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("no.such:thing", ["imported", "No module named 'no'"]), ("tests.support.nets:thing", ["thing"]), ("nets.py:small", ["nets.py"]), ("tests.support.nets", ["callable"]),
        ("broken.py:net", ["broken.py"]), ("raises.py:net", ["out of luck"]), ("number.py:net", ["int"]),
    ],
)  # fmt: skip
def test_an_architecture_that_cannot_be_had(
    here: Path, capsys: pytest.CaptureFixture[str], arch: str, words: list[str]
) -> None:
    Path("broken.py").write_text("def net(:\n")
    Path("raises.py").write_text("def net():\n    raise RuntimeError('out of luck')\n")
    Path("number.py").write_text("def net():\n    return 3\n")
    refused(capsys, (*FACTORIZE, "--arch", arch), 4, arch.partition(":")[0], *words)


# recipes and data -----------------------------------------------------------------------------------------------


def test_a_recipe_with_a_misspelt_key(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"schema": 1, "name": "r", "modle": {"source": "model.pt"}, "factorize": {"rank": 4}}
    Path("r.yaml").write_text(json.dumps(recipe, indent=1))
    error = refused(capsys, ("run", "r.yaml"), 3, "r.yaml:4", "modle", "did you mean 'model'?")
    assert error["kind"] == "recipe"
    Path("r.yaml").write_text("name: [\n")
    refused(capsys, ("run", "r.yaml"), 3, "r.yaml:2", "YAML")
    refused(capsys, ("run", "missing.yaml"), 3, "missing.yaml")


DATA: dict[str, tuple[dict[str, np.ndarray], list[str]]] = {
    "wrong names": ({"pixels": X, "mask": X}, ["arrays named x", "mask, pixels", "rename"]),
    "a wrong shape": ({"x": X[:, :, :7]}, ["(3, 8, 8)", "(3, 7, 8)"]),
    "images with the channel last": ({"x": X.transpose(0, 2, 3, 1)}, ["(8, 8, 3)", "nhwc_to_nchw"]),
    "a wrong dtype": ({"x": X.astype("U4")}, ["float32", "<U4"]),
    "uint8 images without preprocessing": ({"x": np.zeros(X.shape, np.uint8)}, ["uint8 images", "preprocess"]),
    "NaN in the data": ({"x": np.where(np.arange(len(X))[:, None, None, None] == 5, np.nan, X).astype(np.float32)}, ["sample 5"]),
    "no sample": ({"x": X[:0]}, ["at least one sample"]),
    "lengths that differ": ({"x": X, "y": Y[:-1]}, ["24", "23"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("command", ["factorize", "recover"])
def test_data_that_do_not_fit_the_model(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    arrays, words = DATA[name]
    np.savez("data.npz", **arrays)  # type: ignore[arg-type]
    argv = (
        (*FACTORIZE, *NET, "--calib", "data.npz")
        if command == "factorize"
        else ("recover", "ok/compressed", "--data", "data.npz", "--rank", "2", "--steps", "1")
    )
    error = refused(capsys, argv, 9, "data.npz", *words)
    assert error["kind"] == "data"


@pytest.mark.parametrize("source", ["missing.npz", "ok", "cut.npz", "planted.npz", "table.xlsx", "no.such:data"])
def test_data_that_are_none(here: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    Path("cut.npz").write_bytes(Path("train.npz").read_bytes()[:500])
    np.savez("planted.npz", x=np.array([Planted()], dtype=object))
    Path("table.xlsx").touch()
    refused(capsys, (*FACTORIZE, *NET, "--calib", source), 9, source)
    assert not Path("planted").exists()


# the place to write ---------------------------------------------------------------------------------------------


def strange_folder(path: str) -> None:
    Path(path).mkdir(parents=True)
    (Path(path) / "thesis.tex").write_text("three years of work")


PLACES: dict[str, tuple[str, ...]] = {
    "factorize": (*FACTORIZE, "-o", "out"),
    "recover": ("recover", "ok/compressed", "--data", "train.npz", "--rank", "2", "--steps", "1", "-o", "out"),
    "export": ("export", "ok/compressed", "-o", "out"),
}


@pytest.mark.parametrize("command", PLACES)
@pytest.mark.parametrize("what", ["folder", "file", "of another command"])
def test_an_output_that_is_somebody_else_s(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, what: str
) -> None:
    if what == "folder":
        strange_folder("out")
    elif what == "file":
        Path("out").write_text("mine")
    else:
        Path("out").mkdir()
        for marker in ("lrcompress.json", "manifest.json"):
            (Path("out") / marker).write_text('{"made_by": "lrcompress something-else"}')
    error = refused(capsys, PLACES[command], 2, "out", "-o")
    assert error["kind"] == "usage"


def test_an_output_below_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("model.pt/out", "model.pt/a/b/out"):
        refused(capsys, (*FACTORIZE, "-o", place), 2, place, "model.pt is a file")


# the processes themselves ---------------------------------------------------------------------------------------


def test_a_real_process_says_the_same(here: Path) -> None:
    """What the table shows in process holds for the installed command: streams apart, the code is the exit code."""
    torch.save(Planted(), "bad.pt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lrcompress", "factorize", "bad.pt", "--rank", "4", "--json"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and json.loads(done.stdout)["error"]["kind"] == "model"
    assert not Path("planted").exists()


def test_what_worked_before_is_still_there_after_a_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FACTORIZE, "-o", "out", "--quiet"]) == 0
    diverged()
    refused(capsys, ("factorize", "bad.pt", "--rank", "4", "-o", "out"), 4)
    assert run([*FACTORIZE, "-o", "out", "--quiet"]) == 0


def test_an_export_without_a_graph(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*FACTORIZE, "--quiet"]) == 0
    refused(capsys, ("export", "--target", "onnx"), 4, "a state dict has no graph; give --arch and --input")
    refused(capsys, ("export", "nowhere"), 4, "nowhere")
    refused(capsys, ("recover", "nowhere", "--data", "train.npz"), 4, "nowhere")
    refused(capsys, ("validate", "."), 6, "manifest.json")
    shutil.rmtree("compressed")
