"""The threads behind the operations: cancelling, errors, several callers, fork, idleness."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from test_kernels import linear, normal
from yivl_edge import _core


class Big:
    """The largest operations of a 6B model: up to seconds of work if not stopped."""

    def __init__(self, isa: str, threads: int) -> None:
        self.ops = _core.KernelOps(isa, threads)
        self.x = normal(1, 1100, 11008)
        self.w = np.zeros(4096 * 11008 // 32 * 34, np.uint8)
        self.y = np.zeros((1100, 4096), np.float32)
        self.q, self.k = normal(2, 1100, 4096), normal(3, 4096, 512)
        self.out = np.zeros_like(self.q)

    def linear(self, control: "_core.KernelControl") -> None:
        self.ops.linear(self.y, self.x, self.w, GGMLQuantizationType.Q8_0.value, None, control)

    def attention(self, control: "_core.KernelControl") -> None:
        self.ops.attention(self.out, self.q, self.k, self.k, 32, 4, True, control)


def repeat(run: Callable[[object], None], control: "_core.KernelControl") -> None:
    """Runs until cancelled: a fast machine may finish once before the cancel comes."""
    while True:
        run(control)


@pytest.mark.parametrize("operation", ["linear", "attention"])
def test_cancel_ends_the_largest_operations_within_a_tenth_of_a_second(isa: str, operation: str) -> None:
    big = Big(isa, 2)
    run: Callable[[object], None] = getattr(big, operation)
    delays = []
    for _ in range(3):
        control = _core.KernelControl()
        cancelled_at = [0.0]

        def cancel(control: object = control, at: list[float] = cancelled_at) -> None:
            time.sleep(0.02)
            at[0] = time.perf_counter()
            control.cancel()  # type: ignore[attr-defined]

        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(_core.Cancelled):
            repeat(run, control)
        delays.append(time.perf_counter() - cancelled_at[0])
        canceller.join()
    # The best of three: another process may hold the cores for longer than that.
    assert min(delays) < 0.1
    x, w = normal(5, 9, 300), normal(6, 40, 300)
    assert np.array_equal(linear(big.ops, x, w), linear(_core.KernelOps(isa, 1), x, w))


def test_an_exception_from_the_callers_poll_ends_the_operation(isa: str) -> None:
    big = Big(isa, 2)

    class StopError(Exception):
        pass

    def poll() -> None:
        raise StopError

    with pytest.raises(StopError):
        big.linear(_core.KernelControl(poll))
    x, w = normal(5, 9, 300), normal(6, 40, 300)
    assert np.array_equal(linear(big.ops, x, w), linear(_core.KernelOps(isa, 1), x, w))


def test_using_the_pool_from_inside_its_own_work_is_an_error_not_a_wait_for_ever() -> None:
    big = Big("", 2)
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls > 1:  # the first comes before the work
            big.linear(_core.KernelControl())

    with pytest.raises(RuntimeError, match="from inside its own work"):
        repeat(big.linear, _core.KernelControl(poll))
    x, w = normal(5, 9, 300), normal(6, 40, 300)
    assert np.array_equal(linear(big.ops, x, w), linear(_core.KernelOps("", 1), x, w))


def test_using_the_pool_while_waiting_for_it_is_an_error_not_a_wait_for_ever() -> None:
    big, other = Big("", 2), normal(5, 9, 300)
    held, inside = threading.Event(), threading.Event()
    polls, errors = [0, 0], list[str]()

    def hold() -> None:
        polls[0] += 1
        if polls[0] > 1:  # the first comes before the work
            held.set()
            inside.wait(20)
            holder.cancel()

    def ask_again() -> None:
        polls[1] += 1
        if polls[1] > 1:
            inside.set()
            linear(big.ops, other, normal(6, 40, 300))

    def wait() -> None:
        held.wait(20)
        try:
            big.linear(_core.KernelControl(ask_again))
        except RuntimeError as error:
            errors.append(str(error))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    holder = _core.KernelControl(hold)
    with pytest.raises(_core.Cancelled):
        repeat(big.linear, holder)
    waiter.join(20)
    assert inside.is_set()
    assert not waiter.is_alive()
    assert "from inside its own work" in errors[0]
    assert np.array_equal(
        linear(big.ops, other, normal(6, 40, 300)),
        linear(_core.KernelOps("", 1), other, normal(6, 40, 300)),
    )


def test_four_callers_share_the_pool() -> None:
    ops = _core.KernelOps("", 2)
    inputs = [(normal(i, 20, 600), normal(i + 9, 300, 600)) for i in range(4)]
    expected = [linear(_core.KernelOps("", 1), x, w) for x, w in inputs]
    wrong: list[int] = []
    done = [0] * 4

    def caller(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(linear(ops, *inputs[i]), expected[i]):
                wrong.append(i)
            done[i] += 1

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert done == [50] * 4


def test_a_waiting_caller_can_be_cancelled() -> None:
    big = Big("portable", 2)
    first, second = _core.KernelControl(), _core.KernelControl()
    ended: list[str] = []

    def run(name: str, control: object) -> None:
        with pytest.raises(_core.Cancelled):
            big.linear(control)
        ended.append(name)

    threads = [threading.Thread(target=run, args=("first", first))]
    threads[0].start()
    time.sleep(0.1)
    threads.append(threading.Thread(target=run, args=("second", second)))
    threads[1].start()
    time.sleep(0.05)
    second.cancel()
    threads[1].join()
    assert ended == ["second"]
    first.cancel()
    threads[0].join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_gets_an_error_not_a_hang() -> None:
    code = """
import os, numpy as np
from yivl_edge import _core
ops = _core.KernelOps("", 2)
x, y = np.ones((8, 512), np.float32), np.zeros((8, 512), np.float32)
w = np.ones((512, 512), np.float32).view(np.uint8).reshape(-1)
ops.linear(y, x, w, 0)
pid = os.fork()
if pid == 0:
    try:
        ops.linear(y, x, w, 0)
    except RuntimeError as error:
        os.write(1, str(error).encode())
        del ops
        os._exit(0)
    os._exit(3)
_, status = os.waitpid(pid, 0)
ops.linear(y, x, w, 0)
assert os.waitstatus_to_exitcode(status) == 0
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert "did not survive the fork" in result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_model_in_a_forked_child_raises(golden_f32: Path) -> None:
    code = """
import os, sys
from yivl_edge import Model
model = Model(sys.argv[1], n_threads=2, n_ctx=256, device="cpu")
model.chat(None, "Why?", max_tokens=1)
pid = os.fork()
if pid == 0:
    try:
        model.chat(None, "And then?", max_tokens=1)
    except RuntimeError as error:
        os.write(1, str(error).encode())
        os._exit(0)
    os._exit(3)
_, status = os.waitpid(pid, 0)
model.chat(None, "And then?", max_tokens=1)
assert os.waitstatus_to_exitcode(status) == 0
"""
    command = [sys.executable, "-c", code, str(golden_f32)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "did not survive the fork" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory counts stacks of threads on Linux")
def test_threads_that_the_system_refuses_are_an_error(golden_f32: Path) -> None:
    code = """
import resource, sys
from yivl_edge import _core
from yivl_edge.cli import main
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), resource.RLIM_INFINITY))
try:
    _core.KernelOps("", 1000)
except OSError as error:
    print(error)
_core.KernelOps("", 2)
assert main(["chat", sys.argv[1], "--device", "cpu", "--threads", "1000", "--prompt", "Why?"]) == 1
"""
    command = [sys.executable, "-c", code, str(golden_f32)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    message = r"cannot start thread \d+ of 1000: .+\n"
    assert re.fullmatch(message, result.stdout)
    assert re.fullmatch("yivl-edge: error: " + message, result.stderr)


def test_idle_workers_sleep() -> None:
    ops = _core.KernelOps("", 2)
    linear(ops, normal(1, 64, 1024), normal(2, 512, 1024))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_default_threads_are_cores_this_process_may_use() -> None:
    count = _core.default_thread_count()
    assert 1 <= count <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        code = (
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
            "from yivl_edge import _core; print(_core.default_thread_count())"
        )
        one = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert one.stdout.strip() == "1"


@pytest.mark.parametrize(
    ("quotas", "cpus"),
    [
        ({"a/b": "max 100000", "a": "150000 100000", "": "400000 100000"}, 2),
        ({"a/b": "50000 100000", "a": "150000 100000"}, 1),
        ({"": "300000 100000"}, 3),
        ({"a": "max 100000", "a/c": "100000 100000"}, 0),
        ({}, 0),
    ],
    ids=["above", "own", "root", "others", "none"],
)
def test_the_smallest_quota_of_the_cgroups_counts(tmp_path: Path, quotas: dict[str, str], cpus: int) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:memory:/a/c\n0::/a/b\n")
    for group, quota in quotas.items():
        folder = tmp_path / "sys" / "fs" / "cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(quota + "\n")
    assert _core.cgroup_cpus(str(tmp_path)) == cpus


def test_bad_thread_counts_are_refused() -> None:
    for count in (-1, 1025):
        with pytest.raises(ValueError, match="n_threads must be from 1 to 1024"):
            _core.KernelOps("portable", count)
