"""One pass over calibration data: the moments of every layer's input, and of the gradient at its output.

Inputs: centred covariance and mean, merged batch by batch so that no digits cancel; padding positions are left out;
layers that read the same tensor share one accumulator, and a layer that is used twice has the moments of both uses.
Outputs: the Gram matrix of gradients of a loss of the answer (`gradients`), which tells how much the answer feels an
error at that layer. What is read comes from a `LayerView`: modules, a program or an ONNX graph.

    statistics = collect(opened, module, data, layers, cache=Cache.usual())
    statistics = measure(OnnxView("model.onnx"), data, layers)
    form("svd").decompose(layer.weight, 16, statistics[layer.name])

With a cache the same question is answered from disk, a pass that was killed goes on where its last checkpoint was, and
both give the bytes of an unbroken pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from ..data import Data
from ..errors import LrcompressWarning
from ..factorize import Statistics
from ..model import OpenedModel
from ..model.surgery import Layer
from ..model.views import LayerView, patches, view_of
from ..progress import Progress, Silent
from .cache import Cache
from .collected import Collected
from .gradients import LOSSES, telling_output
from .moments import Moments
from .running import MAX_OUTPUTS, Pass, Settings
from .stored import is_statistics, read_statistics, write_statistics


def collect(
    opened: OpenedModel,
    module: nn.Module,
    data: Data,
    layers: Sequence[Layer],
    *,
    batch_size: int | None = None,
    gradient_samples: int = 512,
    loss: str = "logits",
    seed: int = 0,
    compute: str = "cpu",
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of `layers` of a module, from `cache` where they are there; the rest is as in `measure`."""
    settings = Settings(batch_size, gradient_samples, loss, seed, compute)
    work = Pass(view_of(opened, module), data, layers, settings)
    if cache is None:
        found = work.run(Collected(), progress or Silent())
    else:
        found = cache.answer(work, opened, module, progress or Silent())
    return _noted(layers, found)


def measure(
    view: LayerView,
    data: Data,
    layers: Sequence[Layer],
    *,
    batch_size: int | None = None,
    gradient_samples: int = 512,
    loss: str = "logits",
    seed: int = 0,
    compute: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Statistics]:
    """Return the statistics of `layers`; `gradient_samples` of the data also serve the output side (0: none).

    `loss`: what the answer feels, one of `LOSSES`. `batch_size`: by memory unless given. Layers that read one input
    share its `gram` and `mean` as one tensor. A view that is not differentiable gives input moments only.
    Raises `DataError` for data that give no position, that the network cannot run, or that are not finite, and
    `ModelError` for a layer that is not the view's. Warns of layers that the data never reached.
    """
    work = Pass(view, data, layers, Settings(batch_size, gradient_samples, loss, seed, compute))
    return _noted(layers, work.run(Collected(), progress or Silent()))


def _noted(layers: Sequence[Layer], found: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Warn of layers without a single position."""
    missed = [layer.name for layer in layers if not found[layer.name].count]
    if missed:
        shown = ", ".join(missed[:4]) + (f" and {len(missed) - 4} more" if len(missed) > 4 else "")
        note = (
            f"the calibration data never reach {shown}: they are judged by their weights alone; give data that use them"
        )
        warnings.warn(note, LrcompressWarning, stacklevel=3)
    return dict(found)


__all__ = [
    "LOSSES", "MAX_OUTPUTS", "Cache", "Moments", "collect", "is_statistics", "measure", "patches",
    "read_statistics", "telling_output", "write_statistics",
]  # fmt: skip
