"""Adapters out: our payload, ONNX Runtime's file, merged ONNX, a PEFT folder; all of them the same correction."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch

import lrcompress
from lrcompress.cli.main import main
from lrcompress.data import Data
from lrcompress.errors import CommandError, PayloadError
from lrcompress.export import onnx_adapter
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec
from lrcompress.payload import parse
from lrcompress.runtime import Session
from lrcompress.verbs.adapter import convert
from lrcompress.verbs.adapter_out import emit
from tests.support.nets import images, small

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
X, Y = images(96)
KINDS = ("lora", "loha", "lokr")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    torch.save(small().state_dict(), folder / "model.pt")
    lrcompress.factorize(
        folder / "model.pt", ratio=0.5, arch="tests.support.nets:small", inputs=SPEC, output=folder / "compressed"
    )
    for kind in KINDS:
        lrcompress.recover(
            folder / "compressed", data=Data.of_arrays({"x": X}, Y), adapter_kind=kind, rank=2, steps=20, name=kind,
            output=folder / "adapters" / kind,
        )  # fmt: skip
    lrcompress.export(folder / "compressed", output=folder / "exported", emit=("onnx_adapter",))
    return folder


def through_the_runtime(folder, adapter):
    """Answer as a program in C would: the graph, the adapter file, run options that name it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    loaded = ort.LoraAdapter()
    loaded.Load(str(adapter))
    run = ort.RunOptions()
    run.add_active_adapter(loaded)
    return session.run(["output"], {"x": X[:9]}, run)[0]


def served(folder, payload):
    session = Session(folder)
    session.swap(parse(payload.read_bytes()))
    return session.run({"x": X[:9]})["output"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_out_gives_the_same_answers(base, tmp_path, kind):
    payload, native = (base / "exported" / "payloads" / f"{kind}.{s}" for s in ("safetensors", "onnx_adapter"))
    expected = served(base / "exported", payload)
    assert np.abs(expected - Session(base / "exported").run({"x": X[:9]})["output"]).max() > 1e-3
    assert np.array_equal(through_the_runtime(base / "exported", native), expected)
    lrcompress.export(base / "compressed", merge=kind, slots=("none",), output=tmp_path / "merged")
    merged = Session(tmp_path / "merged").run({"x": X[:9]})["output"]
    np.testing.assert_allclose(merged, expected, rtol=1e-3, atol=1e-4)
    convert(base / "adapters" / kind, to="peft", output=tmp_path / "peft")
    emit(tmp_path / "peft", to="payload", exported=base / "exported", output=tmp_path / "back.safetensors")
    np.testing.assert_allclose(served(base / "exported", tmp_path / "back.safetensors"), expected, rtol=1e-4, atol=1e-5)


def test_the_file_holds_what_the_slots_take_and_is_the_same_every_time(base):
    manifest = Manifest.load(base / "exported")
    payload = parse((base / "exported" / "payloads" / "loha.safetensors").read_bytes())
    data = onnx_adapter.pack(payload, manifest)
    assert data == onnx_adapter.pack(payload, manifest)
    found, feeds = onnx_adapter.unpack(data), payload.feeds(manifest)
    assert list(found) == sorted(n for n, v in feeds.items() if v.size)
    assert all(np.array_equal(found[n], feeds[n]) and found[n].dtype == feeds[n].dtype for n in found)


@pytest.mark.parametrize("bad", [b"", b"not an adapter", "half", "header"])
def test_bytes_that_are_no_adapter_are_refused(base, bad):
    data = (base / "exported" / "payloads" / "lora.onnx_adapter").read_bytes()
    bad = {"half": data[: len(data) // 2], "header": b"\xff" * 8 + data[8:]}.get(bad, bad)
    with pytest.raises(PayloadError, match="a file that ONNX Runtime reads"):
        onnx_adapter.unpack(bad)


def test_the_command_writes_both_files_and_refuses_what_it_cannot(base, tmp_path, capsys):
    for to, suffix in (("payload", "safetensors"), ("onnx_adapter", "onnx_adapter")):
        out = tmp_path / f"lora.{suffix}"
        args = ["adapter", "convert", str(base / "adapters" / "lora"), "--to", to, "--exported", str(base / "exported")]
        with pytest.raises(SystemExit) as e:
            main([*args, "-o", str(out), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert e.value.code == 0 and found["format"] == to and found["bytes"] == out.stat().st_size
        assert out.read_bytes() == (base / "exported" / "payloads" / f"lora.{suffix}").read_bytes()
    from_payload = tmp_path / "again.onnx_adapter"
    emit(tmp_path / "lora.safetensors", to="onnx_adapter", exported=base / "exported", output=from_payload)
    assert from_payload.read_bytes() == (tmp_path / "lora.onnx_adapter").read_bytes()
    for change, expected in (
        ({"exported": None}, "the exported model that it is for"),
        ({"output": tmp_path / "lora.bin"}, r"a new \.onnx_adapter file"),
        ({"output": from_payload}, "one that exists"),
        ({"output": tmp_path / "none" / "a.onnx_adapter"}, "no such folder"),
    ):
        given = {"exported": base / "exported", "output": tmp_path / "new.onnx_adapter"} | change
        with pytest.raises(CommandError, match=expected):
            emit(base / "adapters" / "lora", to="onnx_adapter", **given)
    with pytest.raises(CommandError, match="onnx_adapter"):
        lrcompress.export(base / "compressed", emit=("gguf",), output=tmp_path / "e")


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(base, tmp_path):
    lrcompress.factorize(
        base / "model.pt", rank=3, arch="tests.support.nets:small", inputs=SPEC, output=tmp_path / "other"
    )
    lrcompress.export(tmp_path / "other", output=tmp_path / "exported")
    with pytest.raises(PayloadError):
        emit(
            base / "adapters" / "lora", to="onnx_adapter", exported=tmp_path / "exported", output=tmp_path / "a.onnx_adapter"
        )  # fmt: skip
    assert not (tmp_path / "a.onnx_adapter").exists()
