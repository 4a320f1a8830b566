"""Claims: that one variant of a sweep has more of a quantity than another, about as much, or not much more.

A claim is data. judging.py measures it. A sweep lists claims of its own, or names a list that is shipped: `paper` has
the findings of the paper, `paper-zero` those of its R1-Zero setting (Sec. 4.5). A claim in a list of one's own must be
about what the sweep has. Of a shipped list a sweep gets the claims whose variants, benchmarks and models for reference
it has; the others are left out, and counted in the report. So are those about two variants with unequal steps: the
paper makes its claims for equal steps, except at equal time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from kdrl_core.config import Recipe, did_you_mean, read_fields
from kdrl_core.config.alarms import AlarmMetric
from kdrl_core.config.load import RECIPES_DIR
from kdrl_core.errors import RecipeError
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.reporting.run_summary import model_name
from kdrl_core.look.sweeps.fifths import SPANS

CLAIMS_DIR = RECIPES_DIR.parent / "claims"
AVERAGE = "avg"
"""Mean of the benchmarks that every row has, without `VALIDATION`."""
VALIDATION = "validation"
"""Name of the benchmark that chooses learning rates and checkpoints; it is left out of averages for that reason."""
ACCURACY, EQUAL_TIME, LENGTH = "accuracy", "accuracy_at_equal_time", "length"
"""Measures of a claim that are not metrics."""
CLAIM_METRICS = (
    *get_args(AlarmMetric),
    *("beta", "optim/learning_rate", "ratio/mean", "ratio/clipped_frac", "sft/epoch"),
)
"""Metrics of a step that a claim may be about; `time/…`, `throughput/…` and `sync/…` as well."""
_SHARES = (
    ACCURACY,
    EQUAL_TIME,
    "reward/mean",
    "reward/accuracy",
    "response/clip_ratio",
    "response/repetition_overlong",
)
"""Measures between 0 and 1, which are shown in points: hundredths."""
_SAYS = {"holds": "more", "does not hold": "not more", "unclear": "no clear difference"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What a claim compares."""

    quantity: str
    """`accuracy`, `accuracy_at_equal_time`, `length`, or a metric of the last stage."""
    benchmark: str | None = None
    """Of an accuracy or a length; None: those that the sweep is judged on, for a length all."""
    span: str = ""
    """Key of SPANS, for a metric."""

    @property
    def is_metric(self) -> bool:
        return self.quantity not in (ACCURACY, EQUAL_TIME, LENGTH)

    @property
    def is_share(self) -> bool:
        return self.quantity in _SHARES

    def __str__(self) -> str:
        if self.is_metric:
            return f"{self.span.replace('_', ' ')}{' of ' if 'growth' in self.span else ' '}{self.quantity}".strip()
        words = self.quantity.replace("_", " ")
        return words if self.benchmark is None else f"{words} on {self.benchmark}"


class Claim(BaseModel):
    """A claim about two variants or reference models, or about one of them and zero."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    text: str = Field(min_length=1, max_length=200, description="the claim in words")
    source: str = Field("", description="where the claim is made, e.g. Sec. 3.1")
    more: str = Field("", description="variant or reference model, by its name in the table; left out: zero")
    less: str = Field("", description="likewise")
    expected: Literal["holds", "does not hold", "unclear", "similar", "not much more"] = Field(
        "holds",
        description="what the source says; unclear: no difference to speak of; similar: within the margin of each "
        "other; not much more: `more` is above `less` by less than the margin, or below it",
    )
    margin: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)? (points|%)$",
        description="`2 points` (hundredths, of an accuracy or another share) or `5 %` (of the value of `more`, or of "
        "`less` if there is no `more`; of a growth: of the metric's last fifth). For similar and not much more; for "
        "holds: `more` is above `less` by at least this",
    )
    measure: str = Field(
        min_length=1,
        description="accuracy, accuracy:BENCHMARK, accuracy_at_equal_time, length, length:BENCHMARK (tokens of the "
        "final answers), or a metric of the last stage: its mean over the last fifth of the steps, or early:METRIC, "
        "growth:METRIC, early_growth:METRIC, late_growth:METRIC",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.more and not self.less:
            raise ValueError("neither 'more' nor 'less' is given; name a variant or a reference model")
        if self.expected in ("similar", "not much more") and self.margin is None:
            raise ValueError(f"'{self.expected}' needs a margin; add e.g. margin: 2 points, or margin: 5 %")
        if self.expected in ("does not hold", "unclear") and self.margin is not None:
            raise ValueError(f"a margin says nothing where '{self.expected}' is expected; drop it")
        if self.margin is not None and self.margin.endswith("points") and not self.compared.is_share:
            raise ValueError(f"'{self.measure}' is not counted in points; give the margin in %, e.g. margin: 5 %")
        return self

    @property
    def compared(self) -> Measure:
        """The measure, taken apart. Any text is one; `require_known` refuses those that mean nothing."""
        first, colon, second = self.measure.partition(":")
        if first in (ACCURACY, LENGTH):
            return Measure(quantity=first, benchmark=second if colon else None)
        if first in SPANS and colon:
            return Measure(quantity=second, span=first)
        return Measure(quantity=self.measure)

    @property
    def sides(self) -> tuple[str, str]:
        """The labels of both sides; empty for zero."""
        return self.more, self.less

    @property
    def says(self) -> str:
        """What the source says, in the words of the table."""
        return _SAYS.get(self.expected, self.expected)

    @property
    def comparison(self) -> str:
        """The comparison in short: `KDRL > GRPO`, `k3 ≈ KDRL ± 2 points`, `group mask ≤ KDRL + 2 points`."""
        more, less, margin = self.more or "0", self.less or "0", self.margin
        if self.expected == "similar":
            return f"{more} ≈ {less} ± {margin}"
        if self.expected == "not much more":
            return f"{more} ≤ {less} + {margin}"
        return f"{more} > {less}{f' + {margin}' if margin else ''}"

    def margin_of(self, value: float) -> float:
        """The margin in the measure's own unit; 0 without one. `value`: of the side that a margin in % refers to."""
        if self.margin is None:
            return 0.0
        number, unit = self.margin.split()
        return float(number) / 100 * (1.0 if unit == "points" else abs(value))


CLAIM_TAGS = ("shipped claims", "own claims")
"""Tell the two kinds of `Claims` apart in pydantic's errors."""
Claims = Annotated[
    Annotated[str, Tag(CLAIM_TAGS[0])] | Annotated[list[Claim], Tag(CLAIM_TAGS[1])],
    Discriminator(lambda value: CLAIM_TAGS[0] if isinstance(value, str) else CLAIM_TAGS[1]),
]
"""Claims as a sweep gives them: the name of a shipped list, or a list of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedOn:
    """The claims of a sweep's report, and the benchmark that it is judged on."""

    claims: list[Claim] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why → texts of the claims of a shipped list that the sweep cannot judge."""
    benchmark: str = AVERAGE
    """Of a measure `accuracy` without a name: a benchmark, or `avg`."""


def claims_of(
    claims: str | Sequence[Claim],
    judged_on: str | Sequence[str],
    recipes: Mapping[str, Recipe | None],
    *,
    origin: str | None = None,
) -> JudgedOn:
    """The claims that a sweep's report judges.

    Args:
        claims: name of a shipped list, or claims.
        judged_on: a benchmark, `avg`, or several of them: the first one that the sweep has.
        recipes: variant → recipe of one of its cells; None if it cannot be read.
        origin: name of the sweep in errors. None: nothing is refused, as for a sweep that has been started.

    Raises:
        RecipeError: no such list, `judged_on` is not a benchmark, or a claim in a list of one's own is about a variant,
            model, benchmark or metric that the sweep does not have.
    """
    has = _Known.of(recipes)
    wanted = [judged_on] if isinstance(judged_on, str) else judged_on
    found = next((name for name in wanted if name in (AVERAGE, *has.benchmarks)), None)
    if origin is not None and found is None:
        raise RecipeError(
            f"sweep {origin}, field 'judged_on': no benchmark '{wanted[0]}'{did_you_mean(wanted[0], has.benchmarks)}; "
            f"avg, or one of {', '.join(has.benchmarks)}"
        )
    benchmark = found or AVERAGE
    if not isinstance(claims, str):
        for number, claim in enumerate(claims if origin is not None else (), start=1):
            if fault := has.fault_of(claim):
                raise RecipeError(f"sweep {origin}, claim {number}{fault}")
        return JudgedOn(claims=list(claims), benchmark=benchmark)
    kept: list[Claim] = []
    left_out: dict[str, list[str]] = {}
    for claim in load_claims(claims, f"sweep {origin or 'report'}, field 'claims'"):
        if missing := has.missing_of(claim):
            left_out.setdefault(missing, []).append(claim.text)
        else:
            kept.append(claim)
    return JudgedOn(claims=kept, left_out=left_out, benchmark=benchmark)


def list_claims() -> list[str]:
    """Names of the lists that are shipped."""
    return sorted(path.stem for path in CLAIMS_DIR.glob("*.yaml"))


def load_claims(name: str, where: str) -> list[Claim]:
    """The claims of a shipped list. Raises RecipeError if there is no such list; `where` begins the message."""
    if name not in list_claims():
        raise RecipeError(
            f"{where}: no list '{name}'{did_you_mean(name, list_claims())}; give {' or '.join(list_claims())}, or the "
            "claims themselves"
        )
    path = CLAIMS_DIR / f"{name}.yaml"
    try:
        text = json.dumps(read_fields(path, what="list of claims")["claims"])
        return TypeAdapter(list[Claim]).validate_json(text)
    except (ValidationError, KeyError) as error:
        raise RecipeError(f"list of claims {path}: {error}") from error


def reference_labels(recipe: Recipe) -> list[str]:
    """`evaluated_labels` without the student that the run makes."""
    return [label for label in evaluated_labels(recipe) if label != recipe.stages[-1]]


@dataclass(frozen=True, slots=True)
class _Known:
    """What a sweep has that claims can be about."""

    variants: list[str]
    references: list[str]
    """Models for reference. They have answers, but no metrics of the compared stage."""
    benchmarks: list[str]
    periodic: bool
    """Whether some variant is evaluated during training."""
    steps: dict[str, int]
    """Variant → steps of its last stage."""

    @classmethod
    def of(cls, recipes: Mapping[str, Recipe | None]) -> "_Known":
        read = [recipe for recipe in recipes.values() if recipe is not None]
        names = dict.fromkeys(model_name(label) for recipe in read for label in reference_labels(recipe))
        return cls(
            variants=list(recipes),
            references=[*names, *(f"{name} of {variant}" for name in names for variant in recipes)],
            benchmarks=list(dict.fromkeys(b.name for recipe in read for b in recipe.evaluation.benchmarks)),
            periodic=any(r.evaluation.periodic and r.stage(r.stages[-1]).evaluate_every for r in read),
            steps={v: recipe.stage(recipe.stages[-1]).steps for v, recipe in recipes.items() if recipe is not None},
        )

    def labels_of(self, claim: Claim) -> list[str]:
        return [*self.variants, *(self.references if claim.compared.quantity in (ACCURACY, LENGTH) else ())]

    def missing_of(self, claim: Claim) -> str:
        """The first thing that the sweep lacks for a claim, in words; empty if it can judge it."""
        labels, measure = self.labels_of(claim), claim.compared
        for label in claim.sides:
            if label and label not in labels:
                return f"no variant '{label}'"
        if measure.benchmark is not None and measure.benchmark not in self.benchmarks:
            return f"no benchmark '{measure.benchmark}'"
        if measure.quantity == EQUAL_TIME:
            return "" if self.periodic else "no evaluations during training"
        steps = {self.steps[label]: label for label in claim.sides if label in self.steps}
        return "" if len(steps) < 2 else " and ".join(f"{num} steps of {label}" for num, label in steps.items())

    def fault_of(self, claim: Claim) -> str:
        """What is wrong with a claim, as the end of an error message; empty if nothing is."""
        measure, labels = claim.compared, self.labels_of(claim)
        for name, label in (("more", claim.more), ("less", claim.less)):
            if label and label not in labels:
                return f", field '{name}': no variant '{label}'{did_you_mean(label, labels)}"
        if claim.more == claim.less:
            return f": '{claim.more}' is compared with itself; correct 'more' or 'less'"
        if measure.benchmark is not None and measure.benchmark not in self.benchmarks:
            return (
                f", field 'measure': no benchmark '{measure.benchmark}'"
                f"{did_you_mean(measure.benchmark, self.benchmarks)}; {measure.quantity}:NAME, of "
                f"{', '.join(self.benchmarks)}"
            )
        if measure.quantity == EQUAL_TIME and not self.periodic:
            return (
                f", field 'measure': {EQUAL_TIME} needs evaluations during training; set evaluation.periodic and the "
                "last stage's evaluate_every"
            )
        return "" if not measure.is_metric else _metric_fault(measure)


def _metric_fault(measure: Measure) -> str:
    name = measure.quantity
    if name in CLAIM_METRICS or name.startswith(("time/", "throughput/", "sync/")):
        return ""
    if ":" in name:
        spans = ", ".join(span for span in SPANS if span)
        return f", field 'measure': '{name}' is not a measure; accuracy:BENCHMARK, length:BENCHMARK, or {spans}:METRIC"
    return (
        f", field 'measure': no metric '{name}'{did_you_mean(name, [LENGTH, EQUAL_TIME, *CLAIM_METRICS])}; "
        "accuracy, length, or a column of metrics.parquet"
    )
