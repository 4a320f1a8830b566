"""The table of docs/baselines.md: what every variant of the sweep `baselines` gave.

    kdrl sweep run baselines
    python benchmarks/baselines_table.py

Reads the sweep's runs in the artifacts folder, and writes docs/baselines.json and the table in docs/baselines.md. A
test holds the page against the file, and the file's recipes against those that the sweep has now.
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BENCHMARK = "test"
METRICS = {"reward/mean": 2, "response/length_mean": 1, "kd/kl_sampled": 2, "optim/grad_norm": 2}
"""Metrics of the last stage that are shown, first and last fifth of the steps, and their digits."""
_TABLE = re.compile(r"(<!-- table -->\n).*(<!-- end -->)", re.S)


def measured() -> dict[str, Any]:
    """The results of the sweep's finished runs. Raises RunError if a run is missing."""
    from kdrl_core.config import config_hash
    from kdrl_core.ledger import open_run
    from kdrl_core.look.reporting.run_summary import summarize
    from kdrl_core.look.sweeps.spec import expand, load_sweep
    from kdrl_core.tables.files import load_metrics

    rows, references = [], {}
    for cell in expand(load_sweep("baselines")):
        run = open_run(cell.run)
        scores = {model.label: model.benchmarks[BENCHMARK] for model in summarize(run).models}
        *before, last = run.recipe.stages
        if not references:
            references = {label: _score(scores[label]) for label in ("base", *before, "teacher")}
        steps = load_metrics(run, last)
        rows.append(
            {
                "variant": cell.variant,
                "config_hash": config_hash(cell.recipe),
                BENCHMARK: _score(scores[last]),
                "metrics": {name: ends for name in METRICS if (ends := _ends(steps, name)) is not None},
            }
        )
    return {"recipe": run.recipe.name, "references": references, "rows": rows}


def _score(found: dict[str, float]) -> dict[str, float]:
    return {name: round(found[name], 6) for name in ("accuracy", "low", "high")}


def _ends(steps: list[dict[str, Any]], name: str) -> list[float] | None:
    """Means of a metric over the first and the last fifth of the steps; None if the variant has no such metric."""
    values = [row[name] for row in steps if row.get(name) is not None]
    count = max(1, len(steps) // 5)
    return None if not values else [round(sum(part) / len(part), 6) for part in (values[:count], values[-count:])]


def table(content: dict[str, Any]) -> str:
    """The Markdown of the results."""
    lines = ["| variant | test accuracy, % | reward | length, tokens | KL to the teacher | gradient norm |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in content["rows"]:
        cells = [_interval(row[BENCHMARK]), *(_change(row["metrics"].get(name), METRICS[name]) for name in METRICS)]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    names = {"base": "student before", "stage1": "after stage 1", "teacher": "teacher"}
    for label, score in content["references"].items():
        lines.append(f"| *{names[label]}* | {_interval(score)} | | | | |")
    return "\n".join(lines) + "\n"


def _interval(score: dict[str, float]) -> str:
    return f"{100 * score['accuracy']:.1f} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"


def _change(ends: list[float] | None, digits: int) -> str:
    return "–" if ends is None else " → ".join(f"{value:.{digits}f}" for value in ends)


def with_table(page: str, content: dict[str, Any]) -> str:
    """The page with the table between its two marks. Raises ValueError without them."""
    if _TABLE.search(page) is None:
        raise ValueError("the page has no <!-- table --> … <!-- end -->")
    return _TABLE.sub(lambda marks: f"{marks[1]}\n{table(content)}\n{marks[2]}", page)


def main() -> None:
    content = measured()
    page = DOCS / "baselines.md"
    page.write_text(with_table(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    lines = json.dumps(content, ensure_ascii=False, indent=1)
    (DOCS / "baselines.json").write_text(f"{lines}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
