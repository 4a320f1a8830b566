"""`kdrl run` as a user types it, without a server, where the flow fails."""

import os
import subprocess
from pathlib import Path

from forked import KDRL
from support import MARK, TINY, left_behind


def test_failure_inside_the_flow_is_one_line(artifacts: Path) -> None:
    sets = [part for value in (*TINY, "stage1.data.max_problems=2") for part in ("--set", value)]
    done = subprocess.run(
        [KDRL, "run", "--name", "small", *sets],
        env={**os.environ, MARK: str(artifacts)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "error: stage1: 2 problems are left after filtering, fewer than prompts_per_step=4" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_behind(str(artifacts)) == []
