"""Win accuracy back: train adapters or factors of a compressed network against what the original answers.

    training = Training(trained, Networks(student, teacher), objective, data, select, settings)
    outcome = training.run(lambda t: find_rate(t, 3e-3, descending=True))    # the parameters are in their best state now

The start is a candidate like any other: training never ends below it. One file per matter: `losses` and `objective`,
`order` (which samples a step sees), `teacher` (asked once), `schedule` and `rates`, `state` (exact resume), `world`
(several processes), `trained` (which parameters, in which gauge), `blocks` (hidden states, checkpointing).
"""

from .objective import Networks
from .settings import Outcome, Settings
from .state import Saved
from .trained import Trained
from .training import Training
from .world import World

__all__ = ["Networks", "Outcome", "Saved", "Settings", "Trained", "Training", "World"]
