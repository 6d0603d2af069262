"""Which tensor gets which type: llama.cpp's mixes, overrides by name, and what fits a tensor's rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from yivl_edge.convert.options import WEIGHT_TYPES, check_choice
from yivl_edge.convert.tensor_map import Part, Policy, Tensor

Q = GGMLQuantizationType

FILE_TYPES: dict[str, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q5_1": LlamaFileType.MOSTLY_Q5_1,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k_s": LlamaFileType.MOSTLY_Q4_K_S,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "q3_k_m": LlamaFileType.MOSTLY_Q3_K_M,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
}

_BASES = {
    "q5_k_m": Q.Q5_K,
    "q4_k_m": Q.Q4_K,
    "q4_k_s": Q.Q4_K,
    "q3_k_m": Q.Q3_K,
}

# Where rows are no whole number of a type's blocks: the type tried next (llama.cpp's choice).
_FALLBACKS = {
    Q.Q2_K: Q.Q4_0,
    Q.Q3_K: Q.Q4_0,
    Q.IQ4_XS: Q.IQ4_NL,
    Q.Q4_K: Q.Q5_0,
    Q.Q5_K: Q.Q5_1,
    Q.Q6_K: Q.Q8_0,
}


@dataclass(frozen=True)
class Choice:
    """How the types of a model's tensors are chosen.

    ``overrides`` are (pattern, type) pairs; the first whose regular expression is found in a tensor's name
    counts. ``has_imatrix`` matters to one mix.
    """

    preset: str
    vision_type: str
    overrides: tuple[tuple[str, str], ...] = ()
    has_imatrix: bool = False

    def __post_init__(self) -> None:
        for pattern, type_name in self.overrides:
            check_choice(f"the type for {pattern!r}", type_name, WEIGHT_TYPES)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error

    def wanted(self, tensor: Tensor, *, blocks: int, group: int, tied: bool) -> GGMLQuantizationType:
        """The type asked for, for a decoder of so many blocks whose KV heads serve ``group`` heads each.

        ``tied``: the embeddings are the output matrix too.
        """
        if (override := self.override(tensor)) is not None:
            return GGMLQuantizationType[override[1].upper()]
        if tensor.part is not Part.DECODER:
            return GGMLQuantizationType[self.vision_type.upper()]
        return self._mixed(tensor, blocks, group, tied)

    def override(self, tensor: Tensor) -> tuple[str, str] | None:
        """The pair that decides on a tensor."""
        found = (pair for pair in self.overrides if re.search(pair[0], tensor.name))
        return next(found, None)

    def _mixed(self, tensor: Tensor, blocks: int, group: int, tied: bool) -> GGMLQuantizationType:
        """llama.cpp's mix for a LLaMA decoder (its llama-quant.cpp, as of llama-cpp-python 0.3.36)."""
        preset = self.preset
        base = _BASES.get(preset) or GGMLQuantizationType[preset.upper()]
        name = tensor.rule.name
        i = int(found[1]) if (found := re.match(r"blk\.(\d+)\.", tensor.name)) else 0
        first_eighth = i < blocks // 8
        more_bits = first_eighth or i >= 7 * blocks // 8 or (i - blocks // 8) % 3 == 2
        quantised = base not in (Q.F32, Q.F16, Q.BF16)
        kinds: Mapping[str, GGMLQuantizationType | None] = {}
        if name == ("token_embd.weight" if tied else "output.weight") and quantised and base is not Q.Q8_0:
            return Q.Q6_K
        if name.endswith("attn_v.weight"):
            kinds = {
                "q2_k": Q.Q4_K if group >= 4 else Q.Q3_K,
                "q3_k_m": Q.Q5_K if i < 2 else Q.Q4_K,
                "iq4_xs": Q.Q5_K if group >= 4 else None,
                "q4_k_m": Q.Q6_K if more_bits else None,
                "q4_k_s": Q.Q5_K if i < 4 else None,
                "q5_k_m": Q.Q6_K if more_bits else None,
            }
        elif name.endswith("ffn_down.weight"):
            kinds = {
                "q2_k": Q.Q3_K,
                "q3_k_m": Q.Q5_K if i < blocks // 16 else Q.Q4_K,
                "iq4_xs": Q.Q5_K if first_eighth and not self.has_imatrix else None,
                "q4_k_m": Q.Q6_K if more_bits else None,
                "q4_k_s": Q.Q5_K if first_eighth else None,
                "q4_0": Q.Q4_1 if first_eighth and self.has_imatrix else None,
                "q5_k_m": Q.Q6_K if more_bits else None,
            }
        elif name.endswith("attn_output.weight"):
            kinds = {"q2_k": Q.Q3_K, "q3_k_m": Q.Q4_K}
        return kinds.get(preset) or base


def fitting_type(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type that the table's policy and the tensor's rows allow when ``wanted`` is asked for."""
    if tensor.rule.policy is Policy.VECTOR:
        return Q.F32
    if tensor.rule.policy is Policy.PATCH:
        return Q.F32 if wanted in (Q.F32, Q.BF16) else Q.F16
    while tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        wanted = _FALLBACKS.get(wanted, Q.F16)
    return wanted
