"""Jobs, their keys, the store and the pools: what decides a result is in its key, and nothing kept is trusted."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lrcompress.errors import CommandError, HostError, LrcompressWarning, MissingExtraError, PlanError, UpdateError
from lrcompress.factorize import Statistics, form
from lrcompress.model.stored import open_stored
from lrcompress.work import CurveJob, Job, Store, pool, run
from lrcompress.work.jobs import Packed
from tests.support.weights import statistics, weight

ROOT = Path(__file__).resolve().parents[2]

W = weight((12, 10)).float()
S = statistics(W, two_sided=True)


def same(a, b):
    return (
        list(a.factors) == list(b.factors)
        and all(torch.equal(a.factors[k], b.factors[k]) and a.factors[k].dtype == b.factors[k].dtype for k in a.factors)
        and (a.form, a.shape, a.rank, a.norm) == (b.form, b.shape, b.rank, b.norm)
        and (a.loss, a.rel_error, a.rel_error_frobenius) == (b.loss, b.rel_error, b.rel_error_frobenius)
        and (a.bias_shift is None) == (b.bias_shift is None)
        and (a.bias_shift is None or torch.equal(a.bias_shift, b.bias_shift))
    )


# keys ---------------------------------------------------------------------------------------------------------------


def changed(value: torch.Tensor) -> torch.Tensor:
    out = value.clone()
    out.view(-1)[-1] += 1e-6 * out.abs().max()
    return out


BASE = Job(W, "svd", S, rank=3)


@pytest.mark.parametrize(
    ("other", "threads"),
    [
        (replace(BASE, weight=changed(W)), 1), (replace(BASE, weight=W.double()), 1), (replace(BASE, weight=W.reshape(10, 12)), 1),
        (replace(BASE, form="pivoted"), 1), (replace(BASE, rank=4), 1), (replace(BASE, options={"algorithm": "full"}), 1),
        (replace(BASE, statistics=None), 1), (replace(BASE, statistics=replace(S, gram=changed(S.gram))), 1),
        (replace(BASE, statistics=replace(S, mean=changed(S.mean))), 1), (replace(BASE, statistics=replace(S, mean=None)), 1),
        (replace(BASE, statistics=replace(S, output_gram=changed(S.output_gram))), 1),
        (replace(BASE, statistics=replace(S, positions=2.0)), 1), (BASE, 2), (CurveJob(W, "svd", S), 1),
    ],
)  # fmt: skip
def test_whatever_decides_the_result_is_in_the_key(other, threads):
    assert other.key(threads) != BASE.key(1)
    assert Job(W.clone(), "svd", replace(S), rank=3).key(1) == BASE.key(1)


def test_the_version_is_in_the_key(monkeypatch):
    before = BASE.key(1)
    monkeypatch.setattr("lrcompress.work.jobs.__version__", "9.9")
    assert BASE.key(1) != before


def test_where_a_weight_lies_is_not(tmp_path):
    save_file({"w": W}, tmp_path / "w.safetensors")
    torch.save({"other": torch.ones(3), "w": W}, tmp_path / "w.pt")
    keys = {Job(open_stored(tmp_path / f).reference("w"), "svd", S, rank=3).key(1) for f in ("w.pt", "w.safetensors")}
    assert keys == {BASE.key(1)} == {replace(BASE, weight=W.T.contiguous().T).key(1)}


def test_a_weight_is_computed_in_one_order_of_memory_wherever_it_is():
    turned = replace(BASE, weight=W.T.contiguous().T)
    assert not turned.weight.is_contiguous() and turned._weight().is_contiguous()
    assert turned.by_value().weight.is_contiguous()


def test_a_job_travels_with_its_own_numbers_only(tmp_path):
    wide = torch.randn(2000, 100)
    view = replace(S, gram=torch.zeros(500, 500)[:10, :10].double())
    _ = view.s  # the root that statistics keep
    job = Job(wide[:10], "svd", view, rank=2).by_value()
    assert len(pickle.dumps(job)) < 3 * (10 * 100 * 4 + 2 * 144 * 8 + 100 * 8) + 4000
    assert pickle.loads(pickle.dumps(job)).key(1) == job.key(1)


# results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "rank"),
    [("svd", (12, 10), 3), ("pivoted", (12, 10), 3), ("tucker", (8, 6, 3, 3), (4, 3)), ("kronecker", (12, 10), 2), ("cp", (8, 6, 3, 3), 3)],
)  # fmt: skip
def test_a_kept_result_is_the_result(tmp_path, name, shape, rank):
    w = weight(shape).float()
    job = Job(w, name, statistics(w, two_sided=True), rank=rank)
    exact = form(name).decompose(w, rank, job.statistics)
    assert exact.bias_shift is not None
    with Store.open(tmp_path / "out", ["a"]) as store:
        store.put("k", job.compute(1))
        packed = store.get("k")
        assert packed is not None and same(job.unpack(packed), exact)


def test_a_curve_is_kept_exactly(tmp_path):
    w = weight((8, 6, 3, 3)).float()
    job = CurveJob(w, "tucker", statistics(w))
    with Store.open(tmp_path / "out", ["a"]) as store:
        store.put("k", job.compute(1))
        found = job.unpack(store.get("k"))
    assert found.points == form("tucker").curve(w, job.statistics) and found.total == job.statistics.loss(w)


# the store ----------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_is_noticed(tmp_path):
    job = Job(W, "svd", S, rank=2)
    with Store.open(tmp_path / "out", ["a"]) as store:
        store.put("k", job.compute(1))
        path = store.folder / "k.safetensors"
        whole = path.read_bytes()
        undetected = []
        for at in [*range(0, len(whole), 7), len(whole) - 1]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.warns(LrcompressWarning, match="damaged"):
                if store.get("k") is not None:
                    undetected.append(at)
                    break
            assert not path.exists()
        assert undetected == []
        for size in (0, 5, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.warns(LrcompressWarning, match="damaged"):
                assert store.get("k") is None
        path.write_bytes(whole)
        path.rename(store.folder / "other.safetensors")
        with pytest.warns(LrcompressWarning, match="damaged"):
            assert store.get("other") is None


def test_a_damaged_result_is_computed_again(tmp_path):
    jobs = [Job(W, "svd", S, rank=r) for r in (1, 2, 3)]
    with Store.open(tmp_path / "out", ["a"]) as store:
        before = [f for _, f in run(jobs, store=store, threads=1)]
        path = sorted(store.folder.glob("*.safetensors"))[1]
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        with pytest.warns(LrcompressWarning, match="damaged"):
            after = [f for _, f in run(jobs, store=store, threads=1)]
        assert all(same(a, b) for a, b in zip(before, after, strict=True))


def test_what_is_kept_is_not_computed_again(tmp_path, monkeypatch):
    jobs = [Job(W, "svd", S, rank=r) for r in (1, 2, 3, 4)]
    with Store.open(tmp_path / "out", ["a"]) as store:
        first = list(run(jobs[::2], store=store, threads=1))
    computed = []
    compute = Job.compute
    monkeypatch.setattr(Job, "compute", lambda self, threads: computed.append(self.rank) or compute(self, threads))
    with Store.open(tmp_path / "out", ["a"]) as store:
        found = list(run(jobs, store=store, threads=1))
    assert computed == [2, 4] and [k for k, _ in first] == [k for k, _ in found[::2]]
    assert [f.rank for _, f in found] == [1, 2, 3, 4]


def test_a_store_is_of_one_command_and_one_run(tmp_path):
    with Store.open(tmp_path / "out", ["a"]) as one, Store.open(tmp_path / "out", ["b"]) as two:
        assert one.folder != two.folder
        one.put("k", Packed({}, {}))
        two.put("k", Packed({}, {}))
        with (
            pytest.raises(HostError, match=r"one run at a time.*another one at work"),
            Store.open(tmp_path / "out", ["a"]),
        ):
            pass
        one.remove()
        assert not one.folder.exists() and two.get("k") is not None
    assert [p.name for p in tmp_path.iterdir()] == [two.folder.name]


def test_a_folder_of_others_is_not_touched(tmp_path):
    with Store.open(tmp_path / "out", ["a"]) as store:
        folder = store.folder
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CommandError, match=r"thesis\.txt"), Store.open(tmp_path / "out", ["a"]):
        pass
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("left", [["lock"], [".store.json.abc.tmp"], ["lock", ".xyz.tmp"], []])
def test_what_a_kill_leaves_is_taken_over(tmp_path, left):
    with Store.open(tmp_path / "out", ["a"]) as store:
        folder = store.folder
    folder.mkdir()
    for name in left:
        (folder / name).write_text("")
    with Store.open(tmp_path / "out", ["a"]) as store:
        store.put("k", Packed({}, {}))
        assert {p.name for p in folder.iterdir()} == {"lock", "store.json", "k.safetensors"}


@pytest.mark.parametrize("last", range(1, 6))
def test_a_removal_that_is_killed_is_taken_over(tmp_path, last):
    """A kill after any file that goes, in the order in which they go; in the worst order the marker would be first."""
    script = f"""
import os, shutil
from pathlib import Path
from lrcompress.work import store as s
done, unlink = [], os.unlink
def counted(*args, **options):
    unlink(*args, **options)
    done.append(args)
    if len(done) == {last}:
        os._exit(9)
os.unlink = counted
def worst(folder, ignore_errors):
    for p in sorted(Path(folder).iterdir(), key=lambda p: p.name != "store.json"):
        os.unlink(p)
shutil.rmtree = worst
with s.Store.open(Path("out"), ["a"]) as store:
    for key in "xyz":
        store.put(key, s.Packed({{}}, {{}}))
    store.remove()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 9
    with Store.open(tmp_path / "out", ["a"]) as store:
        assert [store.get(k) is None for k in "xyz"].count(True) == min(last, 3)
        store.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "stays"), [(HostError("disk", "room"), True), (PlanError("p", "q"), False), (KeyboardInterrupt(), True)]
)
def test_results_stay_where_the_same_command_may_do_better(tmp_path, error, stays):
    with pytest.raises(type(error)), Store.open(tmp_path / "new" / "out", ["a"]) as store:
        store.put("k", Packed({}, {}))
        raise error
    assert store.folder.exists() is stays and (tmp_path / "new").exists() is stays


def test_an_unused_store_leaves_nothing(tmp_path):
    with Store.open(tmp_path / "deep" / "er" / "out", ["a"]):
        pass
    assert not list(tmp_path.iterdir())


# pools --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """A job that waits, fails, or ends its process."""

    number: int
    what: str = "wait"

    def key(self, threads):
        if self.what == "no key":
            raise PlanError("key", "one", "none")
        return f"{self.number}-{self.what}"

    def compute(self, threads):
        if self.what == "fail":
            raise UpdateError("job", "luck", "none")
        if self.what == "end":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3 * (self.number % 2 == 0))
        torch.set_num_threads(threads)
        return Packed({"n": torch.tensor([self.number])}, {"threads": torch.get_num_threads(), "pid": os.getpid()})

    def unpack(self, packed):
        return int(packed.tensors["n"]), packed.about

    def by_value(self):
        return self

    for_process = by_value


def test_workers_are_processes_and_give_the_same_results_in_order(tmp_path):
    before = torch.get_num_threads()
    with pool(workers=2) as where, Store.open(tmp_path / "out", ["a"]) as store:
        # Reference weights: read there, not here.
        save_file({"w": W}, tmp_path / "w.safetensors")
        reference = open_stored(tmp_path / "w.safetensors").reference("w")
        jobs = [Job(reference, "svd", rank=r) for r in (1, 2)]
        spread = list(run(jobs, store=store, pool=where, threads=2))
        assert [f.rank for _, f in spread] == [1, 2]
        loose = [
            Job(weight((40, 30), i).float(), name, rank=5) for i in range(3) for name in ("svd", "pivoted", "kronecker")
        ]
        spread += run(loose, pool=where, threads=2)
        found = [f for _, f in run([Odd(i) for i in range(6)], pool=where, threads=2)]
        pids = {about["pid"] for _, about in found}
    here = list(run([*jobs, *loose], threads=2))
    assert [k for k, _ in spread] == [k for k, _ in here]
    assert all(same(a, b) for (_, a), (_, b) in zip(spread, here, strict=True))
    torch.set_num_threads(before)
    assert [n for n, _ in found] == list(range(6)) and os.getpid() not in pids and len(pids) == 2
    assert {about["threads"] for _, about in found} == {2}
    until = time.monotonic() + 10
    while any(Path(f"/proc/{p}").exists() for p in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{p}").exists() for p in pids), "workers are gone with their pool"


@pytest.mark.parametrize(
    ("workers", "what", "error"), [(None, "fail", UpdateError), (None, "no key", PlanError), (2, "no key", PlanError)]
)
def test_what_a_job_raises_arrives_as_it_is(workers, what, error):
    # Late enough to be asked for by a thread of joblib, not by the one that waits.
    jobs = [Odd(1), Odd(3), Odd(5), Odd(7), Odd(9), Odd(11, what), Odd(13)]
    with pytest.raises(error) as caught, pool(workers=workers) as where:
        list(run(jobs, pool=where, threads=1))
    assert caught.value.exit_code == error.exit_code and caught.value.remedy


def test_a_worker_that_is_killed_ends_the_work_and_keeps_the_rest(tmp_path):
    jobs = [Odd(1), Odd(3), Odd(5), Odd(2, "end")]
    with pytest.raises(HostError) as caught, Store.open(tmp_path / "o", ["a"]) as store, pool(workers=2) as where:
        list(run(jobs, store=store, pool=where, threads=1))
    assert caught.value.exit_code == 10 and "continues" in caught.value.remedy
    assert (store.folder / "1-wait.safetensors").exists()


def test_a_consumer_that_stops_early_leaves_no_worker():
    with pool(workers=2) as where:
        results = run([Odd(i) for i in range(50)], pool=where, threads=1)
        _, (_, about) = next(results)
        results.close()
    assert not Path(f"/proc/{about['pid']}").exists()
    assert not [t for t in threading.enumerate() if t.name == "watch-cluster"]


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": -2}, {"workers": 2, "cluster": "tcp://127.0.0.1:1"}])
def test_wrong_pools_are_usage_errors(options):
    with pytest.raises(CommandError), pool(**options):
        pass


@pytest.mark.parametrize(
    "error", [PlanError("a", "b", "c", "d"), MissingExtraError("what", "dask", "cluster"), HostError("w", "e")]
)
def test_errors_travel(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and back.as_dict() == error.as_dict()


def test_statistics_without_moments_are_their_own_key():
    assert Job(W, "svd", Statistics(), rank=2).key(1) != Job(W, "svd", None, rank=2).key(1)
