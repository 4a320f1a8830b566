"""pass@k and maj@k against values worked out by hand, and their properties."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_core.evaluation.statistics import majority, pass_at_k, powers_of_two


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),
        (4, 2, 2, 5 / 6),
        (4, 2, 4, 1.0),
        (16, 0, 8, 0.0),
        (5, 4, 2, 1.0),
        (6, 2, 3, 0.8),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_rejects_what_is_not_defined(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def test_powers_of_two_stop_at_the_limit() -> None:
    assert [powers_of_two(n) for n in (1, 6, 16)] == [[1], [1, 2, 4], [1, 2, 4, 8, 16]]


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["2", "2", "3"], [1, 1, 0], 1.0),
        (["3", "3", "2"], [0, 0, 1], 0.0),
        (["2", "3"], [1, 0], 0.5),
        (["2", "3", "4"], [1, 0, 0], 1 / 3),
        (["( 1, 2)", "(1,2)", "7"], [1, 1, 0], 1.0),
        ([r"\frac{1}{2}", r"\dfrac{1}{2}", "0.5", "3", "3"], [1, 1, 1, 0, 0], 1.0),
        (["$5$", "5", "5.", "7", "7"], [1, 1, 1, 0, 0], 1.0),
        ([r"\left(1,2\right)", "( 1, 2)", "7"], [1, 1, 0], 1.0),
        ([r"\frac{", r"\frac{", "7"], [0, 0, 1], 0.0),
        ([None, None, "2"], [0, 0, 1], 1.0),
        ([None, " "], [0, 0], 0.0),
    ],
)
def test_majority_by_hand(answers: list[str | None], correct: list[float], expected: float) -> None:
    assert majority(answers, correct) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=12), st.randoms())
def test_majority_does_not_depend_on_order(answers: list[str | None], random: object) -> None:
    shuffled = list(answers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    share = [majority(votes, [float(v == "1") for v in votes]) for votes in (answers, shuffled)]
    assert share[0] == pytest.approx(share[1])
