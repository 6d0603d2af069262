"""How a model's file comes into memory: mapped, in large pages, read ahead of its use."""

from __future__ import annotations

import itertools
import platform
import sys
import time
from pathlib import Path

import pytest
from yivl_edge import Model
from yivl_edge._core import GgufFile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mappings")


def mapping_of(path: Path) -> dict[str, str]:
    """What Linux says of this process's mapping of a file."""
    lines = Path("/proc/self/smaps").read_text().partition(f"{path}\n")[2].splitlines()
    fields = itertools.takewhile(lambda line: line.split()[0].endswith(":"), lines)
    return dict(line.split(":", 1) for line in fields)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="this system has no transparent huge pages",
)
def test_a_file_asks_for_huge_pages(golden_f32: Path) -> None:
    file = GgufFile.open(golden_f32)
    assert "hg" in mapping_of(golden_f32)["VmFlags"].split()
    del file


@pytest.mark.skipif(
    tuple(int(n) for n in platform.release().split("-")[0].split(".")[:2]) < (5, 14),
    reason="Linux maps pages ahead since 5.14",
)
def test_an_open_model_is_read_before_it_is_asked(golden_f32: Path) -> None:
    model = Model(golden_f32, device="cpu")
    deadline = time.monotonic() + 30
    while (fields := mapping_of(golden_f32))["Rss"].split() != fields["Size"].split():
        assert time.monotonic() < deadline, (fields["Rss"], fields["Size"])
        time.sleep(0.01)
    del model
