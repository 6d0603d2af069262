"""Which device a model takes, where there is no GPU."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from emulated import EMULATOR
from yivl_edge import DeviceError, Model, _core


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda1", "CPU", "cuda: 1"]
)
def test_a_device_of_another_name_is_an_error(golden_f32: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"expected 'auto', 'cpu', 'cuda' or 'cuda:N', found '{name}'"):
        Model(golden_f32, device=name)


def test_the_cpu_can_be_asked_for(golden_f32: Path) -> None:
    assert Model(golden_f32, device="cpu").device in _core.available_isas()


def test_the_cpu_takes_no_gpu_layers(golden_f32: Path) -> None:
    assert Model(golden_f32, device="cpu", n_gpu_layers=0).n_gpu_layers == 0
    with pytest.raises(ValueError, match="n_gpu_layers: expected 0 or None with device 'cpu', found 2"):
        Model(golden_f32, device="cpu", n_gpu_layers=2)


def test_auto_is_the_cpu_where_its_instruction_set_is_chosen(
    golden_f32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YIVL_ISA", "portable")
    assert Model(golden_f32, device="auto").device == "portable"


def test_what_was_opened_is_logged_whatever_its_name(
    golden_f32: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = os.fsencode(tmp_path) + b"/\xff%s.gguf"  # no text, and no format
    shutil.copy(os.fsencode(golden_f32), path)
    with caplog.at_level(logging.INFO, "yivl_edge"):
        model = Model(os.fsdecode(path), device="cpu")
    assert caplog.messages == [f"opened {os.fsdecode(path)} on {model.device}"]


def has_cuda() -> bool:
    try:
        _core.cuda_device()
    except DeviceError:
        return False
    return True


@pytest.mark.skipif(has_cuda(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_without_a_gpu_cuda_says_what_is_missing(
    golden_f32: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    missing = "driver|GPU" if EMULATOR else "this build of yivl-edge has none|driver|GPU"
    with pytest.raises(DeviceError, match=f"CUDA: .*({missing})"):
        Model(golden_f32, device=name)
    with caplog.at_level(logging.INFO, "yivl_edge"):
        model = Model(golden_f32, device="auto")
    assert caplog.messages[0].startswith("no GPU: ")
    assert model.device in _core.available_isas()
    assert model.chat(None, "Hello", max_tokens=1).usage.completion_tokens == 1


def test_the_module_needs_no_library_of_cuda() -> None:
    assert _core.__file__ is not None
    assert b"libcudart.so" not in Path(_core.__file__).read_bytes()
