"""Our side of compare_llama_cpp.py."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from worker import serve
from yivl_edge import Model
from yivl_edge.image import load_image
from yivl_edge.measure import Stages, measure_ceilings, peak_resident_bytes


def _messages(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


class YivlEdge:
    """A text model and its mmproj file."""

    def open(self, text: str, mmproj: str, n_threads: int) -> float:
        """Seconds until both files are ready for the first question."""
        vars(self).clear()  # the model before this one: the peak is one model's
        began = time.perf_counter()
        self._model = Model(text, mmproj=mmproj, n_threads=n_threads)
        seconds = time.perf_counter() - began
        self._stages = Stages(self._model, text, mmproj)
        return seconds

    def units(self) -> dict[str, str]:
        """What computes the products of each stage."""
        return {"image": self._stages.image_unit, "prefill": self._stages.prefill_unit}

    def prompt(self, system: str, question: str) -> str:
        """The text of the prompt, with a place for the picture."""
        return self._model.prompt(_messages(system, question))

    def warm_up(self, picture: str | None) -> None:
        """Use every weight once; without a picture, those of the text model."""
        if picture is not None:
            self._stages.encode_image(load_image(picture))
        self._stages.decode(4, 1, 1)

    def answer(self, picture: str, system: str, question: str) -> dict[str, float]:
        """Seconds of image encoding, of prefill and from the picture's file to the first token."""
        reply = self._stages.answer(picture, _messages(system, question))
        times = reply.timings
        tokens = reply.usage.prompt_tokens
        return {
            "image": times.image,
            "prefill": times.prefill,
            "first_token": times.first_token,
            "tokens": tokens,
            "image_flop": self._stages.image_flop,
            "prefill_flop": self._stages.prefill_flop(tokens),
        }

    def decode(self, context: int, tokens: int, runs: int) -> dict[str, Any]:
        """Seconds per token of each run, and the bytes that a token reads."""
        seconds = self._stages.decode(context, tokens, runs)
        return {"seconds": seconds, "bytes": self._stages.decode_bytes(context, tokens)}

    def ceilings(self, n_threads: int) -> dict[str, Any]:
        """What so many threads of this machine can do at most."""
        return asdict(measure_ceilings(n_threads))

    def peak(self) -> int:
        """Bytes of resident memory at its highest."""
        return peak_resident_bytes()


def main() -> None:
    """Serve compare_llama_cpp.py."""
    side = YivlEdge()
    actions = ("open", "units", "prompt", "answer", "warm_up", "decode", "ceilings", "peak")
    serve({name: getattr(side, name) for name in actions})


if __name__ == "__main__":
    main()
