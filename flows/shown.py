"""What Prefect shows of a run: log lines, a progress artifact per stage, tables, the result, links to its files."""

import logging
import re
import time
from typing import Any
from uuid import UUID

from prefect import artifacts, get_run_logger
from prefect.exceptions import MissingContextError

from kdrl_core.boxes.stage import StepSummary, remaining_steps
from kdrl_core.ledger import Run, manifest_of, open_run_dir
from kdrl_core.look.reporting.run_summary import accuracy_table, summarize, tables_of
from kdrl_core.look.sweeps.state import SweepPaths
from kdrl_core.look.sweeps.table import SweepTable
from kdrl_core.look.tracking import close_tracking, track
from kdrl_core.tables.files import load_metrics

_MIN_INTERVAL_S = 2.0
_TABLE_COLUMNS = [
    *("step", "reward/mean", "response/length_mean", "response/clip_ratio", "kd/kl_unmasked", "entropy", "beta"),
    *("loss/sft", "sft/epoch", "optim/grad_norm", "time/rollout_s", "time/update_s"),
]
_MAX_TABLE_ROWS = 100


def artifact_key(of: Run | str, *parts: str) -> str:
    """A key that Prefect accepts: lower-case letters, digits and dashes."""
    name = of if isinstance(of, str) else of.name
    return re.sub(r"[^a-z0-9]+", "-", "-".join([name, *parts]).lower()).strip("-")


class _CoreLog(logging.Handler):
    """Sends what `kdrl_core` logs (files reused or damaged, work tried again) to the log of the caller's flow run."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            logger: Any = get_run_logger()
        except MissingContextError:
            logger = logging.getLogger("prefect")
        logger.log(record.levelno, record.getMessage())


_core = logging.getLogger("kdrl")
_core.addHandler(_CoreLog(logging.INFO))
_core.setLevel(logging.INFO)
_core.propagate = False  # otherwise Prefect's root handler would show it twice


def run_opened(run: Run) -> None:
    """Say which run this is, and where its files are."""
    get_run_logger().info("run %s, recipe %s, files in %s", run.name, run.recipe.name, run.paths.root)


def nothing_to_do(run: Run) -> None:
    """Say that a run is finished. Send its metrics to trackers that were added to the recipe since."""
    track(run)
    close_tracking()
    get_run_logger().info("nothing to do: run %s is finished, %s", run.name, run.paths.report / "report.html")


def filtered(run_dir: str, reports: dict[str, str]) -> None:
    """Show the filter's counts."""
    run = open_run_dir(run_dir)
    if not reports:
        return
    text = "\n\n".join(f"**{stage}**\n\n```\n{table}\n```" for stage, table in reports.items())
    artifacts.create_markdown_artifact(
        text, key=artifact_key(run, "filter"), description="problems kept and dropped, by rule"
    )
    for stage, table in reports.items():
        get_run_logger().info("%s filter\n%s", stage, table)


class StageProgress:
    """One stage's log lines and progress artifact."""

    def __init__(self, run: Run, stage: str) -> None:
        self._logger = get_run_logger()
        self._run, self._stage = run, stage
        self._steps = run.recipe.stage(stage).steps
        remaining = remaining_steps(run, stage)
        if remaining.start:
            self._logger.info("%s: steps 0 to %d are published already, reused", stage, remaining.start - 1)
        done = 100.0 * remaining.start / self._steps
        self._artifact = _bar(done, artifact_key(run, stage), f"{stage} of {run.name}, {self._steps} steps")
        self._samples: UUID | None = None
        self._last = time.monotonic()

    def step(self, summary: StepSummary) -> None:
        """A step is done."""
        metrics = summary.metrics
        length = f"length {metrics['response/length_mean']:.1f}"
        if "loss/sft" in metrics:
            phase, facts = "update", f"loss {metrics['loss/sft']:.4f}  {length}  epoch {metrics['sft/epoch']:.2f}"
        else:
            phase, kl = "rollout", f"{metrics['kd/kl_unmasked']:.3f}" if "kd/kl_unmasked" in metrics else "–"
            facts = f"reward {metrics['reward/mean']:.3f}  {length}  clip {metrics['response/clip_ratio']:.3f}"
            facts += f"  kl {kl}  beta {metrics['beta']:.2g}"
        speed = summary.timings[f"throughput/{phase}_tokens_per_s"]
        replayed = "  (replayed)" if summary.replayed else ""
        self._logger.info(
            "%s step %d/%d  %s  %.0f tokens/s%s", self._stage, summary.step, self._steps, facts, speed, replayed
        )
        if time.monotonic() - self._last > _MIN_INTERVAL_S:
            self._last = time.monotonic()
            self._set_progress(100.0 * (summary.step + 1) / self._steps)

    def sampled(self, shards: int, total: int) -> None:
        """`shards` of `total` shards of teacher samples are published, with their verdicts."""
        self._logger.info("%s sampled shard %d/%d", self._stage, shards, total)
        if self._samples is None:
            key = artifact_key(self._run, self._stage, "samples")
            self._samples = _bar(100.0 * shards / total, key, f"teacher samples of {self._stage}, {total} shards")
        else:
            artifacts.update_progress_artifact(artifact_id=self._samples, progress=100.0 * shards / total)

    def selected(self) -> None:
        """The dataset is published."""
        counts = manifest_of(self._run.paths.sft_dataset(self._stage)).metadata
        self._logger.info(
            "%s kept %d of %d teacher samples, on %d of %d problems",
            self._stage,
            *(counts[name] for name in ("kept", "sampled", "problems_covered", "problems")),
        )

    def evaluated(self, label: str, results: dict[str, Any]) -> None:
        """A checkpoint was evaluated."""
        shown = ", ".join(f"{name} {100 * r['accuracy']:.1f} %" for name, r in results["benchmarks"].items())
        self._logger.info("%s: %s", label, shown)

    def finish(self) -> None:
        """The stage is done: full bar, table of metrics, links to the files."""
        run, stage = self._run, self._stage
        self._set_progress(100.0)
        rows = load_metrics(run, stage)
        every = max(1, -(-len(rows) // _MAX_TABLE_ROWS))
        table = [
            {n: float(f"{row[n]:.4g}") if isinstance(row[n], float) else row[n] for n in _TABLE_COLUMNS if n in row}
            for row in rows[::every]
        ]
        artifacts.create_table_artifact(
            table=table, key=artifact_key(run, stage, "metrics"), description=f"metrics of {stage}"
        )
        for what, path in (("rollouts", run.paths.step(stage, 0).parent), ("metrics", run.paths.metrics(stage))):
            artifacts.create_link_artifact(
                link=path.as_uri(),
                link_text=run.paths.relative(path),
                key=artifact_key(run, stage, what, "parquet"),
                description=f"{what} of {stage}, Parquet",
            )

    def _set_progress(self, percent: float) -> None:
        artifacts.update_progress_artifact(artifact_id=self._artifact, progress=percent)


def _bar(percent: float, key: str, description: str) -> UUID:
    artifact = artifacts.create_progress_artifact(progress=percent, key=key, description=description)
    assert isinstance(artifact, UUID)  # awaitable in async flows only
    return artifact


def evaluated(run: Run) -> None:
    """Show the accuracy of every model."""
    table = accuracy_table(summarize(run))
    artifacts.create_table_artifact(
        table=[dict(zip(table.header, row, strict=True)) for row in table.rows],
        key=artifact_key(run, "accuracy"),
        description=table.title,
    )


def reported(run: Run) -> None:
    """Show the result as Markdown with links to report and student."""
    summary = summarize(run)
    parts = [f"# {run.name}"]
    for table in tables_of(summary):
        parts += [f"## {table.title}", table.to_markdown()]
    parts += ["## Files", "\n".join(f"- {name}: `{path}`" for name, path in summary.paths.items())]
    artifacts.create_markdown_artifact(
        "\n\n".join(parts), key=artifact_key(run, "result"), description=f"result of {run.name}"
    )
    get_run_logger().info("finished: %s", summary.paths.get("report"))


def swept(name: str, table: SweepTable) -> None:
    """Show a sweep's tables."""
    key = artifact_key("sweep", name)
    artifacts.create_markdown_artifact(table.to_markdown(), key=key, description=f"result of sweep {name}")
    get_run_logger().info("tables: %s", SweepPaths.of(name).report)
