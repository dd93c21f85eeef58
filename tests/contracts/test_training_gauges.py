"""Trained factors go back into the gauge of their form, or stay in the plain one where that would cost accuracy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import lrcompress
from lrcompress.errors import LrcompressWarning
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.recover import trained
from lrcompress.recover.training import Training
from lrcompress.runtime import Session
from lrcompress.verbs import recovering
from lrcompress.verbs.recover import recover
from tests.support.nets import images, small
from tests.support.training import RATE, data


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder whose conv2 is a pivoted spatial pair, and whose other layers are what they were."""
    folder = tmp_path_factory.mktemp("gauges")
    torch.save(small().state_dict(), folder / "model.pt")
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(
        folder / "model.pt", rank=4, method="pivoted_spatial", include=["conv2"], arch="tests.support.nets:small",
        inputs=spec, output=folder / "compressed",
    )  # fmt: skip
    return folder / "compressed"


def each_at_a_tap(second: torch.Tensor) -> None:
    """Let each of the first three components live at one tap alone: no tap has the rank that all have together."""
    out, rank = second.shape[:2]
    with torch.no_grad():
        second.view(out, rank, 3)[:, :3] *= torch.eye(3)


def stored_numbers(folder) -> int:
    layer = load_compressed(folder).module.conv2
    return sum(f.numel() for f in layer.factors.values() if f.is_floating_point())


@pytest.fixture
def told(monkeypatch):
    """Return the answers of the network as it was trained, and after each of its layers was put back."""
    answers, plain = [], trained.to_own_gauge

    def to_own_gauge(module, forms):
        for change in (lambda: None, lambda: plain(module, forms)):
            change()
            with torch.no_grad():
                answers.append(module(torch.as_tensor(images(30, 4)[0])))

    monkeypatch.setattr(recovering.trained, "to_own_gauge", to_own_gauge)
    return answers


def run(base, output, monkeypatch, *, singular: bool):
    """Train `conv2`, and say of every state that it is better than the one before."""
    plain, values = Training.step, iter([1.0, 0.5, 0.5])

    def step(self, *args, **options):
        found = plain(self, *args, **options)
        if singular:
            each_at_a_tap(self.trained.parameters["conv2.second"])
        return found

    monkeypatch.setattr(Training, "step", step)
    monkeypatch.setattr(Training, "decide", lambda self: next(values))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = recover(base, data=data(), train="factors", steps=1, evaluations=1, output=output, **RATE)
    return found, [str(w.message) for w in said if issubclass(w.category, LrcompressWarning)]


def test_a_layer_whose_gauge_is_refused_stays_plain_and_says_so(base, tmp_path, monkeypatch, told):
    found, said = run(base, tmp_path / "out", monkeypatch, singular=True)
    (line,) = said
    assert line.startswith("conv2: pivoted_spatial would lose accuracy now (expected terms of at most 1e+03 times")
    assert line.endswith("it stays spatial_svd, which takes a few more numbers") and "\n" not in line
    before, after = told
    assert torch.equal(before, after)
    again = load_compressed(tmp_path / "out")
    assert again.module.conv2.form == "spatial_svd" and again.spec["layers"]["conv2"]["form"] == "spatial_svd"
    x = images(30, 4)[0]
    with torch.no_grad():
        answers = again.module(torch.as_tensor(x))
    torch.testing.assert_close(answers, after, rtol=1e-5, atol=1e-5)
    assert torch.equal(answers, found.model(torch.as_tensor(x)))
    # 16 = 4², the numbers that the other gauge would have saved, are in what the report counts.
    assert stored_numbers(tmp_path / "out") == stored_numbers(base) + 16
    biases = sum(p.numel() for n, p in again.module.named_parameters() if n.endswith("bias") or n.startswith("bn."))
    assert found.data["trainable_params"] == stored_numbers(tmp_path / "out") + biases
    # It goes on like any other: exported, run, and trained again, now in the gauge that it has.
    lrcompress.export(tmp_path / "out", output=tmp_path / "exported", name="small")
    np.testing.assert_allclose(
        Session(tmp_path / "exported").run({"x": x})["output"], answers.numpy(), rtol=1e-4, atol=1e-4
    )
    monkeypatch.undo()
    recover(tmp_path / "out", data=data(), train="factors", steps=4, output=tmp_path / "more", **RATE)
    assert load_compressed(tmp_path / "more").module.conv2.form == "spatial_svd"


def test_a_layer_whose_gauge_holds_goes_back_without_a_word(base, tmp_path, monkeypatch, told):
    found, said = run(base, tmp_path / "out", monkeypatch, singular=False)
    before, after = told
    assert not said and load_compressed(tmp_path / "out").module.conv2.form == "pivoted_spatial"
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, after) and stored_numbers(tmp_path / "out") == stored_numbers(base)
    with torch.no_grad():
        torch.testing.assert_close(found.model(torch.as_tensor(images(30, 4)[0])), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "layers"),
    [("pivoted", ["fc1", "mix"]), ("pivoted_tucker", ["conv2"]), ("pivoted_spatial", ["conv1", "conv2"])],
)
def test_there_and_back_is_the_same_network_in_every_form(tmp_path, method, layers):
    torch.save(small().state_dict(), tmp_path / "model.pt")
    spec = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
    lrcompress.factorize(
        tmp_path / "model.pt", rank=3, method=method, include=layers, arch="tests.support.nets:small", inputs=spec,
        output=tmp_path / "compressed",
    )  # fmt: skip
    module = load_compressed(tmp_path / "compressed").module
    x = torch.as_tensor(images(30, 4)[0])
    with torch.no_grad():
        before = module(x)
        sizes = {n: sum(f.numel() for f in m.factors.values()) for n, m in trained.factorized_layers(module)}
        changed = trained.to_plain_gauge(module)
        assert changed == dict.fromkeys(layers, method)
        assert not any(module.get_submodule(n).form.startswith("pivoted") for n in layers)
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-4)
        trained.to_own_gauge(module, changed)
        torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-4)
    assert {n: sum(f.numel() for f in m.factors.values()) for n, m in trained.factorized_layers(module)} == sizes
