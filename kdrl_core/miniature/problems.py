"""Problems of the miniature worlds: benchmarks, and training sets in the shapes that people have, with measured labels.

stage1.json             problems in DeepScaleR's shape
stage2.parquet          problems in Skywork-OR1-RL-Data's shape, with *measured* labels: failures out of 16
benchmarks/*.jsonl      validation, test, hard (longer chains than in RL training), ood (with brackets)
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.data.schema import SKYWORK_SCHEMA
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.ledger.names import derive_seed
from kdrl_core.miniature.models import ASSISTANT, USER
from kdrl_core.miniature.world import BRACKETED_LENGTHS, HARD_LENGTHS, LENGTHS, bracket, sample_questions, solve
from kdrl_core.types import FinishReason, Rollout, RolloutRequest

SEED = 7
NUM_LABEL_SAMPLES = 16
SKYWORK_LABELS = ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-32B")
"""The published schema fixes these names; `measured_labels` says what is measured for each."""
_LABELLED_WITH = (("student", 1.0), ("teacher", 1.0), ("teacher", 0.6))
"""Model and temperature of each label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """Distinct chains of a miniature world."""

    benchmarks: dict[str, list[str]]
    """validation, test and hard. No model has seen these in its SFT."""
    stage1: list[str]
    stage2: list[str]
    ood: list[str]
    """Written with brackets in the benchmark. No RL stage trains on these chains."""

    @property
    def held_out(self) -> set[str]:
        """What no model may be trained on: all of `benchmarks`."""
        return {question for questions in self.benchmarks.values() for question in questions}


def draw_problems(
    *,
    lengths: range = LENGTHS,
    hard_lengths: range = HARD_LENGTHS,
    ood_lengths: range = BRACKETED_LENGTHS,
    num_stage2: int = 2_048,
    scale: float = 1.0,
) -> Problems:
    """The problems of a world, from one seed. Lengths are digits per chain; `scale` shrinks the numbers, for tests."""
    rng = random.Random(SEED)
    seen: set[str] = set()

    def draw(count: int, lengths: range) -> list[str]:
        questions = sample_questions(rng, max(8, round(count * scale)), lengths, exclude=seen)
        seen.update(questions)
        return questions

    return Problems(
        benchmarks={"validation": draw(128, lengths), "test": draw(256, lengths), "hard": draw(128, hard_lengths)},
        stage1=draw(1_024, lengths),
        stage2=draw(num_stage2, lengths),
        ood=draw(128, ood_lengths),
    )


def write_problems(
    output: Path, problems: Problems, labels: Sequence[Sequence[int]], *, notation: Callable[[str], str] = str
) -> None:
    """Write the benchmarks, stage1.json and stage2.parquet below `output`.

    Args:
        labels: failures out of 16 of each problem of stage 2, for each of SKYWORK_LABELS.
        notation: how this world writes a chain.
    """
    for name, chains in (*problems.benchmarks.items(), ("ood", problems.ood)):
        written = [notation(bracket(chain) if name == "ood" else chain) for chain in chains]
        _write_benchmark(output / "benchmarks" / f"{name}.jsonl", chains, written)
    rows = [{"problem": notation(q), "answer": solve(q)[1], "solution": solve(q)[0]} for q in problems.stage1]
    (output / "stage1.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    written = [notation(chain) for chain in problems.stage2]
    labels_by_model = dict(zip(SKYWORK_LABELS, labels, strict=True))
    _write_skywork(output / "stage2.parquet", problems.stage2, written, labels_by_model)


def _write_benchmark(path: Path, chains: Sequence[str], written: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"{path.stem}-{index}", "problem": problem, "answer": solve(chain)[1], "source": "kdrl miniature"}
        for index, (chain, problem) in enumerate(zip(chains, written, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def respond(
    model: Any,
    tokenizer: Any,
    chains: Sequence[str],
    *,
    temperature: float,
    max_response_tokens: int,
    notation: Callable[[str], str] = str,
) -> list[Rollout]:
    """16 responses to each chain, which is their `prompt_id`."""
    engine = TransformersRolloutEngine(
        model,
        tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        temperature=temperature,
        max_response_tokens=max_response_tokens,
        batch_size=512,
    )
    requests = [
        RolloutRequest(
            prompt_id=chain,
            sample=sample,
            prompt_token_ids=tokenizer.encode(f"{USER}{notation(chain)}{ASSISTANT}", add_special_tokens=False),
            seed=derive_seed(SEED, "label", temperature, chain, sample),
        )
        for chain in chains
        for sample in range(NUM_LABEL_SAMPLES)
    ]
    return engine.generate(requests)


def is_right(response: Rollout) -> bool:
    """Whether a response of `respond` ends with its chain's answer."""
    ending = f"</think>\\boxed{{{solve(response.prompt_id)[1]}}}"
    return response.finish_reason is FinishReason.STOP and response.text.endswith(ending)


def measured_labels(
    models: Mapping[str, Any], tokenizer: Any, chains: Sequence[str], **options: Any
) -> list[list[int]]:
    """For each of SKYWORK_LABELS, the wrong responses out of 16 per chain: of the student, of the teacher, and of the
    teacher at temperature 0.6. `models`: by name; options as in `respond`."""
    labels = []
    for name, temperature in _LABELLED_WITH:
        failures = dict.fromkeys(chains, 0)
        for response in respond(models[name], tokenizer, chains, temperature=temperature, **options):
            failures[response.prompt_id] += not is_right(response)
        labels.append([*failures.values()])
    return labels


def _write_skywork(
    path: Path, chains: Sequence[str], written: Sequence[str], labels: Mapping[str, Sequence[int]]
) -> None:
    rows = [
        {
            "data_source": "kdrl-miniature",
            "prompt": [{"content": problem, "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": json.dumps([solve(chain)[1]]), "style": "rule"},
            "extra_info": {
                "index": index,
                "model_difficulty": {label: counts[index] for label, counts in labels.items()},
            },
        }
        for index, (chain, problem) in enumerate(zip(chains, written, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SKYWORK_SCHEMA), path, compression="zstd")
