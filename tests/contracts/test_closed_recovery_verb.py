"""Closed forms as `recover` uses them: where training starts, or all there is; refits of the base."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress import payload
from lrcompress.adapt._files import read_adapter
from lrcompress.cli.main import run
from lrcompress.data import Data
from lrcompress.errors import CommandError, LrcompressWarning, ModelError
from lrcompress.fit import Judge
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.folding import fold_again
from lrcompress.model.surgery import attach, factorized_layers
from lrcompress.recover import closed_adapters, closed_pass
from lrcompress.runtime import Session
from lrcompress.verbs.closed import original_network
from lrcompress.verbs.recover import recover
from lrcompress.verbs.scoring import Scorer
from tests.support.nets import images, small

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A network that is compressed by its weights alone, and data, as files."""
    folder = tmp_path_factory.mktemp("base")
    torch.save(small().state_dict(), folder / "model.pt")
    for name, n, seed in (("train", 600, 1), ("select", 120, 2)):
        x, y = images(n, seed)
        np.savez(folder / f"{name}.npz", x=x, y=y)
    how = {"method": "svd", "ratio": 0.3, "arch": "tests.support.nets:small", "inputs": SPEC}
    lrcompress.factorize(folder / "model.pt", **how, output=folder / "compressed")
    return folder


def said(capsys, *argv: str) -> tuple[int, dict]:
    code = run([*argv, "--json", "--quiet"])
    return code, json.loads(capsys.readouterr().out)


def test_from_weights_to_the_runtime_without_training(base, tmp_path, monkeypatch, capsys):
    """factorize → recover --closed only → export → validate, and the payload answers as the network with its adapter."""
    monkeypatch.chdir(tmp_path)
    data = ("--data", str(base / "train.npz"), "--select", str(base / "select.npz"))
    code, d = said(
        capsys, "recover", str(base / "compressed"), *data, "--closed", "only", "--rank", "4", "--name", "closed"
    )
    applied = {r["layer"] for r in d["closed"]["layers"] if r["applied"]}
    assert code == 0 and d["steps"] == 0 and d["closed"]["after"] == d["loss"]["after"] < 0.7 * d["loss"]["before"]
    folder = read_adapter(Path("adapters/closed"))
    assert set(folder.adapters) == applied and folder.base == load_compressed(base / "compressed").digest
    assert d["payload_bytes"] == d["closed"]["bytes"] == 4 * folder.n_params
    code, d = said(capsys, "adapter", "check", str(base / "compressed"), "adapters/closed")
    assert code == 0 and d["passed"] and {r["name"] for r in d["layers"]} == applied
    code, d = said(capsys, "export", str(base / "compressed"), "--slots", "lora", "--adapter", "adapters/closed")
    assert code == 0, d
    code, checked = said(capsys, "validate", "exported")
    assert code == 0 and checked["passed"]
    module = load_compressed(base / "compressed").module
    attach(module, "closed", lambda name, _: folder.adapters[name], list(folder.adapters))
    x = images(20, 5)[0]
    session = Session(Path("exported"))
    plain = session.run({"x": x})
    session.swap(payload.parse(Path(d["payloads"][0]["path"]).read_bytes()))
    with torch.no_grad():
        wanted = module(torch.as_tensor(x)).numpy()
    got = session.run({"x": x})
    np.testing.assert_allclose(next(iter(got.values())), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(next(iter(plain.values())) - wanted).max() > 0.1


@pytest.mark.parametrize("kind", ["lora", "core"])
def test_training_starts_from_the_closed_form(base, kind):
    how = {"data": str(base / "train.npz"), "select": str(base / "select.npz"), "adapter_kind": kind, "threads": 1}
    found = recover(base / "compressed", steps=20, rank=64 if kind == "core" else 4, **how).data
    loss = found["loss"]
    assert found["closed"]["mode"] == "auto" and found["closed"]["before"] == loss["before"]
    assert (
        loss["history"][0][1] == found["closed"]["after"] <= loss["before"]
        and loss["after"] <= found["closed"]["after"]
    )
    off = recover(base / "compressed", steps=20, rank=64 if kind == "core" else 4, closed="off", **how).data
    assert off["closed"] is None and off["loss"]["before"] == pytest.approx(loss["before"], rel=1e-6)


@pytest.mark.parametrize(("worse", "applied"), [(0.0, True), (-0.1, True), (0.1, False)])
def test_a_metric_lets_a_closed_form_lower_the_loss_and_no_score(base, monkeypatch, worse, applied):
    """A score that stays is no reason against it, one that gets worse is."""
    plain, seen = Scorer.decide, []

    def decide(self):
        seen.append(plain(self))
        return seen[0] + worse * (len(seen) > 1)

    monkeypatch.setattr(Scorer, "decide", decide)
    how = {"data": str(base / "train.npz"), "select": str(base / "select.npz"), "closed": "only", "rank": 4}
    with contextlib.nullcontext() if applied else pytest.warns(LrcompressWarning, match="the adapter is zero"):
        found = recover(base / "compressed", metric="accuracy", **how).data
    assert len(seen) == 2
    plainly = recover(base / "compressed", **how).data
    assert any(row["applied"] for row in found["closed"]["layers"]) == applied
    for d in (found["closed"], found["loss"]):
        assert d["before"] == pytest.approx(plainly["loss"]["before"])
        assert d["after"] == pytest.approx(plainly["loss"]["after" if applied else "before"])


def test_where_closed_forms_are_left_out(base):
    """Few samples, labels, a kind without one: auto trains from zero; only says why it cannot."""
    few = Data.of_arrays({"x": images(60)[0]}, images(60)[1])
    for options in (
        {"data": few},
        {"data": str(base / "train.npz"), "loss": "labels"},
        {"data": few, "adapter_kind": "loha"},
    ):
        assert recover(base / "compressed", steps=1, rank=2, **options).data["closed"] is None
    with pytest.raises(CommandError, match="lora or core, got loha"):
        recover(base / "compressed", data=few, adapter_kind="loha", closed="only")
    with pytest.raises(CommandError, match="auto, only, off"):
        recover(base / "compressed", data=few, closed="always")


def test_a_network_that_cannot_be_followed_is_trained_from_zero(base, monkeypatch):
    """Whatever stops the pass halfway, the adapters that were set are fresh again; only says what it was."""

    def halfway(*args, **kwargs):
        yield from itertools.islice(closed_pass.observe(*args, **kwargs), 3)
        raise ModelError("the model", "the same layers in every batch", "others")

    monkeypatch.setattr(closed_adapters, "observe", halfway)
    how = {"data": str(base / "train.npz"), "rank": 4, "threads": 1, "steps": 3}
    with pytest.warns(LrcompressWarning, match="training starts from zero"):
        found = recover(base / "compressed", **how)
    off = recover(base / "compressed", **how, closed="off")
    assert found.data["closed"] is None and found.data["loss"] == off.data["loss"]
    with pytest.raises(ModelError, match="the same layers"):
        recover(base / "compressed", **how, closed="only")


def test_nothing_to_correct_leaves_a_zero_adapter(tmp_path):
    """Full rank, nothing trained: the adapter is there, at zero, and a warning says so."""
    torch.save(small().state_dict(), tmp_path / "model.pt")
    with pytest.warns(LrcompressWarning, match="no layer was factorized"):
        lrcompress.factorize(
            tmp_path / "model.pt", rank=10_000, arch="tests.support.nets:small", inputs=SPEC, output=tmp_path / "c"
        )
    with pytest.warns(LrcompressWarning, match="the adapter is zero"):
        found = recover(
            tmp_path / "c", data=Data.of_arrays({"x": images(40, 0)[0]}), rank=2, closed="only", output=tmp_path / "a"
        )
    assert all(not a.delta_weight().any() for a in read_adapter(tmp_path / "a").adapters.values())
    assert found.data["closed"]["before"] == found.data["closed"]["after"]


def test_the_same_data_give_the_same_bytes(base, tmp_path):
    """Only layers that were set carry an adapter, in the file and on the network that is returned."""
    for name in ("one", "two"):
        found = recover(
            base / "compressed",
            data=str(base / "train.npz"),
            rank=3,
            closed="only",
            threads=1,
            name="a",
            output=tmp_path / name,
        )
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    carrying = {n for n, m in factorized_layers(found.model) if "a" in m.adapters}
    applied = {r["layer"] for r in found.data["closed"]["layers"] if r["applied"]}
    assert carrying == applied == set(read_adapter(tmp_path / "two").adapters) and len(applied) < len(
        found.data["closed"]["layers"]
    )


def test_a_refitted_base_is_a_compressed_folder(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ("--data", str(base / "train.npz"), "--select", str(base / "select.npz"))
    code, d = said(capsys, "recover", str(base / "compressed"), *data, "--closed", "refit")
    assert code == 0 and d["output"] == "recovered" and d["after"] < 0.7 * d["before"]
    old, new = load_compressed(base / "compressed"), load_compressed(Path("recovered"))
    assert new.digest != old.digest and new.spec["report"]["refitted_from"] == old.digest
    assert {n: m.rank for n, m in factorized_layers(new.module)} == {
        n: m.rank for n, m in factorized_layers(old.module)
    }
    opened = new.open_original()
    x = {"x": torch.as_tensor(images(120, 2)[0])}
    judge = Judge(opened, opened.module, [x])
    assert judge.loss(new.module) == pytest.approx(d["after"], rel=1e-4) and judge.loss(old.module) > judge.loss(
        new.module
    )
    code, _ = said(capsys, "export", "recovered", "--slots", "none")
    assert code == 0 and said(capsys, "validate", "exported")[1]["passed"]
    text = run(["recover", str(base / "compressed"), *data, "--closed", "refit", "-o", str(base)])
    assert text == 2 and (base / "model.pt").is_file()


def test_folded_normalizations_are_folded_in_the_original_too(tmp_path):
    from tests.support.residual import residual

    torch.save(residual().state_dict(), tmp_path / "m.pt")
    x = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    how = {"ratio": 0.4, "arch": "tests.support.residual:residual", "inputs": SPEC, "cache": False}
    lrcompress.factorize(tmp_path / "m.pt", calib=Data.of_arrays({"x": x}), **how, output=tmp_path / "c")
    base = load_compressed(tmp_path / "c")
    opened = base.open_original()
    network = original_network(base, opened)
    assert base.spec["folded"] and not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    with torch.no_grad():
        torch.testing.assert_close(network(torch.as_tensor(x)), opened.module(torch.as_tensor(x)), rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError):
        fold_again(network, {"gone": "conv1"})
    found = recover(tmp_path / "c", data=Data.of_arrays({"x": x}), rank=4, closed="only").data
    assert found["closed"]["after"] < found["closed"]["before"]
