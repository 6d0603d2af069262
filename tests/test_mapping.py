"""What of a model is in memory: its file, mapped in large pages and read ahead, and of the KV cache what is used."""

from __future__ import annotations

import mmap
import platform
import sys
import time
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from yivl_edge import Model
from yivl_edge._core import GgufFile
from yivl_edge.convert import convert

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mappings")


without_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(),
    reason="this system has no transparent huge pages",
)


def mappings() -> list[tuple[str, dict[str, str]]]:
    """This process's mappings: the line that names one, and what Linux says of it."""
    found: list[tuple[str, dict[str, str]]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:
            found.append((line, {}))
        else:
            found[-1][1][name] = value
    return found


def mapping_of(path: Path) -> dict[str, str]:
    (fields,) = (fields for line, fields in mappings() if line.endswith(str(path)))
    return fields


def kilobytes(value: str) -> int:
    number, unit = value.split()
    assert unit == "kB"
    return int(number)


@without_huge_pages
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


@without_huge_pages
def test_of_the_kv_cache_only_what_is_used_takes_memory(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path / "model", heads=4, kv_heads=4, mlp=512, config={"max_position_embeddings": 16384}
    )
    convert(tmp_path / "model", tmp_path / "model.gguf", type="f32")

    def in_small_pages() -> dict[str, tuple[int, int]]:
        return {
            line: (kilobytes(fields["Size"]), kilobytes(fields["Rss"]))
            for line, fields in mappings()
            if "nh" in fields["VmFlags"].split()
        }

    before = in_small_pages()
    model = Model(tmp_path / "model.gguf", device="cpu")
    used = model.chat(None, "Why?", max_tokens=8).usage
    sizes, resident = zip(*(in_small_pages()[line] for line in in_small_pages().keys() - before), strict=True)
    # Keys and values of two layers of 4 heads of 128 in float32.
    token = 2 * 2 * 4 * 128 * 4
    assert sum(sizes) * 1024 >= 16384 * token
    # Of each head's keys and values a page may be begun and not full. In huge pages it would be a quarter of all.
    positions = used.prompt_tokens + used.completion_tokens
    assert positions * token <= sum(resident) * 1024 <= positions * token + 2 * 2 * 4 * 2 * mmap.PAGESIZE
