"""Emulated 64-bit ARM CPUs beside this machine: the same bits of integer products, the twin's logits.

`make test-neon` runs this, and other tests on the emulated CPUs alone (tests/aarch64/run.sh).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from closeness import relative_l2
from on_arm import QUESTION, products
from test_exactness import tolerance, wide_f32  # noqa: F401  a fixture
from test_kernels import INTEGER_TYPES
from twin import Twin
from weight_types import ALL_TYPES, retype
from yivl_edge import Model, _core

# A Python that runs on the CPU that YIVL_ARM_CPU names.
PYTHON = os.environ.get("YIVL_ARM_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="needs qemu and a cross compiler: make test-neon runs this"
)

ON_ARM = Path(__file__).with_name("on_arm.py")

# What qemu can be, and the variant of the NEON kernels that such a CPU should get.
VARIANTS = {"cortex-a72": "", "cortex-a76": "dotprod", "max": "i8mm"}


def on_cpu(cpu: str, *arguments: str | Path) -> str:
    return subprocess.run(
        [PYTHON, *arguments],
        env={**os.environ, "YIVL_ARM_CPU": cpu},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("cpu", VARIANTS)
def test_a_cpu_gets_the_variant_for_what_it_has(cpu: str) -> None:
    code = "from yivl_edge import _core; print(_core.available_isas(), repr(_core.isa_variant('neon')))"
    assert on_cpu(cpu, "-c", code) == f"['neon', 'portable'] {VARIANTS[cpu]!r}"


def test_integer_products_are_the_same_bits_on_all_cpus(tmp_path: Path) -> None:
    results = {isa: products(isa) for isa in ("avx2", "avx512") if isa in _core.available_isas()}
    for cpu in VARIANTS:
        on_cpu(cpu, ON_ARM, "products", tmp_path / f"{cpu}.npz")
        with np.load(tmp_path / f"{cpu}.npz") as arrays:
            results[cpu] = dict(arrays)
    expected = results.popitem()[1]
    for cpu, found in results.items():
        for name, y in found.items():
            np.testing.assert_array_equal(y, expected[name], f"{name} on {cpu}")


@pytest.mark.parametrize("cpu", VARIANTS)
def test_every_weight_type_computes_what_its_dequantised_weights_do(
    cpu: str,
    wide_f32: Path,  # noqa: F811
    golden_image: Path,
    tmp_path: Path,
) -> None:
    # The variants differ in products of integers.
    isas, kinds = ("neon", "portable"), ALL_TYPES
    if cpu != "max":
        isas, kinds = ("neon",), [kind for kind in ALL_TYPES if kind.name in INTEGER_TYPES]
    files = [retype(wide_f32, tmp_path / f"{kind.name}.gguf", kind) for kind in kinds]
    results_file = tmp_path / "logits.npz"
    on_cpu(cpu, ON_ARM, "logits", results_file, ",".join(isas), golden_image, *files)
    with np.load(results_file) as arrays:
        results = dict(arrays)
    assert len(results) == len(isas) * len(files)
    for path in files:
        model = Model(path)
        expected = Twin(path).logits(model.prompt_ids(QUESTION), model.preprocess(golden_image))
        for isa in isas:
            assert relative_l2(results[f"{isa} {path.stem}"], expected) <= tolerance(isa, path.stem), (
                isa,
                path.stem,
            )
