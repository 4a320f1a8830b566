"""Time of one miniature step (16 prompts × 8 rollouts × up to 64 tokens), Prefect's share of the loop, peak memory.

The same steps are run twice from scratch: by calling the steps one after the other, and by the Prefect flow with its
temporary server. Prefect's share is what the flow's loop takes beyond the work itself. Prints a table; asserts nothing.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from flows.local_prefect import use_private_prefect
from kdrl_core.config import load_recipe
from kdrl_core.ledger import create_run

_WARM_UP = 5
_PHASES = ["time/rollout_s", "time/teacher_score_s", "time/verify_s", "time/update_s"]


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps of the stage that is measured")
    steps = parser.parse_args().steps
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        use_private_prefect(log_level="CRITICAL", home=Path(folder) / "prefect")
        plain, phases = _plain_loop(Path(folder), steps)
        flow = _flow_loop(Path(folder), steps)
    table = Table("what", "value")
    for name in _PHASES:
        table.add_row(f"{name.removeprefix('time/').removesuffix('_s')}, median", f"{1e3 * phases[name]:.0f} ms")
    table.add_row("step, plain loop (files, hashes and checkpoint included), median", f"{1e3 * plain:.0f} ms")
    table.add_row("step, Prefect flow, median", f"{1e3 * flow:.0f} ms")
    table.add_row("Prefect's share of the flow's loop", f"{100 * max(0.0, 1 - plain / flow):.1f} %")
    table.add_row("peak memory of this process", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    console.print(table)


def _recipe_overrides(steps: int) -> list[str]:
    stage = ["steps={steps}", "prompts_per_step=16", "mini_batch_prompts=16", "group_size=8", "evaluate_every=null"]
    return ["stage1=null", *(f"stage2.{field.format(steps=steps)}" for field in stage)]


def _plain_loop(folder: Path, steps: int) -> tuple[float, dict[str, float]]:
    """Median seconds of a step by plain calls, scoring and verification one after the other, and of its phases."""
    from kdrl_core.steps.filter import filter_run
    from kdrl_core.steps.rollout import rollout_step
    from kdrl_core.steps.score import score_step
    from kdrl_core.steps.session import close_sessions, stage_session
    from kdrl_core.steps.update import update_step
    from kdrl_core.steps.verify import verify_step

    run = create_run("plain", load_recipe("miniature", _recipe_overrides(steps)), artifacts=folder)
    filter_run(run)
    session = stage_session(run.paths.root, "stage2")
    seconds, phases = [], []
    for step in range(steps):
        started = time.perf_counter()
        rollout_step(session, step)
        score_step(session, step)
        verify_step(session, step)
        phases.append(update_step(session, step).timings)
        seconds.append(time.perf_counter() - started)
    close_sessions()
    return median(seconds[_WARM_UP:]), {name: median(row[name] for row in phases[_WARM_UP:]) for name in _PHASES}


def _flow_loop(folder: Path, steps: int) -> float:
    """Median seconds from one step's update to the next in the Prefect flow."""
    from datetime import datetime
    from itertools import pairwise

    from flows.filtering import filtering
    from flows.training_stage import training_stage
    from kdrl_core.ledger import manifest_of

    run = create_run("flow", load_recipe("miniature", _recipe_overrides(steps)), artifacts=folder)
    filtering(str(run.paths.root))
    training_stage(str(run.paths.root), "stage2")
    ends = [
        datetime.fromisoformat(manifest_of(run.paths.update("stage2", step)).created_at).timestamp()
        for step in range(_WARM_UP, steps)
    ]
    return median(later - earlier for earlier, later in pairwise(ends))


if __name__ == "__main__":
    main()
