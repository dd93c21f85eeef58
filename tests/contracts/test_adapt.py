"""`adapt` compares kinds within the same bytes, keeps the best, and goes on where it was killed."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress import payload as payloads
from lrcompress.adapt import kinds
from lrcompress.adapt._files import read_adapter
from lrcompress.adapt.core import metric_of
from lrcompress.cli.main import run
from lrcompress.data import Data
from lrcompress.errors import BudgetError, CommandError, DataError
from lrcompress.export.payloads import payload_tensors
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.surgery import factorized_layers
from lrcompress.recover.share import prices, ranks_within
from lrcompress.verbs import adapt as verb
from lrcompress.verbs import recovering
from tests.support.nets import grouped, images, small
from tests.support.training import weight_gradients

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
OPTIONS = {"steps": 40, "learning_rate": 0.02, "threads": 1, "metric": "accuracy"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.save(small().state_dict(), folder / "model.pt")
    lrcompress.factorize(
        folder / "model.pt", ratio=0.4, method="svd", arch="tests.support.nets:small", inputs=SPEC, output=folder / "compressed"
    )  # fmt: skip
    return folder


def shifted(n: int, seed: int) -> Data:
    """Return images whose contrast is turned, with their labels."""
    x, y = images(n, seed)
    return Data.of_arrays({"x": (-0.6 * x).astype(np.float32)}, y)


def test_every_kind_stays_within_the_bytes_and_the_best_is_written(base, tmp_path):
    found = lrcompress.adapt(
        base / "compressed", data=shifted(240, 1), select=shifted(120, 2), max_bytes=1500, output=tmp_path / "a", **OPTIONS
    )  # fmt: skip
    d = found.data
    assert {row["kind"] for row in d["kinds"]} == set(kinds())
    assert all(row["numbers"] < row["bytes"] <= 1500 for row in d["kinds"])
    best = next(row for row in d["kinds"] if row["kind"] == d["best"])
    assert d["after"] == best["after"] == max(row["after"] for row in d["kinds"]) > d["before"]
    folder = read_adapter(tmp_path / "a")
    assert (
        folder.kind == d["best"] and folder.n_params == best["numbers"] and set(folder.adapters) == set(best["ranks"])
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing stays beside the output"
    batch = next(iter(shifted(120, 2).batches(120)))
    with torch.no_grad():
        said = found.model.eval()(torch.as_tensor(batch.inputs["x"])).argmax(1)
    assert float((said == torch.as_tensor(batch.labels)).float().mean()) == pytest.approx(d["after"], abs=1e-6)


@pytest.fixture(scope="module")
def exported(base):
    lrcompress.export(base / "compressed", output=base / "exported")
    return base / "exported"


@pytest.mark.parametrize("encoding", ["int4", "int8", "f16"])
@pytest.mark.parametrize("kind", kinds())
def test_the_bytes_are_those_of_a_payload_which_changes_nothing(base, exported, tmp_path, kind, encoding):
    how = {**OPTIONS, "steps": 20, "max_bytes": 1500, "adapter_kinds": (kind,), "encoding": encoding}
    found = lrcompress.adapt(
        base / "compressed", data=shifted(160, 1), select=shifted(120, 2), output=tmp_path / "a", **how
    )
    (row,) = found.data["kinds"]
    assert row["after"] > row["before"]
    manifest = Manifest.load(exported)
    of, tensors = payload_tensors(tmp_path / "a", manifest)
    data = payloads.build(tensors, manifest=manifest, kind=of, encoding=encoding)
    # Layers that are left as they are.
    alone = {n for n, v in tensors.items() if v.size == 0 or (v.size == 1 and not v.any())}
    parts = {n: len(p.data) for n, p in payloads.layout(data).parts.items()}
    assert sum(size for n, size in parts.items() if not {n, n.rpartition(".")[0]} & alone) == row["bytes"]
    if encoding != "f16":
        for name, value in payloads.parse(data).tensors.items():
            np.testing.assert_allclose(value, tensors[name], rtol=2e-6, atol=0, err_msg=name)


def test_rounding_that_takes_back_what_was_won_ends_at_the_start(base, tmp_path, monkeypatch):
    """One that leaves no number of B, which no gain survives; A is what it was before the training, too."""
    how = {"data": shifted(160, 1), "select": shifted(120, 2), "adapter_kinds": ("lora",), **OPTIONS}
    lrcompress.adapt(base / "compressed", output=tmp_path / "won", **how)
    rounds, real = [], recovering.as_stored

    def forgets(value, encoding):
        rounds.append(value.shape)
        return np.zeros_like(value) if len(rounds) % 2 == 0 else real(value, encoding)

    monkeypatch.setattr(recovering, "as_stored", forgets)
    found = lrcompress.adapt(base / "compressed", output=tmp_path / "lost", **how)
    (row,) = found.data["kinds"]
    assert row["after"] == row["before"] and "no kind learnt anything" in " ".join(found.data["hints"])
    won, lost = (read_adapter(tmp_path / n).adapters for n in ("won", "lost"))
    assert won.keys() == lost.keys() and len(rounds) == 6 * len(won)
    for name, adapter in lost.items():
        assert not bool(adapter.lora_B.any()) and bool(won[name].lora_B.any())
        assert bool(adapter.lora_A.any()) and not torch.equal(adapter.lora_A, won[name].lora_A)


def test_what_was_done_before_a_kill_is_not_done_again(base, tmp_path, monkeypatch):
    asked = {"data": shifted(160, 1), "adapter_kinds": ("lora", "loha"), "output": tmp_path / "a", **OPTIONS}
    trained, real = [], verb.recover

    def dies(*args, adapter_kind, **options):
        if adapter_kind == "loha" and not trained.count("loha"):
            trained.append("loha")
            raise KeyboardInterrupt
        trained.append(adapter_kind)
        return real(*args, adapter_kind=adapter_kind, **options)

    monkeypatch.setattr(verb, "recover", dies)
    with pytest.raises(KeyboardInterrupt):
        verb.adapt(base / "compressed", **asked)
    assert not (tmp_path / "a").exists()
    broken = verb.adapt(base / "compressed", **asked).data
    assert trained == ["lora", "loha", "loha"]
    whole = verb.adapt(base / "compressed", **{**asked, "output": tmp_path / "b"}).data
    assert [(r["kind"], r["after"], r["loss"]) for r in broken["kinds"]] == [
        (r["kind"], r["after"], r["loss"]) for r in whole["kinds"]
    ]
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_the_command_prints_a_row_for_every_kind(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x, y = images(160, 1)
    np.savez("new.npz", x=(-0.6 * x).astype(np.float32), y=y)
    words = [
        "adapt",
        str(base / "compressed"),
        "--data",
        "new.npz",
        "--adapter",
        "lora,core",
        "--steps",
        "10",
        "--lr",
        "0.01",
    ]
    assert run([*words, "--metric", "accuracy", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "lora" in said and "core" in said and "written to adapters/adapt" in said
    assert run([*words, "--max-bytes", "10", "--json"]) == 11
    said = json.loads(capsys.readouterr().out)
    assert said["error"]["kind"] == "budget" and "allow" in said["error"]["remedy"]


def test_kinds_that_nobody_asked_for_may_be_too_large(base):
    """Said, not refused; where none fits, the error names what the smallest of all takes."""
    how = {"data": shifted(80, 1), "select": shifted(40, 2), "steps": 2, "learning_rate": 0.01, "threads": 1}
    with pytest.raises(BudgetError) as refused:
        lrcompress.adapt(base / "compressed", max_bytes=10, **how)
    kind, least = re.search(r"the smallest (\w+) takes (\d+)", str(refused.value)).groups()
    found = lrcompress.adapt(base / "compressed", max_bytes=int(least), **how).data
    tried = {row["kind"] for row in found["kinds"]}
    left_out = {re.match("left out: (\\w+), the smallest takes", h)[1] for h in found["hints"] if "left out" in h}
    assert kind in tried and left_out and tried | left_out == set(kinds()) and not tried & left_out
    with pytest.raises(BudgetError, match=f"the smallest {(other := min(left_out))} takes"):
        lrcompress.adapt(base / "compressed", max_bytes=int(least), adapter_kinds=(kind, other), **how)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_bytes": 1}, BudgetError),
        ({"encoding": "f8"}, CommandError),
        ({"adapter_kinds": ("lora", "lorax")}, CommandError),
        ({"data": shifted(1, 1)}, DataError),
        ({"data": Data.of_arrays({"x": images(40, 1)[0]}, np.full(40, 99))}, DataError),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(base, tmp_path, options, error):
    with pytest.raises(error):
        lrcompress.adapt(
            base / "compressed", **{"data": shifted(80, 1), "output": tmp_path / "a", **OPTIONS, **options}
        )
    assert not (tmp_path / "a").exists()


def test_several_processes_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CommandError, match="without torchrun"):
        lrcompress.adapt(base / "compressed", data=shifted(80, 1), output=tmp_path / "a", **OPTIONS)


def watched(monkeypatch) -> dict[str, torch.Tensor]:
    """Return the spectra that the last kind's ranks are given by, once they are."""
    seen: dict[str, torch.Tensor] = {}

    def watching(offers, spectra, most):
        seen.clear()
        seen.update(spectra)
        return ranks_within(offers, spectra, most)

    monkeypatch.setattr(verb, "ranks_within", watching)
    return seen


def test_cores_of_grouped_layers_are_adapted_and_others_leave_them_alone(tmp_path, monkeypatch):
    """Groups have a core each, which costs one per group; LoRA has no place there."""
    torch.save(grouped().state_dict(), tmp_path / "model.pt")
    spec = (InputSpec("x", "float32", ("batch", 8, 9, 9)),)
    lrcompress.factorize(
        tmp_path / "model.pt", rank=3, method="svd", arch="tests.support.nets:grouped", inputs=spec, output=tmp_path / "compressed"
    )  # fmt: skip
    layers = dict(factorized_layers(load_compressed(tmp_path / "compressed").need_module("the test")))
    assert verb._kinds(("core",), nn.ModuleDict({"wide": layers["wide"]})) == ["core"], (
        "where no other layer has one, too"
    )
    groups = {n: m.target.groups for n, m in layers.items() if m.target.groups > 1 and m.target.core}
    assert groups
    random, seen = np.random.default_rng(0), watched(monkeypatch)
    x = random.standard_normal((96, 8, 9, 9)).astype(np.float32)
    data = Data.of_arrays({"x": x}, (x[:, 0].mean((1, 2)) > 0).astype(np.int64))
    found = lrcompress.adapt(
        tmp_path / "compressed", data=data, adapter_kinds=("lora", "core"), max_bytes=1 << 16, output=tmp_path / "a", **OPTIONS
    )  # fmt: skip
    lora, core = found.data["kinds"]
    assert all(len(seen[n]) == layers[n].target.core for n in groups), "one spectrum, summed over the groups"
    assert set(groups) <= set(core["ranks"]) and not set(groups) & set(lora["ranks"])
    sizes = {n: (m.target.groups, m.target.core) for n, m in layers.items()}
    assert core["numbers"] == sum(sizes[n][0] * sizes[n][1] * min(sizes[n][1], 2 * k) for n, k in core["ranks"].items())


def test_a_core_is_worth_the_gradient_by_the_matrix_in_it(base, monkeypatch):
    """In the units it is trained in, by the chain rule from the gradient of a dense network that holds the same weights."""
    seen, samples = watched(monkeypatch), shifted(64, 1)
    how = {**OPTIONS, "steps": 1, "batch_size": 64}
    lrcompress.adapt(base / "compressed", data=samples, select=shifted(32, 2), adapter_kinds=("core",), **how)
    module = load_compressed(base / "compressed").need_module("the test")
    wanted = weight_gradients(module, small(), [next(iter(samples.batches(64)))])
    assert seen
    for name, spectrum in seen.items():
        layer = module.get_submodule(name)
        u, v = (layer.factors[k].detach().flatten(1).double() for k in ("U", "V"))
        left, right = metric_of(layer)
        by_core = left.T @ (u.T @ wanted[name] @ v.T) @ right.T
        torch.testing.assert_close(spectrum, torch.linalg.svdvals(by_core).square(), rtol=2e-3, atol=1e-9)


# ranks ----------------------------------------------------------------------------------------------------------------


def test_of_ranks_that_take_the_same_the_largest_is_offered():
    assert prices({1: 10, 2: 20, 3: 20, 4: 15}) == [(1, 10), (4, 15)]
    assert prices({1: 10, 2: 10, 3: 30}) == [(2, 10), (3, 30)]


def test_ranks_go_where_the_gradient_is_and_stay_within_the_numbers():
    offers = {"a": [(1, 10), (2, 20), (4, 40)], "b": [(1, 10), (2, 20)], "c": [(1, 100)]}
    spectra = {"a": torch.tensor([9.0, 8.0, 1.0, 1.0]), "b": torch.tensor([4.0, 0.0]), "c": torch.tensor([20.0])}
    assert ranks_within(offers, spectra, 10) == {"a": 1}
    assert ranks_within(offers, spectra, 30) == {"a": 2, "b": 1}
    assert ranks_within(offers, spectra, 5) == {}
    assert ranks_within(offers, {**spectra, "a": torch.zeros(4)}, 30) == {"b": 1}, "no gradient, no numbers"
    for most in range(0, 200, 7):
        found = ranks_within(offers, spectra, most)
        assert sum(dict(offers[n])[r] for n, r in found.items()) <= most


def test_a_number_is_worth_what_it_gains_and_a_larger_rank_costs_the_difference():
    spectra = {"wide": torch.tensor([10.0, 0.0]), "thin": torch.tensor([9.0, 0.5])}
    offers = {"wide": [(1, 100)], "thin": [(1, 10), (2, 20)]}
    # A little more gained for ten times as many numbers is less.
    assert ranks_within(offers, spectra, 100) == {"thin": 2}
    # Ten numbers are spent on the first rank, and the ten that are left suffice for the second.
    assert ranks_within({"thin": offers["thin"]}, spectra, 20) == {"thin": 2}
    assert ranks_within({"thin": offers["thin"]}, spectra, 19) == {"thin": 1}
    assert ranks_within(offers, spectra, 120) == {"thin": 2, "wide": 1}
