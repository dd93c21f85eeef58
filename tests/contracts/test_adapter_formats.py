"""Adapter formats as properties: what is written is read back, and nothing but a `ModelError` comes of damaged input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrcompress import expansions
from lrcompress.adapt import Target
from lrcompress.adapt._files import read_adapter, write_adapter
from lrcompress.adapt.interop import lycoris, peft
from lrcompress.errors import ModelError
from lrcompress.export.payloads import _native
from lrcompress.export.slots import SlotLayer
from lrcompress.factorize import ConvGeometry
from lrcompress.model.adapting import fresh

FEW = settings(max_examples=60, deadline=None)
sizes = st.sampled_from([1, 2, 3, 4, 6, 8, 12])


@st.composite
def targets(draw) -> Target:
    kind = draw(st.sampled_from(["linear", "conv", "conv", "embedding", "conv_transpose"]))
    if kind in ("linear", "embedding"):
        return Target((draw(sizes) * 2, draw(sizes)), kind)
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    geometry = ConvGeometry.default(len(kernel))
    return Target((draw(sizes) * groups, draw(sizes), *kernel), kind, geometry, groups, (0,) * len(kernel))


@st.composite
def adapters(draw, kinds=("lora", "loha", "lokr", "lokh")):
    kind, target = draw(st.sampled_from(kinds)), draw(targets())
    options = {}
    if kind != "lokh":
        options["tucker"] = draw(st.booleans())
    if kind == "lokr":
        options |= {"factor": draw(st.sampled_from([-1, 1, 2, 3, 4])), "decompose_both": draw(st.booleans())}
    rank, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([0.5, 1.0, 3.0, 7.25]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    made = fresh(kind, target, rank, alpha, generator=g, rslora=kind == "lora" and draw(st.booleans()), **options)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return target, made


@FEW
@given(adapters())
def test_our_own_folder_keeps_every_bit(tmp_path_factory, case):
    target, made = case
    folder = tmp_path_factory.mktemp("a")
    write_adapter(folder, {"some.layer": made}, maker="test", base=None, info={})
    back = read_adapter(folder).adapters["some.layer"]
    assert (back.layer_kind, back.groups, back.rank, back.rslora) == (
        target.kind,
        target.groups,
        made.rank,
        made.rslora,
    )
    assert torch.equal(back.delta_weight(), made.delta_weight())


@FEW
@given(adapters(kinds=("lora", "loha", "lokr")))
def test_a_peft_folder_that_can_be_written_comes_back(case):
    target, made = case
    try:
        config, tensors = peft.write({"some.layer": made}, strict=True)
    except ModelError as e:
        assert target.kind == "conv_transpose" or made.kind != "lora", e
        return
    back = peft.read(config, tensors, {"some.layer": target}, where="file")["some.layer"]
    torch.testing.assert_close(back.delta_weight(), made.delta_weight(), rtol=1e-5, atol=1e-5)


@FEW
@given(adapters(kinds=("lora", "loha", "lokr")))
def test_a_lycoris_file_that_can_be_written_comes_back(case):
    target, made = case
    try:
        tensors = lycoris.write({"some.layer": made})
    except ModelError:
        assert target.kind in ("embedding", "conv_transpose")
        return
    back = lycoris.read(tensors, {"some.layer": target}, where="file")["some.layer"]
    torch.testing.assert_close(back.delta_weight(), made.delta_weight(), rtol=1e-5, atol=1e-5)


@FEW
@given(adapters())
def test_what_a_device_expands_is_the_change(case):
    target, made = case
    slot = SlotLayer("some.layer", "lora", target, "float32").manifest()
    tensors = _native(slot, made, "test")
    rank = expansions.rank_of(slot, made.kind, tensors)
    a, b = (np.asarray(v, np.float64) for v in expansions.expand(slot, made.kind, tensors))
    delta = made.delta_weight().detach().double().numpy()
    if slot["op"] == "linear":
        assert a.shape[1] == b.shape[0] == rank
        got = (a @ b) if target.kind == "embedding" else (a @ b).T
    else:
        assert a.shape[0] == b.shape[1] == rank
        flat = b.reshape(b.shape[:2])
        got = (flat @ a.reshape(len(a), -1)).reshape(delta.shape)
    np.testing.assert_allclose(got, delta, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(delta).max())))
    assert 0 <= slot["r_min"] <= rank and rank <= max(slot["r_max"], made.rank**2 * 4)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=8) | st.sampled_from(["pissa", "(", "^some", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["some.layer", "layer", "(", ".*", ""]) | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = (
    "peft_type", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save",
    "init_lora_weights", "use_dora", "target_modules", "lora_bias",
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(adapters(kinds=("lora", "loha", "lokr")), st.dictionaries(st.sampled_from(KEYS), json, min_size=1, max_size=2))
def test_no_configuration_does_anything_but_load_or_say_why_not(case, changes):
    target, made = case
    config, tensors = peft.write({"some.layer": made}, strict=False)
    try:
        found = peft.read({**config, **changes}, tensors, {"some.layer": target}, where="file")
    except ModelError as e:
        assert "\n" not in str(e)
        return
    assert all(math.isfinite(a.scaling) for a in found.values())


@settings(max_examples=80, deadline=None)
@given(adapters(kinds=("lora", "loha", "lokr")), st.data())
def test_no_tensors_do_anything_but_load_or_say_why_not(case, data):
    target, made = case
    shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
    for write, read in (
        (lambda: peft.write({"some.layer": made}, strict=False), lambda c, t: peft.read(c, t, {"some.layer": target}, where="f")),
        (lambda: peft.write({"some.layer": made}, strict=False), lambda c, t: peft.read(c, t, None, where="f")),
        (lambda: (None, lycoris.write({"some.layer": made})), lambda c, t: lycoris.read(t, {"some.layer": target}, where="f")),
    ):  # fmt: skip
        try:
            config, tensors = write()
        except ModelError:
            continue
        name = data.draw(st.sampled_from(sorted(tensors)))
        fault = data.draw(st.sampled_from(["drop", "shape", "dtype", "rename", "nan"]))
        value = tensors.pop(name)
        if fault == "shape":
            tensors[name] = torch.ones(data.draw(shapes))
        elif fault == "dtype":
            tensors[name] = value.to(
                data.draw(st.sampled_from([torch.int8, torch.float16, torch.bool, torch.complex64]))
            )
        elif fault == "rename":
            tensors[data.draw(st.sampled_from([name + "x", "x." + name, name[1:], name.replace("layer", "other")]))] = (
                value
            )
        elif fault == "nan":
            tensors[name] = torch.full_like(value, torch.nan)
        try:
            read(config, tensors)
        except ModelError as e:
            assert "\n" not in str(e)


def test_a_pattern_that_never_ends_is_not_run():
    """A hostile pattern is a regular expression: one of absurd length is left out."""
    _, made = Target((4, 4)), fresh("lora", Target((4, 4)), 2)
    config, tensors = peft.write({"some.layer": made}, strict=True)
    found = peft.read({**config, "rank_pattern": {"x" * 2000: 1}}, tensors, where="file")
    assert found["some.layer"].rank == 2


def test_conv1d_of_transformers_is_a_linear_layer_there_and_here(tmp_path: Path):
    package = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    from lrcompress.model.adapting import every_target
    from lrcompress.model.surgery import attach, to_dense

    torch.manual_seed(0)
    base = torch.nn.Sequential(Conv1D(7, 5))
    theirs = package.get_peft_model(
        torch.nn.Sequential(Conv1D(7, 5)), package.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True)
    ).eval()
    theirs.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.normal_()
    theirs.save_pretrained(tmp_path)
    found = read_adapter(tmp_path, every_target(base))
    x = torch.randn(3, 5)
    attach(base, "a", lambda name, _: found.adapters[name], ["0"])
    torch.testing.assert_close(base(x), theirs(x))
    dense = to_dense(base)
    assert type(dense[0]) is Conv1D
    torch.testing.assert_close(dense(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_a_folder_with_two_ways_of_scaling_keeps_both(strict: bool) -> None:
    """PEFT has one switch for all layers: those that scale by √r say so in their alpha."""
    made = {n: fresh("lora", Target((6, 5)), 4, 8.0, rslora=n == "root") for n in ("plain", "root")}
    for a in made.values():
        torch.nn.init.normal_(a.lora_B)
    assert [a.scaling for a in made.values()] == [2.0, 4.0]
    config, tensors = peft.write(made, strict=strict)
    back = peft.read(config, tensors, {n: a.target for n, a in made.items()}, where="here")
    assert [back[n].scaling for n in made] == [2.0, 4.0] and not config.get("use_rslora")
    assert all(torch.equal(back[n].delta_weight(), a.delta_weight()) for n, a in made.items())
