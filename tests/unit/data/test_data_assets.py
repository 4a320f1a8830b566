"""The shipped problems: in the schemas they claim, rebuilt byte for byte, and filtered by the paper's rules."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kdrl_core.config import DataConfig, Recipe, resolve_path
from kdrl_core.data import SKYWORK_SCHEMA, filter_problems, read_problems
from kdrl_core.data.build_assets import BENCHMARKS, TRAIN_FILES, build_assets
from kdrl_core.data.schema import SKYWORK_LABELS
from kdrl_core.errors import DataError

SKYWORK = "builtin:problems/skywork_synthetic_labels.parquet"
DEEPSCALER = "builtin:problems/deepscaler.json"
PAPER_RULES = {"drop_passes_at_least": 15, "drop_all_failed": True, "max_unsolved_share": 0.1}
NUM_ROWS = {"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500, "minerva_math": 272, "olympiad_bench": 675}


def test_skywork_file_has_the_published_schema_and_says_that_its_labels_are_made_up() -> None:
    file = pq.ParquetFile(resolve_path(SKYWORK))
    assert file.metadata.num_rows == 3052
    table = file.read()
    assert [(f.name, f.type) for f in table.schema] == [(f.name, f.type) for f in SKYWORK_SCHEMA]
    assert b"SYNTHETIC" in table.schema.metadata[b"kdrl.notice"]
    rows = table.to_pylist()
    assert all(row["data_source"].startswith("synthetic-labels-") for row in rows)
    assert [row["extra_info"]["index"] for row in rows] == list(range(3052))
    assert all(len(json.loads(row["reward_model"]["ground_truth"])) == 1 for row in rows)


def test_synthetic_labels_are_plausible() -> None:
    rows = pq.read_table(resolve_path(SKYWORK)).to_pylist()
    difficulty = [row["extra_info"]["model_difficulty"] for row in rows]
    assert 10 <= sum(labels is None for labels in difficulty) <= 60
    known = [labels for labels in difficulty if labels and None not in labels.values()]
    assert 5 <= sum(labels is not None and None in labels.values() for labels in difficulty) <= 40
    small, large, middle = ([labels[name] for labels in known] for name in SKYWORK_LABELS)
    assert sum(small) > sum(middle) > sum(large)
    for counts in (small, middle, large):
        assert min(counts) == 0
        assert max(counts) == 16
    hard = [m for s, m in zip(small, middle, strict=True) if s >= 12]
    easy = [m for s, m in zip(small, middle, strict=True) if s <= 4]
    assert sum(hard) / len(hard) > 4 * sum(easy) / len(easy)


def test_deepscaler_file_has_deepscalers_shape() -> None:
    rows = json.loads(resolve_path(DEEPSCALER).read_text(encoding="utf-8"))
    assert len(rows) == 967 + 1596
    assert {tuple(row) for row in rows} == {("problem", "answer", "solution"), ("problem", "answer")}
    table = read_problems(DataConfig(files=[DEEPSCALER]))
    assert table.num_rows == len(rows)
    assert len(set(table["problem_id"].to_pylist())) == len(rows)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_read_as_problems(name: str) -> None:
    table = read_problems(DataConfig(files=[f"builtin:benchmarks/{name}.jsonl"]))
    assert table.num_rows == NUM_ROWS[name]
    assert len(set(table["problem_id"].to_pylist())) == table.num_rows


def test_paper_rules_on_the_real_problems(make_recipe: Callable[..., Recipe], tokenizer: Any) -> None:
    recipe = make_recipe(files=[SKYWORK], missing_labels="drop", **PAPER_RULES)
    pool, report = filter_problems(read_problems(recipe.stage("stage1").data), recipe, tokenizer=tokenizer)
    print(report.to_text())
    assert report.rows_in == 3052
    assert report.rows_in - sum(rule.dropped for rule in report.rules) == report.rows_out == pool.num_rows
    # The byte-level tokenizer makes more prompts too long than a real one does; the other counts do not depend on it.
    assert {rule.rule: rule.dropped for rule in report.rules if rule.rule in ("missing_labels", *PAPER_RULES)} == {
        "missing_labels": 45,
        "drop_passes_at_least": 781,
        "drop_all_failed": 53,
        "max_unsolved_share": report.dropped("max_unsolved_share"),
    }
    failures = pool["student_failures"].to_pylist()
    num_unsolved = failures.count(16)
    assert num_unsolved == (len(failures) - num_unsolved) // 9  # u ≤ 0.1 · (s + u) ⇔ 9 u ≤ s, and the cap binds
    assert max(len(ids) for ids in pool["prompt_token_ids"].to_pylist()) <= 1024
    assert min(failures) == 2

    raw, raw_report = filter_problems(pq.read_table(resolve_path(SKYWORK)), recipe, tokenizer=tokenizer)
    assert raw_report == report
    assert raw.equals(pool)


def test_deepscaler_needs_no_labels(make_recipe: Callable[..., Recipe], tokenizer: Any) -> None:
    recipe = make_recipe(files=[DEEPSCALER], max_problems=500)
    pool, report = filter_problems(read_problems(recipe.stage("stage1").data), recipe, tokenizer=tokenizer)
    assert (report.rows_in, pool.num_rows) == (2563, 500)
    assert pool["student_failures"].null_count == 500


def make_source(folder: Path) -> Path:
    for name in BENCHMARKS:
        path = folder / "eval" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": f"{name}-0", "problem": "1+1?", "answer": "2", "source": "s"}) + "\n")
    for name in TRAIN_FILES:
        path = folder / "train" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        base = {"problem": "Né?", "answer": "\\frac{1}{2}", "source": "s"}
        rows = [
            {**base, "id": f"x-1999-1-{i}", "level": i % 6, "difficulty": i / 2, "solution": "w"} for i in range(20)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    build_assets(source, tmp_path / "one")
    build_assets(source, tmp_path / "two")
    assert files_below(tmp_path / "one") == files_below(tmp_path / "two")
    assert len(files_below(tmp_path / "one")) == 8
    with pytest.raises(DataError, match="--source"):
        build_assets(tmp_path / "nowhere", tmp_path / "three")


def test_shipped_files_are_what_the_script_builds(tmp_path: Path) -> None:
    source = os.environ.get("KDRL_ASSET_SOURCE")
    if source is None:
        pytest.skip("set KDRL_ASSET_SOURCE to the folder of normalised JSON Lines")
    build_assets(Path(source), tmp_path)
    for name, content in files_below(tmp_path).items():
        assert resolve_path(f"builtin:{name}").read_bytes() == content, name
