"""Giving a worker that joins later what the others have: parameters, the optimizer's state, its settings.

The round in which somebody counts for the first time tells all workers alike that there is somebody new, and who
(`Job.counted`). After the step of that round all of them meet in a job made for it alone, by its number: the member of
the lowest rank contributes, the others add nothing. What has no tensor goes first, as JSON, with the shapes of the
rest.
"""

from __future__ import annotations

import json
from typing import Any

import numpy
import torch

from .. import _native
from .._job import Job, Round, job_name
from .._session import OBJECT_BYTES, _carried
from .._tree import Ordered
from ..errors import BadInputError, ThalwegError

#: Longest wait for all workers to meet, seconds.
PATIENCE = 60.0


class Elastic:
    """One worker's part in that.

    Args:
        job: The job of the gradients.
        client: For the jobs in which all meet.
        parameters: By name, in an order that all workers agree on.
    """

    def __init__(self, job: Job, client: _native.Client, parameters: dict[str, Any]) -> None:
        self._job = job
        self._client = client
        self._parameters = parameters
        self._known: set[int] = set()
        # Round with new workers, and whether this worker is the one that gives.
        self._owed: tuple[int, bool] | None = None
        # Now, and not when somebody joins, if the name leaves no room for those of the meetings.
        job_name(job.name, f"{10**12}-state")

    def arrive(self, optimizer: Any) -> None:
        """As a worker that joins later: takes part in one round with nothing but zeros, and gets everything."""
        if self._job._joined().round() == 1:
            return
        # No void: those are not counted, so nobody would learn of it.
        handle = self._job.push_pull_async(
            Ordered((name, numpy.zeros(shape, numpy.float32)) for name, shape in self._job.tensors.items())
        )
        number = handle.round.number
        self._known = set(self._job.counted())
        self._meet(optimizer, number, gives=False, arrives=True)

    def note(self, round: Round) -> None:
        """As a member, after each round: who is in it."""
        counted = set(self._job.counted())
        new, known, self._known = counted - self._known, counted & self._known, counted
        if new and known:
            self._owed = (round.number, self._job.rank == min(known))

    def welcome(self, optimizer: Any) -> None:
        """As a member, when the step of that round was taken, or given up: gives everything to those that are new in
        it, if there are any."""
        if self._owed is not None:
            (number, gives), self._owed = self._owed, None
            self._meet(optimizer, number, gives, arrives=False)

    def _meet(self, optimizer: Any, number: int, gives: bool, arrives: bool) -> None:
        described, tensors = self._describe(optimizer)
        text = json.dumps(described).encode() if gives else b""
        if len(text) > OBJECT_BYTES:
            raise BadInputError(f"the optimizer's state has {len(text)} bytes beside its tensors, over {OBJECT_BYTES}")
        carried, back = _carried("text", numpy.frombuffer(text.ljust(OBJECT_BYTES), numpy.uint8))
        got = self._round(f"{number}-text", Ordered(text=carried), gives)
        text = back(numpy.asarray(got["text"])).tobytes().strip(b" \0")
        if not text:
            raise ThalwegError(
                f"job {self._job.name!r} is in round {number}, but none of its workers has parameters for one that "
                "joins: start all of them under another name, or remove the job (thalweg.delete)"
            )
        described = json.loads(text)
        if not gives:
            # What this worker has itself says nothing about how the state of the others looks.
            tensors = Ordered((key, torch.zeros(shape)) for key, shape in described["tensors"].items())
        got = self._round(f"{number}-state", tensors, gives)
        if arrives:
            self._take(optimizer, described, got)

    def _round(self, suffix: str, tensors: Ordered, gives: bool) -> dict[str, Any]:
        """One round of all in a job of its own, which goes when all have left it."""
        name = job_name(self._job.name, suffix)
        workers = len(self._known)
        with Job(
            name, client=self._client, rank=self._job.rank, workers=workers, function="sum", like=tensors, timeout=PATIENCE
        ) as job:
            handle = job.push_pull_async(tensors) if gives else job.skip()
            result: dict[str, Any] = handle.wait(PATIENCE)
            return result

    def _describe(self, optimizer: Any) -> tuple[dict[str, Any], Ordered]:
        """What goes as JSON, and tensors by name."""
        tensors = Ordered((f"parameter/{name}", p.detach()) for name, p in self._parameters.items())
        others: dict[str, dict[str, Any]] = {}
        for name, parameter in self._parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{key}/{name}"] = value.float()
                else:
                    others.setdefault(name, {})[key] = value
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        shapes = {key: list(value.shape) for key, value in tensors.items()}
        return {"groups": groups, "others": others, "tensors": shapes}, tensors

    def _take(self, optimizer: Any, described: dict[str, Any], got: dict[str, Any]) -> None:
        with torch.no_grad():
            for key, values in got.items():
                kind, _, name = key.partition("/")
                parameter = self._parameters[name]
                value = torch.as_tensor(values).clone()
                if kind == "parameter":
                    parameter.copy_(value)
                else:
                    optimizer.state[parameter][kind] = value
        for name, state in described["others"].items():
            optimizer.state[self._parameters[name]].update(state)
        for group, settings in zip(optimizer.param_groups, described["groups"], strict=True):
            group.update(settings)
