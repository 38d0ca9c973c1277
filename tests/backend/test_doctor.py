"""`megatron-patch doctor`: everything on one page, quickly, with an exit code that a script can use."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megatron_patch.backend.capabilities import capabilities
from megatron_patch.launch import doctor


def without_torch():
    return tuple(
        replace(one, usable=False, fix="pip install 'torch[x]'") if one.name == "torch" else one
        for one in capabilities()
    )


def test_the_tables_show_packages_kernels_and_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("megatron-core", "unmodified: ", "core attention", "doctor: OK"))


def test_json_holds_the_same(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsysbinary.readouterr().out)
    assert report["ok"] is True
    assert {one["name"] for one in report["capabilities"]} == {one.name for one in capabilities()}
    assert {"operation", "kernel", "why"} == set(report["kernels"][0])


def test_something_required_that_is_missing_fails_with_its_fix(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "capabilities", without_torch)
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "required, torch: pip install 'torch[x]'" in text  # brackets are not taken for markup
    assert "doctor: OK" not in text


def test_it_answers_within_two_seconds_and_without_torch() -> None:
    script = "import sys; from megatron_patch.launch.doctor import main; main([]); sys.exit('torch' in sys.modules)"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
        times.append(time.perf_counter() - start)
        if times[-1] < 2:
            return
    pytest.fail(f"took {min(times):.2f} s at best")
