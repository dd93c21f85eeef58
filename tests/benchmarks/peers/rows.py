"""The rows: a name to ask for, a label, the networks it is for, and what makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lrcompress

from . import foreign, formulas
from .formulas import Made
from .networks import PROFILES, Network

ALL = tuple(PROFILES)
#: The rows that our time is compared with.
BALF, AIMET, OURS = "balf", "aimet", "lrcompress"


@dataclass(frozen=True)
class Row:
    """`make`: (network, share kept) to a compressed network; None for a dense row of the runtime.

    `calibrated`: depends on the calibration draw, so that it is run for every seed. `budgeted`: depends on the share.
    `package`: the foreign package that must be importable.
    """

    name: str
    label: str
    make: Callable[[Network, float], Made] | None = None
    networks: tuple[str, ...] = ALL
    calibrated: bool = True
    budgeted: bool = True
    package: str = ""


def ours(network: Network, kept: float) -> Made:
    """Call the package as a user does, without the statistics that an earlier row may have left in its cache."""
    found = lrcompress.factorize(
        network.opened, ratio=network.ratio(kept), method="auto", calib=network.calibration, seed=network.seed,
        exclude=network.profile.exclude, cache=False,
    )  # fmt: skip
    assert found.model is not None
    forms: dict[str, int] = {}
    for layer in found.data["layers"]:
        forms[layer["form"]] = forms.get(layer["form"], 0) + 1
    return Made(found.model, ", ".join(f"{n} {form}" for form, n in sorted(forms.items())))


_CONVS = ("resnet20",)
_LIST = (
    Row("dense", "dense fp32", calibrated=False, budgeted=False),
    Row("int8", "dense int8 (ONNX Runtime)", budgeted=False),
    Row("int4", "dense int4 (ONNX Runtime)", budgeted=False),
    Row("int4-tables", "dense int4, int4 tables", networks=("minilm",), budgeted=False),
    Row("svd", "SVD, uniform", formulas.svd, calibrated=False),
    Row("tucker2", "Tucker-2, uniform", formulas.tucker2, _CONVS, calibrated=False),
    Row("tucker2-evbmf", "Tucker-2 + EVBMF", formulas.tucker2_evbmf, _CONVS, calibrated=False, budgeted=False),
    Row("asvd", "ASVD", formulas.asvd),
    Row("svd-llm", "SVD-LLM", formulas.svd_llm),
    Row("svd-llm-v2", "SVD-LLM v2", formulas.svd_llm_v2),
    Row("aa-svd", "AA-SVD", formulas.aa_svd),
    Row("lems", "LEMS", formulas.lems),
    Row("lems-squared", "LEMS, squared logits", formulas.lems_squared, _CONVS),
    Row(BALF, "BALF", formulas.balf),
    Row(AIMET, "AIMET spatial SVD, greedy", foreign.aimet, _CONVS, package="aimet_torch"),
    Row("greenformer", "greenformer", foreign.greenformer, calibrated=False, package="greenformer"),
    Row("tensorly-torch", "tensorly-torch", foreign.tensorly_torch, _CONVS, calibrated=False, package="tltorch"),
    Row(OURS, "lrcompress", ours),
)
ROWS = {row.name: row for row in _LIST}
