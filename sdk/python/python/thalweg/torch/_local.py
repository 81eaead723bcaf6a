"""Training with few rounds: workers train by themselves and meet every so many steps."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch

from .. import _session
from .._job import Job, job_name
from ..errors import BadInputError


class _Local:
    """Counts the steps of an optimizer while it is entered, and calls `synchronize` every `sync_every` of them."""

    def __init__(self, model: Any, optimizer: Any, sync_every: int) -> None:
        if sync_every < 1:
            raise BadInputError(f"sync_every={sync_every}: at least 1")
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise BadInputError("the model has no parameters that require a gradient")
        self._optimizer = optimizer
        self._sync_every = sync_every
        self._steps = 0
        self._step: Any = None
        self.job: Job

    def _open(self, name: str | None, suffix: str, options: dict[str, Any]) -> Job:
        session = _session._get()
        options = {"rank": session.rank, "workers": session.workers, **options}
        job = Job(job_name(name or f"{session.job}-{suffix}"), client=session.client, **options)
        session.leaving.append(job.leave)
        return job

    def _values(self) -> dict[str, Any]:
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def _write(self, values: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def synchronize(self) -> None:
        """A round with the other workers, now."""
        raise NotImplementedError

    @property
    def contributors(self) -> int:
        """How many workers the last round counted."""
        return self.job.contributors

    def __enter__(self) -> Any:
        step = self._optimizer.step

        def counted(*arguments: Any, **options: Any) -> Any:
            result = step(*arguments, **options)
            self._steps += 1
            if self._steps % self._sync_every == 0:
                self.synchronize()
            return result

        self._step = vars(self._optimizer).get("step")
        self._optimizer.step = counted
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._step is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._step
        self.job.leave()


class LocalSGD(_Local):
    """Every `sync_every` steps of its optimizer, parameters become their mean over all workers.

    `with LocalSGD(model, optimizer, sync_every=8): …` around a training loop as it is. Entered, all workers have the
    parameters that the first round gives; each sees other batches.

    Args:
        model: Its parameters that require a gradient take part, and not its buffers.
        optimizer: Its steps are counted.
        sync_every: Steps between rounds.
        name: Of the job. Default: that of `thalweg.init`, with `-local`.
        options: More of what `Job` takes.
    """

    def __init__(
        self, model: Any, optimizer: Any, sync_every: int, *, name: str | None = None, **options: Any
    ) -> None:
        super().__init__(model, optimizer, sync_every)
        self.job = self._open(name, "local", {**options, "like": self._values()})

    def synchronize(self) -> None:
        """Averages the parameters, now."""
        self._write(self.job.push_pull(self._values()))


class DiLoCo(_Local):
    """Distributed low-communication training: each worker takes `sync_every` steps with an optimizer of its own; then
    the mean of how far they have gone is a gradient for an outer optimizer, SGD with Nesterov momentum, which runs in
    the service (Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models").

    `with DiLoCo(model, inner_optimizer, sync_every=50): …` around a training loop as it is. The outer parameters and
    velocities are in the service: who joins later starts from them.

    Args:
        model: Its parameters that require a gradient take part, and not its buffers. They become the service's, which
            are rank 0's in a new job.
        inner_optimizer: Usually AdamW; keeps its state across rounds.
        sync_every: Steps between rounds, H in the paper.
        outer_lr, outer_momentum, nesterov: The outer optimizer's; the paper's by default.
        name: Of the job. Default: that of `thalweg.init`, with `-diloco`.
        options: More of what `Job` takes.
    """

    def __init__(
        self,
        model: Any,
        inner_optimizer: Any,
        sync_every: int,
        *,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, inner_optimizer, sync_every)
        settings = {"lr": outer_lr, "momentum": outer_momentum, "nesterov": nesterov}
        options = {**options, "function": "sgd", "settings": settings, "initial": self._values()}
        self.job = self._open(name, "diloco", options)
        self._outer = {key: torch.from_numpy(values) for key, values in self.job.parameters().items()}
        self._write(self._outer)

    def synchronize(self) -> None:
        """An outer step, now."""
        gone = {name: self._outer[name] - values.cpu() for name, values in self._values().items()}
        self._outer = self.job.push_pull(gone)
        self._write(self._outer)
