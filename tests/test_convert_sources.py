"""Sources beside the published folder: its transformers port, and GGUF files, our own and llama.cpp's pairs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf_contents
import numpy as np
import pytest
from checkpoints import GOLDEN, GOLDEN_VIT, golden_decoder, golden_vit, write_shards
from gguf import GGUFReader
from test_foreign_files import as_old_scripts, with_block_count
from test_verify import damaged
from weight_types import rewrite
from yivl_edge import Model, ModelFileError
from yivl_edge.cli import main
from yivl_edge.convert import CheckpointError, convert
from yivl_edge.convert.imatrix import write_imatrix

QUESTION = "What is in the picture?"
PROJECTOR = {"0": "linear_1", "1": "linear_2", "3": "linear_3", "4": "linear_4"}


def port_name(name: str, flat: bool) -> str:
    """A published name in the port, before (nested) and since (flat) transformers 4.52."""
    root = "model." if flat else ""
    if match := re.fullmatch(r"model\.mm_projector\.(\d)\.(.*)", name):
        return f"{root}multi_modal_projector.{PROJECTOR[match[1]]}.{match[2]}"
    if name.startswith("vision_model."):
        return f"{root}vision_tower.{name}"
    if flat:
        return name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
    return f"language_model.{name}"


def write_port(folder: Path, *, flat: bool = False, **changes: Any) -> Path:
    """The golden checkpoint as a transformers-format port."""
    shutil.copytree(GOLDEN, folder, ignore=shutil.ignore_patterns("*.safetensors*", "vit", "config.json"))
    shutil.copyfile(GOLDEN_VIT / "preprocessor_config.json", folder / "preprocessor_config.json")
    tensors = golden_vit() | golden_decoder()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.vision_tower.")}
    write_shards(
        folder,
        {port_name(name, flat): tensor for name, tensor in tensors.items()},
        file_format="safetensors",
        shards=2,
    )
    published = json.loads((GOLDEN / "config.json").read_text())
    text_keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    )  # fmt: skip
    text = {key: published[key] for key in text_keys} | {"model_type": "llama"}
    if flat:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": published["rope_theta"]}
    else:
        text["rope_theta"] = published["rope_theta"]
    vision = json.loads((GOLDEN_VIT / "config.json").read_text())
    del vision["layer_norm_eps"]  # transformers leaves out what is its default
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": text,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden checkpoint as single files and as a pair, in f32 and q8_0."""
    folder = tmp_path_factory.mktemp("sources")
    for preset in ("f32", "q8_0"):
        convert(GOLDEN, folder / f"{preset}.gguf", type=preset)
        convert(GOLDEN, folder / f"{preset}-text.gguf", type=preset, layout="pair")
    return {path.stem: path for path in folder.iterdir()}


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, bytes]]]:
    reader = GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}
    return gguf_contents.keys(reader), tensors


def logits(path: Path, image: np.ndarray) -> np.ndarray:
    return Model(path, n_threads=1).logits(image, QUESTION)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (60, 90, 3), np.uint8)


@pytest.mark.parametrize("flat", [False, True])
def test_port_gives_the_same_file_as_the_published_folder(
    tmp_path: Path, golden: dict[str, Path], flat: bool
) -> None:
    folder = write_port(tmp_path / "port", flat=flat)
    convert(folder, tmp_path / "out.gguf", type="q8_0")
    keys, tensors = contents(tmp_path / "out.gguf")
    expected_keys, expected_tensors = contents(golden["q8_0"])
    assert tensors == expected_tensors
    assert keys.pop("general.name") == "port"
    expected_keys.pop("general.name")
    assert keys.pop("yivl.header_sha256") != expected_keys.pop("yivl.header_sha256")  # it has the name in it
    assert keys == expected_keys


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy should be \"default\""),
        ({"vision_feature_layer": "last"}, "vision_feature_layer should be an integer"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act should be"),
        ({"text_config": None}, "text_config should be a JSON object"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures should be"),
    ],
)
def test_port_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(write_port(tmp_path / "port", **changes), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_port_without_its_activation_is_quick_gelu_and_refused(tmp_path: Path) -> None:
    # transformers leaves out CLIP's default, which is not what Yi-VL computes.
    folder = write_port(tmp_path / "port")
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]["hidden_act"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='hidden_act should be "gelu"'):
        convert(folder, tmp_path / "out.gguf")


def test_quantising_an_f32_file_equals_converting_the_folder(tmp_path: Path, golden: dict[str, Path]) -> None:
    convert(golden["f32"], tmp_path / "out.gguf", type="q4_k_m")
    convert(GOLDEN, tmp_path / "direct.gguf", type="q4_k_m")
    keys, tensors = contents(tmp_path / "out.gguf")
    expected_keys, expected_tensors = contents(tmp_path / "direct.gguf")
    assert tensors == expected_tensors
    # The self-test's arithmetic takes Q and K in another order, which changes the last bits.
    for name in list(keys):
        if name.startswith("yivl.selftest.") and isinstance(np.ravel(keys[name])[0], float):
            np.testing.assert_allclose(keys.pop(name), expected_keys.pop(name), atol=2e-4)
    assert keys.pop("yivl.header_sha256") != expected_keys.pop("yivl.header_sha256")
    assert keys == expected_keys


def test_file_without_a_type_stays_as_it_is(tmp_path: Path, golden: dict[str, Path]) -> None:
    convert(golden["q8_0"], tmp_path / "out.gguf")
    keys, tensors = contents(tmp_path / "out.gguf")
    expected_keys, expected_tensors = contents(golden["q8_0"])
    assert tensors == expected_tensors
    assert keys["general.file_type"] == expected_keys["general.file_type"]


def test_pair_becomes_one_file(tmp_path: Path, golden: dict[str, Path]) -> None:
    convert(golden["q8_0-text"], tmp_path / "one.gguf", mmproj=golden["q8_0-text-mmproj"])
    keys, tensors = contents(tmp_path / "one.gguf")
    expected_keys, expected_tensors = contents(golden["q8_0"])
    assert tensors == expected_tensors
    assert keys["clip.vision.block_count"] == expected_keys["clip.vision.block_count"] == 3


def test_pair_of_older_scripts_becomes_one_file(
    tmp_path: Path, golden: dict[str, Path], image: np.ndarray
) -> None:
    mmproj = rewrite(
        golden["f32-text-mmproj"],
        tmp_path / "mmproj.gguf",
        keys=with_block_count(3),
        tensor=as_old_scripts(3),
    )
    text = rewrite(
        golden["f32-text"],
        tmp_path / "text.gguf",
        keys=lambda keys: {name: value for name, value in keys.items() if not name.startswith("yivl.")},
    )
    convert(text, tmp_path / "one.gguf", mmproj=mmproj)
    np.testing.assert_array_equal(logits(tmp_path / "one.gguf", image), logits(golden["f32"], image))


def test_text_model_alone_stays_one(tmp_path: Path, golden: dict[str, Path]) -> None:
    convert(golden["f32-text"], tmp_path / "out.gguf", type="q8_0")
    keys, tensors = contents(tmp_path / "out.gguf")
    _, expected = contents(golden["q8_0-text"])
    assert tensors == expected
    assert not [name for name in keys if name.startswith("clip.")]
    assert Model(tmp_path / "out.gguf").chat(None, "Hi", max_tokens=2).text is not None
    assert main(["verify", str(tmp_path / "out.gguf")]) == 0


def test_single_file_cannot_become_a_pair(tmp_path: Path, golden: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="has only the 3 ViT blocks that run"):
        convert(golden["f32"], tmp_path / "out.gguf", layout="pair")


@pytest.mark.parametrize("half", ["f32", "f32-text", "f32-text-mmproj"])
def test_damaged_weights_are_not_made_into_a_sound_file(
    tmp_path: Path, golden: dict[str, Path], half: str
) -> None:
    tensor = "v.blk.1.ffn_up.weight" if half == "f32-text-mmproj" else "blk.1.ffn_up.weight"
    damaged(golden[half], tmp_path / "damaged.gguf", tensor)
    halves = golden | {half: tmp_path / "damaged.gguf"}
    mmproj = None if half == "f32" else halves["f32-text-mmproj"]
    source = halves["f32" if half == "f32" else "f32-text"]
    with pytest.raises(ModelFileError, match=rf"damaged\.gguf: {tensor} is damaged: its SHA-256 should be"):
        convert(source, tmp_path / "out.gguf", mmproj=mmproj, type="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.gguf"]


def test_a_file_that_another_program_changed_is_taken_as_it_is(
    tmp_path: Path, golden: dict[str, Path]
) -> None:
    named = {"general.name": "Another"}
    source = rewrite(golden["f32"], tmp_path / "renamed.gguf", keys=lambda keys: keys | named)
    (note,) = convert(source, tmp_path / "out.gguf", type="q8_0").notes
    assert "renamed.gguf: its header is not the one that was hashed" in note
    assert contents(tmp_path / "out.gguf")[1] == contents(golden["q8_0"])[1]
    assert main(["verify", str(tmp_path / "out.gguf")]) == 0


def test_wrong_files_are_told(tmp_path: Path, golden: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.gguf does not exist"):
        convert(tmp_path / "missing.gguf", tmp_path / "out.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 100)
    with pytest.raises(ModelFileError, match=r"noise\.gguf"):
        convert(tmp_path / "noise.gguf", tmp_path / "out.gguf", type="q8_0")
    with pytest.raises(ValueError, match="mmproj belongs to a GGUF file"):
        convert(GOLDEN, tmp_path / "out.gguf", mmproj=golden["f32-text-mmproj"])
    with pytest.raises(ValueError, match="vision_type without type: the types of a GGUF file then stay"):
        convert(golden["f32"], tmp_path / "out.gguf", vision_type="q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["noise.gguf"]


def test_importance_changes_the_codes_and_is_checked(tmp_path: Path, golden: dict[str, Path]) -> None:
    images, prompts = tmp_path / "images", tmp_path / "prompts.txt"
    images.mkdir()
    shutil.copyfile(GOLDEN.parent / "image.png", images / "image.png")
    prompts.write_text("What is this?\n")
    matrix = tmp_path / "imatrix.gguf"
    command = [
        "imatrix",
        str(golden["f32"]),
        "--images",
        str(images),
        "--prompts",
        str(prompts),
        "-o",
        str(matrix),
    ]
    assert main([*command, "--max-tokens", "4"]) == 0
    convert(golden["f32"], tmp_path / "plain.gguf", type="q4_k_m")
    result = convert(golden["f32"], tmp_path / "weighed.gguf", type="q4_k_m", imatrix=matrix)
    assert result.notes == ()
    plain, weighed = contents(tmp_path / "plain.gguf")[1], contents(tmp_path / "weighed.gguf")[1]
    changed = {name for name in plain if plain[name] != weighed[name]}
    assert {"blk.0.attn_q.weight", "blk.2.ffn_down.weight", "output.weight"} <= changed
    assert "token_embd.weight" not in changed
    with pytest.raises(ModelFileError, match="expected an importance matrix"):
        convert(golden["f32"], tmp_path / "x.gguf", type="q4_k_m", imatrix=golden["f32"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"blk.0.attn_q.weight": 512}, r"512 columns for blk\.0\.attn_q\.weight, which has 256"),
        (
            {"blk.0.attn_q.weight": 256, "blk.7.attn_q.weight": 256},
            r"blk\.7\.attn_q\.weight, which this model",
        ),
        ({"enc.0.weight": 256}, r"none of this model's matrices, but e\.g\. enc\.0\.weight"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_importance_of_another_model_is_told_before_the_work(
    tmp_path: Path, golden: dict[str, Path], columns: dict[str, int], message: str, dry_run: bool
) -> None:
    matrix = tmp_path / "imatrix.gguf"
    sums = {name: (np.ones(count), 1) for name, count in columns.items()}
    write_imatrix(matrix, sums, datasets=["ones"], chunk_count=1, chunk_size=1)
    seen: list[float] = []
    with pytest.raises(CheckpointError, match=message):
        convert(
            golden["f32"],
            tmp_path / "x.gguf",
            type="q4_k_m",
            imatrix=matrix,
            dry_run=dry_run,
            on_progress=lambda _, done: seen.append(done),
        )
    assert seen == []


def test_patterns_without_effect_are_noted(tmp_path: Path, golden: dict[str, Path]) -> None:
    patterns = {"attn_v": "q8_0", "attn_typo": "q6_k", "blk.0.attn_v": "f16", "attn_norm": "f16"}
    result = convert(golden["f32"], tmp_path / "x.gguf", type="q4_k_m", tensor_types=patterns, dry_run=True)
    named = [note.split("=")[0] for note in result.notes]
    assert named == ["attn_typo", "blk.0.attn_v", "attn_norm"]
    assert "no matrix has it in its name, or another pattern comes first" in result.notes[0]


def test_packing_anew_changes_neither_weights_nor_label(tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "text.gguf", type="q4_k_m", layout="pair")
    convert(tmp_path / "text.gguf", tmp_path / "one.gguf", mmproj=tmp_path / "text-mmproj.gguf")
    convert(GOLDEN, tmp_path / "direct.gguf", type="q4_k_m")
    keys, tensors = contents(tmp_path / "one.gguf")
    expected_keys, expected_tensors = contents(tmp_path / "direct.gguf")
    assert tensors == expected_tensors
    assert keys["general.file_type"] == expected_keys["general.file_type"] == 15  # llama.cpp's MOSTLY_Q4_K_M
    assert set(keys["yivl.rounding"]) == {0.0}  # of the source, which was the file


def test_wrong_usage_names_the_option_that_was_typed(
    golden: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(golden["f32"])
    for arguments, message in (
        ([source, "-o", "x.gguf", "--vision-type", "q8_0"], "--vision-type without --type: "),
        (
            [source, "-o", "x.gguf", "--imatrix", "i", "--tensor-type", "a=q8_0"],
            "--tensor-type, --imatrix without",
        ),
        (
            [source, "-o", "x.gguf", "--threads", "0"],
            "--threads: expected an integer from 1 to 1024, found '0'",
        ),
        ([source, "-o", "x.gguf", "--type", "q9"], "argument --type: invalid choice: 'q9'"),
    ):
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("yivl-edge: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_dry_run_prints_the_plan_and_the_true_size(
    tmp_path: Path, golden: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(golden["f32"]),
        str(tmp_path / "out.gguf"),
        "--type",
        "q4_k_m",
        "--tensor-type",
        "attn_v=q8_0",
    ]
    assert main(["quantize", *arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out.gguf").exists()
    assert main(["quantize", *arguments]) == 0
    assert planned[-1] == capsys.readouterr().out.strip().replace("wrote", "would write")
    result = convert(
        golden["f32"], tmp_path / "out.gguf", type="q4_k_m", tensor_types={"attn_v": "q8_0"}, dry_run=True
    )
    assert result.sizes == ((tmp_path / "out.gguf").stat().st_size,)
    kinds = {tensor.name: tensor.type for tensor in result.tensors}
    assert {n: kind for n, (kind, _) in contents(tmp_path / "out.gguf")[1].items()} == kinds
    assert kinds["blk.1.attn_v.weight"] == "Q8_0"
    assert re.search(
        r"^blk\.1\.attn_v\.weight +128 x 256 +F32 -> Q8_0 +0\.035 MB$", "\n".join(planned), re.MULTILINE
    )


@pytest.mark.parametrize("text", ["attn_v", "attn_v=q9", "=q8_0"])
def test_wrong_tensor_types_are_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "a", "b", "--type", "q8_0", "--tensor-type", text]) == 2
    assert "expected PATTERN=TYPE" in capsys.readouterr().err
