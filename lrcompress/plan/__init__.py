"""Which layer takes which form and rank."""

from .selection import Choice, read_plan, select

__all__ = ["Choice", "read_plan", "select"]
