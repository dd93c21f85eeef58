"""Recovery keeps its best state, never ends below its start, and is a function of its seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lrcompress.adapt import adapter_class, kinds
from lrcompress.adapt._files import read_adapter
from lrcompress.data import Data
from lrcompress.errors import CommandError, DataError, ModelError
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.recover import losses
from lrcompress.verbs.factorize import factorize
from lrcompress.verbs.recover import recover
from tests.support.nets import images, small

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.save(small().state_dict(), folder / "model.pt")
    x, _y = images()
    calib = Data.of_arrays({"x": x})
    factorize(
        folder / "model.pt",
        ratio=0.2,
        calib=calib,
        arch="tests.support.nets:small",
        inputs=SPEC,
        output=folder / "compressed",
    )
    return folder


def data(n: int = 160, seed: int = 1) -> Data:
    x, y = images(n, seed)
    return Data.of_arrays({"x": x}, y)


def run(base, **options):
    return recover(base / "compressed", **{"data": data(), "steps": 60, "rank": 4, "threads": 1, **options})


@pytest.mark.parametrize("kind", kinds())
def test_distillation_lowers_the_loss_and_ships_what_it_says(base, kind, tmp_path):
    found = run(base, adapter_kind=kind, output=tmp_path / "a").data
    assert found["loss"]["kind"] == "logits"
    # A core cannot leave what the factors span.
    assert found["loss"]["after"] < (0.97 if adapter_class(kind).in_core else 0.9) * found["loss"]["before"]
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


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"adapter_kind": "lokx"}, CommandError, "one of core, loha, lokh, lokr, lora"),
        ({"rank": 0}, CommandError, "at least 1"),
        ({"name": "a/b"}, CommandError, "letters"),
        ({"loss": "hinge"}, CommandError, "auto or one of"),
        ({"steps": 0}, CommandError, "at least 1"),
        ({"data": data(1)}, DataError, "at least 2 samples"),
        ({"loss": "labels", "data": Data.of_arrays({"x": images(20)[0]})}, DataError, "labels"),
        ({"loss": "labels", "data": Data.of_arrays({"x": images(20)[0]}, np.full(20, 9))}, DataError, "0…4"),
        ({"original": "/nowhere/model.pt"}, ModelError, "nothing there"),
    ],
)
def test_bad_input_is_one_clear_line(base, options, error, words):
    with pytest.raises(error) as e:
        run(base, **options)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_another_original_is_refused(base, tmp_path):
    torch.manual_seed(1)
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in small().state_dict().items()}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="digest"):
        run(base, original=tmp_path / "other.pt")


def test_losses_are_zero_at_the_teacher_and_positive_elsewhere():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    for loss in (losses.logits, losses.embedding, losses.hidden):
        assert float(loss(a, a).abs().max()) == pytest.approx(0, abs=1e-6) and float(loss(a, b).min()) > 0.01
    p, q = torch.softmax(b / 2, -1), torch.softmax(a / 2, -1)
    kl = (p * (p / q).log()).sum(-1).mean() * 4
    torch.testing.assert_close(losses.logits(a, b).mean(), kl)
    assert losses.auto("sentence_embedding", a) == "embedding" and losses.auto("output", a) == "logits"
    assert losses.auto("output", torch.nn.functional.normalize(a, dim=-1)) == "embedding"
