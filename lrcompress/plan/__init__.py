"""Which layer takes which form and rank.

menus = menus_of(layers, "auto", statistics)                # options: what each layer can become
allocation = within(menus, budget)                          # allocation: which option each takes
plan = RankPlan.of(menus, chosen(menus, allocation.chosen), allocation, budget, model_digest=…, method="auto")
"""

from .allocation import Allocation, allocate
from .options import Menu, Option
from .rankplan import RankPlan, check_plan, read_bits, read_blocks, read_plan, write_plan
from .selection import Budget, Choice, chosen, menus_of, ratio_budget, select, within

__all__ = [
    "Allocation", "Budget", "Choice", "Menu", "Option", "RankPlan", "allocate", "check_plan", "chosen", "menus_of",
    "ratio_budget", "read_bits", "read_blocks", "read_plan", "select", "within", "write_plan",
]  # fmt: skip
