"""Model: open a file, talk about a picture."""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from yivl_edge import _core, data
from yivl_edge.bounds import integer, real, threads
from yivl_edge.hashes import check_hashes
from yivl_edge.image import DEFAULT_MAX_PIXELS, ImageSource, load_image
from yivl_edge.messages import Messages, checked_text, normalise
from yivl_edge.replies import (
    CancelFlag,
    ChatResult,
    ChatStream,
    Prefill,
    Progress,
    Started,
    Work,
    stay_if_ending,
    working,
)

# Sessions kept after a conversation, each with a KV cache: as many as callers that usually work at once.
_IDLE_SESSIONS = 4

# How often a reply that waits for a prefill looks whether it is to end.
_SECONDS_BETWEEN_LOOKS = 0.02


def _stops(stop: str | Sequence[str] | None) -> list[str]:
    if stop is None:
        return []
    if not isinstance(stop, Sequence):
        raise TypeError(f"stop: expected a string or a list of strings, found {stop!r}")
    return [checked_text("stop", text) for text in ([stop] if isinstance(stop, str) else stop)]


def _check_progress(on_progress: Progress | None) -> None:
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress: expected a function, found {on_progress!r}")


def _check_cancel(cancel: CancelFlag | None) -> None:
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise TypeError(f"cancel: expected an object with is_set(), found {cancel!r}")


def _turns(messages: Messages, image: bool) -> list[tuple[str, str]]:
    picture, turns = normalise(None, messages)
    if picture is not None and not image:
        raise ValueError("the messages hold a picture: expected image=True")
    return turns


class Model:
    """A Yi-VL model, opened from a GGUF file.

    Any number of threads may use one Model. Weights are mapped from the file and shared; each conversation that runs at
    the same time as another has its own KV cache.

    Args:
        path: The model file; in the pair layout, the text model.
        mmproj: In the pair layout, the file with the vision tower. Without it a text model answers text only.
        device: ``"cpu"``; ``"cuda"`` or ``"cuda:1"`` for an NVIDIA GPU; ``"auto"`` for a GPU where the model fits and
            the CPU elsewhere, or where ``YIVL_ISA`` is set.
        n_gpu_layers: Of the decoder's layers, how many a GPU runs; the CPU runs the others. None for all with
            ``"auto"``, and with ``"cuda"`` for as many as its free memory has room for.
        n_ctx: Context length in tokens; None for the model's own (4096). Less saves memory.
        n_threads: Threads to compute with; None for one per physical core.
        max_image_pixels: The largest picture accepted, in pixels (width x height).
        verify: Compare the header and every tensor with the SHA-256 that the file carries, which reads the whole file.
        on_progress: Called while loading.

    Raises:
        ModelFileError: The file is missing, damaged or not a Yi-VL model; says what was expected and found. With
            `verify` also: it carries no hashes.
        DeviceError: The GPU asked for cannot be used; says what is missing.
        MemoryError: Weights or KV cache do not fit the memory; says what was needed, and on a GPU what is free.
        ValueError: An argument out of range, or ``YIVL_ISA`` names an instruction set that this CPU lacks.
        TypeError: An argument of another type.
        OSError: The system has no more threads to give.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mmproj: str | os.PathLike[str] | None = None,
        device: str = "auto",
        n_gpu_layers: int | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
        verify: bool = False,
        on_progress: Progress | None = None,
    ) -> None:
        n_threads = threads(n_threads) or 0
        self._n_ctx = 0 if n_ctx is None else integer("n_ctx", n_ctx, 1, 2**63 - 1)
        if n_gpu_layers is not None:
            n_gpu_layers = integer("n_gpu_layers", n_gpu_layers, 0, 2**31 - 1)
        max_image_pixels = integer("max_image_pixels", max_image_pixels, 1, 2**63 - 1)
        _check_progress(on_progress)
        if verify:
            for file in (path, mmproj):
                if file is not None:
                    check_hashes(file, n_threads=n_threads or None, on_progress=on_progress)
        with working(on_progress) as control:
            self._model = _core.Model.open(
                os.fsencode(path),
                b"" if mmproj is None else os.fsencode(mmproj),
                n_threads,
                control,
                checked_text("device", device),
                self._n_ctx,
                n_gpu_layers,
            )
        self._max_image_pixels = max_image_pixels
        # The garbage collector may end a stream, which gives its session back, while this thread holds the lock.
        self._lock = threading.RLock()
        self._prefills: weakref.WeakSet[Prefill] = weakref.WeakSet()
        self._idle: list[_core.Session] = [_core.Session(self._model, self._n_ctx)]

    @classmethod
    def demo(
        cls,
        *,
        device: str = "auto",
        n_gpu_layers: int | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        max_image_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Model:
        """The small model that comes with the package, for drawings of shapes, short words and numbers.

        Args:
            device: As for `Model`.
            n_gpu_layers: As for `Model`.
            n_ctx: As for `Model`.
            n_threads: As for `Model`.
            max_image_pixels: As for `Model`.
        """
        return cls(
            data.MODEL,
            device=device,
            n_gpu_layers=n_gpu_layers,
            n_ctx=n_ctx,
            n_threads=n_threads,
            max_image_pixels=max_image_pixels,
        )

    @property
    def config(self) -> _core.Config:
        """Sizes of the vision tower and the decoder, preprocessing, prompt and defaults, as read from the file."""
        return self._model.config

    @property
    def device(self) -> str:
        """What computes: the instruction set in use, e.g. ``"avx512"``, or the GPU, e.g. ``"cuda:0 NVIDIA L4"``."""
        return self._model.backend_name

    @property
    def n_gpu_layers(self) -> int:
        """How many of the decoder's layers a GPU runs; 0 where the CPU does everything."""
        return self._model.n_gpu_layers

    @property
    def n_ctx(self) -> int:
        """The context in tokens: what prompt and reply must fit together."""
        return self._n_ctx or self.config.decoder.context_length

    @property
    def n_threads(self) -> int:
        """Threads that compute on the CPU."""
        return self._model.n_threads

    @overload
    def chat(
        self,
        image: ImageSource | None,
        messages: Messages,
        *,
        system: str | None = ...,
        max_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[False] = ...,
        on_progress: Progress | None = ...,
        cancel: CancelFlag | None = ...,
    ) -> ChatResult: ...

    @overload
    def chat(
        self,
        image: ImageSource | None,
        messages: Messages,
        *,
        system: str | None = ...,
        max_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        repetition_penalty: float = ...,
        seed: int | None = ...,
        stop: str | Sequence[str] | None = ...,
        stream: Literal[True],
        on_progress: Progress | None = ...,
        cancel: CancelFlag | None = ...,
    ) -> ChatStream: ...

    def chat(
        self,
        image: ImageSource | None,
        messages: Messages,
        *,
        system: str | None = None,
        max_tokens: int = 1024,
        temperature: float = 0.2,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        on_progress: Progress | None = None,
        cancel: CancelFlag | None = None,
    ) -> ChatResult | ChatStream:
        """Replies to a conversation about a picture, or to a text-only one.

        To go on asking, pass all earlier turns again: what the model has already read of them, the picture above
        all, is not computed again (``usage.cached_tokens``).

        Args:
            image: A path, encoded bytes, a PIL image, a uint8 array (H, W, 3), or None for text only.
            messages: One question, or a list of ``{"role": "system"|"user"|"assistant", "content": str}`` that ends
                with the user's; OpenAI content parts with one ``image_url`` are accepted.
            system: Takes the place of the model's default system text.
            max_tokens: Longest reply in tokens. Prompt and reply must fit the context together.
            temperature: 0 for the most likely token each time; higher is more varied.
            top_k: Sample from the k most likely tokens only; 0 for all.
            top_p: Sample from the smallest set of tokens with at least this probability; 1 for all.
            min_p: Sample from tokens at least this fraction as likely as the most likely one; 0 for all.
            repetition_penalty: Above 1, tokens of the prompt and the reply become less likely.
            seed: 0 to 2^64 - 1. Same seed, same text, on any number of threads; None for a random one.
            stop: Texts that end the reply, beside the model's own (``###`` and a new ``Human:`` turn).
            stream: Return an iterator over the pieces of the reply instead of the whole.
            on_progress: Called with stage and fraction; what it raises ends the work and is passed on.
            cancel: Ends the reply within 100 ms once its ``is_set()`` is true.

        Returns:
            ChatResult, or with ``stream=True`` a ChatStream.

        Raises:
            ValueError: A conversation or option outside what is described here; ImageError for a picture that cannot
                be used; ContextOverflowError if prompt and max_tokens exceed the context (before any computing).
            TypeError: An argument of another type.
            RuntimeError: The model was opened in the process that this one was forked from.
        """
        picture, turns = normalise(image, messages, system)
        ids = self._ids(turns, picture is not None)
        sampling = _core.SamplingOptions(
            temperature=real("temperature", temperature),
            top_k=integer("top_k", top_k, 0, 2**31 - 1),
            top_p=real("top_p", top_p),
            min_p=real("min_p", min_p),
            repetition_penalty=real("repetition_penalty", repetition_penalty),
            seed=secrets.randbits(63) if seed is None else integer("seed", seed, 0, 2**64 - 1),
        )
        max_tokens = integer("max_tokens", max_tokens, 1, 2**63 - 1)
        stops = _stops(stop)
        _check_progress(on_progress)
        _check_cancel(cancel)
        self._model.check(ids, max_tokens, sampling, stops, self._n_ctx)
        began = time.perf_counter()
        if stream and isinstance(picture, np.ndarray):
            picture = (
                picture.copy()
            )  # it is looked at when the stream is read, and is the caller's until then
        array = None if picture is None else load_image(picture, max_pixels=self._max_image_pixels)
        reading = time.perf_counter() - began

        def start(control: _core.Control) -> Started:
            started = time.perf_counter()
            pixels = None if array is None else self._model.preprocess(array, control)
            preprocessed = time.perf_counter()
            self._wait_for_prefill(ids, pixels, control, on_progress)
            waited = time.perf_counter() - preprocessed
            session = self._acquire(ids, pixels)
            session.begin(ids, pixels, max_tokens, sampling, stops)
            return Started(session, reading + preprocessed - started, waited)

        reply = ChatStream(start, self._give_back, Work(on_progress, cancel))
        return reply if stream else reply.result

    def prefill(
        self,
        image: ImageSource | None,
        messages: Messages = (),
        *,
        system: str | None = None,
        on_progress: Progress | None = None,
        cancel: CancelFlag | None = None,
    ) -> bool:
        """Computes what the replies to a conversation that begins like this need: the picture above all.

        For the time before a question is there, in a thread of its own. A `chat` that goes on from this beginning waits
        until it is computed, and then computes what is new.

        Args:
            image: As in `chat`.
            messages: The turns that are known: none, those until now, or all.
            system: As in `chat`.
            on_progress: Called with stage and fraction; what it raises ends the work and is passed on.
            cancel: Ends the work within 100 ms once its ``is_set()`` is true.

        Returns:
            Whether all is computed: False after a cancel.

        Raises:
            ValueError, TypeError, RuntimeError: As in `chat`; ContextOverflowError if this exceeds the context.
        """
        picture, turns = normalise(image, messages, system, ends=("", "system", "user", "assistant"))
        ids = self._beginning(turns, picture is not None)
        _check_progress(on_progress)
        _check_cancel(cancel)
        if picture is not None:
            self._require_vision()
        prefill = Prefill(ids)

        def note(stage: str, fraction: float) -> None:
            prefill.reached = (stage, fraction)
            if on_progress is not None:
                on_progress(stage, fraction)

        work = Work(note, cancel)
        with self._lock:
            self._prefills.add(prefill)
        with work.in_use:
            try:
                pixels = None
                if picture is not None:
                    array = load_image(picture, max_pixels=self._max_image_pixels)
                    pixels = self._model.preprocess(array, work.control)
                    prefill.looks_at(pixels)
                with self._borrowed_session(ids, pixels) as session:
                    session.prefill(ids, pixels, work.control)
            except _core.Cancelled:
                computed = False
            else:
                computed = True
            finally:
                prefill.done.set()
                with self._lock:
                    self._prefills.discard(prefill)
        stay_if_ending()
        return computed

    def _wait_for_prefill(
        self,
        ids: Sequence[int],
        pixels: NDArray[np.float32] | None,
        control: _core.Control,
        on_progress: Progress | None,
    ) -> None:
        """Until no prefill is at work on the beginning of this prompt: two would take twice as long, and the memory."""
        with self._lock:
            prefills = list(self._prefills)
        for prefill in prefills:
            while prefill.begins(ids, pixels) and not prefill.done.wait(_SECONDS_BETWEEN_LOOKS):
                control.check()
                if on_progress is not None and prefill.reached is not None:
                    on_progress(*prefill.reached)

    def _beginning(self, turns: list[tuple[str, str]], image: bool) -> list[int]:
        """The ids with which every prompt begins that goes on from these turns."""
        if turns and turns[-1][0] == "user":
            return self._ids(turns, image)
        # Tokens that a question's first characters could be a part of differ between these two.
        one, other = (self._ids([*turns, ("user", text)], image) for text in ("a", "\u4e00"))
        return [
            id
            for id, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
        ]

    def preprocess(self, image: ImageSource) -> NDArray[np.float32]:
        """The pixels that the vision tower reads: padded, resized, normalised; (3, S, S)."""
        self._require_vision()
        array = load_image(image, max_pixels=self._max_image_pixels)
        with working() as control:
            return self._model.preprocess(array, control)

    def vision_features(self, image: ImageSource) -> NDArray[np.float32]:
        """What the vision tower makes of a picture: (N, vision width), patches in row order."""
        pixels = self.preprocess(image)
        with working() as control, self._borrowed_session() as session:
            return session.vision_features(pixels, control)

    def encode_image(self, image: ImageSource) -> NDArray[np.float32]:
        """What the decoder reads of a picture: (N, decoder width)."""
        pixels = self.preprocess(image)
        with working() as control, self._borrowed_session() as session:
            return session.encode_image(pixels, control)

    def prompt(self, messages: Messages, image: bool = True) -> str:
        """The prompt text of a conversation, with ``<image_placeholder>`` where the picture goes if `image`."""
        turns = _turns(messages, image)
        with working():
            return self._model.prompt_text(turns, image)

    def prompt_ids(self, messages: Messages, image: bool = True) -> list[int]:
        """The prompt's token ids, with -200 where the picture goes if `image`."""
        return self._ids(_turns(messages, image), image)

    def _ids(self, turns: list[tuple[str, str]], image: bool) -> list[int]:
        with working():
            return self._model.prompt_ids(turns, image)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as the reference's tokeniser makes them; ValueError for a lone surrogate."""
        with working():
            return self._model.tokenize(checked_text("text", text))

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are skipped."""
        checked = [integer(f"ids[{i}]", n, -(2**31), 2**31 - 1) for i, n in enumerate(ids)]
        with working():
            return self._model.detokenize(checked)

    def logits(self, image: ImageSource | None, messages: Messages) -> NDArray[np.float32]:
        """Logits of every position of a conversation's prompt: (T, V), image rows included."""
        picture, turns = normalise(image, messages)
        pixels = None if picture is None else self.preprocess(picture)
        ids = self._ids(turns, picture is not None)
        with working() as control, self._borrowed_session() as session:
            return session.logits(ids, pixels, control)

    def _require_vision(self) -> None:
        if self.config.vision is None:
            raise ValueError(
                "this model file has no vision tower: open it with mmproj=..., or ask without a picture (image=None)"
            )

    def _acquire(self, ids: Sequence[int], pixels: NDArray[np.float32] | None) -> _core.Session:
        """An idle session, the one that knows most of this conversation; a new one if all are at work."""
        with self._lock:
            if self._idle:
                best = max(self._idle, key=lambda session: session.cached_prefix(ids, pixels))
                self._idle.remove(best)
                return best
        return _core.Session(self._model, self._n_ctx)

    def _give_back(self, session: _core.Session) -> None:
        with self._lock:
            if len(self._idle) < _IDLE_SESSIONS:
                self._idle.append(session)

    @contextmanager
    def _borrowed_session(
        self, ids: Sequence[int] = (), pixels: NDArray[np.float32] | None = None
    ) -> Iterator[_core.Session]:
        session = self._acquire(ids, pixels)
        try:
            yield session
        finally:
            self._give_back(session)
