"""What a log shows of a long evaluation."""

from __future__ import annotations

import pytest

from megatron_patch.evaluation import progress


def test_a_log_has_plain_lines_and_other_ranks_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    for quiet, expected in ((False, ["evaluate: 300 of 1,200 tokens", "evaluate: 1,200 of 1,200 tokens"]), (True, [])):
        with progress.Progress(1200, quiet) as told:
            told(300)
            told(900)
        assert [
            line.partition(",  ")[0].rsplit(", ", 2)[0] for line in capsys.readouterr().err.splitlines()
        ] == expected
        assert told.seconds > 0
