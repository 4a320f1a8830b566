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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdrl_core.miniature.models import (
    MiniatureModel,
    build_model,
    build_tokenizer,
    chain_batches,
    save_model,
    train_model,
)
from kdrl_core.miniature.problems import draw_problems, measured_labels, write_problems

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


def build(output: Path, *, models: Mapping[str, tuple[MiniatureModel, int]] = MODELS, scale: float = 1.0) -> None:
    """Build every asset below `output`. `scale` shrinks the number of problems, for tests."""
    torch.set_num_threads(1)
    problems, tokenizer = draw_problems(scale=scale), build_tokenizer()
    trained: dict[str, Any] = {}
    for name, (spec, seed) in models.items():
        trained[name] = train_model(
            build_model(spec, tokenizer, seed=seed),
            tokenizer,
            chain_batches(spec, seed=seed, exclude=problems.held_out),
            learning_rate=spec.learning_rate,
            num_steps=spec.sft_steps,
            label_smoothing=spec.label_smoothing,
        )
        if name == "teacher-broad":
            trained[name].half()
        save_model(trained[name], tokenizer, output / name)
    labels = measured_labels(trained, tokenizer, problems.stage2, max_response_tokens=64)
    write_problems(output, problems, labels)


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Build the miniature's models, problems and benchmarks (minutes).")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; shipped: kdrl_core/assets/miniature"
    )
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
