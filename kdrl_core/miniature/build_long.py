"""Build the assets of the world where thinking longer helps: `python -m kdrl_core.miniature.build_long --output DIR`.

    student/        short thoughts by preference, though it can think at every depth
    teacher/        deep thoughts, less noise, more words; on long chains it goes past the student's token limit
    teacher-weak/   between the two
    stage1.json, stage2.parquet, benchmarks/*.jsonl     as kdrl_core.miniature.problems says

The student learns in three parts: the arithmetic, without noise and at depth 0 and 1; then every depth, with noise;
last and briefly, to prefer short thoughts. So it can do what it seldom does, for GRPO or a teacher to bring out.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdrl_core.ledger.names import derive_seed
from kdrl_core.miniature.long_world import DEPTHS, LETTERS, WORDS, Habit, draw_long_problems, lettered, think
from kdrl_core.miniature.models import Architecture, Example, build_model, build_tokenizer, save_model, train_model
from kdrl_core.miniature.problems import measured_labels, write_problems
from kdrl_core.miniature.world import bracket, stream_chains

CONTEXT = 256
MAX_RESPONSE_TOKENS = 96
"""The student's limit in stage 2, and in the measured labels."""
SFT_LENGTHS = range(2, 9)
"""Digits per chain in the models' SFT: also the harder benchmark's, which no RL stage trains on."""
_BRACKETED_SHARE = 0.05
"""Of the SFT chains are written with brackets. So the out-of-domain benchmark is out of the RL stages' domain, but the
models have seen its notation in SFT (never its chains)."""
_BUCKET = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One part of a model's SFT."""

    depths: tuple[float, ...]
    """Share of the thoughts at each depth."""
    noise: float
    num_steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongModel(Architecture):
    """Architecture, words and SFT of one model."""

    tie_word_embeddings: bool = False
    word_slope: float
    """As in `Habit`."""
    words_seed: int
    lessons: tuple[Lesson, ...]
    seed: int


_ARITHMETIC = Lesson(depths=(0.4, 0.6, 0.0, 0.0, 0.0), noise=0.0, num_steps=1_200, learning_rate=4e-3)
MODELS: dict[str, LongModel] = {
    "student": LongModel(
        hidden_size=64,
        num_layers=2,
        word_slope=1.3,
        words_seed=1,
        lessons=(
            _ARITHMETIC,
            Lesson(depths=(0.15, 0.30, 0.40, 0.12, 0.03), noise=0.12, num_steps=900, learning_rate=3e-3),
            Lesson(depths=(0.45, 0.37, 0.13, 0.04, 0.01), noise=0.12, num_steps=100, learning_rate=5e-4),
        ),
        seed=1,
    ),
    "teacher": LongModel(
        hidden_size=96,
        num_layers=3,
        word_slope=0.9,
        words_seed=2,
        lessons=(
            replace(_ARITHMETIC, depths=(0.2, 0.6, 0.2, 0.0, 0.0), num_steps=1_000, learning_rate=2e-3),
            Lesson(depths=(0.03, 0.17, 0.35, 0.30, 0.15), noise=0.04, num_steps=600, learning_rate=2e-3),
        ),
        seed=8,
    ),
    "teacher-weak": LongModel(
        hidden_size=80,
        num_layers=2,
        word_slope=1.1,
        words_seed=3,
        lessons=(
            _ARITHMETIC,
            Lesson(depths=(0.10, 0.40, 0.35, 0.12, 0.03), noise=0.08, num_steps=800, learning_rate=3e-3),
        ),
        seed=9,
    ),
}


def example_batches(model: LongModel, lesson: Lesson, *, seed: int, exclude: set[str]) -> Iterator[list[Example]]:
    """Endless batches of 64 chains (none of `exclude`) with thoughts. Chains of like lengths share a batch."""
    rng, size = random.Random(seed), 64
    habit = Habit(depths=lesson.depths, noise=lesson.noise, word_slope=model.word_slope, words_seed=model.words_seed)
    chains = (chain for chain in stream_chains(rng, SFT_LENGTHS) if chain not in exclude)
    while True:
        drawn = [next(chains) for _ in range(_BUCKET * size)]
        depths = rng.choices(DEPTHS, lesson.depths, k=len(drawn))
        thoughts = [think(chain, habit, depth, rng) for chain, depth in zip(drawn, depths, strict=True)]
        written = [lettered(bracket(chain) if rng.random() < _BRACKETED_SHARE else chain) for chain in drawn]
        pairs = sorted(zip(written, thoughts, strict=True), key=lambda pair: len(pair[1]))
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        rng.shuffle(batches)
        yield from batches


def teach(model: LongModel, tokenizer: Any, *, exclude: set[str], scale: float = 1.0) -> Any:
    """A model after its lessons. `scale` shrinks the number of their steps, for tests."""
    trained = build_model(model, tokenizer, seed=model.seed)
    for number, lesson in enumerate(model.lessons):
        batches = example_batches(model, lesson, seed=derive_seed("lesson", model.seed, number), exclude=exclude)
        steps = max(1, round(lesson.num_steps * scale))
        train_model(trained, tokenizer, batches, learning_rate=lesson.learning_rate, num_steps=steps, beta2=0.98)
    return trained


def build_long_world(output: Path, *, scale: float = 1.0) -> None:
    """Build every asset below `output`. `scale` shrinks the number of problems and of SFT steps, for tests."""
    torch.set_num_threads(1)
    problems = draw_long_problems(scale=scale)
    tokenizer = build_tokenizer(WORDS, letters=LETTERS, context=CONTEXT)
    trained: dict[str, Any] = {}
    for name, model in MODELS.items():
        trained[name] = teach(model, tokenizer, exclude=problems.held_out | set(problems.ood), scale=scale)
        save_model(trained[name].half(), tokenizer, output / name)
        trained[name].float()
    labels = measured_labels(
        trained, tokenizer, problems.stage2, max_response_tokens=MAX_RESPONSE_TOKENS, notation=lettered
    )
    write_problems(output, problems, labels, notation=lettered)


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        description="Build the long miniature's models, problems and benchmarks (half an hour)."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    build_long_world(parser.parse_args().output)


if __name__ == "__main__":
    main()
