"""The verb `factorize` for an ONNX file: in its own graph, by NumPy and ONNX Runtime; torch is not imported.

data, folder = factorize_graph("model.onnx", ratio=0.5, calib="x.npz", output="compressed")
"""

from __future__ import annotations

import importlib.metadata
import resource
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..data import Data, open_data
from ..errors import CommandError, DataError, LrcompressWarning, ModelError
from ..files import check_output, staged_folder
from ..graphs import Feeds, GraphLayer, OnnxGraph, Run, find_layers, open_graph, write_graph_checkpoint
from ..graphs.checkpoint import MAKER, MARKER
from ..graphs.fitting import Batch, Fitted, Seen, fit, measure
from ..graphs.forms import FORMS, Option
from ..graphs.planning import by_energy, by_rank, by_ratio
from ..graphs.rewriting import Rewritten, rewrite
from ..progress import Progress, Silent
from .asking import check_sizes, marked

WHERE = "lrcompress factorize"
#: Samples that layers are fitted to in the order of depth, and how many values one batch may hold.
_FITTED_SAMPLES, _BATCH_BYTES, _LARGEST_BATCH = 256, 256 << 20, 64


def factorize_graph(
    model: str | Path,
    *,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    method: str | None = None,
    multiple: int | None = None,
    calib: str | Path | Data | None = None,
    quick: bool = False,
    anchor: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    output: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    **others: Any,
) -> tuple[dict[str, Any], Path | None]:
    """Factorize the ONNX file `model`; return the report, and the folder if `output` was given.

    With `calib` errors are weighted by what layers read, a ratio is planned by measurements (not with `quick`), and
    layers are fitted in the order of depth (`anchor`). `others`: options that a graph does not take are refused.
    Raises `CommandError`, `ModelError`, `DataError`, `BudgetError`.
    """
    progress, threads = progress or Silent(), threads or 1
    check_sizes(rank, ratio, energy, others.get("plan"))
    multiple = 1 if multiple is None else multiple
    method = _check(method, calib, multiple, others)
    if output is not None:
        check_output(Path(output), maker=MAKER, marker=MARKER)
    graph = open_graph(model)
    every = marked(find_layers(graph), include, exclude, verb="factorize", where=graph.path)
    layers = [layer for layer in every if layer.reason is None]
    reasons: dict[str, str] = {layer.name: layer.reason for layer in every if layer.reason}
    Run(graph, threads=threads)  # what the runtime refuses is refused before anything is computed
    data = None if calib is None else _data(graph, calib)
    seen, batches = ({}, []) if data is None else _calibrated(graph, layers, data, threads, progress)
    for layer in [n for n in layers if data is not None and not seen[n.name].count]:
        reasons[layer.name] = "the calibration data never reach it"
    layers = [layer for layer in layers if layer.name not in reasons]
    _warn_of_few(layers, seen)
    if rank is not None:
        choice = by_rank(graph, layers, rank, method, seen)
    elif energy is not None:
        choice = by_energy(graph, layers, energy, method, seen)
    else:
        assert ratio is not None
        some = () if quick else batches
        choice = by_ratio(
            graph, layers, ratio, method, seen, some, multiple=multiple, threads=threads, progress=progress
        )
    chosen = {name: c for name, c in choice.items() if isinstance(c, Option)}
    reasons |= {name: c for name, c in choice.items() if isinstance(c, str)}
    fitted = fit(graph, layers, chosen, seen, batches, anchor=anchor, threads=threads, progress=progress)
    made = rewrite(graph, every, {name: f.change for name, f in fitted.items()})
    _check_runs(graph, made, batches, threads)
    rows = [_row(layer, chosen.get(layer.name), fitted.get(layer.name), reasons) for layer in every]
    report = _report(graph, rows, made, method, seed)
    if output is None:
        return report, None
    dest = Path(output)
    about = {
        "report": {k: report[k] for k in ("method", "seed", "layers", "params_before", "params_after")},
        "threads": threads, "versions": {"lrcompress": __version__, **_versions()},
    }  # fmt: skip
    with staged_folder(dest, maker=MAKER, marker=MARKER) as stage:
        specs = {n.name: _spec(n, chosen[n.name], fitted[n.name], made) for n in every if n.name in chosen}
        write_graph_checkpoint(stage, dest, graph, made.model, layers=specs, report=about)
    size = sum(p.stat().st_size for p in dest.rglob("*") if p.is_file())
    return {**report, "bytes_after": size, "output": str(dest)}, dest


def _check(method: str | None, calib: object, multiple: int, others: Mapping[str, Any]) -> str:
    """Refuse options that mean nothing for a graph; return the method."""
    if others.get("plan") is not None:
        expected = "--rank, --ratio or --energy for an ONNX file"
        raise CommandError(f"{WHERE} --plan", expected, others["plan"], "plans are made for networks")
    for name, value in (("--arch", others.get("arch")), ("--arch-arg", others.get("arch_args"))):
        if value:
            raise CommandError(f"{WHERE} {name}", "no architecture for an ONNX file: it is its own", value)
    if others.get("inputs"):
        got = ", ".join(str(i) for i in others["inputs"])
        raise CommandError(f"{WHERE} --input", "no inputs for an ONNX file: it knows its own", got)
    for name in ("workers", "cluster"):
        if others.get(name) is not None:
            raise CommandError(f"{WHERE} --{name}", "one process for an ONNX file", others[name], f"leave --{name} out")
    if others.get("compute", "auto") not in ("auto", "cpu"):
        raise CommandError(f"{WHERE} --compute", "cpu: a graph is fitted in ONNX Runtime and NumPy", others["compute"])
    if others.get("svd", "auto") not in ("auto", "full"):
        raise CommandError(f"{WHERE} --svd", "auto or full for an ONNX file", others["svd"])
    if multiple < 1:
        raise CommandError(f"{WHERE} --rank-multiple", "a whole number of at least 1", multiple)
    if method is not None and method not in ("auto", *FORMS):
        expected = f"auto, {' or '.join(FORMS)} for an ONNX file"
        raise CommandError(f"{WHERE} --method", expected, method, "other forms need the network in torch")
    return method or ("svd" if calib is None else "auto")


def _data(graph: OnnxGraph, calib: str | Path | Data) -> Data:
    if isinstance(calib, Data):
        return calib
    feeds = Feeds(graph)
    head, colon, split = str(calib).rpartition(":")
    if colon and head.endswith((".yaml", ".yml")):
        from ..recipe import open_split  # a recipe may name code that needs torch; a file does not

        return open_split(Path(head), split, inputs=feeds.ports)
    return open_data(calib, inputs=feeds.ports)


def _calibrated(
    graph: OnnxGraph, layers: Sequence[GraphLayer], data: Data, threads: int, progress: Progress
) -> tuple[dict[str, Seen], list[Batch]]:
    """Return what the layers read over all of `data`, and the batches that depth is fitted on."""
    if not len(data):
        raise DataError(data.origin, "at least one calibration sample", "none")
    feeds = Feeds(graph)
    size = feeds.groups(_batch_size(graph, layers, data, feeds, threads))

    def whole(part: Data) -> Iterator[Batch]:
        for batch in part.batches(size):
            if feeds.fixed is None or len(next(iter(batch.inputs.values()))) == feeds.fixed:
                yield feeds({k: np.asarray(v) for k, v in batch.inputs.items()})

    seen = measure(graph, layers, whole(data), total=-(-len(data) // size), threads=threads, progress=progress)
    return seen, list(whole(data.take(slice(0, min(len(data), max(_FITTED_SAMPLES, size))))))


def _batch_size(graph: OnnxGraph, layers: Sequence[GraphLayer], data: Data, feeds: Feeds, threads: int) -> int:
    """Return how many samples' inputs of layers are held at once."""
    if feeds.fixed is not None:
        return feeds.fixed
    one = next(iter(data.take(slice(0, 1)).batches(1))).inputs
    watched = sorted({u.value for layer in layers for u in layer.uses})
    _, values = Run(graph, watched=watched, threads=threads)(feeds({k: np.asarray(v) for k, v in one.items()}))
    each = max(1, sum(v.nbytes for v in values.values()))
    return int(min(_LARGEST_BATCH, max(1, _BATCH_BYTES // each), max(1, -(-len(data) // 2))))


def _warn_of_few(layers: Sequence[GraphLayer], seen: Mapping[str, Seen]) -> None:
    few = [
        n.name
        for n in layers
        if n.name in seen and n.kind != "embedding" and seen[n.name].count < n.params // n.shape[0]
    ]
    if few:
        warnings.warn(
            f"calibration has fewer positions than {few[0]} has inputs ({len(few)} layers): what it did not show is guessed from the rest; give more data",
            LrcompressWarning, stacklevel=3,
        )  # fmt: skip


def _check_runs(graph: OnnxGraph, made: Rewritten, batches: Sequence[Batch], threads: int) -> None:
    """The new graph loads and, where there are data, answers in the same shapes with finite numbers."""
    run = Run(graph, made.model, threads=threads)
    for feeds in batches[:1]:
        wanted, got = Run(graph, threads=threads)(feeds)[0], run(feeds)[0]
        for name, value in wanted.items():
            good = got[name].shape == value.shape and (np.isfinite(got[name]).all() or not np.isfinite(value).all())
            if not good:
                raise ModelError(
                    f"{graph.path}: output {name}", f"finite values of shape {value.shape}", got[name].shape
                )


def _row(layer: GraphLayer, option: Option | None, fitted: Fitted | None, reasons: Mapping[str, str]) -> dict[str, Any]:
    done = option is not None and fitted is not None
    biased = fitted is not None and fitted.change.bias is not None and not layer.has_bias
    after = option.params + (layer.shape[0] if biased else 0) if option is not None else layer.params
    return {
        "name": layer.name, "form": option.form if option else "dense", "shape": list(layer.shape),
        "rank": None if option is None else (list(option.rank) if isinstance(option.rank, tuple) else option.rank),
        "params_before": layer.params, "params_after": after,
        "rel_error": fitted.rel_error if done and fitted else 0.0, "norm": fitted.norm if done and fitted else "frobenius",
        "rel_error_frobenius": fitted.rel_error_frobenius if done and fitted else 0.0,
        "reason": None if done else reasons.get(layer.name),
    }  # fmt: skip


def _spec(layer: GraphLayer, option: Option, fitted: Fitted, made: Rewritten) -> dict[str, Any]:
    factors = fitted.change.factors
    assert factors is not None
    return {
        "kind": layer.kind, "form": option.form, "shape": list(layer.shape),
        "rank": list(option.rank) if isinstance(option.rank, tuple) else option.rank,
        "factors": {key: list(a.shape) for key, a in factors.arrays.items()}, "names": made.factors[layer.name],
        "bias": layer.has_bias or fitted.change.bias is not None,
    }  # fmt: skip


def _report(graph: OnnxGraph, rows: list[dict[str, Any]], made: Rewritten, method: str, seed: int) -> dict[str, Any]:
    if all(row["form"] == "dense" for row in rows):
        note = "no layer was factorized: every one would not shrink or was left out"
        warnings.warn(note, LrcompressWarning, stacklevel=3)
    saved = sum(row["params_before"] - row["params_after"] for row in rows)
    return {
        "method": method, "seed": seed, "layers": rows, "params_before": graph.n_params,
        "params_after": graph.n_params - saved, "bytes_before": _file_bytes(graph), "bytes_after": None,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "output": None,
    }  # fmt: skip


def _file_bytes(graph: OnnxGraph) -> int:
    """Return the bytes of the graph and of the external data it names."""
    places = {
        e.value for t in graph.stored.values() for e in t.external_data if e.key == "location"
    }  # fmt: skip
    beside: int = sum((graph.folder / place).stat().st_size for place in places)
    return graph.path.stat().st_size + beside


def _versions() -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in ("onnx", "onnxruntime", "numpy")}


__all__ = ["factorize_graph"]
