"""Adapters and data that cannot be used, on the command line: one line, the right exit code, nothing half-applied."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrcompress.adapt import BaseAdapter
from lrcompress.adapt._files import write_adapter
from lrcompress.cli.main import run
from lrcompress.model.adapting import every_target, fresh
from lrcompress.model.checkpoint import load_compressed
from tests.e2e.test_bad_input import refused
from tests.support.workshop import ARCH, X, Y, here, ready

__all__ = ["here", "ready"]

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.fc1."


def adapters(layers: tuple[str, ...] = ("fc1", "fc2")) -> dict[str, BaseAdapter]:
    targets = every_target(load_compressed(Path("ok/compressed")).need_module("test"))
    made = {n: fresh("lora", targets[n], 2, generator=torch.Generator().manual_seed(0)) for n in layers}
    with torch.no_grad():
        for a in made.values():
            a.get_parameter("lora_B").normal_(generator=torch.Generator().manual_seed(1))
    return made


def folder(base: str | None = None) -> Path:
    """Write a good adapter of the compressed model into `bad`."""
    Path("bad").mkdir()
    digest = base or load_compressed(Path("ok/compressed")).digest
    write_adapter(Path("bad"), adapters(), maker="lrcompress recover", base=digest, info={"name": "bad"})
    return Path("bad")


def tensors(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Callable[[], None]:
    def do() -> None:
        path = folder() / TENSORS
        save_file(dict(change(load_file(path))), path, metadata={"format": "pt"})

    return do


def config(**changes: object) -> Callable[[], None]:
    def do() -> None:
        path = folder() / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return do


def truncated() -> None:
    path = folder() / TENSORS
    path.write_bytes(path.read_bytes()[:-20])


def cut_header() -> None:
    path = folder() / TENSORS
    path.write_bytes(path.read_bytes()[:40])


def no_json() -> None:
    (folder() / CONFIG).write_text("{")


A, B = f"{PREFIX}lora_A.weight", f"{PREFIX}lora_B.weight"
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "another base": (lambda: folder("ab" * 32), "one for abababababab"),
    "a missing tensor": (tensors(lambda t: {k: v for k, v in t.items() if k != B}), "lora_B"),
    "a tensor too many": (tensors(lambda t: t | {f"{PREFIX}hada_w1_a": torch.zeros(2, 2)}), "hada_w1_a"),
    "a layer too many": (tensors(lambda t: t | {k.replace("fc1", "fc7"): v.clone() for k, v in t.items()}), "fc7"),
    "another rank": (tensors(lambda t: t | {A: t[A].repeat(2, 1), B: t[B].repeat(1, 2)}), "expected shape"),
    "ranks that differ": (tensors(lambda t: t | {B: t[B][:, :1].contiguous()}), "expected shape"),
    "NaN": (tensors(lambda t: t | {B: t[B] * torch.nan}), "finite numbers"),
    "infinity": (tensors(lambda t: t | {A: t[A] / 0}), "finite numbers"),
    "whole numbers": (tensors(lambda t: {k: v.int() for k, v in t.items()}), "floating point"),
    "no tensors": (tensors(lambda t: {}), "at least one layer"),
    "an unknown type": (config(peft_type="VERA"), "got VERA"),
    "no type": (config(peft_type=None), "a peft_type of"),
    "a rank that is none": (config(r="four"), "whole rank"),
    "biases": (config(bias="all"), "ships no biases"),
    "truncated tensors": (truncated, "intact adapter folder"),
    "a cut header": (cut_header, "intact adapter folder"),
    "a configuration that is none": (no_json, "intact adapter folder"),
    "nothing": (lambda: Path("bad").mkdir(), "adapter_config.json"),
}
COMMANDS = {
    "check": ("adapter", "check", "ok/compressed", "bad"),
    "merge": ("adapter", "merge", "ok/compressed", "bad", "-o", "out"),
    "convert": ("adapter", "convert", "bad", "--base", "ok/compressed", "--to", "lora", "-o", "out"),
    "export": ("export", "ok/compressed", "--adapter", "./bad", "-o", "out"),
    "export --merge": ("export", "ok/compressed", "--merge", "./bad", "-o", "out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_cannot_be_used(here: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    make, words = FAULTS[fault]
    make()
    for argv in COMMANDS.values():
        refused(capsys, argv, 6 if fault == "another base" and "--adapter" in argv else 4, "bad", words)
    assert not Path("out").exists()


def test_what_is_there_survives_an_adapter_that_cannot_be_used(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "ok/compressed", "-o", "out", "--quiet"]) == 0
    tensors(lambda t: t | {B: t[B] * torch.nan})()
    refused(capsys, COMMANDS["export"], 4, "finite")
    refused(capsys, COMMANDS["export --merge"], 4, "finite")


FILES: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "names that fit no layer": (lambda t: {k.replace("fc1", "up_blocks_0"): v for k, v in t.items()}, "layer of the base"),
    "a kind that is not known": (lambda t: t | {"lycoris_fc1.oft_blocks": torch.zeros(2, 2)}, "oft_blocks"),
    "half of an adapter": (lambda t: {k: v for k, v in t.items() if "lora_up" not in k}, "lora_B is missing"),
    "NaN": (lambda t: {k: v * torch.nan for k, v in t.items()}, "finite"),
    "another rank": (lambda t: {k: v[:1].contiguous() if "down" in k else v for k, v in t.items()}, "shape"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FILES, "truncated"])
def test_a_lycoris_file_that_cannot_be_used(here: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    folder()
    argv = ("adapter", "convert", "bad", "--base", "ok/compressed", "--to", "lycoris", "-o", "bad.safetensors")
    assert run([*argv, "--quiet"]) == 0
    if fault == "truncated":
        Path("bad.safetensors").write_bytes(Path("bad.safetensors").read_bytes()[:-9])
        words = "intact .safetensors"
    else:
        change, words = FILES[fault]
        save_file(dict(change(load_file("bad.safetensors"))), "bad.safetensors")
    for argv in (
        ("adapter", "check", "ok/compressed", "bad.safetensors"),
        ("adapter", "merge", "ok/compressed", "bad.safetensors", "-o", "out"),
        ("adapter", "convert", "bad.safetensors", "--base", "ok/compressed", "-o", "out"),
    ):
        refused(capsys, argv, 4, "bad.safetensors", words)


RECOVER = ("recover", "ok/compressed", "--data", "train.npz", "--steps", "1", "--rank", "2", "-o", "out")
PATTERNS: dict[str, tuple[str, ...]] = {
    "recover --include": (*RECOVER, "--include", "zz*"),
    "recover --rank-pattern": (*RECOVER, "--rank-pattern", "zz*=2"),
    "recover --alpha-pattern": (*RECOVER, "--alpha-pattern", "zz*=2"),
    "recover --hidden": (*RECOVER, "--loss", "auto=1,hidden=1", "--hidden", "zz*"),
    "export": ("export", "ok/compressed", "--slot-include", "zz*", "-o", "out"),
    "check": ("adapter", "check", "ok/compressed", "bad", "--include", "zz*"),
    "convert": ("adapter", "convert", "bad", "--include", "zz*", "-o", "out"),
    "factorize --exclude": ("factorize", "model.pt", "--rank", "2", "--exclude", "zz*", "-o", "out"),
    "inspect": ("inspect", "model.pt", "--include", "zz*"),
    "plan": ("plan", "model.pt", *ARCH, "--max-bytes", "1MB", "--include", "zz*", "-o", "out.json"),
}


@pytest.mark.parametrize("command", PATTERNS)
def test_a_pattern_that_matches_nothing(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    folder()
    refused(capsys, PATTERNS[command], 2, "zz*")


DATA: dict[str, tuple[dict[str, np.ndarray], tuple[str, ...], str]] = {
    "labels above the classes": ({"x": X, "y": Y + 5}, ("--loss", "labels"), "0…4"),
    "labels above the classes, distilled": ({"x": X, "y": Y + 5}, (), "0…4"),
    "labels below the classes": ({"x": X, "y": Y - 9}, ("--loss", "labels"), "0…4"),
    "labels that are no classes": ({"x": X, "y": Y + 0.5}, ("--loss", "labels"), "class numbers"),
    "no labels": ({"x": X}, ("--loss", "labels"), "labels"),
    "one sample": ({"x": X[:1], "y": Y[:1]}, (), "at least 2 samples"),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("command", ["recover", "factors", "adapt"])
def test_data_that_nothing_can_be_learnt_from(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    arrays, options, words = DATA[name]
    np.savez("data.npz", **arrays)  # type: ignore[arg-type]
    argv = ("adapt" if command == "adapt" else "recover", "ok/compressed", "--data", "data.npz", "--steps", "1")
    argv += ("--train", "factors") if command == "factors" else ()
    if command == "adapt" and name in ("labels above the classes, distilled", "no labels"):
        options = ("--metric", "accuracy")
    elif command == "adapt":
        options = ()
    refused(capsys, (*argv, *options, "-o", "out"), 9, words)


def test_one_sample_and_classes_that_are_none_at_the_end(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one sample allows is done: a calibration, a comparison whose error nobody knows."""
    np.savez("one.npz", x=X[:1], y=Y[:1])
    np.savez("wrong.npz", x=X, y=Y + 5)
    assert run(["export", "ok/compressed", "-o", "out", "--quiet"]) == 0
    metric = ("--metric", "accuracy", "--original", "model.pt")
    refused(capsys, ("validate", "out", "--data", "wrong.npz", *metric), 9, "0…4")
    assert run(["validate", "out", "--data", "one.npz", *metric, "--json"]) in (0, 5)
    assert "NaN" not in capsys.readouterr().out
