"""State dicts are factorized without being in memory, and give what they gave in memory; results are kept and used again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrcompress
from lrcompress.errors import BudgetError, CommandError, HostError
from lrcompress.factorize import form
from lrcompress.files import sha256_tree
from lrcompress.model.surgery import tensors_as_layers
from lrcompress.plan import select
from lrcompress.work import Job
from tests.support.nets import small
from tests.support.weights import weight

ROOT = Path(__file__).resolve().parents[2]


def state() -> dict[str, torch.Tensor]:
    w = weight((30, 24)).float()
    shapes = {"a": (40, 30), "conv": (12, 8, 3, 3), "embed": (50, 16)}
    found = {f"{n}.weight": weight(s, i).float() for i, (n, s) in enumerate(shapes.items())}
    return {**found, "a.bias": torch.ones(40), "tied.weight": w, "again.weight": w, "norm.weight": torch.ones(7)}


@pytest.fixture
def source(tmp_path):
    torch.save(state(), tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.mark.parametrize("how", [{"rank": 5}, {"energy": 0.9}, {"ratio": 0.5}])
@pytest.mark.parametrize("method", ["svd", "auto", "tucker"])
def test_the_choice_is_the_one_made_in_memory(source, how, method):
    rows = {r["name"]: r for r in lrcompress.factorize(source, method=method, **how).data["layers"]}
    tensors = {n: t for n, t in state().items() if n != "again.weight"}
    layers = tensors_as_layers(tensors)
    fixed = sum(t.numel() for t in tensors.values()) - sum(n.weight.numel() for n in layers)
    for choice in select(layers, method=method, statistics={}, fixed_params=fixed, **how):
        rank = list(choice.rank) if isinstance(choice.rank, tuple) else choice.rank
        assert (rows[choice.name]["form"], rows[choice.name]["rank"], rows[choice.name]["params_after"]) == (
            choice.form, rank, choice.n_params,
        )  # fmt: skip


@pytest.mark.parametrize("how", [{"rank": 5}, {"ratio": 0.5}])
def test_the_output_holds_factors_once_and_the_rest_untouched(source, tmp_path, how):
    found = lrcompress.factorize(source, output=tmp_path / "c", **how).data
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    original, leader = state(), None
    for row in found["layers"]:
        name = row["name"]
        if row["form"] == "dense":
            assert torch.equal(tensors[f"{name}.weight"], original[f"{name}.weight"])
        elif row["params_before"]:
            exact = form(row["form"]).decompose(original[f"{name}.weight"], row["rank"])
            assert torch.equal(tensors[f"{name}.U"], exact.factors["U"])
            leader = name if name in ("tied", "again") else leader
    assert torch.equal(tensors["norm.weight"], original["norm.weight"]) and torch.equal(
        tensors["a.bias"], original["a.bias"]
    )
    assert leader is not None and sum(n.partition(".")[0] in ("tied", "again") for n in tensors) == 2
    assert found["params_after"] == sum(t.numel() for t in tensors.values())


def test_every_container_gives_the_same_bytes(tmp_path):
    tensors = {n: t for n, t in state().items() if n != "again.weight"}
    save_file(tensors, tmp_path / "m.safetensors")
    torch.save(tensors, tmp_path / "m.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "shards").mkdir()
    for i, (n, t) in enumerate(tensors.items()):
        save_file({n: t}, tmp_path / "shards" / f"{i}.safetensors")
    weight_map = {n: f"{i}.safetensors" for i, n in enumerate(tensors)}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    bytes_of = set()
    for name in ("m.safetensors", "m.pt", "old.pt", "shards"):
        lrcompress.factorize(tmp_path / name, rank=5, output=tmp_path / "c" / name)
        bytes_of.add((tmp_path / "c" / name / "model.safetensors").read_bytes())
    assert len(bytes_of) == 1


@pytest.mark.parametrize("arch", [None, "tests.support.nets:small"])
def test_what_was_kept_is_used_by_the_same_command(tmp_path, monkeypatch, arch):
    """The output cannot be written; given again, the command computes nothing and gives the bytes of a whole run."""
    torch.save(small().state_dict(), tmp_path / "m.pt")
    lrcompress.factorize(tmp_path / "m.pt", rank=4, arch=arch, output=tmp_path / "c")
    whole = sha256_tree(tmp_path / "c")
    shutil.rmtree(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("lrcompress.verbs.factorize.write_compressed", refuse)
        with pytest.raises(HostError):
            lrcompress.factorize(tmp_path / "m.pt", rank=4, arch=arch, output=tmp_path / "c")
    assert len(list(tmp_path.glob(".c.work-*/*.safetensors"))) >= 4 and not (tmp_path / "c").exists()
    monkeypatch.setattr(Job, "compute", refuse)
    lrcompress.factorize(tmp_path / "m.pt", rank=4, arch=arch, output=tmp_path / "c")
    assert sha256_tree(tmp_path / "c") == whole and sorted(p.name for p in tmp_path.iterdir()) == ["c", "m.pt"]


def refuse(*_, **__):
    raise HostError("here", "room", "none")


@pytest.mark.parametrize("how", [{"rank": 5}, {"ratio": 0.5}])
def test_too_little_space_is_said_before_the_work(source, tmp_path, monkeypatch, how):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("lrcompress.verbs.streamed.shutil.disk_usage", lambda p: usage(10, 0, 1000))
    monkeypatch.setattr(Job, "compute", refuse)
    with pytest.raises(HostError, match=r"No space left on device: 1,000 bytes are free, \d+,\d+ are needed") as caught:
        lrcompress.factorize(source, output=tmp_path / "new" / "c", **how)
    assert caught.value.exit_code == 10
    if "rank" in how:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt"]


def test_an_impossible_budget_leaves_nothing(source, tmp_path):
    with pytest.raises(BudgetError):
        lrcompress.factorize(source, ratio=0.001, output=tmp_path / "new" / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pt"]


def test_an_output_of_others_is_refused_before_the_work(source, tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(Job, "compute", lambda *_: pytest.fail("it worked in vain"))
    with pytest.raises(CommandError, match="made by something else"):
        lrcompress.factorize(source, rank=5, output=tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "m.pt"]


def test_the_svd_that_is_asked_for(tmp_path):
    """The randomized one is close to, and never better than, the full one."""
    w = weight((1100, 1050)).float() + 0.01 * torch.randn(1100, 1050, generator=torch.Generator().manual_seed(0))
    torch.save({"a.weight": w}, tmp_path / "m.pt")
    errors = {
        svd: lrcompress.factorize(tmp_path / "m.pt", rank=20, svd=svd).data["layers"][0]["rel_error"]
        for svd in ("full", "randomized", "auto")
    }
    assert errors["full"] < errors["randomized"] < 1.05 * errors["full"] and errors["auto"] == errors["randomized"]
    with pytest.raises(CommandError, match="--svd"):
        lrcompress.factorize(tmp_path / "m.pt", rank=20, svd="fast")


@pytest.mark.slow
def test_memory_is_that_of_the_largest_layer(tmp_path):
    """The peak of 12 layers of 16 MB is that of 3: what is done is not in memory."""
    peaks = []
    for count in (3, 12):
        tensors = {f"l{i:02d}.weight": torch.randn(2048, 2048) for i in range(count)}
        save_file(tensors, tmp_path / f"{count}.safetensors")
        code = (
            "import sys, lrcompress; lrcompress.factorize(sys.argv[1], rank=64, svd='randomized', threads=1, output=sys.argv[2]);"
            "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
        )
        run = [sys.executable, "-c", code, str(tmp_path / f"{count}.safetensors"), str(tmp_path / f"out{count}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # without it glibc moves the line, and holes come and go
        peaks.append(int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout))
    assert peaks[1] < peaks[0] + 40_000, peaks
