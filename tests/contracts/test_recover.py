"""Recovery keeps its best state, never ends below its start, and is a function of its seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lrcompress.adapt import kinds
from lrcompress.adapt._files import read_adapter
from lrcompress.model.checkpoint import load_compressed
from lrcompress.payload import parse
from lrcompress.recover import losses
from lrcompress.runtime import Session
from lrcompress.verbs.export import export
from lrcompress.verbs.factorize import factorize
from lrcompress.verbs.recover import recover
from tests.support.nets import images, small
from tests.support.recovering import SPEC, data, run, small_compressed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_compressed(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", kinds())
def test_distillation_lowers_the_loss_and_ships_what_it_says(base, kind, tmp_path):
    found = run(base, adapter_kind=kind, data=data(800), select=data(200, 77), output=tmp_path / "a").data
    assert found["loss"]["kind"] == "logits"
    assert found["loss"]["after"] < 0.97 * found["loss"]["before"]
    folder = read_adapter(tmp_path / "a")
    assert folder.kind == kind and folder.n_params == found["trainable_params"]
    assert found["payload_bytes"] == 4 * found["trainable_params"]
    assert folder.base == load_compressed(base / "compressed").digest


def test_same_seed_same_bytes(base, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        run(base, seed=seed, steps=12, output=tmp_path / name)
    one, two, other = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two", "other"))
    assert one == two != other


def test_the_best_state_is_kept_and_the_start_is_a_candidate(base):
    """A learning rate that ruins everything ends exactly where it began."""
    found = run(base, learning_rate=50.0, steps=20)
    d = found.data["loss"]
    assert d["after"] <= d["before"] and d["after"] == min(v for _, v in d["history"] if math.isfinite(v))


def test_the_loss_that_is_reported_is_the_loss_of_what_is_kept(base, tmp_path):
    select = data(50, 7)
    found = run(base, select=select, output=tmp_path / "a")
    compressed = load_compressed(base / "compressed")
    teacher = compressed.open_original().module
    batch = next(iter(select.batches(50)))
    with torch.no_grad():
        x = torch.as_tensor(batch.inputs["x"])
        value = losses.logits(found.model(x), teacher(x)).mean()
    assert float(value) == pytest.approx(found.data["loss"]["after"], rel=1e-4)


def test_only_the_adapter_changes(base):
    before = load_compressed(base / "compressed").module.state_dict()
    after = run(base, steps=10).model.state_dict()
    assert all(
        torch.equal(v, after[k] if k in after else after[k.replace(".weight", ".weight")]) for k, v in before.items()
    )
    assert any("lora_A" in k for k in after)


def test_labels_and_metric(base):
    found = run(base, loss="labels", metric="accuracy").data
    assert found["metric"] == "accuracy" and found["after"] >= found["before"]
    assert found["original"] is None or 0 <= found["original"] <= 1


@pytest.mark.parametrize("closed", ["off", "auto"])
def test_weight_decomposed_from_the_first_loss_to_the_runtime(base, closed, tmp_path):
    """Before the first step the norms are those of what is there: the start is the base, or what closed forms made it."""
    plain = run(base, closed=closed, steps=4).data
    found = run(base, dora=True, rslora=True, closed=closed, output=tmp_path / "adapters" / "d")
    start = found.data["loss"]["history"][0][1]
    if closed == "off":
        assert found.data["loss"]["before"] == pytest.approx(plain["loss"]["before"], rel=1e-5)
    assert start == pytest.approx(plain["loss"]["history"][0][1], rel=1e-5)
    assert found.data["loss"]["after"] < 0.95 * found.data["loss"]["before"] and found.data["dora"]
    folder = read_adapter(tmp_path / "adapters" / "d")
    assert all(a.magnitude is not None and a.rslora for a in folder.adapters.values())
    assert folder.n_params == found.data["trainable_params"]
    x, _ = images(5, 9)
    with torch.no_grad():
        expected = found.model.eval()(torch.as_tensor(x)).numpy()
    export(base / "compressed", slots=("dora",), adapters=[tmp_path / "adapters" / "d"], output=tmp_path / "exported")
    session = Session(tmp_path / "exported")
    session.swap(parse((tmp_path / "exported" / "payloads" / "d.safetensors").read_bytes()))
    np.testing.assert_allclose(session.run({"x": x})["output"], expected, atol=2e-5)


# the factors themselves -----------------------------------------------------------------------------------------------


def net(base, tmp_path, **options):
    options = {
        "train": "factors",
        "steps": 60,
        "data": data(),
        "threads": 1,
        "temperature": 2.0,
        "mix": False,
        "output": tmp_path / "recovered",
        **options,
    }
    return recover(base / "compressed", **options)


def test_trained_factors_are_another_checkpoint_of_the_same_size(base, tmp_path):
    found = net(base, tmp_path)
    d = found.data
    assert d["loss"]["after"] < 0.95 * d["loss"]["before"] and d["adapter"] is None
    before, after = load_compressed(base / "compressed"), load_compressed(tmp_path / "recovered")
    assert after.digest != before.digest and after.spec["source"]["digest"] == before.spec["source"]["digest"]
    assert after.open_original().digest == before.open_original().digest
    old, new = before.module.state_dict(), after.module.state_dict()
    assert {n: v.shape for n, v in old.items()} == {n: v.shape for n, v in new.items()}
    assert after.spec["folded"] == before.spec["folded"] and after.spec["folded"]
    x = torch.as_tensor(images(20, 5)[0])
    with torch.no_grad():
        torch.testing.assert_close(after.module(x), found.model(x), rtol=0, atol=0)
    # It goes on like any other: trained again, and exported.
    alike = {"data": data(), "threads": 1, "temperature": 2.0, "mix": False}
    again = recover(tmp_path / "recovered", steps=4, rank=2, output=tmp_path / "a", **alike)
    assert again.data["loss"]["before"] == pytest.approx(d["loss"]["after"], rel=1e-4)
    assert read_adapter(tmp_path / "a").base == after.digest


def test_only_factors_biases_and_scales_are_trained(base, tmp_path):
    """A normalization that was not folded keeps its statistics; weights that stayed dense keep their bits."""
    torch.save(small().state_dict(), tmp_path / "model.pt")
    made = {"rank": 3, "arch": "tests.support.nets:small", "inputs": SPEC, "output": tmp_path / "plain"}
    factorize(tmp_path / "model.pt", include=["fc1", "conv2"], **made)
    before = load_compressed(tmp_path / "plain").module.state_dict()
    recover(
        tmp_path / "plain",
        data=data(),
        train="factors",
        steps=20,
        threads=1,
        output=tmp_path / "out",
        learning_rate=3e-3,
    )
    after = load_compressed(tmp_path / "out").module.state_dict()
    same = {n for n in before if torch.equal(before[n], after[n])}
    frozen = {
        n for n in before if n.startswith(("bn.running", "bn.num")) or n in ("conv1.weight", "mix.weight", "fc2.weight")
    }
    assert same == frozen, same ^ frozen


def test_a_rate_that_ruins_everything_leaves_the_factors_bit_for_bit(base, tmp_path):
    d = net(base, tmp_path, learning_rate=30.0, steps=8).data
    assert d["best_step"] == 0 and d["after"] == d["before"]
    before, after = load_compressed(base / "compressed"), load_compressed(tmp_path / "recovered")
    assert before.digest == after.digest


def test_the_plain_gauge_is_the_same_network_and_the_way_back_too(base):
    from lrcompress.recover import trained

    module = load_compressed(base / "compressed").module
    forms = {n: m.form for n, m in trained.factorized_layers(module)}
    assert any(f.startswith("pivoted") for f in forms.values())
    x = torch.as_tensor(images(30, 4)[0])
    with torch.no_grad():
        before = module(x)
        changed = trained.to_plain_gauge(module)
        assert changed == {n: f for n, f in forms.items() if f.startswith("pivoted") or f in ("svd", "spatial_svd")}
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-4)
        for _, layer in trained.factorized_layers(module):
            if layer.form == "svd":
                rows, columns = layer.V.flatten(1).norm(dim=1), layer.U.norm(dim=0)
                torch.testing.assert_close(rows, columns)
        trained.to_own_gauge(module, changed)
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-4)
    assert {n: m.form for n, m in trained.factorized_layers(module)} == forms
