"""A reply: what it is, and how it comes piece by piece and can be stopped."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from yivl_edge import _core

Progress = Callable[[str, float], object]
"""Called with the stage (``hash``, ``load``, ``image``, ``prefill``, ``decode``) and the fraction done, 0 to 1."""


class CancelFlag(Protocol):
    """What can stop a reply from another thread: a ``threading.Event``, or anything with ``is_set()``."""

    def is_set(self) -> bool:
        """Whether the work should end."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply."""

    prompt_tokens: int
    """Positions of the prompt, each image row counted as one."""
    cached_tokens: int
    """Of these, positions that were not computed again."""
    completion_tokens: int
    """Tokens of the reply, an end-of-text token included."""


@dataclass(frozen=True)
class Timings:
    """Seconds per stage of one reply."""

    preprocess: float
    """Reading, padding and resizing the picture."""
    image: float
    """Vision tower and projector; 0 when the picture's embeddings were kept from the last turn."""
    prefill: float
    """The prompt's positions that were not cached."""
    first_token: float
    """The stages above and the first token of the reply."""
    decode: float
    """All tokens after the first."""


@dataclass(frozen=True)
class ChatResult:
    """A reply."""

    text: str
    """The reply, stripped of white space at both ends and of the text that stopped it."""
    finish_reason: Literal["stop", "length", "cancelled"]
    """``stop``: the model ended its turn; ``length``: max_tokens reached; ``cancelled``: ended by the caller, or by an
    error, which the stream has raised."""
    usage: Usage
    timings: Timings


# Python ends a daemon thread that asks for the GIL after the interpreter's end by unwinding its stack, which no C++
# code survives: what still computes then is stopped before, and what would begin after that never does.
_all_work: weakref.WeakSet[Work] = weakref.WeakSet()
_all_work_lock = threading.RLock()
_ending = False


class Work:
    """Something that computes for one caller at a time, and can be stopped from any thread."""

    def __init__(self, on_progress: Progress | None = None, cancel: CancelFlag | None = None) -> None:
        self._on_progress = on_progress
        self._cancel = cancel
        # Python's garbage collector cannot see what a Control of the core holds. A callback often refers to the stream
        # that it is about, and so to this: held there, none of them would ever be collected.
        me = weakref.ref(self)
        self.control = _core.Control(
            None if on_progress is None else lambda stage, fraction: _tell(me, stage, fraction),
            None if cancel is None else _CancelOf(me),
        )
        # The caller may come back from inside: from on_progress, or from a signal handler.
        self.in_use = threading.RLock()
        with _all_work_lock:
            _all_work.add(self)
        if _ending:
            self.control.cancel()
        stay_if_ending()


def _tell(work: weakref.ref[Work], stage: str, fraction: float) -> None:
    known = work()
    if known is not None and known._on_progress is not None:
        known._on_progress(stage, fraction)


class _CancelOf:
    def __init__(self, work: weakref.ref[Work]) -> None:
        self._work = work

    def is_set(self) -> bool:
        known = self._work()
        return known is not None and known._cancel is not None and bool(known._cancel.is_set())


def stay_if_ending() -> None:
    """Keeps a thread where Python can end it, once the interpreter ends: before and after it computes."""
    while _ending and threading.current_thread() is not threading.main_thread():
        time.sleep(3600)


@contextmanager
def working(on_progress: Progress | None = None) -> Iterator[_core.Control]:
    """A Control for something that computes, or does anything else without the GIL, until it returns."""
    work = Work(on_progress)
    try:
        with work.in_use:
            yield work.control
    finally:
        stay_if_ending()


@atexit.register
def _stop_work() -> None:
    global _ending
    with _all_work_lock:
        _ending = True
        all_work = list(_all_work)
    for work in all_work:
        work.control.cancel()
    for work in all_work:
        # In a forked process the thread that held the lock does not exist.
        if work.in_use.acquire(timeout=1):
            work.in_use.release()


class Prefill:
    """A `Model.prefill` on its way, which a reply had better wait for."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._thread = threading.get_ident()
        self._process = os.getpid()
        self._pixels: NDArray[np.float32] | None = None
        self.reached: tuple[str, float] | None = None
        self.done = threading.Event()

    def looks_at(self, pixels: NDArray[np.float32]) -> None:
        """Says which picture it is about."""
        self._pixels = pixels

    def begins(self, ids: Sequence[int], pixels: NDArray[np.float32] | None) -> bool:
        """Whether a prompt begins, as far as is known yet, with what is computed here in another thread."""
        # In a forked process the thread that computes does not exist.
        elsewhere = self._thread != threading.get_ident() and self._process == os.getpid()
        if not elsewhere or list(ids[: len(self._ids)]) != self._ids:
            return False
        return self._pixels is None or (pixels is not None and np.array_equal(self._pixels, pixels))


@dataclass
class Started:
    """What is there before the core begins with a reply."""

    session: _core.Session
    preprocess: float
    """Seconds for the picture's pixels."""
    waited: float
    """Seconds for a prefill to end."""


class ChatStream(Iterator[str]):
    """The pieces of a reply as they come; together they are the whole text.

    Close it (or leave its ``with`` block, or drop it) to end the work early. ``cancel`` may be called from any thread.
    """

    # An interrupt can come before they are set.
    _start: Callable[[_core.Control], Started] | None = None
    _started: Started | None = None
    _result: ChatResult | None = None

    def __init__(
        self, start: Callable[[_core.Control], Started], release: Callable[[_core.Session], None], work: Work
    ) -> None:
        self._start = start
        self._release = release
        self._work = work
        self._computing = False

    def __iter__(self) -> ChatStream:
        return self

    def __next__(self) -> str:
        try:
            return self._next()
        finally:
            stay_if_ending()

    def _next(self) -> str:
        with self._work.in_use:
            if self._computing:
                raise ValueError("a stream cannot be read while it computes: not from on_progress")
            if self._result is not None:
                raise StopIteration
            self._computing = True
            try:
                if self._started is None:
                    assert self._start is not None
                    self._started = self._start(self._work.control)
                piece = self._started.session.next(self._work.control)
            except _core.Cancelled:
                piece = None
            except BaseException:
                self._finish()
                raise
            finally:
                self._computing = False
            if piece is None:
                self._finish()
                raise StopIteration
            return piece

    @property
    def result(self) -> ChatResult:
        """The whole reply. Reads the rest of the stream first if it has not ended."""
        for _ in self:
            pass
        assert self._result is not None
        return self._result

    def cancel(self) -> None:
        """Asks the work to end: within 100 ms the iteration stops, with finish_reason ``cancelled``."""
        self._work.control.cancel()

    def close(self) -> None:
        """Ends the work and gives the memory back for the next conversation."""
        self._work.control.cancel()
        with self._work.in_use:
            if not self._computing:  # otherwise the call that computes finishes
                self._finish()

    def _finish(self) -> None:
        """Takes the result out of the session and hands the session back; later calls do nothing."""
        if self._result is not None:
            return
        started, self._started, self._start = self._started, None, None
        if started is None:
            self._result = ChatResult("", "cancelled", Usage(0, 0, 0), Timings(0.0, 0.0, 0.0, 0.0, 0.0))
            return
        session = started.session
        image, prefill, first_token, decode = session.timings
        self._result = ChatResult(
            text=session.text,
            finish_reason=session.finish_reason or "cancelled",
            usage=Usage(*session.usage),
            timings=Timings(
                preprocess=started.preprocess,
                image=image,
                prefill=started.waited + prefill,
                first_token=started.preprocess + started.waited + first_token,
                decode=decode,
            ),
        )
        self._release(session)

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._finish()
