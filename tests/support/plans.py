"""Layers to plan for, without a network around them, and a plan of theirs."""

from __future__ import annotations

from lrcompress.model.surgery import Layer
from lrcompress.plan import RankPlan, chosen, menus_of, ratio_budget, within
from tests.support.weights import weight

LAYERS = [
    Layer("a", "linear", weight((32, 48)).float()), Layer("b", "conv", weight((24, 16, 3, 3)).float()),
    Layer("c", "linear", weight((4, 4)).float()), Layer("d", "linear", weight((20, 30)).float(), "in --exclude"),
    Layer("g", "grouped", weight((2, 8, 4, 3, 3)).float()),
]  # fmt: skip


def plan_of(layers=LAYERS, ratio=0.6, method="auto"):
    menus = menus_of(layers, method, {})
    budget = ratio_budget(layers, ratio, 0)
    allocation = within(menus, budget)
    return RankPlan.of(
        menus, chosen(menus, allocation.chosen), allocation, budget, model_digest="f" * 64, method=method
    )
