"""``yivl-edge inspect``: what is in a model file."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable
from typing import Any

from yivl_edge import _core
from yivl_edge.cli.arguments import integer
from yivl_edge.cli.terminal import visible

_EXAMPLE = """\
examples:
  yivl-edge inspect yi-vl-6b-q4_0.gguf
  yivl-edge inspect text-q4_0.gguf --mmproj mmproj-f16.gguf --n-ctx 2048
  yivl-edge inspect yi-vl-6b-q4_0.gguf --json
  yivl-edge inspect yi-vl-34b-q4_k_m.gguf --device cuda
"""

# Which tensors belong together, by name (docs/file-format.md); the first pattern that fits counts.
_GROUPS = (
    ("decoder attention", re.compile(r"blk\.\d+\.attn_")),
    ("decoder MLP", re.compile(r"blk\.\d+\.ffn_")),
    ("embeddings and output", re.compile(r"(token_embd|output|output_norm)\.")),
    ("vision tower", re.compile(r"v\.")),
    ("projector", re.compile(r"mm\.")),
    ("other", re.compile("")),
)

# SentencePiece's numbers (tokenizer.ggml.token_type).
_PIECE_TYPES = {1: "normal", 2: "unknown", 3: "control", 4: "user defined", 5: "unused", 6: "byte"}


class _Args(argparse.Namespace):
    """The options of this command."""

    file: str
    mmproj: str | None
    n_ctx: int | None
    device: str | None
    json: bool


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``yivl-edge``."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in a model file, and the memory it needs",
        description="Shows what a model file holds, and the memory it needs.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="a model file, or either file of a pair")
    parser.add_argument("--mmproj", metavar="FILE", help="of a pair, the file with the vision tower")
    parser.add_argument(
        "--n-ctx", type=integer(1), metavar="N", help="context to compute memory for (default: the model's)"
    )
    parser.add_argument(
        "--device",
        type=_gpu,
        metavar="D",
        help="cuda, cuda:1, ...: also what this GPU would hold, beside what it has free now",
    )
    parser.add_argument("--json", action="store_true", help="print JSON; sizes are in bytes")


def _gpu(text: str) -> str:
    """Parser of a GPU's name."""
    if not re.fullmatch("cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"expected cuda or cuda:N, found {text!r}")
    return text


def run(args: _Args) -> int:
    """Prints what the file holds, as text or JSON."""
    contents = inspect(args.file, args.mmproj, args.n_ctx, args.device)
    if args.json:
        print(json.dumps(contents, indent=2))  # ASCII: no terminal's encoding can spoil it
    else:
        print(visible("\n".join(_text(contents))))
    return 0


def inspect(
    path: str, mmproj: str | None = None, n_ctx: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """What a model file, or a pair, holds; in the form that ``--json`` prints.

    Args:
        path: A single file, a text model, or an mmproj file alone.
        mmproj: The file with the vision tower, if `path` is the text model of a pair.
        n_ctx: Context in tokens to compute memory for; None for the model's own.
        device: A GPU to plan for; None for no plan.

    Raises:
        ModelFileError: A file that is missing, damaged or not a Yi-VL model.
        ValueError: n_ctx above the model's context.
        DeviceError: The GPU cannot be used; says why.
    """
    file = _core.GgufFile.open(path)
    metadata = file.metadata
    is_mmproj = metadata.get("general.architecture") == "clip"
    if is_mmproj and mmproj is not None:
        raise _core.ModelFileError(f"{path}: expected the text model of the pair, found an mmproj file")
    has_tower = "clip.has_vision_encoder" in metadata
    if mmproj is not None and has_tower and os.path.exists(mmproj) and os.path.samefile(path, mmproj):
        mmproj = None  # a single file has both halves
    if mmproj is not None:
        vision_file = _core.GgufFile.open(mmproj)
    elif is_mmproj or has_tower:
        vision_file = file
    else:
        vision_file = None

    if is_mmproj:
        config = _core.read_vision_config(file)
        layout = "mmproj"
    else:
        config = _core.read_config(file, vision_file)
        layout = "text" if vision_file is None else "single" if vision_file is file else "pair"
    files = [(path, file)]
    tensors = file.tensors
    if mmproj is not None and vision_file is not None:
        files.append((mmproj, vision_file))
        # The half that each is opened for: either may be a single file.
        tensors = [t for t in file.tensors if not _of_tower(t)] + [
            t for t in vision_file.tensors if _of_tower(t)
        ]
    parameters = sum(_count(tensor.shape) for tensor in tensors)
    tensor_bytes = sum(tensor.nbytes for tensor in tensors)
    return {
        "name": metadata.get("general.name") or os.path.basename(path),
        "layout": layout,
        "files": [{"path": os.fspath(name), "bytes": opened.file_size} for name, opened in files],
        "parameters": parameters,
        "bits_per_weight": round(8 * tensor_bytes / parameters, 2) if parameters else None,
        "decoder": None if is_mmproj else _fields(config.decoder),
        "vision": None if config.vision is None else _fields(config.vision),
        "tensors": _groups(tensors),
        "tokenizer": None if is_mmproj else _tokenizer(_core.read_tokenizer_config(file)),
        "prompt": None if is_mmproj else {"system": config.system, "stops": config.stops},
        "sampling": None
        if is_mmproj
        else {"temperature": _short(config.temperature), "max_tokens": config.max_tokens},
        "preprocessing": None
        if config.vision is None
        else {
            "image_size": config.vision.image_size,
            "aspect_ratio": config.image_aspect_ratio,
            "pad_color": list(config.pad_color),
            "mean": [_short(value) for value in config.image_mean],
            "std": [_short(value) for value in config.image_std],
        },
        "memory": None if is_mmproj else _memory(config, n_ctx, sum(opened.file_size for _, opened in files)),
        "device": None
        if is_mmproj or device is None
        else _device(device, _core.MemoryPlan(file, vision_file, config, n_ctx or 0)),
    }


def _of_tower(tensor: _core.GgufTensor) -> bool:
    return tensor.name.startswith(("v.", "mm."))


def _count(shape: Iterable[int]) -> int:
    """Values in a tensor of this shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def _short(value: float) -> float:
    """A float32 with the digits that it has."""
    return float(f"{value:.8g}")


def _fields(config: _core.DecoderConfig | _core.VisionConfig) -> dict[str, int | float]:
    """The sizes that a native config holds."""
    values = {name: getattr(config, name) for name in dir(config) if not name.startswith("_")}
    return {name: _short(value) if isinstance(value, float) else value for name, value in values.items()}


def _groups(tensors: list[_core.GgufTensor]) -> list[dict[str, Any]]:
    """Per group and type: how many tensors, values and bytes."""
    found: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        group = next(name for name, pattern in _GROUPS if pattern.match(tensor.name))
        totals = found.setdefault((group, tensor.type), [0, 0, 0])
        totals[0] += 1
        totals[1] += _count(tensor.shape)
        totals[2] += tensor.nbytes
    order = [name for name, _ in _GROUPS]
    rows = sorted(found.items(), key=lambda item: (order.index(item[0][0]), -item[1][2]))
    return [
        {"group": group, "type": type_name, "tensors": count, "parameters": values, "bytes": size}
        for (group, type_name), (count, values, size) in rows
    ]


def _tokenizer(config: _core.TokenizerConfig) -> dict[str, Any]:
    types = config.types
    return {
        "vocabulary": len(config.pieces),
        "pieces": {name: types.count(number) for number, name in _PIECE_TYPES.items() if number in types},
        "bos_id": config.bos_id if config.bos_id >= 0 else None,
        "eos_id": config.eos_id if config.eos_id >= 0 else None,
        "unknown_id": config.unk_id if config.unk_id >= 0 else None,
        "special_ids": config.special_ids,
        "special_pieces": [config.pieces[i] for i in config.special_ids],
        "add_bos": config.add_bos,
        "add_eos": config.add_eos,
        "add_dummy_prefix": config.add_dummy_prefix,
        "remove_extra_whitespaces": config.remove_extra_whitespaces,
    }


def _memory(config: _core.Config, n_ctx: int | None, weights: int) -> dict[str, int]:
    """Bytes needed for one conversation: the mapped file and what a session allocates."""
    limit = config.decoder.context_length
    if n_ctx is not None and n_ctx > limit:
        raise ValueError(f"--n-ctx: expected at most the model's context of {limit}, found {n_ctx}")
    kv, activations, vision = _core.memory_needed(config, n_ctx or limit)
    return {
        "n_ctx": n_ctx or limit,
        "weights": weights,
        "kv_cache": kv,
        "activations": activations,
        "vision_activations": vision,
        "total": weights + kv + activations + vision,
    }


def _device(device: str, plan: _core.MemoryPlan) -> dict[str, Any]:
    """What a GPU would hold of a model, as ``Model(..., device=device)`` decides it."""
    name, total, free = _core.cuda_memory(device)
    fitting = plan.most_layers(free)
    n = max(fitting, 0)
    everything = plan.weights_on_device(plan.n_layers) + plan.kv_on_device(plan.n_layers)
    return {
        "name": name,
        "total": total,
        "free": free,
        "needed": plan.on_device(n),
        "fits": fitting >= 0,
        "layers": plan.n_layers,
        "gpu_layers": n,
        "weights": plan.weights_on_device(n) - plan.vision_weights,
        "vision_weights": plan.vision_weights,
        "kv_cache": plan.kv_on_device(n),
        "workspace": plan.decoder_activations + plan.vision_activations + _core.DEVICE_RESERVE,
        "spill": everything - plan.weights_on_device(n) - plan.kv_on_device(n),
    }


def _size(n: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB" if n < 999.5 else f"{n:.0f} GB"


def _number(n: float) -> str:
    """A count as people read it."""
    for unit in ("", " thousand", " million"):
        if n < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} billion"


_LAYOUTS = {
    "single": "one file with everything",
    "pair": "text model and mmproj",
    "text": "text model without a vision tower; --mmproj adds it",
    "mmproj": "vision tower and projector; their text model is in another file",
}


_Lines = list[tuple[str, str] | str]
"""Pairs of label and text, and lines as they are."""


def _text(contents: dict[str, Any]) -> list[str]:
    """The contents as lines for a person."""
    lines: _Lines = [("name", contents["name"]), ("layout", _LAYOUTS[contents["layout"]])]
    lines += [("file", f"{file['path']} ({_size(file['bytes'])})") for file in contents["files"]]
    bits = f", {contents['bits_per_weight']:.2f} bits each" if contents["parameters"] else ""
    lines.append(("parameters", f"{_number(contents['parameters'])}{bits}"))
    lines += _model_lines(contents["decoder"], contents["vision"])

    width = max((len(row["group"]) for row in contents["tensors"]), default=0)
    lines.append(f"\n{'tensors':{width}}  type    count      parameters     size")
    previous = None
    for row in contents["tensors"]:
        group = "" if row["group"] == previous else row["group"]
        previous = row["group"]
        size = _size(row["bytes"])
        lines.append(
            f"{group:{width}}  {row['type']:6}  {row['tensors']:5}  {row['parameters']:>14,}  {size:>7}"
        )

    if tokenizer := contents["tokenizer"]:
        lines += _tokenizer_lines(tokenizer)
    if prompt := contents["prompt"]:
        sampling = contents["sampling"]
        lines += [
            "",
            ("system text", prompt["system"]),
            ("stops", ", ".join(json.dumps(stop, ensure_ascii=False) for stop in prompt["stops"])),
            ("sampling", f"temperature {sampling['temperature']:g}, at most {sampling['max_tokens']} tokens"),
        ]
    if picture := contents["preprocessing"]:
        size = picture["image_size"]
        how = f"padded with {tuple(picture['pad_color'])}" if picture["aspect_ratio"] == "pad" else "cropped"
        lines += [
            "",
            ("picture", f"{how} to a square, resized to {size} x {size}"),
            ("", "mean " + ", ".join(f"{value:.4g}" for value in picture["mean"])),
            ("", "std " + ", ".join(f"{value:.4g}" for value in picture["std"])),
        ]
    if memory := contents["memory"]:
        lines += [
            "",
            ("memory", f"{_size(memory['total'])} for a context of {memory['n_ctx']} tokens:"),
            ("", f"{_size(memory['weights'])} weights, mapped from the file and shared"),
            ("", f"{_size(memory['kv_cache'])} KV cache"),
            ("", f"{_size(memory['activations'])} decoder activations"),
        ]
        if contents["vision"]:
            lines.append(("", f"{_size(memory['vision_activations'])} vision activations"))
    if device := contents["device"]:
        lines += _device_lines(device)
    return [line if isinstance(line, str) else f"{line[0]:12}  {line[1]}".rstrip() for line in lines]


def _device_lines(device: dict[str, Any]) -> _Lines:
    on_cpu = device["layers"] - device["gpu_layers"]
    verdict = "fits" if device["fits"] else "does not fit"
    spill = f"{on_cpu} of {device['layers']} layers, {_size(device['spill'])} with their keys and values"
    return [
        "",
        ("device", f"{device['name']}, {_size(device['free'])} of {_size(device['total'])} free"),
        ("", f"{_size(device['needed'])} on it, which {verdict}:"),
        ("", f"{_size(device['weights'])} weights of the decoder, {device['gpu_layers']} layers"),
        ("", f"{_size(device['vision_weights'])} weights of vision tower and projector"),
        ("", f"{_size(device['kv_cache'])} KV cache"),
        ("", f"{_size(device['workspace'])} workspace"),
        ("on the CPU", spill if on_cpu else "nothing"),
    ]


def _model_lines(decoder: dict[str, Any] | None, vision: dict[str, Any] | None) -> _Lines:
    lines: _Lines = [""]
    if decoder:
        heads = f"{decoder['n_heads']} heads of {decoder['head_dim']}, {decoder['n_kv_heads']} KV heads"
        sizes = f"vocabulary {decoder['vocab_size']}, context {decoder['context_length']}"
        lines += [
            ("decoder", f"{decoder['n_layers']} layers, width {decoder['width']}, {heads}"),
            ("", f"MLP {decoder['mlp_width']}, {sizes}"),
            ("", f"RoPE base {decoder['rope_theta']:g}, norm eps {decoder['norm_eps']:g}"),
        ]
    if vision:
        size, patch = vision["image_size"], vision["patch_size"]
        heads = f"{vision['n_heads']} heads of {vision['head_dim']}"
        lines += [
            ("vision tower", f"{vision['n_blocks']} layers run, width {vision['width']}, {heads}"),
            ("", f"MLP {vision['mlp_width']}, norm eps {vision['norm_eps']:g}"),
            ("", f"{vision['n_patches']} patches of {patch} x {patch} from {size} x {size} pixels"),
        ]
    return lines


def _tokenizer_lines(tokenizer: dict[str, Any]) -> _Lines:
    pieces = ", ".join(f"{count} {name}" for name, count in tokenizer["pieces"].items())
    special = ", ".join(
        f"{i} {piece}" for i, piece in zip(tokenizer["special_ids"], tokenizer["special_pieces"], strict=True)
    )
    names = ("add_bos", "add_eos", "add_dummy_prefix", "remove_extra_whitespaces")
    settings = [name.replace("_", " ") for name in names if tokenizer[name]]
    ids = ", ".join(
        f"{name} {'none' if tokenizer[f'{name}_id'] is None else tokenizer[f'{name}_id']}"
        for name in ("bos", "eos", "unknown")
    )
    return [
        "",
        ("tokeniser", f"{tokenizer['vocabulary']} pieces: {pieces}"),
        ("", f"ids: {ids}"),
        ("", f"special: {special or 'none'}"),
        ("", f"settings: {', '.join(settings) or 'none on'}"),
    ]
