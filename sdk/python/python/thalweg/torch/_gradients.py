"""Pushing gradients while the backward pass computes the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._job import Job
from ..errors import BadInputError, ThalwegError


def name_parameters(groups: list[dict[str, Any]], named: Any) -> dict[str, Any]:
    """The parameters of an optimizer's groups that require a gradient, by name.

    Without names they are called by their place: `0.3` is the fourth of the first group.
    """
    names = {} if named is None else {parameter: name for name, parameter in named}
    found: dict[str, Any] = {}
    for index, group in enumerate(groups):
        for place, parameter in enumerate(group["params"]):
            if not parameter.requires_grad:
                continue
            name = names.get(parameter, f"{index}.{place}")
            if named is not None and parameter not in names:
                raise BadInputError(
                    f"named_parameters lacks parameter {place} of group {index}: pass model.named_parameters()"
                )
            found[name] = parameter
    if not found:
        raise BadInputError("the optimizer has no parameters that require a gradient")
    return found


class Gradients:
    """Calls `push` for each parameter as soon as its gradient is complete: accumulated over `passes` backward passes.

    Args:
        parameters: By name.
        push: Called with a name and a gradient.
        passes: Backward passes per step.
    """

    def __init__(self, parameters: dict[str, Any], push: Callable[[str, Any], None], passes: int) -> None:
        if passes < 1:
            raise BadInputError(f"backward_passes_per_step={passes}: at least one is needed for a gradient")
        self._parameters = parameters
        self._push = push
        self._passes = passes
        self._missing = dict.fromkeys(parameters, passes)
        self._syncing = True
        #: Names of the parameters that were pushed in this step.
        self.pushed: set[str] = set()
        self._hooks = [_when_accumulated(p, self._hook(name, p)) for name, p in parameters.items()]

    def _hook(self, name: str, parameter: Any) -> Callable[[], None]:
        def accumulated() -> None:
            if not self._syncing:
                return
            self._missing[name] -= 1
            if self._missing[name] > 0:
                return
            if name in self.pushed:
                raise ThalwegError(
                    f"the gradient of {name} was computed again before step(): for gradients over several backward "
                    "passes give backward_passes_per_step=, or run all but the last under no_sync()"
                )
            self.push(name, parameter.grad)

        return accumulated

    def push(self, name: str, gradient: Any) -> None:
        """Pushes a gradient for this step."""
        self._push(name, gradient)
        self.pushed.add(name)

    def rest(self) -> Iterator[tuple[str, Any]]:
        """Parameters that were not pushed yet."""
        for name, parameter in self._parameters.items():
            if name not in self.pushed:
                yield name, parameter

    def begin(self) -> None:
        """Begins the next step."""
        self.pushed.clear()
        self._missing = dict.fromkeys(self._parameters, self._passes)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in it only accumulate."""
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()


class _AccumulateHook:
    """A hook on the node of the graph that accumulates a gradient, for PyTorch before 2.1."""

    def __init__(self, parameter: Any, call: Callable[[], None]) -> None:
        # The node lives only as long as somebody holds it.
        self._node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        self._hook = self._node.register_hook(lambda *_: call())

    def remove(self) -> None:
        self._hook.remove()
        self._node = None


def _when_accumulated(parameter: Any, call: Callable[[], None]) -> Any:
    if hasattr(parameter, "register_post_accumulate_grad_hook"):
        return parameter.register_post_accumulate_grad_hook(lambda _: call())
    with torch.enable_grad():
        return _AccumulateHook(parameter, call)


def pull_into(job: Job, name: str, target: Any) -> None:
    """Copies a result into a tensor, wherever that is."""
    if target.device.type == "cpu" and target.is_contiguous():
        job.pull(name, target.detach())
        return
    result = torch.empty(target.shape, dtype=target.dtype, pin_memory=target.device.type == "cuda")
    job.pull(name, result)
    with torch.no_grad():
        target.copy_(result)
