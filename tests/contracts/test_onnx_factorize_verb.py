"""An ONNX file in, a folder for a device out, as typed: what comes out, what is refused, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

import lrcompress
from lrcompress.cli.main import run as command
from lrcompress.errors import CommandError, LrcompressWarning, ModelError
from lrcompress.graphs import checkpoint as graph_checkpoint
from lrcompress.graphs import is_graph_checkpoint, load_graph_checkpoint, open_graph
from lrcompress.model import checkpoint as torch_checkpoint
from lrcompress.verbs.factorize_graph import factorize_graph
from tests.support.onnx_files import correlated, mlp, run, save, w

# As typed.


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(mlp(), tmp_path / "m.onnx")
    np.savez("x.npz", x=correlated(256, 32, rank=12))
    np.savez("fresh.npz", x=correlated(128, 32, rank=12, seed=90))
    return tmp_path


def answer(capsys):
    return json.loads(capsys.readouterr().out)


def test_all_the_way_as_typed(here, capsys):
    assert command(["factorize", "m.onnx", "--ratio", "0.5", "--calib", "x.npz", "--json"]) == 0
    told = answer(capsys)
    assert told["method"] == "auto" and told["params_after"] <= 0.5 * told["params_before"]
    assert {n["name"] for n in told["layers"]} == {"fc0", "fc1", "fc2"}
    low = [n for n in told["layers"] if n["form"] != "dense"]
    assert low and all(n["norm"] == "activation" and n["reason"] is None for n in low)
    assert told["bytes_after"] == sum(p.stat().st_size for p in Path("compressed").iterdir())
    stored = load_file("compressed/model.safetensors")
    counted = sum(a.size for a in stored.values() if a.dtype == np.float32)
    assert counted == told["params_after"], "what the report counts is what the file holds"
    x = np.load("fresh.npz")["x"]
    exact, got = run(Path("m.onnx"), x=x), run(Path("compressed/model.onnx"), x=x)
    assert command(["factorize", "m.onnx", "--ratio", "0.5", "-o", "plain", "-q"]) == 0
    plain = run(Path("plain/model.onnx"), x=x)
    assert np.linalg.norm(got - exact) < 0.7 * np.linalg.norm(plain - exact), "on data that calibration did not see"
    capsys.readouterr()
    assert command(["export", "--calib", "x.npz", "--json"]) == 0
    exported = answer(capsys)
    assert exported["slots"] == [] and exported["opset"] == 20 and exported["model"] == "m"
    np.testing.assert_array_equal(run(Path("exported/model.onnx"), x=x), got)
    assert (
        command(["validate", "--data", "fresh.npz", "--metric", "cosine_to_original", "--max-drop", "0.5", "--json"])
        == 0
    )
    rows = {t["against"]: t for t in answer(capsys)["targets"]}
    assert (
        rows["compressed"]["passed"]
        and rows["compressed"]["metric"]["value"] > 0.9
        and rows["compressed"]["original"]["max_abs_diff"] > 0
    )
    assert command(["export", "--quantize", "int8", "--calib", "x.npz", "-o", "small", "--json"]) == 0
    assert answer(capsys)["bytes"]["base"] < 0.5 * exported["bytes"]["base"]
    assert command(["validate", "small", "--json"]) == 0


def test_torch_is_not_there_and_not_missed(here):
    """Every import of torch is an error in this process."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lrcompress.cli.main import run\n"
        "for extra in ('--ratio 0.5 --calib x.npz', '--rank 4', '--energy 0.9 --no-anchor --calib x.npz'):\n"
        "    assert run(f'factorize m.onnx {extra} -q'.split()) == 0, extra\n"
        "assert not any(m.split('.')[0] in ('torch', 'tensorly') for m, v in sys.modules.items() if v is not None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_verb_of_the_library_takes_it_too(here):
    one = lrcompress.factorize("m.onnx", rank=4, output="a")
    two, _ = factorize_graph("m.onnx", rank=4, output="b")
    assert one.model is None and one.output == Path("a") and one.data["layers"] == two["layers"]
    for name in ("model.onnx", "model.safetensors"):
        assert (Path("a") / name).read_bytes() == (Path("b") / name).read_bytes(), "same input, same bytes"


def test_ranks_energy_and_patterns(here):
    data, _ = factorize_graph("m.onnx", rank=4, exclude=["fc2"])
    rows = {n["name"]: n for n in data["layers"]}
    assert rows["fc0"]["rank"] == 4 and rows["fc2"]["reason"] == "in --exclude"
    weight = w(32, 48).T
    values = np.linalg.svd(weight, compute_uv=False) ** 2
    np.testing.assert_allclose(rows["fc0"]["rel_error"], np.sqrt(values[4:].sum() / values.sum()), rtol=1e-5)
    data, _ = factorize_graph("m.onnx", energy=0.6)
    rank = next(n["rank"] for n in data["layers"] if n["name"] == "fc0")
    assert values[:rank].sum() >= 0.6 * values.sum() > values[: rank - 1].sum()
    with pytest.warns(LrcompressWarning, match="no layer was factorized"):
        data, _ = factorize_graph("m.onnx", rank=1000)
    assert (
        all("would not shrink" in n["reason"] for n in data["layers"]) and data["params_after"] == data["params_before"]
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--rank 4 --method kronecker", "auto, svd or tucker for an ONNX file"),
        ("--rank 4 --arch a:b", "no architecture for an ONNX file"),
        ("--rank 4 --input x:float32:n,32", "no inputs for an ONNX file"),
        ("--plan p.json", "--rank, --ratio or --energy for an ONNX file"),
        ("--rank 4 --compute cuda", "cpu"),
        ("--rank 4 --workers 2", "one process"),
        ("--rank 4 --svd randomized", "auto or full"),
        ("--rank 4 --ratio 0.5", "exactly one"),
        ("", "exactly one"),
        ("--rank 0", "at least 1"),
        ("--ratio 1.5", "above 0"),
        ("--rank 4 --include nothing*", "a pattern that matches a layer"),
    ],
)
def test_options_that_mean_nothing_for_a_graph_are_usage_errors(here, capsys, extra, expected):
    assert command(f"factorize m.onnx {extra} --json".split()) == 2
    told = answer(capsys)["error"]
    assert expected in f"{told['expected']} {told['got']}" and not Path("compressed").exists()


def test_data_that_do_not_fit_leave_nothing_behind(here, capsys):
    np.savez("bad.npz", x=w(9, 31))
    np.savez("nan.npz", x=np.full((9, 32), np.nan, np.float32))
    for file in ("bad.npz", "nan.npz"):
        assert command(f"factorize m.onnx --rank 4 --calib {file} --json".split()) == 9
        assert "error" in answer(capsys) and not Path("compressed").exists()


def test_a_graph_that_the_runtime_refuses_is_refused_first(here, capsys):
    made = mlp()
    made.graph.node[0].op_type = "NoSuchOperator"
    save(made, here / "odd.onnx")
    assert command(["factorize", "odd.onnx", "--rank", "4", "--json"]) == 4
    assert "NoSuchOperator" in answer(capsys)["error"]["got"]


def test_the_folder_is_told_apart_and_held_to_its_digest(here, capsys):
    assert (graph_checkpoint.MAKER, graph_checkpoint.MARKER) == (torch_checkpoint.MAKER, torch_checkpoint.MARKER)
    factorize_graph("m.onnx", rank=4, output="compressed")
    assert is_graph_checkpoint(here / "compressed")
    found = load_graph_checkpoint(here / "compressed")
    assert found.open_original().digest == open_graph("m.onnx").digest
    assert {*found.spec["layers"]["fc0"]["names"].values()} == {"fc0.U", "fc0.V"}
    for verb in (
        "recover compressed --data x.npz",
        "adapt compressed --data x.npz",
        "factorize compressed --rank 2",
        "export --slots lora",
    ):
        assert command([*verb.split(), "--json"]) in (2, 4)
        assert "graph" in json.dumps(answer(capsys)["error"]) or verb.startswith("factorize")
    save(mlp(52), here / "m.onnx")
    with pytest.raises(ModelError, match="it changed since"):
        found.open_original()
    data = bytearray((here / "compressed/model.safetensors").read_bytes())
    data[-1] ^= 1
    (here / "compressed/model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="a file changed"):
        load_graph_checkpoint(here / "compressed")


def test_a_device_with_too_old_a_runtime_is_told(here, capsys):
    made = mlp()
    made.ir_version = 12
    save(made, here / "new.onnx")
    factorize_graph("new.onnx", rank=4, output="compressed")
    from importlib.resources import files

    profile = (Path(str(files("lrcompress"))).parent / "devices/raspberry-pi-4.yaml").read_text()
    import yaml

    value = yaml.safe_load(profile)
    value["ort"] = {"min": "1.22.0", "max": "1.22.9"}
    Path("old.yaml").write_text(yaml.safe_dump(value))
    assert command(["export", "--device", "old.yaml", "--json"]) == 4
    assert "ONNX Runtime 1.24.0 or newer for opset 20, IR 12" in answer(capsys)["error"]["expected"]
    assert command(["export", "--json"]) == 0
    assert json.loads(Path("exported/manifest.json").read_text())["ort"]["min"] == "1.24.0"
    capsys.readouterr()


def test_weights_beside_the_graph_come_along(here):
    made = mlp()
    onnx.save(made, "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    x = np.load("fresh.npz")["x"]
    factorize_graph("big.onnx", rank=6, calib="x.npz", output="c")
    factorize_graph("m.onnx", rank=6, calib="x.npz", output="d")
    np.testing.assert_array_equal(run(Path("c/model.onnx"), x=x), run(Path("d/model.onnx"), x=x))
    Path("big.data").unlink()
    run(Path("c/model.onnx"), x=x)


def test_usage_errors_of_the_export_of_a_graph(here, capsys):
    factorize_graph("m.onnx", rank=4, output="compressed")
    for extra in ("--merge a", "--adapter a", "--quantize int3", "--slots core"):
        assert command(f"export {extra} --json".split()) == 2
        answer(capsys)
    with pytest.raises(CommandError):
        lrcompress.export("compressed", quantize="plan")
