"""Randomness by name: pinned values, and a schedule of prompts that depends on nothing but its arguments."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.ledger import derive_seed, prompts_of_step, uniforms


def test_seeds_are_pinned() -> None:
    """Another value here means that no earlier run can be reproduced.

    blake2b with 8 bytes over the names joined by U+001F, little-endian; checked against Python's hashlib by hand.
    """
    assert derive_seed(0, "stage2", 12, "problem-7", 3) == GOLDEN_SEED
    assert derive_seed() == GOLDEN_EMPTY


GOLDEN_SEED = 6_495_079_240_796_063_892
GOLDEN_EMPTY = 13_020_603_013_274_838_756


def test_uniforms_are_pinned() -> None:
    assert uniforms(42, 3).tolist() == GOLDEN_UNIFORMS


GOLDEN_UNIFORMS = [0.8201981478608876, 0.18924562408645496, 0.8676608148821462]


def test_seeds_do_not_depend_on_the_process() -> None:
    command = "from kdrl_core.ledger.names import derive_seed; print(derive_seed(0, 'stage2', 12, 'problem-7', 3))"
    seeds = {
        subprocess.run(
            [sys.executable, "-c", command], env={"PYTHONHASHSEED": value}, capture_output=True, text=True, check=True
        ).stdout
        for value in ("1", "2")
    }
    assert seeds == {f"{GOLDEN_SEED}\n"}


def test_every_name_counts() -> None:
    names = [
        (0, "stage1", 0, "p", 0),
        (1, "stage1", 0, "p", 0),
        (0, "stage2", 0, "p", 0),
        (0, "stage1", 1, "p", 0),
        (0, "stage1", 0, "q", 0),
        (0, "stage1", 0, "p", 1),
        (0, "stage1", 0, "p"),
        (0, "stage1", "0p", 0),
        (0, "stage1", 0, "p0"),
    ]
    assert len({derive_seed(*name) for name in names}) == len(names)


@given(seed=st.integers(0, 2**64 - 1), short=st.integers(0, 50), more=st.integers(0, 50))
@settings(deadline=None)
def test_a_longer_draw_begins_with_a_shorter(seed: int, short: int, more: int) -> None:
    longer = uniforms(seed, short + more)
    assert np.array_equal(longer[:short], uniforms(seed, short))
    assert ((longer >= 0) & (longer < 1)).all()


def test_draws_are_uniform_and_independent_between_samples() -> None:
    draws = np.stack([uniforms(derive_seed(0, "stage1", 0, "p", sample), 200) for sample in range(100)])
    assert abs(draws.mean() - 0.5) < 0.01  # 20,000 draws: standard error 0.002
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.03


SCHEDULES = st.tuples(
    st.sets(st.text("abc0_-", min_size=1, max_size=5), min_size=1, max_size=12),
    st.integers(0, 3),
    st.sampled_from(["stage1", "stage2"]),
).flatmap(lambda drawn: st.tuples(st.just(drawn), st.integers(1, len(drawn[0]))))


@given(drawn=SCHEDULES)
@settings(deadline=None, max_examples=100)
def test_steps_have_no_duplicates_and_passes_cover_the_pool(drawn: tuple[tuple[set[str], int, str], int]) -> None:
    (pool, seed, stage), prompts = drawn
    num_steps = 3 * len(pool)
    steps = [
        prompts_of_step(sorted(pool), seed=seed, stage=stage, step=step, prompts_per_step=prompts)
        for step in range(num_steps)
    ]
    for step in steps:
        assert len(step) == len(set(step)) == prompts
    flat = [problem for step in steps for problem in step]
    for start in range(0, len(flat) - len(pool) + 1, len(pool)):  # every pass: each problem exactly once
        assert set(flat[start : start + len(pool)]) == pool


@given(drawn=SCHEDULES, step=st.integers(0, 40), data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_step_is_a_function_of_its_arguments_and_the_set_of_problems(
    drawn: tuple[tuple[set[str], int, str], int], step: int, data: st.DataObject
) -> None:
    (pool, seed, stage), prompts = drawn
    shuffled = data.draw(st.permutations(sorted(pool)))
    first = prompts_of_step(shuffled, seed=seed, stage=stage, step=step, prompts_per_step=prompts)
    prompts_of_step(shuffled, seed=seed, stage=stage, step=step + 1, prompts_per_step=prompts)  # another draw between
    again = prompts_of_step(sorted(pool), seed=seed, stage=stage, step=step, prompts_per_step=prompts)
    assert first == again


def test_stage_seed_and_pass_change_the_order() -> None:
    pool = [f"p{i}" for i in range(30)]

    def whole(*, seed: int = 0, stage: str = "stage1", step: int = 0) -> list[str]:
        return prompts_of_step(pool, seed=seed, stage=stage, step=step, prompts_per_step=30)

    orders = [whole(), whole(seed=1), whole(stage="stage2"), whole(step=1)]
    assert len({tuple(order) for order in orders}) == 4
    assert whole() != sorted(pool)


def in_a_fresh_process(*, pool: int, prompts: int, step: int, recursion_limit: int) -> None:
    """Draw one step where no earlier call has filled the cache."""
    command = (
        "import sys\n"
        "from kdrl_core.ledger.names import prompts_of_step\n"
        f"sys.setrecursionlimit({recursion_limit})\n"
        f"pool = [str(i) for i in range({pool})]\n"
        f"step = prompts_of_step(pool, seed=0, stage='stage1', step={step}, prompts_per_step={prompts})\n"
        f"assert len(set(step)) == {prompts}"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_thousands_of_passes_are_no_obstacle() -> None:
    in_a_fresh_process(pool=3, prompts=2, step=5000, recursion_limit=1000)


def test_a_chain_of_passes_is_not_followed_recursively() -> None:
    """71 problems, 70 a step: each of the first 70 passes depends on the one before it."""
    in_a_fresh_process(pool=71, prompts=70, step=69, recursion_limit=50)


def test_a_pool_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="2 problems are fewer than prompts_per_step=3"):
        prompts_of_step(["a", "b"], seed=0, stage="stage1", step=0, prompts_per_step=3)
