"""llama.cpp's side of compare_llama_cpp.py: runs in the environment of llama-cpp-python 0.3.36.

Calls what llama.cpp's own programs for pictures call: libmtmd for the picture, llama_decode for the text model.
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from worker import serve

_FIRST_ORDINARY_ID = 259  # after the special and the byte pieces


@llama_cpp.llama_log_callback
def _no_log(_level: int, _text: bytes, _data: Any) -> None:
    pass


def _check(code: int, what: str) -> None:
    if code != 0:
        raise RuntimeError(f"{what} returned {code}")


def _is_image(chunk: Any) -> bool:
    kind: int = mtmd_cpp.mtmd_input_chunk_get_type(chunk)
    return kind == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE


class LlamaCpp:
    """A text model and its mmproj file."""

    def __init__(self) -> None:
        llama_cpp.llama_log_set(_no_log, None)
        mtmd_cpp.mtmd_log_set(_no_log, None)
        mtmd_cpp.mtmd_helper_log_set(_no_log, None)
        llama_cpp.llama_backend_init()
        self._model: Any = None
        self._random = np.random.default_rng(0)

    def about(self) -> dict[str, str]:
        """Version, and the instruction sets it is built for."""
        info = llama_cpp.llama_print_system_info().decode()
        return {"version": llama_cpp.__version__, "system_info": info}

    def open(
        self, text: str, mmproj: str, n_threads: int, flash: bool, image_flash: bool, ubatch: int
    ) -> float:
        """Seconds until both files are ready for the first question."""
        self._close()
        began = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(
            text.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {text}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = 4096
        params.n_batch = params.n_ubatch = self._batch = ubatch
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(flash)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu = False
        vision.print_timings = False
        vision.n_threads = n_threads
        vision.flash_attn_type = int(image_flash)
        vision.warmup = False  # a whole picture; what is measured is warmed up by a round of its own
        self._vision = mtmd_cpp.mtmd_init_from_file(mmproj.encode(), self._model, vision)
        if not self._vision:
            raise RuntimeError(f"llama.cpp cannot load {mmproj}")
        return time.perf_counter() - began

    def _close(self) -> None:
        if self._model:
            mtmd_cpp.mtmd_free(self._vision)
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def answer(self, picture: str, before: str, after: str) -> dict[str, float]:
        """Seconds of image encoding, of prefill and from the picture's file to the first token; the prompt's length."""
        llama_cpp.llama_memory_clear(self._memory, True)
        began = time.perf_counter()
        with self._chunks(picture, before, after) as chunks:
            image = self._encode(chunks)
            reading = time.perf_counter()
            positions = self._read(chunks)
            prefill = time.perf_counter() - reading
            self._likeliest()
            first_token = time.perf_counter() - began
        return {"image": image, "prefill": prefill, "first_token": first_token, "tokens": positions}

    def warm_up(self, picture: str | None) -> None:
        """Use every weight once; without a picture, those of the text model."""
        if picture is not None:
            with self._chunks(picture, "", "") as chunks:
                self._encode(chunks)
        self.decode(4, 1, 1)

    def decode(self, context: int, tokens: int, runs: int) -> list[float]:
        """Seconds per token of each run, after so many tokens of random text."""
        llama_cpp.llama_memory_clear(self._memory, True)
        ids = self._random.integers(
            _FIRST_ORDINARY_ID, llama_cpp.llama_vocab_n_tokens(self._vocab), context + 1, dtype=np.int32
        )
        for first in range(0, context, self._batch):
            self._decode(ids[first : min(first + self._batch, context)])
        self._decode(ids[-1:])  # alone, to warm up
        seconds = []
        for _ in range(runs):
            llama_cpp.llama_memory_seq_rm(self._memory, 0, context, -1)
            token = ids[-1:]
            began = time.perf_counter()
            for _ in range(tokens):
                self._decode(token)
                token = np.array([self._likeliest()], np.int32)
            seconds.append((time.perf_counter() - began) / tokens)
        return seconds

    def peak(self) -> int:
        """Bytes of resident memory at its highest."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # --- Steps

    @contextmanager
    def _chunks(self, picture: str, before: str, after: str) -> Iterator[list[Any]]:
        """The prompt's pieces: text, picture, text."""
        bitmap = mtmd_cpp.mtmd_helper_bitmap_init_from_file(self._vision, picture.encode(), False)
        if not bitmap:
            raise RuntimeError(f"llama.cpp cannot read {picture}")
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            prompt = before.encode() + mtmd_cpp.mtmd_default_marker() + after.encode()
            text = mtmd_cpp.mtmd_input_text(prompt, len(prompt), True, False)
            bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
            _check(mtmd_cpp.mtmd_tokenize(self._vision, chunks, text, bitmaps, 1), "mtmd_tokenize")
            count = mtmd_cpp.mtmd_input_chunks_size(chunks)
            yield [mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(count)]
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)

    def _encode(self, chunks: list[Any]) -> float:
        (image,) = filter(_is_image, chunks)
        began = time.perf_counter()
        _check(mtmd_cpp.mtmd_encode_chunk(self._vision, image), "mtmd_encode_chunk")
        return time.perf_counter() - began

    def _read(self, chunks: list[Any]) -> int:
        """Compute the whole prompt, of the picture that is encoded; how many positions it has."""
        past = llama_cpp.llama_pos(0)
        for i, chunk in enumerate(chunks):
            if _is_image(chunk):
                code = mtmd_cpp.mtmd_helper_decode_image_chunk(
                    self._vision,
                    self._context,
                    chunk,
                    mtmd_cpp.mtmd_get_output_embd(self._vision),
                    past.value,
                    0,
                    self._batch,
                    ctypes.byref(past),
                    mtmd_cpp.mtmd_helper_post_decode_callback(),
                    None,
                )
            else:
                code = mtmd_cpp.mtmd_helper_eval_chunk_single(
                    self._vision,
                    self._context,
                    chunk,
                    past.value,
                    0,
                    self._batch,
                    i == len(chunks) - 1,
                    ctypes.byref(past),
                )
            _check(code, "decoding the prompt")
        llama_cpp.llama_synchronize(self._context)
        return past.value

    def _decode(self, ids: np.ndarray[Any, Any]) -> None:
        tokens = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        _check(
            llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))),
            "llama_decode",
        )
        llama_cpp.llama_synchronize(self._context)

    def _likeliest(self) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        count = llama_cpp.llama_vocab_n_tokens(self._vocab)
        return int(np.ctypeslib.as_array(logits, (count,)).argmax())


def main() -> None:
    """Serve compare_llama_cpp.py."""
    side = LlamaCpp()
    actions = ("about", "open", "answer", "warm_up", "decode", "peak")
    serve({name: getattr(side, name) for name in actions})


if __name__ == "__main__":
    main()
