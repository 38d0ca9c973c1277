"""The command itself: its table, its exit codes, how it reports errors, and how it starts several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_patch.launch import main as command
from megatron_patch.launch import processes

PYTHON = [sys.executable, "-m", "megatron_patch"]


def sub_command(error: BaseException | None = None):
    """A sub-command that raises, or returns 0."""

    def main(argv: list[str]) -> int:
        if error:
            raise error
        return 0

    return lambda name: SimpleNamespace(main=main)


def test_without_a_command_the_usage_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    usage = capsys.readouterr().err
    assert [name for name in command.COMMANDS if f"\n  {name} " not in usage] == []
    assert "error: name a command" in usage


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_lists_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out


def test_an_unknown_command_exits_with_2_and_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["converge"]) == 2
    assert "unknown command 'converge'; choose one of doctor, families, convert" in capsys.readouterr().err


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    import megatron_patch

    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-patch {megatron_patch.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("tp=4: choose 1 or 3"), 2), (OSError("disk full"), 1), (BrokenPipeError("a helper is gone"), 1)],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, error: Exception, code: int) -> None:
    monkeypatch.setattr(command, "import_module", sub_command(error))
    assert command.main(["convert"]) == code
    assert capsys.readouterr().err == f"megatron-patch convert: error: {error}\n"


def test_the_rank_is_named_where_there_are_several(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "SECONDS_BEHIND_RANK_0", 0.0)
    monkeypatch.setattr(command, "import_module", sub_command(OSError("disk full")))
    assert command.main(["pretrain"]) == 1
    assert "pretrain (rank 3): error: disk full" in capsys.readouterr().err


def test_debugging_keeps_the_traceback(monkeypatch) -> None:
    monkeypatch.setenv("MEGATRON_PATCH_DEBUG", "1")
    monkeypatch.setattr(command, "import_module", sub_command(ValueError("x")))
    with pytest.raises(ValueError, match="x"):
        command.main(["convert"])


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(command, "import_module", sub_command(KeyError("x")))
    with pytest.raises(KeyError):
        command.main(["convert"])


def test_a_usage_error_exits_with_2() -> None:
    result = subprocess.run([*PYTHON, "doctor", "--jsn"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "--jsn" in result.stderr and "Traceback" not in result.stderr


def test_a_reader_that_stops_early_is_no_error() -> None:
    script = f"set -o pipefail; {' '.join(PYTHON)} doctor | true"
    assert "Broken pipe" not in subprocess.run(["bash", "-c", script], capture_output=True, text=True).stderr


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("option", [["--nproc-per-node", "3"], ["--nproc-per-node=3"]])
def test_the_option_is_taken_out_wherever_it_stands(option: list[str]) -> None:
    assert processes.take_option(["--a", "1", *option, "--b"]) == (3, ["--a", "1", "--b"])


def test_one_process_is_the_default() -> None:
    assert processes.take_option(["--a"]) == (1, ["--a"])


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_number_of_processes_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="--nproc-per-node=.*1 or more"):
        processes.take_option([f"--nproc-per-node={value}"])


def test_two_launchers_at_once_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="already runs under a launcher"):
        processes.take_option(["--nproc-per-node", "2"])


def test_a_parallel_command_starts_again_without_the_option(monkeypatch) -> None:
    started = []
    monkeypatch.setattr(processes, "run_again", lambda number, argv: started.append((number, argv)))
    monkeypatch.setattr(command, "import_module", sub_command())
    command.main(["pretrain", "--nproc-per-node", "2", "--load", "x"])
    assert started == [(2, ["pretrain", "--load", "x"])]


def test_a_mistake_is_found_before_the_processes_start(monkeypatch, capsys) -> None:
    def check(argv: list[str], num_processes: int) -> None:
        raise ValueError(f"{argv}: choose 1 or 3, not {num_processes}")

    monkeypatch.setattr(processes, "run_again", lambda number, argv: pytest.fail("started"))
    monkeypatch.setattr(command, "import_module", lambda name: SimpleNamespace(check=check))
    assert command.main(["pretrain", "--nproc-per-node", "2", "--tp"]) == 2
    assert "error: ['--tp']: choose 1 or 3, not 2" in capsys.readouterr().err


def test_the_processes_share_the_cores_and_leave_time_to_save(monkeypatch) -> None:
    replaced = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "execve", lambda *arguments: replaced.append(arguments))
    processes.run_again(3, ["pretrain", "--lr", "1"])
    ((program, argv, environment),) = replaced
    assert program == sys.executable and argv[-3:] == ["pretrain", "--lr", "1"] and "--nproc-per-node=3" in argv
    assert environment["OMP_NUM_THREADS"] == "2" and environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"from megatron_patch.launch.processes import run_again; run_again(2, {list(arguments)})"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_torchrun_really_starts_them() -> None:
    result = torchrun("--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("megatron-patch ") == 2


def test_a_failed_process_is_one_line_and_its_exit_code() -> None:
    result = torchrun("doctor", "--jsn")
    assert result.returncode == 2
    assert "ended first, with exit code 2" in result.stderr and "Traceback" not in result.stderr
