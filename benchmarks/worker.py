"""A process that measures what it is told to: one line of JSON in, one line of JSON out.

Between two measurements it sleeps in a read, so that the other side has the machine for itself. With each answer comes
how much of the machine other programs used meanwhile. For Linux.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """The process refused or ended; says what it said."""


class Worker:
    """The caller's end of such a process."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        self.others = 0.0
        """Share of all cores that other programs used during the last thing done, 0 to 1."""
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Have it do one thing, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self._process.wait()
            tail = self._log.read_text(errors="replace")[-2000:]
            raise WorkerError(f"{do}: expected an answer, but the process ended with code {code}:\n{tail}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{do}: {answer['error']}")
        self.others = answer["others"]
        return answer["answer"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self._process.kill()  # it may be in the middle of minutes of work
        self._process.communicate()


def _seconds_of_others() -> float:
    """CPU seconds that everything but this process has used since the machine started."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, file.readline().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_SELF)
    busy = (user + nice + system + sum(interrupts_and_steal)) / os.sysconf("SC_CLK_TCK")
    return busy - own.ru_utime - own.ru_stime


def serve(actions: Mapping[str, Callable[..., Any]]) -> None:
    """The process's end: answers until standard input ends."""
    # Libraries that print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        others, began = _seconds_of_others(), time.perf_counter()
        try:
            result = actions[arguments.pop("do")](**arguments)
            used, seconds = _seconds_of_others() - others, time.perf_counter() - began
            # Processor time is counted in ticks, too coarse for a moment.
            share = max(used / seconds / (os.cpu_count() or 1), 0.0) if seconds > 0.2 else 0.0
            answer = {"answer": result, "others": share}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
