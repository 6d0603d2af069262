"""Write a model file of true dimensions with random weights: for measuring speed and memory.

Example:
    python benchmarks/random_model.py --size 6b --type q4_0 -o 6b-q4_0.gguf

Blocks of random bits with suitable scales are drawn once per weight type and written again and again, so that
a file takes as long as the disk needs. Activations stay finite and of ordinary size. The same arguments give
the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from yivl_edge.cli.arguments import integer
from yivl_edge.convert.config import DecoderConfig, ImageConfig, ModelConfig, PromptConfig, VisionConfig
from yivl_edge.convert.header import TensorInfo
from yivl_edge.convert.layout import ModelKeys, plan_files
from yivl_edge.convert.metadata import general_keys, text_keys, vision_keys
from yivl_edge.convert.options import PRESETS, WEIGHT_TYPES
from yivl_edge.convert.presets import FILE_TYPES, Choice, fitting_type
from yivl_edge.convert.tensor_map import Policy, Tensor, tensors
from yivl_edge.convert.tokenizer import PieceType, TokenizerTables
from yivl_edge.convert.writer import writing

Bytes = npt.NDArray[np.uint8]

_VIT_H = VisionConfig(
    image_size=448,
    patch_size=14,
    width=1280,
    mlp_width=5120,
    blocks=32,
    blocks_run=31,
    heads=16,
    norm_epsilon=1e-5,
)
_VIT_DEMO = VisionConfig(
    image_size=112,
    patch_size=14,
    width=192,
    mlp_width=768,
    blocks=8,
    blocks_run=7,
    heads=3,
    norm_epsilon=1e-5,
)


def _decoder(*, vocab: int, width: int, mlp: int, blocks: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        context_length=4096,
        width=width,
        mlp_width=mlp,
        blocks=blocks,
        heads=heads,
        kv_heads=kv_heads,
        rms_norm_epsilon=1e-5,
        rope_theta=5e6,
    )


SIZES = {
    "6b": (_decoder(vocab=64000, width=4096, mlp=11008, blocks=32, heads=32, kv_heads=4), _VIT_H),
    "34b": (_decoder(vocab=64000, width=7168, mlp=20480, blocks=60, heads=56, kv_heads=8), _VIT_H),
    "demo": (_decoder(vocab=4096, width=256, mlp=768, blocks=6, heads=4, kv_heads=2), _VIT_DEMO),
}

IMAGE = ImageConfig(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    aspect_ratio="pad",
    pad_color=(122, 116, 104),
)

_T = GGMLQuantizationType
TYPES = tuple(dict.fromkeys([*PRESETS, *WEIGHT_TYPES]))


def choice(type_name: str, vision_type: str) -> Choice:
    """A mix of types, or one type for every decoder matrix."""
    if type_name in PRESETS:
        return Choice(type_name, vision_type)
    return Choice("q8_0", vision_type, ((r"^(token_embd|output|blk)", type_name),))


# --- Weights


@dataclass(frozen=True)
class _BlockScales:
    """Where a block holds its half-precision scale and, if any, what is added, as a multiple of the scale."""

    scale_at: int
    offset_at: int | None = None
    offset: float = 0.0
    random_sign: bool = False  # codes that are not symmetric about 0 would give all weights one mean


_BLOCKS = {
    _T.Q4_0: _BlockScales(0, random_sign=True),
    _T.Q4_1: _BlockScales(0, 2, -7.5),
    _T.Q5_0: _BlockScales(0, random_sign=True),
    _T.Q5_1: _BlockScales(0, 2, -15.5),
    _T.Q8_0: _BlockScales(0),
    _T.Q2_K: _BlockScales(80, 82, 1.5),
    _T.Q3_K: _BlockScales(108),
    _T.Q4_K: _BlockScales(0, 2, 7.5),
    _T.Q5_K: _BlockScales(0, 2, 15.5),
    _T.Q6_K: _BlockScales(208),
    _T.IQ4_NL: _BlockScales(0, random_sign=True),
    _T.IQ4_XS: _BlockScales(0),
}

# Millions of weights; a prime number of blocks, so that no two rows of a matrix are the same.
_POOL_BLOCKS = {1: 2097169, 32: 262147, 256: 32771}


class Pool:
    """Random blocks of one type, to be written again and again."""

    def __init__(self, kind: GGMLQuantizationType, seed: int) -> None:
        self._kind = kind
        generator = np.random.default_rng([seed, int(kind)])
        block, self._block_bytes = GGML_QUANT_SIZES[kind]
        count = _POOL_BLOCKS[block]
        if kind not in _BLOCKS:
            self._normal = generator.standard_normal(count, dtype=np.float32)
            self._scaled_floats: dict[float, Bytes] = {}
            return
        self._blocks = generator.integers(0, 256, (count, self._block_bytes), dtype=np.uint8)
        self._signs = generator.choice(np.array([-1, 1], np.float32), count)
        # Equal scales and minima centre the K types' weights on 0.
        if kind is _T.Q2_K:
            scales = self._blocks[:, :16]
            scales[:] = scales & 0xF | scales << 4
        elif kind in (_T.Q4_K, _T.Q5_K):
            scales = self._blocks[:, 4:16]
            scales[:, 4:8] = scales[:, 0:4]
            scales[:, 8:12] = scales[:, 8:12] & 0xF | scales[:, 8:12] << 4
        elif kind is _T.Q6_K:
            scales = self._blocks[:, 192:208].view(np.int8)
            scales[:] = scales // 4  # or the half-precision scale would be too small
        self._set_scale(1.0)
        self._unit = float(dequantize(self._blocks[:4096], kind).std())

    def _set_scale(self, scale: float) -> None:
        about = _BLOCKS[self._kind]
        scales = np.full(len(self._blocks), scale, np.float32)
        if about.random_sign:
            scales *= self._signs
        self._blocks[:, about.scale_at : about.scale_at + 2] = scales.astype(np.float16)[:, None].view(
            np.uint8
        )
        if about.offset_at is not None:
            offsets = (scales.astype(np.float16) * np.float32(about.offset)).astype(np.float16)
            self._blocks[:, about.offset_at : about.offset_at + 2] = offsets[:, None].view(np.uint8)

    def pieces(self, nbytes: int, deviation: float, start: float) -> Iterator[Bytes]:
        """``nbytes`` of weights of the given standard deviation, from a fraction ``start`` of the pool."""
        data = self._scaled(deviation).reshape(-1)
        at = int(start * (len(data) // self._block_bytes)) * self._block_bytes
        while nbytes:
            piece = data[at : at + nbytes]
            yield piece
            nbytes -= len(piece)
            at = 0

    def _scaled(self, deviation: float) -> Bytes:
        if self._kind in _BLOCKS:
            self._set_scale(deviation / self._unit)
            return self._blocks
        if deviation not in self._scaled_floats:
            values = self._normal * np.float32(deviation)
            self._scaled_floats[deviation] = quantize(values, self._kind).view(np.uint8)
        return self._scaled_floats[deviation]


def matrix_deviation(tensor: Tensor) -> float:
    """Standard deviation of the weights: outputs about as large as inputs, residual branches half so."""
    if tensor.name == "token_embd.weight":
        return 1.0
    gain = 0.5 if tensor.name.endswith(("attn_output.weight", "attn_out.weight", "ffn_down.weight")) else 1.0
    return float(gain / prod(tensor.shape[1:]) ** 0.5)


def vector(tensor: Tensor, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Biases near 0, norm weights near 1, embeddings of ordinary size."""
    values: npt.NDArray[np.float32] = generator.standard_normal(tensor.shape, dtype=np.float32)
    if tensor.name.endswith(".bias"):
        values *= 0.02
    elif tensor.name in ("v.class_embd", "v.position_embd.weight"):
        values *= 0.5
    else:
        values *= 0.1
        values += 1
    return values


# --- Tokeniser

_WORDS = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some
so these would other into has more her two like him see time could no make than first been its who now
people my made over did down only way find use may water long little very after words called just where most
know picture image photo sign person man woman child cat dog bird horse car bus train street road house
building window door room table chair bed food plate cup bottle book phone screen computer hand face hair
hat shirt dress shoes tree grass flower mountain river sea beach sky sun cloud snow rain light dark red
green blue yellow white black brown grey orange pink purple large small left right top bottom front back
side middle behind between near written text number letter shows showing standing sitting walking running
holding wearing looking playing describe detail background question answer helpful polite Human Assistant
inquisitive artificial intelligence role images carefully respond informative detailed answers
"""
_PUNCTUATION = "，。！？：；“”‘’（）《》、…—·"
_HAN = "这张图片里有几只猫狗鸟鱼它是什么颜色的在哪边上下左右中间红绿蓝黄黑白大小多少不没和人请描述写着数字文"
_SPECIAL = ("<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>", "<|System|>")
_SPECIAL_TYPES = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL, *[PieceType.USER_DEFINED] * 3)
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # by frequency


def make_tokenizer(size: int) -> TokenizerTables:
    """``size`` pieces with Yi's settings: special, bytes, merges for ordinary text, single characters."""
    ascii_letters = [chr(c) for c in range(0x21, 0x7F)]
    common = (char for char in PromptConfig.system + _HAN if "\u4e00" <= char <= "\u9fff")
    han = list(dict.fromkeys([*common, *map(chr, range(0x4E00, 0x9FA6))]))[: size // 3]
    singles = ["▁", *ascii_letters, *_PUNCTUATION, *han]
    fixed = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges: dict[str, None] = {}
    for piece in _merges(han):
        if len(merges) == size - len(fixed) - len(singles):
            break
        merges[piece] = None
    scores = [0.0] * len(fixed) + [-float(i) for i in range(len(merges) + len(singles))]
    types = [*_SPECIAL_TYPES, *[PieceType.BYTE] * 256, *[PieceType.NORMAL] * (len(merges) + len(singles))]
    return TokenizerTables(
        pieces=[*fixed, *merges, *singles],
        scores=scores,
        types=[int(kind) for kind in types],
        bos_id=1,
        eos_id=2,
        unknown_id=0,
        padding_id=0,
        special_ids=[0, 1, 2],
        add_bos=False,
        add_eos=False,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )


def _merges(han: list[str]) -> Iterator[str]:
    """Pieces that two earlier pieces make, best first, without end; some come twice."""
    yield from ("▁" * 2, "▁" * 4, "▁" * 8, "##", "###", "▁:", "..")
    rank = {letter: i for i, letter in enumerate(_LETTERS, 1)}
    pairs = sorted(
        itertools.product(_LETTERS, repeat=2), key=lambda pair: (rank[pair[0]] + 1) * (rank[pair[1]] + 1)
    )
    yield from ("".join(pair) for pair in pairs)
    yield from (f"▁{letter}" for letter in [*_LETTERS, *_LETTERS.upper()])
    words = _WORDS.split()
    for length in range(2, 16):
        for word in words:
            for text in (word, f"▁{word}"):
                if len(text) >= length:
                    yield text[:length]
    choose = random.Random(0)
    parts = ["".join(pair) for pair in pairs[:400]] + words
    while True:
        first, second = choose.choice(parts), choose.choice(parts)
        if len(first) + len(second) <= 6:
            parts.append(first + second)
        yield first + second
        yield f"▁{first}"
        yield choose.choice(han) + choose.choice(han)


# --- The file


def write_random_model(
    output: Path,
    *,
    size: str,
    type_name: str,
    vision_type: str,
    blocks: int | None = None,
    layout: Any = "single",
    seed: int = 0,
    header_only: bool = False,
) -> list[Path]:
    """Write the file or the pair, with so many decoder blocks (default: all); return the paths.

    With ``header_only``, a hole stands where the weights would be: for programs that look at sizes.
    """
    decoder, vision = SIZES[size]
    decoder = replace(decoder, blocks=blocks or decoder.blocks)
    config = ModelConfig(f"random Yi-VL {size}", decoder, vision, IMAGE)
    vision_blocks = vision.blocks_run if layout == "single" else vision.blocks
    table = list(tensors(config.sizes(), blocks=decoder.blocks, vision_blocks=vision_blocks))
    chosen, group = choice(type_name, vision_type), decoder.heads // decoder.kv_heads
    types = {
        t: fitting_type(t, chosen.wanted(t, blocks=decoder.blocks, group=group, tied=False)) for t in table
    }
    keys = ModelKeys(
        general_keys(config),
        text_keys(config, make_tokenizer(decoder.vocab_size)),
        vision_keys(config, vision_blocks),
    )
    plans = plan_files(
        output, layout, keys, types, file_type=FILE_TYPES[type_name], vision_file_type=FILE_TYPES[vision_type]
    )
    if header_only:
        for plan in plans:
            with plan.path.open("wb") as file:
                file.write(plan.header({}))
                file.truncate(plan.file_size)
        return [plan.path for plan in plans]
    by_name = {tensor.name: tensor for tensor in table}
    generator = np.random.default_rng(seed)
    pools: dict[GGMLQuantizationType, Pool] = {}

    def data(info: TensorInfo) -> Iterator[npt.NDArray[Any]]:
        tensor, type = by_name[info.name], GGMLQuantizationType(info.type)
        if tensor.rule.policy is Policy.VECTOR:
            yield vector(tensor, generator)
            return
        if type not in pools:
            pools[type] = Pool(type, seed)
        yield from pools[type].pieces(info.nbytes, matrix_deviation(tensor), generator.random())

    with writing(plans) as files:
        for info in (info for plan in plans for info in plan.tensors):
            for piece in data(info):
                files.write(info.name, piece.reshape(-1).view(np.uint8))
        files.finish({})
    return [plan.path for plan in plans]


def main() -> None:
    """Write what the command line asks for; print size, time and peak memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), required=True)
    parser.add_argument("--type", choices=TYPES, default="q4_0", help="of the decoder (default: q4_0)")
    parser.add_argument(
        "--vision-type",
        choices=("f32", "f16", "bf16", "q8_0"),
        help="of the ViT and the projector (default: as --type for f32, f16 and bf16, otherwise q8_0)",
    )
    parser.add_argument("--blocks", type=integer(1), metavar="N", help="of the decoder (default: all)")
    parser.add_argument("--layout", choices=("single", "pair"), default="single", help="(default: single)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument(
        "--header-only",
        action="store_true",
        help="leave a hole where the weights would be, for yivl-edge inspect",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.gguf")
    arguments = parser.parse_args()
    vision_type = arguments.vision_type
    if vision_type is None:
        vision_type = arguments.type if arguments.type in ("f32", "f16", "bf16") else "q8_0"

    began = time.perf_counter()
    paths = write_random_model(
        arguments.output,
        size=arguments.size,
        type_name=arguments.type,
        vision_type=vision_type,
        blocks=arguments.blocks,
        layout=arguments.layout,
        seed=arguments.seed,
        header_only=arguments.header_only,
    )
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for path in paths:
        print(f"wrote {path} ({path.stat().st_size / 1e9:.2f} GB)")
    print(f"{seconds:.1f} s, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
