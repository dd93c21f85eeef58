"""What recovery refuses, in one clear line each, and what it logs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrcompress.data import Data
from lrcompress.errors import CommandError, DataError, HostError, ModelError
from tests.support.nets import images, small
from tests.support.recovering import data, run, small_compressed


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_compressed(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"adapter_kind": "lokr", "dora": True}, CommandError, "--dora: expected --adapter lora, got lokr"),
        ({"train": "factors", "rslora": True}, CommandError, "--rslora: expected --adapter lora, got factors"),
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


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "logits=1,lables=0.5"}, CommandError, "did you mean 'labels'"),
        ({"loss": "logits=0"}, CommandError, "above 0"),
        ({"loss": "logits=x"}, CommandError, "above 0"),
        ({"loss": "logits=nan"}, CommandError, "above 0"),
        ({"loss": "logits=1,logits=2"}, CommandError, "each loss once"),
        ({"loss": "auto=1,logits=2"}, CommandError, "auto means it"),
        ({"loss": ""}, CommandError, "auto or one of"),
        ({"loss": "auto=1,hidden=1", "hidden": ("layer9*",)}, CommandError, "layer9*"),
        ({"hidden": ("fc*",)}, CommandError, "the loss hidden"),
        ({"learning_rate": -1.0}, CommandError, "--lr: expected a number above 0, got -1"),
        ({"learning_rate": 0.0}, CommandError, "--lr"),
        ({"learning_rate": "fast"}, CommandError, "auto, or a number"),
        ({"accumulate": 0}, CommandError, "--accumulate"),
        ({"patience": -1}, CommandError, "--patience"),
        ({"max_seconds": 0.0}, CommandError, "--max-seconds"),
        ({"precision": "fp8"}, CommandError, "one of auto, fp32, bf16"),
        ({"train": "all"}, CommandError, "adapters or factors"),
        ({"checkpointing": True}, CommandError, "blocks that repeat"),
        ({"shard_teacher": True}, CommandError, "more than one process"),
        ({"processes": 2}, HostError, "torchrun"),
        ({"select": Data.of_arrays({"x": np.zeros((4, 3, 9, 9), np.float32)})}, DataError, "(3, 8, 8)"),
        ({"select": Data.of_arrays({"z": np.zeros((4, 3, 8, 8), np.float32)})}, DataError, "inputs x"),
        ({"data": data(1), "select": data(3)}, DataError, "at least 2 samples"),
        (
            {"loss": "labels", "data": Data.of_arrays({"x": images(20)[0]}, np.full(20, 0.5))},
            DataError,
            "class numbers",
        ),
        ({"loss": "labels", "data": Data.of_arrays({"x": images(20)[0]}, np.full(20, -1))}, DataError, "0…4, got -1"),
    ],
)
def test_more_bad_input_is_one_clear_line(base, options, error, words, tmp_path):
    with pytest.raises(error) as e:
        run(base, **options, output=tmp_path / "out")
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_what_is_not_finite_names_its_step_and_leaves_nothing(base, tmp_path):
    x, y = images(40)
    x[37] = np.nan
    with pytest.raises(DataError, match=r"at step \d+: x: expected finite inputs"):
        run(
            base,
            data=Data.of_arrays({"x": x}, y),
            select=data(20),
            learning_rate=1e-3,
            batch_size=4,
            output=tmp_path / "out",
        )
    with pytest.raises(ModelError, match=r"finite loss, got (nan|inf) at step \d+; lower the learning rate"):
        run(base, learning_rate=1e30, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_augmenting_what_is_no_image(tmp_path):
    from lrcompress.recover.order import Augment

    with pytest.raises(CommandError, match="one input of images"):
        Augment.of(Data.of_arrays({"x": np.zeros((4, 30), np.float32)}), 0)


def test_a_log_that_cannot_be_written_says_what_to_install(base, tmp_path, monkeypatch):
    from lrcompress.recover import logs

    monkeypatch.setattr(logs, "available", lambda: False)
    run(base, steps=2, learning_rate=1e-3, output=tmp_path / "quiet")
    with pytest.raises(HostError, match="pip install tensorboard"):
        run(base, steps=2, learning_rate=1e-3, log=tmp_path / "log", output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["quiet"]


def test_a_log_takes_every_loss(base, tmp_path, monkeypatch):
    """With a writer in the place of TensorBoard's: what it is given, where, and that it is closed."""
    import sys
    import types

    seen, closed = [], []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, tag, value, step):
            seen.append((tag, step))

        def close(self):
            closed.append(self.folder)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    run(base, steps=4, learning_rate=1e-3, output=tmp_path / "a")
    assert closed == [str(tmp_path / "a.tensorboard")]
    assert [s for t, s in seen if t == "loss/train"] == [1, 2, 3, 4] and ("loss/select", 4) in seen
