"""Thalweg for PyTorch: a communication hook for DDP, optimizers, and training with few rounds.

- `state` and `hook`: `ddp.register_comm_hook(thalweg.torch.state(), thalweg.torch.hook)`.
- `DistributedOptimizer`: a PyTorch optimizer whose gradients are the mean over all workers.
- `ServerOptimizer`: an optimizer that runs in the service.
- `LocalSGD`, `DiLoCo`: workers that train by themselves and meet every so many steps.
"""

from ._ddp import State, hook, state
from ._distributed import DistributedOptimizer
from ._local import DiLoCo, LocalSGD
from ._server import ServerOptimizer

__all__ = ["DiLoCo", "DistributedOptimizer", "LocalSGD", "ServerOptimizer", "State", "hook", "state"]
