"""How fast kdrl queries a million rollouts, compared with pandas: `make bench-rollout-queries FOLDER=/some/disk`.

The run is generated once (see `benchmarks/rollout_set.py`: 977 steps of 64 × 16, 7 GB, a few minutes) and kept in
the folder. Each question runs in fresh processes, so its time includes the program's start. The table has the median of
three runs and the greatest peak memory (from the kernel). pandas answers once, from the same files. The page cache
holds the files if memory suffices. At the end a real miniature is trained for some steps, to see what writing a
step's rollouts costs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rollout_set import NEEDLE, write_run
from kdrl_core.config import load_recipe
from kdrl_core.ledger import create_run

_KDRL = [sys.executable, "-m", "flows.cli", "rollouts"]
_FIRST_PAGE = """
import sys
from kdrl_core.look.rollouts.query import RolloutStore
with RolloutStore.open([sys.argv[1]]) as store:
    store.runs(), store.steps(), store.page(limit=100)
"""
_PANDAS_STATS = """
import sys
from pathlib import Path
import pandas as pd
steps = Path(sys.argv[1]) / "rollouts" / "stage=stage2"
def read(part, columns):
    files = sorted(steps.glob(f"*/{part}.parquet"))
    return pd.concat([pd.read_parquet(f, columns=columns).assign(step=int(f.parent.name[5:])) for f in files])
keys = ["step", "prompt_id", "sample"]
rows = read("rollouts", ["prompt_id", "sample", "length", "finish_reason"])
rows = rows.merge(read("rewards", ["prompt_id", "sample", "reward", "verdict"]), on=keys)
rows = rows.merge(read("update", ["prompt_id", "sample", "kl_mean"]), on=keys)
by_step = rows.groupby("step")
print(by_step["reward"].mean().tail(1), by_step["length"].quantile([0.05, 0.5, 0.95]).tail(1))
print(by_step["kl_mean"].mean().tail(1))
print(rows.groupby(["step", "verdict"]).size().tail(3))
"""
_PANDAS_STEP = """
import sys
from pathlib import Path
import pandas as pd
step = Path(sys.argv[1]) / "rollouts" / "stage=stage2" / f"step={int(sys.argv[2]):06d}"
rewards = pd.read_parquet(step / "rewards.parquet")
print(pd.read_parquet(step / "rollouts.parquet").merge(rewards, on=["prompt_id", "sample"]).head(20))
"""
_PANDAS_PROMPT = """
import sys
from pathlib import Path
import pandas as pd
steps = Path(sys.argv[1]) / "rollouts" / "stage=stage2"
parts = []
for file in sorted(steps.glob("*/rollouts.parquet")):
    parts.append(pd.read_parquet(file, columns=["prompt_id", "sample", "length", "response"]))
    parts[-1] = parts[-1][parts[-1]["prompt_id"] == sys.argv[2]]
print(pd.concat(parts).head(20))
"""
_PANDAS_TEXT = """
import sys
from pathlib import Path
import pandas as pd
steps = Path(sys.argv[1]) / "rollouts" / "stage=stage2"
rows = pd.concat([pd.read_parquet(f, columns=["prompt", "response"]) for f in sorted(steps.glob("*/rollouts.parquet"))])
found = rows["response"].str.contains(sys.argv[2], case=False, regex=False)
print(len(rows[found | rows["prompt"].str.contains(sys.argv[2], case=False, regex=False)]))
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a command costs, in fresh processes."""

    seconds: float
    """Median."""
    cpu_s: float
    """Median of user plus system time, which other work on the machine disturbs less."""
    peak_mib: float
    """Greatest of all runs."""

    def cells(self) -> list[str]:
        """The cells of its row."""
        return [f"{self.seconds:.2f}", f"{self.cpu_s:.2f}", f"{self.peak_mib:,.0f}"]


def measure(command: Sequence[str | Path], *, times: int = 3) -> Measured:
    """Run a command several times. Raises SystemExit with its stderr if it fails."""
    seconds, cpu, peak = [], [], 0.0
    for _ in range(times):
        started = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr
        complaint = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(time.perf_counter() - started)
        cpu.append(usage.ru_utime + usage.ru_stime)
        peak = max(peak, usage.ru_maxrss / 1024)
        if process.returncode:
            raise SystemExit(f"{command[-2:]} failed:\n{complaint}")
    return Measured(median(seconds), median(cpu), peak)


def queries(run: Path, step: str) -> None:
    """Print the table of questions."""
    python = [sys.executable, "-c"]
    prompt = _a_prompt(run)
    questions: dict[str, tuple[list[str | Path], list[str | Path] | None]] = {
        "stats": ([*_KDRL, "stats", run], [*python, _PANDAS_STATS, run]),
        "show, of one step": ([*_KDRL, "show", run, "--step", step], [*python, _PANDAS_STEP, run, step]),
        "show, one prompt": ([*_KDRL, "show", run, "--prompt", prompt], [*python, _PANDAS_PROMPT, run, prompt]),
        "show, greatest KL first": ([*_KDRL, "show", run, "--sort", "kl_mean", "--desc"], None),
        "show, one response in full": ([*_KDRL, "show", run, "--step", step, "--full"], None),
        "show, full text": ([*_KDRL, "show", run, "--text", NEEDLE.lower()], [*python, _PANDAS_TEXT, run, NEEDLE]),
        "sql, single values": ([*_KDRL, "sql", run, "select step, avg(reward) from rollouts group by 1"], None),
        "sql, over all texts": ([*_KDRL, "sql", run, "select avg(len(response)) from rollouts"], None),
        "the UI's first query": ([*python, _FIRST_PAGE, run], None),
    }
    table = Table("question", "kdrl, s", "CPU s", "MiB", "pandas, s", "CPU s ", "MiB ")
    for name, (ours, theirs) in questions.items():
        table.add_row(name, *measure(ours).cells(), *(measure(theirs, times=1).cells() if theirs else []))
    Console(width=120).print(table)


def _a_prompt(run: Path) -> str:
    import pyarrow.parquet as pq

    file = run / "rollouts" / "stage=stage2" / "step=000000" / "rollouts.parquet"
    return str(pq.ParquetFile(file).read(columns=["prompt_id"])["prompt_id"][0])


def index(run: Path) -> None:
    """Make the index of the run and say what that costs."""
    shutil.rmtree(run / ".index", ignore_errors=True)
    found = measure([sys.executable, "-c", _FIRST_PAGE, run], times=1)
    size = sum(file.stat().st_size for file in (run / ".index").iterdir())
    print(
        f"first look, which makes the index: {found.seconds:.1f} s ({found.cpu_s:.1f} s of CPU), "
        f"peak {found.peak_mib:,.0f} MiB, {size / 2**20:,.0f} MiB on disk"
    )


def cost_of_writing(steps: int) -> None:
    """What publishing a step's rollouts (write, hash, fsync, manifest) costs a real miniature step."""
    from kdrl_core.boxes import make
    from kdrl_core.boxes.filter import filter_run
    from kdrl_core.boxes.session import close_sessions, stage_session
    from kdrl_core.boxes.step import rollout, score_step, update_step, verify

    spent: list[float] = []
    publish = make.publish_file

    def timed(path: Path, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        made = publish(path, *arguments, **options)
        if path.stem == "rollouts":
            spent.append(time.perf_counter() - started)
        return made

    setattr(make, "publish_file", timed)  # noqa: B010 - not a name that the module exports
    recipe = load_recipe("miniature", ["stage1=null", f"stage2.steps={steps}", "stage2.evaluate_every=null"])
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        run = create_run("writing", recipe, artifacts=Path(folder))
        filter_run(run)
        session = stage_session(run.paths.root, "stage2")
        for step in range(steps):
            started = time.perf_counter()
            make.make(session, rollout, step)
            score_step(session, step)
            make.make(session, verify, step)
            update_step(session, step)
            taken.append(time.perf_counter() - started)
        close_sessions()
    write, step_s = median(spent[3:]), median(taken[3:])
    print(
        f"writing a miniature step's {recipe.stage('stage2').prompts_per_step} × {recipe.stage('stage2').group_size} "
        f"rollouts: {1e3 * write:.1f} ms of {1e3 * step_s:.0f} ms, {100 * write / step_s:.1f} %"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the generated run, which is made if missing: 8 GB")
    parser.add_argument("--steps", type=int, default=977, help="steps of the generated run, 1,024 rollouts each")
    parser.add_argument("--miniature-steps", type=int, default=20)
    arguments = parser.parse_args()
    run = arguments.folder.absolute() / "runs" / f"rollouts-{arguments.steps}"
    if not (run / "metrics").is_dir():
        print(f"writing {arguments.steps} steps to {run} …", flush=True)
        started = time.perf_counter()
        write_run(arguments.folder.absolute(), run.name, steps=arguments.steps, prompts=64, group_size=16)
        print(f"{time.perf_counter() - started:.0f} s")
    size = sum(file.stat().st_size for file in (run / "rollouts").rglob("*.parquet"))
    print(f"{1024 * arguments.steps:,} rollouts, {size / 2**30:.1f} GiB")
    index(run)
    queries(run, str(arguments.steps // 2))
    cost_of_writing(arguments.miniature_steps)


if __name__ == "__main__":
    main()
