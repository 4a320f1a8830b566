"""The summary as tables of text, for Markdown, HTML and the terminal alike."""

from dataclasses import dataclass

from kdrl_core.look.reporting.run_summary import RunSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Header and rows; the first `num_text` columns are text, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    num_text: int = 1

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, without the title."""
        lines = [self.header, [*["---"] * self.num_text, *["---:"] * (len(self.header) - self.num_text)], *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def accuracy_table(summary: RunSummary) -> Table:
    """Accuracy in % with the 95 % interval, one model a row, one benchmark a column."""
    benchmarks = list(dict.fromkeys(name for model in summary.models for name in model.benchmarks))
    rows = [[model.name, *(_interval(model.benchmarks.get(name)) for name in benchmarks)] for model in summary.models]
    return Table(title="Accuracy, % (95 % interval)", header=["model", *benchmarks], rows=rows)


def phase_table(summary: RunSummary) -> Table:
    """Reward, length, clip ratio and KL at the start and the end of each stage."""
    header = ["stage", "steps", "reward", "length", "clip ratio", "teacher KL", "s"]
    rows = []
    for stage in summary.stages:
        columns = {"reward/mean": 2, "response/length_mean": 0, "response/clip_ratio": 2, "kd/kl_unmasked": 2}
        cells = [_change(stage.metrics.get(name), digits) for name, digits in columns.items()]
        rows.append(
            [
                f"{stage.stage} {stage.objective}",
                f"{stage.steps}/{stage.planned_steps}",
                *cells,
                f"{stage.seconds:.0f}",
            ]
        )
    return Table(title="Training: means of the first → last fifth of the steps", header=header, rows=rows)


def sft_table(summary: RunSummary) -> Table:
    """What rejection sampling kept (B.2) and the likelihood loss (14); no rows without an SFT stage."""
    rows = []
    for stage in summary.stages:
        if stage.samples is None:
            continue
        kept, sampled, covered, problems = (
            int(stage.samples[name]) for name in ("kept", "sampled", "problems_covered", "problems")
        )
        rows.append(
            [
                stage.stage,
                f"{kept:,} of {sampled:,} ({100 * kept / sampled:.0f} %)",
                f"{covered:,} of {problems:,}",
                _change(stage.metrics.get("loss/sft"), 4),
            ]
        )
    return Table(title="SFT by rejection sampling", header=["stage", "samples kept", "problems", "loss"], rows=rows)


def tables_of(summary: RunSummary) -> list[Table]:
    """The tables that have rows, in the order in which they are shown."""
    return [table for table in (accuracy_table(summary), phase_table(summary), sft_table(summary)) if table.rows]


def _interval(result: dict[str, float] | None) -> str:
    if result is None:
        return "–"
    return f"{100 * result['accuracy']:.1f} ({100 * result['low']:.1f}–{100 * result['high']:.1f})"


def _change(ends: tuple[float, float] | None, digits: int) -> str:
    return "–" if ends is None else f"{ends[0]:.{digits}f} → {ends[1]:.{digits}f}"
