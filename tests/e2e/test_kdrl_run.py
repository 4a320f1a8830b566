"""`kdrl run`, started from Python, without a server, where the flow fails."""

from pathlib import Path

import pytest
from support import MARK, TINY, left_behind

import kdrl_core as kdrl
from kdrl_core.errors import RunError


def test_failure_inside_the_flow_is_one_line(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(MARK, str(artifacts))
    with pytest.raises(
        RunError, match=r"^stage1: 2 problems are left after filtering, fewer than prompts_per_step=4; .*run\.log"
    ):
        kdrl.run("miniature", [*TINY, "stage1.data.max_problems=2"], name="small")
    said = capsys.readouterr().err
    assert "run small: starting" in said
    assert "error: stage1: 2 problems are left after filtering, fewer than prompts_per_step=4" in said
    assert "Traceback" not in said
    assert left_behind(str(artifacts)) == []
