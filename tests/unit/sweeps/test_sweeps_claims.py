"""Claims judged by made-up results, whose differences can be read off."""

from dataclasses import replace
from typing import Any

import pytest

from kdrl_core.errors import RecipeError
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.claims import (
    CLAIM_METRICS,
    Claim,
    JudgedOn,
    claims_of,
    list_claims,
    load_claims,
)
from kdrl_core.look.sweeps.fifths import fifths_of
from kdrl_core.look.sweeps.judging import judge_claims
from kdrl_core.look.sweeps.results import CellResult, ModelScores, ReferenceResult, SweepResults, Watched
from kdrl_core.look.sweeps.spec import expand, load_sweep, validate_sweep
from kdrl_core.look.sweeps.state import CellState, CellStatus
from kdrl_core.look.sweeps.table import ClaimVerdict, JudgedClaim
from kdrl_core.objectives import LOSS_METRICS

NUM_PROBLEMS = 60
"""Twenty times each of the three: with fewer the interval is Wilson's, and wide."""


def _model(test: list[float], length: float) -> ModelScores:
    values = [*test] * (NUM_PROBLEMS // 3)
    return ModelScores(
        scores={"test": {f"p{i}": value for i, value in enumerate(values)}},
        lengths={"test": {f"p{i}": length for i in range(NUM_PROBLEMS)}},
    )


def _cell(variant: str, seed: int, test: list[float], *, length: float = 20.0, **metrics: Any) -> CellResult:
    """`metrics`: the mean over the last fifth, or all five."""
    run = f"s--{variant}--seed{seed}"
    fifths = {name: m if isinstance(m, tuple) else (None, None, None, None, m) for name, m in metrics.items()}
    model = _model(test, length)
    return CellResult(variant=variant, seed=seed, run=run, steps=5, train_s=1.0, model=model, metrics=fifths)


@pytest.fixture
def results() -> SweepResults:
    """Two seeds of a and b; of c, the second seed alone."""
    cells = [
        _cell("a", 0, [1.0, 0.5, 1.0], length=30.0, kl=3.0),
        _cell("a", 1, [1.0, 1.0, 0.5], length=34.0, kl=5.0, entropy=2.0),
        _cell("b", 0, [0.5, 0.0, 0.75], length=20.0, kl=2.0),
        _cell("b", 1, [0.5, 0.5, 0.25], length=24.0, kl=6.0),
        _cell("c", 1, [0.5, 0.5, 1.0], entropy=1.5),
    ]
    reference = ReferenceResult(name="teacher", group="g", first_variant="a", seed=0, model=_model([1.0] * 3, 10.0))
    return SweepResults(name="s", description="", recipe="r", statuses=[], cells=cells, references=[reference])


def _claim(more: str, less: str, measure: str) -> Claim:
    return Claim(text=f"{more} over {less}", source="Sec. 1", more=more, less=less, measure=measure)


def _one(results: SweepResults, *claim: str) -> JudgedClaim:
    return _judged(results, _claim(*claim))


def _judged(results: SweepResults, claim: Claim) -> JudgedClaim:
    (found,) = judge_claims(replace(results, judged=JudgedOn(claims=[claim], benchmark=results.judged.benchmark)))
    return found


def test_a_claim_is_the_difference_paired_by_seed_and_problem(results: SweepResults) -> None:
    found = _one(results, "a", "b", "accuracy:test")
    # In both seeds a − b is 0.5, 0.5 and 0.25, twenty times each: 0.4167 ± 1.96 · 0.1179 / √60
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(5 / 12)
    assert (found.difference.low, found.difference.high) == pytest.approx((5 / 12 - 0.030, 5 / 12 + 0.030), abs=0.003)
    assert (found.verdict, found.num_seeds, found.what) == (ClaimVerdict.HOLDS, 2, "a > b, accuracy on test")
    assert _one(results, "b", "a", "accuracy:test").verdict is ClaimVerdict.DOES_NOT


def test_what_differs_in_sign_between_seeds_is_unclear(results: SweepResults) -> None:
    found = _one(results, "a", "b", "kl")  # 3 − 2 = 1 and 5 − 6 = −1
    assert found.difference is not None
    assert (found.difference.mean, found.difference.low) == pytest.approx((0.0, -found.difference.high))
    assert found.difference.high == pytest.approx(12.7, rel=0.12)  # t of one degree of freedom × 1.41 / √2
    assert found.verdict is ClaimVerdict.UNCLEAR


def test_one_number_of_one_seed_tells_nothing(results: SweepResults) -> None:
    found = _one(results, "c", "a", "entropy")  # c has the second seed alone: 1.5 − 2
    assert found.difference is not None
    assert (found.difference.mean, found.num_seeds, found.verdict) == (-0.5, 1, ClaimVerdict.UNCLEAR)


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
    claims = [_claim("a", "b", "accuracy:test"), _claim("a", "b", "length"), _claim("a", "d", "length")]
    claims += [_claim("c", "a", "kl"), _claim("c", "a", "entropy")]
    statuses = [
        CellStatus(run=f"{v}{seed}", variant=v, seed=seed, state=CellState.FINISHED, detail="")
        for v in "abc"
        for seed in (0, 1, 2)
    ]
    judged = JudgedOn(claims=claims, left_out={"no variant 'x'": ["x beats y", "x beats z"]})
    table = build_table(replace(results, judged=judged, statuses=statuses))
    rows = table.claim_table().rows
    assert [row[3] for row in rows] == ["holds", "holds", "missing", "missing", "unclear"]
    assert {row[2] for row in rows} == {"more"}
    assert [row[5] for row in rows[1:]] == ["+10 (+10 to +10)", "–", "–", "-0.5 (one seed)"]
    assert [row[6] for row in rows] == ["2 of 3", "2 of 3", "0 of 3", "0 of 3", "1 of 3"]
    text = table.to_markdown()
    assert "| a over b | Sec. 1 | more | holds | a > b, accuracy on test | +41.7 (+38." in text
    assert " points | 2 of 3 |" in text
    assert "## Claims: holds 2, unclear 1, missing 2 (more − less" in text
    assert "## Claims left out: 2 of 7" in text
    assert "| no variant 'x' | x beats y; x beats z | 2 |" in text


# Three metrics of two seeds, whose differences between a and b are the same in both: −0.02, 0.0 and 0.05.
@pytest.mark.parametrize(
    ("expected", "margin", "difference", "verdict"),
    [
        ("holds", None, 0.05, ClaimVerdict.HOLDS),
        ("holds", "2 points", 0.05, ClaimVerdict.HOLDS),
        ("holds", "10 %", 0.05, ClaimVerdict.DOES_NOT),  # a is 1.05: the margin is 0.105
        ("holds", None, 0.0, ClaimVerdict.UNCLEAR),
        ("holds", None, -0.02, ClaimVerdict.DOES_NOT),
        ("similar", "3 points", -0.02, ClaimVerdict.AGREES),
        ("similar", "1 points", -0.02, ClaimVerdict.DOES_NOT),
        ("similar", "3 points", 0.05, ClaimVerdict.DOES_NOT),
        ("similar", "5 %", 0.05, ClaimVerdict.AGREES),  # 0.0525
        ("not much more", "3 points", -0.02, ClaimVerdict.AGREES),
        ("not much more", "3 points", 0.05, ClaimVerdict.DOES_NOT),
        ("unclear", None, 0.05, ClaimVerdict.HOLDS),
    ],
)
def test_verdicts_of_every_kind(expected: str, margin: str | None, difference: float, verdict: ClaimVerdict) -> None:
    cells = [
        _cell(variant, seed, [1.0] * 3, **{"reward/mean": value})
        for seed in (0, 1)
        for variant, value in (("a", 1.0 + difference), ("b", 1.0))
    ]
    results = SweepResults(name="s", description="", recipe="r", statuses=[], cells=cells, references=[])
    told = {"text": "t", "more": "a", "less": "b", "measure": "reward/mean", "expected": expected, "margin": margin}
    assert _judged(results, Claim.model_validate(told)).verdict is verdict


@pytest.mark.parametrize(
    ("expected", "verdict"), [("similar", ClaimVerdict.UNCLEAR), ("not much more", ClaimVerdict.UNCLEAR)]
)
def test_an_interval_across_the_margin_is_unclear(results: SweepResults, expected: str, verdict: ClaimVerdict) -> None:
    # a − b = 0.417 ± 0.03, and the margin is 0.42
    claim = {"text": "t", "more": "a", "less": "b", "measure": "accuracy", "expected": expected, "margin": "42 points"}
    assert _judged(results, Claim.model_validate(claim)).verdict is verdict


def test_a_metric_in_five_means_golden() -> None:
    # Ten steps, two a fifth: 0.5, 2.5, 4.5, 6.5, 8.5. The repetition rate is void in the steps without cut responses.
    rows = [
        {"step": i, "x": float(i), "response/clip_ratio": float(i < 3), "response/repetition_overlong": float(i)}
        for i in range(10)
    ]
    found = fifths_of(rows)
    assert found["x"] == (0.5, 2.5, 4.5, 6.5, 8.5)
    assert found["response/repetition_overlong"] == (0.5, 2.0, None, None, None)
    # Of twelve steps: two a fifth, from steps 0, 2, 5 (2.5 · 2), 8 (7.5) and 10.
    assert fifths_of([{"step": i, "x": float(i)} for i in range(12)])["x"] == (0.5, 2.5, 5.5, 8.5, 10.5)
    assert fifths_of([{"step": 0, "x": 7.0}])["x"] == (7.0,) * 5
    assert fifths_of([]) == {}


@pytest.mark.parametrize(
    ("measure", "difference"),
    [
        ("reward/mean", 9.0 - 1.0),
        ("early:reward/mean", 4.0 - 2.0),
        ("growth:reward/mean", (9.0 - 3.0) - (1.0 - 1.0)),
        ("early_growth:reward/mean", (4.0 - 3.0) - (2.0 - 1.0)),
        ("late_growth:reward/mean", (9.0 - 7.0) - (1.0 - 4.0)),
    ],
)
def test_measures_over_the_course_of_training(measure: str, difference: float) -> None:
    fifths: dict[str, Any] = {"a": (3.0, 4.0, 5.0, 7.0, 9.0), "b": (1.0, 2.0, 3.0, 4.0, 1.0)}
    cells = [_cell(v, seed, [1.0] * 3, **{"reward/mean": fifths[v]}) for v in fifths for seed in (0, 1)]
    results = SweepResults(name="s", description="", recipe="r", statuses=[], cells=cells, references=[])
    found = _one(results, "a", "b", measure)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(difference)
    alone = _judged(results, Claim(text="t", less="b", measure="late_growth:reward/mean"))
    assert (alone.what, alone.verdict) == ("0 > b, late growth of reward/mean", ClaimVerdict.HOLDS)  # 4 → 1
    steady = {"text": "t", "more": "b", "measure": "early_growth:reward/mean", "expected": "similar", "margin": "90 %"}
    # 2 − 1 = 1 against 90 % of the last fifth's 1.0, not of the growth
    assert _judged(results, Claim.model_validate(steady)).verdict is ClaimVerdict.DOES_NOT


def test_accuracy_without_a_name_is_what_the_sweep_is_judged_on() -> None:
    def model(test: float, hard: float, val: float) -> ModelScores:
        values = {"test": test, "hard": hard, "validation": val}
        answers = {name: {f"p{i}": value for i in range(300)} for name, value in values.items()}
        return ModelScores(scores=answers, lengths=answers)

    cells = [
        CellResult(variant=v, seed=0, run=v, steps=1, train_s=1.0, model=m)
        for v, m in (("a", model(0.5, 0.7, 1.0)), ("b", model(0.1, 0.1, 0.0)))
    ]
    results = SweepResults(name="s", description="", recipe="r", statuses=[], cells=cells, references=[])
    for judged_on, mean in (("avg", 0.5), ("hard", 0.6), ("validation", 1.0)):
        results = replace(results, judged=JudgedOn(benchmark=judged_on))
        found = _one(results, "a", "b", "accuracy")
        assert found.difference is not None
        assert found.difference.mean == pytest.approx(mean)
        assert found.what == f"a > b, accuracy on {judged_on}"
        length = _one(results, "a", "b", "length")  # of all but validation, whatever the sweep is judged on
        assert length.difference is not None
        assert length.difference.mean == pytest.approx(0.5)
        assert _one(results, "a", "b", "length:hard").what == "a > b, length on hard"


def test_a_claim_at_equal_time_is_read_at_the_faster_one_s_end() -> None:
    def cell(variant: str, *points: tuple[int, float, float]) -> CellResult:
        watched = [Watched(step=step, seconds=s, model=_model([r] * 3, 1.0)) for step, s, r in points]
        return CellResult(
            variant=variant, seed=0, run=variant, steps=1, train_s=1.0, model=_model([1.0] * 3, 1.0), watched=watched
        )

    cells = [cell("a", (10, 9.0, 0.2), (20, 19.0, 0.8)), cell("b", (10, 5.0, 0.1), (20, 10.0, 0.2))]
    cells.append(cell("sft", (10, 1.0, 0.0), (20, 2.0, 0.0)))
    results = SweepResults(name="s", description="", recipe="r", statuses=[], cells=cells, references=[])
    found = _one(results, "a", "b", "accuracy_at_equal_time")
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(
        0.2 + 0.1 * 0.6 - 0.2
    )  # a at 10 s: a tenth of the way from 0.2 to 0.8
    assert found.what == "a > b, accuracy in training on test after 10 s"

    several = {name: {f"p{i}": 1.0 for i in range(9)} for name in ("hard", "ood")}  # in training, neither test nor avg
    model = ModelScores(scores=several, lengths=several)
    cells = [replace(cell, watched=[replace(each, model=model) for each in cell.watched]) for cell in cells]
    results = replace(results, cells=cells, judged=JudgedOn(benchmark="test"))
    assert _one(results, "a", "b", "accuracy_at_equal_time").what == "a > b, accuracy in training on avg after 10 s"


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
        (
            {"measure": "length:tset"},
            "claim 1, field 'measure': no benchmark 'tset', did you mean 'test'?; length:NAME",
        ),
        ({"measure": "lately:entropy"}, "claim 1, field 'measure': 'lately:entropy' is not a measure"),
        ({"measure": "growth:entrop"}, "claim 1, field 'measure': no metric 'entrop', did you mean 'entropy'?"),
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


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        ({"more": "", "less": ""}, "neither 'more' nor 'less' is given; name a variant"),
        ({"expected": "similar"}, "'similar' needs a margin; add e.g. margin: 2 points"),
        ({"expected": "unclear", "margin": "2 points"}, "a margin says nothing where 'unclear' is expected"),
        ({"measure": "entropy", "margin": "2 points"}, "'entropy' is not counted in points; give the margin in %"),
        ({"margin": "two"}, "field 'claims.0.margin'"),
        ({"marign": "2 %"}, "field 'claims.0.marign': unknown field, did you mean 'margin'?"),
    ],
)
def test_a_claim_that_says_nothing_is_refused(claim: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        _spec(**claim)
    assert words in str(error.value)


def test_a_sweep_names_a_shipped_list_and_its_benchmark() -> None:
    values: dict[str, Any] = {"name": "s", "variants": {"KDRL": {}, "GRPO": {"stage2.objective": "grpo"}}}
    never = {"set": {"stage2.evaluate_every": None}}
    spec = validate_sweep({**values, **never, "claims": "paper", "judged_on": ["aime24", "test"]}, origin="s.yaml")
    recipes = {cell.variant: cell.recipe for cell in expand(spec)}
    judged = claims_of(spec.claims, spec.judged_on, recipes)
    assert [claim.text for claim in judged.claims][:2] == ["the joint loss beats GRPO", "GRPO lengthens responses"]
    assert judged.benchmark == "test"
    left = sum(map(len, judged.left_out.values()))
    assert len(judged.claims) + left == len(load_claims("paper", ""))
    assert "the joint loss beats KD-RKL" in judged.left_out["no variant 'KD-RKL'"]
    # A claim that needs two things is told once, under the first of them.
    assert "KD-RKL beats SFT" in judged.left_out["no variant 'KD-RKL'"]
    unreadable = claims_of(spec.claims, spec.judged_on, {**recipes, "KD-RKL": None})
    assert "the joint loss beats KD-RKL" in [claim.text for claim in unreadable.claims]
    assert judged.left_out["no evaluations during training"] == ["the joint loss beats GRPO at equal time"]
    own = {"text": "t", "more": "KDRL", "less": "GRPO", "measure": "accuracy_at_equal_time"}
    for wrong, words in (
        ({**never, "claims": [own]}, "claim 1, field 'measure': accuracy_at_equal_time needs evaluations during"),
        ({"claims": "papr"}, "field 'claims': no list 'papr', did you mean 'paper'?"),
        ({"judged_on": "tset"}, "field 'judged_on': no benchmark 'tset', did you mean 'test'?; avg, or one of"),
    ):
        with pytest.raises(RecipeError) as error:
            expand(validate_sweep({**values, **wrong}, origin="s.yaml"))
        assert words in str(error.value)


def test_at_unequal_steps_only_the_claims_at_equal_time_are_judged() -> None:
    """The paper makes the others for equal steps."""
    spec = validate_sweep(
        {
            "name": "s",
            "variants": {"KDRL": {}, "GRPO": {"stage2.objective": "grpo", "stage2.steps": 130}},
            "claims": "paper",
        },
        origin="s.yaml",
    )
    judged = claims_of(spec.claims, spec.judged_on, {cell.variant: cell.recipe for cell in expand(spec)})
    assert [claim.text for claim in judged.claims if all(claim.sides)] == [
        "stage 1 improves the student",
        "GRPO beats the stage-1 student",
        "the joint loss beats GRPO at equal time",
    ]
    assert judged.left_out["80 steps of KDRL and 130 steps of GRPO"] == [
        "the joint loss beats GRPO",
        "the joint loss writes longer responses than GRPO",
    ]


@pytest.mark.parametrize("name", list_claims())
def test_a_sweep_that_has_all_can_judge_every_shipped_claim(name: str) -> None:
    """None of them is about a metric that does not exist; each has its source, and no two are the same."""
    claims = load_claims(name, "")
    labels = {label for claim in claims for label in claim.sides if label}
    references = {"student before", "after stage 1", "teacher"}
    assert labels <= references | {
        *("KDRL", "KDRL-Annealing", "GRPO", "KD-RKL", "SFT", "reward shaping", "k3", "Top-K", "β small", "β large"),
        *("response mask", "group mask", "weaker teacher", "after GRPO"),
    }
    (cell,) = expand(validate_sweep({"name": "s", "variants": {"KDRL": {}}}, origin="s.yaml"))
    periodic = cell.recipe.evaluation.model_copy(update={"periodic": ["test"]})
    first = cell.recipe.evaluation.benchmarks[0]
    periodic = periodic.model_copy(update={"benchmarks": [first, first.model_copy(update={"name": "aime24"})]})
    stage = cell.recipe.stage("stage2").model_copy(update={"evaluate_every": 1})
    recipe = cell.recipe.model_copy(update={"evaluation": periodic, "stage2": stage})
    found = claims_of(claims, "avg", dict.fromkeys(labels - references, recipe), origin=name)
    assert (len(found.claims), found.left_out) == (len(claims), {})
    assert all(claim.source for claim in claims)
    assert len({claim.text for claim in claims}) == len(claims)
    assert len({(claim.sides, claim.measure, claim.expected) for claim in claims}) == len(claims)


def test_the_shipped_findings_name_every_finding_of_the_paper() -> None:
    spec = load_sweep("findings")
    assert isinstance(spec.seeds, int)
    assert spec.seeds >= 5
    assert not isinstance(spec.claims, str)
    sections = " ".join(claim.source for claim in spec.claims)
    assert all(section in sections for section in ("Sec. 3.1", "Sec. 3.2", "Sec. 3.3", "Sec. 3.4", "Sec. 4.2"))
    labels = {cell.variant for cell in expand(spec)}
    compared = {label for claim in spec.claims for label in (claim.more, claim.less)}
    assert labels <= compared
