"""Build the miniature's assets from one seed: `python -m kdrl_core.miniature.build --output DIR`.

    student/ teacher/       Hugging Face model directories
    student-vllm/           a student whose attention heads are wide enough for vLLM on a CPU
    teacher-weak/           a teacher of middling strength; also the base model of the R1-Zero path's teacher
    teacher-broad/          a teacher that works chains in two ways, where the students know one; in half precision
    stage1.json             problems in DeepScaleR's shape
    stage2.parquet          problems in Skywork-OR1-RL-Data's shape, with *measured* labels: failures out of 16
    benchmarks/*.jsonl      validation, test, hard (longer chains than in training), ood (with brackets, which no model
                            has seen)

The student is small, and label smoothing keeps it uncertain. Like a pretrained model before RL, it solves two chains in
five when it is sampled, although its likeliest tokens are mostly right. The teacher is larger, nearly always right, and
a little smoothed as well: with a perfectly confident teacher, R² of a few tokens dominates k2.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdrl_core.data.schema import SKYWORK_SCHEMA
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.ledger.names import derive_seed
from kdrl_core.miniature.models import MiniatureModel, build_tokenizer, save_model, train_model
from kdrl_core.miniature.world import BRACKETED_LENGTHS, HARD_LENGTHS, LENGTHS, bracket, sample_questions, solve
from kdrl_core.types import FinishReason, RolloutRequest

SEED = 7
STUDENT = MiniatureModel(
    hidden_size=48, num_layers=2, tie_word_embeddings=True, sft_steps=550, learning_rate=3e-3, label_smoothing=0.04
)
TEACHER = MiniatureModel(
    hidden_size=96, num_layers=3, tie_word_embeddings=False, sft_steps=600, learning_rate=3e-3, label_smoothing=0.01
)
WEAK_TEACHER = MiniatureModel(
    hidden_size=64, num_layers=3, tie_word_embeddings=True, sft_steps=500, learning_rate=3e-3, label_smoothing=0.02
)
BROAD_TEACHER = replace(TEACHER, sft_steps=1_600, result_first_share=0.25)
"""A teacher that, like a large model, has answers beyond the student: it works one chain in four result first."""
VLLM_STUDENT = replace(STUDENT, hidden_size=64, num_heads=2, sft_steps=700)
"""Its attention heads have size 32, the smallest that vLLM on a CPU supports."""
MODELS = {
    "student": (STUDENT, 1),
    "teacher": (TEACHER, 8),
    "teacher-weak": (WEAK_TEACHER, 9),
    "teacher-broad": (BROAD_TEACHER, 8),
    "student-vllm": (VLLM_STUDENT, 1),
}
"""Folder → model and seed."""
NUM_LABEL_SAMPLES = 16
MAX_RESPONSE_TOKENS = 64
STUDENT_LABEL, TEACHER_LABEL, STRONG_LABEL = SKYWORK_LABELS = (
    "DeepSeek-R1-Distill-Qwen-1.5B",
    "DeepSeek-R1-Distill-Qwen-7B",
    "DeepSeek-R1-Distill-Qwen-32B",
)
"""The published schema fixes these names. Here the first label is measured with the miniature student, the other two
with the miniature teacher at temperatures 1 and 0.6."""


def build(output: Path, *, models: Mapping[str, tuple[MiniatureModel, int]] = MODELS, scale: float = 1.0) -> None:
    """Build every asset below `output`. `scale` shrinks the number of problems, for tests."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    seen: set[str] = set()

    def draw(count: int, lengths: range) -> list[str]:
        questions = sample_questions(rng, max(8, round(count * scale)), lengths, exclude=seen)
        seen.update(questions)
        return questions

    _write_benchmarks(
        output / "benchmarks",
        {"validation": draw(128, LENGTHS), "test": draw(256, LENGTHS), "hard": draw(128, HARD_LENGTHS)},
    )
    held_out = set(seen)
    stage1, stage2 = draw(1_024, LENGTHS), draw(2_048, LENGTHS)
    _write_benchmarks(output / "benchmarks", {"ood": draw(128, BRACKETED_LENGTHS)}, notation=bracket)

    tokenizer = build_tokenizer()
    trained: dict[str, Any] = {}
    for name, (spec, seed) in models.items():
        trained[name] = train_model(spec, tokenizer, seed=seed, exclude=held_out)
        if name == "teacher-broad":
            trained[name].half()
        save_model(trained[name], tokenizer, output / name)

    rows = [{"problem": q, "answer": solve(q)[1], "solution": solve(q)[0]} for q in stage1]
    (output / "stage1.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    labels = {
        STUDENT_LABEL: _failures(trained["student"], tokenizer, stage2, temperature=1.0),
        TEACHER_LABEL: _failures(trained["teacher"], tokenizer, stage2, temperature=1.0),
        STRONG_LABEL: _failures(trained["teacher"], tokenizer, stage2, temperature=0.6),
    }
    _write_skywork(output / "stage2.parquet", stage2, labels)


def _write_benchmarks(folder: Path, benchmarks: dict[str, list[str]], *, notation: Callable[[str], str] = str) -> None:
    folder.mkdir(exist_ok=True)
    for name, questions in benchmarks.items():
        rows = [
            {"id": f"{name}-{index}", "problem": notation(q), "answer": solve(q)[1], "source": "kdrl miniature"}
            for index, q in enumerate(questions)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _failures(model: Any, tokenizer: Any, questions: list[str], *, temperature: float) -> list[int]:
    """Wrong responses out of 16 per question."""
    engine = TransformersRolloutEngine(
        model,
        tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        temperature=temperature,
        max_response_tokens=MAX_RESPONSE_TOKENS,
        batch_size=512,
    )
    requests = [
        RolloutRequest(
            prompt_id=question,
            sample=sample,
            prompt_token_ids=tokenizer.encode(f"<|user|>{question}<|assistant|>", add_special_tokens=False),
            seed=derive_seed(SEED, "label", temperature, question, sample),
        )
        for question in questions
        for sample in range(NUM_LABEL_SAMPLES)
    ]
    failures = dict.fromkeys(questions, 0)
    for rollout in engine.generate(requests):
        right = rollout.finish_reason is FinishReason.STOP and rollout.text.endswith(
            f"</think>\\boxed{{{solve(rollout.prompt_id)[1]}}}"
        )
        failures[rollout.prompt_id] += not right
    return list(failures.values())


def _write_skywork(path: Path, questions: list[str], labels: dict[str, list[int]]) -> None:
    rows = [
        {
            "data_source": "kdrl-miniature",
            "prompt": [{"content": question, "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": json.dumps([solve(question)[1]]), "style": "rule"},
            "extra_info": {
                "index": index,
                "model_difficulty": {label: counts[index] for label, counts in labels.items()},
            },
        }
        for index, question in enumerate(questions)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SKYWORK_SCHEMA), path, compression="zstd")


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Build the miniature's models, problems and benchmarks (minutes).")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; shipped: kdrl_core/assets/miniature"
    )
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
