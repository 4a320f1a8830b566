"""A generated run with a million rollouts, for `benchmarks/rollout_queries.py`.

Its files are those of a run: the same schemas, zstd, hashes and manifests, and metrics by step, so that everything that
reads a run reads it; there are no models. Lengths are log-normal (median 320 tokens, σ 0.75) and bounded: 16 to 2,048
tokens, 420 on average, where R1-Distill models write several thousands. Tokens, texts and logprobs are cut out of one
stream of eight million, at other places for each response, so that a file is as hard to compress as a real one, and
writing is fast: 1,000 steps of 64 prompts × 16 responses are some 9 GB, and take 5 to 10 minutes on one core.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, create_run, publish_file
from kdrl_core.rollouts.metrics import rebuild_metrics
from kdrl_core.rollouts.schema import REWARDS, ROLLOUTS, TEACHER, UPDATE, write_table
from kdrl_core.rollouts.stats import response_metrics

NEEDLE = "Kumquat"
"""A word that one response of ten thousand has."""
_STREAM_TOKENS = 8_000_000
_MAX_TOKENS = 2_048
_POOL = 12_000
_SYLLABLES = [
    "ba",
    "be",
    "bi",
    "co",
    "cu",
    "da",
    "de",
    "di",
    "en",
    "er",
    "fa",
    "fi",
    "ga",
    "go",
    "ha",
    "he",
    "in",
    "is",
    "ka",
    "ke",
    "la",
    "le",
    "li",
    "ma",
    "me",
    "mo",
    "na",
    "ne",
    "no",
    "or",
    "pa",
    "pe",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "si",
    "so",
    "ta",
    "te",
    "ti",
    "to",
    "un",
    "ve",
    "vi",
    "za",
]
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
    "}",
]


class Stream:
    """Eight million tokens with their text and logprobs, from which responses are cut."""

    def __init__(self, rng: np.random.Generator) -> None:
        words = random.Random(0)
        vocabulary = [
            *_MARKS,
            *(" " + "".join(words.choices(_SYLLABLES, k=words.randint(1, 4))) for _ in range(32_000)),
        ]
        ranks = np.minimum(rng.zipf(1.25, _STREAM_TOKENS) - 1, len(vocabulary) - 1)
        self.ids = ranks.astype(np.int32)
        lengths = np.array([len(word) for word in vocabulary])[ranks]
        self.ends = np.concatenate([[0], np.cumsum(lengths)])
        self.text = "".join(np.array(vocabulary, object)[ranks])
        self.logprobs = -rng.exponential(0.25, _STREAM_TOKENS).astype(np.float32)
        self.gap = rng.normal(0.0, 1e-3, _STREAM_TOKENS).astype(np.float32)
        self.log_ratio = rng.normal(-0.02, 0.4, _STREAM_TOKENS).astype(np.float32)

    def cut(self, starts: np.ndarray, lengths: np.ndarray) -> Iterator[str]:
        """The texts of responses."""
        for start, end in zip(self.ends[starts], self.ends[starts + lengths], strict=True):
            yield self.text[start:end]


def write_run(
    artifacts: Path, name: str, *, steps: int, prompts: int, group_size: int, on_step: Callable[[int], None]
) -> Run:
    """Write the run; raises RunError if there is one of this name with another recipe."""
    settings = [
        f"steps={steps}",
        f"prompts_per_step={prompts}",
        f"mini_batch_prompts={prompts}",
        f"group_size={group_size}",
    ]
    run = create_run(
        name, load_recipe("miniature", ["stage1=null", *(f"stage2.{one}" for one in settings)]), artifacts=artifacts
    )
    rng = np.random.default_rng(0)
    stream = Stream(rng)
    problems = [f"q-{number:016x}" for number in rng.integers(0, 2**62, _POOL)]
    questions = [
        f"<|user|>Find{text}?<|assistant|>" for text in stream.cut(rng.integers(0, 10**6, _POOL), np.full(_POOL, 40))
    ]
    for step in range(steps):
        drawn = rng.choice(_POOL, prompts, replace=False)
        _write_step(run, step, steps, drawn, group_size, problems, questions, stream, rng)
        on_step(step)
    rebuild_metrics(run, "stage2", num_steps=steps)
    return run


def _write_step(
    run: Run,
    step: int,
    steps: int,
    drawn: Any,
    group_size: int,
    problems: list[str],
    questions: list[str],
    stream: Stream,
    rng: np.random.Generator,
) -> None:
    count = len(drawn) * group_size
    lengths = np.clip(rng.lognormal(np.log(320), 0.75, count), 16, _MAX_TOKENS).astype(np.int64)
    starts = rng.integers(0, _STREAM_TOKENS - _MAX_TOKENS, count)
    spans = np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())

    def ragged(values: np.ndarray) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    texts = list(stream.cut(starts, lengths))
    for found in np.flatnonzero(rng.random(count) < 1e-4):
        texts[found] += f" {NEEDLE}"
    ids = {
        "prompt_id": [problems[one] for one in drawn for _ in range(group_size)],
        "sample": [*range(group_size)] * len(drawn),
    }
    right = rng.random(count) < np.repeat(rng.beta(1, 1.5, len(drawn)) * (0.6 + 0.4 * step / steps), group_size)
    clipped = lengths == _MAX_TOKENS
    kinds = np.where(
        right & ~clipped, "correct", np.where(clipped, "malformed", rng.choice(["wrong", "wrong", "no_answer"], count))
    )
    rewards = (kinds == "correct").astype(np.float32)
    engine = stream.logprobs[spans]
    student = engine + stream.gap[spans]
    ratio = stream.log_ratio[spans]
    bounds = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    kl_sum = np.add.reduceat(0.5 * ratio**2, bounds).astype(np.float32)
    grouped = rewards.reshape(-1, group_size)
    spread = grouped.std(1, ddof=1, keepdims=True)
    tables = {
        "rollouts": pa.Table.from_pydict(
            {
                **ids,
                "prompt": [questions[one] for one in drawn for _ in range(group_size)],
                "response": texts,
                "ground_truth": [str(one % 1000) for one in drawn for _ in range(group_size)],
                "prompt_token_ids": [stream.ids[one : one + 40] for one in drawn for _ in range(group_size)],
                "token_ids": ragged(stream.ids[spans]),
                "rollout_logprobs": ragged(engine),
                "length": lengths.astype(np.int32),
                "finish_reason": np.where(clipped, "length", "stop"),
                "repetition_rate": rng.beta(1, 20, count).astype(np.float32),
                "seed": rng.integers(0, 2**63, count, dtype=np.uint64),
                "policy_version": np.full(count, step, np.int32),
                "engine": ["vllm"] * count,
            },
            schema=ROLLOUTS,
        ),
        "teacher": pa.Table.from_pydict({**ids, "teacher_logprobs": ragged(student + ratio)}, schema=TEACHER),
        "rewards": pa.Table.from_pydict(
            {
                **ids,
                "reward": rewards,
                "format_reward": (~clipped).astype(np.float32),
                "accuracy_reward": rewards,
                "verdict": kinds.tolist(),
                "extracted": [
                    None if kind in ("malformed", "no_answer") else str(n % 997) for n, kind in enumerate(kinds)
                ],
                "reason": np.where(rewards > 0, "equal", "another integer than the ground truth").tolist(),
            },
            schema=REWARDS,
        ),
        "update": pa.Table.from_pydict(
            {
                **ids,
                "advantage": ((grouped - grouped.mean(1, keepdims=True)) / (spread + 1e-6)).reshape(-1),
                "kd_weight": np.ones(count, np.float32),
                "logprobs": ragged(student),
                "kl_sum": kl_sum,
                "kl_mean": kl_sum / lengths.astype(np.float32),
                "log_ratio_sum": np.add.reduceat(ratio, bounds),
            },
            schema=UPDATE,
        ),
    }
    metrics = response_metrics(tables["rollouts"], tables["rewards"]) | {
        "entropy": float(rng.normal(0.6, 0.02)),
        "beta": 2e-3,
    }
    timings = {
        f"time/{phase}_s": float(rng.uniform(20, 40)) for phase in ("rollout", "teacher_score", "verify", "update")
    }
    for part, table in tables.items():
        publish_file(
            run.paths.step("stage2", step) / f"{part}.parquet",
            lambda file, table=table: write_table(table, file),
            metadata={"seconds": 1.0, **({"metrics": metrics, "timings": timings} if part == "update" else {})},
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs/<name> is written")
    parser.add_argument("--name", default="million")
    parser.add_argument("--steps", type=int, default=977, help="of 64 × 16 rollouts")
    arguments = parser.parse_args()
    started = time.monotonic()

    def told(step: int) -> None:
        if step % 50 == 0 or step + 1 == arguments.steps:
            print(f"step {step + 1}/{arguments.steps}, {time.monotonic() - started:.0f} s", flush=True)

    write_run(arguments.folder, arguments.name, steps=arguments.steps, prompts=64, group_size=16, on_step=told)


if __name__ == "__main__":
    main()
