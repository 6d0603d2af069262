"""How long the stages of an answer take, how much work they are, and what the machine can do at most."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from yivl_edge import _core
from yivl_edge.messages import Messages
from yivl_edge.model import Model
from yivl_edge.replies import ChatResult

_FIRST_ORDINARY_ID = 259  # after the special and the byte pieces
_READ_BYTES = 1 << 28, 1 << 30  # at least, and at most
_TRIES = 5
_TRY_SECONDS = 0.05


@dataclass(frozen=True)
class Ceilings:
    """What some threads of this machine reach together: the best of several tries each."""

    read_bytes_per_second: float
    float_per_second: float
    """float32 operations, a multiply-add being two."""
    packed_per_second: float
    """The same of the unit for packed operands; 0 where the instruction set in use has none."""
    packed_unit: str
    """``bfloat16`` (AMX tiles), ``int16`` or ``float16`` (a GPU's tensor cores), all with 32-bit sums; empty where
    there is none."""
    read_how: str = "read"
    """``read``; on a GPU ``copied``: bytes read and written of a copy within its memory."""

    def per_second(self, unit: str) -> float:
        """Operations of the unit ``float32`` or `packed_unit`."""
        return self.packed_per_second if unit == self.packed_unit else self.float_per_second

    def __str__(self) -> str:
        memory = f"{self.read_bytes_per_second / 1e9:.1f} GB/s {self.read_how}"
        text = f"{memory}, {self.float_per_second / 1e12:.3f} TFLOP/s float32"
        return text + (
            f", {self.packed_per_second / 1e12:.3f} TFLOP/s {self.packed_unit}" if self.packed_unit else ""
        )


@dataclass(frozen=True)
class Kernel:
    """What the kernels of one name did together."""

    name: str
    calls: int
    seconds: float
    bytes: int
    """Read and written of memory, each once; 0 where that is not counted, as `flop`."""
    flop: int


def measure_ceilings(n_threads: int, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """The ceilings of so many threads with the instruction set in use. Takes some seconds and up to 1 GiB."""
    machine = _core.Ceilings(_core.isa_name(), n_threads)
    values = np.ones(_bytes_to_read() // 4, np.float32)

    def read(times: int) -> int:
        for _ in range(times):
            machine.read(values)
        return times * values.nbytes

    return Ceilings(
        _best_rate(read, clock),
        _best_rate(machine.multiply_add, clock),
        _best_rate(machine.packed_multiply_add, clock),
        _packed_unit(),
    )


def device_ceilings(model: Model) -> Ceilings:
    """What the model's GPU reaches, in the same way. Takes some seconds and up to 512 MiB of its memory."""
    core = model._model
    memory, floats, halves = (
        # So long that buffers, which are allocated anew, take no share of it.
        _best_rate(partial(core.exert, unit), try_seconds=0.5)
        for unit in (_core.Unit.memory, _core.Unit.float32, _core.Unit.half)
    )
    return Ceilings(memory, floats, halves, "float16", "copied")


def _bytes_to_read() -> int:
    """Far more than the last cache holds, where Linux says how much that is."""
    least, most = _READ_BYTES
    try:
        kibibytes = int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().rstrip("K\n"))
    except (OSError, ValueError):
        return least
    return min(max(8 * kibibytes << 10, least), most)


def _best_rate(
    work: Callable[[int], int],
    clock: Callable[[], float] = time.perf_counter,
    try_seconds: float = _TRY_SECONDS,
) -> float:
    """Of work that takes a number of rounds and returns how much that was: the most done in a second."""
    rounds, rates = 1, list[float]()
    while len(rates) < _TRIES:
        begin = clock()
        done = work(rounds)
        seconds = clock() - begin
        if done == 0:
            return 0.0
        if seconds < try_seconds:
            rounds *= 2
        else:
            rates.append(done / seconds)
    return max(rates)


def _packed_unit() -> str:
    if _core.Ceilings(_core.isa_name(), 1).packed_multiply_add(1) == 0:
        return ""
    return "bfloat16" if _core.isa_name() == "amx" else "int16"


def cpu_info(key: str) -> str:
    """What Linux knows of the first core, such as its ``model name`` or ``flags``; empty where it does not say."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def machine_name() -> str:
    """The CPU's model, or its architecture where the system does not say, and how many CPUs there are."""
    return f"{cpu_info('model name') or platform.machine()}, {os.cpu_count()} CPUs"


def peak_resident_bytes() -> int:
    """The most memory that this process ever had resident, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stages:
    """The stages of an answer, run one at a time with one model; what they cost in seconds, and in work.

    Args:
        model: The model.
        path: Its file; of a pair, the text model.
        mmproj: Of a pair, the file with the vision tower.
    """

    def __init__(self, model: Model, path: str, mmproj: str | None = None) -> None:
        self.model = model
        self._core = model._model
        self._random = np.random.default_rng(0)
        sizes, types = dict[str, int](), dict[str, str]()
        for file in (mmproj, path):
            for t in _core.GgufFile.open(file).tensors if file else ():
                sizes[t.name], types[t.name] = t.nbytes, t.type
        read = [name for name in sizes if name.startswith(("blk.", "output"))]
        if "output.weight" not in sizes:
            read.append("token_embd.weight")  # is the head, too
        self._decoder_bytes = sum(sizes[name] for name in read)
        # What most of the work is done with: the MLP's matrices.
        self.prefill_unit = self._unit(types["blk.0.ffn_up.weight"])
        """The unit that computes the decoder's products: ``float32`` or the ceilings' `packed_unit`."""
        self.image_unit = self._unit(types.get("v.blk.0.ffn_up.weight", "F32"))
        """The same of the vision tower."""

    def _unit(self, weight_type: str) -> str:
        if self.on_gpu:
            return "float32" if weight_type == "F32" else "float16"
        return _packed_unit() if _core.Ceilings(_core.isa_name(), 1).packs(weight_type) else "float32"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes, with all layers or some."""
        return self.model.device.startswith("cuda:")

    # --- Runs: each computes everything anew

    def encode_image(self, picture: NDArray[np.uint8]) -> float:
        """Seconds of vision tower and projector; the preprocessing of the picture (H, W, 3) is not counted."""
        pixels = self.model.preprocess(picture)
        with self.model._borrowed_session() as session:
            begin = time.perf_counter()
            session.embed_image(pixels, _core.Control())
            return time.perf_counter() - begin

    def prefill(self, prompt_tokens: int) -> float:
        """Seconds of a prompt of random text."""
        with self.model._borrowed_session() as session:
            self._generate(session, self._ids(prompt_tokens), 1)
            return session.timings[1]

    def decode(self, context: int, tokens: int, runs: int) -> list[float]:
        """Seconds per token of each run, after `context` tokens of random text, which are read once."""
        seconds = []
        prompt = self._ids(context)
        with self.model._borrowed_session() as session:
            self._generate(session, prompt, 2)  # reads the prompt, and warms up
            for _ in range(runs):
                spent, decoded = 0.0, 0
                while decoded < tokens:  # a model may end its reply early: then another one begins
                    prompt[-1:] = self._ids(1)
                    decoded += self._generate(session, prompt, tokens - decoded + 1) - 1
                    spent += session.timings[3]
                seconds.append(spent / tokens)
        return seconds

    def answer(self, picture: NDArray[np.uint8] | str, messages: Messages) -> ChatResult:
        """A reply of one token about a picture other than the last run's."""
        with self.model._borrowed_session() as session:
            self._generate(session, self._ids(1), 1)  # takes the place of the prompt that is cached
        return self.model.chat(picture, messages, max_tokens=1, temperature=0.0)

    def _ids(self, count: int) -> list[int]:
        vocab = self._core.config.decoder.vocab_size
        return [int(i) for i in self._random.integers(min(_FIRST_ORDINARY_ID, vocab - 1), vocab, count)]

    def _generate(self, session: _core.Session, prompt: list[int], tokens: int) -> int:
        """Greedily up to so many tokens; how many came."""
        session.begin(prompt, None, tokens, _core.SamplingOptions(temperature=0.0), [])
        while session.next(_core.Control()) is not None:
            pass
        return session.usage[2]

    def kernels(self) -> list[Kernel]:
        """The GPU's kernels since the last call, the longest first; the first call begins to time them."""
        return [Kernel(*kernel) for kernel in self._core.profile()]

    def decode_kernels(self, context: int, tokens: int) -> list[Kernel]:
        """The GPU's kernels of so many tokens after `context` tokens of random text."""
        prompt = self._ids(context)
        with self.model._borrowed_session() as session:
            self._generate(session, prompt, 1)
            prompt[-1:] = self._ids(1)
            self.kernels()
            self._generate(session, prompt, tokens)
        return self.kernels()

    # --- The work of a run

    @property
    def image_flop(self) -> float:
        """Operations of `encode_image`."""
        vision = self._core.config.vision
        assert vision is not None
        n, w, d = vision.n_patches, vision.width, self._core.config.decoder.width
        per_block = 2 * (n + 1) * (4 * w * w + 2 * w * vision.mlp_width) + 4 * (n + 1) ** 2 * w
        return float(vision.n_blocks * per_block + 2 * n * (3 * vision.patch_size**2 * w + w * d + d * d))

    def prefill_flop(self, prompt_tokens: int) -> float:
        """Operations of a prompt of that length and of the logits after it; each token sees those before it.

        The last layer computes of all tokens but the last only keys and values.
        """
        c, n = self._core.config.decoder, prompt_tokens
        q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        keys_and_values = 4 * n * c.width * kv
        per_token = 2 * (2 * c.width * q + 3 * c.width * c.mlp_width)
        layer = keys_and_values + n * per_token + 2 * n**2 * q
        last_layer = keys_and_values + per_token + 4 * n * q
        return float((c.n_layers - 1) * layer + last_layer + 2 * c.width * c.vocab_size)

    def decode_bytes(self, context: int, tokens: int) -> float:
        """Bytes that one token of `decode` reads, on average: the decoder's weights, keys and values."""
        c = self._core.config.decoder
        row = 2 * c.n_kv_heads * c.head_dim * np.dtype(np.float32).itemsize
        return float(self._decoder_bytes + c.n_layers * (context + tokens // 2) * row)
