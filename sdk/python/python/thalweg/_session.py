"""The process-wide connection, and the functions that work on its jobs."""

from __future__ import annotations

import atexit
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy

from . import _native, _tree
from ._arrays import Array, Leaf, leaf
from ._job import Handle, Job, Round, Tree, job_name
from ._log import logger
from ._progress import bar
from .errors import BadInputError, LeftError, TimedOutError

URL = "nats://127.0.0.1:4222"
#: Longest wait for a service at the URL, seconds.
CONNECT_TIMEOUT = 10.0


@dataclass
class _Session:
    client: _native.Client
    url: str
    job: str
    options: dict[str, Any]
    rank: int
    workers: int
    pid: int = field(default_factory=os.getpid)
    jobs: dict[str, Job] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    #: Called when this ends, beside leaving the jobs.
    leaving: list[Callable[[], object]] = field(default_factory=list)


_session: _Session | None = None


def _default_job() -> str:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return os.environ.get("THALWEG_JOB") or (run if run != "none" else "default")


def connect(url: str | None = None, timeout: float = CONNECT_TIMEOUT) -> _native.Client:
    """A connection of its own, for `Job(client=...)`.

    Args:
        url: `nats://host:port`; by default the variable `THALWEG_URL`, else `nats://127.0.0.1:4222`.
        timeout: Longest wait for a service there, seconds.

    Raises:
        ConnectError: no NATS server answers there.
        TimedOutError: one does, but no gateway of Thalweg.
    """
    client = _native.connect(url or os.environ.get("THALWEG_URL") or URL, timeout)
    client.check()
    return client


def init(
    url: str | None = None,
    job: str | None = None,
    function: str = "mean",
    workers: int | None = None,
    rank: int | None = None,
    *,
    connect_timeout: float = CONNECT_TIMEOUT,
    on_roster_change: Callable[[int, Round], object] | None = None,
    **options: Any,
) -> None:
    """Connects this process. Repeated, it connects anew, after leaving what was joined.

    Args:
        url: `nats://host:port`; by default the variable `THALWEG_URL`, else `nats://127.0.0.1:4222`.
        job: Name of the job, and first part of the names of those that `name=` makes. Default: the variable
            `THALWEG_JOB`, under torchrun its run id, else `default`.
        function: What the service does with each round; see `Job`.
        workers: Default: the variable `WORLD_SIZE`, else 1.
        rank: Default: the variable `RANK`, else 0.
        connect_timeout: Longest wait for a service at `url`, seconds.
        on_roster_change: Called with (contributors, round) when somebody has joined or left.
        options: More of what `Job` takes, for all jobs of this process.

    Raises:
        ConnectError: no NATS server answers at the URL.
        TimedOutError: one does, but no gateway of Thalweg.
    """
    global _session
    shutdown()
    url = url or os.environ.get("THALWEG_URL") or URL
    _session = _Session(
        client=connect(url, connect_timeout),
        url=url,
        job=job_name(job or _default_job()),
        options={"function": function, "on_roster_change": on_roster_change, **options},
        rank=rank if rank is not None else int(os.environ.get("RANK", "0")),
        workers=workers if workers is not None else int(os.environ.get("WORLD_SIZE", "1")),
    )


def _get() -> _Session:
    global _session
    if _session is not None and _session.pid != os.getpid():
        raise LeftError(
            f"this process was forked from {_session.pid}, which called thalweg.init(): connections do not survive a "
            "fork; call thalweg.init() here too, or start children with the method \"spawn\""
        )
    if _session is None:
        init()
        assert _session is not None
    return _session


def client() -> _native.Client:
    """The connection of this process; made with what the environment says, if `init` was not called."""
    return _get().client


def rank() -> int:
    """This worker's rank."""
    return _get().rank


def size() -> int:
    """How many workers the first round waits for; see `Job.contributors` for how many there are."""
    return _get().workers


def default_job(name: str | None = None) -> Job:
    """The job that `push_pull(name=name)` uses."""
    session = _get()
    with session.lock:
        full = job_name(session.job, name) if name is not None else session.job
        job = session.jobs.get(full)
        if job is None:
            job = Job(full, client=session.client, rank=session.rank, workers=session.workers, **session.options)
            session.jobs[full] = job
        return job


def push_pull(
    tree: Tree, name: str | None = None, *, weight: float | None = None, timeout: float | None = None
) -> Tree:
    """Pushes all tensors of one round and waits for the result; see `Job.push_pull`.

    Args:
        tree: A tensor, or dicts, lists and tuples of tensors. One name means one set of tensors, with the same shapes
            in every round.
        name: Of the job `<job>-<name>`; the job of `init` itself if None.
    """
    return default_job(name).push_pull(tree, weight=weight, timeout=timeout)


def push_pull_async(tree: Tree, name: str | None = None, *, weight: float | None = None) -> Handle:
    """As `push_pull`, but returns at once; see `Job.push_pull_async`."""
    return default_job(name).push_pull_async(tree, weight=weight)


def poll(handle: Handle) -> bool:
    """Whether `synchronize` returns at once."""
    return handle.poll()


def synchronize(handle: Handle, timeout: float | None = None) -> Tree:
    """Waits for the result; see `Handle.wait`."""
    return handle.wait(timeout)


# Broadcast: a sum to which only the root contributes.


def _carried(name: str, value: Any) -> tuple[Array, Callable[[Array], Any]]:
    """A tensor as float32 that a sum with zeros leaves as it is, and the way back.

    What is not float32 goes as its bytes, two of them in each number, which float32 holds exactly.
    """
    read: Leaf | None
    try:
        read = leaf(name, value)
        array = read.values
    except BadInputError:
        array, read = _plain(name, value), None
    if read is not None and read.kind == "f32":

        def back(values: Array) -> Any:
            memory, result = read.like()
            numpy.copyto(memory, values.reshape(memory.shape))
            return result

        return array, back
    raw = array.tobytes()
    padded = numpy.frombuffer(raw + b"\0" * (-len(raw) % 2), numpy.uint16).astype(numpy.float32)

    def decode(values: Array) -> Any:
        result = numpy.frombuffer(values.astype(numpy.uint16).tobytes()[: len(raw)], array.dtype)
        result = result.reshape(array.shape)
        if read is not None:
            memory, tensor = read.like()
            numpy.copyto(memory, result.reshape(memory.shape))
            return tensor
        if type(value).__module__.partition(".")[0] == "torch":
            import torch

            return torch.from_numpy(result.copy())
        return result.copy()

    return padded, decode


def _plain(name: str, value: Any) -> Array:
    if type(value).__module__.partition(".")[0] == "torch":
        value = value.detach().cpu().numpy()
    array = numpy.asarray(value)
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise BadInputError(f"{name!r} is {array.dtype} of shape {array.shape}: broadcast takes numbers and bools")
    return numpy.ascontiguousarray(array).reshape(array.shape)


def _broadcast(job: Job, tensors: dict[str, Array], root: int, timeout: float) -> dict[str, Array]:
    import time

    until = time.monotonic() + timeout
    # In a job that others have left already the first rounds would count nobody else.
    while len(job.members()) < job.spec.workers:
        if time.monotonic() > until:
            raise TimedOutError(
                f"broadcast in job {job.name!r}: after {timeout} s only the ranks {job.members()} of "
                f"{job.spec.workers} are there; every worker has to call it"
            )
        time.sleep(0.01)
    while True:
        handle = job.push_pull_async(tensors) if job.rank == root else job.skip()
        result = handle.wait(max(until - time.monotonic(), 0.0))
        if job._joined().counts(root):
            return {name: numpy.asarray(values) for name, values in result.items()}


def broadcast_parameters(tree: Tree, root: int = 0, name: str = "parameters", *, timeout: float = 300.0) -> Tree:
    """Gives every worker the tensors of rank `root`: parameters, buffers, anything of numbers or bools.

    Every worker calls it with a tree of the same names, shapes and types; what comes back has that form. float32
    travels as it is, other types as their bytes.

    Args:
        name: Of the job `<job>-<name>` that it takes place in; another one for another set of tensors.
        timeout: Longest wait for all workers, seconds.
    """
    named = _tree.named(tree)
    carried = {key: _carried(key, value) for key, value in named.items()}
    session = _get()
    with session.lock:
        job = _sum_job(session, name, {key: values for key, (values, _) in carried.items()})
        got = _broadcast(job, {key: values for key, (values, _) in carried.items()}, root, timeout)
    results = {key: back(got[key]) for key, (_, back) in carried.items()}
    return _tree.rebuild(tree, lambda key: results[key])


def _sum_job(session: _Session, name: str, tensors: dict[str, Array]) -> Job:
    full = job_name(session.job, name)
    job = session.jobs.get(full)
    if job is None:
        job = Job(
            full,
            client=session.client,
            rank=session.rank,
            workers=session.workers,
            function="sum",
            # Flat: names are keys, whatever is in them.
            like=tensors,
            timeout=session.options.get("timeout", 300.0),
        )
        session.jobs[full] = job
    return job


def broadcast_object(value: Any, root: int = 0, name: str = "object", *, timeout: float = 300.0) -> Any:
    """Gives every worker the small state of rank `root`: what JSON can hold, up to 64 KiB. Others pass anything.

    Args:
        name: Of the job `<job>-<name>` that it takes place in.
        timeout: Longest wait for all workers, seconds.

    Raises:
        BadInputError: the value is none of JSON's, or too large: use `broadcast_parameters` for tensors.
    """
    text = b""
    if rank() == root:
        try:
            text = json.dumps(value).encode()
        except (TypeError, ValueError) as error:
            raise BadInputError(f"only what JSON can hold is broadcast as an object: {error}") from error
        if len(text) > OBJECT_BYTES:
            raise BadInputError(f"an object of {len(text)} bytes: at most {OBJECT_BYTES} are broadcast")
    padded = len(text).to_bytes(4, "little") + text.ljust(OBJECT_BYTES, b"\0")
    got = broadcast_parameters(numpy.frombuffer(padded, numpy.uint8), root, name, timeout=timeout).tobytes()
    return json.loads(got[4 : 4 + int.from_bytes(got[:4], "little")])


#: Longest JSON text of `broadcast_object`.
OBJECT_BYTES = 64 * 1024


def delete(job: str, tenant: str = "default") -> None:
    """Removes a job from the service, with everything of it. Its workers get `RefusedError` (`gone`)."""
    client().delete(tenant, job)


def jobs(tenant: str = "default") -> list[str]:
    """Names of the jobs that the service knows."""
    return client().jobs(tenant)


def restore(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    tenant: str = "default",
    replace: bool = False,
    timeout: float | None = None,
    progress: bool = False,
) -> str:
    """Creates a job from a snapshot (`Job.snapshot`), which goes on after the snapshot's round; gives its name.

    Args:
        name: Another name than that of the job that the snapshot was taken of.
        replace: Take the place of the job of that name, whose state is then lost. Without it a name in use is
            refused.
        timeout: Longest wait for answers, seconds; 300 if None.
        progress: Show how far it is, with tqdm where that is installed.

    Raises:
        RefusedError: `spec_mismatch` for a name in use.
        FileError: the file cannot be read, or is no snapshot.
    """
    with bar(progress, "shard", f"restoring {os.fspath(path)}") as tell:
        return client().restore(path, tenant, name, None, replace, timeout, tell)


def shutdown(url: str | None = None) -> None:
    """Leaves all jobs of `init`'s connection. Called by itself when the interpreter ends.

    Args:
        url: Only if the connection is to this one.
    """
    global _session
    if url is not None and _session is not None and _session.url != url:
        return
    session, _session = _session, None
    if session is None or session.pid != os.getpid():
        return
    for leave in [*session.leaving, *(job.leave for job in session.jobs.values())]:
        try:
            leave()
        except TimedOutError as error:
            # Nobody is there to hear it of the others either; ranks fall back with their leases.
            logger.warning("could not leave: %s", error)
            return
        except Exception as error:
            logger.warning("could not leave a job: %s", error)


atexit.register(shutdown)

