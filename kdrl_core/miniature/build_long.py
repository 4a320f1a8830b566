"""Build the assets of the world where thinking longer helps: `python -m kdrl_core.miniature.build_long --output DIR`.

    student/        short thoughts by preference; it was taught every depth, and seldom thinks at depth 2 or deeper
    teacher/        deep thoughts, more words; on long chains it goes past the student's token limit
    teacher-weak/   between the two; also the base model of the R1-Zero path's teacher
    teacher-zero/   the R1-Zero path's teacher, made from it by GRPO (the recipe miniature-long-zero-teacher)
    stage1.json, stage2.parquet, benchmarks/*.jsonl     as kdrl_core.miniature.problems says

A model learns in parts: the arithmetic, at the depths 0 to 2; then its own habit, at every depth. The student's last
and brief part is to prefer short thoughts. So it can do what it seldom does, for GRPO or a teacher to bring out.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.step import rollout, score_step, update_step, verify
from kdrl_core.config import load_recipe
from kdrl_core.ledger import create_run
from kdrl_core.ledger.names import derive_seed
from kdrl_core.miniature.long_world import DEPTHS, UNITS, Habit, draw_long_problems, lettered, think
from kdrl_core.miniature.models import Architecture, Example, build_model, build_tokenizer, save_model, train_model
from kdrl_core.miniature.problems import measured_labels, write_problems
from kdrl_core.miniature.world import bracket, stream_chains
from kdrl_core.models.loading import load_model

CONTEXT = 256
MAX_RESPONSE_TOKENS = 80
"""The student's limit in stage 2, and in the measured labels."""
SFT_LENGTHS = range(2, 12)
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
    num_steps: int
    learning_rate: float
    lengths: range = SFT_LENGTHS
    """Digits per chain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongModel(Architecture):
    """Architecture, words and SFT of one model."""

    tie_word_embeddings: bool = False
    word_slope: float
    """As in `Habit`."""
    habit_seed: int
    lessons: tuple[Lesson, ...]
    seed: int


_ARITHMETIC = Lesson(depths=(0.2, 0.3, 0.5, 0.0, 0.0), num_steps=1_200, learning_rate=1.5e-3, lengths=range(2, 8))
MODELS: dict[str, LongModel] = {
    "student": LongModel(
        hidden_size=64,
        num_layers=2,
        word_slope=1.3,
        habit_seed=1,
        lessons=(
            replace(_ARITHMETIC, num_steps=900),
            Lesson(depths=(0.25, 0.35, 0.30, 0.08, 0.02), num_steps=300, learning_rate=1e-3),
            Lesson(depths=(0.45, 0.38, 0.14, 0.02, 0.01), num_steps=100, learning_rate=5e-4),
        ),
        seed=1,
    ),
    "teacher": LongModel(
        hidden_size=96,
        num_layers=2,
        word_slope=0.9,
        habit_seed=2,
        lessons=(
            _ARITHMETIC,
            Lesson(depths=(0.02, 0.08, 0.45, 0.35, 0.10), num_steps=500, learning_rate=1e-3),
        ),
        seed=8,
    ),
    "teacher-weak": LongModel(
        hidden_size=80,
        num_layers=2,
        word_slope=1.1,
        habit_seed=3,
        lessons=(
            _ARITHMETIC,
            Lesson(depths=(0.10, 0.30, 0.45, 0.12, 0.03), num_steps=300, learning_rate=1e-3),
        ),
        seed=9,
    ),
}


def example_batches(model: LongModel, lesson: Lesson, *, seed: int, exclude: set[str]) -> Iterator[list[Example]]:
    """Endless batches of 64 chains (none of `exclude`) with thoughts. Chains of like lengths share a batch."""
    rng, size = random.Random(seed), 64
    habit = Habit(depths=lesson.depths, word_slope=model.word_slope, seed=model.habit_seed)
    chains = (chain for chain in stream_chains(rng, lesson.lengths) if chain not in exclude)
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
        train_model(
            trained,
            tokenizer,
            batches,
            learning_rate=lesson.learning_rate,
            num_steps=steps,
            beta2=0.98,
            warmup_steps=100,
        )
    return trained


def build_long_world(output: Path, *, scale: float = 1.0, grpo: Sequence[str] = ()) -> None:
    """Build every asset below `output`. For tests, `scale` shrinks the number of problems and of SFT steps, and `grpo`
    overrides fields of the recipe that makes teacher-zero."""
    torch.set_num_threads(1)
    problems = draw_long_problems(scale=scale)
    tokenizer = build_tokenizer(UNITS, context=CONTEXT)
    trained: dict[str, Any] = {}
    for name, model in MODELS.items():
        trained[name] = teach(model, tokenizer, exclude=problems.held_out | set(problems.ood), scale=scale)
        save_model(trained[name].half(), tokenizer, output / name)
        trained[name].float()
    labels = measured_labels(
        trained, tokenizer, problems.stage2, max_response_tokens=MAX_RESPONSE_TOKENS, notation=lettered
    )
    write_problems(output, problems, labels, notation=lettered)
    save_model(teacher_by_grpo(output, grpo).half(), tokenizer, output / "teacher-zero")


def teacher_by_grpo(output: Path, overrides: Sequence[str] = ()) -> Any:
    """The R1-Zero path's teacher: `teacher-weak` of `output` after the recipe miniature-long-zero-teacher."""
    own = [f"student.path={output.resolve()}/teacher-weak", f"stage1.data.files=[{output.resolve()}/stage2.parquet]"]
    recipe = load_recipe("miniature-long-zero-teacher", [*own, "stage1.evaluate_every=null", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        run = create_run("teacher-zero", recipe, artifacts=Path(folder))
        filter_run(run)
        session = stage_session(run.paths.root, "stage1")
        for step in range(recipe.stage("stage1").steps):
            make(session, rollout, step)
            score_step(session, step)
            make(session, verify, step)
            update_step(session, step)
        close_sessions()
        return load_model(run.paths.checkpoint("stage1", recipe.stage("stage1").steps))


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(
        description="Build the long miniature's models, problems and benchmarks (ten minutes)."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; shipped: kdrl_core/assets/miniature-long"
    )
    build_long_world(parser.parse_args().output)


if __name__ == "__main__":
    main()
