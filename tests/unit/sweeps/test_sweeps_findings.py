"""docs/findings.md says what the sweeps said: its tables against their results, kept in docs/findings.json.

The file is made of three reports: rows and claims of `findings`, rows of `findings-tuning`, and the times of one seed
of `findings` by itself, with the accuracies of all seeds at that time.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.look.sweeps.spec import expand, load_sweep

DOCS = Path(__file__).parents[3] / "docs"
BENCHMARKS = ("test", "hard", "ood")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "findings.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "findings.md").read_text(encoding="utf-8")


def accuracies(row: dict[str, Any]) -> str:
    """The line of Table 1 in miniature, up to the lengths."""
    cells = []
    for name in BENCHMARKS:
        score = row["scores"][name]
        mean = f"{100 * score['mean']:.1f}"
        mean = {1: f"**{mean}**", 2: f"*{mean}*"}.get(score["rank"], mean)
        cells.append(f"{mean} ({100 * score['low']:.1f}–{100 * score['high']:.1f})")
    return f"| {row['label']} | {' | '.join(cells)} | {row['length_mean']:.0f} |"


def claim_line(claim: dict[str, Any]) -> str:
    found, points = claim["difference"], 100 if claim["is_share"] else 1
    mean, low, high = (points * found[name] for name in ("mean", "low", "high"))
    if claim["is_share"]:
        measured = f"{mean:+.1f} ({low:+.1f} to {high:+.1f}) points"
    else:
        measured = f"{mean:+.3g} ({f'{low:+.3g} to {high:+.3g}' if claim['num_seeds'] > 1 else 'one seed'})"
    told = [claim["text"], claim["source"], claim["expected"], f"**{claim['verdict']}**", claim["what"], measured]
    return f"| {' | '.join(told)} |"


def tuning_lines(rows: list[dict[str, Any]]) -> list[str]:
    tried: dict[str, dict[str, float]] = {}
    for row in rows:
        variant, rate = row["label"].rsplit(" ", 1)
        tried.setdefault(variant, {})[rate] = 100 * row["scores"]["validation"]["mean"]
    lines = []
    for variant, found in tried.items():
        best = max(found, key=lambda rate: found[rate])
        told = [f"**{rate}: {value:.1f}**" if rate == best else f"{rate}: {value:.1f}" for rate, value in found.items()]
        lines.append(f"| {variant} | {', '.join(told)} |")
    return lines


def test_every_accuracy_is_the_sweep_s(content: dict[str, Any], page: str) -> None:
    assert [line for row in content["rows"] if (line := accuracies(row)) not in page] == []
    assert {len(row["seeds"]) for row in content["rows"]} == {load_sweep("findings").seeds}


def test_accuracies_at_equal_time(content: dict[str, Any], page: str) -> None:
    time = content["time"]
    assert time["limit_s"] == min(time["train_s"].values())
    assert f"After the {time['limit_s']:.0f} s" in page
    for row in time["rows"]:
        mean, low, high = (100 * value for value in row["score"])
        assert f"| {row['label']} | {row['step']} | {mean:.1f} ({low:.1f}–{high:.1f}) |" in page
        assert row["seconds"] <= time["limit_s"]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines() if line.endswith(" | 8 |")}
    assert {label: f"{seconds:.0f}" for label, seconds in time["train_s"].items()} == {
        label: line.split(" | ")[-2] for label, line in lines.items() if label in time["train_s"]
    }


def test_every_claim_is_judged_as_the_sweep_judged_it(content: dict[str, Any], page: str) -> None:
    assert [line for claim in content["claims"] if (line := claim_line(claim)) not in page] == []
    claims = load_sweep("findings").claims
    assert [claim["text"] for claim in content["claims"]] == [c.text for c in claims if not isinstance(c, str)]


def test_every_learning_rate_is_the_one_that_tuning_found_best(content: dict[str, Any], page: str) -> None:
    assert [line for line in tuning_lines(content["tuning"]) if line not in page] == []
    tried: dict[str, dict[float, float]] = {}
    for row in content["tuning"]:
        variant, rate = row["label"].rsplit(" ", 1)
        tried.setdefault(variant, {})[float(rate)] = row["scores"]["validation"]["mean"]
    planned: dict[str, set[float]] = {}
    for cell in expand(load_sweep("findings-tuning")):
        planned.setdefault(cell.label, set()).add(cell.recipe.stage("stage2").learning_rate)
    assert planned == {variant: set(found) for variant, found in tried.items()}
    for cell in expand(load_sweep("findings")):
        found = tried[cell.variant]
        assert max(found, key=lambda rate: found[rate]) == cell.recipe.stage("stage2").learning_rate
