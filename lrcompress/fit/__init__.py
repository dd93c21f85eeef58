"""Fit a plan to a network by what is measured on it: how much a layer's error matters, which swaps pay, what drifts.

bench = Bench(Judge(opened, network, batches), network, menus, statistics)
factors, measured = sensitivities(bench)                    # one measured point a layer
menus = calibrated(menus, factors)                          # losses of the answer
found = search(bench, menus, allocation, limit, "params")   # swaps that pay on the whole network
fitted = apply_in_depth(opened, network, copy, layers, choices, statistics, data)
"""

from ._moments import JointMoments
from .depth import Fitted, apply_in_depth, fitting_layers
from .judge import Judge, read_batches
from .norms import reestimated
from .tuning import Bench, calibrated, jointly, search, sensitivities

__all__ = [
    "Bench", "Fitted", "JointMoments", "Judge", "apply_in_depth", "calibrated", "fitting_layers", "jointly", "read_batches", "reestimated",
    "search", "sensitivities",
]  # fmt: skip
