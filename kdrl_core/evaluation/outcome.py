"""What the responses to a benchmark amount to: the rows that are kept, and the figures over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pyarrow as pa

from kdrl_core.data.benchmarks import BenchmarkProblem
from kdrl_core.evaluation.statistics import accuracy, majority, pass_at_k, powers_of_two, standard_error
from kdrl_core.tables.columns import verdict_columns
from kdrl_core.tables.schemas import EVALUATION
from kdrl_core.types import FinishReason, Rollout, Verdict, VerdictKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response to a problem of a benchmark."""

    prompt_id: str
    sample: int
    text: str
    length: int
    """Tokens, EOS included."""
    finish_reason: FinishReason
    seed: int

    @classmethod
    def of(cls, rollout: Rollout, seed: int) -> "Response":
        """Without its tokens and logprobs."""
        return cls(
            prompt_id=rollout.prompt_id,
            sample=rollout.sample,
            text=rollout.text,
            length=len(rollout.token_ids),
            finish_reason=rollout.finish_reason,
            seed=seed,
        )


def responses_table(
    benchmark: str, responses: Sequence[Response], verdicts: Sequence[Verdict], problems: Sequence[BenchmarkProblem]
) -> pa.Table:
    """EVALUATION, a row per response, in order."""
    asked = {problem.problem_id: problem for problem in problems}
    return pa.Table.from_pydict(
        {
            "benchmark": [benchmark] * len(responses),
            "prompt_id": [r.prompt_id for r in responses],
            "sample": [r.sample for r in responses],
            "question": [asked[r.prompt_id].question for r in responses],
            "ground_truth": [asked[r.prompt_id].answer for r in responses],
            "response": [r.text for r in responses],
            "length": [r.length for r in responses],
            "finish_reason": [r.finish_reason.value for r in responses],
            **verdict_columns(verdicts),
            "seed": [r.seed for r in responses],
        },
        schema=EVALUATION,
    )


def benchmark_result(table: pa.Table, samples: int, *, seed: int) -> dict[str, Any]:
    """The figures of one benchmark, as results.json holds them (Sec. 4.1: Avg@k, the accuracy reward alone).

    Args:
        table: EVALUATION of one benchmark, the `samples` responses to a problem together.
        samples: k of Avg@k.
        seed: of the bootstrap over problems.

    Returns:
        `accuracy` with `low` and `high` (95 %), `stderr`, `pass_at_k` by k and `maj_at_k` with their `intervals` and
        `stderrs`, all in [0, 1]; `length_mean` in tokens, `clip_ratio`, counts, `verdicts` by kind.
    """
    correct = table["accuracy_reward"].to_pylist()
    answers = table["extracted"].to_pylist()
    starts = range(0, len(correct), samples)
    groups = [correct[start : start + samples] for start in starts]
    votes = [answers[start : start + samples] for start in starts]
    found = accuracy(groups, seed=seed)
    per_problem = {
        f"pass@{k}": [pass_at_k(samples, round(sum(group)), k) for group in groups] for k in powers_of_two(samples)
    } | {f"maj@{samples}": [majority(vote, group) for vote, group in zip(votes, groups, strict=True)]}
    spread = {name: accuracy([[value] for value in values], seed=seed) for name, values in per_problem.items()}
    kinds = table["verdict"].to_pylist()
    return {
        "accuracy": found.mean,
        "low": found.low,
        "high": found.high,
        "stderr": standard_error(groups),
        "num_problems": len(groups),
        "num_samples": samples,
        "pass_at_k": {str(k): spread[f"pass@{k}"].mean for k in powers_of_two(samples)},
        "maj_at_k": spread[f"maj@{samples}"].mean,
        "intervals": {name: [each.low, each.high] for name, each in spread.items()},
        "stderrs": {name: standard_error([[value] for value in values]) for name, values in per_problem.items()},
        "length_mean": fmean(table["length"].to_pylist()),
        "clip_ratio": table["finish_reason"].to_pylist().count(FinishReason.LENGTH.value) / len(correct),
        "verdicts": {kind.value: kinds.count(kind.value) for kind in VerdictKind},
    }
