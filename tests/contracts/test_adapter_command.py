"""`lrcompress adapter`: every subcommand on real folders, exact where it says so, and one clear line where it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lrcompress.adapt import kinds
from lrcompress.adapt._combine import stacked, truncated
from lrcompress.adapt._files import read_adapter, write_adapter
from lrcompress.adapt.interop.peft import of_pair
from lrcompress.cli.main import root, run
from lrcompress.model.adapting import every_target, fresh, takes
from lrcompress.model.checkpoint import load_compressed
from lrcompress.model.surgery import attach, wrap_dense
from lrcompress.verbs.adapter_check import TOLERANCE, merge
from tests.support.workshop import X, here, ready, tree  # noqa: F401


def random_adapters(kind: str, seed: int = 0, rank: int = 2, layers=(), **options) -> dict:
    """Return random adapters for the checkpoint `ok/compressed`."""
    module = load_compressed(Path("ok/compressed")).module
    g, made = torch.Generator().manual_seed(seed), {}
    for name, target in every_target(module).items():
        if takes(kind, target) and (not layers or name in layers):
            made[name] = fresh(kind, target, rank, 3.0, generator=g, **options)
            with torch.no_grad():
                for p in made[name].parameters():
                    p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return made


def folder(name: str, kind: str = "lora", seed: int = 0, base: str | None = "", **options) -> Path:
    path = Path("adapters") / name
    path.mkdir(parents=True)
    digest = load_compressed(Path("ok/compressed")).digest if base == "" else base
    write_adapter(path, random_adapters(kind, seed, **options), maker="test", base=digest, info={})
    return path


def answers(compressed: Path, *adapters: tuple[Path, float]) -> np.ndarray:
    module = load_compressed(compressed).module
    for path, weight in adapters:
        found = read_adapter(path)
        attach(module, path.name, lambda name, _, f=found: f.adapters[name], list(found.adapters))
        for name in found.adapters:
            module.get_submodule(name).active[path.name] = weight
    with torch.no_grad():
        return module(torch.as_tensor(X[:6])).numpy()


def said(capsys, *argv: str) -> tuple[int, dict]:
    code = run(["adapter", *argv, "--json", "--quiet"])
    return code, json.loads(capsys.readouterr().out)


def test_list_and_show_say_what_there_is(here, capsys):  # noqa: F811
    folder("first"), folder("second", "lokr", rank=3)
    broken = folder("third")
    (broken / "adapter_model.safetensors").write_bytes(b"x")
    code, d = said(capsys, "list")
    rows = {r["name"]: r for r in d["adapters"]}
    assert code == 0 and list(rows) == ["first", "second", "third"]
    assert (rows["first"]["kind"], rows["second"]["kind"]) == ("lora", "lokr") and "intact" in rows["third"]["error"]
    assert rows["first"]["params"] == sum(p.numel() for a in random_adapters("lora").values() for p in a.parameters())
    code, d = said(capsys, "show", "adapters/first", "--base", "ok/compressed")
    assert code == 0 and all(0 < r["share"] < 10 for r in d["layers"]) and d["kind"] == "lora"
    text = CliRunner().invoke(root, ["adapter", "show", "adapters/first"])
    assert text.exit_code == 0 and "conv2" in text.output and "1.5" in text.output


@pytest.mark.parametrize("kind", kinds())
def test_check_finds_all_ways_equal(kind, here, capsys):  # noqa: F811
    path = folder("a", kind, rank=3)
    code, d = said(capsys, "check", "ok/compressed", str(path))
    assert code == 0 and d["passed"] and {r["name"] for r in d["layers"]} == set(read_adapter(path).adapters)
    assert all(
        r["route"] == "slot" and r["moves"] > 1e-2 and r["merged"] <= TOLERANCE and r["runtime"] <= TOLERANCE
        for r in d["layers"]
    )


def test_check_of_a_decomposed_weight_goes_through_slots(here, capsys):  # noqa: F811
    made, module = random_adapters("lora"), load_compressed(Path("ok/compressed")).module
    for name, a in made.items():
        a.decompose(wrap_dense(module, name).weight)
        with torch.no_grad():
            a.magnitude *= 1.5
    Path("dora").mkdir()
    write_adapter(Path("dora"), made, maker="test", base=None, info={})
    code, d = said(capsys, "check", "ok/compressed", "dora", "--include", "fc*")
    assert (
        code == 0
        and {r["name"] for r in d["layers"]} == {"fc1", "fc2"}
        and {r["route"] for r in d["layers"]} == {"slot"}
    )


def test_check_misses_what_is_not_equal(here, capsys, monkeypatch):  # noqa: F811
    """A forward pass that is not the merged one is exit 5, with the layer."""
    path = folder("a", layers=("fc1", "fc2"))
    from lrcompress.adapt.lora import Adapter

    add_to, summed = Adapter.add_to, Adapter.summed
    monkeypatch.setattr(
        Adapter, "add_to", lambda a, y, x, t, s: add_to(a, y, x, t, s * (1.01 if t.shape[0] == 5 else 1))
    )
    monkeypatch.setattr(Adapter, "summed", lambda a, w, s: summed(a, w, s * (1.01 if len(w) == 5 else 1)))
    code, d = said(capsys, "check", "ok/compressed", str(path))
    assert code == 5 and not d["passed"] and [r["name"] for r in d["layers"] if not r["passed"]] == ["fc2"]


@pytest.mark.parametrize("kind", kinds())
def test_merge_writes_a_checkpoint_that_answers_the_same(kind, here, capsys):  # noqa: F811
    one, two = folder("one", kind), folder("two", "lora", seed=5)
    before = tree(Path("ok"))
    code, d = said(
        capsys, "merge", "ok/compressed", str(one), str(two), "--weight", "0.5", "--weight", "-1", "-o", "merged"
    )
    assert code == 0 and tree(Path("ok")) == before
    expected = answers(Path("ok/compressed"), (one, 0.5), (two, -1.0))
    assert np.abs(expected - answers(Path("ok/compressed"))).max() > 1e-2
    np.testing.assert_allclose(answers(Path("merged")), expected, rtol=1e-3, atol=1e-4)
    assert load_compressed(Path("merged")).digest == d["digest"] != load_compressed(Path("ok/compressed")).digest
    # The result is a checkpoint like any other: it can be exported, and knows its original.
    if kind == "lora":
        assert run(["export", "merged", "-o", "out", "--quiet"]) == 0
    assert (
        load_compressed(Path("merged")).open_original().digest
        == load_compressed(Path("ok/compressed")).open_original().digest
    )


def test_a_core_alone_merges_with_no_number_more(here, capsys):  # noqa: F811
    path = folder("core", "core")
    assert said(capsys, "merge", "ok/compressed", str(path), "-o", "merged")[0] == 0
    old, new = (load_file(Path(f) / "model.safetensors") for f in ("ok/compressed", "merged"))
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    np.testing.assert_allclose(
        answers(Path("merged")), answers(Path("ok/compressed"), (path, 1.0)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokh", "core"])
def test_expansion_to_lora_is_exact(kind, here, capsys):  # noqa: F811
    path = folder("a", kind)
    code, d = said(capsys, "convert", str(path), "--to", "lora", "--base", "ok/compressed", "-o", "as-lora")
    assert code == 0 and all(r["rel_error"] == 0 for r in d["layers"])
    assert read_adapter(Path("as-lora")).kind == "lora"
    np.testing.assert_allclose(
        answers(Path("ok/compressed"), (Path("as-lora"), 1.0)),
        answers(Path("ok/compressed"), (path, 1.0)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_cutting_to_a_rank_is_eckart_young_and_says_its_error(here, capsys):  # noqa: F811
    path = folder("a", "loha", rank=2)
    code, d = said(capsys, "convert", str(path), "--to", "lora", "--rank", "2", "-o", "cut")
    cut, whole = read_adapter(Path("cut")), read_adapter(path)
    assert code == 0
    for row in d["layers"]:
        delta = whole.adapters[row["name"]].delta_weight().detach().flatten(1).double()
        sigma = torch.linalg.svdvals(delta)
        best = float((sigma[2:].square().sum() / sigma.square().sum()).sqrt())
        got = float(
            (cut.adapters[row["name"]].delta_weight().detach().flatten(1).double() - delta).norm() / delta.norm()
        )
        assert (
            row["rank"] <= 2
            and row["rel_error"] == pytest.approx(best, abs=1e-6)
            and got == pytest.approx(best, abs=1e-5)
        )
    text = CliRunner().invoke(root, ["adapter", "convert", str(path), "--rank", "1", "-o", "cut1"])
    assert "largest error" in text.output


@pytest.mark.parametrize("rank", [None, 3])
def test_combine_adds_by_weight(rank, here, capsys):  # noqa: F811
    one, two = folder("one"), folder("two", "lokr", seed=3, layers=("conv2", "fc1"))
    extra = [] if rank is None else ["--rank", str(rank)]
    code, d = said(capsys, "combine", str(one), str(two), "--weight", "1", "--weight", "-2", *extra, "-o", "both")
    assert code == 0 and {r["name"]: r["parts"] for r in d["layers"]}["fc1"] == 2
    if rank is None:
        assert all(r["rel_error"] == 0 for r in d["layers"])
        expected = answers(Path("ok/compressed"), (one, 1.0), (two, -2.0))
        np.testing.assert_allclose(answers(Path("ok/compressed"), (Path("both"), 1.0)), expected, rtol=1e-4, atol=1e-5)
    else:
        assert max(r["rel_error"] for r in d["layers"]) > 0.01 and all(r["rank"] <= 3 for r in d["layers"])
    assert read_adapter(Path("both")).base == load_compressed(Path("ok/compressed")).digest


def test_cores_combine_to_a_core(here, capsys):  # noqa: F811
    one, two = folder("one", "core"), folder("two", "core", seed=3)
    assert said(capsys, "combine", str(one), str(two), "--weight", "2", "--weight", "1", "-o", "both")[0] == 0
    assert read_adapter(Path("both")).kind == "core"
    expected = answers(Path("ok/compressed"), (one, 2.0), (two, 1.0))
    np.testing.assert_allclose(answers(Path("ok/compressed"), (Path("both"), 1.0)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_round_trips_through_other_formats_keep_every_bit(kind, here, capsys):  # noqa: F811
    path = folder("a", kind, rank=1)
    assert said(capsys, "convert", str(path), "--to", "lycoris", "-o", "a.safetensors")[0] == 0
    assert said(capsys, "convert", "a.safetensors", "--base", "ok/compressed", "-o", "back")[0] == 0
    assert said(capsys, "convert", "back", "--to", "peft", "-o", "peft")[0] == 0
    a, b = read_adapter(path), read_adapter(Path("peft"))
    assert b.kind == kind
    for name, one in a.adapters.items():
        assert torch.equal(one.delta_weight(), b.adapters[name].delta_weight()), name


def test_stacking_is_exact_and_of_the_summed_rank():
    g = torch.Generator().manual_seed(0)
    parts = [
        of_pair(
            torch.randn(r, 9, generator=g),
            torch.randn(7, r, generator=g),
            every_target(torch.nn.Sequential(torch.nn.Linear(9, 7)))["0"],
        )
        for r in (1, 2)
    ]
    both = stacked([(parts[0].double(), 0.3), (parts[1].double(), -2.0)])
    assert both.rank == 3
    torch.testing.assert_close(both.delta_weight(), 0.3 * parts[0].delta_weight() - 2 * parts[1].delta_weight())
    same, error = truncated(both, 3)
    assert error == 0
    torch.testing.assert_close(same.delta_weight(), both.delta_weight())
    nothing, error = truncated(of_pair(torch.zeros(2, 9), torch.zeros(7, 2), both.target), 1)
    assert error == 0 and not nothing.delta_weight().any()


# bad input ------------------------------------------------------------------------------------------------------------


def bad(capsys, words: str, code: int, *argv: str) -> None:
    """The command refuses in one line, with its code, and writes nothing."""
    before = tree(Path())
    assert run(["adapter", *argv, "--quiet"]) == code
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and words in line, line
    assert tree(Path()) == before


def test_bad_requests(here, capsys):  # noqa: F811
    path = str(folder("a"))
    bad(capsys, "native or peft or lycoris or lora", 2, "convert", path, "--to", "onnx", "-o", "x")
    bad(capsys, "at least 1", 2, "convert", path, "--rank", "0", "-o", "x")
    bad(capsys, "fcc*", 2, "convert", path, "--include", "fcc*", "-o", "x")
    bad(capsys, "conv1, conv2", 2, "check", "ok/compressed", path, "--include", "nothing")
    bad(capsys, "new .safetensors file", 2, "convert", path, "--to", "lycoris", "-o", "x")
    bad(capsys, "2 weights", 2, "combine", path, path, "--weight", "1", "-o", "x")
    bad(capsys, "1 weights", 2, "merge", "ok/compressed", path, "--weight", "1", "--weight", "2", "-o", "x")
    bad(capsys, "nothing is yet", 2, "merge", "ok/compressed", path, "-o", "ok/compressed")
    bad(capsys, "made by something else", 2, "convert", path, "-o", "ok")
    bad(capsys, "no folder", 2, "list", "nowhere")
    bad(capsys, "nothing there", 2, "show", "nowhere")


def test_bad_adapters(here, capsys):  # noqa: F811
    other = str(folder("other", base="ab" * 32))
    bad(capsys, "one for abababababab", 4, "check", "ok/compressed", other)
    bad(capsys, "one for abababababab", 4, "merge", "ok/compressed", other, "-o", "x")
    bad(capsys, "adapters of one base", 4, "combine", other, str(folder("mine")), "-o", "x")
    core = str(folder("core", "core"))
    bad(capsys, "--base", 4, "convert", core, "--to", "lora", "-o", "x")
    bad(capsys, "kind that PEFT knows", 4, "convert", core, "--to", "peft", "-o", "x")
    bad(capsys, "kind that LyCORIS knows", 4, "convert", core, "--to", "lycoris", "-o", "x.safetensors")
    half = Path("half.safetensors")
    save_file({"lora_unet_nowhere.alpha": torch.ones(1)}, half)
    bad(capsys, "name the model with --base", 2, "convert", str(half), "-o", "x")
    bad(capsys, "the name of a layer of the base", 4, "convert", str(half), "--base", "ok/compressed", "-o", "x")
    half.write_bytes(half.read_bytes()[:-3])
    bad(capsys, "intact .safetensors", 4, "show", str(half), "--base", "ok/compressed")
    gone = folder("gone")
    (gone / "adapter_config.json").unlink()
    bad(capsys, "adapter folder", 4, "show", str(gone))


def test_a_merge_that_fails_half_way_leaves_nothing(here, capsys):  # noqa: F811
    path = folder("a")
    tensors = load_file(path / "adapter_model.safetensors")
    key = sorted(k for k in tensors if "lora_B" in k)[-1]
    save_file(tensors | {key: tensors[key] * 1e38 * 1e3}, path / "adapter_model.safetensors")
    bad(capsys, "finite", 4, "merge", "ok/compressed", str(path), "-o", "x")
    save_file(tensors | {key: torch.full_like(tensors[key], 3e38)}, path / "adapter_model.safetensors")
    bad(capsys, "finite", 4, "merge", "ok/compressed", str(path), "-o", "x")


def test_merge_needs_a_checkpoint(here, capsys):  # noqa: F811
    from lrcompress.errors import CommandError
    from lrcompress.verbs.adapter import open_base

    path = folder("a", base=None)
    base = open_base("model.pt", arch="tests.support.nets:small")
    with pytest.raises(CommandError, match="factorize"):
        merge([path], base, output="x")
    shutil.rmtree("adapters")
