"""Spread a teacher that one process cannot hold over all of them: each keeps a part of every weight.

Weights are gathered block by block while the network answers, and let go behind it (FSDP2). All processes must ask
together; what they ask may differ.
"""

from __future__ import annotations

from torch import nn

from ..errors import CommandError
from .blocks import blocks_of
from .world import World


def shard(module: nn.Module, world: World) -> None:
    """Spread the weights of `module` over the processes, in place. `CommandError` where there is one process only."""
    if world.size == 1:
        raise CommandError(
            "lrcompress recover --shard-teacher", "more than one process", "1",
            "start them with: torchrun --nproc_per_node N -m lrcompress recover …",
        )  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.partition(":")[0], (world.size,))
    for name in blocks_of(module):
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)
