"""Thalweg for Python: gradients in, what the aggregation function makes of them out.

>>> import numpy, thalweg
>>> with thalweg.up():
...     thalweg.init(job="example")
...     thalweg.push_pull(numpy.ones(3, numpy.float32))
array([1., 1., 1.], dtype=float32)
"""

from . import errors
from ._job import Group, Handle, Job, Round
from ._native import __version__
from ._service import up
from ._session import (
    broadcast_object,
    broadcast_parameters,
    connect,
    default_job,
    delete,
    init,
    jobs,
    poll,
    push_pull,
    push_pull_async,
    rank,
    restore,
    shutdown,
    size,
    synchronize,
)
from .errors import ThalwegError

__all__ = [
    "Group",
    "Handle",
    "Job",
    "Round",
    "ThalwegError",
    "__version__",
    "broadcast_object",
    "broadcast_parameters",
    "connect",
    "default_job",
    "delete",
    "errors",
    "init",
    "jobs",
    "poll",
    "push_pull",
    "push_pull_async",
    "rank",
    "restore",
    "shutdown",
    "size",
    "synchronize",
    "up",
]
