"""Runs written by hand: hostile texts, many rows, whatever training would take long to come to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from kdrl_core.tables.files import write_table
from kdrl_core.tables.schemas import REWARDS, ROLLOUTS, TEACHER, UPDATE

SCRIPT = "<script>window.pwned = 1</script>"
IMAGE = '<img src=x onerror="window.pwned = 2">'
CONTROL = "bell \x07, escape \x1b[31m, reversed \u202eabc, nul \x00"
HOSTILE = f"{SCRIPT}{IMAGE}\n{CONTROL}\n</span></pre><a href='javascript:window.pwned=3'>{{{{7*7}}}}"
TOKENS = [SCRIPT, IMAGE, CONTROL, "plain", "\n", "</span>"]


def write_step(root: Path, stage: str, step: int, rows: Sequence[dict[str, Any]], *, entropies: bool = False) -> Path:
    """Publish a step of `rows`; what a row does not name is filled in. Returns the step's folder."""
    whole = [_filled(number, row) for number, row in enumerate(rows)]
    # Without them as of runs of before there was that column.
    update = UPDATE if entropies else UPDATE.remove(UPDATE.get_field_index("entropies"))
    folder = root / "rollouts" / f"stage={stage}" / f"step={step:06d}"
    folder.mkdir(parents=True)
    for name, schema in {"rewards": REWARDS, "update": update, "teacher": TEACHER, "rollouts": ROLLOUTS}.items():
        write_table(pa.Table.from_pylist(whole, schema=schema), folder / f"{name}.parquet")
    return folder


def write_many(root: Path, num_rows: int) -> None:
    """One step with many short rollouts; reward is 1 in every tenth."""
    number = pa.array(range(num_rows), pa.int32())
    numbers = range(num_rows)
    one = _filled(0, {"response": "x"})
    columns = {name: pa.array([one[name]] * num_rows, ROLLOUTS.field(name).type) for name in ROLLOUTS.names}
    columns["prompt_id"] = pa.array([f"p{i // 16}" for i in numbers])
    columns["sample"] = pa.array([i % 16 for i in numbers], pa.int32())
    columns["response"] = pa.array([f"response {i}" for i in numbers])
    columns["length"] = number
    folder = root / "rollouts" / "stage=stage1" / "step=000000"
    folder.mkdir(parents=True)
    write_table(pa.table(columns, schema=ROLLOUTS), folder / "rollouts.parquet")
    rewards = {name: pa.array([one[name]] * num_rows, REWARDS.field(name).type) for name in REWARDS.names}
    rewards |= {name: columns[name] for name in ("prompt_id", "sample")}
    rewards["reward"] = pa.array([float(i % 10 == 0) for i in numbers], pa.float32())
    write_table(pa.table(rewards, schema=REWARDS), folder / "rewards.parquet")


def write_hostile(root: Path) -> None:
    """Two responses whose every text is hostile, in a run with a tokenizer whose tokens are as well."""
    texts = dict.fromkeys(("prompt", "response", "ground_truth", "extracted", "reason"), HOSTILE)
    ids = list(range(len(TOKENS)))
    rows = [{"prompt_id": SCRIPT, "sample": sample, "token_ids": ids, **texts} for sample in (0, 1)]
    write_step(root, "stage1", 0, rows, entropies=True)
    (root / "student").mkdir()
    vocabulary = {text: number for number, text in enumerate(TOKENS)}
    Tokenizer(WordLevel(vocabulary, unk_token="plain")).save(str(root / "student" / "tokenizer.json"))


def _filled(number: int, row: dict[str, Any]) -> dict[str, Any]:
    ids = row.get("token_ids", [5, 6, 7])
    count = len(ids)
    logprobs = [-0.5 - 0.25 * i for i in range(count)]
    base: dict[str, Any] = {
        "prompt_id": f"p{number // 4}",
        "sample": number % 4,
        "prompt": "1+1",
        "response": "2",
        "ground_truth": "2",
        "extracted": "2",
        "reason": "the same text as the ground truth",
        "prompt_token_ids": [1, 2],
        "token_ids": ids,
        "length": count,
        "finish_reason": "stop",
        "repetition_rate": 0.0,
        "seed": 2**64 - 1 - number,
        "policy_version": 0,
        "engine": "transformers",
        "rollout_logprobs": logprobs,
        "logprobs": logprobs,
        "teacher_logprobs": [value + (0.75 if i % 2 else -1.5) for i, value in enumerate(logprobs)],
        "entropies": [0.125 * i for i in range(count)],
        "reward": 1.0,
        "format_reward": 1.0,
        "accuracy_reward": 1.0,
        "verdict": "correct",
        "advantage": 0.5,
        "kd_weight": 1.0,
        "kl_sum": 0.75,
        "kl_mean": 0.25,
        "log_ratio_sum": -0.5,
    }
    return {**base, **row}
