"""The world in which thinking longer helps: its thoughts by hand, and the three properties of its shipped models."""

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kdrl_core.config import resolve_path
from kdrl_core.miniature.build_long import MODELS, build_long_world, example_batches
from kdrl_core.miniature.long_properties import NAMES, Properties, _depth_cells, measure
from kdrl_core.miniature.long_world import (
    CHECKERS,
    OPENERS,
    UNITS,
    WORDS,
    Habit,
    depth_of,
    draw_long_problems,
    lettered,
    think,
)
from kdrl_core.miniature.models import build_tokenizer
from kdrl_core.miniature.problems import draw_problems, write_problems
from kdrl_core.miniature.world import OPERATORS, solve

PLAIN = Habit(depths=(0.2,) * 5, word_slope=1.0, seed=1)


def wordless(thought: str) -> str:
    """A thought with o for every word that opens an equation, and c for every one that repeats it."""
    return re.sub(" ([a-z]+) ", lambda word: f"{'o' if word[1] in OPENERS else 'c'}:", thought)


EQUATIONS = ("3a+5=8", "8b*2=6", "6c-7=9", "9d+4=3")


@pytest.mark.parametrize(
    ("depth", "thought"),
    [
        # (3 + 5) · 2 = 16 → 6, 6 − 7 = −1 → 9, 9 + 4 = 13 → 3
        (0, "<think>o:3a+5b*2c-7=9o:9d+4=3</think>\\boxed{3}"),
        (1, "<think>o:3a+5b*2=6o:6c-7d+4=3</think>\\boxed{3}"),
        (2, "<think>o:3a+5=8o:8b*2=6o:6c-7=9o:9d+4=3</think>\\boxed{3}"),
        (3, "<think>o:3a+5=8c:3a+5=8o:8b*2=6c:8b*2=6o:6c-7=9c:6c-7=9o:9d+4=3c:9d+4=3</think>\\boxed{3}"),
        (4, f"<think>{''.join(f'o:{one}c:{one}c:{one}' for one in EQUATIONS)}</think>\\boxed{{3}}"),
    ],
)
def test_thoughts_golden(depth: int, thought: str) -> None:
    found = think("3+5*2-7+4", PLAIN, depth, random.Random(0))
    assert wordless(found) == thought
    assert depth_of(found) == depth


def test_a_depth_without_thoughts_keeps_its_column() -> None:
    quarters = (0.0, 0.0, 0.0, 0.0)
    by_depth = {0: (0.5, 0.25, 9.0), 3: (0.5, 1.0, 40.0)}
    one = Properties(accuracy=0.0, length=0.0, by_quarter=quarters, by_depth=by_depth, limited=0.0, cut=0.0)
    assert _depth_cells(one) == ["50 %: 25, 9 tokens", "–", "–", "50 %: 100, 40 tokens", "–"]


def test_a_chain_is_lettered_also_between_brackets() -> None:
    assert lettered("3+5*2") == "3a+5b*2"
    assert lettered("((9*9)-5)+7") == "((9a*9)b-5)c+7"


def test_every_word_and_every_operator_with_its_digit_is_one_token() -> None:
    assert len(set(WORDS)) == len(WORDS) > 150
    assert not set(OPENERS) & set(CHECKERS)
    tokenizer = build_tokenizer(UNITS)
    text = "<think> so 3a+5=8 again 3a+5=8</think>\\boxed{8}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 1 + 6 + 6 + 1 + 3
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_shipped_models_have_the_three_properties() -> None:
    """Without them the world shows nothing about lengths. `kdrl_core.miniature.long_properties` prints them all."""
    chains = draw_long_problems().benchmarks["validation"][:24]
    student, teacher = (
        measure(resolve_path(f"builtin:miniature-long/{name}"), chains) for name in ("student", "teacher")
    )
    # Longer thoughts are right more often: deeper ones, and the longer ones about the same problem.
    assert student.by_depth[2][1] > student.by_depth[0][1] + 0.15
    assert teacher.by_depth[2][1] > teacher.by_depth[0][1] + 0.4
    assert student.longer_gains > 0.03
    # The teacher thinks longer than the student, longer than it must, and past the student's limit.
    assert teacher.length > 1.5 * student.length
    assert teacher.by_quarter[3] < teacher.by_quarter[2]
    assert 0.05 < teacher.cut < 0.2
    assert teacher.limited > student.limited + 0.25
    # The student can do both.
    assert student.by_depth[0][0] > 0.3
    assert sum(share for depth, (share, *_) in student.by_depth.items() if depth >= 2) > 0.05


def test_shipped_problems_are_what_the_build_draws(tmp_path: Path) -> None:
    for world, problems, notation in (
        ("miniature", draw_problems(), str),
        ("miniature-long", draw_long_problems(), lettered),
    ):
        write_problems(tmp_path / world, problems, [[0] * len(problems.stage2)] * 3, notation=notation)
        shipped = resolve_path(f"builtin:{world}/stage1.json").parent
        for name in ("stage1.json", *(f"benchmarks/{name}.jsonl" for name in ("validation", "test", "hard", "ood"))):
            assert (tmp_path / world / name).read_bytes() == (shipped / name).read_bytes()
        rows = pq.read_table(shipped / "stage2.parquet").to_pylist()  # whose labels are measured
        asked = [(row["prompt"][0]["content"], row["reward_model"]["ground_truth"]) for row in rows]
        assert asked == [(notation(chain), f'["{solve(chain)[1]}"]') for chain in problems.stage2]


def test_shipped_assets_are_small_enough_to_commit() -> None:
    shipped = resolve_path("builtin:miniature-long/student").parent
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) < 4e6


def test_what_is_measured_is_neither_trained_on_nor_twice() -> None:
    problems = draw_long_problems()
    measured = problems.held_out | set(problems.ood)
    assert len(measured) == 128 + 256 + 128 + 128
    assert not measured & {*problems.stage1, *problems.stage2}


def test_what_is_excluded_is_not_trained_on() -> None:
    """Of the 9,300 shortest chains, those that begin with an even digit: a thousand draws would have 500 of them."""
    every = [f"{a}{o}{b}" for a in range(0, 10, 2) for o in OPERATORS for b in range(10)]
    exclude = {*every, *(f"{chain}{o}{b}" for chain in every for o in OPERATORS for b in range(10))}
    lesson = replace(MODELS["student"].lessons[0], lengths=range(2, 4))
    batches = example_batches(MODELS["student"], lesson, seed=1, exclude=exclude)
    asked = [question for batch in itertools.islice(batches, 16) for question, _ in batch]
    assert len(asked) == 1_024
    assert any(question.startswith("(") for question in asked)  # brackets hide no excluded chain
    assert {question.lstrip("(")[0] for question in asked} == {*"13579"}


@pytest.mark.slow  # a minute; others hold the shipped models
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    grpo = ("steps=2", "data.min_pass_rate=null", "prompts_per_step=4", "mini_batch_prompts=4")
    for name in ("first", "second"):
        build_long_world(tmp_path / name, scale=0.01, grpo=[f"stage1.{field}" for field in grpo])
    student = measure(tmp_path / "first" / "student", draw_long_problems().benchmarks["validation"][:2])
    assert sum(share for share, *_ in student.by_depth.values()) <= 1
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("first", "second")
    )
    assert {Path(name) / "model.safetensors" for name in NAMES} <= set(first)
    assert first == second
