"""The tables of docs/findings.md: what the sweeps of the study gave.

    kdrl sweep run findings-long-equal
    python benchmarks/findings_tables.py findings-long-equal      # one sweep or several, all of their cells finished

Reads the sweeps named from the artifacts folder, puts their results into docs/findings.json beside those of the other
sweeps, and writes all tables of docs/findings.md anew: each stands between `<!-- KIND SWEEP … -->` and `<!-- end -->`.
A test holds the page against the file, and the file's recipes against those that the sweeps have now.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
DYNAMICS = {
    "reward/mean": ("reward", 2),
    "response/length_mean": ("length, tokens", 1),
    "response/clip_ratio": ("cut, %", 1),
    "kd/kl_sampled": ("KL to the teacher", 2),
    "entropy": ("entropy", 2),
    "optim/grad_norm": ("gradient norm", 2),
}
"""Metrics of the last stage whose first and last fifth are shown: heading and digits."""
DECIDED = ("holds", "agrees", "does not hold")
_TIMED = "accuracy in training"
"""Measure of the claims at equal time, which are left out: cells that share the cores have no times to compare."""
_MARKS = re.compile(r"(<!-- (\S+) (\S.*?) -->\n).*?(<!-- end -->)", re.S)


def measured(name: str) -> dict[str, Any]:
    """The results of a sweep. Raises SystemExit if a cell is not finished."""
    from kdrl_core.config import config_hash
    from kdrl_core.look.sweeps.aggregate import build_table
    from kdrl_core.look.sweeps.comparison import read_sweep
    from kdrl_core.look.sweeps.spec import expand, load_sweep

    results = read_sweep(name)
    if results.missing:
        raise SystemExit(f"{name}: {len(results.missing)} cells are not finished; continue it: kdrl sweep run {name}")
    table = build_table(results).to_json()
    hashes: dict[str, str] = {}
    for planned in expand(load_sweep(name)):
        hashes.setdefault(planned.label, config_hash(planned.recipe))
    metrics = {label: [cell.metrics for cell in results.cells if cell.variant == label] for label in hashes}
    return _rounded(
        {
            "config_hashes": hashes,
            "rows": [_only(row, "label seeds scores length_mean") for row in table["rows"]],
            "claims": [
                _only(claim, "text source expected what verdict difference num_seeds num_planned is_share")
                for claim in table["claims"]
                if _TIMED not in claim["what"]
            ],
            "dynamics": {
                label: {name: ends for name in DYNAMICS if (ends := _ends(of_seeds, name))}
                for label, of_seeds in metrics.items()
            },
        }
    )


def _only(record: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: record[name] for name in names.split()}


def _ends(of_seeds: Sequence[dict[str, Any]], name: str) -> list[float] | None:
    """Means of a metric over the first and the last fifth of the steps, over all seeds; None if a seed lacks it."""
    fifths = [each.get(name, (None,)) for each in of_seeds]
    if not fifths or any(each[0] is None or each[-1] is None for each in fifths):
        return None
    return [fmean(each[place] for each in fifths) for place in (0, -1)]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def accuracy_table(content: dict[str, Any], *names: str) -> Iterator[str]:
    """Every model of several sweeps over the same seeds: at one rate for all, and each at its own."""
    sweeps = [content["sweeps"][name] for name in names]
    benchmarks = [name for name in sweeps[0]["rows"][0]["scores"] if name not in ("validation", "avg")]
    columns = [f"{name}{told}" for name in [*benchmarks, "tokens"] for told in _told(names)]
    yield f"| model | {' | '.join(columns)} |"
    yield f"| --- |{' --- |' * len(columns)}"
    rows = [{row["label"]: row for row in sweep["rows"]} for sweep in sweeps]
    for label in rows[0]:
        cells = [_accuracy(of_sweep[label]["scores"][name]) for name in benchmarks for of_sweep in rows]
        cells += [f"{of_sweep[label]['length_mean']:.0f}" for of_sweep in rows]
        yield f"| {label} | {' | '.join(cells)} |"


def claims_table(content: dict[str, Any], *names: str) -> Iterator[str]:
    """Every claim with its verdict and its difference in each of the sweeps; their shares are in points."""
    sweeps = [{claim["text"]: claim for claim in content["sweeps"][name]["claims"]} for name in names]
    yield f"| finding | source | measured | the paper says | {' | '.join(names)} |"
    yield f"| --- | --- | --- | --- |{' --- |' * len(names)}"
    for text in dict.fromkeys(text for claims in sweeps for text in claims):
        claim = next(claims[text] for claims in sweeps if text in claims)
        told = [_judged(claims.get(text)) for claims in sweeps]
        yield f"| {text} | {claim['source']} | {claim['what']} | {claim['expected']} | {' | '.join(told)} |"


def counts_table(content: dict[str, Any], *names: str) -> Iterator[str]:
    """How many claims of each sweep are decided."""
    verdicts_told = (*DECIDED, "unclear", "missing")
    yield f"| sweep | findings | {' | '.join(verdicts_told)} |"
    yield f"| --- | --- |{' --- |' * len(verdicts_told)}"
    for name in names:
        verdicts = [claim["verdict"] for claim in content["sweeps"][name]["claims"]]
        counts = [str(verdicts.count(each)) for each in verdicts_told]
        yield f"| `{name}` | {len(verdicts)} | {' | '.join(counts)} |"


def dynamics_table(content: dict[str, Any], name: str) -> Iterator[str]:
    """Metrics of the last stage: mean over its first fifth → over its last fifth."""
    yield f"| model | {' | '.join(heading for heading, _ in DYNAMICS.values())} |"
    yield f"| --- |{' --- |' * len(DYNAMICS)}"
    for label, metrics in content["sweeps"][name]["dynamics"].items():
        cells = []
        for metric, (heading, digits) in DYNAMICS.items():
            scale = 100 if heading.endswith("%") else 1
            ends = metrics.get(metric)
            cells.append("–" if ends is None else " → ".join(f"{scale * value:.{digits}f}" for value in ends))
        yield f"| {label} | {' | '.join(cells)} |"


def tuning_table(content: dict[str, Any], name: str) -> Iterator[str]:
    """Accuracy on the validation problems for each learning rate, %."""
    yield "| variant | learning rate: accuracy |"
    yield "| --- | --- |"
    for variant, tried in content["tuning"][name].items():
        best = max(tried, key=lambda rate: tried[rate])
        told = [f"**{rate}: {value:.1f}**" if rate == best else f"{rate}: {value:.1f}" for rate, value in tried.items()]
        yield f"| {variant} | {', '.join(told)} |"


TABLES = {
    "accuracy": accuracy_table,
    "claims": claims_table,
    "counts": counts_table,
    "dynamics": dynamics_table,
    "tuning": tuning_table,
}


def _told(names: Sequence[str]) -> list[str]:
    return [""] if len(names) == 1 else [f", {'equal' if name.endswith('-equal') else 'own'} rates" for name in names]


def _accuracy(score: dict[str, Any]) -> str:
    mean = f"{100 * score['mean']:.1f}"
    mean = {1: f"**{mean}**", 2: f"*{mean}*"}.get(score["rank"], mean)
    return f"{mean} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"


def _judged(claim: dict[str, Any] | None) -> str:
    if claim is None or claim["difference"] is None:
        return "–"
    ends = [claim["difference"][name] * (100 if claim["is_share"] else 1) for name in ("mean", "low", "high")]
    mean, low, high = (f"{value:+.1f}" if claim["is_share"] else f"{value:+.3g}" for value in ends)
    seeds = (
        "" if claim["num_seeds"] == claim["num_planned"] else f", {claim['num_seeds']} of {claim['num_planned']} seeds"
    )
    return f"**{claim['verdict']}** {mean} ({low} to {high}{seeds})"


def with_tables(page: str, content: dict[str, Any]) -> str:
    """The page with every table made anew. Raises KeyError for a kind or a sweep that there is not."""

    def table(marks: re.Match[str]) -> str:
        lines = "\n".join(TABLES[marks[2]](content, *marks[3].split()))
        return f"{marks[1]}\n{lines}\n\n{marks[4]}"

    return _MARKS.sub(table, page)


def main() -> None:
    file, page = DOCS / "findings.json", DOCS / "findings.md"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in sys.argv[1:]:
        content["sweeps"][name] = measured(name)
    file.write_text(dumped(content), encoding="utf-8")
    page.write_text(with_tables(page.read_text(encoding="utf-8"), content), encoding="utf-8")


def dumped(value: Any, depth: int = 0) -> str:
    """JSON with one line for each record of a list, so that a diff shows which one changed."""
    if isinstance(value, dict) and depth < 3:
        items = [f"{json.dumps(name, ensure_ascii=False)}: {dumped(each, depth + 1)}" for name, each in value.items()]
        return "{\n" + ",\n".join(items) + "\n}" + ("\n" if depth == 0 else "")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    main()
