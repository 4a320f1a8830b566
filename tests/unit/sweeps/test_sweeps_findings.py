"""docs/findings.md says what the sweeps said: its tables against their results, kept in docs/findings.json.

Of the sweeps where thinking longer helps, `benchmarks/findings_tables.py` writes both. Of the first world the file has
three reports, below `short`: rows and claims of `findings`, rows of `findings-tuning`, and the times of one seed of
`findings` by itself, with the accuracies of all seeds at that time.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import script

from kdrl_core.config import config_hash
from kdrl_core.look.sweeps.claims import load_claims
from kdrl_core.look.sweeps.spec import expand, load_sweep

DOCS = Path(__file__).parents[3] / "docs"
BENCHMARKS = ("test", "hard", "ood")


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "findings.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def content(file: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = file["short"]
    return found


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("findings_tables")


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


def test_the_page_has_the_tables_of_the_file(tables: ModuleType, file: dict[str, Any], page: str) -> None:
    assert tables.with_tables(page, file) == page
    assert tables.dumped(file) == (DOCS / "findings.json").read_text(encoding="utf-8")


def test_the_numbers_are_of_the_sweeps_as_they_are_now(file: dict[str, Any], page: str) -> None:
    for name, sweep in file["sweeps"].items():
        spec = load_sweep(name)
        now: dict[str, str] = {}
        for cell in expand(spec):
            now.setdefault(cell.label, config_hash(cell.recipe))
        again = f"run it again: kdrl sweep run {name}, then python benchmarks/findings_tables.py {name}"
        assert sweep["config_hashes"] == now, again
        assert {len(row["seeds"]) for row in sweep["rows"]} == {spec.seeds}
        assert isinstance(spec.claims, str)
        texts = {claim.text for claim in load_claims(spec.claims, "test")}
        assert {claim["text"] for claim in sweep["claims"]} <= texts
        judged = [claim for claim in sweep["claims"] if claim["verdict"] != "missing"]
        for claim in judged:
            assert claim["num_seeds"] == spec.seeds or f"{claim['num_seeds']} of {spec.seeds} seeds)" in page


def test_twenty_findings_are_decided_at_least(tables: ModuleType, file: dict[str, Any]) -> None:
    claims = [claim for sweep in file["sweeps"].values() for claim in sweep["claims"]]
    assert len({claim["text"] for claim in claims if claim["verdict"] in tables.DECIDED}) >= 20


def test_rates_where_thinking_longer_helps_are_the_best_of_their_tuning(file: dict[str, Any]) -> None:
    tried = {
        variant: {float(rate): accuracy for rate, accuracy in rates.items()}
        for variant, rates in file["tuning"]["findings-long-tuning"].items()
    }
    planned: dict[str, set[float]] = {}
    for cell in expand(load_sweep("findings-long-tuning")):
        planned.setdefault(cell.label, set()).add(cell.recipe.stage("stage2").learning_rate)
    assert planned == {variant: {*rates} for variant, rates in tried.items()}
    for cell in expand(load_sweep("findings-long")):
        rates = tried[cell.variant]
        assert max(rates, key=lambda rate: rates[rate]) == cell.recipe.stage("stage2").learning_rate


def test_rows_of_the_tables_golden(tables: ModuleType) -> None:
    score = {"mean": 0.5, "low": 0.4567, "high": 0.6, "rank": 1}
    row = {"label": "GRPO", "scores": {"test": score, "validation": score}, "length_mean": 41.6}
    share = {"mean": 0.2, "low": 0.1, "high": 0.3}
    claim = {
        "text": "A beats B",
        "source": "Sec. 1",
        "what": "A > B, accuracy on test",
        "expected": "more",
        "verdict": "holds",
        "difference": share,
        "num_seeds": 8,
        "num_planned": 8,
        "is_share": True,
    }
    short = {**claim, "verdict": "unclear", "num_seeds": 3, "is_share": False}
    content = {
        "sweeps": {
            "x-equal": {"rows": [row], "claims": [claim], "dynamics": {"GRPO": {"response/clip_ratio": [0.01, 0.024]}}},
            "x": {"rows": [row], "claims": [short], "dynamics": {}},
        },
        "tuning": {"t": {"GRPO": {"1.0e-4": 50.0, "2.0e-4": 61.25}}},
    }

    def last(kind: str, *names: str) -> str:
        return str([*tables.TABLES[kind](content, *names)][-1])

    assert last("accuracy", "x-equal") == "| GRPO | **50.0** (45.7–60.0) | 42 |"
    assert last("claims", "x-equal", "x") == (
        "| A beats B | Sec. 1 | A > B, accuracy on test | more | **holds** +20.0 (+10.0 to +30.0) | "
        "**unclear** +0.2 (+0.1 to +0.3, 3 of 8 seeds) |"
    )
    assert last("counts", "x-equal") == "| `x-equal` | 1 | 1 | 0 | 0 | 0 | 0 |"
    assert last("dynamics", "x-equal") == "| GRPO | – | – | 1.0 → 2.4 | – | – | – |"
    assert last("tuning", "t") == "| GRPO | 1.0e-4: 50.0, **2.0e-4: 61.2** |"
