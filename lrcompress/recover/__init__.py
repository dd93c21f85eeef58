"""Win accuracy back: train adapters on a frozen, factorized network against what the original answers."""

from .training import Outcome, Settings, train

__all__ = ["Outcome", "Settings", "train"]
