"""`kdrl filter` as a user calls it."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from flows.cli import app
from kdrl_core.data.schema import PROBLEM_SCHEMA

PROBLEMS = "builtin:problems/skywork_synthetic_labels.parquet"


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["filter", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.slow
def test_the_papers_rules_on_the_shipped_problems(tmp_path: Path, r1_tokenizer_dir: Path) -> None:
    output = tmp_path / "pool.parquet"
    arguments = ("--recipe", "paper-1.5b", "--input", PROBLEMS, "--tokenizer", r1_tokenizer_dir, "--output", output)
    code, printed, errors = call(*arguments, "--json")
    assert code == 0, errors
    report = json.loads(printed)
    assert [(rule["rule"], rule["dropped"]) for rule in report["rules"]] == [
        ("malformed", 0),
        ("no_answer", 0),
        ("conflicting_answers", 0),
        ("duplicates", 0),
        ("missing_labels", 45),
        ("drop_passes_at_least", 781),
        ("drop_all_failed", 53),
        ("min_pass_rate", 0),
        ("max_prompt_tokens", 3),
        ("decontamination", 3),
        ("unparsable_answers", 0),
        ("max_unsolved_share", 107),
        ("max_problems", 0),
    ]
    assert report["rows_in"] == 3052
    assert report["rows_out"] == 2060
    table = pq.read_table(output)
    assert table.schema.equals(PROBLEM_SCHEMA)
    assert len(table) == 2060
    assert table["problem_id"].to_pylist() == sorted(table["problem_id"].to_pylist())

    code, _, errors = call(*arguments)
    assert code == 1
    assert "exists; give another file, or --force to replace it" in errors
    assert call(*arguments, "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "paper-1.5b", "--input", PROBLEMS], "or measure prompts with another tokenizer: --tokenizer DIR"),
        (["--recipe", "miniature", "--stage", "stage3"], "no stage 'stage3'; it has stage1, stage2"),
        (["--recipe", "miniature", "--input", "none.parquet"], "none.parquet does not exist"),
        (["--recipe", "miniature", "--tokenizer", "nowhere"], "--tokenizer nowhere: "),
        (["--recipe", "none"], "none"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, printed, errors = call(*arguments, "--output", tmp_path / "o.parquet")
    assert (code, printed) == (1, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert not (tmp_path / "o.parquet").exists()


def test_malformed_rows_are_named_or_dropped(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": ""}\n')
    arguments = ["--recipe", "miniature", "--input", file, "--set", "stage2.data.missing_labels=keep"]
    code, _, errors = call(*arguments, "--output", tmp_path / "o.parquet")
    assert code == 1
    assert "p.jsonl row 2, field 'answer': empty" in errors
    dropping = (*arguments, "--output", tmp_path / "o.parquet", "--on-error", "drop")
    code, _, errors = call(*dropping)
    assert code == 1
    assert "1 of 2 rows are malformed" in errors
    code, printed, errors = call(*dropping, "--set", "stage2.data.max_malformed_share=0.5")
    assert code == 0, errors
    assert (printed + errors).count("malformed: 1 × ") == 1
    assert len(pq.read_table(tmp_path / "o.parquet")) == 1


def test_an_input_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    pq.write_table(PROBLEM_SCHEMA.empty_table(), file)
    code, _, errors = call("--recipe", "miniature", "--input", file, "--output", file, "--force")
    assert code == 1
    assert "is an input as well" in errors
