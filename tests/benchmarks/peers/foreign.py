"""Rows of packages that really run: AIMET's greedy spatial SVD, greenformer, tensorly-torch. None is changed here.

Each is asked for the budget in its own terms: AIMET by its memory ratio, the others by the largest of their own
fractions that stores no more numbers. Imports are inside: only the environment of `make bench-peers` has them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import re
import sys
import tempfile
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from lrcompress.model import tensors_of
from lrcompress.model.surgery import count_parameters, set_submodule

from .formulas import Made
from .networks import Network

#: Images that AIMET's greedy search evaluates each candidate on (whole run, quick run), and candidates per layer.
_AIMET_IMAGES, _AIMET_CANDIDATES = (500, 60), 10
_HALVINGS = 12
_LIVING: list[Any] = []


def usable_torchvision() -> None:
    """Import torchvision; where its build is not torch's own, declare the operators that it registers shapes for.

    AIMET and transformers import it, and use none of these operators.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    while True:
        try:
            importlib.import_module("torchvision")
            _LIVING.append(library)  # its declarations last as long as it does
            return
        except RuntimeError as e:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(e))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor x) -> Tensor")
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]


def ready(package: str) -> None:
    """Import a foreign package, with what it expects of its own time."""
    if package == "greenformer":
        import transformers.modeling_utils
        import transformers.pytorch_utils

        transformers.modeling_utils.Conv1D = transformers.pytorch_utils.Conv1D  # where it was in 2021
    importlib.import_module(package)


def aimet(network: Network, kept: float) -> Made:
    """Compress with AIMET: greedy ratios per layer by accuracy on labelled training images, memory as the cost."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric, GreedySelectionParameters
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import SpatialSvdParameters

    images = network.calibration.take(slice(0, _AIMET_IMAGES[network.quick]))
    batches = [(tensors_of(b.inputs, torch.device("cpu")), torch.as_tensor(b.labels)) for b in images.batches(250)]

    def accuracy(module: nn.Module, iterations: int | None, use_cuda: bool = False) -> float:
        del iterations, use_cuda
        with torch.no_grad():
            hits = [(next(iter(network.opened.outputs(module, x).values())).argmax(-1) == y).sum() for x, y in batches]
        return float(sum(hits)) / len(images)

    share = Decimal(network.budget(kept)) / Decimal(network.in_scope)
    greedy = GreedySelectionParameters(share, _AIMET_CANDIDATES, True)
    auto = SpatialSvdParameters.AutoModeParams(greedy, modules_to_ignore=[])
    shape = (1, *(int(d) for d in network.opened.inputs[0].shape[1:]))
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it leaves its scores in ./data
        module, _ = ModelCompressor.compress_model(
            copy.deepcopy(network.module), accuracy, None, shape, CompressionScheme.spatial_svd, CostMetric.memory,
            SpatialSvdParameters(SpatialSvdParameters.Mode.auto, auto),
        )  # fmt: skip
    return Made(module, f"{_version('aimet-torch')}, {len(images)} images per candidate")


def _scope(network: Network) -> list[str]:
    """Return the smallest part of the network that holds all layers in scope: its path, as a list of names."""
    paths = [layer.name.split(".")[:-1] for layer in network.layers]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


def greenformer(network: Network, kept: float) -> Made:
    """Factorize with greenformer's SVD solver, at the largest fraction that keeps the budget."""
    from greenformer import auto_fact

    def at(fraction: float, solver: str) -> nn.Module:
        torch.manual_seed(network.seed)
        whole = copy.deepcopy(network.module)
        path = _scope(network)
        part = whole.get_submodule(".".join(path))
        changed: nn.Module = auto_fact(nn.Sequential(part), rank=fraction, solver=solver, deepcopy=True)[
            0
        ]  # root layers are skipped
        if not path:
            return changed
        set_submodule(whole, ".".join(path), changed)
        return whole

    fraction = _largest_fraction(network, kept, lambda f: at(f, "random"))
    return Made(at(fraction, "svd"), f"{_version('greenformer')}, rank={fraction:.3f}")


def tensorly_torch(network: Network, kept: float) -> Made:
    """Replace every convolution by tensorly-torch's Tucker one, at the largest fraction that keeps the budget."""
    from tltorch import FactorizedConv

    def at(fraction: float, decompose: bool) -> nn.Module:
        module = copy.deepcopy(network.module)
        for layer in network.layers:
            if layer.kind != "conv":
                continue
            plain: Any = module.get_submodule(layer.name)
            new = FactorizedConv.from_conv(
                plain, rank=fraction, factorization="tucker", implementation="factorized", decompose_weights=decompose
            )
            if count_parameters(new) < count_parameters(plain):
                set_submodule(module, layer.name, new)
        return module

    fraction = _largest_fraction(network, kept, lambda f: at(f, decompose=False))
    return Made(at(fraction, decompose=True), f"{_version('tensorly-torch')}, rank={fraction:.3f}")


def _largest_fraction(network: Network, kept: float, make: Callable[[float], nn.Module]) -> float:
    """Return the largest fraction in (0, 1) whose network stores no more numbers than the budget."""
    most = network.params - network.in_scope + network.budget(kept)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if count_parameters(make(middle)) <= most else (low, middle)
    if low == 0.0:
        raise ValueError(f"no fraction of this package stores at most {most} numbers")
    return low


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
