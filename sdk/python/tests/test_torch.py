"""PyTorch: tensors, optimizers, the hook for DDP, local steps."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed here: `make deps`")

import thalweg  # noqa: E402
import thalweg.torch  # noqa: E402
from conftest import PATIENCE, Workers, eventually, run_workers, together  # noqa: E402
from thalweg import errors  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def data(rank: int, step: int) -> Any:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


def loss(net: Any, rank: int, step: int) -> Any:
    inputs, targets = data(rank, step)
    return torch.nn.functional.mse_loss(net(inputs), targets)


def parameters(net: Any) -> Any:
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def init(name: str, rank: int, workers: int) -> None:
    thalweg.init(job=name, rank=rank, workers=workers)


# Two workers as processes: hooks, sessions and ranks are a process's own.
PRELUDE = """
import sys
sys.path.insert(0, sys.argv[2])
import torch, thalweg, thalweg.torch
from test_torch import *
torch.set_num_threads(1)
thalweg.init(job=sys.argv[1])
rank = thalweg.rank()
net = model()
"""


def workers(count: int, name: str, code: str) -> list[Any]:
    return run_workers(count, PRELUDE + code, name, str(Path(__file__).parent))


def test_torchrun_tells_ranks_and_the_job(service: thalweg.up, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        """
import torch, thalweg
thalweg.init()
mean = thalweg.push_pull(torch.full((3,), float(thalweg.rank())), name="x")
assert mean.tolist() == [0.5] * 3, mean
print("rank", thalweg.rank(), "of", thalweg.size(), flush=True)
"""
    )
    # Without these two torchrun of PyTorch 1.13 does not start under Python 3.11, which iterates over flags otherwise.
    logs = ["--redirects=1", "--tee=1", f"--log_dir={tmp_path / 'logs'}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", *logs, str(script)]
    source = str(Path(__file__).resolve().parent.parent / "python")
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {line.partition("rank ")[2] for line in done.stdout.splitlines()} == {"0 of 2", "1 of 2"}, done.stdout


# Tensors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_keep_their_type(service: thalweg.up, name: str, dtype: Any) -> None:
    jobs = [thalweg.Job(name, rank=rank, workers=2, function="sum") for rank in range(2)]
    got = together(jobs, lambda job: job.push_pull({"x": torch.tensor([[1.5], [2 + job.rank]], dtype=dtype)}))
    for result in got:
        assert result["x"].dtype == dtype and result["x"].tolist() == [[3], [5]]


def test_views_leaves_and_parameters_are_read(service: thalweg.up, name: str) -> None:
    square = torch.arange(6.0).reshape(2, 3)
    leaf = torch.ones(2, requires_grad=True)
    got = thalweg.Job(name).push_pull({"t": square.T, "leaf": leaf, "p": torch.nn.Parameter(torch.zeros(1)), "f": leaf * 2})
    assert torch.equal(got["t"], square.T) and got["leaf"].tolist() == [1, 1] and got["f"].tolist() == [2, 2]
    assert not got["leaf"].requires_grad and leaf.requires_grad


@pytest.mark.parametrize(
    ("value", "told"),
    [(torch.zeros(2, dtype=torch.float64), r"float64.*x\.float"), (torch.zeros(2, dtype=torch.int64), "int64")],
)
def test_other_types_are_refused(service: thalweg.up, name: str, value: Any, told: str) -> None:
    with pytest.raises(errors.BadInputError, match=told):
        thalweg.Job(name).push_pull(value)


def test_sparse_tensors_are_refused(service: thalweg.up, name: str) -> None:
    with pytest.raises(errors.BadInputError, match="to_dense"):
        thalweg.Job(name).push_pull(torch.eye(3).to_sparse())


def test_a_state_dict_is_broadcast(service: thalweg.up, name: str) -> None:
    code = """
state = {**model(seed=rank).state_dict(), "steps": torch.tensor(rank + 7)}
got = thalweg.broadcast_parameters(state)
report([{key: value.tolist() for key, value in got.items()}, str(got["steps"].dtype), list(got) == list(state)])
"""
    results = workers(2, name, code)
    expected = {**{key: value.tolist() for key, value in model(0).state_dict().items()}, "steps": 7}
    assert results == [[expected, "torch.int64", True]] * 2


# Optimizers.


def test_distributed_is_as_one_process(service: thalweg.up, name: str) -> None:
    code = """
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
optimizer = thalweg.torch.DistributedOptimizer(optimizer, net.named_parameters())
assert isinstance(optimizer, torch.optim.SGD)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
for step in range(8):
    optimizer.zero_grad()
    loss(net, rank, step).backward()
    optimizer.step()
    scheduler.step()
report([parameters(net).tolist(), optimizer.contributors, sorted(optimizer.state_dict())])
"""
    one, two = workers(2, name, code)
    assert one == two and one[1] == 2 and one[2] == ["param_groups", "state"]
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for step in range(8):
        optimizer.zero_grad()
        ((loss(net, 0, step) + loss(net, 1, step)) / 2).backward()
        optimizer.step()
        scheduler.step()
    numpy.testing.assert_allclose(one[0], parameters(net), rtol=1e-4, atol=1e-6)


def test_gradients_travel_while_the_backward_pass_goes_on(service: thalweg.up, name: str) -> None:
    code = """
optimizer = thalweg.torch.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters())
order, push = [], optimizer._gradients._push
def noted(name, gradient):
    order.append(name)
    push(name, gradient)
optimizer._gradients._push = noted
seen = []
net[0].register_full_backward_hook(lambda *_: seen.extend(order))
loss(net, rank, 0).backward()
pushed = list(order)
optimizer.step()
report([seen, pushed])
"""
    for seen, pushed in workers(2, name, code):
        # The last layer's were on their way before the first layer's were computed.
        assert {"2.weight", "2.bias"} <= set(seen) and len(pushed) == 4


def test_accumulation_no_sync_and_clipping(service: thalweg.up, name: str) -> None:
    code = """
optimizer = thalweg.torch.DistributedOptimizer(
    torch.optim.SGD(net.parameters(), lr=0.5), net.named_parameters(), backward_passes_per_step=2)
for step in range(3):
    optimizer.zero_grad()
    with optimizer.no_sync():
        loss(net, rank, 3 * step).backward()
    loss(net, rank, 3 * step + 1).backward()
    loss(net, rank, 3 * step + 2).backward()
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
report(parameters(net).tolist())
"""
    one, two = workers(2, name, code)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        sum(loss(net, rank, 3 * step + part) / 2 for rank in range(2) for part in range(3)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    assert one == two
    numpy.testing.assert_allclose(one, parameters(net), rtol=1e-4, atol=1e-6)


def test_not_finite_reaches_every_worker_so_that_all_skip(service: thalweg.up, name: str) -> None:
    code = """
optimizer = thalweg.torch.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters())
skipped = []
for step in range(3):
    optimizer.zero_grad()
    scale = float("inf") if (rank, step) == (1, 1) else 1.0
    (loss(net, rank, step) * scale).backward()
    optimizer.synchronize()
    if all(p.grad.isfinite().all() for p in net.parameters()):
        optimizer.step()
    else:
        # As GradScaler does: nothing else is called.
        skipped.append(step)
report([skipped, optimizer.job.last_round.number, parameters(net).tolist()])
"""
    one, two = workers(2, name, code)
    assert one == two and one[:2] == [[1], 3] and all(numpy.isfinite(one[2]))


def test_gradients_that_only_some_have_are_told_to_all(service: thalweg.up, name: str) -> None:
    code = """
extra = torch.nn.Parameter(torch.ones(1))
never = torch.nn.Parameter(torch.ones(1))
named = [*net.named_parameters(), ("extra", extra), ("never", never)]
optimizer = thalweg.torch.DistributedOptimizer(torch.optim.SGD([p for _, p in named], lr=0.1), named)
told = []
for step in range(2):
    optimizer.zero_grad()
    use = step == 1 or rank == 0
    (loss(net, rank, step) + (extra.sum() if use else 0)).backward()
    try:
        optimizer.step()
        told.append(None)
    except thalweg.errors.MissingGradientError as error:
        told.append(str(error))
report([told, float(extra), never.grad is None])
"""
    for told, extra, none in workers(2, name, code):
        assert "1 of 2 workers" in told[0] and "extra" in told[0] and told[1] is None
        # The step after that goes on; what nobody has a gradient for stays without.
        assert extra == pytest.approx(0.9) and none


def test_two_backward_passes_in_a_step_are_told(service: thalweg.up, name: str) -> None:
    init(name, 0, 1)
    net = model()
    optimizer = thalweg.torch.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.named_parameters())
    loss(net, 0, 0).backward()
    with pytest.raises(errors.ThalwegError, match="backward_passes_per_step"):
        loss(net, 0, 1).backward()
    optimizer.leave()


def test_the_service_steps_as_pytorch_does(service: thalweg.up, name: str) -> None:
    code = """
net = model(seed=rank)  # rank 0's count
decayed = [p for n, p in net.named_parameters() if "weight" in n]
others = [p for n, p in net.named_parameters() if "bias" in n]
optimizer = thalweg.torch.ServerOptimizer(
    [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], "adamw",
    named_parameters=net.named_parameters(), lr=0.01)
for step in range(6):
    optimizer.zero_grad()
    loss(net, rank, step).backward()
    optimizer.step()
report([parameters(net).tolist(), optimizer.state_dict()])
"""
    one, two = workers(2, name, code)
    assert one[0] == two[0] and one[1]["round"] == 6

    net = model()
    decayed = [p for n, p in net.named_parameters() if "weight" in n]
    others = [p for n, p in net.named_parameters() if "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01
    )
    for step in range(6):
        optimizer.zero_grad()
        ((loss(net, 0, step) + loss(net, 1, step)) / 2).backward()
        optimizer.step()
    numpy.testing.assert_allclose(one[0], parameters(net), rtol=1e-4, atol=1e-5)


def test_a_server_side_optimizer_resumes_and_takes_settings(service: thalweg.up, name: str, tmp_path: Path) -> None:
    def train(net: Any, optimizer: Any, steps: range) -> Any:
        for step in steps:
            optimizer.zero_grad()
            loss(net, 0, step).backward()
            optimizer.step()
        return parameters(net)

    init(name, 0, 1)
    net = model()
    optimizer = thalweg.torch.ServerOptimizer(net.parameters(), "sgd", lr=0.1, momentum=0.9)
    train(net, optimizer, range(3))
    optimizer.job.snapshot(tmp_path / "model.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    through = train(net, optimizer, range(3, 6))
    thalweg.shutdown()

    init(f"{name}-again", 0, 1)
    thalweg.restore(tmp_path / "model.safetensors", f"{name}-again-model")
    net = model(seed=9)
    optimizer = thalweg.torch.ServerOptimizer(net.parameters(), "sgd", lr=0.1, momentum=0.9)
    optimizer.load_state_dict(state)
    assert torch.equal(train(net, optimizer, range(3, 6)), through)
    # So small a learning rate stops it, once it is in force.
    optimizer.param_groups[0].update(lr=1e-30)
    before = train(net, optimizer, range(6, 9))
    assert torch.equal(train(net, optimizer, range(9, 11)), before)


def test_a_server_side_optimizer_wants_all_gradients(service: thalweg.up, name: str) -> None:
    init(name, 0, 1)
    net = model()
    extra = torch.nn.Parameter(torch.ones(1))
    optimizer = thalweg.torch.ServerOptimizer([*net.parameters(), extra], "sgd", lr=0.1)
    loss(net, 0, 0).backward()
    with pytest.raises(errors.MissingGradientError, match=r"0\.4"):
        optimizer.step()


ELASTIC = """
import time
# Who joins later has another model and another learning rate, until it is told.
net = model(seed=rank // 3)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01 if rank < 3 else 5.0)
optimizer = thalweg.torch.DistributedOptimizer(optimizer, net.named_parameters(), elastic=True)
if rank > 2:
    assert optimizer.param_groups[0]["lr"] == 0.01 and len(optimizer.state) == 4
# All end together: 40 rounds after the one in which the other one came, which for that one was the one before its first.
done, end, fewest = 0, None, 3
while end is None or done < end:
    optimizer.zero_grad()
    loss(net, rank, done).backward()
    optimizer.synchronize()
    done = optimizer.job.last_round.number
    # Steps that are given up are as good a time to come as any.
    if done % 3:
        optimizer.step()
    fewest = min(fewest, optimizer.contributors)
    if end is None and (rank == 3 or fewest < optimizer.contributors):
        end = done + (39 if rank == 3 else 40)
    print(json.dumps([done, optimizer.contributors]), flush=True)
    time.sleep(0.02)
report([parameters(net).tolist(), [float(s["step"]) - (done - done // 3) for s in optimizer.state.values()]])
"""


def test_who_joins_later_is_given_everything_by_a_member(name: str) -> None:
    with thalweg.up(settings={"gateway.worker_lease_ms": 2000}):
        with Workers(3, PRELUDE + ELASTIC, name, str(Path(__file__).parent)) as workers:
            first = workers.processes[0].stdout
            assert first is not None
            eventually("a few rounds", lambda: json.loads(first.readline()) == [10, 3])
            workers.processes[2].kill()
            eventually("two to go on", lambda: json.loads(first.readline())[1] == 2)
            workers.start(3)
            eventually("the other one to take part", lambda: json.loads(first.readline())[1] == 3)
            one, two, _, joined = workers.results(but=2)
    assert one == two == joined
    # Who came later has the steps before it, too.
    assert one[1] == [0.0] * 4


# Few rounds.


def test_local_sgd_meets_every_so_many_steps(service: thalweg.up, name: str) -> None:
    code = """
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
with thalweg.torch.LocalSGD(net, optimizer, sync_every=3) as local:
    for step in range(6):
        optimizer.zero_grad()
        loss(net, rank, step).backward()
        optimizer.step()
    report([local.job.last_round.number, parameters(net).tolist()])
"""
    one, two = workers(2, name, code)
    assert one == two and one[0] == 2
    nets = [model(), model()]
    for step in range(6):
        for rank, net in enumerate(nets):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            optimizer.zero_grad()
            loss(net, rank, step).backward()
            optimizer.step()
        if step % 3 == 2:
            mean = (parameters(nets[0]) + parameters(nets[1])) / 2
            for net in nets:
                torch.nn.utils.vector_to_parameters(mean.clone(), net.parameters())
    numpy.testing.assert_allclose(one[1], mean, rtol=1e-4, atol=1e-6)


def test_diloco_takes_outer_steps_in_the_service(service: thalweg.up, name: str) -> None:
    code = """
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
with thalweg.torch.DiLoCo(net, optimizer, sync_every=2) as outer:
    for step in range(6):
        optimizer.zero_grad()
        loss(net, rank, step).backward()
        optimizer.step()
    report([outer.job.last_round.number, outer.contributors, parameters(net).tolist()])
"""
    one, two = workers(2, name, code)
    assert one == two and one[:2] == [3, 2]
    nets = [model(), model()]
    inner = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in nets]
    # The outer optimizer as PyTorch has it.
    held = [p.detach().clone().requires_grad_() for p in model().parameters()]
    outer = torch.optim.SGD(held, lr=0.7, momentum=0.9, nesterov=True)
    for step in range(6):
        for rank, net in enumerate(nets):
            inner[rank].zero_grad()
            loss(net, rank, step).backward()
            inner[rank].step()
        if step % 2 == 1:
            for place, parameter in enumerate(held):
                own = [list(net.parameters())[place].detach() for net in nets]
                parameter.grad = parameter.detach() - (own[0] + own[1]) / 2
            outer.step()
            for net in nets:
                for target, source in zip(net.parameters(), held):
                    target.data.copy_(source.detach())
    numpy.testing.assert_allclose(one[2], parameters(nets[0]), rtol=1e-4, atol=1e-6)


# Examples.


def run_example(example: str, *arguments: str, count: int = 4, **environment: str) -> list[dict[str, Any]]:
    """What rank 0 of so many processes has printed, line by line."""
    variables = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    environment = {**os.environ, **variables, **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / example), *arguments],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        with ThreadPoolExecutor(count) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=4 * PATIENCE), processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, told) in zip(processes, outputs):
        assert process.returncode == 0, told
    return [json.loads(line) for line in outputs[0][0].splitlines()]


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_ddp_through_thalweg_is_as_through_gloo(service: thalweg.up, name: str, kind: str, tmp_path: Path) -> None:
    recorded, accuracy = {}, {}
    for through in ["thalweg", "gloo"]:
        file = tmp_path / f"{through}.npy"
        meeting = f"file://{tmp_path}/meeting-{through}"
        options = ["--model", kind, "--through", through, "--steps", "80", "--meet", meeting, "--record", str(file)]
        accuracy[through] = run_example("digits_ddp.py", *options, THALWEG_JOB=name)[-1]["accuracy"]
        recorded[through] = numpy.load(file)
    assert len(recorded["gloo"]) == 20
    for ours, theirs in zip(recorded["thalweg"], recorded["gloo"]):
        assert numpy.linalg.norm(ours - theirs) <= 1e-5 * numpy.linalg.norm(theirs)
    assert not numpy.array_equal(recorded["gloo"][0], recorded["gloo"][19])
    assert accuracy["gloo"] > 0.9 and abs(accuracy["thalweg"] - accuracy["gloo"]) <= 0.02


def test_a_transformer_learns_with_few_rounds(service: thalweg.up, name: str) -> None:
    ends = {}
    for mode in ["diloco", "synchronous"]:
        options = ["--mode", mode, "--steps", "100", "--width", "32", "--layers", "1", "--lr", "0.01"]
        lines = run_example("characters_diloco.py", *options, count=2, THALWEG_JOB=f"{name}-{mode}")
        *progress, end = lines
        assert [line["steps"] for line in progress] == [50, 100]
        ends[mode] = (end["bytes"], progress[-1]["loss"])
    # Two rounds instead of a hundred, in which both learn the same things.
    assert ends["diloco"][0] <= ends["synchronous"][0] / 40
    # Guessing among 100 characters costs 4.6.
    assert ends["diloco"][1] < 3.1 and ends["synchronous"][1] < 3.1


def test_one_worker_dies_and_another_joins(name: str) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(EXAMPLES / "digits_server.py"), "--rounds", "500", "--pace", "0.02"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "4", "THALWEG_JOB": name, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    with thalweg.up(settings={"gateway.worker_lease_ms": 2000}):
        processes = [start(rank) for rank in range(4)]
        try:
            first = processes[0].stdout
            assert first is not None
            lines = [json.loads(first.readline()) for _ in range(20)]
            assert {line["contributors"] for line in lines} == {4}
            processes[3].kill()
            eventually("three to go on", lambda: json.loads(first.readline())["contributors"] == 3)
            processes.append(start(4))
            eventually("the other one to take part", lambda: json.loads(first.readline())["contributors"] == 4)
            ends = {}
            for rank in (0, 1, 2, 4):
                output, _ = processes[rank].communicate(timeout=PATIENCE)
                ends[rank] = json.loads(output.splitlines()[-1])
                assert processes[rank].returncode == 0
            assert all(end["model"] == ends[0]["model"] for end in ends.values())
            assert ends[4]["accuracy"] > 0.85
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
