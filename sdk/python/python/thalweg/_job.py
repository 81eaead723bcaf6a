"""Jobs: pushing trees of tensors, and pulling what the service made of them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy

from . import _log, _native, _tree
from ._arrays import Array, Leaf, leaf
from ._progress import bar
from .errors import (
    BadInputError,
    ForkedError,
    LeftError,
    RefusedError,
    ShapeError,
    TimedOutError,
    UnknownTensorError,
)

Settings = Mapping[str, float | bool]
Tree = Any

#: Functions that keep nothing; the others keep parameters, which rank 0 gives.
REDUCTIONS = ("sum", "mean", "weighted_mean")
#: Longest wait for everything that joining needs, seconds.
JOIN_TIMEOUT = 300.0


@dataclass(frozen=True)
class Round:
    """A finished round."""

    #: Its number. It only ever grows.
    number: int
    #: Contributions counted: the least over all shards.
    contributors: int
    #: Whether this worker's contribution was counted in all shards.
    counted: bool
    #: Others closed rounds without this worker; the tensors are those of the newest one.
    superseded: bool
    #: Whether somebody has joined or left since this worker's round before.
    roster_changed: bool
    #: Number of the settings it was folded with; 0 for those of the job's creation.
    settings_revision: int
    #: Why this worker's contribution was taken as void, if somebody said so.
    advice: str | None


@dataclass(frozen=True)
class Group:
    """Settings that differ for some tensors of a job."""

    tensors: Sequence[str]
    settings: Settings


@dataclass(frozen=True)
class Spec:
    """What a job is; all of its workers say the same."""

    name: str
    tenant: str = "default"
    function: str = "mean"
    settings: Settings = field(default_factory=dict)
    groups: Sequence[Group] = ()
    schedule: Mapping[str, Any] | None = None
    workers: int = 1
    quorum: tuple[int, float] | None = None
    durability: Literal["process", "disk"] | None = None
    non_finite: Literal["propagate", "void", "fail"] | None = None
    order: Literal["rank", "arrival"] | None = None
    on_loss: str | None = None
    shard_bytes: int | None = None
    time_to_live: float | None = None

    def json(self, tensors: Mapping[str, tuple[int, ...]]) -> str:
        """As the native module reads it."""
        function: dict[str, Any] = {
            "name": self.function,
            "settings": dict(self.settings),
            "groups": [{"tensors": list(g.tensors), "settings": dict(g.settings)} for g in self.groups],
        }
        if self.schedule is not None:
            function["schedule"] = self.schedule
        others = ("tenant", "name", "workers", "quorum", "durability", "non_finite", "order", "on_loss")
        described = {key: getattr(self, key) for key in (*others, "shard_bytes", "time_to_live")}
        return json.dumps({**described, "function": function, "tensors": [[n, list(s)] for n, s in tensors.items()]})


def job_name(*parts: str) -> str:
    """A name that a job may have, from whatever there is: 1 to 64 of `a-z 0-9 - _`."""
    name = re.sub(r"[^a-z0-9_-]+", "-", "-".join(parts).lower()).strip("-")
    if not 1 <= len(name) <= 64:
        raise BadInputError(f"{'-'.join(parts)!r} makes no job's name of 1 to 64 of a-z 0-9 - _: choose another one")
    return name


class Handle:
    """A round under way: what `push_pull_async` gives. Await it, or call `wait`."""

    def __init__(self, job: Job, tree: Tree, tensors: dict[str, Leaf]) -> None:
        self._job = job
        self._tree = tree
        self._tensors = tensors
        self._result: Tree = None
        self._error: BaseException | None = None
        self._round: Round | None = None
        self._done = False

    def poll(self) -> bool:
        """Whether the result is there (or an error), so that `wait` returns at once. Does not wait."""
        return self._done or self._job._poll()

    def wait(self, timeout: float | None = None) -> Tree:
        """The result, in the form of the tree that was pushed.

        Raises:
            TimedOutError: it is not there after `timeout` seconds; the round stays pushed, wait again.
            RefusedError: the job is over, or this worker has lost its rank.
        """
        self._job._settle(self, timeout)
        if self._error is not None:
            raise self._error
        return self._result

    synchronize = wait

    @property
    def round(self) -> Round:
        """The round that gave the result; waits for it."""
        self.wait()
        assert self._round is not None
        return self._round

    def __await__(self) -> Generator[Any, None, Tree]:
        return self._wait_in_loop().__await__()

    async def _wait_in_loop(self) -> Tree:
        if not self._done:
            loop = asyncio.get_running_loop()
            complete = loop.create_future()

            def tell() -> None:
                if not complete.done():
                    complete.set_result(None)

            def wake() -> None:
                # A loop that was closed meanwhile has nobody waiting in it.
                if not loop.is_closed():
                    loop.call_soon_threadsafe(tell)

            self._job._when_complete(wake)
            await complete
        return self.wait()


class Job:
    """This worker's part in one job: a set of named tensors that all its workers push round by round.

    The tensors are those of the first tree that is pushed, or of `like`, or of `initial`; they keep names and shapes.
    Joining waits until `workers` workers are there (the first time: a job outlives its workers, and who joins later
    takes part from the next round on).

    Args:
        name: 1 to 64 of `a-z 0-9 - _`.
        client: A connection; by default the one of `thalweg.init`, which is called if it was not.
        rank: This worker's rank, each rank once. Default: the variable `RANK`, else 0.
        workers: How many workers the first round waits for. Default: the variable `WORLD_SIZE`, else 1.
        function: `sum`, `mean`, `weighted_mean`, or an optimizer that then runs in the service: `sgd`, `adam`,
            `adamw`, `adagrad`, `lion`.
        settings, groups, schedule: Those of the function: `{"lr": 0.1}`.
        like: A tree of tensors to take names and shapes from.
        initial: A tree of the parameters that an optimizer starts with; those of rank 0 count, and only where the job
            has none yet.
        quorum: (contributions, seconds): a round is closed with that many once so long has passed.
        durability: `"process"` (default) or `"disk"`: what a result has survived when a worker sees it.
        non_finite: `"propagate"`, `"void"` or `"fail"`: what becomes of a contribution with NaN or infinity.
            Default: `"propagate"` for reductions, `"void"` for optimizers.
        worker_id: Stable id of this worker; started again with it, a worker takes its rank back at once.
        time_to_live: Seconds without workers after which the service forgets the job. Default: never for optimizers,
            an hour for reductions.
        timeout: Longest wait of joining, seconds.
        on_roster_change: Called with (contributors, round) when somebody has joined or left.
    """

    def __init__(
        self,
        name: str,
        *,
        client: _native.Client | None = None,
        tenant: str = "default",
        rank: int | None = None,
        workers: int | None = None,
        function: str = "mean",
        settings: Settings | None = None,
        groups: Sequence[Group] = (),
        schedule: Mapping[str, Any] | None = None,
        like: Tree = None,
        initial: Tree = None,
        quorum: tuple[int, float] | None = None,
        durability: Literal["process", "disk"] | None = None,
        non_finite: Literal["propagate", "void", "fail"] | None = None,
        order: Literal["rank", "arrival"] | None = None,
        on_loss: str | None = None,
        shard_bytes: int | None = None,
        time_to_live: float | None = None,
        worker_id: str | None = None,
        timeout: float = JOIN_TIMEOUT,
        on_roster_change: Callable[[int, Round], object] | None = None,
    ) -> None:
        if client is None:
            from . import _session

            client = _session.client()
        if time_to_live is None and function in REDUCTIONS:
            time_to_live = 3600.0
        self.spec = Spec(
            name=job_name(name),
            tenant=tenant,
            function=function,
            settings=settings or {},
            groups=groups,
            schedule=schedule,
            workers=workers if workers is not None else int(os.environ.get("WORLD_SIZE", "1")),
            quorum=quorum,
            durability=durability,
            non_finite=non_finite,
            order=order,
            on_loss=on_loss,
            shard_bytes=shard_bytes,
            time_to_live=time_to_live,
        )
        self.rank = rank if rank is not None else int(os.environ.get("RANK", "0"))
        self.on_roster_change = on_roster_change
        self.last_round: Round | None = None
        self._client = client
        self._worker: _native.Worker | None = None
        self._worker_id = worker_id
        self._timeout = timeout
        self._tensors: dict[str, tuple[int, ...]] = {}
        self._pending: Handle | None = None
        self._interrupted = False
        # A round is being pushed tensor by tensor.
        self._split = False
        self._left = False
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._log = _log.Adapter(self.spec.name, self.rank)
        if initial is not None:
            parameters = _read(initial)
            self._join(parameters, parameters)
        elif like is not None:
            self._join(_read(like), {})

    # Who and where.

    @property
    def name(self) -> str:
        """The job's name."""
        return self.spec.name

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the job's tensors by name; empty until it is joined."""
        return dict(self._tensors)

    @property
    def contributors(self) -> int:
        """How many workers the last round counted; 0 before the first one."""
        return self.last_round.contributors if self.last_round else 0

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received: messages with their headers, resends included."""
        return self._joined().traffic()

    def members(self) -> list[int]:
        """Ranks on the job's roster, in ascending order."""
        return sorted(self._client.members(self.spec.tenant, self.name))

    def counted(self) -> list[int]:
        """Ranks that the last round counts on all shards, in ascending order; after `finish` or a handle's `wait`, and
        before the next push."""
        return self._joined().counted()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"job {self.name!r} was joined by process {self._pid}, from which this one was forked: connections do "
                "not survive a fork; make a Job in the child, or start children with the method \"spawn\""
            )
        if self._left:
            raise LeftError(f"this worker has left job {self.name!r}: make another Job to join it again")

    def _joined(self) -> _native.Worker:
        self._check()
        if self._worker is None:
            raise LeftError(f"job {self.name!r} is not joined yet: push something, or give like= or initial=")
        return self._worker

    def _join(self, tensors: Mapping[str, Leaf], initial: Mapping[str, Leaf]) -> None:
        shapes = {name: value.shape for name, value in tensors.items()}
        values = [(name, _f32(value)) for name, value in initial.items()]
        _log.current(self._log)
        self._worker = self._client.join(self.spec.json(shapes), self.rank, self._timeout, self._worker_id, values)
        self._tensors = shapes
        self._log.values["round"] = self._worker.round()
        self._log.info("joined: %d tensors, function %s", len(shapes), self.spec.function)

    # Rounds.

    def push_pull(self, tree: Tree, *, weight: float | None = None, timeout: float | None = None) -> Tree:
        """Pushes all tensors of one round and waits for what the function makes of all workers' tensors.

        Args:
            tree: Tensors, in the form in which they are named. float32, float16 or bfloat16; what comes back has the
                type of what was pushed.
            weight: This contribution's, for `weighted_mean`: the number of samples, say. Stays until it is changed.
            timeout: Longest wait, seconds; without an end if None.

        Raises:
            BadInputError, ShapeError: before anything is sent.
            TimedOutError: the round stays pushed; the next call waits for its end and drops its result.
            RefusedError: the job is over, or this worker has lost its rank.
        """
        return self.push_pull_async(tree, weight=weight).wait(timeout)

    def push_pull_async(self, tree: Tree, *, weight: float | None = None) -> Handle:
        """As `push_pull`, but returns when the tensors are copied into messages; they may be changed then.

        One round of a job can be under way: the next push waits until the one before has its result.
        """
        self._check()
        given = _read(tree)
        with self._lock:
            if self._worker is None:
                self._join(given, {})
            self._compare(given)
            worker = self._begin()
            if weight is not None:
                worker.set_weight(weight)
            self._interrupted = True
            worker.push([(name, value.values, value.kind) for name, value in given.items()])
            self._interrupted = False
            self._pending = Handle(self, tree, given)
            return self._pending

    def push(self, name: str, tensor: Any) -> None:
        """The split form: pushes one tensor of a round, as soon as it is there, so that it travels while the others are
        computed. The round is complete when every tensor was pushed once; then `finish`, and `pull` what is wanted.

        The job has to be joined: by a round before, or with `like` or `initial`.

        Raises:
            MissingTensorError: the round before lacks a tensor.
        """
        value = leaf(name, tensor)
        with self._lock:
            self._compare_one(name, value)
            worker = self._joined() if self._split else self._begin()
            self._split = True
            worker.push([(name, value.values, value.kind)])

    def finish(self, timeout: float | None = None) -> Round:
        """Waits until the round that was pushed by `push` is complete.

        Raises:
            MissingTensorError: a tensor was not pushed.
            TimedOutError: it is not complete after `timeout` seconds; call it again.
        """
        with self._lock:
            round = Round(*self._finish(timeout))
            self._split = False
        self._tell(round)
        return round

    def pull(self, name: str, out: Any) -> None:
        """Copies one tensor's result into `out`, an array or tensor of its shape; once a round, before the next one's
        first push. Waits for it, if `finish` was not called."""
        value = leaf(name, out)
        self._compare_one(name, value)
        if not value.shares or not value.values.flags.writeable:
            raise BadInputError(f"tensor {name!r}: results are only copied into writable CPU memory without gaps")
        with self._lock:
            self._joined().pull([(name, value.values, value.kind)])

    def skip(self) -> Handle:
        """Contributes nothing to this round, so that it need not wait for this worker; the handle gives its result as
        a flat dict of float32 arrays by name.

        The job has to be joined: by a round before, or with `like`.
        """
        with self._lock:
            self._begin().push_void()
            tree = {name: numpy.empty(shape, numpy.float32) for name, shape in self._tensors.items()}
            self._pending = Handle(self, tree, {name: leaf(name, value) for name, value in tree.items()})
            return self._pending

    def parameters(self) -> dict[str, Array]:
        """The parameters that the service holds, by name: what a worker that joins starts from.

        Call it before the first push of this worker: all shards stand right before its first round then. The job has
        to be joined: with `initial` or `like`.
        """
        with self._lock:
            flat = self._joined().parameters()
        return {name: values.reshape(shape) for (name, shape), values in zip(self._tensors.items(), flat, strict=True)}

    def set(self, settings: Settings | None = None, *, from_round: int | None = None, **more: float | bool) -> int:
        """Changes settings of the function, such as `lr=0.01`; gives the first round that uses them.

        Args:
            settings: By name; more of them as arguments.
            from_round: Not before this round; None for the next one that nobody can have begun.

        Raises:
            RefusedError: the function does not take them, or `from_round` may have begun.
        """
        change = {"from_round": from_round, "settings": {**(settings or {}), **more}}
        return self._client.set_settings(self.spec.tenant, self.name, json.dumps(change))[1]

    def set_group(
        self, index: int, settings: Settings | None = None, *, from_round: int | None = None, **more: float | bool
    ) -> int:
        """As `set`, for one of the parameter groups."""
        change = {"from_round": from_round, "groups": {str(index): {**(settings or {}), **more}}}
        return self._client.set_settings(self.spec.tenant, self.name, json.dumps(change))[1]

    def snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        parameters_only: bool = False,
        bytes_per_s: int | None = None,
        timeout: float | None = None,
        progress: bool = False,
    ) -> int:
        """Writes the job's parameters and optimizer state at one round to a safetensors file, while training goes on;
        gives the number of that round.

        Args:
            parameters_only: Leave the optimizer's state out.
            bytes_per_s: So that training is not held up; 128 MiB/s if None, 0 for as fast as it goes.
            timeout: Longest wait for a round to end on all shards, seconds; 300 if None.
            progress: Show how far it is, with tqdm where that is installed.

        Raises:
            FileError: the file cannot be written.
            TimedOutError: the round does not end.
        """
        with bar(progress, "B", f"snapshot of {self.name}") as tell:
            return self._client.snapshot(
                self.spec.tenant, self.name, path, parameters_only, bytes_per_s, timeout, tell
            )[0]

    def leave(self) -> None:
        """Gives the rank back: rounds no longer wait for this worker. Repeating it changes nothing.

        A reduction that nobody is left in is removed from the service, so that the next run under its name begins
        afresh.
        """
        if self._left or os.getpid() != self._pid:
            return
        self._left = True
        if self._worker is not None:
            self._worker.leave()
            self._log.info("left")
            if self.spec.function in REDUCTIONS:
                try:
                    if not self.members():
                        self._client.delete(self.spec.tenant, self.name)
                except RefusedError as error:
                    # Another one that left just now has removed it.
                    if error.code not in ("unknown_job", "gone"):
                        raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    # What handles ask for.

    def _compare_one(self, name: str, value: Leaf) -> None:
        if name not in self._tensors:
            raise UnknownTensorError(
                f"job {self.name!r} has no tensor {name!r}, only {', '.join(list(self._tensors)[:8])}: the tensors "
                "of a job stay the same; give another set another name="
            )
        if value.shape != self._tensors[name]:
            raise ShapeError(
                f"tensor {name!r} of job {self.name!r} has changed from {self._tensors[name]} to {value.shape}: "
                "shapes stay the same from round to round; give another shape another name="
            )

    def _compare(self, given: Mapping[str, Leaf]) -> None:
        for name, value in given.items():
            self._compare_one(name, value)
        for name in self._tensors:
            if name not in given:
                raise ShapeError(f"tensor {name!r} of job {self.name!r} is missing: pass zeros if there is nothing to add")

    def _begin(self) -> _native.Worker:
        """Ends the round before, and gives the worker to push the next one with."""
        if self._pending is not None:
            self._settle(self._pending, None)
        if self._interrupted:
            # A signal ended a push half-way, and its other half is gone: only another tenure can go on.
            self._log.warning("a push was interrupted: joining again")
            self._joined().leave()
            self._join({n: Leaf(numpy.empty(0), "f32", shape, None, False) for n, shape in self._tensors.items()}, {})
            self._interrupted = False
        worker = self._joined()
        _log.current(self._log)
        self._log.values["round"] = worker.round()
        return worker

    def _settle(self, handle: Handle, timeout: float | None) -> None:
        """Waits for a handle's result and keeps it there."""
        if handle._done:
            return
        self._check()
        with self._lock:
            if handle._done:
                return
            worker = self._joined()
            try:
                told = self._finish(timeout)
                results = {name: value.like() for name, value in handle._tensors.items()}
                worker.pull([(n, memory, handle._tensors[n].kind) for n, (memory, _) in results.items()])
            except (TimedOutError, KeyboardInterrupt):
                raise
            except Exception as error:
                handle._error = error
            else:
                handle._round = Round(*told)
                handle._result = _tree.rebuild(handle._tree, lambda name: results[name][1])
            handle._done = True
            # What it holds of the caller's is not needed any more.
            handle._tree, handle._tensors = None, {}
            if self._pending is handle:
                self._pending = None
        if handle._round is not None:
            self._tell(handle._round)

    def _finish(self, timeout: float | None) -> tuple[int, int, bool, bool, bool, int, str | None]:
        worker = self._joined()
        _log.current(self._log)
        told = worker.finish(timeout)
        if told is None:
            why = worker.paused()
            raise TimedOutError(
                f"round {worker.round()} of job {self.name!r} has no result after {timeout} s"
                + (f": the job is paused ({why})" if why else "")
                + f": it waits for others of the ranks {self.members()}; wait again, or look at `thalweg job show`"
            )
        return told

    def _tell(self, round: Round) -> None:
        self.last_round = round
        self._log.values["round"] = round.number
        self._log.debug("done, with %d contributors", round.contributors)
        if round.superseded:
            self._log.warning("others went on without this worker: the result is that of the newest round")
        if round.advice is not None:
            self._log.warning("this worker's contribution was taken as void: %s", round.advice)
        if round.roster_changed:
            self._log.info("the roster has changed: %d contributors", round.contributors)
            if self.on_roster_change is not None:
                self.on_roster_change(round.contributors, round)

    def _poll(self) -> bool:
        self._check()
        return self._joined().poll()

    def _when_complete(self, callback: Callable[[], object]) -> None:
        self._joined().when_complete(callback)


def _read(tree: Tree) -> dict[str, Leaf]:
    return {name: leaf(name, value) for name, value in _tree.named(tree).items()}


def _f32(value: Leaf) -> Array:
    """The numbers of a leaf as float32, copied if they are halves."""
    if value.kind == "f32":
        return value.values
    if value.kind == "f16":
        return value.values.view(numpy.float16).astype(numpy.float32)
    # bfloat16 is the upper half of float32.
    return (value.values.astype(numpy.uint32) << 16).view(numpy.float32)
