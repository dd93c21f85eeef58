"""PEFT's files, both ways, against the real package: what one writes the other runs with the same outputs."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lrcompress.adapt._files import read_adapter, write_adapter
from lrcompress.errors import ModelError
from lrcompress.factorize import form
from lrcompress.model.adapting import every_target, fresh
from lrcompress.model.surgery import attach, factorized_layers, replace_layer, to_dense, wrap_dense
from tests.support.adapted import Layers, inputs, layers, randomized

peft = pytest.importorskip("peft")

SAME = ["linear", "blocks.0.fc", "narrow", "conv1d", "conv2d", "point", "strided"]
#: Layers on which PEFT's own forward pass is the product with its change of the weight.
FORWARD = {
    "lora": [*SAME, "conv3d", "embed", "grouped"],
    "loha": [*SAME, "grouped", "depthwise", "dilated"],
    "lokr": [*SAME, "grouped", "depthwise", "dilated"],
}
#: Layers that load there, but whose forward pass is another one there than in the merged network.
MERGED = {"lora": ["reflect"], "loha": ["reflect"], "lokr": ["reflect"]}
OPTIONS = {
    "lora": [{}, {"rslora": True}, {"tucker": True}],
    "loha": [{}, {"tucker": True}],
    "lokr": [
        {},
        {"factor": 2},
        {"factor": 3, "decompose_both": True, "rank": 1},
        {"factor": 2, "tucker": True, "rank": 2},
    ],
}
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]


def ours(kind: str, names: list[str], rank: int = 4, alpha: float = 6.0, **options) -> tuple[Layers, dict]:
    """Return a network with random adapters of ours, one rank for all but two layers."""
    model = layers()
    targets = every_target(model)
    ranks, alphas = {"linear": 2, "conv2d": 3, "conv1d": 1}, {"narrow": 1.5}
    made = {}
    for name in names:
        r = ranks.get(name, rank) if rank == 4 else rank
        made[name] = fresh(kind, targets[name], r, alphas.get(name, alpha), **options)
        randomized(made[name])
    attach(model, "a", lambda name, _: made[name], names)
    return model, made


def theirs(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(layers(), folder).eval()


def close(got: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def outputs(model: nn.Module, names: list[str]) -> dict:
    with torch.no_grad():
        return model(inputs(names))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_what_we_write_they_run(kind, options, tmp_path):
    names = FORWARD[kind] + (["depthwise"] if kind == "lora" else [])
    if options.get("factor") == 2:  # their factor of 2 splits the 2 channels of a group into (2, 1)
        names = [n for n in names if n != "grouped"]
    model, made = ours(kind, names, **options)
    write_adapter(tmp_path, made, maker="test", base="b" * 64, info={}, strict=True)
    loaded = theirs(tmp_path)
    expected = outputs(model, names)
    close(outputs(loaded, names), expected)
    assert any(float((expected[n] - v).abs().max()) > 0.05 for n, v in outputs(layers(), names).items())
    # The names in it are exact: nothing else was given an adapter.
    there = {
        n for n, m in loaded.base_model.model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    assert there == set(names)
    # And back: bit for bit where nothing had to be multiplied in.
    again = read_adapter(tmp_path)
    for name, a in made.items():
        if (options.get("tucker") and kind == "lora") or name in ("depthwise", "grouped"):
            torch.testing.assert_close(again.adapters[name].delta_weight(), a.delta_weight())
        else:
            assert torch.equal(again.adapters[name].delta_weight(), a.delta_weight()), name


@pytest.mark.parametrize("kind", FORWARD)
def test_reflect_padding_runs_here_and_only_merged_there(kind, tmp_path):
    """Trap: PEFT pads a reflecting convolution's branch with zeros, so its forward pass is not its merged network."""
    model, made = ours(kind, MERGED[kind])
    write_adapter(tmp_path, made, maker="test", base=None, info={}, strict=True)
    loaded, expected = theirs(tmp_path), outputs(model, MERGED[kind])
    assert float((outputs(loaded, ["reflect"])["reflect"] - expected["reflect"]).abs().max()) > 1e-2
    close(outputs(loaded.merge_and_unload(), ["reflect"]), expected)


def test_a_dilated_lora_runs_here_and_only_merged_there(tmp_path):
    """Trap: PEFT does not pass the dilation on to A."""
    model, made = ours("lora", ["dilated"])
    write_adapter(tmp_path, made, maker="test", base=None, info={}, strict=True)
    loaded = theirs(tmp_path)
    with pytest.raises(RuntimeError):
        outputs(loaded, ["dilated"])
    close(outputs(loaded.merge_and_unload(), ["dilated"]), outputs(model, ["dilated"]))


def their_configs() -> list:
    common = {"r": 4, "target_modules": ["linear", "fc", "narrow", "conv1d", "conv2d", "point", "strided"]}
    patterns = {"rank_pattern": {"linear": 2, "blocks.0.fc": 3}, "alpha_pattern": {"fc": 12, "conv.d": 1}}
    lora, loha, lokr = peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig
    more = [*common["target_modules"], "conv3d", "embed", "grouped"]
    return [
        lora(**common, lora_alpha=6, **patterns), lora(**{**common, "target_modules": more}, lora_alpha=7),
        lora(**common, lora_alpha=6, use_rslora=True, **patterns),
        lora(**{**common, "target_modules": [*common["target_modules"], "conv3d", "embed"]}, lora_alpha=6, use_dora=True),
        loha(**common, alpha=6, **patterns), loha(**common, alpha=6, use_effective_conv2d=True),
        loha(**{**common, "target_modules": [*common["target_modules"], "grouped", "depthwise", "dilated"]}, alpha=3),
        lokr(**common, alpha=6, **patterns), lokr(**common, alpha=6, decompose_factor=4),
        lokr(**{**common, "r": 2}, alpha=6, use_effective_conv2d=True, decompose_factor=2),
        lokr(**{**common, "r": 2}, alpha=6, decompose_both=True, decompose_factor=2),
        lokr(**{**common, "r": 99, "target_modules": ["linear", "conv2d", "point", "depthwise"]}, alpha=6),
        lokr(**{**common, "target_modules": [*common["target_modules"], "grouped", "dilated"]}, alpha=3),
    ]  # fmt: skip


@pytest.mark.parametrize("i", range(len(their_configs())))
def test_what_they_write_we_run(i, tmp_path):
    config = their_configs()[i]
    base = layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomized(model, "default" if config.peft_type != "LORA" else "lora_")
    if getattr(config, "use_dora", False):
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "magnitude" in n:
                    p.copy_(p.abs() + 0.5)
    names = [n for n in inputs(list(Layers.SHAPES) + ["embed"]) if _targeted(model, n)]
    block_diagonal(model)
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path, every_target(base))
    assert set(found.adapters) == set(names) and found.base is None
    attach(base, "a", lambda name, _: found.adapters[name], names)
    close(outputs(base, names), outputs(model, names))
    # Written again, the same tensors (where PEFT multiplied misaligned axes, it is another kind by now).
    if {a.kind for a in found.adapters.values()} == {config.peft_type.lower()}:
        again = tmp_path / "again"
        again.mkdir()
        write_adapter(again, found.adapters, maker="test", base=None, info={}, strict=True)
        one, two = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, again))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def _targeted(model, name: str) -> bool:
    return isinstance(model.base_model.model.get_submodule(name), peft.tuners.tuners_utils.BaseTunerLayer)


def block_diagonal(model) -> None:
    """Keep of a grouped LoRA what a grouped kernel can hold."""
    layer = model.base_model.model.grouped
    if isinstance(layer, peft.tuners.lora.Conv2d):
        a = layer.lora_A["default"].weight
        mask = torch.block_diag(*[torch.ones(a.shape[0] // 4, a.shape[1] // 4)] * 4)
        with torch.no_grad():
            a *= mask[..., None, None]


def test_a_grouped_lora_that_no_grouped_kernel_holds_is_refused(tmp_path):
    """Trap: PEFT's A is dense over all channels, and PEFT refuses to merge it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(layers(), peft.LoraConfig(r=4, target_modules=["grouped"]))
    randomized(model, "lora_")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="channels of other groups"):
        read_adapter(tmp_path, every_target(layers()))


def test_a_whole_w2_on_a_1d_convolution_becomes_the_plain_change_that_they_compute(tmp_path):
    """Trap: there PEFT multiplies misaligned axes, so it is no Kronecker product; writing one for PEFT is refused."""
    base = layers()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoKrConfig(r=99, alpha=33, target_modules=["conv1d"])).eval()
    randomized(model, "default")
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path, every_target(base))
    attach(base, "a", lambda name, _: found.adapters[name], ["conv1d"])
    close(outputs(base, ["conv1d"]), outputs(model, ["conv1d"]))
    _, made = ours("lokr", ["conv1d"], rank=99)
    with pytest.raises(ModelError, match="1-D convolution"):
        write_adapter(tmp_path, made, maker="test", base=None, info={}, strict=True)


def test_a_fully_whole_lokr_keeps_alpha_over_r(tmp_path):
    """Trap: LyCORIS forces scale 1 there, PEFT keeps alpha/r."""
    model = peft.get_peft_model(layers(), peft.LoKrConfig(r=64, alpha=16, target_modules=["linear"])).eval()
    randomized(model, "default")
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path, every_target(layers())).adapters["linear"]
    assert set(found.tensors()) == {"lokr_w1", "lokr_w2"} and found.scaling == 0.25
    torch.testing.assert_close(found.delta_weight(), model.base_model.model.linear.get_delta_weight("default"))


def test_factors_of_a_dimension_are_read_from_the_tensors(tmp_path):
    """Trap: a factor of 32 splits 128 into (32, 4) in PEFT and into (4, 32) in LyCORIS."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(128, 128)), peft.LoKrConfig(r=1, alpha=1, decompose_factor=32, target_modules=["0"])
    ).eval()
    randomized(model, "default")
    model.save_pretrained(tmp_path)
    found = read_adapter(tmp_path).adapters["0"]
    assert tuple(found.tensors()["lokr_w1"].shape) == (32, 32)
    torch.testing.assert_close(found.delta_weight(), model.base_model.model[0].get_delta_weight("default"))
    again = tmp_path / "again"
    again.mkdir()
    write_adapter(again, {"0": found}, maker="test", base=None, info={}, strict=True)
    assert json.loads((again / "adapter_config.json").read_text())["decompose_factor"] == 32


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_change_the_base_become_a_plain_change(init, tmp_path):
    base = layers()
    before = base.linear.weight.detach().clone()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["linear", "fc"], init_lora_weights=init)
    ).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{init}.*base"):
        read_adapter(tmp_path, every_target(base))
    found = read_adapter(tmp_path, every_target(base), weight=lambda n: base.get_submodule(n).weight)
    assert found.adapters["linear"].rank == 6
    names = ["linear", "blocks.0.fc"]
    attach(base, "a", lambda name, _: found.adapters[name], names)
    expected = outputs(model, names)
    for name, value in outputs(base, names).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(base.linear.factors["weight"], before)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_other_inits_that_change_the_base_are_refused_with_the_reason(init, tmp_path):
    _, made = ours("lora", ["linear"])
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    changed(tmp_path, {"init_lora_weights": init})
    with pytest.raises(ModelError, match=f"{init}, which changed the base"):
        read_adapter(tmp_path, weight=lambda n: layers().get_submodule(n).weight)


@pytest.mark.parametrize(("key", "value", "word"), [
    ("modules_to_save", ["classifier", "score"], "classifier, score"), ("bias", "all", "bias"), ("lora_bias", True, "lora_bias"),
    ("trainable_token_indices", [1, 2], "trainable_token_indices"), ("layer_replication", [[0, 4]], "layer_replication"),
    ("peft_type", "VERA", "peft_type of CORE, LOHA"), ("peft_type", None, "peft_type"),
])  # fmt: skip
def test_what_cannot_ship_is_refused_by_name(key, value, word, tmp_path):
    _, made = ours("lora", ["linear"])
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    changed(tmp_path, {key: value})
    with pytest.raises(ModelError, match=word):
        read_adapter(tmp_path)


def changed(folder: Path, settings: dict) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_the_interop_base_of_a_factorized_network_is_its_dense_one(tmp_path):
    """PEFT cannot target factorized modules: the adapter of one runs there on `to_dense()`."""
    model = layers()
    for name in ("linear", "conv2d", "point"):
        f = form("tucker" if name == "conv2d" else "svd")
        weight = model.get_submodule(name).weight.detach()
        replace_layer(model, name, f.decompose(weight, f.clip(tuple(weight.shape), 4)))
    dense = to_dense(model)
    made = {n: fresh("lora", m.target, 3, generator=torch.Generator()) for n, m in factorized_layers(model)}
    for a in made.values():
        randomized(a)
    attach(model, "a", lambda name, _: made[name], list(made))
    write_adapter(tmp_path, made, maker="test", base="c" * 64, info={}, strict=True)
    close(outputs(peft.PeftModel.from_pretrained(dense, tmp_path).eval(), list(made)), outputs(model, list(made)))


@pytest.mark.parametrize("kind", ["core", "lokh"])
def test_kinds_of_our_own_are_written_under_their_own_names_and_never_for_peft(kind, tmp_path):
    model = layers()
    weight = model.linear.weight.detach()
    replace_layer(model, "linear", form("svd").decompose(weight, 5))
    made = {"linear": fresh(kind, model.linear.target, 2, generator=torch.Generator())}
    randomized(made["linear"])
    with pytest.raises(ModelError, match="kind that PEFT knows"):
        write_adapter(tmp_path, made, maker="test", base=None, info={}, strict=True)
    write_adapter(tmp_path, made, maker="test", base="c" * 64, info={})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == kind.upper()
    back = read_adapter(tmp_path)
    assert back.kind == kind
    base = wrap_dense(model, "linear")
    assert torch.equal(back.adapters["linear"].delta_weight(base), made["linear"].delta_weight(base))


def test_names_are_exact_where_one_path_ends_as_another(tmp_path):
    """PEFT matches the end of a path: a pattern for `fc` must not reach `blocks.0.fc`."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.block = nn.ModuleDict({"fc": nn.Linear(6, 6)})

        def forward(self, x):
            return self.fc(x) + self.block["fc"](x)

    torch.manual_seed(0)
    model = Two().eval()
    x = torch.randn(3, 6)
    made = {n: fresh("lora", t, r) for (n, t), r in zip(every_target(model).items(), (1, 2), strict=True)}
    for subset in (made, {"fc": made["fc"]}):
        here, folder = copy.deepcopy(model), tmp_path / str(len(subset))
        folder.mkdir()
        for a in subset.values():
            randomized(a)
        attach(here, "a", lambda name, _, s=subset: s[name], list(subset))
        write_adapter(folder, subset, maker="test", base=None, info={}, strict=True)
        there = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        torch.testing.assert_close(there(x), here(x))
        assert not [n for n, m in there.named_modules() if n.endswith("block.fc.lora_A")] or len(subset) == 2


def test_rslora_scales_by_the_root(tmp_path):
    _, made = ours("lora", ["linear"], rslora=True)
    assert made["linear"].scaling == pytest.approx(made["linear"].alpha / math.sqrt(2))
    write_adapter(tmp_path, made, maker="test", base=None, info={}, strict=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_alpha"] == made["linear"].alpha


def tampered(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


BAD = {
    "missing": (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, "lora_B"),
    "extra": (lambda t: t | {"base_model.model.linear.hada_w1_a": torch.zeros(2, 2)}, "hada_w1_a"),
    "rank": (lambda t: {k: torch.cat([v, v], 0 if "lora_A" in k else 1) for k, v in t.items()}, "expected shape"),
    "nan": (lambda t: {k: v * torch.nan for k, v in t.items()}, "finite"),
    "integers": (lambda t: {k: v.int() for k, v in t.items()}, "floating point"),
    "scalars": (lambda t: {k: v.sum() for k, v in t.items()}, "a matrix or kernels"),
    "empty": (lambda t: {k: v[:0] for k, v in t.items()}, "a matrix or kernels"),
    "nothing": (lambda t: {}, "at least one layer"),
    "unknown": (lambda t: {k.replace("linear", "nowhere"): v for k, v in t.items()}, "layer of the base"),
    "other": (lambda t: {k: v[..., :-1].contiguous() if "lora_A" in k else v for k, v in t.items()}, "expected shape"),
}


@pytest.mark.parametrize("fault", BAD)
def test_damaged_folders_are_refused_in_one_line(fault, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(layers(), peft.LoraConfig(r=2, target_modules=["linear"]))
    model.save_pretrained(tmp_path)
    change, word = BAD[fault]
    tampered(tmp_path, change)
    with pytest.raises(ModelError, match=word) as caught:
        read_adapter(tmp_path, every_target(layers()))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_an_adapter_for_another_network_is_refused(tmp_path):
    _, made = ours("lora", ["linear"])
    write_adapter(tmp_path, made, maker="test", base=None, info={})
    targets = every_target(layers()) | {"linear": every_target(nn.Sequential(nn.Linear(23, 36)))["0"]}
    with pytest.raises(ModelError, match="another base"):
        read_adapter(tmp_path, targets)
