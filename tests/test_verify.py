"""A file that proves itself: hashes, the self-test, and what each kind of fault makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf_bytes
import numpy as np
import pytest
import yivl_edge.convert.converter as converter_module
import yivl_edge.convert.tensor_map as tensor_map
import yivl_edge.convert.writer as writer_module
import yivl_edge.verify as verify_module
from checkpoints import GOLDEN, write_checkpoint
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf_bytes import Kind
from twin import Twin
from yivl_edge import Model, ModelFileError, _core
from yivl_edge.cli import main
from yivl_edge.convert import CheckpointError, convert
from yivl_edge.convert.imatrix import write_imatrix
from yivl_edge.hashes import HEADER_KEY, check_hashes, header_hash
from yivl_edge.selftest import (
    STRUCTURE_LIMIT,
    SelfTest,
    picture,
    relative_error,
    rounding_limit,
    sample,
    sample_logits,
)
from yivl_edge.verify import verify

# From fine to coarse: whatever rounding costs, a weight in the wrong place must show.
PRESETS = ["f16", "q8_0", "q4_k_m", "q4_0", "q2_k"]
NAMES = [
    "hashes",
    "rounding",
    "structure",
    "pixels",
    "vision tower",
    "projector",
    "tokeniser",
    "logits",
    "next tokens",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden checkpoint in several types, and as a pair."""
    folder = tmp_path_factory.mktemp("verify")
    for preset in ("f32", *PRESETS):
        convert(GOLDEN, folder / f"{preset}.gguf", type=preset)
    convert(GOLDEN, folder / "pair.gguf", type="q4_k_m", layout="pair")
    return {path.stem: path for path in folder.iterdir()}


def failed(path: Path, mmproj: Path | None = None) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in verify(path, mmproj=mmproj).checks if not check.passed]


def changed(source: Path, target: Path, tensor: str, change: Callable[[np.ndarray, int], np.ndarray]) -> Path:
    """A copy in which a tensor's bytes, (blocks, bytes of a block), are others."""
    data = bytearray(source.read_bytes())
    (found,) = (t for t in GGUFReader(source).tensors if t.name == tensor)
    block = GGML_QUANT_SIZES[found.tensor_type][1]
    begin, end = found.data_offset, found.data_offset + int(found.n_bytes)
    blocks = np.frombuffer(bytes(data[begin:end]), np.uint8).reshape(-1, block)
    data[begin:end] = change(blocks, block).tobytes()
    target.write_bytes(data)
    return target


def damaged(source: Path, target: Path, tensor: str) -> Path:
    """A copy in which one bit of a tensor is another."""

    def flip(blocks: np.ndarray, _block: int) -> np.ndarray:
        blocks = blocks.copy()
        blocks[len(blocks) // 2, 0] ^= 1
        return blocks

    return changed(source, target, tensor, flip)


def hashed_anew(path: Path) -> Path:
    """The file with hashes of what is in it now."""
    data, file = path.read_bytes(), _core.GgufFile.open(path)
    lines = file.metadata["yivl.sha256"]
    assert isinstance(lines, list)
    for line, tensor in zip(lines, file.tensors, strict=True):
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        data = data.replace(str(line).encode(), f"{digest}  {tensor.name}".encode())
    header = data[: min(tensor.offset for tensor in file.tensors)]
    old = str(file.metadata[HEADER_KEY])
    path.write_bytes(data.replace(old.encode(), header_hash(header).encode()))
    return path


def read(path: Path) -> SelfTest:
    test = SelfTest.read(_core.GgufFile.open(path).metadata)
    assert test is not None
    return test


@pytest.mark.parametrize("preset", ["f32", *PRESETS])
def test_sound_file_passes(files: dict[str, Path], preset: str) -> None:
    report = verify(files[preset])
    assert report.passed, report
    assert [check.name for check in report.checks] == NAMES
    assert report.unchecked == ""


def test_pair_passes_and_half_of_it_says_what_is_left(files: dict[str, Path]) -> None:
    text, mmproj = files["pair"], files["pair-mmproj"]
    report = verify(text, mmproj=mmproj)
    assert report.passed, report
    of_files = [f"{name} of {path.name}" for path in (text, mmproj) for name in NAMES[:2]]
    assert [check.name for check in report.checks] == [*of_files, *NAMES[2:]]
    assert report.unchecked == ""

    report = verify(text)
    assert report.passed, report
    assert [check.name for check in report.checks] == [*NAMES[:3], *NAMES[6:]]
    assert "vision tower" in report.unchecked

    report = verify(mmproj)
    assert report.passed, report
    assert [check.name for check in report.checks] == NAMES[:3]
    assert "text model" in report.unchecked
    assert report.backend == ""


def test_self_test_holds_what_torch_makes_of_the_source(files: dict[str, Path]) -> None:
    # The golden weights are bf16, so that an f32 file has the source's own.
    test, model, twin = read(files["f32"]), Model(files["f32"]), Twin(files["f32"])
    vision, decoder = test.vision, test.decoder
    assert vision is not None
    assert decoder is not None
    np.testing.assert_array_equal(vision.image, picture())
    pixels = model.preprocess(vision.image)
    logits = twin.logits(decoder.ids)
    # Sums of a few hundred float32 products in another order: some 1e-6.
    for expected, found in (
        (vision.vision, sample(twin.vision_features(pixels))),
        (vision.projector, sample(twin.encode_image(pixels))),
        (decoder.logits, sample_logits(logits)),
    ):
        assert relative_error(expected.sample, found) < 2e-5
        assert expected.error < 5e-6
    assert decoder.top_ids == logits.argmax(-1).tolist()


def test_expected_errors_grow_with_coarser_types(files: dict[str, Path]) -> None:
    tests = [read(files[preset]).decoder for preset in ("f32", "q8_0", "q4_k_m", "q2_k")]
    errors = [test.logits.error for test in tests if test is not None]
    assert errors[0] < 1e-5 < 1e-3 < errors[1] < 0.05 < errors[2] < 0.5 < errors[3] < 2


@pytest.mark.parametrize("tensor", ["v.blk.1.ffn_up.weight", "blk.2.attn_norm.weight", "output.weight"])
@pytest.mark.parametrize("preset", PRESETS)
def test_single_flipped_bit_is_found(
    files: dict[str, Path], tmp_path: Path, tensor: str, preset: str
) -> None:
    path = damaged(files[preset], tmp_path / "damaged.gguf", tensor)
    report = verify(path)
    assert not report.passed
    assert f"{tensor} is damaged" in report.checks[0].found
    with pytest.raises(ModelFileError, match=re.escape(f"{tensor} is damaged: its SHA-256 should be")):
        Model(path, verify=True)
    Model(path)  # the bit alone does not keep it from opening


def test_model_with_sound_hashes_opens(files: dict[str, Path]) -> None:
    seen: list[float] = []
    Model(
        files["q8_0"],
        verify=True,
        on_progress=lambda stage, done: seen.append(done) if stage == "hash" else None,
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert check_hashes(files["q8_0"]) == len(_core.GgufFile.open(files["q8_0"]).tensors)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"github", b"gethub"),  # a token; the text of the self-test does not need it
        (b"inquisitive", b"inquisitivd"),  # the prompt
        (b"yivl.image.aspect_ratio", b"yivl.image.aspect_ratia"),
        (b"yivl.selftest.top_ids", b"yivl.selftest.top_idz"),
    ],
)
def test_changed_header_is_found(files: dict[str, Path], tmp_path: Path, old: bytes, new: bytes) -> None:
    data = files["q8_0"].read_bytes()
    assert old in data
    path = tmp_path / "changed.gguf"
    path.write_bytes(data.replace(old, new, 1))
    (check,) = verify(path).checks
    assert not check.passed
    assert "header is damaged, or another program changed it: its SHA-256 should be" in check.found
    with pytest.raises(ModelFileError, match="header is damaged"):
        Model(path, verify=True)


def test_other_tokeniser_is_found(files: dict[str, Path], tmp_path: Path) -> None:
    # Whoever wrote the file made its hashes fit: what the text becomes is compared too.
    data = files["q8_0"].read_bytes()
    path = tmp_path / "changed.gguf"
    path.write_bytes(data.replace("\u2581the".encode(), "\u2581thq".encode(), 1))
    assert path.read_bytes() != data
    assert failed(hashed_anew(path)) == ["tokeniser"]


@pytest.mark.parametrize(
    ("method", "check"),
    [("vision_features", "vision tower"), ("encode_image", "projector"), ("logits", "logits")],
)
def test_wrong_results_of_a_stage_are_found(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, method: str, check: str
) -> None:
    # As if a kernel left out a little of every seventh column.
    class Wrong:
        def __init__(self, *args: object) -> None:
            self._session = session(*args)

        def __getattr__(self, name: str) -> Callable[..., np.ndarray]:
            compute = getattr(self._session, name)
            if name != method:
                return compute
            return lambda *args: (
                compute(*args) * np.where(np.arange(compute(*args).shape[1]) % 7 == 0, 1.05, 1).astype("f")
            )

    session = _core.Session
    monkeypatch.setattr(verify_module._core, "Session", Wrong)
    assert check in failed(files["q8_0"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("tensor", "checks"),
    [
        ("blk.1.ffn_up.weight", {"logits"}),
        ("output.weight", {"logits", "next tokens"}),
        ("v.blk.1.attn_v.weight", {"vision tower", "projector"}),
    ],
)
def test_kernel_that_takes_the_wrong_weights_is_found(
    files: dict[str, Path], tmp_path: Path, preset: str, tensor: str, checks: set[str]
) -> None:
    # Each block of weights gives way to its neighbour, which for the engine is as if its kernel addressed them wrong.
    path = changed(files[preset], tmp_path / "rolled.gguf", tensor, lambda blocks, _: np.roll(blocks, 1, 0))
    assert checks <= set(failed(hashed_anew(path))) <= checks | {"next tokens"}


def encoding(tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pytest.MonkeyPatch], None]:
    """A converter that encodes other rows of a tensor than it should."""

    def inject(monkeypatch: pytest.MonkeyPatch) -> None:
        encode = converter_module._encode

        def wrong(row: tensor_map.Tensor, rows: np.ndarray, *rest: object) -> np.ndarray:
            if row.name == tensor:
                rows = np.ascontiguousarray(change(rows), np.float32)
            return encode(row, rows, *rest)

        monkeypatch.setattr(converter_module, "_encode", wrong)

    return inject


def forget_rope_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter_module, "permute_heads", lambda rows, _: rows)


FAULTS = {
    "RoPE order forgotten": (forget_rope_order, "model.layers.0.self_attn: the converted weights do not do"),
    "transposed": (encoding("blk.1.attn_output.weight", np.transpose), "blk.1.attn_output.weight: as .* changed by"),
    "rows in another order": (encoding("blk.2.ffn_up.weight", np.flipud), "blk.2.ffn_up.weight: as .* changed by"),
    "scaled": (encoding("blk.0.ffn_down.weight", lambda x: 1.1 * x), "ffn_down.weight: as .* by a factor of 1.1"),
    "sign": (encoding("output.weight", np.negative), "output.weight: as .* changed by"),
    "vision transposed": (encoding("v.blk.0.attn_q.weight", np.transpose), "v.blk.0.attn_q.weight: as .* changed by"),
    "bias left out": (encoding("v.blk.1.ffn_up.bias", np.zeros_like), "v.blk.1.ffn_up.bias: as F32 .* changed by 1 "),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_converter_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, fault: str
) -> None:
    inject, message = FAULTS[fault]
    inject(monkeypatch)
    with pytest.raises(CheckpointError, match=message):
        convert(GOLDEN, tmp_path / "out.gguf", type=preset)
    assert list(tmp_path.iterdir()) == []


def exchange_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the table took gate for up."""
    gate, up = (row for row in tensor_map.DECODER_BLOCK if row.name.endswith(("gate.weight", "up.weight")))
    other = {
        gate: dataclasses.replace(gate, source=up.source),
        up: dataclasses.replace(up, source=gate.source),
    }
    rows = tuple(other.get(row, row) for row in tensor_map.DECODER_BLOCK)
    monkeypatch.setattr(tensor_map, "DECODER_BLOCK", rows)


def exchange_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if K was written where V belongs, and the other way round."""
    write = writer_module.Files.write
    names = {"blk.1.attn_k.weight": "blk.1.attn_v.weight", "blk.1.attn_v.weight": "blk.1.attn_k.weight"}
    monkeypatch.setattr(
        writer_module.Files,
        "write",
        lambda self, name, *args, **options: write(self, names.get(name, name), *args, **options),
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("inject", [exchange_in_the_table, exchange_in_the_file])
def test_exchanged_matrices_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, inject: Callable[[pytest.MonkeyPatch], None]
) -> None:
    inject(monkeypatch)
    types = {"blk.1.attn_[kv]": "q4_0"} if preset != "f16" else {}  # of one size, as the exchange needs
    convert(GOLDEN, tmp_path / "faulty.gguf", type=preset, tensor_types=types)
    assert "logits" in failed(tmp_path / "faulty.gguf")


@pytest.mark.parametrize("preset", PRESETS)
def test_file_of_a_converter_that_does_not_look_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    # Its weights are wrong, and its hashes and expectations agree with them.
    forget_rope_order(monkeypatch)
    encoding("blk.2.ffn_up.weight", np.flipud)(monkeypatch)
    monkeypatch.setattr("yivl_edge.convert.reference.STRUCTURE_LIMIT", 9.0)
    monkeypatch.setattr(converter_module, "rounding_limit", lambda *_: 9.0)
    monkeypatch.setattr(converter_module, "scale_limit", lambda *_: 9.0)
    convert(GOLDEN, tmp_path / "faulty.gguf", type=preset)
    monkeypatch.undo()
    assert failed(tmp_path / "faulty.gguf") == ["rounding", "structure"]
    assert read(tmp_path / "faulty.gguf").structure > 100 * STRUCTURE_LIMIT


def importance_of_golden(path: Path) -> Path:
    """Columns that matter very differently."""
    random = np.random.default_rng(0)
    columns = {
        tensor.name: (np.exp(4 * random.standard_normal(tensor.shape[-1])), 1)
        for tensor in _core.GgufFile.open(path.with_name("f32.gguf")).tensors
        if len(tensor.shape) == 2
    }
    write_imatrix(path, columns, datasets=["random"], chunk_count=1, chunk_size=1)
    return path


@pytest.mark.parametrize("preset", ["q4_k_m", "q2_k"])
def test_importance_may_change_more_and_faults_still_show(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    matrix = importance_of_golden(files["f32"].with_name("imatrix.gguf"))
    convert(GOLDEN, tmp_path / "sound.gguf", type=preset, imatrix=matrix)
    assert verify(tmp_path / "sound.gguf").passed
    for change in (np.flipud, np.negative, lambda x: 1.3 * x):
        with monkeypatch.context() as patch:
            encoding("blk.2.ffn_up.weight", change)(patch)
            with pytest.raises(CheckpointError, match=r"blk\.2\.ffn_up\.weight: as "):
                convert(GOLDEN, tmp_path / "faulty.gguf", type=preset, imatrix=matrix)


@pytest.mark.parametrize("context", [1, 7, 40])
def test_context_shorter_than_the_self_test(tmp_path: Path, context: int) -> None:
    folder = write_checkpoint(
        tmp_path / "model", decoder_layers=1, vit_layers=2, config={"max_position_embeddings": context}
    )
    convert(folder, tmp_path / "out.gguf", type="q8_0")
    assert verify(tmp_path / "out.gguf").passed
    test = read(tmp_path / "out.gguf").decoder
    assert test is not None
    assert len(test.ids) == min(context, len(Model(tmp_path / "out.gguf").tokenize(test.text)))


def test_files_without_hashes_or_self_test_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    data = files["q8_0"].read_bytes()
    for key, message in (
        (b"yivl.sha256", "carries no hashes"),
        (b"yivl.header_sha256", "carries no hashes"),
    ):
        (tmp_path / "bare.gguf").write_bytes(data.replace(key, key[:-1] + b"7"))
        with pytest.raises(ModelFileError, match=message):
            Model(tmp_path / "bare.gguf", verify=True)
    for key, message in (
        (b"yivl.selftest.", "carries no self-test"),
        (b"yivl.selftest.top_ids", "self-test is incomplete or damaged"),
        (b"yivl.rounding", "expected yivl.rounding"),
    ):
        (tmp_path / "half.gguf").write_bytes(data.replace(key, b"x" + key[1:]))
        with pytest.raises(ModelFileError, match=message):
            verify(hashed_anew(tmp_path / "half.gguf"))


def test_hashes_of_nothing_are_told(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    keys = [
        gguf_bytes.key("yivl.sha256", gguf_bytes.array(Kind.STRING, ["0" * 64 + "  output.weight"])),
        gguf_bytes.key(HEADER_KEY, gguf_bytes.scalar(Kind.STRING, "0" * 64)),
    ]
    path.write_bytes(gguf_bytes.build(keys))
    with pytest.raises(ModelFileError, match=r"empty\.gguf: expected tensors, found none"):
        check_hashes(path)


def test_command_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(files["q4_k_m"]), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "is sound (backend: " in out
    assert out.count("ok    ") == len(NAMES)
    assert main(["verify", str(files["pair"]), "--mmproj", str(files["pair-mmproj"])]) == 0
    assert capsys.readouterr().out.count("ok    ") == len(NAMES) + 2
    assert main(["verify", str(files["pair-mmproj"])]) == 0
    out = capsys.readouterr().out
    assert "not checked: what the vision tower computes" in out
    assert "is sound as far as it was checked" in out
    bad = damaged(files["q8_0"], tmp_path / "bad.gguf", "blk.0.ffn_up.weight")
    assert main(["verify", str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert report["checks"][0]["name"] == "hashes"
    assert main(["verify", str(tmp_path / "missing.gguf")]) == 1
    assert "missing.gguf" in capsys.readouterr().err


def test_a_device_that_is_none_is_told(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"expected .*, found 'gpu'"):
        verify(files["q8_0"], device="gpu")


def test_progress_of_every_stage_is_told(files: dict[str, Path]) -> None:
    seen: list[str] = []
    verify(files["q8_0"], on_progress=lambda stage, _: seen.append(stage))
    assert list(dict.fromkeys(seen)) == ["hash", "load", "image", "prefill"]


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_instruction_set_passes(files: dict[str, Path], isa: str) -> None:
    code = (
        "import sys; from yivl_edge.verify import verify; r = verify(sys.argv[1]); print(r.backend, r.passed)"
    )
    command = [sys.executable, "-c", code, str(files["q4_k_m"])]
    result = subprocess.run(
        command, env=os.environ | {"YIVL_ISA": isa}, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [isa, "True"]


@pytest.mark.parametrize("n_threads", [-1, 0, 1025])
def test_a_wrong_number_of_threads_is_told_before_the_work(files: dict[str, Path], n_threads: int) -> None:
    for check in (verify, check_hashes):
        with pytest.raises(ValueError, match="n_threads: expected an integer from 1 to 1024"):
            check(files["q8_0"], n_threads=n_threads)


def test_a_damaged_vision_half_does_not_open(files: dict[str, Path], tmp_path: Path) -> None:
    bad = damaged(files["pair-mmproj"], tmp_path / "bad.gguf", "v.blk.1.ffn_up.weight")
    Model(files["pair"], mmproj=bad)
    with pytest.raises(ModelFileError, match=r"bad\.gguf: v\.blk\.1\.ffn_up\.weight is damaged"):
        Model(files["pair"], mmproj=bad, verify=True)


def test_limits_of_rounding_are_the_documented_ones() -> None:
    page = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text(encoding="utf-8")
    said = re.search(
        r"Limits, relative to the weights' size: (.*?); ([\d.]+) for fewer than eight bits", page
    )
    assert said is not None
    limits = re.findall(r"([\d.]+) for (\w+)", said[1])
    assert len(limits) == 3
    for number, name in limits:
        assert rounding_limit(name, False) == float(number)
    assert rounding_limit("Q4_K", True) == float(said[2])
