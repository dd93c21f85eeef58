"""The verb on every kind of source: same factors, honest numbers, a checkpoint that comes back bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lrcompress
from lrcompress.data import Data
from lrcompress.errors import BudgetError, CommandError, LrcompressWarning, ModelError
from lrcompress.factorize import form
from lrcompress.files import sha256_tree
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.surgery import count_parameters, factorized_layers
from tests.support.nets import images, small, words

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
ARCH = {"arch": "tests.support.nets:small", "inputs": SPEC}
X = torch.as_tensor(images(6)[0])


@pytest.fixture
def state(tmp_path):
    torch.save(small().state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_bare_state_dict_as_typed(state, tmp_path):
    found = lrcompress.factorize(state, rank=4, output=tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    original = small().state_dict()
    w = original["fc1.weight"]
    torch.testing.assert_close(tensors["fc1.U"] @ tensors["fc1.V"], form("svd").decompose(w, 4).to_tensor())
    assert "fc1.weight" not in tensors and torch.equal(tensors["fc1.bias"], original["fc1.bias"])
    assert found.model is None and found.data["params_after"] == sum(t.numel() for t in tensors.values())
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"lrcompress.json", "model.safetensors"}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("how", [{"rank": 4}, {"ratio": 0.4}, {"energy": 0.8}])
def test_the_checkpoint_comes_back_bit_for_bit(state, tmp_path, with_data, how):
    calib = Data.of_arrays({"x": images(64)[0]}) if with_data else None
    found = lrcompress.factorize(state, output=tmp_path / "c", calib=calib, **ARCH, **how)
    back = load_compressed(tmp_path / "c")
    assert torch.equal(back.module(X), found.model(X))
    assert {n: m.form for n, m in factorized_layers(back.module)} == {
        n: m.form for n, m in factorized_layers(found.model)
    }
    assert (
        found.data["params_after"]
        == count_parameters(back.module)
        < found.data["params_before"]
        == count_parameters(small())
    )
    norms = {layer["norm"] for layer in found.data["layers"] if layer["form"] != "dense"}
    assert norms == ({"two_sided"} if with_data else {"frobenius"})
    assert all(layer["params_after"] <= layer["params_before"] for layer in found.data["layers"])
    if "ratio" in how:
        assert found.data["params_after"] <= 0.4 * found.data["params_before"]


def test_calibration_helps_on_inputs_it_never_saw(state):
    calib = Data.of_arrays({"x": images(256, 1)[0]})
    plain = lrcompress.factorize(state, ratio=0.3, **ARCH).model
    aware = lrcompress.factorize(state, ratio=0.3, calib=calib, **ARCH).model
    x = torch.as_tensor(images(200, 2)[0])
    exact = small()(x)
    error = lambda m: float((m(x) - exact).detach().norm() / exact.detach().norm())  # noqa: E731
    assert error(aware) < 0.8 * error(plain)


def test_sources_of_one_network_give_one_model(state, tmp_path):
    net = small()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "wrapped.pth")
    program = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(net, tmp_path / "pickled.pt")
    answers = {
        "state": lrcompress.factorize(state, rank=4, **ARCH),
        "safetensors": lrcompress.factorize(tmp_path / "model.safetensors", rank=4, **ARCH),
        "object": lrcompress.factorize(net, rank=4, inputs=SPEC),
        "pt2": lrcompress.factorize(tmp_path / "model.pt2", rank=4),
        "pickled": lrcompress.factorize(tmp_path / "pickled.pt", rank=4, inputs=SPEC, trust_pickle=True),
    }
    with pytest.warns(LrcompressWarning, match="module."):
        answers["wrapped"] = lrcompress.factorize(tmp_path / "wrapped.pth", rank=4, **ARCH)
    expected = answers["state"].model(X)
    for kind, found in answers.items():
        torch.testing.assert_close(found.model(X), expected, rtol=1e-5, atol=1e-6, msg=kind)
        ranks = [(n["name"], n["form"], n["rank"]) for n in found.data["layers"]]
        assert sorted(ranks) == sorted((n["name"], n["form"], n["rank"]) for n in answers["state"].data["layers"]), kind


def test_a_program_comes_back_without_its_source(tmp_path):
    program = torch.export.export(small(), (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    found = lrcompress.factorize(tmp_path / "model.pt2", rank=4, output=tmp_path / "c")
    (tmp_path / "model.pt2").unlink()
    assert torch.equal(load_compressed(tmp_path / "c").module(X), found.model(X))
    names = [p.name for p in (tmp_path / "c").rglob("*")]
    assert not any(n.endswith((".pt", ".pth", ".pkl", ".bin")) for n in names)


def test_include_and_exclude(state):
    found = lrcompress.factorize(state, rank=4, include=["fc*"], exclude=["fc2"], **ARCH).data
    reasons = {n["name"]: (n["form"], n["reason"]) for n in found["layers"]}
    assert (
        reasons["fc1"] == ("svd", None)
        and reasons["fc2"] == ("dense", "in --exclude")
        and reasons["conv1"] == ("dense", "not in --include")
    )
    for options in ({"include": ["nope*"]}, {"exclude": ["nope*"]}):
        with pytest.raises(CommandError, match="matches"):
            lrcompress.factorize(state, rank=4, **ARCH, **options)


def test_an_embedding_is_weighted_by_what_is_read(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.choice(40, (64, 7), p=np.r_[np.full(8, 0.11), np.full(32, 0.12 / 32)])
    calib = Data.of_arrays({"ids": ids, "attention_mask": np.ones_like(ids)})
    spec = (InputSpec("ids", "int64", ("b", "s")), InputSpec("attention_mask", "int64", ("b", "s")))
    found = lrcompress.factorize(words(), rank=6, calib=calib, inputs=spec, output=tmp_path / "c")
    row = next(n for n in found.data["layers"] if n["name"] == "embed")
    assert row["form"] == "svd" and row["rank"] == 6
    error = (found.model.embed.weight - words().embed.weight).square().sum(1)
    assert float(error[:8].mean()) < 0.5 * float(error[8:].mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_same_input_same_bytes(state, tmp_path, seed):
    calib = Data.of_arrays({"x": images(64)[0]})
    for name in ("one", "two"):
        lrcompress.factorize(state, ratio=0.5, calib=calib, seed=seed, output=tmp_path / name, **ARCH)
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, CommandError), ({"rank": 4, "ratio": 0.5}, CommandError), ({"rank": 0}, CommandError), ({"rank": -3}, CommandError),
        ({"ratio": 0.0}, CommandError), ({"ratio": 1.5}, CommandError), ({"energy": 2.0}, CommandError),
        ({"rank": 4, "method": "tuker"}, CommandError), ({"ratio": 0.0001}, BudgetError), ({"rank": 4, "compute": "cuda:7"}, CommandError),
    ],
)  # fmt: skip
def test_wrong_options_write_nothing(state, tmp_path, options, error):
    with pytest.raises(error):
        lrcompress.factorize(state, output=tmp_path / "c", **ARCH, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt"]


def test_calibration_needs_a_network(state):
    with pytest.raises(ModelError, match="--arch"):
        lrcompress.factorize(state, rank=4, calib=Data.of_arrays({"x": images(4)[0]}))


def test_a_changed_checkpoint_is_noticed(state, tmp_path):
    lrcompress.factorize(state, rank=4, output=tmp_path / "c", **ARCH)
    path = tmp_path / "c" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match="digest"):
        load_compressed(tmp_path / "c")
    (tmp_path / "c" / "lrcompress.json").write_text(json.dumps({"made_by": "lrcompress factorize"}))
    with pytest.raises(ModelError, match="intact"):
        load_compressed(tmp_path / "c")
    with pytest.raises(ModelError, match="nothing there"):
        load_compressed(tmp_path / "nowhere")


def test_nothing_to_factorize_is_said(state):
    with pytest.warns(LrcompressWarning, match="no layer was factorized"):
        found = lrcompress.factorize(state, rank=500, **ARCH).data
    assert found["params_after"] == found["params_before"] and all(n["reason"] for n in found["layers"])


def test_to_dense_is_a_plain_network(state):
    model = lrcompress.factorize(state, rank=4, **ARCH).model
    plain = lrcompress.to_dense(model)
    assert {type(m).__name__ for m in plain.modules()} == {type(m).__name__ for m in small().modules()}
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-5)


def test_calibration_data_tell_the_inputs_that_export_needs(tmp_path):
    torch.save(small().state_dict(), tmp_path / "m.pt")
    np.savez(tmp_path / "c.npz", anything=images(40)[0])
    lrcompress.factorize(
        tmp_path / "m.pt",
        ratio=0.5,
        calib=str(tmp_path / "c.npz"),
        arch="tests.support.nets:small",
        output=tmp_path / "c",
    )
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    inputs = json.loads((tmp_path / "e" / "manifest.json").read_text())["inputs"]
    assert inputs == [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]


def test_calibration_ids_of_any_length(tmp_path):
    torch.save(words().state_dict(), tmp_path / "m.pt")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "c.npz", ids=rng.integers(0, 40, (60, 7)), attention_mask=np.ones((60, 7), np.int64))
    lrcompress.factorize(
        tmp_path / "m.pt", rank=3, calib=str(tmp_path / "c.npz"), arch="tests.support.nets:words", output=tmp_path / "c"
    )
    lrcompress.export(tmp_path / "c", output=tmp_path / "e")
    shapes = [i["shape"] for i in json.loads((tmp_path / "e" / "manifest.json").read_text())["inputs"]]
    assert shapes == [["batch", "sequence"], ["batch", "sequence"]]
