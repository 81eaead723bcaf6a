"""A communication hook for `torch.nn.parallel.DistributedDataParallel`."""

from __future__ import annotations

from typing import Any

import torch

from .. import _session
from .._job import Job, job_name


class State:
    """What a model's hook keeps: a job for each bucket of gradients. DDP may cut its buckets anew after the first
    step; those are other jobs then."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self._name = name
        self._options = options
        self._jobs: dict[tuple[int, int], Job] = {}

    def _job(self, index: int, elements: int) -> Job:
        job = self._jobs.get((index, elements))
        if job is None:
            name = job_name(self._name, f"{index}-{elements}")
            job = self._jobs[index, elements] = Job(name, **self._options)
        return job

    @property
    def contributors(self) -> int:
        """The least number of workers that the last step counted in any of its buckets."""
        return min((job.contributors for job in self._jobs.values() if job.last_round), default=0)

    def leave(self) -> None:
        """Leaves its jobs."""
        for job in self._jobs.values():
            job.leave()


def state(name: str | None = None, **options: Any) -> State:
    """The state for `hook`.

    Args:
        name: First part of its jobs' names; another one for each model that is trained at once. Default: that of
            `thalweg.init`, with `-ddp`.
        options: What `Job` takes. Rank and number of workers are those of DDP's process group by default, as the
            function is `mean`: what DDP does itself.
    """
    session = _session._get()
    if torch.distributed.is_initialized():
        options.setdefault("rank", torch.distributed.get_rank())
        options.setdefault("workers", torch.distributed.get_world_size())
    options = {"rank": session.rank, "workers": session.workers, **options, "client": session.client}
    made = State(job_name(name or f"{session.job}-ddp"), options)
    session.leaving.append(made.leave)
    return made


def hook(state: State, bucket: Any) -> Any:
    """Averages a bucket through Thalweg: `ddp.register_comm_hook(thalweg.torch.state(), thalweg.torch.hook)`.

    The bucket is copied into messages before this returns, and travels while the backward pass goes on.
    """
    buffer = bucket.buffer()
    future = torch.futures.Future()
    job = state._job(bucket.index(), buffer.numel())
    handle = job.push_pull_async(buffer)

    def done() -> None:
        try:
            result = handle.wait()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result if result.device == buffer.device else result.to(buffer.device))

    job._when_complete(done)
    return future


# DDP checks these annotations where there are any, and wants its own types.
hook.__annotations__ = {"state": object, "bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]}
