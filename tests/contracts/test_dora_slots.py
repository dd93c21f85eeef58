"""Weight-decomposed adapters through slots of their own: y = s·((W + ΔW) x) + b, the bias never scaled."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress import edge, payload, publish
from lrcompress.adapt import kinds
from lrcompress.adapt._files import write_adapter
from lrcompress.errors import CommandError, LrcompressError, ManifestError, PayloadError
from lrcompress.export.payloads import payload_tensors
from lrcompress.factorize import form
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec, OpenedModel
from lrcompress.model.adapting import fresh, layer_target
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.surgery import attach, replace_layer, to_dense, wrap_dense
from lrcompress.runtime import Session
from lrcompress.verbs.adapter import open_base
from lrcompress.verbs.adapter_check import check

SPEC = (InputSpec("ids", "int64", ("batch", 16)),)
IDS = np.random.default_rng(0).integers(0, 20, (5, 16))
LAYERS = ("embed", "line", "factored", "conv", "tucker", "grouped")


class Net(nn.Module):
    """Every layer whose outputs a vector scales, with biases of a size that would show if they were scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.line, self.factored = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Linear(16, 8)
        self.conv, self.tucker = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, stride=2, padding=1)
        self.grouped, self.up = nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, ids):
        x = torch.tanh(self.factored(torch.tanh(self.line(self.embed(ids)))))
        x = torch.tanh(self.tucker(torch.tanh(self.conv(x.transpose(1, 2).reshape(-1, 8, 4, 4)))))
        return self.up(torch.tanh(self.grouped(x)))


def network() -> Net:
    torch.manual_seed(1)
    model = Net().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.uniform_(-1, 1)
    for name, chosen in {"factored": form("svd"), "tucker": form("tucker")}.items():
        weight = model.get_submodule(name).weight.detach()
        replace_layer(model, name, chosen.decompose(weight, chosen.clip(tuple(weight.shape), 5)))
    return model


def decomposed(model: nn.Module, kind: str = "lora", names=LAYERS) -> dict:
    """Return adapters with random factors and magnitudes that are not those of the weight."""
    g = torch.Generator().manual_seed(2)
    made = {}
    for name in names:
        target = layer_target(model, name)
        a = made[name] = fresh(kind, target, 2, 3.0, generator=g)
        with torch.no_grad():
            for p in a.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.15)
        a.decompose(wrap_dense(model, name).weight, target.output_axis)
        with torch.no_grad():
            a.magnitude.mul_(0.5 + torch.rand(a.magnitude.shape, generator=g))
    return made


def bases(model: nn.Module):
    return lambda name: wrap_dense(model, name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dora")
    opened = OpenedModel(None, "module", "", network(), inputs=SPEC)
    lrcompress.export(opened, slots=("lora", "dora"), slot_include=("*",), output=folder / "exported")
    return folder / "exported"


def answers(model: nn.Module, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(ids)).numpy()


def test_the_default_is_the_base_and_plain_slots_pay_nothing(exported, tmp_path):
    session = Session(exported)
    by_kind = {k: {s["layer"] for s in session.manifest.slots if s["kind"] == k} for k in ("lora", "dora")}
    assert by_kind == {"lora": {*LAYERS, "up"}, "dora": set(LAYERS)}
    for n in (1, 5):
        np.testing.assert_allclose(session.run({"ids": IDS[:n]})["output"], answers(network(), IDS[:n]), atol=1e-5)
    opened = OpenedModel(None, "module", "", network(), inputs=SPEC)
    lrcompress.export(opened, output=tmp_path / "plain")
    manifest = Manifest.load(tmp_path / "plain")
    assert {s["kind"] for s in manifest.slots} == {"lora", "core"} and not any("scale" in s for s in manifest.slots)
    assert not any("dora" in name for name in manifest.slot_tensors)
    assert b"dora" not in (tmp_path / "plain" / "model.onnx").read_bytes()


@pytest.mark.parametrize("kind", [k for k in kinds() if k not in ("core", "lokh")])
def test_forward_is_merged_is_the_runtime(kind, exported, tmp_path):
    session, model = Session(exported), network()
    before = session.run({"ids": IDS})["output"]
    made = decomposed(model, kind)
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    found, tensors = payload_tensors(tmp_path, session.manifest, bases(network()))
    assert found == "dora"
    attach(model, "a", lambda name, _: made[name], list(made))
    expected = answers(model)
    assert np.abs(expected - before).max() > 1e-2
    np.testing.assert_allclose(answers(to_dense(model)), expected, rtol=1e-3, atol=2e-5)
    data = payload.build(tensors, manifest=session.manifest, kind=found, encoding="f32")
    session.swap(payload.parse(data))
    np.testing.assert_allclose(session.run({"ids": IDS})["output"], expected, rtol=1e-3, atol=2e-5)
    session.swap(None)
    assert np.array_equal(session.run({"ids": IDS})["output"], before)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 3)])
def test_a_scale_alone_scales_the_product_and_not_the_bias(make, tmp_path):
    model = nn.Sequential(make()).eval()
    x = np.random.default_rng(1).standard_normal((3, 6) if isinstance(model[0], nn.Linear) else (3, 6, 5, 5))
    spec = (InputSpec("input", "float32", ("batch", *x.shape[1:])),)
    lrcompress.export(OpenedModel(None, "module", "", model, inputs=spec), slots=("dora",), output=tmp_path / "e")
    session, s = Session(tmp_path / "e"), np.array([2.0, 0.0, -1.0, 0.5])
    tensors = {
        n: np.zeros([0 if isinstance(d, str) else d for d in t["shape"]])
        for n, (t, _) in session.manifest.slot_tensors.items()
    }
    tensors["0.dora_s"] = s
    session.swap(payload.parse(payload.build(tensors, manifest=session.manifest, kind="dora", encoding="f32")))
    with torch.no_grad():
        bias = model[0].bias.reshape(-1, *(1,) * (x.ndim - 2))
        y = model(torch.as_tensor(x, dtype=torch.float32))
        scale = torch.as_tensor(s, dtype=torch.float32).reshape(bias.shape)
        expected = (scale * (y - bias) + bias).numpy()
    np.testing.assert_allclose(session.run({"input": x.astype(np.float32)})["output"], expected, atol=1e-5)


@pytest.mark.parametrize("encoding", ["f32", "f16", "int8"])
def test_a_payload_comes_back_as_it_was_written(encoding, exported, tmp_path):
    session, model = Session(exported), network()
    made = decomposed(model, names=("line", "conv"))
    made["conv"].magnitude = None  # a plain LoRA beside a decomposed one: its scale is one
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    kind, tensors = payload_tensors(tmp_path, session.manifest, bases(network()))
    assert (tensors["conv.dora_s"] == 1).all() and tensors["factored.dora_A"].shape == (16, 0)
    assert set(tensors) == {n for n, (_, s) in session.manifest.slot_tensors.items() if s["kind"] == "dora"}
    data = payload.build(tensors, manifest=session.manifest, kind=kind, encoding=encoding)
    back = payload.parse(data)
    assert back.kind == "dora" and set(back.tensors) == set(tensors)
    for name, value in tensors.items():
        atol = {"f32": 0, "f16": 2e-3, "int8": 1e-2}[encoding] * max(1, np.abs(value).max(initial=0))
        np.testing.assert_allclose(back.tensors[name], value, atol=atol)
    attach(model, "a", lambda name, _: made[name], list(made))
    session.swap(back)
    limit = {"f32": 2e-5, "f16": 5e-3, "int8": 3e-2}[encoding]
    np.testing.assert_allclose(session.run({"ids": IDS})["output"], answers(model), atol=limit)


def test_what_a_slot_cannot_do_is_refused_in_one_line(exported, tmp_path):
    manifest, model = Session(exported).manifest, network()

    def refused(made: dict, words: str, base=None, which: Manifest = manifest) -> None:
        folder = tmp_path / words.replace(" ", "-").replace("*", "")
        folder.mkdir()
        write_adapter(folder, made, maker="test", base=None, info={})
        with pytest.raises(PayloadError, match=words) as caught:
            payload_tensors(folder, which, base)
        assert "\n" not in str(caught.value)

    refused(decomposed(model, names=("line",)), "lrcompress export --slots dora")  # without the weights
    made = {"line": fresh("lora", layer_target(model, "line"), 2)}
    made["line"].decompose(model.line.weight, 1)
    refused(made, "a magnitude per output", bases(network()))
    up = {"up": fresh("lora", layer_target(model, "up"), 2)}
    up["up"].decompose(model.up.weight, 1)
    refused(up, "a layer that has a slot", bases(network()))
    opened = OpenedModel(None, "module", "", network(), inputs=SPEC)
    lrcompress.export(opened, output=tmp_path / "plain")
    plain = Manifest.load(tmp_path / "plain")
    refused(decomposed(model, names=("line",)), "export with --slots dora, or bake it in", bases(network()), plain)
    only = OpenedModel(None, "m", "", nn.ConvTranspose1d(2, 2, 2), inputs=(InputSpec("input", "float32", ("b", 2, 5)),))
    with pytest.raises(CommandError, match="leave dora out"):
        lrcompress.export(only, slots=("dora",), slot_include=("*",), output=tmp_path / "up-only")
    assert not (tmp_path / "up-only").exists()


@pytest.mark.parametrize("harm", ["missing", "extra", "shape", "nan"])
def test_a_bad_scale_is_refused(harm, exported, tmp_path):
    manifest = Session(exported).manifest
    write_adapter(tmp_path, decomposed(network(), names=("line",)), maker="test", base=None, info={})
    kind, tensors = payload_tensors(tmp_path, manifest, bases(network()))
    scale = tensors.pop("line.dora_s")
    bad = {"missing": {}, "extra": {"line.dora_s": scale, "up.dora_s": scale[:4]}, "shape": {"line.dora_s": scale[:3]},
           "nan": {"line.dora_s": scale * np.nan}}[harm]  # fmt: skip
    with pytest.raises(PayloadError, match=r"line\.dora_s missing|up\.dora_s too many|shape \[16\]|finite"):
        payload.build({**tensors, **bad}, manifest=manifest, kind=kind, encoding="f32")


def test_a_manifest_whose_scale_is_not_that_of_its_slot_is_refused(exported):
    raw = json.loads((exported / "manifest.json").read_text())
    slot = next(s for s in raw["slots"] if s["kind"] == "dora")
    for bad in (None, {**slot["scale"], "shape": [3]}, {**slot["scale"], "name": "other"}):
        slots = [{**s, "scale": bad} if s == slot else s for s in raw["slots"]]
        with pytest.raises(ManifestError, match="a scale of every output"):
            Manifest.parse(json.dumps({**raw, "slots": slots}).encode())
    plain = next(s for s in raw["slots"] if s["kind"] == "lora")
    slots = [{**s, "scale": slot["scale"]} if s == plain else s for s in raw["slots"]]
    with pytest.raises(ManifestError, match="for kind dora only"):
        Manifest.parse(json.dumps({**raw, "slots": slots}).encode())


def compressed(folder: Path) -> tuple[Path, Path, dict]:
    """Return a compressed folder of `small`, an adapter folder for it, and the adapters."""
    from tests.support.nets import small

    torch.save(small().state_dict(), folder / "model.pt")
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    how = {"rank": 3, "arch": "tests.support.nets:small", "inputs": spec}
    lrcompress.factorize(folder / "model.pt", **how, output=folder / "compressed")
    base = load_compressed(folder / "compressed")
    made = decomposed(copy.deepcopy(base.need_module("test")), names=("conv2", "fc1"))
    (folder / "adapters" / "d").mkdir(parents=True)
    write_adapter(folder / "adapters" / "d", made, maker="test", base=base.digest, info={})
    return folder / "compressed", folder / "adapters" / "d", made


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_from_the_command_to_a_device_that_imports_no_torch(quantize, tmp_path, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", "only for tests")
    base, adapter, made = compressed(tmp_path)
    x = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    found = lrcompress.export(
        base, slots=("dora",), quantize=quantize, calib=str(tmp_path / "x.npz"), adapters=[adapter], output=tmp_path / "exported"
    )  # fmt: skip
    [shipped] = [Path(p["path"]) for p in found.data["payloads"]]
    publish.init_repository(tmp_path / "repo", tmp_path / "exported", tmp_path / "keys", passphrase="only for tests")
    with pytest.raises(LrcompressError, match="--slots dora"):  # no weights there to compute the scale from
        publish.add(tmp_path / "repo", adapter, group="default", passphrase="only for tests")
    publish.add(tmp_path / "repo", shipped, group="default", encoding="f32", passphrase="only for tests")
    root = tmp_path / "repo" / "metadata" / "1.root.json"
    edge.Device.init(tmp_path / "device", tmp_path / "exported", root, str(tmp_path / "repo"), "default")
    code = """
import sys, numpy as np
from lrcompress.edge import Device
device = Device(sys.argv[1])
assert device.update()["state"] == "updated", device.status()
out = device.infer({"x": np.load(sys.argv[2])["x"]})
np.savez(sys.argv[3], **out)
assert not {"torch", "onnx"} & set(sys.modules)
"""
    place = [str(tmp_path / n) for n in ("device", "x.npz", "out.npz")]
    subprocess.run([sys.executable, "-c", code, *place], check=True, cwd=Path(__file__).parents[2])
    model = load_compressed(base).need_module("test").eval()
    attach(model, "a", lambda name, _: made[name], list(made))
    with torch.no_grad():
        expected = model(torch.as_tensor(x)).numpy()
    with np.load(tmp_path / "out.npz") as got:
        (y,) = got.values()
    session = Session(tmp_path / "exported")
    factory = session.run({"x": x})["output"]
    session.swap(payload.parse(shipped.read_bytes()))
    np.testing.assert_array_equal(y, session.run({"x": x})["output"])
    if quantize == "none":
        np.testing.assert_allclose(y, expected, atol=2e-5)
    else:  # eight bits are off by what they are off by; what the adapter changes must be far more
        assert np.linalg.norm(y - expected) < np.linalg.norm(factory - expected) / 2


def test_adapter_check_goes_through_slots(tmp_path):
    base, adapter, _ = compressed(tmp_path)
    found = check(adapter, open_base(base))
    assert found["passed"] and {r["route"] for r in found["layers"]} == {"slot"}
