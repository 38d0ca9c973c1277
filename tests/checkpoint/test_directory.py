"""The layout on disk, and that a directory appears whole or not at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch.checkpoint import directory as layout


def _complete(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name in (".metadata", "metadata.json"):
        (directory / name).touch()


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(("iteration", "name"), [(None, "release"), (10, "iter_0000010"), (12345678, "iter_12345678")])
def test_the_tracker_leads_to_what_was_written(tmp_path: Path, iteration: int | None, name: str) -> None:
    _complete(layout.iteration_directory(tmp_path, iteration))
    layout.write_tracker(tmp_path, iteration)
    assert layout.latest(tmp_path) == (tmp_path / name, iteration)
    assert layout.locate(tmp_path) == layout.locate(tmp_path / name) == (tmp_path, tmp_path / name, iteration)
    assert sorted(os.listdir(tmp_path)) == sorted([name, layout.TRACKER])


def test_no_tracker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no Megatron checkpoint: it has no latest_checkpointed_iteration.txt"):
        layout.latest(tmp_path)


def test_a_tracker_with_nonsense_is_an_error(tmp_path: Path) -> None:
    (tmp_path / layout.TRACKER).write_text("yesterday")
    with pytest.raises(ValueError, match="holds 'yesterday'; it must hold 'release' or an iteration number"):
        layout.latest(tmp_path)


def test_a_tracker_that_points_nowhere_is_an_error(tmp_path: Path) -> None:
    layout.write_tracker(tmp_path, 7)
    with pytest.raises(ValueError, match="iter_0000007 does not exist"):
        layout.latest(tmp_path)


def test_a_half_written_iteration_is_an_error(tmp_path: Path) -> None:
    _complete(tmp_path / "iter_0000007")
    (tmp_path / "iter_0000007" / ".metadata").unlink()
    layout.write_tracker(tmp_path, 7)
    for path in (tmp_path, tmp_path / "iter_0000007"):
        with pytest.raises(ValueError, match=r"is incomplete: \.metadata missing"):
            layout.locate(path)


def test_the_config_is_found_from_every_place(tmp_path: Path) -> None:
    _complete(tmp_path / "iter_0000001")
    layout.huggingface_directory(tmp_path).mkdir()
    (layout.huggingface_directory(tmp_path) / "config.json").write_text('{"a": 1}')
    for path in (tmp_path, tmp_path / "iter_0000001", layout.huggingface_directory(tmp_path)):
        assert layout.read_config(path) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "holds no model"), ("{", "is no valid JSON"), ("[]", "must hold a JSON object, not list")],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        layout.read_config(tmp_path)


def test_side_files_are_everything_but_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = {"config.json", "tokenizer.model", "modeling_x.py", "LICENSE", "extra/notes.txt"}
    left = {
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "x.gguf",
        "original/a.pth",
        ".git/x",
    }
    for name in kept | left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    layout.copy_side_files(source, target)
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == kept


def test_links_are_copied_as_the_files_they_lead_to(tmp_path: Path) -> None:
    source, target = tmp_path / "snapshot", tmp_path / "target"
    source.mkdir()
    (tmp_path / "blob").write_text("content")
    (source / "config.json").symlink_to(tmp_path / "blob")
    layout.copy_side_files(source, target)
    assert (target / "config.json").read_text() == "content" and not (target / "config.json").is_symlink()


def test_a_new_root_gets_the_side_files_once(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"a": 1}')
    layout.carry_huggingface(tmp_path / "hf", tmp_path / "one")
    layout.carry_huggingface(tmp_path / "one", tmp_path / "two")
    (tmp_path / "hf" / "config.json").write_text('{"a": 2}')
    layout.carry_huggingface(tmp_path / "hf", tmp_path / "two")
    assert layout.read_config(tmp_path / "two") == {"a": 1}


# ------------------------------------------------------------------------------------------------------------ staging


def test_a_staged_directory_takes_its_place_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "made" / "here"
    with layout.staging(final) as staged:
        (staged / "file").write_text("x")
        assert not final.exists() and staged.parent == final.parent
    assert (final / "file").read_text() == "x"
    assert os.listdir(final.parent) == ["here"]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), layout.staging(tmp_path / "final") as staged:
        (staged / "file").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_an_exception_leaves_the_former_directory_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    with pytest.raises(RuntimeError), layout.staging(tmp_path / "final", overwrite=True) as staged:
        (staged / "file").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path / "final") == ["old"] and os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_the_former_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:  # as on file systems without RENAME_EXCHANGE
        monkeypatch.setattr(layout, "_exchange", lambda one, other: False)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    with pytest.raises(ValueError, match="exists; give --overwrite"), layout.staging(tmp_path / "final"):
        pass
    with layout.staging(tmp_path / "final", overwrite=True) as staged:
        (staged / "new").touch()
    assert os.listdir(tmp_path / "final") == ["new"] and os.listdir(tmp_path) == ["final"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with layout.staging(tmp_path / "final") as staged:
        (staged / "new").touch()
    assert os.listdir(tmp_path / "final") == ["new"]


def test_leftovers_of_dead_processes_are_cleared_and_others_kept(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead, alive = f".final.tmp-{host}-{_dead_pid()}", f".final.tmp-{host}-{os.getppid()}"
    elsewhere, other = f".final.tmp-not-{host}-1", f".final2.tmp-{host}-{_dead_pid()}"
    for name in (dead, alive, elsewhere, other):
        (tmp_path / name).mkdir()
    with layout.staging(tmp_path / "final"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([alive, elsewhere, other, "final"])


def test_a_replacement_killed_half_way_gives_back_the_former_directory(tmp_path: Path) -> None:
    old = tmp_path / f".final.old-{socket.gethostname()}-{_dead_pid()}"
    old.mkdir()
    (old / "precious").touch()
    with pytest.raises(ValueError, match="exists"), layout.staging(tmp_path / "final"):
        pass
    assert os.listdir(tmp_path / "final") == ["precious"]
