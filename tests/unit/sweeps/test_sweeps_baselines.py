"""docs/baselines.md has the numbers of docs/baselines.json, and these are of the recipes that the sweep has now."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import script

from kdrl_core.config import config_hash
from kdrl_core.look.sweeps.spec import expand, load_sweep

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
AGAIN = "run it again: kdrl sweep run baselines, then python benchmarks/baselines_table.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("baselines_table")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs" / "baselines.json").read_text(encoding="utf-8"))
    return found


def test_the_page_has_the_table_of_the_file(tables: ModuleType, content: dict[str, Any]) -> None:
    assert tables.with_table(PAGE, content) == PAGE
    row = {"variant": "GRPO", "test": {"accuracy": 0.5, "low": 0.4567, "high": 0.5}, "metrics": {"reward/mean": [0, 1]}}
    told = tables.table({"rows": [row], "references": {"teacher": row["test"]}})
    assert told.splitlines()[2:] == [
        "| GRPO | 50.0 (45.7–50.0) | 0.00 → 1.00 | – | – | – |",
        "| *teacher* | 50.0 (45.7–50.0) | | | | |",
    ]


def test_the_numbers_are_of_the_sweep_as_it_is_now(content: dict[str, Any]) -> None:
    now = {cell.variant: config_hash(cell.recipe) for cell in expand(load_sweep("baselines"))}
    assert {row["variant"]: row["config_hash"] for row in content["rows"]} == now, AGAIN
