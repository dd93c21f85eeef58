"""The harness around the formulas, on a network of a few thousand numbers: budgets, passes, and what cannot run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrcompress.data import Data
from lrcompress.errors import CommandError
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import count_parameters, find_layers
from lrcompress.verbs.predict import predictor
from tests.benchmarks import bench_peers
from tests.benchmarks.peers import drift, formulas, runtime
from tests.benchmarks.peers.networks import Network, Profile, _draw
from tests.benchmarks.peers.rows import ROWS, ours
from tests.support.nets import images, small

FORMULAS = [
    formulas.svd, formulas.asvd, formulas.svd_llm, formulas.svd_llm_v2, formulas.aa_svd, formulas.lems,
    formulas.lems_squared, formulas.balf,
]  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    """Return the small network with 96 calibration images; its first convolution and its classifier are spared."""
    module, (x, y) = small(), images(144)
    opened = open_model(module, inputs=(InputSpec("x", "float32", ("batch", 3, 8, 8)),))
    data = Data.of_arrays({"x": x}, y)
    profile = Profile("none", "accuracy", (0.5,), (96, 96), (48, 48), spared=("conv1", "fc2"))
    layers = [layer for layer in find_layers(module) if layer.reason is None]
    assert opened.module is not None
    calibration, rest = data.take(slice(0, 96)), data.take(slice(96, 144))
    return Network("small", profile, opened, opened.module, layers, calibration, rest, 0, True)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
def test_a_row_keeps_its_budget_and_the_network(
    network: Network, formula: Callable[[Network, float], formulas.Made]
) -> None:
    untouched = {k: v.clone() for k, v in network.module.state_dict().items()}
    module = formula(network, 0.5).module
    assert 0.3 * network.params < count_parameters(module) <= 0.5 * network.params
    assert all(torch.equal(v, untouched[k]) for k, v in network.module.state_dict().items())


def test_a_row_becomes_one_file_that_answers_alike(network: Network, tmp_path: Path) -> None:
    module = formulas.balf(network, 0.5).module
    graph, stored = runtime.own_graph(network, module, tmp_path), count_parameters(module)
    # All numbers are in it, and the dense weights do not stand beside the factors.
    assert 4 * stored <= len(graph.SerializeToString()) < 4 * stored + 20_000
    x = next(network.evaluation.batches(16)).inputs
    expected, got = predictor(network.opened, module)(x), runtime.runner(graph, 1)(x)
    np.testing.assert_allclose(got["output"], expected["output"], rtol=1e-4, atol=1e-4)


def test_tucker_says_where_convolutions_alone_cannot_pay(network: Network) -> None:
    assert count_parameters(formulas.tucker2(network, 0.8).module) <= 0.8 * network.params
    with pytest.raises(ValueError, match=r"even Tucker ranks of 1 leave \d+ numbers, more than 6893"):
        formulas.tucker2(network, 0.5)


def test_our_row_and_evbmf_run_too(network: Network) -> None:
    made = ours(network, 0.5)
    assert count_parameters(made.module) <= 0.5 * network.params and "dense" in made.notes
    assert count_parameters(formulas.tucker2_evbmf(network, 0.5).module) < network.params


def test_the_whole_budget_leaves_the_network_as_it_is(network: Network) -> None:
    x = torch.as_tensor(next(network.evaluation.batches(16)).inputs["x"])
    for formula in (formulas.svd, formulas.balf, formulas.lems, formulas.aa_svd):
        assert torch.equal(formula(network, 1.0).module(x), network.module(x))


def test_budgets_count_the_whole_network_or_the_scope(network: Network) -> None:
    fixed = network.params - network.in_scope
    assert network.budget(0.5) == network.params // 2 - fixed
    assert network.ratio(0.5) == pytest.approx(0.5, abs=1e-4)
    part = replace(network, profile=replace(network.profile, whole=False))
    assert part.budget(0.5) == part.in_scope // 2
    assert part.ratio(0.5) == (fixed + part.in_scope // 2) / part.params


def test_without_drift_all_moments_are_those_of_calibration(network: Network) -> None:
    found = drift.paired(network, network.module, "conv2")
    expected = drift.uncentred(drift.moments(network)["conv2"])
    assert torch.equal(found.clean, found.drifted) and torch.equal(found.clean, found.cross)
    assert expected.gram is not None and expected.mean is None
    torch.testing.assert_close(found.clean, expected.gram, rtol=1e-4, atol=1e-6)


def test_padding_counts_nowhere(network: Network) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(9, 6), nn.Linear(6, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return (self.fc(self.embed(input_ids)) * attention_mask[..., None]).sum(1)

    torch.manual_seed(0)
    module = Tokens().eval()
    specs = tuple(InputSpec(n, "int64", ("batch", "sequence")) for n in ("input_ids", "attention_mask"))
    opened = open_model(module, inputs=specs)
    ids = np.random.default_rng(0).integers(0, 9, (12, 5))
    data = Data.of_arrays({"input_ids": ids, "attention_mask": (np.arange(5) < np.arange(12)[:, None] % 5 + 1) + 0})
    layers = [layer for layer in find_layers(module) if layer.kind == "linear"]
    net = replace(network, opened=opened, module=module, layers=layers, calibration=data)
    expected = drift.uncentred(drift.moments(net)["fc"]).gram
    assert expected is not None
    torch.testing.assert_close(drift.paired(net, module, "fc").cross, expected, rtol=1e-4, atol=1e-6)


def test_drift_pairs_the_positions_of_both_networks(network: Network) -> None:
    cut = [formulas._cut(n, 4, None) if n.name in ("conv2", "mix") else None for n in network.layers]
    moved = formulas.placed(network, cut)
    found = drift.paired(network, moved, "fc1")
    x = torch.as_tensor(next(network.calibration.batches(96)).inputs["x"])

    def read(net: Any) -> torch.Tensor:
        h = F.relu(net.mix(F.relu(net.conv2(F.relu(net.bn(net.conv1(x)))))))
        return h.flatten(1).double()

    with torch.no_grad():
        clean, drifted = read(network.module), read(moved)
    torch.testing.assert_close(found.cross, clean.T @ drifted / 96, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.drifted, drifted.T @ drifted / 96, rtol=1e-4, atol=1e-5)


def test_mean_magnitudes_are_those_of_the_patches(network: Network) -> None:
    x = torch.as_tensor(next(network.calibration.batches(96)).inputs["x"])
    rows = F.unfold(x, 3, padding=1).movedim(1, 2).reshape(-1, 27)
    torch.testing.assert_close(
        drift.mean_magnitudes(network)["conv1"], rows.abs().double().mean(0), rtol=1e-5, atol=1e-7
    )


def test_layers_that_read_one_tensor_are_found_in_depth_order(network: Network) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.query(x) * self.key(x))

    module = Attention().eval()
    opened = open_model(module, inputs=(InputSpec("x", "float32", ("batch", 8)),))
    data = Data.of_arrays({"x": np.ones((4, 8), np.float32)})
    net = replace(network, opened=opened, module=module, layers=find_layers(module), calibration=data)
    assert drift.same_input(net) == [["query", "key"], ["out"]]


@pytest.mark.parametrize("squared", [False, True])
def test_harm_is_zero_for_the_network_itself_and_blind_to_a_common_shift(network: Network, squared: bool) -> None:
    harm = drift.harm(network, squared=squared)
    assert harm(network.module) == pytest.approx(0, abs=1e-10)
    shifted = formulas.placed(network, [None] * len(network.layers))
    shifted.fc2.bias.data += 3.0
    assert harm(shifted) == pytest.approx(0, abs=1e-6)
    shifted.fc2.bias.data[0] += 1.0
    assert harm(shifted) > 1e-3


def test_re_estimated_norms_hold_the_moments_of_calibration(network: Network) -> None:
    module: Any = formulas.placed(network, [None] * len(network.layers))
    assert drift.reestimate_norms(network, module)
    x = torch.as_tensor(next(network.calibration.batches(96)).inputs["x"])
    with torch.no_grad():
        expected = module.conv1(x).mean((0, 2, 3))
    torch.testing.assert_close(module.bn.running_mean, expected, rtol=1e-4, atol=1e-5)
    assert not module.bn.training
    assert not drift.reestimate_norms(network, nn.Linear(2, 2))


def test_a_draw_keeps_pairs_together_and_differs_by_seed() -> None:
    rows = {"x": np.zeros((40, 1), np.float32)}
    single, pairs = Data.of_arrays(rows), Data.of_arrays(rows, np.zeros(20), pairs=True)
    assert _draw(single, 8, 0).tolist() == list(range(8))
    found = _draw(pairs, 10, 0)
    assert found[:2].tolist() == [0, 1] and found[-2:].tolist() == [38, 39]
    for seed in (1, 2):
        drawn = _draw(pairs, 10, seed)
        assert (
            len(set(drawn.tolist())) == 10 and np.all(drawn[0::2] % 2 == 0) and np.all(drawn[1::2] == drawn[0::2] + 1)
        )
    assert _draw(pairs, 10, 1).tolist() != _draw(pairs, 10, 2).tolist()


def options(folder: Path, **more: Any) -> argparse.Namespace:
    usual = {
        "only": ["resnet20"], "rows": ["svd", "aimet"], "kept": [0.5], "seeds": [0, 1], "threads": 1, "quick": True,
        "bn": False, "strict": False, "go_on": False, "output": folder,
    }  # fmt: skip
    return argparse.Namespace(**{**usual, **more})


def test_what_no_seed_and_no_share_changes_runs_once(tmp_path: Path) -> None:
    asked = options(tmp_path, rows=["dense", "svd", "balf"], kept=[0.5, 0.35])
    found = [(row.name, kept, seed) for _, row, kept, seed in bench_peers._runs(asked)]
    balf = [("balf", kept, seed) for kept in (0.5, 0.35) for seed in (0, 1)]
    assert found == [("dense", 0.5, 0), ("svd", 0.5, 0), ("svd", 0.35, 0), *balf]
    assert [n for n, *_ in bench_peers._runs(options(tmp_path, only=["minilm"], rows=["aimet"]))] == []


def test_a_missing_package_costs_its_row_and_only_strict_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_peers, "_PEERS", tmp_path / "none")
    for strict, code in ((False, 0), (True, 1)):
        asked = options(tmp_path, rows=["aimet"], seeds=[0], strict=strict)
        monkeypatch.setattr(bench_peers, "_options", lambda asked=asked: asked)
        assert bench_peers.main() == code
        assert "not run: no .venv-peers here; 'make bench-peers' builds it" in capsys.readouterr().out


def test_a_row_of_ours_that_fails_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = options(tmp_path, rows=["svd"], only=["resnet20"])
    monkeypatch.setenv("LRCOMPRESS_ASSETS", str(tmp_path / "nowhere"))
    monkeypatch.setattr(bench_peers, "_options", lambda: asked)
    assert bench_peers.main() == 1
    (run,) = json.loads((tmp_path / bench_peers.JSON).read_text())["runs"]
    assert "nowhere" in run["error"] and run["row"] == "svd"


def test_continue_keeps_rows_of_the_same_settings_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "network": "resnet20", "row": "svd", "label": ROWS["svd"].label, "kept": 0.5, "seed": 0, "budgeted": True,
        "partial": False, "bytes": 1, "params_share": 0.5, "scope_share": 0.5, "metric": "accuracy", "value": 0.5,
        "n": 4, "stderr": 0.1, "seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1, "notes": "",
    }  # fmt: skip
    calls: list[str] = []
    monkeypatch.setattr(bench_peers, "_run", lambda *a: calls.append(a[1].name) or row)
    asked = options(tmp_path, rows=["svd"])
    monkeypatch.setattr(bench_peers, "_options", lambda: asked)
    assert bench_peers.main() == 0 and calls == ["svd"]
    asked.go_on = True
    assert bench_peers.main() == 0 and calls == ["svd"]
    asked.threads = 2
    with pytest.raises(CommandError, match="'threads': 2"):
        bench_peers.main()
