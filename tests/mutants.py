"""Plant faults in decompositions, training and adapters, one at a time, and see that the contracts notice each: `make mutants`.

Every fault is a change of one place in one file: a transposed factor, a dropped scale, an off-by-one rank, a wrong
unfolding, a metric on the wrong side. A fault that survives means a test is missing; a fault whose text is no longer
there means this list is out of date. Either ends with exit code 1. `python -m tests.mutants recover/losses.py adapt`
plants only what is in this file and that folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants_graphs import GRAPH_FAULTS
from tests.mutants_training import TRAINING_FAULTS

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/contracts/test_{name}.py"
    for name in ("factorize", "special_forms", "groups_and_bases", "pivoted_gauges", "curves", "anchor")
]

#: (file in lrcompress/factorize, text, what it becomes, which tests to run)
FAULTS: list[tuple[str, str, str, str]] = [
    ("svd.py", "return p[:, :rank] * d[:rank], qt[:rank], d.square()", "return p[:, :rank], qt[:rank], d.square()", "svd or eckart"),
    ("svd.py", "lw = w if left is None else left.T @ w", "lw = w if left is None else left @ w", "svd or weighted"),
    ("svd.py", "return rank * sum(sides(shape))", "return rank * (sum(sides(shape)) - 1)", "svd"),
    ("svd.py", "tails[r - 1]", "tails[max(r - 2, 0)]", "svd"),
    ("svd.py", "return min(sides(shape))", "return max(sides(shape))", "svd"),
    ("svd.py", "u = p if left is None else torch.linalg.solve_triangular(left.T, p, upper=True)", "u = p", "randomized"),
    ("svd.py", "el.T @ (weights[:, None] * el)", "el.T @ el", "svd or frequent"),
    ("svd.py", "q, _ = torch.linalg.qr(k(q))", "q, _ = torch.linalg.qr(q)", "randomized"),
    ("svd.py", "statistics, output_gram=None", "statistics, gram=None", "principal"),
    ("_types.py", "shift = (error.reshape", "shift = -(error.reshape", "bias or mean"),
    ("_types.py", "return max(_inner(self.weighted(error), error), 0.0)", "return _inner(error, error)", "norm or weighted"),
    ("_types.py", "return self.g, self.s", "return self.s, self.g", "svd"),
    ("_types.py", "rel_error_frobenius=relative(_inner(error, error), ", "rel_error_frobenius=relative(loss, ", "norm"),
    ("_linalg.py", "return values.flip(0).clamp_min(0), leading", "return values.clamp_min(0), leading", "svd or eckart"),
    ("_linalg.py", "vectors.flip(1)[:, :rank]", "vectors[:, :rank]", "svd or weighted"),
    ("_refit.py", "value = value + length * direction", "value = value + 2 * length * direction", "refit or hadamard"),
    ("_refit.py", "fresh / energy", "energy / fresh", "refit or hadamard"),
    ("tucker.py", "torch.einsum(\"ikrl,is->skrl\", sq, u_in)", "torch.einsum(\"ikrl,is->slrk\", sq, u_in)", "tucker"),
    ("tucker.py", "back, _ = torch.linalg.qr(inverse @ basis)", "back, _ = torch.linalg.qr(half @ basis)", "tucker"),
    ("tucker.py", "weighted = scaled if between is None else scaled @ between", "weighted = scaled", "tucker"),
    ("tucker.py", ".cumsum(0)\n", ".cumsum(0).flip(0)\n", "tucker"),
    ("tucker.py", "return cls(u_in, chol, x if left is None else x @ left,", "return cls(u_in, chol, x if left is None else x @ left.T,", "tucker"),
    ("tucker.py", "if o <= i * kernel and i <= o * kernel", "if o <= i and i <= o", "tucker"),
    ("tucker.py", "return shape[1] * inner + inner * out * math.prod(shape[2:]) + out * shape[0]", "return shape[1] * inner + inner * out + out * shape[0]", "tucker"),
    ("spatial_svd.py", "convolve(convolve(x, first, only(geometry, axis)), second, only(geometry, 1 - axis))", "convolve(convolve(x, first, only(geometry, 1 - axis)), second, only(geometry, axis))", "spatial"),
    ("spatial_svd.py", "kw if fit.swap else kh", "kh if fit.swap else kw", "spatial"),
    ("spatial_svd.py", "first, second = first.transpose(2, 3), second.transpose(2, 3)", "first, second = first, second.transpose(2, 3)", "spatial"),
    ("spatial_svd.py", "(False, True) if w.shape[2] == w.shape[3] else (False,)", "(False,)", "spatial or orders"),
    ("_filters.py", "rows = torch.einsum(\"po,pwn->own\"", "rows = torch.einsum(\"op,pwn->own\"", "spatial or banks or product_metric"),
    ("_filters.py", "s.permute(0, 2, 1, 3, 5, 4)", "s.permute(0, 2, 1, 3, 4, 5)", "spatial or banks or heads"),
    ("_filters.py", "(near, cholesky(columns))", "(near, cholesky(columns).T)", "product_metric"),
    ("_filters.py", "x if self.g is None else x @ self.g", "x", "heads or spatial"),
    ("_filters.py", ".permute(3, 1, 0, 2).reshape(flat.shape[1], -1)", ".permute(1, 3, 0, 2).reshape(flat.shape[1], -1)", "banks"),
    ("_filters.py", "torch.einsum(\"orw,onw->rn\", gb, self.ws)", "torch.einsum(\"orw,onw->rn\", b, self.ws)", "banks"),
    ("_filters.py", "scaled + (fresh / energy) * direction", "scaled - (fresh / energy) * direction", "banks"),
    ("_filters.py", "yield _improved(view, basis[:rank])", "yield _improved(view, basis[-rank:])", "spatial"),
    ("_memo.py", "last[0]() is statistics and ", "", "memo"),
    ("_memo.py", " and last[1] == key", "", "memo"),
    ("_memo.py", "tuple(weight.shape), weight.dtype, ", "(), torch.uint8, ", "memo"),
    ("_memo.py", "weakref.ref(statistics, self._forget)", "(lambda: statistics)", "memo"),
    ("pivoted_spatial.py", "- rank * min(rank, shape[0])", "- rank * rank", "spatial or gauge"),
    ("pivoted_spatial.py", "if rank >= out:", "if rank > out:", "gauge or spatial"),
    ("pivoted_spatial.py", "others = others[pivots[\"order\"].argsort()]", "others = others[pivots[\"order\"]]", "gauge or walk"),
    ("pivoted_spatial.py", "scale * (free @ a)]", "free @ a]", "gauge or walk"),
    ("pivoted_spatial.py", "if growth > _GROWTH:", "if growth > math.inf:", "refused"),
    ("pivoted_spatial.py", "[1] <= _GROWTH", "[1] <= math.inf", "refused"),
    ("pivoted_spatial.py", "float((changed.abs() @ mixed.abs()).max())", "float((changed @ mixed).abs().max())", "refused or nearly"),
    ("pivoted_spatial.py", "> 1e-8 * largest", "> 1e8 * largest", "refused or degenerate"),
    ("pivoted_spatial.py", "before * d - p, after * d - p)", "before * d - p, before * d - p)", "walk"),
    ("pivoted_spatial.py", "tuple(2 * v if i == axis else v", "tuple(v for i, v", "walk or spatial"),
    ("pivoted_spatial.py", "d - p if c == 0 else -p, d - p if c == n else -p", "d - p if c == n else -p, d - p if c == 0 else -p", "walk"),
    ("pivoted_spatial.py", "F.pad(z, pad if axis == 1 else (0, 0, *pad))", "F.pad(z, pad if axis == 0 else (0, 0, *pad))", "walk"),
    ("pivoted_spatial.py", "return 1 if first.dim() == 4 and first.shape[3] > 1 else 0", "return 0", "orders or spatial or walk"),
    ("pivoted_tucker.py", "inner = inner[:, kept]", "inner = inner[:, kept].T", "gauge or tucker"),
    ("pivoted_tucker.py", "\"inputs\": place.argsort()", "\"inputs\": place", "gauge or tucker"),
    ("pivoted_tucker.py", "- rank[0] ** 2 - rank[1] ** 2", "- rank[0] ** 2", "tucker"),
    ("pivoted_tucker.py", "factors |= {\"S\": mixed.T,", "factors |= {\"S\": mixed.T * 2,", "gauge or tucker"),
    ("pivoted_tucker.py", "x = ordered[:, :inner] + pointwise", "x = x[:, :inner] + pointwise", "walk or tucker"),
    ("_curves.py", "{*range(step, most + 1, step), most}", "{*range(step, most + 1, step)}", "offered"),
    ("kronecker.py", "w.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3)", "w.reshape(m1, m2, n1, n2).permute(0, 3, 1, 2)", "kronecker or van_loan"),
    ("kronecker.py", "b, c = b @ undo[0], c @ undo[1]", "b, c = b @ undo[0], c", "kronecker"),
    ("kronecker.py", "return rank * (m1 * n1 + m2 * n2)", "return rank * (m1 * n2 + m2 * n1)", "kronecker"),
    ("kronecker.py", "rows_b = b.permute(1, 0, 2)[torch.div(ids, m2, rounding_mode=\"floor\")]", "rows_b = b.permute(1, 0, 2)[torch.remainder(ids, b.shape[1])]", "kronecker"),
    ("pivoted.py", "return svd.n_params(shape, rank) - rank * rank", "return svd.n_params(shape, rank)", "pivoted"),
    ("kronecker.py", "rest = self.w if lead == rank else self.w - _product(b[lead:], c[lead:])", "rest = self.w", "terms_is or kronecker"),
    ("kronecker.py", "normal.diagonal()[: first[1]].mean()", "normal.diagonal().mean() * 1e4", "terms_is or kronecker"),
    ("kronecker.py", "torch.einsum(\"kab,ibjd->kijad\", c", "torch.einsum(\"kad,ibjd->kijab\", c", "terms_is or kronecker"),
    ("kronecker.py", "right = following\n", "right = following * 0 + right\n", "product_metric or kronecker or tucker"),
    ("_gauge.py", "place[[*chosen, *rest]] = np.arange(len(pivot), dtype=np.int32)", "place[:] = [*chosen, *rest]", "pivoted"),
    ("_gauge.py", "chosen, rest = sorted(pivot[:rank]), sorted(pivot[rank:])", "chosen, rest = sorted(pivot[-rank:]), sorted(pivot[:-rank])\n    return torch.tensor(chosen), torch.from_numpy(np.linalg.solve(q[chosen].T, q[rest].T).T.copy()), torch.from_numpy(np.argsort([*chosen, *rest]).astype(np.int32))", "pivot"),
    ("cp.py", "share = total.clamp_min(1e-300) ** (1 / len(modes))", "share = total.clamp_min(1e-300) ** 0.5", "cp"),
    ("cp.py", "y = convolve(y, kernel, along, groups=rank)", "y = convolve(y, kernel.flip(2), along, groups=rank)", "cp"),
    ("cp.py", "<= _GROWTH * float(w.norm())", "< math.inf", "outgrows"),
    ("tensor_train.py", "permute(0, 3, 1, 4, 2, 5)", "permute(0, 3, 1, 5, 2, 4)", "tensor_train or train"),
    ("tensor_train.py", "b = torch.remainder(torch.div(ids, m2, rounding_mode=\"floor\"), m1)", "b = torch.remainder(ids, m1)", "tensor_train"),
    ("hadamard.py", "return (first * second).reshape(shape)", "return (first + second).reshape(shape)", "hadamard"),
    ("hadamard.py", "out[\"B1\"], out[\"B2\"] = out[\"B1\"] * ratio, out[\"B2\"] / ratio", "out[\"B1\"], out[\"B2\"] = out[\"B1\"] * ratio, out[\"B2\"]", "hadamard"),
    ("hadamard.py", "(residual @ a.T)", "((w - (b @ a) * other) @ a.T)", "hadamard"),
    ("khatri_rao.py", "unfolded(w).T.reshape(-1, rows, columns)", "unfolded(w).T.reshape(-1, columns, rows).transpose(1, 2)", "khatri"),
    ("khatri_rao.py", "roots = d[:, :rank].sqrt()", "roots = d[:, :rank]", "khatri"),
    ("als.py", "u = u + _solve(vs @ v.T, (vs @ (w - u @ v).T)).T", "u = u + _solve(v @ v.T, (vs @ (w - u @ v).T)).T", "als or half_steps"),
    ("als.py", "(d - ridge).clamp_min(0)", "(d - ridge / 2).clamp_min(0)", "ridge"),
    ("als.py", "torch.einsum(\"rn,mn->mr\", v, omega * w)", "torch.einsum(\"rn,mn->mr\", v, w)", "missing or entry"),
    ("nmf.py", "/ weight).clamp_min(0)", "/ weight)", "nmf"),
    ("nmf.py", "u = torch.cat([pairs[0][0], -pairs[1][0]], 1)", "u = torch.cat([pairs[0][0], pairs[1][0]], 1)", "nmf"),
    ("grouped_svd.py", "geometry, groups)\n    return", "geometry, 1)\n    return", "group"),
    ("grouped_svd.py", "rank, None if statistics is None else statistics.group(i))", "rank, None if statistics is None else statistics.group(0))", "group"),
    ("shared.py", "\"U\": u[at : at + len(w)] / s", "\"U\": u[at : at + len(w)]", "shared"),
    ("_anchor.py", "beta * (1 - beta) * (mixed + mixed.mT)", "beta * (mixed + mixed.mT)", "anchor or blended"),
    ("_anchor.py", "(self.cross - w @ h).mT).mT", "self.cross.mT).mT", "anchor or drifted"),
    ("_anchor.py", "bias_shift=blend.shift(rebuilt)", "bias_shift=drift.shift(rebuilt)", "anchor"),
]  # fmt: skip


def main() -> int:
    """Run every fault (or those whose file or folder is among the arguments); print a table; 0 if all were caught."""
    parser = argparse.ArgumentParser(description="Plant faults and see the contracts catch them.")
    parser.add_argument("places", nargs="*", help="only faults there, e.g. svd.py, recover, or adapt/lokr.py")
    wanted = parser.parse_args().places
    every = [(f"factorize/{name}", old, new, TESTS, tests) for name, old, new, tests in FAULTS]
    every += [
        (name, old, new, [f"tests/contracts/{where}.py"], tests)
        for name, old, new, where, tests in (*TRAINING_FAULTS, *GRAPH_FAULTS)
    ]
    chosen = [f for f in every if not wanted or any(_is_at(f[0], place) for place in wanted)]
    missed = 0
    for name, old, new, files, tests in chosen:
        started = time.perf_counter()
        verdict = plant(name, old, new, files, tests)
        missed += verdict != "caught"
        print(f"{verdict:9} {time.perf_counter() - started:5.1f} s  {name:26} {old.splitlines()[0][:60]}", flush=True)
    print(f"{missed} of {len(chosen)} faults were not caught" if missed else f"all {len(chosen)} faults caught")
    return bool(missed)


def _is_at(name: str, place: str) -> bool:
    return place in (name, Path(name).name) or name.startswith(f"{place}/")


def plant(name: str, old: str, new: str, files: Sequence[str], tests: str) -> str:
    """Return caught, SURVIVED, STALE or BROKEN for one fault in lrcompress/`name`, tried in a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT,
            tree,
            ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs", "__pycache__", ".*_cache", ".hypothesis"),
        )
        path = tree / "lrcompress" / name
        text = path.read_text()
        if text.count(old) < 1:
            return "STALE"
        path.write_text(text.replace(old, new, 1))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, *files]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if run.returncode == 1:  # 1: tests failed; 2 and more: pytest could not run them
            return "caught"
        return "SURVIVED" if run.returncode == 0 else "BROKEN"


if __name__ == "__main__":
    sys.exit(main())
