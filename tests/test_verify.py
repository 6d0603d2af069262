"""A file that proves itself: hashes, the self-test, and what each kind of fault makes of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yivl_edge.convert.converter as converter_module
import yivl_edge.verify as verify_module
from checkpoints import GOLDEN
from gguf import GGUFReader
from twin import Twin
from yivl_edge import Model, ModelFileError, _core
from yivl_edge.cli import main
from yivl_edge.convert import CheckpointError, convert
from yivl_edge.selftest import (
    IMAGE_ROWS,
    SelfTest,
    error_limit,
    picture,
    relative_error,
    sample,
    sample_logits,
    spread,
)
from yivl_edge.verify import check_hashes, verify


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verify")
    for preset in ("f32", "q8_0", "q4_k_m"):
        convert(GOLDEN, folder / f"{preset}.gguf", type=preset)
    return {path.stem: path for path in folder.iterdir()}


def damaged(source: Path, target: Path, tensor: str) -> Path:
    """A copy in which one bit of a tensor is another."""
    data = bytearray(source.read_bytes())
    (found,) = (t for t in GGUFReader(source).tensors if t.name == tensor)
    data[found.data_offset + found.n_bytes // 2] ^= 1
    target.write_bytes(data)
    return target


def read(path: Path) -> SelfTest:
    test = SelfTest.read(_core.GgufFile.open(path).metadata)
    assert test is not None
    return test


@pytest.mark.parametrize("preset", ["f32", "q8_0", "q4_k_m"])
def test_sound_file_passes(files: dict[str, Path], preset: str) -> None:
    report = verify(files[preset])
    assert report.passed, report
    names = ["hashes", "pixels", "vision tower", "projector", "logits", "next tokens"]
    assert [check.name for check in report.checks] == names


def test_self_test_holds_what_torch_makes_of_the_source(files: dict[str, Path]) -> None:
    # The golden weights are bf16, so that an f32 file has the source's own: torch's outputs are both kinds' oracle.
    test, model, twin = read(files["f32"]), Model(files["f32"]), Twin(files["f32"])
    assert test.image is not None
    assert test.vision is not None
    assert test.projector is not None
    np.testing.assert_array_equal(test.image, picture())
    pixels = model.preprocess(test.image)
    embeddings = twin.encode_image(pixels)
    logits = twin.logits(test.ids, rows=embeddings[spread(IMAGE_ROWS, len(embeddings))])
    # Sums of a few hundred float32 products in another order: some 1e-6.
    for expected, found in (
        (test.vision, sample(twin.vision_features(pixels))),
        (test.projector, sample(embeddings)),
        (test.logits, sample_logits(logits)),
    ):
        assert relative_error(expected.source, found) < 2e-5
        assert relative_error(expected.file, found) < 2e-5
    assert test.top_ids == logits.argmax(-1).tolist()


def test_expected_errors_grow_with_coarser_types(files: dict[str, Path]) -> None:
    errors = [read(files[preset]).logits.error for preset in ("f32", "q8_0", "q4_k_m")]
    assert errors[0] < 1e-5 < 1e-3 < errors[1] < 0.05 < errors[2] < error_limit(["Q4_K"])


@pytest.mark.parametrize("tensor", ["v.blk.1.ffn_up.weight", "blk.2.attn_norm.weight", "output.weight"])
def test_single_flipped_bit_is_found(files: dict[str, Path], tmp_path: Path, tensor: str) -> None:
    path = damaged(files["q8_0"], tmp_path / "damaged.gguf", tensor)
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


def test_wrong_kernel_is_found(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the machine's kernels rounded 1% wrong: the engine's features differ from what numpy made of the weights.
    class Wrong:
        def __init__(self, *args: object) -> None:
            self._session = session(*args)

        def __getattr__(self, name: str) -> object:
            return getattr(self._session, name)

        def vision_features(self, *args: object) -> np.ndarray:
            features = self._session.vision_features(*args)
            return features * np.where(np.arange(features.shape[1]) % 7 == 0, 1.05, 1).astype(np.float32)

    session = _core.Session
    monkeypatch.setattr(verify_module._core, "Session", Wrong)
    failed = [check.name for check in verify(files["q8_0"]).checks if not check.passed]
    assert failed == ["vision tower"]


@pytest.mark.parametrize("preset", ["f16", "q8_0"])
def test_converter_that_forgets_the_order_of_rope_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.setattr(converter_module, "permute_heads", lambda rows, _: rows)
    with pytest.raises(CheckpointError, match="do not do what the source's do: logits differs by"):
        convert(GOLDEN, tmp_path / "out.gguf", type=preset)
    assert list(tmp_path.iterdir()) == []


def test_file_of_a_faulty_converter_is_found(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A converter whose weights are wrong and whose hashes and expectations agree with them: only the source's differ.
    monkeypatch.setattr(converter_module, "permute_heads", lambda rows, _: rows)
    monkeypatch.setattr("yivl_edge.convert.selftest.error_limit", lambda _: 9.0)
    monkeypatch.setattr("yivl_edge.convert.selftest._FINE", 1.0)
    convert(GOLDEN, tmp_path / "faulty.gguf", type="q8_0")
    failed = [check.name for check in verify(tmp_path / "faulty.gguf").checks if not check.passed]
    assert failed == ["logits"]


def test_files_without_hashes_or_self_test_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    convert(GOLDEN, tmp_path / "text.gguf", type="q8_0", layout="pair")
    with pytest.raises(ModelFileError, match="no self-test"):
        verify(tmp_path / "text.gguf")
    assert check_hashes(tmp_path / "text-mmproj.gguf") > 0
    data = files["q8_0"].read_bytes()
    (tmp_path / "bare.gguf").write_bytes(data.replace(b"yivl.sha256", b"yivl.sha999"))
    with pytest.raises(ModelFileError, match="carries no hashes"):
        Model(tmp_path / "bare.gguf", verify=True)
    (tmp_path / "half.gguf").write_bytes(data.replace(b"selftest.top_ids", b"selftest.top_idz"))
    with pytest.raises(ModelFileError, match="self-test is incomplete or damaged"):
        verify(tmp_path / "half.gguf")


def test_command_line(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(files["q4_k_m"])]) == 0
    out = capsys.readouterr().out
    assert "is sound (backend: " in out
    assert out.count("ok    ") == 6
    bad = damaged(files["q8_0"], tmp_path / "bad.gguf", "blk.0.ffn_up.weight")
    assert main(["verify", str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert report["checks"][0]["name"] == "hashes"
    assert main(["verify", str(tmp_path / "missing.gguf")]) == 1
    assert "missing.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_instruction_set_passes(files: dict[str, Path], isa: str) -> None:
    code = (
        "import sys; from yivl_edge.verify import verify; r = verify(sys.argv[1]); print(r.backend, r.passed)"
    )
    command = [sys.executable, "-c", code, str(files["q4_k_m"])]
    result = subprocess.run(command, env={"YIVL_ISA": isa}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [isa, "True"]
