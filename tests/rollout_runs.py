"""Runs of a few rollouts, written file by file as a stage would, for the tests of what reads them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, RunPaths, create_run, publish_file
from kdrl_core.tables.files import append_metrics, write_table
from kdrl_core.tables.schemas import REWARDS, ROLLOUTS, TEACHER, UPDATE

PROMPTS = ("q-a", "q-b", "q-c")
GROUP_SIZE = 2
NUM_ROWS = len(PROMPTS) * GROUP_SIZE
LENGTHS = (4, 8, 12, 16, 20, 24)
"""Of a step's responses, in order."""
VERDICTS = ("correct", "wrong", "malformed", "correct", "no_answer", "wrong")
KL_SUMS = (0.4, 0.8, 2.4, 1.6, 4.0, 2.4)
"""So the KL of a step's tokens is 11.6 / 84."""


def make_run(artifacts: Path, name: str = "small", *, steps: int = 3, overrides: Sequence[str] = ()) -> Run:
    """A run with `steps` whole steps of stage2."""
    run = create_run(name, load_recipe("miniature", list(overrides)), artifacts=artifacts)
    for step in range(steps):
        write_step(run, "stage2", step)
    return run


def write_step(run: Run, stage: str, step: int, *, until: str = "update", **texts: Sequence[str]) -> None:
    """The files of a step up to `until`: rollouts, teacher, rewards, update. stage1 has no teacher."""
    for part in ("rollouts", "teacher", "rewards", "update"):
        if part != "teacher" or stage != "stage1":
            publish(run, stage, step, part, step_table(part, step, **texts))
        if part == until:
            break


def publish(run: Run, stage: str, step: int, part: str, table: pa.Table) -> None:
    """One file of a step with its manifest, and the step's metrics if it is the last."""
    metadata: dict[str, Any] = {"seconds": 1.0}
    if part == "update":
        metadata["metrics"] = {"entropy": 0.5 + step, "loss/total": float(step)}
        metadata["timings"] = {"time/rollout_s": 2.5, "time/update_s": 1.5}
    path = part_path(run.paths, stage, step, part)
    publish_file(path, lambda file: write_table(table, file), metadata=metadata)
    if part == "update":
        append_metrics(run, stage, step)


def part_path(paths: RunPaths, stage: str, step: int, part: str) -> Path:
    """Where a file of a step lies."""
    return paths.step(stage, step) / f"{part}.parquet"


def step_table(part: str, step: int, *, response: Sequence[str] | None = None, **others: Sequence[str]) -> pa.Table:
    """The table of one file. Rewards are 1 for what is correct; responses say their step, prompt and sample."""
    ids = {
        "prompt_id": [prompt for prompt in PROMPTS for _ in range(GROUP_SIZE)],
        "sample": [*range(GROUP_SIZE)] * len(PROMPTS),
    }
    floats = [np.linspace(-1, 0, length, dtype=np.float32) for length in LENGTHS]
    if part == "rollouts":
        default = [f"step {step} {prompt} number {sample}" for prompt, sample in zip(*ids.values(), strict=True)]
        columns: dict[str, Any] = {
            "prompt": [f"What is {prompt}?" for prompt in ids["prompt_id"]],
            "response": response or default,
            "ground_truth": ["7"] * NUM_ROWS,
            "prompt_token_ids": [[2, 5, 3]] * NUM_ROWS,
            "token_ids": [[5] * (length - 1) + [1] for length in LENGTHS],
            "rollout_logprobs": floats,
            "length": LENGTHS,
            "finish_reason": ["stop"] * (NUM_ROWS - 1) + ["length"],
            "repetition_rate": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5],
            "seed": [2**63 + row for row in range(NUM_ROWS)],
            "policy_version": [step] * NUM_ROWS,
            "engine": ["transformers"] * NUM_ROWS,
        }
        schema = ROLLOUTS
    elif part == "teacher":
        columns, schema = {"teacher_logprobs": [values - np.float32(0.5) for values in floats]}, TEACHER
    elif part == "rewards":
        rewards = [float(verdict == "correct") for verdict in VERDICTS]
        columns = {
            "reward": rewards,
            "format_reward": [float(verdict != "malformed") for verdict in VERDICTS],
            "accuracy_reward": rewards,
            "verdict": VERDICTS,
            "extracted": ["7", "8", None, "7", None, "9"],
            "reason": [f"it is {verdict}" for verdict in VERDICTS],
        }
        schema = REWARDS
    else:
        columns = {
            "advantage": [0.7, -0.7, -0.7, 0.7, 0.0, 0.0],
            "kd_weight": [1.0] * NUM_ROWS,
            "logprobs": floats,
            "kl_sum": KL_SUMS,
            "kl_mean": [kl / length for kl, length in zip(KL_SUMS, LENGTHS, strict=True)],
            "log_ratio_sum": [-0.5 * length for length in LENGTHS],
        }
        schema = UPDATE.remove(UPDATE.get_field_index("entropies"))  # as of runs of before there was that column
    return pa.Table.from_pydict({**ids, **columns, **others}, schema=schema)
