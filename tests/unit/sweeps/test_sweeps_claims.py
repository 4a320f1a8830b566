"""Claims judged by made-up results, whose differences can be read off."""

from typing import Any

import pytest

from kdrl_core.errors import RecipeError
from kdrl_core.look.sweeps.aggregate import build_table, judge_claims
from kdrl_core.look.sweeps.results import CellResult, ModelScores, ReferenceResult, SweepResults
from kdrl_core.look.sweeps.spec import CLAIM_METRICS, Claim, expand, load_sweep, validate_sweep
from kdrl_core.look.sweeps.table import ClaimVerdict, JudgedClaim
from kdrl_core.objectives import LOSS_METRICS


def _model(test: list[float], length: float) -> ModelScores:
    return ModelScores(scores={"test": {f"p{i}": value for i, value in enumerate(test)}}, length_mean=length)


def _cell(variant: str, seed: int, test: list[float], *, length: float = 20.0, **late: float) -> CellResult:
    run = f"s--{variant}--seed{seed}"
    model = _model(test, length)
    return CellResult(variant=variant, seed=seed, run=run, steps=5, train_s=1.0, model=model, late=late)


@pytest.fixture
def results() -> SweepResults:
    """Two seeds of a and b; of c, the second seed alone."""
    cells = [
        _cell("a", 0, [1.0, 0.5, 1.0], length=30.0, kl=3.0),
        _cell("a", 1, [1.0, 1.0, 0.5], length=34.0, kl=5.0),
        _cell("b", 0, [0.5, 0.0, 0.5], length=20.0, kl=2.0),
        _cell("b", 1, [0.5, 0.5, 0.0], length=24.0, kl=6.0),
        _cell("c", 1, [0.5, 0.5, 1.0]),
    ]
    reference = ReferenceResult(name="teacher", group="g", first_variant="a", seed=0, model=_model([1.0] * 3, 10.0))
    return SweepResults(name="s", description="", recipe="r", statuses=[], cells=cells, references=[reference])


def _claim(more: str, less: str, measure: str) -> Claim:
    return Claim(text=f"{more} over {less}", source="Sec. 1", more=more, less=less, measure=measure)


def _one(results: SweepResults, *claim: str) -> JudgedClaim:
    (found,) = judge_claims([_claim(*claim)], results)
    return found


def test_a_claim_is_the_difference_paired_by_seed_and_problem(results: SweepResults) -> None:
    found = _one(results, "a", "b", "accuracy:test")
    # Every problem of every seed: a − b = 0.5, so that every draw of the bootstrap gives 0.5.
    assert found.difference is not None
    assert (found.difference.low, found.difference.mean, found.difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (found.verdict, found.num_seeds, found.what) == (ClaimVerdict.HOLDS, 2, "a > b, accuracy on test")
    assert _one(results, "b", "a", "accuracy:test").verdict is ClaimVerdict.DOES_NOT


def test_what_differs_in_sign_between_seeds_is_unclear(results: SweepResults) -> None:
    found = _one(results, "a", "b", "kl")  # 3 − 2 = 1 and 5 − 6 = −1
    assert found.difference is not None
    assert (found.difference.mean, found.difference.low) == pytest.approx((0.0, -found.difference.high))
    assert found.difference.high == pytest.approx(12.7, rel=0.12)  # t of one degree of freedom × 1.41 / √2
    assert found.verdict is ClaimVerdict.UNCLEAR


def test_one_number_of_one_seed_tells_nothing(results: SweepResults) -> None:
    found = _one(results, "c", "a", "length")  # c has the second seed alone: 20 − 34
    assert found.difference is not None
    assert (found.difference.mean, found.num_seeds, found.verdict) == (-14.0, 1, ClaimVerdict.UNCLEAR)


def test_lengths_and_models_for_reference_can_be_compared(results: SweepResults) -> None:
    longer = _one(results, "a", "b", "length")  # 30 − 20 = 34 − 24 = 10
    assert longer.difference is not None
    assert (longer.difference.low, longer.difference.mean, longer.difference.high) == pytest.approx((10.0,) * 3)
    taught = _one(results, "teacher", "a", "accuracy:test")  # the teacher has seed 0 alone: (0 + 0.5 + 0) / 3
    assert taught.difference is not None
    assert taught.difference.mean == pytest.approx(1 / 6)
    assert taught.num_seeds == 1


@pytest.mark.parametrize(
    ("more", "less", "measure"), [("a", "d", "accuracy:test"), ("c", "teacher", "accuracy:test"), ("a", "c", "kl")]
)
def test_a_claim_without_common_seeds_is_missing(results: SweepResults, more: str, less: str, measure: str) -> None:
    found = _one(results, more, less, measure)
    assert (found.verdict, found.difference, found.num_seeds) == (ClaimVerdict.MISSING, None, 0)


def test_the_table_shows_claims_in_points_and_units(results: SweepResults) -> None:
    results.claims.extend([_claim("a", "b", "accuracy:test"), _claim("a", "b", "length"), _claim("a", "d", "length")])
    rows = build_table(results).claim_table().rows
    assert [row[2:4] for row in rows] == [["holds", "holds"], ["holds", "holds"], ["holds", "missing"]]
    assert [row[5] for row in rows] == ["+50.0 (+50.0 to +50.0) points", "+10 (+10 to +10)", "–"]
    assert "| a over b | Sec. 1 | holds | holds |" in build_table(results).to_markdown()


def _spec(**claim: Any) -> Any:
    values = {"text": "t", "more": "KDRL", "less": "GRPO", "measure": "accuracy:test", **claim}
    variants = {"KDRL": {}, "GRPO": {"stage2.objective": "grpo"}}
    return validate_sweep({"name": "s", "variants": variants, "claims": [values]}, origin="s.yaml")


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"less": "GRPP"}, "claim 1, field 'less': no variant 'GRPP', did you mean 'GRPO'?"),
        ({"more": "teacherr"}, "claim 1, field 'more': no variant 'teacherr', did you mean 'teacher'?"),
        ({"measure": "accuracy:tset"}, "claim 1, field 'measure': no benchmark 'tset', did you mean 'test'?"),
        ({"more": "teacher", "measure": "entropy"}, "claim 1, field 'more': no variant 'teacher'"),
        ({"measure": "length:test"}, "claim 1, field 'measure': 'length:test' is not a measure"),
        ({"measure": "kd/kl_unmaked"}, "claim 1, field 'measure': no metric 'kd/kl_unmaked', did you mean"),
        ({"less": "KDRL"}, "claim 1: 'KDRL' is compared with itself"),
        ({"less": "after stage 2"}, "claim 1, field 'less': no variant 'after stage 2', did you mean 'after stage 1'?"),
        ({"measure": "lenght"}, "claim 1, field 'measure': no metric 'lenght', did you mean 'length'?"),
    ],
)
def test_a_claim_of_what_the_sweep_does_not_have_is_refused(claim: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        expand(_spec(**claim))
    assert words in str(error.value)
    assert len(expand(_spec())) == 2


def test_every_metric_of_the_loss_can_be_claimed() -> None:
    assert set(LOSS_METRICS) <= set(CLAIM_METRICS)
    assert len(expand(_spec(measure="time/update_s"))) == 2


def test_of_two_teachers_a_claim_is_about_the_one_that_the_table_calls_so(results: SweepResults) -> None:
    other = ReferenceResult(name="teacher", group="h", first_variant="b", seed=0, model=_model([0.0] * 3, 10.0))
    results.references.append(other)
    found = _one(results, "teacher", "a", "accuracy:test")
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(1 / 6)  # of group g: (0 + 0.5 + 0) / 3


def test_the_shipped_findings_name_every_finding_of_the_paper() -> None:
    spec = load_sweep("findings")
    assert isinstance(spec.seeds, int)
    assert spec.seeds >= 5
    sections = " ".join(claim.source for claim in spec.claims)
    assert all(section in sections for section in ("Sec. 3.1", "Sec. 3.2", "Sec. 3.3", "Sec. 3.4", "Sec. 4.2"))
    labels = {cell.variant for cell in expand(spec)}
    compared = {label for claim in spec.claims for label in (claim.more, claim.less)}
    assert labels <= compared
