"""Run a torch network on arrays: what metrics and goldens take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ..model import OpenedModel, tensors_of

Predict = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def predictor(opened: OpenedModel, module: nn.Module, device: str = "cpu") -> Predict:
    """Return a function from named input arrays to named output arrays."""

    def predict(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = opened.outputs(module, tensors_of(inputs, device))
        return {k: v.cpu().numpy() for k, v in found.items()}

    return predict
