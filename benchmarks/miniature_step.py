"""Time of one miniature step by phase, Prefect's share of the loop, peak memory.

The same steps are run twice from scratch: by plain calls, one after the other, and by the Prefect flow with its
temporary server. Prefect's share is the part of the flow's loop that is spent outside the bodies of the tasks, on the
critical path (scoring and verification run side by side, so the longer counts). Prints a table; asserts nothing.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.cli.local_prefect import use_private_prefect
from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, create_run

_WARM_UP = 5
_PHASES = ["time/rollout_s", "time/teacher_score_s", "time/verify_s", "time/update_s"]


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="steps of the stage that is measured")
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step; 8 rollouts each, up to 64 tokens")
    arguments = parser.parse_args()
    sizes = [f"steps={arguments.steps}", f"prompts_per_step={arguments.prompts}"]
    sizes += [f"mini_batch_prompts={arguments.prompts}", "group_size=8", "evaluate_every=null"]
    recipe = load_recipe("miniature", ["stage1=null", *(f"stage2.{size}" for size in sizes)])
    with tempfile.TemporaryDirectory() as folder:
        use_private_prefect(log_level="CRITICAL")()
        plain, phases = _plain_loop(create_run("plain", recipe, artifacts=Path(folder)))
        flow, inside = _flow_loop(create_run("flow", recipe, artifacts=Path(folder)))
    table = Table("what", "value")
    for name in _PHASES:
        table.add_row(f"{name.removeprefix('time/').removesuffix('_s')}, median", f"{1e3 * phases[name]:.0f} ms")
    table.add_row("step, plain loop (files, hashes and checkpoint included), median", f"{1e3 * plain:.0f} ms")
    table.add_row("step, Prefect flow, median", f"{1e3 * flow:.0f} ms")
    table.add_row("of it inside the tasks, median", f"{1e3 * inside:.0f} ms")
    table.add_row("Prefect's share of the flow's loop", f"{100 * (1 - inside / flow):.1f} %")
    table.add_row("peak memory of this process", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    Console().print(table)


def _plain_loop(run: Run) -> tuple[float, dict[str, float]]:
    """Median seconds of a step by plain calls, scoring and verification one after the other, and of its phases."""
    from kdrl_core.boxes.filter import filter_run
    from kdrl_core.boxes.make import make
    from kdrl_core.boxes.session import close_sessions, stage_session
    from kdrl_core.boxes.step import rollout, score_step, update_step, verify

    filter_run(run)
    session = stage_session(run.paths.root, "stage2")
    seconds, phases = [], []
    for step in range(run.recipe.stage("stage2").steps):
        started = time.perf_counter()
        make(session, rollout, step)
        score_step(session, step)
        make(session, verify, step)
        phases.append(update_step(session, step).timings)
        seconds.append(time.perf_counter() - started)
    close_sessions()
    return median(seconds[_WARM_UP:]), {name: median(row[name] for row in phases[_WARM_UP:]) for name in _PHASES}


def _flow_loop(run: Run) -> tuple[float, float]:
    """Median seconds of a step of the Prefect flow, and of its part inside the tasks' bodies."""
    from flows.filtering import filtering
    from flows.training_stage import training_stage
    from tasks.boxes import rollout, teacher_score, update, verify

    tasks = (rollout, teacher_score, verify, update)
    spans: dict[str, list[tuple[float, float]]] = {task.name: [] for task in tasks}

    def timed(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(body)
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = body(*arguments, **named)
            spans[name].append((started, time.perf_counter()))
            return result

        return call

    for task in tasks:
        task.fn = timed(task.name, task.fn)
    filtering(str(run.paths.root))
    training_stage(str(run.paths.root), "stage2")
    ends = [end for _, end in spans["update"]]
    loops = [later - earlier for earlier, later in pairwise(ends)]
    seconds = {name: [end - start for start, end in found][1:] for name, found in spans.items()}
    inside = [
        rollout + max(score, verify) + update
        for rollout, score, verify, update in zip(*(seconds[name] for name in spans), strict=True)
    ]
    return median(loops[_WARM_UP:]), median(inside[_WARM_UP:])


if __name__ == "__main__":
    main()
