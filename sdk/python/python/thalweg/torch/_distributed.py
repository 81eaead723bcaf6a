"""A PyTorch optimizer whose gradients are those of all workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

from .. import _session
from .._job import Job, job_name
from .._tree import Ordered
from ..errors import BadInputError, MissingGradientError
from ._elastic import Elastic
from ._gradients import Gradients, name_parameters, pull_into

#: A tensor beside the gradients: 1 for each parameter that this worker has a gradient for.
_PRESENT = "thalweg.present"


class _Distributed:
    """What `DistributedOptimizer` puts before the class of the optimizer it is given."""

    _job: Job
    _parameters: dict[str, Any]
    _gradients: Gradients
    _synchronized: bool
    _skipping: bool
    _elastic: Elastic | None

    @property
    def job(self) -> Job:
        """The job that the gradients go through."""
        return self._job

    @property
    def contributors(self) -> int:
        """How many workers the last step counted."""
        return self._job.contributors

    def synchronize(self) -> None:
        """Waits until `grad` of every parameter is that of all workers: for what looks at gradients before `step`, as
        clipping by the global norm does, or GradScaler's `unscale_`. `step` does not repeat it, and need not follow: the
        next backward pass begins another round.

        Raises:
            MissingGradientError: some workers have a gradient for a parameter and others have none.
        """
        if self._synchronized:
            return
        if self._elastic is not None:
            # The step before was given up.
            self._elastic.welcome(self)
        # The last one is for the worker itself: who has just arrived pushes zeros.
        present = numpy.ones(len(self._parameters) + 1, numpy.float32)
        places = {name: place for place, name in enumerate(self._parameters)}
        for name, parameter in list(self._gradients.rest()):
            if parameter.grad is None:
                present[places[name]] = 0
                self._gradients.push(name, torch.zeros_like(parameter))
            else:
                # Accumulated under no_sync alone, or in fewer passes than there should be.
                self._gradients.push(name, parameter.grad)
        self._job.push(_PRESENT, present)
        round = self._job.finish()
        if self._elastic is not None:
            self._elastic.note(round)
        self._job.pull(_PRESENT, present)
        shares = present[:-1] / present[-1]
        for (name, parameter), share in zip(self._parameters.items(), shares, strict=True):
            if share == 0:
                continue
            if share != 1:
                self._gradients.begin()
                raise MissingGradientError(
                    f"{int(share * round.contributors + 0.5)} of {round.contributors} workers have a gradient for "
                    f"{name}: let it take part in the loss on all of them or on none, or set requires_grad to False"
                )
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            pull_into(self._job, name, parameter.grad)
            if self._job.spec.function == "mean" and present[-1] != 1:
                # The mean over those that had gradients at all.
                parameter.grad /= float(present[-1])
        self._gradients.begin()
        self._synchronized = True

    def step(self, closure: Any = None) -> Any:
        """As the optimizer's own, after `synchronize`. A closure is called by every worker alike."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._skipping:
            self.synchronize()
        self._synchronized = False
        super().step()  # type: ignore[misc]
        if self._elastic is not None:
            self._elastic.welcome(self)
        return None if closure is None else loss

    def no_sync(self) -> Any:
        """Backward passes in it only accumulate, as that of DDP; the next one outside pushes the sum."""
        return self._gradients.no_sync()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """`step` in it takes the gradients as they are. Not needed after `synchronize`; Horovod's loops have it."""
        self._skipping = True
        try:
            yield
        finally:
            self._skipping = False

    def leave(self) -> None:
        """Leaves the job, and takes the hooks off the parameters."""
        self._gradients.close()
        self._job.leave()


def DistributedOptimizer(
    optimizer: Any,
    named_parameters: Any = None,
    backward_passes_per_step: int = 1,
    *,
    name: str | None = None,
    function: str = "mean",
    elastic: bool = False,
    **options: Any,
) -> Any:
    """An optimizer of the same class, with the same parameters and state, whose gradients are those of all workers.

    A gradient is pushed as soon as the backward pass has computed it, and travels while the others are computed.
    NaN and infinities reach every worker, so that all skip a step together, as with GradScaler.

    Args:
        optimizer: Of PyTorch; do not use it by itself afterwards.
        named_parameters: `model.named_parameters()`. Without it parameters are called by their place in the groups.
        backward_passes_per_step: Gradients are summed over so many backward passes before they are pushed.
        name: Of the job. Default: that of `thalweg.init`, with `-gradients`.
        function: `mean` or `sum`.
        elastic: Workers may join later: they are given the parameters, the optimizer's state and its settings by a
            member, at the end of a step in which all wait for that. (This job keeps none of it; with
            `ServerOptimizer` the service does.) Buffers of the model are not part of it. All workers say the same.
        options: More of what `Job` takes.

    Joins the job, so it waits for the other workers.

    Raises:
        ThalwegError: it joins later, and nobody has parameters for it.
    """
    if function not in ("mean", "sum"):
        raise BadInputError(f"function={function!r}: gradients are put together by 'mean' or 'sum'")
    if "step" in vars(optimizer):
        raise BadInputError("a scheduler has wrapped this optimizer already: make it after DistributedOptimizer")
    session = _session._get()
    parameters = name_parameters(optimizer.param_groups, named_parameters)
    # In the order in which the backward pass comes to them, so that the first messages are full early.
    like = Ordered((key, parameters[key]) for key in reversed(parameters))
    like[_PRESENT] = numpy.zeros(len(parameters) + 1, numpy.float32)
    job = Job(
        job_name(name or f"{session.job}-gradients"),
        client=session.client,
        like=like,
        function=function,
        **{"rank": session.rank, "workers": session.workers, **options},
    )
    session.leaving.append(job.leave)
    kind = type(optimizer)
    wrapped = type(kind.__name__, (_Distributed, kind), {})
    optimizer.__class__ = wrapped
    optimizer._job = job
    optimizer._parameters = parameters
    optimizer._synchronized = False
    optimizer._skipping = False
    optimizer._elastic = Elastic(job, session.client, parameters) if elastic else None
    if optimizer._elastic is not None:
        optimizer._elastic.arrive(optimizer)

    def push(key: str, gradient: Any) -> None:
        # Also after gradients that were synchronized and then given up, because they were not finite, say.
        optimizer._synchronized = False
        job.push(key, gradient)

    optimizer._gradients = Gradients(parameters, push, backward_passes_per_step)
    return optimizer
