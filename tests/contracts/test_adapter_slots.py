"""Slots and payloads of every kind on every layer type: ONNX Runtime answers what the live network answers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lrcompress
from lrcompress import expansions, payload
from lrcompress.adapt import adapter_class, kinds
from lrcompress.adapt._combine import stacked
from lrcompress.adapt._files import write_adapter
from lrcompress.data import Data
from lrcompress.errors import CommandError, PayloadError
from lrcompress.export.payloads import payload_tensors
from lrcompress.factorize import form
from lrcompress.factorize.grouped_svd import apart
from lrcompress.model import InputSpec, OpenedModel
from lrcompress.model.adapting import every_target, fresh, layer_target, takes
from lrcompress.model.surgery import attach, detach, factorized_layers, replace_layer, wrap_dense
from lrcompress.runtime import Session
from lrcompress.verbs.recover import recover
from tests.support.nets import grouped

OPTIONS = {
    "lora": [{}, {"rank": 3}, {"tucker": True}],
    "loha": [{}, {"tucker": True}],
    "lokr": [
        {},
        {"rank": 99},
        {"decompose_both": True, "factor": 4, "rank": 1},
        {"tucker": True, "factor": 2, "rank": 1},
    ],
    "lokh": [{}],
    "core": [{}, {"rank": 99}],
}
CASES = [(k, o) for k in kinds() for o in OPTIONS.get(k, [{}])]
SPEC = (InputSpec("ids", "int64", ("batch", 16)),)


class Every(nn.Module):
    """One layer of each type behind another, small enough to trace in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.line, self.factored = nn.Linear(12, 16), nn.Linear(16, 8)
        self.narrow = nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect")
        self.conv = nn.Conv2d(8, 12, 3, dilation=2, padding=2)
        self.spatial, self.tucker = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(8, 8, 3, groups=4, padding=1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(6, 4, 3, groups=2, padding=1)
        self.pivoted = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, ids):
        x = torch.tanh(self.factored(torch.tanh(self.line(self.embed(ids)))))
        x = torch.tanh(self.narrow(x.transpose(1, 2))).reshape(-1, 8, 4, 4)
        x = torch.tanh(self.tucker(torch.tanh(self.spatial(torch.tanh(self.conv(x))))))
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))
        return self.pivoted(torch.tanh(self.up_grouped(torch.tanh(self.up(x)))))


def network() -> Every:
    torch.manual_seed(1)
    model = Every().eval()
    for name, form_name in {
        "factored": "svd",
        "tucker": "tucker",
        "spatial": "spatial_svd",
        "pivoted": "pivoted",
    }.items():
        weight, chosen = model.get_submodule(name).weight.detach(), form(form_name)
        replace_layer(model, name, chosen.decompose(weight, chosen.clip(tuple(weight.shape), 5)))
    return model


IDS = np.random.default_rng(0).integers(0, 20, (5, 16))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The network with lora and core slots on every layer."""
    folder = tmp_path_factory.mktemp("every")
    opened = OpenedModel(None, "module", "", network(), inputs=SPEC)
    lrcompress.export(opened, slots=("lora", "core"), slot_include=("*",), output=folder / "exported")
    return folder / "exported"


def test_by_default_lora_is_everywhere_and_core_where_layers_are_factorized(tmp_path):
    opened = OpenedModel(None, "module", "", network(), inputs=SPEC)
    lrcompress.export(opened, output=tmp_path / "both")
    slots = Session(tmp_path / "both").manifest.slots
    plain = {"embed", "grouped", "depthwise", "up", "up_grouped"}  # reached by --slot-include
    assert {s["layer"] for s in slots if s["kind"] == "lora"} == set(every_target(network())) - plain
    assert {s["layer"] for s in slots if s["kind"] == "core"} == {"factored", "tucker", "spatial", "pivoted"}
    dense = nn.Sequential(nn.Linear(4, 4)).eval()
    found = lrcompress.export(
        OpenedModel(None, "module", "", dense, inputs=(InputSpec("x", "float32", ("b", 4)),)), output=tmp_path / "dense"
    )
    assert {s["kind"] for s in found.data["slots"]} == {"lora"}


@pytest.mark.parametrize(("form_name", "make"), [
    ("cp", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1)), ("kronecker", lambda: nn.Conv2d(4, 6, 3, padding=1)),
    ("kronecker", lambda: nn.Linear(12, 8)), ("tensor_train", lambda: nn.Linear(12, 8)),
    ("grouped_svd", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1)),
])  # fmt: skip
@pytest.mark.parametrize("rank", [2, 99])
def test_a_core_between_other_factors_runs_in_the_runtime(form_name, make, rank, tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(make()).eval()
    weight, chosen = model[0].weight.detach(), form(form_name)
    if form_name == "grouped_svd":
        weight = apart(weight, 2)
    replace_layer(model, "0", chosen.decompose(weight, chosen.clip(tuple(weight.shape), 3)))
    inner = (4, 7, 6) if weight.dim() > 3 else (12,)
    spec = (InputSpec("x", "float32", ("batch", *inner)),)
    lrcompress.export(OpenedModel(None, "module", "", model, inputs=spec), output=tmp_path / "e")
    session, made = Session(tmp_path / "e"), adapters(model, "core", {"rank": rank})
    assert len(made) == 1 and made["0"].core == 3
    attach(model, "a", lambda name, _: made[name], ["0"])
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", made, maker="test", base=None, info={})
    kind, tensors = payload_tensors(tmp_path / "a", session.manifest)
    whole = form_name == "grouped_svd"
    assert {s["kind"] for s in session.manifest.slots} == ({"core"} if whole else {"core", "lora"})
    for n in (1, 5):
        x = np.random.default_rng(n).standard_normal((n, *inner)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.as_tensor(x)).numpy()
        before = session.run({"x": x})["output"]
        session.swap(payload.parse(payload.build(tensors, manifest=session.manifest, kind=kind, encoding="f32")))
        np.testing.assert_allclose(session.run({"x": x})["output"], expected, rtol=1e-4, atol=1e-5)
        assert np.abs(before - expected).max() > 3e-3
        session.swap(None)


def answers(model: nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(ids)).numpy()


def adapters(model: nn.Module, kind: str, options: dict, names=None) -> dict:
    options = {"rank": 4, **options}
    rank = options.pop("rank")
    g = torch.Generator().manual_seed(2)
    made = {}
    for name in names or every_target(model):
        target = layer_target(model, name)
        if takes(kind, target):
            made[name] = fresh(kind, target, rank, 5.0, generator=g, **options)
            with torch.no_grad():
                for p in made[name].parameters():
                    p.copy_(torch.randn(p.shape, generator=g) * (0.3 if kind != "lokh" else 0.15))
    return made


def test_the_default_is_the_base(exported):
    session = Session(exported)
    slots = session.manifest.slots
    assert {s["layer"] for s in slots if s["kind"] == "lora"} == set(every_target(network()))
    assert {s["layer"] for s in slots if s["kind"] == "core"} == {"factored", "tucker", "spatial", "pivoted"}
    for n in (1, 5):
        np.testing.assert_allclose(session.run({"ids": IDS[:n]})["output"], answers(network(), IDS[:n]), atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_payload_of_every_kind_is_the_adapter(kind, options, exported, tmp_path):
    session, model = Session(exported), network()
    before = session.run({"ids": IDS})["output"]
    made = adapters(model, kind, options)
    assert len(made) == {"core": 4}.get(kind, 12)
    attach(model, "a", lambda name, _: made[name], list(made))
    expected = answers(model, IDS)
    assert np.abs(expected - before).max() > 2e-3
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    found, tensors = payload_tensors(tmp_path, session.manifest)
    assert found == kind
    data = payload.build(tensors, manifest=session.manifest, kind=kind, encoding="f32")
    session.swap(payload.parse(data))
    np.testing.assert_allclose(session.run({"ids": IDS})["output"], expected, rtol=1e-3, atol=3e-5)
    np.testing.assert_allclose(answers(lrcompress.to_dense(model), IDS), expected, rtol=1e-3, atol=3e-5)
    session.swap(None)
    assert np.array_equal(session.run({"ids": IDS})["output"], before)


@pytest.mark.parametrize("kind", kinds())
def test_several_adapters_are_weighted_and_switched_from_request_to_request(kind, exported, tmp_path):
    session, model = Session(exported), network()
    for name in every_target(model):
        wrap_dense(model, name)
    made = {n: adapters(model, kind, {"rank": r}) for n, r in (("a", 2), ("b", 3))}
    for name, own in made.items():
        attach(model, name, lambda layer, _, own=own: own[layer], list(own))
    requests = [{"a": 0.5, "b": -0.75}, {"a": 1.0}, {"b": 1.0}, {}, {"a": 2.0}]
    found = {}
    for i, weights in enumerate(requests):
        if weights:
            layers = {n: m for n, m in factorized_layers(model) if n in made["a"]}
            whole = {n: stacked([(made[k][n], w) for k, w in weights.items()], m) for n, m in layers.items()}
            (tmp_path / str(i)).mkdir()
            write_adapter(tmp_path / str(i), whole, maker="test", base=None, info={})
            own, tensors = payload_tensors(tmp_path / str(i), session.manifest)
            found[i] = payload.parse(payload.build(tensors, manifest=session.manifest, kind=own, encoding="f32"))
    answered = []
    for i in (0, 1, 3, 2, 4, 0, 3, 1):
        for _, layer in factorized_layers(model):
            layer.active = {k: w for k, w in requests[i].items() if k in layer.adapters}
        session.swap(found.get(i))
        got = session.run({"ids": IDS})["output"]
        np.testing.assert_allclose(got, answers(model, IDS), rtol=1e-3, atol=5e-5)
        answered.append((i, got))
    for (i, one), (j, two) in itertools.combinations(answered, 2):
        assert np.array_equal(one, two) if i == j else np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("kind", kinds())
def test_layers_left_alone_have_rank_zero(kind, exported, tmp_path):
    session, model = Session(exported), network()
    made = adapters(model, kind, {}, ["factored"])
    attach(model, "a", lambda name, _: made[name], list(made))
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    _, tensors = payload_tensors(tmp_path, session.manifest)
    data = payload.build(tensors, manifest=session.manifest, kind=kind, encoding="f32")
    session.swap(payload.parse(data))
    np.testing.assert_allclose(session.run({"ids": IDS})["output"], answers(model, IDS), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["lokr", "core", "lokh"])
@pytest.mark.parametrize("encoding", ["f16", "int8"])
def test_native_factors_travel_small_and_close(kind, encoding, exported, tmp_path):
    session, model = Session(exported), network()
    made = adapters(model, kind, {"rank": 1})
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    _, tensors = payload_tensors(tmp_path, session.manifest)
    exact, small = (payload.build(tensors, manifest=session.manifest, kind=kind, encoding=e) for e in ("f32", encoding))
    assert encoding == "int8" or len(small) < len(exact)  # these factors are so small that scales outweigh codes
    results = []
    for data in (exact, small):
        session.swap(payload.parse(data))
        results.append(session.run({"ids": IDS})["output"])
    assert np.abs(results[0] - results[1]).max() < 0.02 * max(1, np.abs(results[0]).max())


def test_a_decomposed_weight_has_no_slot_and_is_merged_instead(exported, tmp_path):
    model = network()
    made = adapters(model, "lora", {}, ["line"])
    made["line"].decompose(model.line.weight)
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    with pytest.raises(PayloadError, match="--merge"):
        payload_tensors(tmp_path, Session(exported).manifest)


@pytest.mark.parametrize("kind", [k for k in kinds() if k != "core"])
@pytest.mark.parametrize(("tokens", "width"), [(20, 12), (6, 16)])
def test_a_table_that_looks_rows_up_runs_in_the_runtime(kind, tokens, width, tmp_path):
    model = nn.Sequential(nn.Embedding(tokens, width)).eval()
    opened = OpenedModel(None, "module", "", model, inputs=(InputSpec("input", "int64", ("batch", 5)),))
    lrcompress.export(opened, slot_include=("*",), output=tmp_path / "e")
    session, made = Session(tmp_path / "e"), adapters(model, kind, {"rank": 2})
    attach(model, "a", lambda name, _: made[name], ["0"])
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", made, maker="test", base=None, info={})
    _, tensors = payload_tensors(tmp_path / "a", session.manifest)
    ids = np.random.default_rng(0).integers(0, tokens, (3, 5))
    before = session.run({"input": ids})["output"]
    data = payload.build(tensors, manifest=session.manifest, kind=kind, encoding="f32")
    session.swap(payload.parse(data))
    np.testing.assert_allclose(session.run({"input": ids})["output"], answers(model, ids), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answers(lrcompress.to_dense(model), ids), answers(model, ids), rtol=1e-4, atol=1e-5)
    assert np.abs(session.run({"input": ids})["output"] - before).max() > 1e-2
    turned = {n: np.swapaxes(v, -1, -2) for n, v in tensors.items()}
    with pytest.raises(PayloadError, match="payload: 0"):  # the table's two sides are not alike
        payload.build(turned, manifest=session.manifest, kind=kind, encoding="f32")


def test_a_kind_without_slots_is_refused_with_what_to_do(tmp_path):
    opened = OpenedModel(None, "module", "", network(), inputs=SPEC)
    lrcompress.export(opened, slots=("core",), output=tmp_path / "exported")
    manifest = Session(tmp_path / "exported").manifest
    assert {s["kind"] for s in manifest.slots} == {"core"}
    (tmp_path / "a").mkdir()
    write_adapter(tmp_path / "a", adapters(network(), "lora", {}, ["line"]), maker="test", base=None, info={})
    with pytest.raises(PayloadError, match="--slots lora"):
        payload_tensors(tmp_path / "a", manifest)
    dense = OpenedModel(
        None, "module", "", nn.Sequential(nn.Linear(4, 4)), inputs=(InputSpec("x", "float32", ("b", 4)),)
    )
    with pytest.raises(CommandError, match="core"):
        lrcompress.export(dense, slots=("core",), output=tmp_path / "dense")


SLOT = {
    "layer": "fc", "kind": "lora", "op": "linear", "r_min": 0, "r_max": 256,
    "tensors": [{"name": "fc.lora_A", "shape": [6, "r"]}, {"name": "fc.lora_B", "shape": ["r", 8]}],
}  # fmt: skip
CONV = {
    **SLOT,
    "op": "conv",
    "tensors": [{"name": "fc.lora_A", "shape": ["r", 6, 3]}, {"name": "fc.lora_B", "shape": [8, "r", 1]}],
}
CORE = {
    **SLOT,
    "kind": "core",
    "tensors": [{"name": "fc.core_A", "shape": [5, "r"]}, {"name": "fc.core_B", "shape": ["r", 5]}],
}

BLOCKS = {
    **SLOT,
    "kind": "core",
    "op": "conv",
    "groups": 2,
    "tensors": [{"name": "fc.core_A", "shape": ["r", 6, 1]}, {"name": "fc.core_B", "shape": [6, "r", 1]}],
}


def zeros(**shapes) -> dict[str, np.ndarray]:
    return {f"fc.{n}": np.zeros(s, np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize(("slot", "kind", "tensors", "rank"), [
    (SLOT, "lokr", zeros(lokr_w1=(2, 3), lokr_w2_a=(4, 5), lokr_w2_b=(5, 2)), 10),
    (SLOT, "lokr", zeros(lokr_w1=(4, 2), lokr_w2=(2, 3)), 4), (CONV, "lokr", zeros(lokr_w1=(4, 2), lokr_w2=(2, 9)), 4),
    (SLOT, "lokr", zeros(lokr_w1=(1, 1), lokr_w2_a=(8, 0), lokr_w2_b=(0, 6)), 0),
    (SLOT, "lokh", zeros(lokh_1=(3, 2, 6), lokh_2=(3, 4, 6)), 6), (SLOT, "lokh", zeros(lokh_1=(0, 8, 6)), 0),
    (CORE, "core", zeros(core_R=(5, 5)), 5), (BLOCKS, "core", zeros(core_R=(2, 3, 3)), 6), (BLOCKS, "core", zeros(core_P=(2, 3, 2), core_Q=(2, 2, 3)), 4), (CORE, "core", zeros(core_P=(5, 2), core_Q=(2, 5)), 2),
    (SLOT, "loha", zeros(hada_w1_a=(8, 3), hada_w1_b=(3, 6), hada_w2_a=(8, 3), hada_w2_b=(3, 6)), 9),
])  # fmt: skip
def test_ranks_are_told_from_the_factors(slot, kind, tensors, rank):
    assert expansions.rank_of(slot, kind, tensors) == rank
    a, b = expansions.expand(slot, kind, tensors)
    assert (a.shape[-1], b.shape[0]) == (rank, rank) if slot["op"] == "linear" else (len(a), b.shape[1]) == (rank, rank)


@pytest.mark.parametrize(("slot", "kind", "tensors"), [
    (SLOT, "lokr", zeros(lokr_w1=(3, 3), lokr_w2=(2, 2))), (SLOT, "lokr", zeros(lokr_w1=(0, 1), lokr_w2=(8, 6))),
    (SLOT, "lokr", zeros(lokr_w1=(2,), lokr_w2=(4, 6))), (SLOT, "lokr", zeros(lokr_w1=(2, 3), lokr_w2=(4, 3))),
    (CONV, "lokr", zeros(lokr_w1=(2, 9), lokr_w2=(4, 2))), (SLOT, "lokr", zeros(lokr_w1=(2, 3), lokr_w2_a=(4, 5), lokr_w2_b=(4, 2))),
    (SLOT, "lokh", zeros(lokh_1=(1, 3, 6), lokh_2=(1, 2, 6))), (SLOT, "lokh", zeros(lokh_1=(8, 6))),
    (SLOT, "lokh", zeros(lokh_1=(1, 2, 6), lokh_2=(2, 4, 6))), (SLOT, "lokh", zeros(lokh_1=(1, 8, 5))),
    (BLOCKS, "core", zeros(core_R=(6, 6))), (BLOCKS, "core", zeros(core_R=(3, 2, 2))), (BLOCKS, "core", zeros(core_P=(6, 2), core_Q=(2, 6))),
    (CORE, "core", zeros(core_R=(5, 4))), (CORE, "core", zeros(core_P=(5, 2), core_Q=(3, 5))),
    (SLOT, "loha", zeros(hada_w1_a=(8, 3), hada_w1_b=(3, 6), hada_w2_a=(8, 2), hada_w2_b=(2, 6))),
])  # fmt: skip
def test_factors_that_do_not_fit_the_slot_are_refused(slot, kind, tensors):
    with pytest.raises(ValueError, match=r"lok|core|rank|hada"):
        expansions.rank_of(slot, kind, tensors)


def test_a_payload_lacks_nothing_and_brings_nothing(exported):
    manifest = Session(exported).manifest
    for kind, missing in (("core", "core_"), ("lokr", "lokr_w"), ("lokh", "lokh_1")):
        with pytest.raises(PayloadError, match=f"{missing}.* missing"):
            payload.build({}, manifest=manifest, kind=kind, encoding="f32")


def test_every_kind_has_a_way_to_a_device():
    assert set(expansions.KINDS) == {*kinds(), "dora"}  # a weight decomposition of any kind
    assert all((expansions.KINDS[k] == "core") == adapter_class(k).in_core for k in kinds())


@pytest.mark.parametrize("kind", kinds())
def test_a_merged_export_answers_the_same(kind, tmp_path):
    model = network()
    for name in every_target(model):
        wrap_dense(model, name)
    made = adapters(model, kind, {})
    attach(model, "a", lambda name, _: made[name], list(made))
    expected = answers(model, IDS)
    detach(model, "a")
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    from lrcompress.adapt._files import read_adapter
    from lrcompress.export.merging import merge_adapter

    numbers = sum(p.numel() for p in model.factored.factors.values())
    merge_adapter(model, read_adapter(tmp_path))
    np.testing.assert_allclose(answers(model, IDS), expected, rtol=1e-3, atol=3e-5)
    assert kind != "core" or sum(p.numel() for p in model.factored.factors.values()) == numbers


@pytest.mark.parametrize("closed", ["only", "off"])
def test_cores_of_groups_are_recovered_and_shipped(closed, tmp_path):
    torch.save(grouped().state_dict(), tmp_path / "model.pt")
    spec = (InputSpec("x", "float32", ("batch", 8, 9, 9)),)
    how = {"method": "grouped_svd", "rank": 2, "arch": "tests.support.nets:grouped", "inputs": spec}
    lrcompress.factorize(tmp_path / "model.pt", **how, output=tmp_path / "compressed")
    x = np.random.default_rng(0).standard_normal((60, 8, 9, 9)).astype(np.float32)
    found = recover(
        tmp_path / "compressed", data=Data.of_arrays({"x": x}), adapter_kind="core", steps=3, learning_rate=1e-2,
        closed=closed, name="a", output=tmp_path / "adapters/a",
    )  # fmt: skip
    assert found.data["trainable_params"] == 2 * 2 * 2 and (closed == "off" or found.data["closed"]["layers"])
    made = lrcompress.export(tmp_path / "compressed", adapters=[tmp_path / "adapters/a"], output=tmp_path / "exported")
    session = Session(tmp_path / "exported")
    assert {s["layer"] for s in session.manifest.slots if s["kind"] == "core"} == {"wide"}
    assert "wide" not in {s["layer"] for s in session.manifest.slots if s["kind"] == "lora"}
    session.swap(payload.parse(Path(made.data["payloads"][0]["path"]).read_bytes()))
    with torch.no_grad():
        expected = found.model(torch.as_tensor(x[:5])).numpy()
    np.testing.assert_allclose(session.run({"x": x[:5]})["output"], expected, rtol=1e-4, atol=1e-5)
