"""Independent work on layers: here, in local processes or on a cluster; what is done is kept, whatever happens next.

    with pool(workers=4) as where, Store.open(dest, command) as store:
        for key, found in run(jobs, store=store, pool=where, threads=2):
            ...                                   # in the order of the jobs
        store.remove()                            # the output is complete

A job is a pure function of its weight, its form and rank, its statistics and a number of threads, and its key is the
hash of them all. So the same jobs give the same bytes wherever they run, and a result that is in the store need not be
computed again: a killed run loses what was being computed at that moment. Nothing in a store is trusted: an entry that
does not have the hash it was written with is computed anew.
"""

from __future__ import annotations

from .jobs import Curve, CurveJob, Job
from .pools import Pool, pool
from .running import run
from .store import Store

__all__ = ["Curve", "CurveJob", "Job", "Pool", "Store", "pool", "run"]
