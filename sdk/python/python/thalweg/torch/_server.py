"""An optimizer that runs in the service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import _session
from .._job import Group, Job, job_name
from .._tree import Ordered
from ..errors import BadInputError, MissingGradientError
from ._gradients import Gradients, name_parameters, pull_into


def _settings(group: Mapping[str, Any]) -> dict[str, float | bool]:
    return {key: value for key, value in group.items() if key != "params"}


class ServerOptimizer(torch.optim.Optimizer):  # type: ignore[misc]
    """Pushes gradients and pulls parameters; the step itself is the service's, once for all workers.

    Gradients travel while the backward pass goes on. The optimizer's state is in the service, and stays there when
    workers come and go: who joins later starts from the service's parameters.

    Args:
        params: Parameters, or groups of them, as any optimizer of PyTorch takes them. Groups may have settings of their
            own, and none that the function does not know.
        function: `sgd`, `adam`, `adamw`, `adagrad` or `lion`.
        named_parameters: `model.named_parameters()`. Without it parameters are called by their place in the groups.
        backward_passes_per_step: Gradients are summed over so many backward passes before they are pushed.
        name: Of the job. Default: that of `thalweg.init`, with `-model`.
        schedule: How `lr` changes from round to round, counted by the service.
        job_options: More of what `Job` takes.
        settings: Those of the function: `lr=1e-3`.

    Joins the job, so it waits for the other workers; then the parameters are those of the service (rank 0's, in a new
    job). A parameter without a gradient in a step is an error, `MissingGradientError`, before anything of the round
    is complete: set `requires_grad` to False for what is not trained.

    Settings that are changed in `param_groups` are sent by the worker of rank 0 at its next step, and are in force from
    the first round that nobody can have begun then.
    """

    def __init__(
        self,
        params: Any,
        function: str = "adamw",
        named_parameters: Any = None,
        backward_passes_per_step: int = 1,
        *,
        name: str | None = None,
        schedule: Mapping[str, Any] | None = None,
        job_options: Mapping[str, Any] | None = None,
        **settings: float | bool,
    ) -> None:
        super().__init__(params, settings)
        session = _session._get()
        self._parameters = name_parameters(self.param_groups, named_parameters)
        self._sent = [_settings(group) for group in self.param_groups]
        initial = Ordered((key, self._parameters[key]) for key in reversed(self._parameters))
        places = {parameter: key for key, parameter in self._parameters.items()}
        groups = [
            Group([places[p] for p in group["params"] if p in places], _settings(group))
            for group in self.param_groups
            if len(self.param_groups) > 1
        ]
        if any(not group.tensors for group in groups):
            raise BadInputError("a group of parameters has none that requires a gradient: leave it out")
        options = {"rank": session.rank, "workers": session.workers, **(job_options or {})}
        self.job = Job(
            job_name(name or f"{session.job}-model"),
            client=session.client,
            function=function,
            settings=_settings(self.param_groups[0]) if len(self.param_groups) == 1 else dict(settings),
            groups=groups,
            schedule=schedule,
            initial=initial,
            **options,
        )
        session.leaving.append(self.job.leave)
        self._load()
        self._gradients = Gradients(self._parameters, self.job.push, backward_passes_per_step)

    def _load(self) -> None:
        """Before the first push: the parameters of the service."""
        with torch.no_grad():
            for key, values in self.job.parameters().items():
                self._parameters[key].copy_(torch.from_numpy(values))

    @property
    def contributors(self) -> int:
        """How many workers the last step counted."""
        return self.job.contributors

    def step(self, closure: Any = None) -> Any:
        """Waits for the round; the parameters are those that the service made of all workers' gradients then.

        Raises:
            MissingGradientError: this worker has no gradient for some parameter. Run another backward pass that has.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._send_settings()
        missing = [key for key, parameter in self._gradients.rest() if parameter.grad is None]
        if missing:
            raise MissingGradientError(
                f"no gradient for {', '.join(missing[:8])}: let it take part in the loss, or set requires_grad to False"
            )
        for key, parameter in list(self._gradients.rest()):
            self._gradients.push(key, parameter.grad)
        self.job.finish()
        for key, parameter in self._parameters.items():
            pull_into(self.job, key, parameter.data)
        self._gradients.begin()
        return loss

    def _send_settings(self) -> None:
        for index, group in enumerate(self.param_groups):
            changed = {key: value for key, value in _settings(group).items() if self._sent[index].get(key) != value}
            if not changed:
                continue
            if self.job.rank == 0:
                if len(self.param_groups) > 1:
                    self.job.set_group(index, changed)
                else:
                    self.job.set(changed)
            self._sent[index] = _settings(group)

    def no_sync(self) -> Any:
        """Backward passes in it only accumulate; the next one outside pushes the sum."""
        return self._gradients.no_sync()

    def state_dict(self) -> dict[str, Any]:
        """Which job has the state, how far it is, and the settings. The state itself is in the service:
        `optimizer.job.snapshot(path)` writes it, and `thalweg.restore(path)` brings it back, to resume from."""
        last = self.job.last_round
        return {
            "job": self.job.name,
            "round": last.number if last else 0,
            "param_groups": [_settings(group) for group in self.param_groups],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the settings over. Parameters and state are the service's already: they were read when this was made,
        from the job as it goes on or as it was restored."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise BadInputError(f"{len(groups)} groups of parameters in the state, {len(self.param_groups)} here")
        for group, settings in zip(self.param_groups, groups, strict=True):
            group.update(settings)

    def leave(self) -> None:
        """Leaves the job, and takes the hooks off the parameters."""
        self._gradients.close()
        self.job.leave()
