"""Where the converter writes: all or nothing, whatever fails, and where the path leads."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GOLDEN, VIT_NAME, write_checkpoint
from yivl_edge import Model
from yivl_edge.convert import CheckpointError, convert
from yivl_edge.convert import converter as converter_module
from yivl_edge.convert import writer as writer_module
from yivl_edge.convert.__main__ import main
from yivl_edge.files import write_whole


def folder_state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def out_folder(tmp_path: Path) -> Path:
    """A folder with an old conversion, which a failure must leave as it is."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.gguf").write_bytes(b"old text")
    (folder / "out-mmproj.gguf").write_bytes(b"old vision")
    return folder


@pytest.mark.parametrize("layout", ["single", "pair"])
def test_replaces_old_files_and_leaves_nothing_else(out_folder: Path, layout: str) -> None:
    convert(GOLDEN, out_folder / "out.gguf", layout=layout)
    state = folder_state(out_folder)
    assert set(state) == {"out.gguf", "out-mmproj.gguf"}
    assert state["out.gguf"][:4] == b"GGUF"
    assert (state["out-mmproj.gguf"][:4] == b"GGUF") == (layout == "pair")


def test_full_disk_leaves_the_old_state(out_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder_state(out_folder)
    calls = 0

    def fill_up(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module.os, "fsync", fill_up)
    with pytest.raises(OSError, match="No space left"):
        convert(GOLDEN, out_folder / "out.gguf", layout="pair")
    assert folder_state(out_folder) == before


def test_too_little_space_is_told_before_anything_is_written(
    out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(out_folder)
    usage = shutil.disk_usage(out_folder)._replace(free=1_000_000)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda _folder: usage)
    with pytest.raises(OSError, match=r"0\.01 GB needed, 0\.00 GB free"):
        convert(GOLDEN, out_folder / "out.gguf", type="f16")
    assert folder_state(out_folder) == before


def test_too_little_memory_is_told_before_anything_is_written(
    out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(out_folder)
    monkeypatch.setattr(converter_module, "_MEMORY", 1 << 60)
    with pytest.raises(MemoryError, match=r"converting needs .* GB of memory, .* GB are available"):
        convert(GOLDEN, out_folder / "out.gguf")
    assert folder_state(out_folder) == before


def test_failed_rename_of_the_second_half_takes_the_first_back(
    out_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_state(out_folder)
    replace = Path.replace

    def refuse_mmproj(self: Path, target: Path) -> Path:
        if target.name == "out-mmproj.gguf" and self.read_bytes()[:4] == b"GGUF":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse_mmproj)
    with pytest.raises(PermissionError):
        convert(GOLDEN, out_folder / "out.gguf", layout="pair")
    assert folder_state(out_folder) == before


@pytest.mark.parametrize("dry_run", [False, True])
def test_output_folder_must_exist(tmp_path: Path, dry_run: bool) -> None:
    with pytest.raises(FileNotFoundError, match=r"out\.gguf: expected a file's name in a folder that exists"):
        convert(GOLDEN, tmp_path / "missing" / "out.gguf", type="q8_0", dry_run=dry_run)


def test_links_that_lead_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to("b.gguf")
    (tmp_path / "b.gguf").symlink_to("a.gguf")
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: .*a\.gguf"):
        convert(GOLDEN, tmp_path / "a.gguf", type="q8_0")
    with pytest.raises(CheckpointError, match=r"a\.gguf does not exist"):
        convert(tmp_path / "a.gguf", tmp_path / "out.gguf", type="q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_output_through_a_link_goes_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to("out.gguf")
    convert(GOLDEN, tmp_path / "link.gguf", type="q8_0")
    assert (tmp_path / "link.gguf").is_symlink()
    assert not (tmp_path / "out.gguf").is_symlink()


def test_output_must_not_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").mkdir()
    (tmp_path / "file").touch()
    for output in ("out.gguf", "file/out.gguf", "no such folder/out.gguf"):
        with pytest.raises(FileNotFoundError, match="expected a file's name in a folder that exists"):
            convert(GOLDEN, tmp_path / output)


def test_output_must_not_be_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.gguf")
    with pytest.raises(OSError, match=r"out\.gguf: expected a file, found a pipe or a device"):
        convert(GOLDEN, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").is_fifo()


def test_a_folder_that_nobody_may_write_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # root, as whom tests may run, may write everywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (path == tmp_path and mode & os.W_OK)
    )
    with pytest.raises(PermissionError, match=r"out\.gguf: expected a folder that may be written to"):
        convert(GOLDEN, tmp_path / "out.gguf", dry_run=True)


@pytest.mark.parametrize(
    "part",
    ["config.json", "tokenizer.model", "model-00001-of-00002.safetensors", f"vit/{VIT_NAME}/config.json"],
)
def test_output_does_not_take_the_place_of_a_part_of_the_folder(tmp_path: Path, part: str) -> None:
    folder = write_checkpoint(tmp_path / "model", decoder_layers=1)
    before = (folder / part).read_bytes()
    with pytest.raises(ValueError, match=r"expected another file than .*, which it would replace"):
        convert(folder, folder / part)
    assert (folder / part).read_bytes() == before


def test_output_may_lie_in_the_folder_and_be_made_anew(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", decoder_layers=1)
    for preset in ("f16", "q8_0"):
        convert(folder, folder / "model.gguf", type=preset)
    assert Model(folder / "model.gguf").config.decoder.n_layers == 1


@pytest.mark.parametrize("dry_run", [False, True])
def test_output_does_not_take_the_place_of_what_is_read(tmp_path: Path, dry_run: bool) -> None:
    text, vision = tmp_path / "in.gguf", tmp_path / "in-mmproj.gguf"
    convert(GOLDEN, text, layout="pair", type="q8_0")
    link, mmproj_link = tmp_path / "link.gguf", tmp_path / "other-mmproj.gguf"
    link.symlink_to(text)
    mmproj_link.symlink_to(vision)
    before = folder_state(tmp_path)
    for output, layout, named in (
        (text, "single", (text, text)),
        (link, "single", (link, text)),
        (vision, "single", (vision, vision)),
        (text, "pair", (text, text)),
        (tmp_path / "other.gguf", "pair", (mmproj_link, vision)),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"{named[0]}: expected another file than {named[1]}, which")
        ):
            convert(text, output, mmproj=vision, layout=layout, type="q4_0", dry_run=dry_run)
    assert folder_state(tmp_path) == before


class CancelledError(Exception):
    pass


def test_progress_rises_to_one_and_can_cancel(out_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter_module, "_CHUNK", 100_000)
    calls: list[tuple[str, float]] = []
    convert(
        GOLDEN, out_folder / "out.gguf", on_progress=lambda stage, fraction: calls.append((stage, fraction))
    )
    assert {stage for stage, _ in calls} == {"convert"}
    fractions = [fraction for _, fraction in calls]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert max(np.diff([0.0, *fractions])) < 0.1

    before = folder_state(out_folder)

    def cancel(_stage: str, fraction: float) -> None:
        if fraction > 0.5:
            raise CancelledError

    with pytest.raises(CancelledError):
        convert(GOLDEN, out_folder / "out.gguf", on_progress=cancel)
    assert folder_state(out_folder) == before


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP)],
)
def test_signal_midway_leaves_the_old_state(
    tmp_path: Path, out_folder: Path, number: signal.Signals, status: int
) -> None:
    folder = write_checkpoint(tmp_path / "model", vit_format="safetensors")  # torch takes long to start
    before = folder_state(out_folder)
    # The command line, made to wait in the middle so that the signal cannot come too late.
    code = (
        "import sys, time; import yivl_edge.convert.converter as c; encode = c._encode\n"
        "def wait(tensor, *rest):\n"
        "    if tensor.name == 'blk.1.ffn_up.weight': print('halfway', flush=True); time.sleep(2)\n"
        "    return encode(tensor, *rest)\n"
        "c._encode = wait\n"
        "from yivl_edge.convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(folder), "-o", str(out_folder / "out.gguf")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    assert len(list(out_folder.iterdir())) == 3
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status
    assert "Traceback" not in stderr
    assert folder_state(out_folder) == before


def test_a_pair_is_renamed_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("out.gguf", "out-mmproj.gguf"):
        (tmp_path / name).write_bytes(b"old")
    replace = Path.replace

    def then_terminate(self: Path, target: Path) -> Path:
        done = replace(self, target)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(Path, "replace", then_terminate)
    with pytest.raises(SystemExit) as end:
        main([str(GOLDEN), "-o", str(tmp_path / "out.gguf"), "--layout", "pair"])
    assert end.value.code == 128 + signal.SIGTERM
    heads = {path.name: path.read_bytes()[:4] for path in tmp_path.iterdir()}
    assert heads == {"out.gguf": b"GGUF", "out-mmproj.gguf": b"GGUF"}


def test_what_is_left_of_an_interrupted_write_vanishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"abc")
    assert not list(tmp_path.iterdir())
