"""--resume goes on with the very same conversion only, keeps what it refuses, and does nothing where all is done."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint import moving
from megatron_patch.checkpoint.convert import Report, convert
from megatron_patch.checkpoint.manifest import Entry, Journal
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from megatron_patch.launch.main import main
from tests.checkpoint.dying import differences

Directory = Callable[[str], Path]
TP2_PP2 = Wanted(format="legacy", layout=Layout(2, Pipeline(2)))
TENSORS = 27


@pytest.fixture
def source(hf: Directory, tmp_path: Path) -> Path:
    """A Hugging Face directory that a test may change."""
    return Path(shutil.copytree(hf("gqa"), tmp_path / "hf"))


@pytest.fixture
def target(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target that a conversion was interrupted at, half way."""
    monkeypatch.setattr(moving, "_SETTLE", 1)
    monkeypatch.setattr(moving, "MEMORY", 1)  # one tensor at a time: those in work are finished before it stops
    stop_half_way(source, tmp_path / "target")
    return tmp_path / "target"


def stop_half_way(source: Path, target: Path, wanted: Wanted = TP2_PP2) -> None:
    moved: list[str] = []

    def stop(name: str, done: int, total: int) -> None:
        moved.append(name)
        if len(moved) > TENSORS // 2:
            raise InterruptedError("the power is gone")

    with pytest.raises(OSError, match=r"the power is gone; what is done so far is kept in .*: --resume goes on with"):
        convert(source, target, wanted, progress=stop)
    assert not target.exists() and layout.partial_of(target).is_dir()


def resume(source: Path, target: Path, wanted: Wanted = TP2_PP2) -> tuple[Report, list[str]]:
    """The report, and the tensors that were moved."""
    moved: list[str] = []
    return convert(source, target, wanted, resume=True, progress=lambda name, *_: moved.append(name)), moved


def assert_as_undisturbed(source: Path, target: Path) -> None:
    whole = target.with_name("undisturbed")
    convert(source, whole, TP2_PP2)
    assert differences(target, whole) == []
    assert not list(target.parent.glob(f".{target.name}.*"))


def test_only_the_rest_is_done(source: Path, target: Path) -> None:
    report, moved = resume(source, target)
    assert TENSORS // 2 < report.resumed < TENSORS - 2 and len(moved) == len(set(moved)) == TENSORS - report.resumed
    assert_as_undisturbed(source, target)


def test_without_resume_a_partial_conversion_is_thrown_away(source: Path, target: Path) -> None:
    (layout.partial_of(target) / "stray").touch()
    moved: list[str] = []
    report = convert(source, target, TP2_PP2, progress=lambda name, *_: moved.append(name))
    assert report.resumed == 0 and len(moved) == TENSORS
    assert_as_undisturbed(source, target)


def test_resuming_what_was_never_begun_begins_it(source: Path, tmp_path: Path) -> None:
    report, moved = resume(source, tmp_path / "target")
    assert report.resumed == 0 and len(moved) == TENSORS


def test_resuming_what_is_done_says_so_and_rewrites_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "--source", str(source), "--target", str(tmp_path / "target")]
    assert main(command) == 0

    def states() -> dict[Path, tuple[int, int]]:
        paths = [tmp_path / "target", *(tmp_path / "target").rglob("*")]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    before = states()
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert f"{TENSORS} tensors were done already" in capsys.readouterr().out
    assert states() == before and not list(tmp_path.glob(".target*"))


def test_a_finished_target_that_lost_a_file_is_not_taken_for_done(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "target", TP2_PP2)
    shutil.rmtree(tmp_path / "target" / "release" / "mp_rank_01_001")
    with pytest.raises(ValueError, match="exists; give --overwrite to replace it"):
        resume(source, tmp_path / "target")


def test_a_tensor_enters_the_journal_once_its_files_are_forced_to_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, add, synced, noted = layout.sync, Journal.add, set(), []

    def watched_sync(path: Path, **options: bool) -> None:
        sync(path, **options)
        synced.add(path)

    def watched_add(journal: Journal, entries: list[Entry]) -> None:
        partial = layout.partial_of(tmp_path / "target")
        assert {partial / file for entry in entries for file in entry.files} <= synced
        synced.clear()
        noted.extend(entries)
        add(journal, entries)

    monkeypatch.setattr(moving, "_SETTLE", 1)
    monkeypatch.setattr(layout, "sync", watched_sync)
    monkeypatch.setattr(Journal, "add", watched_add)
    convert(source, tmp_path / "target", TP2_PP2)
    assert len(noted) == TENSORS


# -------------------------------------------------------------------------------------------- another conversion


def _other_weights(source: Path) -> Wanted:
    file = sorted(source.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes())  # another time of change
    return TP2_PP2


def _other_config(source: Path) -> Wanted:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 1e-6}))
    return TP2_PP2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda source: Wanted(format="legacy", layout=TP2_PP2.layout, dtype=torch.bfloat16),
            r"options dtype was None, now is torch\.bfloat16\.",
        ),
        (lambda source: Wanted(format="legacy", layout=Layout(2)), r"options layout was TP2 PP2, now is TP2 PP1\."),
        (lambda source: Wanted(format="torch_dist"), r"target_kind was legacy TP2 PP2.*, now is torch_dist"),
        (_other_weights, r"source_files model-00001-of-00010\.safetensors was \[\d+, \d+\], now is"),
        (_other_config, r"config rms_norm_eps was 1e-05, now is 1e-06\."),
    ],
    ids=["dtype", "layout", "format", "weights", "config"],
)
def test_another_conversion_is_refused_and_the_partial_one_kept(
    source: Path, target: Path, change: Callable[[Path], Wanted], message: str
) -> None:
    kept = layout.partial_of(target)
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"was begun with something else: .*{message}.*Start over without --resume"):
        resume(source, target, change(source))
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before and not target.exists()


def test_a_second_conversion_to_the_same_place_is_refused_while_the_first_runs(source: Path, tmp_path: Path) -> None:
    target, running, go_on = tmp_path / "target", threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        running.set()
        assert go_on.wait(60)

    first = threading.Thread(target=lambda: convert(source, target, TP2_PP2, progress=wait))
    first.start()
    assert running.wait(60)
    for again in (False, True):
        with pytest.raises(ValueError, match=r"another process is writing .*\.target\.partial; wait for it, or end it"):
            convert(source, target, TP2_PP2, resume=again)
    go_on.set()
    first.join()
    assert_as_undisturbed(source, target)


# ------------------------------------------------------------------------------------------------------ odd leftovers


def test_half_a_line_in_the_journal_costs_no_other_line(source: Path, target: Path) -> None:
    (journal,) = layout.partial_of(target).glob(".journal-*")
    content = journal.read_text()
    journal.write_text(content[: len(content) - 20])  # killed while the line was being written
    first, _ = content.splitlines()[0], stop_again(source, target)
    assert journal.read_text().startswith(first)
    report, moved = resume(source, target)
    assert report.resumed + len(moved) == TENSORS
    assert_as_undisturbed(source, target)


def stop_again(source: Path, target: Path) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError("the power is gone")

    with pytest.raises(OSError, match="the power is gone"):
        convert(source, target, TP2_PP2, resume=True, progress=stop)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["gone", "cut"])
def test_a_file_that_was_lost_since_is_an_error(source: Path, target: Path, damage: Callable[[Path], None]) -> None:
    damage(layout.partial_of(target) / "release" / "mp_rank_01_000" / "model_optim_rng.pt")
    with pytest.raises(ValueError, match=r"mp_rank_01_000/model_optim_rng\.pt is not as it was left: start over"):
        resume(source, target)
    assert not target.exists()


def test_a_partial_conversion_that_was_half_thrown_away_is_not_gone_on_with(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        (next(path.rglob("*.pt"))).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layout.shutil, "rmtree", interrupted)
        convert(source, target, TP2_PP2)
    report, _ = resume(source, target)
    assert report.resumed == 0
    assert_as_undisturbed(source, target)


def test_a_target_that_came_to_be_in_the_meantime_is_not_replaced(source: Path, target: Path) -> None:
    def appear(*_: object) -> None:
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text("{}")

    with pytest.raises(OSError, match=r"target has come to be in the meantime; what is done so far is kept"):
        convert(source, target, TP2_PP2, resume=True, progress=appear)
    assert (target / "config.json").read_text() == "{}"
    report = convert(source, target, TP2_PP2, resume=True, overwrite=True)
    assert report.resumed == TENSORS
    assert_as_undisturbed(source, target)


def test_an_interrupted_replacement_is_undone_before_it_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert(source, target)
    target.rename(layout._beside(target, "old"))  # killed between the two renames of a replacement
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        convert(source, target, TP2_PP2)
    assert layout.latest(target)[1] is None
