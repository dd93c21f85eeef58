"""What `inspect` says of a network: spectra that theory knows, forms that were planted, reasons, plots, exit codes."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lrcompress
from lrcompress.cli.main import run
from lrcompress.data import Data
from lrcompress.errors import CommandError, ModelError
from lrcompress.factorize import Statistics, form, forms
from lrcompress.factorize.kronecker import blocks
from lrcompress.inspect import Spectrum, Terms, comparing, look
from lrcompress.model import InputSpec
from lrcompress.model.surgery import Layer
from tests.support.nets import images, small

SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
ARCH = {"arch": "tests.support.nets:small", "inputs": SPEC}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(values: list[float], rows: int, columns: int) -> torch.Tensor:
    """Return a matrix with these singular values."""
    left, right = (
        torch.linalg.qr(random(rows, len(values)))[0],
        torch.linalg.qr(random(columns, len(values), seed=1))[0],
    )
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def moments(rows: int, columns: int) -> Statistics:
    x, y = random(3 * columns, columns, seed=2), random(3 * rows, rows, seed=3)
    return Statistics(gram=x.T @ x / len(x), output_gram=y.T @ y / len(y), count=len(x))


def seen(weight: torch.Tensor, statistics: Statistics | None = None, kind: str | None = None, **terms: object):
    kind = kind or ("linear" if weight.dim() == 2 else "conv")
    return look(Layer("w", kind, weight), statistics, Terms(**terms))  # type: ignore[arg-type]


def strict(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def state(tmp_path):
    save_file(small().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("shape", [(40, 30), (16, 90), (16, 8, 3, 3)])
@pytest.mark.parametrize("rank", [1, 7])
def test_a_planted_rank_is_found(shape, rank):
    w = with_values([2.0 - i / 10 for i in range(rank)], shape[0], math.prod(shape[1:])).reshape(shape)
    spectrum = Spectrum.of(w)
    assert spectrum.rank_at(0.9999) == spectrum.rank_at(1.0) == rank
    assert spectrum.tail(rank) < 1e-20 < spectrum.tail(rank - 1)


def test_stable_and_effective_rank_of_known_spectra():
    spectrum = Spectrum.of(with_values([2.0, 1.0, 1.0], 9, 12))
    assert spectrum.stable_rank == pytest.approx(6 / 4)
    p = (4 / 6, 1 / 6, 1 / 6)
    assert spectrum.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    for n, w in ((8, 5 * torch.eye(8)), (1, torch.ones(6, 9)), (3, with_values([4.0] * 3, 7, 7))):
        found = Spectrum.of(w)
        assert found.stable_rank == pytest.approx(n) and found.effective_rank == pytest.approx(n)


def test_ranks_at_energies_of_a_known_spectrum():
    spectrum = Spectrum.of(with_values([3.0, 1.0, 1.0, 1.0], 10, 10))  # squares 9, 1, 1, 1
    assert [spectrum.rank_at(e) for e in (0.5, 0.75, 0.76, 10 / 12, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert spectrum.lost[:5] == pytest.approx([1, 3 / 12, 2 / 12, 1 / 12, 0], abs=1e-12)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_the_weighted_spectrum_is_that_of_the_metric_problem(shape):
    """σ² are the eigenvalues of G W S Wᵀ, which no choice of roots enters."""
    w, metric = random(*shape), moments(*shape)
    found = Spectrum.of(w, metric).squares
    expected = torch.linalg.eigvals(metric.g @ w @ metric.s @ w.T).real.sort(descending=True).values
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-8, atol=1e-10 * float(found[0]))
    assert float(found.sum()) == pytest.approx(metric.loss(w))


def test_an_identity_metric_changes_nothing():
    w = random(9, 14)
    eye = Statistics(gram=torch.eye(14, dtype=torch.float64))
    torch.testing.assert_close(Spectrum.of(w, eye).squares, Spectrum.of(w).squares, rtol=1e-8, atol=1e-10)


def test_a_kronecker_product_makes_kronecker_win():
    first, second = blocks((36, 16))
    assert min(*first, *second) > 1
    found = seen(torch.kron(random(*first), random(*second, seed=1)), share=0.3)
    facts = found.facts()
    assert facts["best"]["form"] == "kronecker" and facts["forms"][0]["rel_error"] < 1e-7
    assert facts["best"]["loss_over_svd"] < 1e-12 and facts["worth"]


@pytest.mark.parametrize("with_data", [False, True])
def test_a_planted_tucker_makes_tucker_win(with_data):
    core, out, inner = random(6, 5, 3, 3), random(16, 6, seed=1), random(16, 5, seed=2)
    w = torch.einsum("oa,abhw,ib->oihw", out, core, inner)
    found = seen(w, moments(16, 144) if with_data else None, share=0.3)
    assert "tucker" in found.best.form and found.rel_error(found.best) < 1e-6
    others = [c for c in found.candidates if "tucker" not in c.form]
    assert len(others) >= 4 and all(found.rel_error(c) > 1e-2 for c in others)


def test_a_planted_spatial_kernel_makes_spatial_svd_win():
    w = torch.einsum("rih,orw->oihw", random(9, 16, 3), random(16, 9, 3, seed=1))
    found = seen(w)
    assert found.best.form == "spatial_svd" and found.rel_error(found.best) < 1e-7


def test_without_redundancy_is_never_worse_than_the_svd():
    found = seen(random(30, 40))
    by_form = {c.form: c for c in found.candidates}
    assert by_form["pivoted"].loss <= by_form["svd"].loss and by_form["pivoted"].rank > by_form["svd"].rank
    facts = found.facts()["best"]
    assert facts["loss_over_svd"] == pytest.approx(found.best.loss / by_form["svd"].loss)
    assert facts["runner_up"] == found.candidates[1].form
    assert facts["loss_over_runner_up"] == pytest.approx(found.best.loss / found.candidates[1].loss)


@pytest.mark.parametrize("shape", [(24, 30), (12, 8, 3, 3)])
@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("with_data", [False, True])
def test_all_stay_within_the_budget_and_use_it(shape, share, with_data):
    w = random(*shape)
    metric = moments(shape[0], math.prod(shape[1:])) if with_data else None
    found = seen(w, metric, share=share)
    assert {c.form for c in found.candidates} >= {"svd", "kronecker"}
    for c in found.candidates:
        assert c.n_params <= share * w.numel() and c.n_params == form(c.form).n_params(shape, c.rank)
        reached = form(c.form).decompose(w, c.rank, metric)
        assert c.loss == pytest.approx(reached.loss, rel=1e-6) and found.rel_error(c) == pytest.approx(
            reached.rel_error, rel=1e-6
        )
        if isinstance(c.rank, int) and c.rank < form(c.form).full_rank(shape):
            assert form(c.form).n_params(shape, c.rank + 1) > share * w.numel()
    assert [c.loss for c in found.candidates] == sorted(c.loss for c in found.candidates)


def test_a_missing_bias_counts_against_the_budget():
    w = random(20, 20)
    metric = Statistics(gram=torch.eye(20, dtype=torch.float64), mean=torch.ones(20, dtype=torch.float64))
    biased, bare = (look(Layer("w", "linear", w, has_bias=b), metric, Terms()) for b in (True, False))
    assert max(c.n_params for c in biased.candidates) <= 200 and max(c.n_params for c in bare.candidates) <= 180


def test_forms_that_only_save_bytes_are_compared_on_request():
    usual, all_of_them = seen(random(16, 18)), seen(random(16, 18), all_forms=True)
    extra = {c.form for c in all_of_them.candidates} - {c.form for c in usual.candidates}
    serving = {n for n in forms() if "linear" in form(n).LAYERS}
    assert extra == {n for n in serving if not getattr(form(n), "AUTO", True)} and "hadamard" in extra


def test_what_costs_too_much_is_left_out_and_said(monkeypatch, state, capsys):
    monkeypatch.setattr(comparing, "WORK_LIMIT", 1000)
    found = seen(random(24, 24))
    assert {c.form for c in found.candidates} == {"svd", "pivoted"}
    assert [(n.form, n.cause) for n in found.left_out] == [("kronecker", "cost")]
    assert "kronecker" in {c.form for c in seen(random(24, 24), all_forms=True).candidates}
    assert run(["inspect", str(state), "-q", "--include", "fc1"]) == 0
    assert "not compared for its cost: kronecker" in capsys.readouterr().out


def test_a_flat_spectrum_is_not_worth_it():
    flat, steep = seen(torch.linalg.qr(random(48, 48))[0]), seen(with_values([2.0**-i for i in range(48)], 48, 48))
    assert flat.why.startswith("flat spectrum: at 50% of its numbers") and not flat.facts()["worth"]
    assert steep.why is None
    assert seen(torch.linalg.qr(random(48, 48))[0], max_loss=0.99).why is None


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (torch.zeros(8, 8), "all zeros"),
        (torch.ones(1, 1), "would not shrink"),
        (torch.ones(3, 1), "would not shrink"),
        (torch.full((4, 4), math.nan), "not finite"),
        (torch.ones(4, 4, dtype=torch.int32), "int32"),
        (torch.zeros(0, 4), "no elements"),
        (torch.zeros(8, 4, 3, 3), "all zeros"),
        (torch.ones(6, 6, device="meta"), "meta"),
    ],
)
def test_degenerate_weights_are_told_and_do_no_harm(weight, why):
    found = seen(weight)
    assert why in found.why
    strict(json.dumps(found.facts(), allow_nan=False))


def test_dead_statistics_do_no_harm():
    w = random(8, 12)
    for metric in (Statistics(), Statistics(gram=torch.zeros(12, 12), mean=torch.zeros(12), count=5)):
        facts = seen(w, metric).facts()
        assert facts["worth"] in (True, False) and strict(json.dumps(facts, allow_nan=False))
    assert seen(w, Statistics()).weighted is None


def test_groups_share_one_rank():
    w = random(3, 8, 4, 3, 3)
    found = look(Layer("w", "grouped", w), None, Terms())
    rank = next(c.rank for c in found.candidates if c.form == "grouped_svd")
    assert found.candidates[0].loss == pytest.approx(form("grouped_svd").decompose(w, rank).loss)
    assert found.facts()["spectrum"]["plain"]["energies"][0]["params"] % form("grouped_svd").n_params(w.shape, 1) == 0


class Odd(nn.Module):
    """Layers that must stay as they are, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.depthwise, self.one, self.zero = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(1, 1), nn.Linear(12, 12)
        self.tokens = nn.Embedding(60, 8)
        nn.init.zeros_(self.zero.weight)
        self.tokens.weight.data = with_values([3.0, 1.0, 0.1], 60, 8).float()


def test_reasons_are_given_and_json_has_no_nan(tmp_path, capsys):
    torch.save(Odd(), tmp_path / "odd.pt")
    assert (
        run(["inspect", str(tmp_path / "odd.pt"), "--trust-pickle", "--json", "-q", "-o", str(tmp_path / "out")]) == 0
    )
    answer = strict(capsys.readouterr().out)
    layers = {n["name"]: n for n in answer["layers"]}
    assert layers["head"]["why"] == "shares the factors of embed" and layers["embed"]["best"]["form"] in forms()
    assert "depthwise" in layers["depthwise"]["why"] and "zeros" in layers["zero"]["why"]
    assert "would not shrink" in layers["one"]["why"] and layers["tokens"]["best"]["form"] in forms()
    assert (
        answer["ok"]
        and answer["summary"]["layers"] == len(layers)
        and sum(answer["summary"]["wins"].values()) == answer["summary"]["worth"]
    )
    assert answer["summary"]["params_before"] == sum(p.numel() for n, p in Odd().named_parameters() if "bias" not in n)
    strict((tmp_path / "out" / "inspect.json").read_text())


@pytest.mark.parametrize("source", ["state_dict", "safetensors", "arch", "pt2", "object"])
def test_every_source_of_one_network_tells_the_same(source, tmp_path, state):
    x = torch.as_tensor(images(4)[0])
    if source == "state_dict":
        torch.save(small().state_dict(), tmp_path / "m.pt")
        found = lrcompress.inspect(tmp_path / "m.pt")
    elif source == "pt2":
        torch.export.save(torch.export.export(small(), (x,)), tmp_path / "m.pt2")
        found = lrcompress.inspect(tmp_path / "m.pt2")
    else:
        found = (
            lrcompress.inspect(small())
            if source == "object"
            else lrcompress.inspect(state, **(ARCH if source == "arch" else {}))
        )
    layers = {n["name"]: n for n in found.data["layers"]}
    assert set(layers) == {"conv1", "conv2", "mix", "fc1", "fc2"}
    for name, module in small().named_modules():
        if name in layers:
            assert layers[name]["spectrum"]["plain"]["stable_rank"] == pytest.approx(
                Spectrum.of(module.weight.detach()).stable_rank
            )
            assert layers[name]["norm"] == "frobenius" and layers[name]["spectrum"]["weighted"] is None


def test_data_weigh_the_spectra(state):
    calib = Data.of_arrays({"x": images(64)[0]})
    found = lrcompress.inspect(state, calib=calib, **ARCH).data["layers"]
    for layer in found:
        assert layer["norm"] == layer["spectrum"]["weighted"]["norm"] == "two_sided"
        assert layer["spectrum"]["weighted"]["full_rank"] == layer["spectrum"]["plain"]["full_rank"]
    with pytest.raises(ModelError, match="--arch"):
        lrcompress.inspect(state, calib=calib)


def test_include_and_exclude(state, capsys):
    found = lrcompress.inspect(state, include=["fc*"], exclude=["fc2"]).data
    assert [n["name"] for n in found["layers"]] == ["fc1"] and found["summary"]["left_out_by_patterns"] == 4
    with pytest.raises(CommandError, match="lrcompress inspect --include"):
        lrcompress.inspect(state, include=["nope*"])


def test_the_folder_holds_plots_that_open(state, tmp_path):
    found = lrcompress.inspect(state, output=tmp_path / "seen", calib=Data.of_arrays({"x": images(32)[0]}), **ARCH)
    names = {p.name for p in found.output.iterdir()}
    assert names == {f"{n}.{k}" for n in ("spectra", "energy", "forms") for k in ("png", "svg")} | {"inspect.json"}
    for path in found.output.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000
    texts = {p.stem: " ".join(ElementTree.fromstring(p.read_text()).itertext()) for p in found.output.glob("*.svg")}
    assert "conv1" in texts["spectra"] and "on the data" in texts["spectra"] and "spatial_svd" in texts["forms"]
    assert "energy lost (%" in texts["energy"]
    facts = strict((found.output / "inspect.json").read_text())
    assert facts["made_by"] == "lrcompress inspect" and facts["layers"] == json.loads(json.dumps(found.data["layers"]))
    values = facts["relative_singular_values"]["fc1"]
    assert values["plain"][0] == values["weighted"][0] == 1.0 and len(values["plain"]) == 32


def test_plots_are_the_same_bytes_again(state, tmp_path):
    for name in ("one", "two"):
        lrcompress.inspect(state, output=tmp_path / name)
    for path in (tmp_path / "one").glob("*.??g"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_network_with_nothing_to_draw_still_writes_its_folder(tmp_path):
    found = lrcompress.inspect(nn.Sequential(nn.Linear(1, 1)), output=tmp_path / "out")
    assert {p.name for p in found.output.iterdir()} == {"inspect.json"}


def test_a_folder_of_somebody_else_is_left_alone(state, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CommandError, match="lrcompress inspect"):
        lrcompress.inspect(state, output=tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_the_table_aligns_and_says_what_its_words_mean(tmp_path, capsys):
    torch.save(small().state_dict(), tmp_path / "model.pt")
    assert run(["inspect", str(tmp_path / "model.pt"), "-q"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for i in (i for i, line in enumerate(lines) if set(line) == {"─", " "}):
        starts = [k for k, c in enumerate(lines[i]) if c == "─" and (k == 0 or lines[i][k - 1] == " ")]
        body = [lines[i - 1], *lines[i + 1 : lines.index("", i)]]
        for row in body:  # every column is set apart from the one before by two blanks
            assert all(row[k - 2 : k] in ("  ", "") for k in starts[1:]), row
    order = [line.split()[0] for line in lines[4:9]]
    assert order == ["conv1", "conv2", "mix", "fc1", "fc2"]
    assert "of 5 layers are worth factorizing" in text and "Rudelson" in text and "Roy & Vetterli" in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nosuch.pt"], 4, "nosuch.pt"),
        ([], 2, "a model, or --theory FORM"),
        (["m.pt", "--theory", "svd"], 2, "both"),
        (["--theory", "hadamrad"], 2, "did you mean 'hadamard'"),
        (["--theory", "svd", "-o", "out"], 2, "-o"),
        (["m.pt", "--share", "0"], 2, "--share"),
        (["m.pt", "--max-loss", "1.5"], 2, "--max-loss"),
        (["m.pt", "--compute", "gpu"], 2, "--compute"),
    ],
)
def test_exit_codes(arguments, code, says, capsys):
    assert run(["inspect", *arguments, "--json", "-q"]) == code
    out, err = capsys.readouterr()
    assert strict(out)["error"]["code"] == code and says in err and err.count("\n") == 1
