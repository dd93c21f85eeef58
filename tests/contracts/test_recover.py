"""Recovery keeps its best state, never ends below its start, and is a function of its seed."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch

from lrcompress.adapt import kinds
from lrcompress.adapt._files import read_adapter
from lrcompress.data import Data
from lrcompress.errors import CommandError, DataError, HostError, ModelError
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.payload import parse
from lrcompress.recover import losses
from lrcompress.runtime import Session
from lrcompress.verbs.export import export
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
    # A temperature at which each sample is asked once, and bounds that a loss in units of probability can keep.
    plain = {"data": data(), "steps": 60, "rank": 4, "threads": 1, "temperature": 2.0, "mix": False}
    return recover(base / "compressed", **{**plain, **options})


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


@pytest.mark.parametrize("train", ["factors", "adapters"])
def test_pieces_checkpoints_and_rebuilt_kernels_change_no_gradient(base, train, monkeypatch):
    """A batch in three pieces, kernels multiplied out: the step of the plain batch up to rounding."""
    from lrcompress.verbs import recovering

    def after(**options):
        found = recover(
            base / "compressed",
            data=data(),
            train=train,
            steps=3,
            learning_rate=1e-3,
            threads=1,
            batch_size=50,
            **options,
        )
        return {n: v for n, v in found.model.state_dict().items() if v.is_floating_point()}

    monkeypatch.setattr(recovering, "turn", lambda *_, **__: None)  # rounding turns directions that are equally strong
    one, three = after(), after(accumulate=3)
    monkeypatch.setattr(recovering, "rebuilt_kernels", lambda module: contextlib.nullcontext())
    factored = after()
    for other in (three, factored):
        assert any(not torch.equal(one[n], other[n]) for n in one)
        for n in one:
            torch.testing.assert_close(one[n], other[n], rtol=1e-3, atol=2e-5)


def test_the_teacher_is_asked_once_for_every_sample(base, monkeypatch):
    from lrcompress.recover import teacher

    asked = []
    plain = teacher.Teacher.__init__

    def counting(self, ask, *args, **kwargs):
        plain(self, lambda inputs: (asked.append(len(inputs["x"])), ask(inputs))[1], *args, **kwargs)

    monkeypatch.setattr(teacher.Teacher, "__init__", counting)
    run(base, steps=30, batch_size=32, learning_rate=1e-3, select=data(20, 9))
    assert sum(asked) == 160
    asked.clear()
    run(base, steps=30, batch_size=32, learning_rate=1e-3, select=data(20, 9), augment=True)
    assert sum(asked) == (2 + 30) * 32, "two looks at a gradient, and thirty steps"


def test_answers_that_are_kept_are_those_of_the_first_batches():
    from lrcompress.recover.teacher import Teacher

    inputs = torch.arange(10.0)

    def ask(given):  # depends on the batch, as a matrix product's last bits do
        return {"answer": given["x"] + 100 * len(given["x"])}

    first = [np.array([3, 1, 4]), np.array([0, 2]), np.array([5, 6, 7, 8, 9])]
    whole = Teacher(ask, lambda u: {"x": inputs[u]}, first, units=10)
    for piece in first:
        whole.answers(piece, {"x": inputs[piece]})
    resumed = Teacher(ask, lambda u: {"x": inputs[u]}, first, units=10)
    later = np.array([9, 0, 3, 1])
    for t in (whole, resumed):
        assert t.answers(later, {"x": inputs[later]})["answer"].tolist() == [509, 200, 303, 301]
    small_ = Teacher(ask, lambda u: {"x": inputs[u]}, first, units=10, most_bytes=39)
    assert small_.answers(later, {"x": inputs[later]})["answer"].tolist() == [409, 400, 403, 401]


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    from lrcompress.recover.order import Augment, Order

    order = Order(10, 4, seed=3)
    assert [b.tolist() for b in order.epoch(2)] == [b.tolist() for b in Order(10, 4, 3).epoch(2)]
    assert np.array_equal(np.sort(np.concatenate(order.epoch(5))), np.arange(10)) and order.batches == 3
    assert not np.array_equal(order.epoch(1)[0], order.epoch(2)[0]) or not np.array_equal(
        order.epoch(1)[1], order.epoch(2)[1]
    )
    x, _ = images(10)
    augment = Augment.of(Data.of_arrays({"x": x}), 7)
    every = augment({"x": torch.as_tensor(x)}, np.arange(10), 4)["x"]
    some = augment({"x": torch.as_tensor(x[[8, 2]])}, np.array([8, 2]), 4)["x"]
    assert torch.equal(some, every[[8, 2]])
    draws = augment._draws(4)[:, 0]
    for i, (flip, down, right) in enumerate(draws):
        padded = np.pad(x[i], ((0, 0), (1, 1), (1, 1)), mode="reflect")
        shifted = padded[:, int(down * 3) :, int(right * 3) :][:, :8, :8]
        assert np.array_equal(every[i].numpy(), shifted[:, :, ::-1] if flip < 0.5 else shifted)


def test_a_run_that_the_clock_ends_reaches_the_end_of_its_schedule():
    from lrcompress.recover.schedule import Schedule

    by_clock = Schedule(None, 10.0, 0.05)
    assert by_clock.rate(by_clock.position(700, 10.0)) == 0 and by_clock.rate(by_clock.position(700, 0.5)) == 1
    both = Schedule(100, 10.0, 0.05)
    assert (
        both.position(50, 2.0) == 0.5 and both.position(50, 8.0) == 0.8 and both.remaining(50, 8.0) == pytest.approx(2)
    )
    assert Schedule(10, None, 0.05).rate(0.0) == 1 and [
        Schedule(100, None, 0.05).rate(i / 100) for i in range(3)
    ] == pytest.approx([0.2, 0.4, 0.6])


def test_time_is_kept(base):
    import time

    before = time.perf_counter()
    d = run(base, max_seconds=2.0, steps=None).data
    assert d["stopped"] == "time" and 1.5 < time.perf_counter() - before < 4 and not d["same_anywhere"] and d["rates"]


def test_patience(base):
    d = run(base, learning_rate=20.0, steps=400, patience=2).data
    assert d["stopped"] == "patience" and d["steps"] < 200


def test_a_search_finds_a_rate_near_what_was_asked_for_nothing(base):
    """It walks to where the loss is least, and looks at both sides of it."""
    from lrcompress.recover.rates import _next, rate_at

    loss = {k: (k + 3) ** 2 for k in range(-9, 9)}
    seen = {}
    while (k := _next(seen)) is not None:
        seen[k] = loss[k]
    assert min(seen, key=seen.get) == -3 and sorted(seen) == list(range(-4, 1))
    assert rate_at(1e-3, 1) == 3.2e-3 and rate_at(3e-3, -2) == 3e-4


def test_hidden_states_are_those_of_blocks(base):
    from lrcompress.recover.blocks import blocks_of, hidden_states
    from recipes.archs.cifar_resnet import resnet20

    assert blocks_of(resnet20()) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]
    found = load_compressed(base / "compressed")
    # No block repeats here: layer by layer, and where a normalization was folded, behind it.
    assert hidden_states(found.module, (), found.spec["folded"])[0] == "bn" and not blocks_of(found.module)
    assert run(base, loss="auto=1,hidden=0.5", hidden=("mix", "fc*"), steps=8).data["loss"]["weights"] == {
        "logits": 1.0,
        "hidden": 0.5,
    }


def test_energies_make_a_loss_free_of_units():
    """A teacher ten times as large, and a student with it, have the same losses."""
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(6, 7, 5, generator=g), torch.randn(6, 7, 5, generator=g)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1], [7], [2]])).long()
    for rows, loss in ((False, losses.hidden), (True, losses.embedding)):
        a = loss(s, t, mask, energy=losses.energy_of(t, mask, rows=rows))
        b = loss(10 * s, 10 * t, mask, energy=losses.energy_of(10 * t, mask, rows=rows))
        torch.testing.assert_close(a, b)
        changed = s + 100 * (1 - mask[..., None])
        torch.testing.assert_close(loss(changed, t, mask, energy=2.0), loss(s, t, mask, energy=2.0))


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


def test_answers_beyond_the_room_for_them_are_asked_for_again(base, monkeypatch):
    """Held-out data whose answers do not fit into memory give the same losses."""
    from lrcompress.recover import objective

    options = {"steps": 6, "learning_rate": 1e-3, "loss": "logits=1,hidden=1"}
    monkeypatch.setattr(objective, "KEPT_BYTES", 1 << 30)
    kept = run(base, **options).data["loss"]["history"]
    monkeypatch.setattr(objective, "KEPT_BYTES", 0)
    assert run(base, **options).data["loss"]["history"] == kept
