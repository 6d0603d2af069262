"""Models of which a GPU runs a part, and how that part is chosen."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import test_golden
from emulated import EMULATOR, missing_device
from test_golden import QUESTIONS
from yivl_edge import DeviceError, Model, _core

pytestmark = pytest.mark.skipif(bool(missing_device()), reason=missing_device())
needs_emulator = pytest.mark.skipif(
    not EMULATOR, reason="needs a device whose memory can be set: make test-cuda-emulator runs this"
)

LAYERS = 3  # of the golden model


def plan(path: Path, n_ctx: int = 0) -> _core.MemoryPlan:
    file = _core.GgufFile.open(path)
    return _core.MemoryPlan(file, file, _core.read_config(file, file), n_ctx)


def set_free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Makes the card so large that so much is free."""
    monkeypatch.delenv("YIVL_EMULATOR_MEMORY", raising=False)
    _, total, free_now = _core.cuda_memory("cuda")
    monkeypatch.setenv("YIVL_EMULATOR_MEMORY", str(total - free_now + free))
    assert _core.cuda_memory("cuda")[2] == free


@pytest.fixture(scope="module", params=range(LAYERS + 1), ids=lambda n: f"{n}-layers")
def model(request: pytest.FixtureRequest, golden_f32: Path) -> Model:
    model = Model(golden_f32, device="cuda", n_gpu_layers=request.param, n_threads=2)
    assert model.n_gpu_layers == request.param
    assert model.n_threads == (2 if request.param < LAYERS else 1)
    return model


# With this file's `model`.
test_logits_at_every_position_are_the_references = (
    test_golden.test_logits_at_every_position_are_the_references
)


def test_greedy_ids_are_those_of_the_reference(
    model: Model, golden: dict[str, np.ndarray], golden_image: Path
) -> None:
    expected = golden["greedy_0"].tolist()
    reply = model.chat(golden_image, QUESTIONS[0], temperature=0, max_tokens=len(expected))
    assert reply.text == model.detokenize(expected).strip().removesuffix("\ufffd")
    ids = [*model.prompt_ids(QUESTIONS[0]), *expected]
    logits = _core.Session(model._model).logits(ids, model.preprocess(golden_image), _core.Control())
    assert logits[-len(expected) - 1 : -1].argmax(1).tolist() == expected


def test_a_prompt_in_several_batches_is_the_same(model: Model, golden_image: Path) -> None:
    ids, pixels = model.prompt_ids(QUESTIONS[0]), model.preprocess(golden_image)
    whole, parts = (
        _core.Session(model._model, batch=batch).logits(ids, pixels, _core.Control()) for batch in (1152, 50)
    )
    assert np.abs(whole - parts).max() < 1e-4


def test_activation_statistics_are_those_of_the_cpu(
    model: Model, golden_f32: Path, golden_image: Path
) -> None:
    sums = []
    for m in (model, Model(golden_f32, device="cpu")):
        statistics = _core.ActivationStatistics(m._model)
        ids, pixels = m.prompt_ids("What is this?"), m.preprocess(golden_image)
        _core.Session(m._model).logits(ids, pixels, _core.Control(), statistics)
        sums.append(statistics.columns)
    assert sums[0].keys() == sums[1].keys()
    for name, (values, rows, marked_values, marked_rows) in sums[0].items():
        assert (rows, marked_rows) == (sums[1][name][1], sums[1][name][3])
        np.testing.assert_allclose(values, sums[1][name][0], rtol=1e-3)
        np.testing.assert_allclose(marked_values, sums[1][name][2], rtol=1e-3)


def test_progress_counts_the_layers_of_both(model: Model) -> None:
    done: list[float] = []
    model.chat(
        None,
        "Hello",
        max_tokens=1,
        on_progress=lambda stage, f: done.append(f) if stage == "prefill" else None,
    )
    assert done == pytest.approx([(i + 1) / LAYERS for i in range(LAYERS)])


@needs_emulator
@pytest.mark.parametrize("n", range(LAYERS + 1))
def test_as_many_layers_as_fit_are_on_the_gpu(
    golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    needed = plan(golden_q4_0).on_device(n)
    set_free_memory(monkeypatch, needed)
    model = Model(golden_q4_0, device="cuda")
    assert model.n_gpu_layers == n
    # And it is as said: the reserve is for what is not counted.
    used = needed - _core.cuda_memory("cuda")[2]
    assert needed - _core.DEVICE_RESERVE <= used < needed - _core.DEVICE_RESERVE // 2
    assert model.chat(None, "Hello", temperature=0, max_tokens=3).usage.completion_tokens > 0
    if n > 0:
        set_free_memory(monkeypatch, plan(golden_q4_0).on_device(n) - 1)
        assert Model(golden_q4_0, device="cuda").n_gpu_layers == n - 1


@needs_emulator
def test_a_shorter_context_leaves_room_for_more_layers(
    golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = plan(golden_q4_0, 200).on_device(LAYERS)
    assert plan(golden_q4_0).most_layers(free) < LAYERS
    set_free_memory(monkeypatch, free)
    assert Model(golden_q4_0, device="cuda", n_ctx=200).n_gpu_layers == LAYERS


@needs_emulator
def test_layers_that_are_insisted_on_and_do_not_fit_are_an_error(
    golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_memory(monkeypatch, plan(golden_q4_0).on_device(2))
    assert Model(golden_q4_0, device="cuda", n_gpu_layers=1).n_gpu_layers == 1
    message = (
        r"cuda:0 \(emulated device\): with 3 of the decoder's 3 layers the model needs \d+ MB of its memory, "
    )
    with pytest.raises(
        MemoryError, match=message + r"\d+ MB of \d+ MB are free; fewer layers \(n_gpu_layers\)"
    ):
        Model(golden_q4_0, device="cuda", n_gpu_layers=3)


@needs_emulator
def test_a_card_without_room_for_the_vision_tower_is_an_error(
    golden_q4_0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_memory(monkeypatch, plan(golden_q4_0).on_device(0) - 1)
    for n_gpu_layers in (None, 0):
        with pytest.raises(MemoryError, match=r"with 0 of .* are free; a smaller n_ctx needs less"):
            Model(golden_q4_0, device="cuda", n_gpu_layers=n_gpu_layers)


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_number_of_layers_that_there_is_not_is_an_error(golden_q4_0: Path, device: str) -> None:
    message = f"n_gpu_layers: expected 0 to 3 with device '{device}', found 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        Model(golden_q4_0, device=device, n_gpu_layers=4)
    with pytest.raises(ValueError, match="n_gpu_layers: expected an integer from 0"):
        Model(golden_q4_0, device=device, n_gpu_layers=-1)


@needs_emulator
def test_the_cpu_has_no_gpu_layers(golden_q4_0: Path) -> None:
    assert Model(golden_q4_0, device="cpu", n_gpu_layers=0).n_gpu_layers == 0
    assert Model(golden_q4_0, n_gpu_layers=2).n_gpu_layers == 0  # auto does not take the emulator


@needs_emulator
def test_the_memory_of_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DeviceError, match="expected a device from 0 to 0, found 7"):
        _core.cuda_memory("cuda:7")
