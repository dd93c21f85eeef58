"""Closed forms as `recover` uses them: where training starts, or all there is; and refits of the base itself."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..adapt import BaseAdapter
from ..data import Data
from ..errors import CommandError, LrcompressWarning, ModelError
from ..files import check_output, staged_folder
from ..model import OpenedModel
from ..model.checkpoint import MARKER, RETRAINER, Compressed, module_layers, state_of, write_retrained
from ..model.folding import fold_again
from ..model.layers import FactorizedLayer
from ..progress import Progress
from ..recover.closed_adapters import KINDS, Corrected, correct
from ..recover.closed_refits import Refitted, refit

MODES = ("auto", "only", "off", "refit")
#: With fewer samples a closed form leaves training less to find than it gives: a small network, rank 4, lost 0.354 when
#: it was trained on 144 samples from zero and 0.396 from the closed form; on 1,800 samples 0.303 and 0.259.
LEAST_SAMPLES = 512


def check_mode(mode: str, train: str) -> None:
    """Raise `CommandError` for a mode that does not exist, or has nothing to do with what is trained."""
    if mode not in MODES:
        raise CommandError("lrcompress recover --closed", f"one of {', '.join(MODES)}", mode)
    if mode == "only" and train != "adapters":
        expected = "adapters, which have closed forms"
        raise CommandError("lrcompress recover --closed only", expected, f"--train {train}", "give --closed refit")


@dataclass
class ClosedForm:
    """One use of closed forms by a verb.

    `mode`: off, only (`CommandError` for a kind without one), or auto: where there is one, the answers of the original
    (`teacher`) are what training wants (`distils`), samples are plenty, and some layer was made without data: one that
    was fitted to data has nothing left that a closed form finds and the same bytes as rank do not.
    """

    mode: str
    base: Compressed
    teacher: OpenedModel | None
    distils: bool
    device: str
    trust: Mapping[str, bool]
    progress: Progress
    _found: Corrected | None = None
    _seconds: float = 0.0

    def start(
        self, module: nn.Module, name: str, adapters: dict[str, BaseAdapter], *, fit: Data, held: Data,
        decide: Callable[[], float],
    ) -> dict[str, BaseAdapter]:  # fmt: skip
        """Set fresh adapters by closed forms; return those to go on with: all, or with "only" those that were set.

        `decide`: the loss of `module`, on its device, on held-out data.
        """
        if self.mode == "off" or (self.mode == "auto" and not self._pays(adapters, fit)):
            return adapters
        kind = next(iter(adapters.values())).kind
        if kind not in KINDS:
            raise CommandError(
                "lrcompress recover --closed only", f"an adapter of kind {' or '.join(KINDS)}", kind,
                "this kind has no closed form in the metric of correlated inputs: train it, with --closed off",
            )  # fmt: skip

        def moved() -> float:
            module.to(self.device)
            value = decide()
            module.cpu()
            return value

        started = time.perf_counter()
        try:
            original = original_network(self.base, self.teacher or self.base.open_original(None, **self.trust))
            module.cpu()
            self._found = correct(
                self.base.opened, original, module, adapters, fit=fit, held=held, decide=moved, progress=self.progress
            )
        except (ModelError, RuntimeError) as e:  # a program of one fixed batch size runs in training, not here
            if self.mode == "only":
                raise
            why = next(iter(str(e).splitlines()), type(e).__name__)
            note = f"training starts from zero, there is no closed form here: {why}"
            warnings.warn(note, LrcompressWarning, stacklevel=3)
        finally:
            module.to(self.device)
        self._seconds = time.perf_counter() - started
        return adapters if self.mode == "auto" else self._only(module, name, adapters)

    def _pays(self, adapters: Mapping[str, BaseAdapter], fit: Data) -> bool:
        kinds = {a.kind for a in adapters.values()}
        rows = self.base.spec.get("report", {}).get("layers", ())
        fitted = bool(rows) and all(row.get("norm") != "frobenius" for row in rows if row.get("form") != "dense")
        distils = self.distils and self.teacher is not None
        return kinds <= set(KINDS) and distils and len(fit) >= LEAST_SAMPLES and not fitted

    def report_in(self, report: dict[str, Any]) -> None:
        """Add what was done to a verb's report, whose start is the compressed network without any correction."""
        found = self._found
        if found is None:
            report["closed"] = None
            return
        report["closed"] = {
            "mode": self.mode, "before": found.before, "after": found.after, "seconds": self._seconds,
            "bytes": sum(row["bytes"] for row in found.rows if row["applied"]), "layers": list(found.rows),
        }  # fmt: skip
        report["loss"]["before"] = found.before
        if report["metric"].startswith("loss_"):
            report["before"] = found.before

    def _only(self, module: nn.Module, name: str, adapters: dict[str, BaseAdapter]) -> dict[str, BaseAdapter]:
        """Take the adapters off that were not set; all stay, at zero, where none was."""
        assert self._found is not None
        applied = set(self._found.applied)
        if not applied:
            note = "no closed form lowers the loss on held-out data: the adapter is zero, train it"
            warnings.warn(note, LrcompressWarning, stacklevel=4)
            return adapters
        for layer in set(adapters) - applied:
            wrapped = module.get_submodule(layer)
            assert isinstance(wrapped, FactorizedLayer)
            wrapped.remove_adapter(name)
        return {n: a for n, a in adapters.items() if n in applied}


def original_network(base: Compressed, opened: OpenedModel) -> nn.Module:
    """Return the original on the CPU, as a copy with the normalizations folded that were folded in `base`."""
    if opened.module is None:
        raise ModelError(opened.path or "the original", "a network", "a state dict", "give --arch")
    folded = base.spec.get("folded", {})
    if not folded and all(p.device.type == "cpu" for p in opened.module.parameters()):
        return opened.module.eval()
    network = copy.deepcopy(opened.module).cpu().eval()
    try:
        fold_again(network, folded)
    except (AttributeError, AssertionError) as e:
        raise ModelError(opened.path or "the original", "the parts that were folded", str(e), "factorize again") from e
    return network


def refitted(
    base: Compressed,
    opened: OpenedModel,
    *,
    fit: Data,
    held: Data,
    output: Path | None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Refit the layers of a compressed network and write it, where `output` is given, as a compressed folder.

    The folder is one that `recover --train factors` could have made: same format, another digest. Nothing is written where no refit
    helps. Raises `CommandError` for a folder of somebody else's, `ModelError`.
    """
    if output is not None:
        check_output(output, maker=RETRAINER, marker=MARKER)
    started = time.perf_counter()
    module = copy.deepcopy(base.need_module("recover --closed refit"))
    found = refit(base.opened, original_network(base, opened), module, fit=fit, held=held, progress=progress)
    report: dict[str, Any] = {
        "metric": "squared_distance_to_original", "original": 0.0, "before": found.before, "after": found.after,
        "seconds": time.perf_counter() - started, "bytes": sum(row["bytes"] for row in found.rows if row["applied"]),
        "layers": list(found.rows), "output": None,
    }  # fmt: skip
    if not found.applied:
        warnings.warn("no refit lowers the loss on held-out data: nothing is written", LrcompressWarning, stacklevel=3)
    elif output is not None:
        _write(base, module, found, output)
        report["output"] = str(output)
    return module, report


def _write(base: Compressed, module: nn.Module, found: Refitted, output: Path) -> None:
    """Write a compressed folder whose report also says what was refitted."""
    report = {**base.spec.get("report", {}), "refitted": list(found.rows), "refitted_from": base.digest}
    versions = {**base.spec.get("versions", {}), "lrcompress": __version__}
    about = {"report": report, "threads": torch.get_num_threads(), "versions": versions}
    with staged_folder(output, maker=RETRAINER, marker=MARKER) as stage:
        write_retrained(stage, output, base, tensors=state_of(module), layers=module_layers(module), report=about)
