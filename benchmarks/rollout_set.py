"""A generated run with as many rollouts as wanted, for `benchmarks/rollout_queries.py`.

It has a run's schemas, zstd, hashes and manifests, and metrics by step, so every command that reads a run can read it.
It has no models. Lengths are log-normal (median 320 tokens, σ 0.75) and bounded: 16 to 2,048
tokens, 420 on average (1,700 characters); R1-Distill models write several thousand. Tokens, texts and logprobs are cut
out of one stream of eight million, at another place for each response: writing is fast, and a file is about as hard to
compress as a real one: 977 steps of 64 prompts × 16 responses are 7 GB, and take 3 to 5 minutes on
one core.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, create_run, publish_file
from kdrl_core.sampling.responses import response_metrics
from kdrl_core.tables.files import rebuild_metrics, write_table
from kdrl_core.tables.schemas import REWARDS, ROLLOUTS, TEACHER, UPDATE

NEEDLE = "Kumquat"
"""A word in one of ten thousand responses."""
_STREAM_TOKENS = 8_000_000
_MAX_TOKENS = 2_048
_POOL = 12_000
_CONSONANTS = "bcdfghklmnprstvz"
_MARKS = [
    " the",
    " so",
    " =",
    " +",
    " x",
    " y",
    "\n\n",
    ".",
    ",",
    " 2",
    " 3",
    " 7",
    " Wait",
    " Let",
    " $",
    "\\frac",
    "{",
]


class Stream:
    """Eight million tokens with their text and logprobs, from which responses are cut."""

    def __init__(self, rng: np.random.Generator) -> None:
        letters = random.Random(0)
        syllables = [f"{consonant}{vowel}" for consonant in _CONSONANTS for vowel in "aeiou"]
        words = [" " + "".join(letters.choices(syllables, k=letters.randint(1, 4))) for _ in range(32_000)]
        vocabulary = [*_MARKS, *words]
        self.ids = np.minimum(rng.zipf(1.25, _STREAM_TOKENS) - 1, len(vocabulary) - 1).astype(np.int32)
        lengths = np.array([len(word) for word in vocabulary])[self.ids]
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._text = "".join(np.array(vocabulary, object)[self.ids])
        self.logprobs = -rng.exponential(0.25, _STREAM_TOKENS).astype(np.float32)
        self.gap = rng.normal(0.0, 1e-3, _STREAM_TOKENS).astype(np.float32)
        self.log_ratio = rng.normal(-0.02, 0.4, _STREAM_TOKENS).astype(np.float32)

    def texts(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[str]:
        """The texts of responses."""
        for start, end in zip(self._ends[starts], self._ends[starts + lengths], strict=True):
            yield self._text[start:end]


class Pool:
    """Twelve thousand problems."""

    def __init__(self, stream: Stream, rng: np.random.Generator) -> None:
        self.ids = [f"q-{number:016x}" for number in rng.integers(0, 2**62, _POOL)]
        found = stream.texts(rng.integers(0, 10**6, _POOL), np.full(_POOL, 40))
        self.prompts = [f"<|user|>Find{text}?<|assistant|>" for text in found]


def write_run(artifacts: Path, name: str, *, steps: int, prompts: int, group_size: int) -> Run:
    """Write a run of one stage; raises RunError if there is one of this name with another recipe."""
    sizes = [
        f"steps={steps}",
        f"prompts_per_step={prompts}",
        f"mini_batch_prompts={prompts}",
        f"group_size={group_size}",
    ]
    recipe = load_recipe("miniature", ["stage1=null", *(f"stage2.{size}" for size in sizes)])
    run = create_run(name, recipe, artifacts=artifacts)
    rng = np.random.default_rng(0)
    stream = Stream(rng)
    pool = Pool(stream, rng)
    for step in range(steps):
        drawn = rng.choice(_POOL, prompts, replace=False)
        _publish(run, step, _tables(step, step / steps, drawn.tolist(), group_size, pool, stream, rng), rng)
    rebuild_metrics(run, "stage2", num_steps=steps)
    return run


def _tables(
    step: int,
    progress: float,
    drawn: Sequence[int],
    group_size: int,
    pool: Pool,
    stream: Stream,
    rng: np.random.Generator,
) -> dict[str, pa.Table]:
    rows = [problem for problem in drawn for _ in range(group_size)]
    count = len(rows)
    lengths = np.clip(rng.lognormal(np.log(320), 0.75, count), 16, _MAX_TOKENS).astype(np.int64)
    starts = rng.integers(0, _STREAM_TOKENS - _MAX_TOKENS, count)
    spans = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    texts = list(stream.texts(starts, lengths))
    for found in np.flatnonzero(rng.random(count) < 1e-4):
        texts[found] += f" {NEEDLE}"
    clipped = lengths == _MAX_TOKENS
    chances = np.repeat(rng.beta(1, 1.5, len(drawn)) * (0.6 + 0.4 * progress), group_size)
    wrong = np.where(clipped, "malformed", rng.choice(["wrong", "wrong", "no_answer"], count))
    verdicts = np.where((rng.random(count) < chances) & ~clipped, "correct", wrong)
    rewards = (verdicts == "correct").astype(np.float32)
    student = stream.logprobs[spans] + stream.gap[spans]
    ratio = stream.log_ratio[spans]
    kl_sum = np.add.reduceat(0.5 * ratio**2, offsets[:-1])
    groups = rewards.reshape(-1, group_size)
    advantages = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)

    def ragged(values: NDArray[Any]) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))

    columns = {
        "prompt_id": [pool.ids[one] for one in rows],
        "sample": [*range(group_size)] * len(drawn),
        "prompt": [pool.prompts[one] for one in rows],
        "response": texts,
        "ground_truth": [str(one % 1000) for one in rows],
        "prompt_token_ids": [stream.ids[one : one + 40] for one in rows],
        "token_ids": ragged(stream.ids[spans]),
        "rollout_logprobs": ragged(stream.logprobs[spans]),
        "length": lengths.astype(np.int32),
        "finish_reason": np.where(clipped, "length", "stop"),
        "repetition_rate": rng.beta(1, 20, count).astype(np.float32),
        "seed": rng.integers(0, 2**63, count, dtype=np.uint64),
        "policy_version": np.full(count, step, np.int32),
        "engine": ["vllm"] * count,
        "teacher_logprobs": ragged(student + ratio),
        "reward": rewards,
        "format_reward": (~clipped).astype(np.float32),
        "accuracy_reward": rewards,
        "verdict": verdicts,
        "extracted": [None if one in ("malformed", "no_answer") else str(n % 997) for n, one in enumerate(verdicts)],
        "reason": np.where(rewards > 0, "the same integer", "another integer than the ground truth"),
        "advantage": advantages.reshape(-1),
        "kd_weight": np.ones(count, np.float32),
        "logprobs": ragged(student),
        "entropies": ragged(-stream.logprobs[spans]),
        "kl_sum": kl_sum,
        "kl_mean": kl_sum / lengths.astype(np.float32),
        "log_ratio_sum": np.add.reduceat(ratio, offsets[:-1]),
    }
    schemas = {"rollouts": ROLLOUTS, "teacher": TEACHER, "rewards": REWARDS, "update": UPDATE}
    return {
        part: pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)
        for part, schema in schemas.items()
    }


def _publish(run: Run, step: int, tables: dict[str, pa.Table], rng: np.random.Generator) -> None:
    metrics = response_metrics(tables["rollouts"], tables["rewards"])
    metrics |= {"entropy": float(rng.normal(0.6, 0.02)), "beta": 2e-3}
    phases = ("rollout", "teacher_score", "verify", "update")
    timings = {f"time/{phase}_s": float(rng.uniform(20, 40)) for phase in phases}
    for part, table in tables.items():
        publish_file(
            run.paths.step("stage2", step) / f"{part}.parquet",
            lambda file, table=table: write_table(table, file),
            metadata={"seconds": 1.0, "metrics": metrics, "timings": timings} if part == "update" else {"seconds": 1.0},
        )
