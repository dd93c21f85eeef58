"""Which of the states of a run is kept: what `select` cannot tell apart, the falling rate does.

A score on few samples counts the hits of a state that happens to suit them. The best of twelve such counts is high by
luck as much as by merit, while the later states of a rate that falls to zero are those that have settled. So a later state
takes the place of the best one unless it is clearly worse, by its score or by its loss, sample by sample. Where the loss
alone decides, its least is taken: a loss does not jump.

IMDB's reviews, a hundred to select on, core at 16 kB: the state of the highest accuracy, 0.83, has 0.780 on 250 others, and
the last one, 0.78, has 0.800.
"""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

#: Standard errors of a paired difference beyond which it is no chance.
CLEARLY = 2.0
#: Numbers per held-out sample by what they are, `score` and `loss`; empty where the loss alone decides.
Seen = dict[str, Tensor]


class Score(Protocol):
    """A measure of few samples, and therefore in doubt. `numbers`: those of the last one, per sample."""

    numbers: Tensor

    def decide(self) -> float:
        """Return the score of the network as it is, lower is better."""

    def clearly_worse(self, numbers: Tensor, best: Tensor) -> bool:
        """Tell whether the first numbers are worse than the second beyond what chance explains."""


def clearly_worse(by: str, now: Seen, best: Seen, score: Score | None) -> bool:
    """Tell whether a state is clearly worse than the best that was seen; where nothing leaves a doubt, it is."""
    if score is None or by not in now or by not in best:
        return True
    return score.clearly_worse(now[by], best[by]) if by == "score" else clearly_more(now[by], best[by])


def clearly_more(losses: Tensor, others: Tensor) -> bool:
    """Tell whether losses (samples,) are more than others of the same samples; those that are no numbers are."""
    difference = losses - others
    stderr = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return not float(difference.mean()) <= CLEARLY * stderr
