"""LyCORIS's files, both ways, against the real package: what one writes the other runs with the same outputs."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from lrcompress.adapt.interop import lycoris as files
from lrcompress.errors import ModelError
from lrcompress.model.adapting import every_target, fresh
from lrcompress.model.surgery import attach, to_dense
from tests.support.adapted import Layers, inputs, layers, randomized

package = pytest.importorskip("lycoris")
logging.getLogger("LyCORIS").setLevel(logging.ERROR)

#: Layers that LyCORIS adapts; its forward pass is the merged network's on all of them, but for reflecting padding.
NAMES = [n for n in Layers.SHAPES if n != "reflect"]
OPTIONS = {
    "lora": [{}, {"rslora": True}, {"tucker": True}],
    "loha": [{}, {"tucker": True}],
    "lokr": [
        {},
        {"factor": 3},
        {"factor": 3, "decompose_both": True, "rank": 1},
        {"factor": 2, "tucker": True, "rank": 1},
    ],
}
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]


def ours(kind: str, names: list[str], rank: int = 4, alpha: float = 6.0, dora: int | None = None, **options):
    model = layers()
    targets = every_target(model)
    made = {n: fresh(kind, targets[n], rank, alpha, **options) for n in names}
    for n, a in made.items():
        randomized(a)
        if dora is not None:
            a.decompose(model.get_submodule(n).weight, dora)
            with torch.no_grad():
                a.magnitude *= 1.25
    attach(model, "a", lambda name, _: made[name], names)
    return model, made


def theirs(tensors: dict[str, torch.Tensor], base: nn.Module | None = None) -> nn.Module:
    """Return the network with a LyCORIS file loaded by the package's own loader."""
    model = base or layers()
    with torch.no_grad():
        network, _ = package.create_lycoris_from_weights(1.0, "", model, weights_sd=dict(tensors))
        assert network.loras
        network.apply_to()
    model.keep = network  # hooks hold no reference to it
    return model.eval()


def outputs(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(inputs(names))


def close(got, expected) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=3e-5, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_what_we_write_they_run(kind, options):
    model, made = ours(kind, NAMES, **options)
    tensors = files.write(made)
    expected = outputs(model, NAMES)
    close(outputs(_configured(tensors, **options) if kind == "lokr" else theirs(tensors), NAMES), expected)
    assert all(float((expected[n] - v).abs().max()) > 1e-2 for n, v in outputs(layers(), NAMES).items())
    again = files.read(tensors, every_target(layers()), where="file")
    for name, a in made.items():
        torch.testing.assert_close(again[name].delta_weight(), a.delta_weight(), rtol=1e-6, atol=1e-7)
    assert all(torch.equal(t, tensors[k]) for k, t in files.write(again).items() if not k.endswith("alpha"))


def _configured(tensors, rank: int = 4, **options) -> nn.Module:
    """Return the network with a LoKr file loaded into modules made with the same options.

    Their loader without options guesses the factors of the dimensions, and takes the wrong axis for a Tucker rank.
    """
    model = layers()
    named = {"use_tucker" if k == "tucker" else k: v for k, v in options.items()}
    network = network_of("lokr", model, linear_dim=rank, conv_dim=rank, linear_alpha=6, conv_alpha=6, **named)
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    assert not unexpected and all("reflect" in m for m in missing)
    return model


def network_of(algo: str, base: nn.Module, **options) -> nn.Module:
    """Return LyCORIS's own network of `algo` on all layers of `base`, with random numbers, applied."""
    preset = {
        "target_module": ["Linear", "Conv1d", "Conv2d", "Conv3d"],
        "enable_conv": True,
        "name_algo_map": {},
        "module_algo_map": {},
    }
    package.LycorisNetwork.apply_preset(preset)
    options = {"linear_dim": 4, "linear_alpha": 6, "conv_dim": 3, "conv_alpha": 2, **options}
    network = package.create_lycoris(base, 1.0, algo=algo, **options)
    randomized(network)
    with torch.no_grad():
        for n, p in network.named_parameters():
            if "dora" in n:
                p.copy_(p.abs() + 0.5)
    network.apply_to()
    base.keep = network
    return network.eval()


THEIRS = [
    ("lora", {}), ("lora", {"use_tucker": True}), ("lora", {"dora_wd": True}), ("lora", {"dora_wd": True, "wd_on_output": False}),
    ("loha", {}), ("loha", {"use_tucker": True}), ("loha", {"dora_wd": True}),
    ("lokr", {}), ("lokr", {"factor": 4}), ("lokr", {"factor": 2, "use_tucker": True, "linear_dim": 1, "conv_dim": 1}),
    ("lokr", {"factor": 4, "decompose_both": True, "linear_dim": 1, "conv_dim": 1}), ("lokr", {"full_matrix": True}),
    ("lokr", {"dora_wd": True}), ("lokr", {"unbalanced_factorization": True}),
]  # fmt: skip


@pytest.mark.parametrize(("algo", "options"), THEIRS)
def test_what_they_write_we_run(algo, options, tmp_path):
    from safetensors.torch import load_file

    model = layers()
    network = network_of(algo, model, **options)
    network.save_weights(str(tmp_path / "file.safetensors"), None, {})
    tensors = load_file(tmp_path / "file.safetensors")
    base = layers()
    found = files.read(tensors, every_target(base), where="file")
    assert set(found) == {*NAMES, "reflect"}
    attach(base, "a", lambda name, _: found[name], list(found))
    close(outputs(base, NAMES), outputs(model, NAMES))
    # Written again, the same tensors, to the bit, but for the scale of a whole LoKr, which is one.
    again = files.write(found)
    assert again.keys() == tensors.keys()
    for key, value in again.items():
        stem = key.rpartition(".")[0]
        whole = {f"{stem}.lokr_w1", f"{stem}.lokr_w2"} <= again.keys()
        if not (key.endswith("alpha") and whole):
            assert torch.equal(value, tensors[key]), key


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_weight_decomposition_travels(kind):
    names = ["linear", "conv2d", "point"]
    model, made = ours(kind, names, dora=0)
    tensors = files.write(made)
    assert tuple(tensors["lycoris_conv2d.dora_scale"].shape) == (16, 1, 1, 1)
    close(outputs(theirs(tensors), names), outputs(model, names))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_their_merge_applies_the_scale_twice_ours_once(kind):
    """Trap: LyCORIS's merge of LoHa (and LoKr) multiplies by alpha/dim again; its forward pass is right."""
    model, made = ours(kind, ["linear"], rank=2, alpha=1.0)
    there = theirs(files.write(made))
    close(outputs(there, ["linear"]), outputs(model, ["linear"]))
    base = layers()
    with torch.no_grad():
        network, _ = package.create_lycoris_from_weights(1.0, "", base, weights_sd=files.write(made))
        network.merge_to(1.0)
    merged = base.linear.weight.detach() - layers().linear.weight.detach()
    torch.testing.assert_close(merged, 0.5 * made["linear"].delta_weight().detach(), rtol=1e-4, atol=1e-5)
    close(outputs(to_dense(model), ["linear"]), outputs(model, ["linear"]))


def test_a_fully_whole_lokr_has_scale_one_there_and_is_written_so():
    """Trap: our scaling is multiplied into W₁, because LyCORIS ignores alpha then."""
    model, made = ours("lokr", ["linear"], rank=64, alpha=16.0)
    assert set(made["linear"].tensors()) == {"lokr_w1", "lokr_w2"} and made["linear"].scaling != 1.0
    tensors = files.write(made)
    close(outputs(theirs(tensors), ["linear"]), outputs(model, ["linear"]))
    tensors["lycoris_linear.alpha"] = torch.tensor(123.0)
    back = files.read(tensors, every_target(layers()), where="file")["linear"]
    assert back.scaling == 1.0


def test_rslora_is_baked_into_the_alpha():
    """Trap: LyCORIS stores alpha·√dim for rs_lora, and reads alpha/dim."""
    _, made = ours("lora", ["linear"], rank=4, alpha=6.0, rslora=True)
    tensors = files.write(made)
    assert float(tensors["lycoris_linear.alpha"]) == pytest.approx(12.0)
    back = files.read(tensors, every_target(layers()), where="file")["linear"]
    assert back.scaling == made["linear"].scaling == 3.0


def test_filters_of_single_groups_are_spread_with_zeros():
    """Trap: LyCORIS's groups share A; ours of rank divisible by the groups do not."""
    model, made = ours("lora", ["grouped"])
    assert made["grouped"].tensors()["lora_B"].shape[1] == 1
    tensors = files.write(made)
    assert tuple(tensors["lycoris_grouped.lora_up.weight"].shape) == (12, 4, 1, 1)
    close(outputs(theirs(tensors), ["grouped"]), outputs(model, ["grouped"]))


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "lora_te1_", "lora_te_", "lora_", ""])
def test_prefixes_are_detected(prefix):
    _, made = ours("lora", ["linear", "blocks.0.fc", "conv2d"])
    found = files.read(files.write(made, prefix=prefix), every_target(layers()), where="file")
    assert set(found) == set(made)


def test_dotted_names_and_half_precision_are_read():
    _, made = ours("lora", ["blocks.0.fc"])
    a = made["blocks.0.fc"].tensors()
    stem = "diffusion_model.blocks.0.fc"
    tensors = {f"{stem}.lora_A.weight": a["lora_A"].half(), f"{stem}.lora_B.weight": a["lora_B"].bfloat16()}
    found = files.read(tensors, every_target(layers()), where="file")["blocks.0.fc"]
    assert found.scaling == 1.0 and found.tensors()["lora_A"].dtype == torch.float32
    assert torch.equal(found.tensors()["lora_A"], a["lora_A"].half().float())


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})


def test_paths_that_agree_without_their_dots_are_refused_both_ways():
    targets = every_target(Twins())
    made = {n: fresh("lora", t, 2) for n, t in targets.items()}
    with pytest.raises(ModelError, match="without their dots"):
        files.write(made)
    one = files.write({"a.b_c": made["a.b_c"]})
    with pytest.raises(ModelError, match=r"a\.b_c or a_b\.c"):
        files.read(one, targets, where="file")


BAD = {
    "no layer": (lambda t: {k.replace("linear", "nowhere"): v for k, v in t.items()}, "layers are"),
    "half": (lambda t: {k: v for k, v in t.items() if "lora_up" not in k}, "lora_B is missing"),
    "only alpha": (lambda t: {k: v for k, v in t.items() if "alpha" in k}, "tensors of one kind"),
    "mixed": (lambda t: t | {"lycoris_linear.hada_w1_a": torch.zeros(2, 2)}, "loha and lora"),
    "algorithm": (lambda t: t | {"lycoris_linear.oft_blocks": torch.zeros(2, 2)}, "oft_blocks"),
    "nan": (lambda t: {k: v * torch.nan for k, v in t.items()}, "finite"),
    "nan alpha": (lambda t: t | {"lycoris_linear.alpha": torch.tensor(torch.nan)}, "finite"),
    "alphas": (lambda t: t | {"lycoris_linear.alpha": torch.ones(3)}, "one number"),
    "shape": (lambda t: {k: v[:, :-1] if "down" in k else v for k, v in t.items()}, "expected shape"),
    "scalar": (lambda t: {k: v.sum() if "down" in k else v for k, v in t.items()}, "lora_A|lora_down"),
    "magnitude": (lambda t: t | {"lycoris_linear.dora_scale": torch.ones(5, 1)}, "magnitude"),
    "twice": (lambda t: t | {k.replace("lycoris_", "lora_unet_"): v for k, v in t.items()}, "two for linear"),
    "nothing": (lambda t: {}, "at least one layer"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_files_are_refused_in_one_line(fault):
    _, made = ours("lora", ["linear"])
    change, word = BAD[fault]
    with pytest.raises(ModelError, match=word) as caught:
        files.read(change(files.write(made)), every_target(layers()), where="file.safetensors")
    assert "\n" not in str(caught.value) and "file.safetensors" in str(caught.value)


@pytest.mark.parametrize("kind", ["lokh", "core"])
def test_what_they_do_not_know_is_refused_with_what_to_do(kind):
    made = {"linear": copy.deepcopy(fresh("lokh", every_target(layers())["linear"], 1))}
    made["linear"].kind = kind
    with pytest.raises(ModelError, match="--to lora"):
        files.write(made)
    embedding = {"embed": fresh("lora", every_target(layers())["embed"], 1)}
    with pytest.raises(ModelError, match="linear layer or a convolution"):
        files.write(embedding)
