"""Statistics on disk: the same numbers, the same question, the right model; killed passes go on; damage is seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lrcompress.calibrate import Cache, collect, is_statistics, read_statistics, write_statistics
from lrcompress.calibrate.cache import distinct_tensors
from lrcompress.cli.main import run
from lrcompress.data import Data
from lrcompress.errors import CommandError, DataError, LrcompressWarning
from lrcompress.model import InputSpec, open_model
from lrcompress.model.surgery import find_layers
from tests.support.nets import images, small, words

ROOT = Path(__file__).resolve().parents[2]
SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
ARCH = ("--arch", "tests.support.nets:small", "--input", "x:float32:batch,3,8,8")


class Counting:
    """A `Progress` that counts samples, and stops after so many."""

    def __init__(self, most: int = 10**9) -> None:
        self.seen, self.most = 0, most

    def task(self, name, total=None):
        import contextlib

        def advance(n=1, text=""):
            if self.seen >= self.most:
                raise KeyboardInterrupt
            self.seen += n

        return contextlib.nullcontext(advance)


def ask(cache, n=48, *, net=None, seed=0, progress=None, **options):
    net = small() if net is None else net
    opened = open_model(net, inputs=SPEC)
    data = options.pop("data", None)
    data = Data.of_arrays({"x": images(n, 1)[0]}) if data is None else data
    layers = find_layers(net)
    options = {"batch_size": 4, "gradient_samples": 24, "seed": seed, **options}
    return collect(opened, net, data, layers, cache=cache, progress=progress, **options)


def same(a, b):
    fields = ("gram", "mean", "output_gram", "row_weights")
    for name in a:
        assert (a[name].count, a[name].positions, a[name].groups) == (b[name].count, b[name].positions, b[name].groups)
        for field in fields:
            x, y = getattr(a[name], field), getattr(b[name], field)
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y), (name, field)


def entries(cache):
    return [p for p in (cache.folder / "statistics").iterdir() if p.is_dir()]


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def test_the_same_question_is_answered_from_disk(cache):
    first = ask(cache)
    again = Counting()
    found = ask(cache, progress=again)
    assert again.seen == 0 and len(entries(cache)) == 1
    same(found, first)
    same(found, ask(None))
    assert [p.name for p in (cache.folder / "statistics").iterdir()] == [entries(cache)[0].name]


def test_layers_that_read_one_input_are_stored_and_mapped_once(cache):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(192, 8), nn.Linear(192, 8)

        def forward(self, x):
            x = x.flatten(1)
            return self.q(x) + self.k(x)

    torch.manual_seed(0)
    net = Two().eval()
    for _ in range(2):
        found = ask(cache, net=net)
        assert found["q"].gram is found["k"].gram and found["q"].mean is found["k"].mean
    assert len(distinct_tensors(found)) == 4
    assert len(list(entries(cache)[0].glob("input-*"))) == 1


def changed_weight():
    net = small()
    with torch.no_grad():
        net.fc1.weight[0, 0] += 1e-6
    return net


def changed_forward():
    net = small()
    net.bn.eps = 0.5
    return net


@pytest.mark.parametrize(
    "other",
    [
        {"n": 47}, {"seed": 1}, {"gradient_samples": 20}, {"batch_size": 8}, {"loss": "kl"},
        {"net": "weight"}, {"net": "forward"}, {"data": "pixels"}, {"data": "labels"}, {"threads": 2},
    ],
    ids=str,
)  # fmt: skip
def test_another_question_is_not(cache, other):
    ask(cache)
    x = images(48, 1)[0]
    other = dict(other)
    if "net" in other:
        other["net"] = changed_weight() if other["net"] == "weight" else changed_forward()
    if "data" in other:
        moved = x.copy()
        moved[40, 0, 0, 0] += 1e-3
        other["data"] = (
            Data.of_arrays({"x": moved}) if other["data"] == "pixels" else Data.of_arrays({"x": x}, np.arange(48))
        )
    threads = torch.get_num_threads()
    if other.pop("threads", None):
        torch.set_num_threads(3 - min(threads, 2))
    try:
        progress = Counting()
        ask(cache, progress=progress, **other)
    finally:
        torch.set_num_threads(threads)
    assert progress.seen > 0 and len(entries(cache)) == 2


class Bent(nn.Module):
    """`bend` shows in no digest and no repr, only in what the network answers."""

    def __init__(self, bend, idle=0.0):
        super().__init__()
        self.bend, self.a, self.b = bend, nn.Linear(192, 4), nn.Linear(4, 3)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_()
            self.a.bias[0] += idle
            self.b.weight[:, 0] = 0.0  # nobody sees unit 0

    def forward(self, x):
        return self.b(self.bend * torch.relu(self.a(x.flatten(1))))


@pytest.mark.parametrize("other", [Bent(2.0), Bent(1.0, idle=5.0)], ids=["forward", "a weight that no answer shows"])
def test_a_network_that_only_looks_the_same_is_another(cache, other):
    first = Bent(1.0)
    opened, data = open_model(first, inputs=SPEC), Data.of_arrays({"x": images(48, 1)[0]})
    for module in (first, other):
        progress = Counting()
        found = collect(opened, module.eval(), data, find_layers(module), cache=cache, progress=progress)
        assert progress.seen == 48
        same(found, collect(opened, module, data, find_layers(module)))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "record"])
def test_a_damaged_entry_is_collected_again_with_a_warning(cache, damage):
    first = ask(cache)
    (entry,) = entries(cache)
    path = sorted(entry.glob("input-*"))[0] if damage != "record" else entry / "statistics.json"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    path.unlink()  # another file: this one is mapped
    if damage != "missing":
        path.write_bytes(bytes(data[: len(data) // 2]) if damage in ("cut", "record") else bytes(data))
    progress = Counting()
    with pytest.warns(LrcompressWarning, match="damaged"):
        found = ask(cache, progress=progress)
    assert progress.seen == 48
    same(found, first)
    same(ask(cache), first)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(LrcompressWarning, match="cannot be written"):
        found = ask(Cache(tmp_path / "file" / "cache"))
    same(found, ask(None))


def test_the_oldest_entries_go_and_what_is_too_large_is_not_kept(cache):
    ask(cache)
    size = sum(p.stat().st_size for p in entries(cache)[0].iterdir())
    bounded = Cache(cache.folder, most_bytes=int(2.5 * size))
    names = [entries(cache)[0].name]
    for seed in (1, 2):
        for i, name in enumerate(names):
            os.utime(cache.folder / "statistics" / name / "statistics.json", (1000 + i, 1000 + i))
        if seed == 2:
            ask(bounded)  # used again: no longer the oldest
        ask(bounded, seed=seed)
        names += [e.name for e in entries(cache) if e.name not in names]
    assert {e.name for e in entries(cache)} == {names[0], names[2]}
    tiny = Cache(cache.folder.parent / "tiny", most_bytes=size // 2, seconds=0)
    same(ask(tiny), ask(None))
    assert not entries(tiny) and not list((tiny.folder / "statistics").iterdir())


def test_the_environment_names_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("LRCOMPRESS_CACHE_BYTES", "123")
    assert Cache.usual() == Cache(tmp_path / "a", 123)
    monkeypatch.delenv("LRCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache.usual().folder == tmp_path / "xdg" / "lrcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache.usual().folder == tmp_path / ".cache" / "lrcompress"
    monkeypatch.setenv("LRCOMPRESS_CACHE_BYTES", "5 GB")
    with pytest.raises(CommandError, match="whole number"):
        Cache.usual()


@pytest.mark.parametrize("most", [4, 20, 44])
def test_a_stopped_pass_goes_on_with_the_same_bytes(cache, most):
    often = Cache(cache.folder, seconds=0)
    with pytest.raises(KeyboardInterrupt):
        ask(often, progress=Counting(most))
    (left,) = (cache.folder / "statistics").glob("*.partial.safetensors")
    rest = Counting()
    ran = []
    net = small()
    net.register_forward_hook(lambda *_: ran.append(1))
    found = ask(often, progress=rest, net=net)
    assert rest.seen == 48 and len(ran) == 1 + (48 - most) // 4, "one try, and the batches that were left"
    assert not left.exists()
    same(found, ask(None))


def test_a_damaged_checkpoint_starts_again(cache):
    often = Cache(cache.folder, seconds=0)
    with pytest.raises(KeyboardInterrupt):
        ask(often, progress=Counting(20))
    (left,) = (cache.folder / "statistics").glob("*.partial.safetensors")
    data = bytearray(left.read_bytes())
    data[-3] ^= 16
    left.write_bytes(bytes(data))
    with pytest.warns(LrcompressWarning, match="starts again"):
        found = ask(often)
    same(found, ask(None))


def test_texts_and_embeddings_go_on_too(cache):
    rng = np.random.default_rng(0)
    mask = (np.arange(9) < rng.integers(2, 10, (40, 1))).astype(np.int64)
    data = Data.of_arrays({"ids": rng.integers(1, 40, (40, 9)) * mask, "attention_mask": mask})
    often = Cache(cache.folder, seconds=0)
    with pytest.raises(KeyboardInterrupt):
        ask(often, net=words(), data=data, progress=Counting(20))
    same(ask(often, net=words(), data=data), ask(None, net=words(), data=data))


KILLED = """
import json, os, signal, sys
import numpy as np, torch
torch.set_num_threads(1)
from pathlib import Path
from lrcompress.calibrate import Cache
from lrcompress.files import sha256_tree
from tests.contracts.test_calibration_cache import Counting, ask, entries

class Dying(Counting):
    def task(self, name, total=None):
        inner = super().task(name, total)
        advance = inner.enter_result
        def dying(n=1, text=""):
            advance(n, text)
            if self.seen >= self.at:
                os.kill(os.getpid(), signal.SIGKILL)
        inner.enter_result = dying
        return inner

def child(at, folder):
    pid = os.fork()
    if pid == 0:
        progress = Dying()
        progress.at = at
        ask(Cache(Path(folder), seconds=0), progress=progress)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

broken, whole = sys.argv[1:3]
signals = []
rng = np.random.default_rng(int(sys.argv[3]))
for at in sorted(rng.integers(4, 48, 6).tolist()):
    signals.append(os.WTERMSIG(child(at, broken)))
ends = [child(10**9, broken), child(10**9, whole)]
files = [json.loads((entries(Cache(Path(f)))[0] / "statistics.json").read_text()) for f in (broken, whole)]
print(json.dumps({"signals": signals, "ends": ends, "same": files[0] == files[1], "files": len(files[0]["files"])}))
"""


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_9_at_random_batches(tmp_path, seed):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(tmp_path / "b"), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["signals"] == [signal.SIGKILL] * 6 and told["ends"] == [0, 0]
    assert told["same"] and told["files"] > 6


# statistics as a thing to keep -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    torch.save(small().state_dict(), "model.pt")
    np.savez("x.npz", x=images(300, 1)[0])
    return tmp_path


def keep(here, path="kept", source="model.pt"):
    opened = open_model(source, arch="tests.support.nets:small", inputs=SPEC)
    layers = [n for n in find_layers(opened.module) if n.reason is None]
    found = collect(opened, opened.module, Data.of_arrays({"x": images(300, 1)[0]}), layers)
    write_statistics(path, found, model=opened.digest, layers=layers)
    return opened, layers, found


def test_kept_statistics_are_the_same_numbers(here):
    opened, layers, found = keep(here)
    assert is_statistics("kept") and not is_statistics("x.npz") and not is_statistics(here)
    same(read_statistics("kept", model=opened.digest, layers=layers), found)


def test_kept_statistics_stand_for_the_data(here, capsys):
    keep(here)
    for calib, out in (("x.npz", "a"), ("kept", "b")):
        assert (
            run(
                [
                    "factorize",
                    "model.pt",
                    *ARCH,
                    "--ratio",
                    "0.5",
                    "--calib",
                    calib,
                    "--no-anchor",
                    "--quick",
                    "-o",
                    out,
                    "-q",
                ]
            )
            == 0
        )
    capsys.readouterr()
    assert (here / "a/model.safetensors").read_bytes() == (here / "b/model.safetensors").read_bytes()


def refused(capsys, argv, code, *words):
    assert run([*argv, "-q"]) == code, capsys.readouterr()
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    assert not Path("compressed").exists()


FACTORIZE = ("factorize", "model.pt", *ARCH, "--ratio", "0.5", "--calib")


def test_statistics_of_another_model(here, capsys):
    torch.save({k: v + 1e-3 for k, v in small().state_dict().items() if v.is_floating_point()}, "other.pt")
    keep(here, source="other.pt")
    refused(capsys, (*FACTORIZE, "kept"), 9, "kept", "statistics of this model", "statistics of another model")


@pytest.mark.parametrize("damage", ["flip", "missing", "json", "schema", "layer", "shape", "file name"])
def test_damaged_statistics(here, capsys, damage):
    keep(here)
    marker, path = Path("kept/statistics.json"), sorted(Path("kept").glob("output-*"))[0]
    record = json.loads(marker.read_text())
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 128
        path.write_bytes(bytes(data))
    elif damage == "missing":
        path.unlink()
    elif damage == "json":
        record["layers"]["fc1"]["count"] = "many"
    elif damage == "schema":
        record["schema"] = 99
    elif damage == "layer":
        del record["layers"]["fc1"]
    elif damage == "shape":
        record["layers"]["fc1"]["shape"] = [3, 3]
    else:
        record["layers"]["fc1"]["input"] = "input-../../x"
    marker.write_text(json.dumps(record))
    refused(capsys, (*FACTORIZE, "kept"), 9, "kept")


# bad input -------------------------------------------------------------------------------------------------------


def save(x, **more):
    np.savez("bad.npz", x=x, **more)


BAD = {
    "another shape": (lambda x: save(x[:, :2]), ARCH, ["samples of shape (3, 8, 8), got (2, 8, 8)"]),
    "another shape, inputs unknown": (lambda x: save(x[:, :2]), ARCH[:2], ["inputs that the network runs on", "channels"]),
    "NaN": (lambda x: save(np.where(np.arange(20)[:, None, None, None] == 7, np.nan, x)), ARCH, ["bad.npz: x", "sample 7"]),
    "infinity": (lambda x: save(np.where(np.arange(20)[:, None, None, None] == 9, np.inf, x)), ARCH[:2], ["bad.npz: x", "sample 9"]),
    "no sample": (lambda x: save(x[:0]), ARCH, ["at least one sample", "none"]),
    "no folder of statistics": (lambda x: Path("bad.npz").mkdir(), ARCH, ["labels.tsv"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration_data(here, capsys, name):
    make, arch, words_ = BAD[name]
    make(images(20, 1)[0].astype(np.float32))
    refused(capsys, ("factorize", "model.pt", *arch, "--ratio", "0.5", "--calib", "bad.npz"), 9, *words_)
    assert not (here / "cache").exists() or not list(here.glob("cache/statistics/*.partial*"))


def test_few_samples_and_layers_never_reached_are_warned_of(here, capsys):
    save(images(8, 1)[0])
    (here / "idle.py").write_text(
        "from torch import nn\nfrom tests.support.nets import Small\n"
        "class Idle(Small):\n    def __init__(self):\n        super().__init__()\n        self.spare = nn.Linear(32, 32)\n"
    )
    net = small()
    state = {**net.state_dict(), "spare.weight": torch.randn(32, 32), "spare.bias": torch.zeros(32)}
    torch.save(state, "model.pt")
    argv = ["factorize", "model.pt", "--arch", "idle.py:Idle", *ARCH[2:], "--rank", "4", "--calib", "bad.npz"]
    for _ in range(2):  # the second time from the cache
        assert run([*argv, "--json", "-q"]) == 0
        notes = json.loads(capsys.readouterr().out)["warnings"]
        assert any("never reach spare:" in n for n in notes), notes
        assert any("fewer positions than conv2 has inputs" in n for n in notes), notes


def test_no_cache_keeps_nothing(here, capsys):
    assert run([*FACTORIZE, "x.npz", "-q", "--no-cache"]) == 0 and not (here / "cache").exists()
    assert run([*FACTORIZE, "x.npz", "-q"]) == 0 and len(list((here / "cache/statistics").iterdir())) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run([*FACTORIZE, "x.npz", "-q"]) == 0
    capsys.readouterr()


def test_data_errors_are_data_errors(cache):
    with pytest.raises(DataError, match="at least one sample"):
        ask(cache, data=Data.of_arrays({"x": images(4)[0]}).take(slice(0, 0)))
