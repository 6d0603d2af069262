"""What a device that fails does: an exception, and everything else lives on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import EMULATOR
from yivl_edge import DeviceError, Model, _core

pytestmark = pytest.mark.skipif(
    not EMULATOR, reason="needs a device that fails when asked to: make test-cuda-emulator runs this"
)

FAIL = "YIVL_EMULATOR_FAIL"
QUESTION = "What is this?"


def free_memory() -> int:
    gc.collect()
    return _core.cuda_memory("cuda")[2]


def ask(model: Model, image: Path, tokens: int = 4) -> str:
    return model.chat(image, QUESTION, temperature=0, max_tokens=tokens).text


@pytest.fixture(scope="module")
def bystanders(golden_q4_0: Path, golden_image: Path) -> list[tuple[Model, str]]:
    """A model on the device and one on the CPU that are open all the time, and what they answer."""
    models = [Model(golden_q4_0, device=device, n_threads=1) for device in ("cuda", "cpu")]
    return [(model, ask(model, golden_image)) for model in models]


@pytest.fixture(autouse=True)
def nothing_is_lost(bystanders: list[tuple[Model, str]], golden_image: Path) -> Iterator[None]:
    """After each test the other models answer as before, and the memory is free again."""
    before = free_memory()
    yield
    assert free_memory() >= before  # more, where the others' intermediate results went with a lost device
    for model, answer in bystanders:
        assert ask(model, golden_image) == answer


def test_memory_that_cannot_be_had_is_an_error_wherever_it_happens(
    golden_q4_0: Path,
    golden_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    bystanders: list[tuple[Model, str]],
) -> None:
    failed, n = 0, 1
    while True:
        monkeypatch.setenv(FAIL, f"allocation:{n}")
        try:
            assert ask(Model(golden_q4_0, device="cuda"), golden_image) == bystanders[0][1]
            break  # there are fewer allocations
        except MemoryError as error:
            message = str(error)
        assert "cannot allocate" in message
        failed += 1
        n += 1 + n // 8
    assert failed > 10
    monkeypatch.delenv(FAIL)


def test_a_model_goes_on_after_a_reply_that_found_no_memory(
    golden_q4_0: Path,
    golden_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    bystanders: list[tuple[Model, str]],
) -> None:
    failed = 0
    for n in (1, 2, 4, 7, 10):
        model = Model(golden_q4_0, device="cuda")
        monkeypatch.setenv(FAIL, f"allocation:{n}")
        try:
            ask(model, golden_image)
        except MemoryError:
            failed += 1
        monkeypatch.delenv(FAIL)
        assert ask(model, golden_image) == bystanders[0][1]
        del model
    assert failed >= 3


def test_tokens_that_a_penalty_counts_seldom_take_memory(
    golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = Model(golden_q4_0, device="cuda").chat(
        None, QUESTION, temperature=0, repetition_penalty=1.1, max_tokens=40, stream=True
    )
    for _ in range(3):
        next(reply)
    monkeypatch.setenv(FAIL, "allocation:2")  # one: where the room for them doubles
    assert reply.result.usage.completion_tokens > 20


@pytest.mark.parametrize("n", [1, 40, 100, 200, 260])
def test_a_lost_device_is_an_error_until_it_is_back(
    golden_q4_0: Path,
    golden_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    bystanders: list[tuple[Model, str]],
    n: int,
) -> None:
    """While loading, in the vision tower, in the prompt, in a step that is recorded and in one that was."""
    models: list[Model] = []
    monkeypatch.setenv(FAIL, f"launch:{n}")
    with pytest.raises(DeviceError, match="the emulated device is lost"):  # noqa: PT012
        models.append(Model(golden_q4_0, device="cuda"))
        ask(models[0], golden_image, 8)
    (on_device, _), (on_cpu, answer) = bystanders
    for other in (on_device, *models):
        with pytest.raises(DeviceError, match="lost"):
            ask(other, golden_image)
    with pytest.raises(DeviceError, match="lost"):
        Model(golden_q4_0, device="cuda")
    assert "cuda" not in Model(golden_q4_0).device  # auto
    assert ask(on_cpu, golden_image) == answer
    models.clear()
    gc.collect()  # with the device lost
    monkeypatch.delenv(FAIL)


def test_a_card_that_is_too_old_is_an_error(golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YIVL_EMULATOR_CAPABILITY", "70")
    message = r"expected compute capability 7.5 or newer, found 7.0 \(emulated device\)"
    with pytest.raises(DeviceError, match=message):
        Model(golden_q4_0, device="cuda")
    with pytest.raises(DeviceError, match=message):
        _core.cuda_memory("cuda")
