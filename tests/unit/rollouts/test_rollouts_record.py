"""The record's schema and its documentation; run files and exports are readable by the usual tools as they are."""

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_runs import NUM_ROWS, make_run, part_path, write_step
from typer.testing import CliRunner

from flows.cli.app import app
from kdrl_core.errors import DataError
from kdrl_core.look.rollouts.files import export_rollouts, record_schema
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.rollouts.record import (
    BULKY,
    PARTS,
    RECORD,
    RECORD_VERSION,
    SCALARS,
    TIMINGS,
    VERSION_KEY,
    describe,
)
from kdrl_core.look.rollouts.views import PROMPTS, STEPS, sql_type
from kdrl_core.tables.schemas import REFERENCE, REWARDS, ROLLOUTS, TEACHER, UPDATE

DOCS = Path(__file__).parents[3] / "docs" / "inspecting.md"
EVERYTHING = RolloutFilter()


def test_the_record_holds_every_column_of_a_step() -> None:
    for schema in (ROLLOUTS, TEACHER, REFERENCE, REWARDS, UPDATE):
        for field in schema:
            assert RECORD.field(field.name).type == field.type, field.name
    assert {*SCALARS, *BULKY, *TIMINGS, "run", "stage", "step", "entropy_mean"} == set(RECORD.names)
    assert "entropies" in PARTS["update"]


def test_every_field_says_what_it_is() -> None:
    assert RECORD.metadata == {VERSION_KEY: RECORD_VERSION.encode()}
    for field in RECORD:
        assert len(field.metadata[b"description"]) > 8
        assert field.nullable == (field.name not in ("run", "stage", "step", "prompt_id", "sample"))


def test_the_page_has_the_columns_as_they_are() -> None:
    """docs/inspecting.md: a table a view, each column with its type or meaning."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", DOCS.read_text(), re.MULTILINE)
    assert [(name, kind) for name, kind, _ in rows] == [(name, sql_type(name)) for name in RECORD.names]
    assert [text.replace("\\|", "|") for _, _, text in rows] == [describe(name) for name in RECORD.names]
    pairs = re.findall(r"^\| `(\w+)` \| ([^|]*?) \|$", DOCS.read_text(), re.MULTILINE)
    assert pairs == [*STEPS.items(), *PROMPTS.items()]


@pytest.fixture(scope="module")
def exported(whole: RolloutStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "all.parquet"
    assert export_rollouts(whole, EVERYTHING, path) == 18
    return path


def test_an_export_keeps_schema_and_values(exported: Path, whole: RolloutStore) -> None:
    file = pq.ParquetFile(exported)
    assert file.schema_arrow.metadata[VERSION_KEY] == RECORD_VERSION.encode()
    for field, written in zip(RECORD, file.schema_arrow, strict=True):
        assert (written.name, written.type, written.nullable) == (field.name, field.type, field.nullable)
        assert written.metadata[b"description"] == field.metadata[b"description"]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    rows = file.read().to_pylist()
    key = {name: rows[7][name] for name in ("run", "stage", "step", "prompt_id", "sample")}
    record = whole.record(**key)
    record.pop("tokens")
    assert rows[7] == record
    assert [row["step"] for row in rows] == [step for step in range(3) for _ in range(NUM_ROWS)]


def read_with_datasets(path: Path) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    found = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    return [dict(row) for row in found]


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "pandas": lambda path: pd.read_parquet(path, dtype_backend="pyarrow").to_dict("records"),
    "pyarrow": lambda path: pq.ParquetFile(path).read().to_pylist(),
    "duckdb": lambda path: duckdb.sql(f"from '{path}'").to_arrow_table().to_pylist(),
    "polars": lambda path: pl.read_parquet(path, hive_partitioning=False).to_dicts(),
    "datasets": read_with_datasets,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("part", ["rollouts", "teacher", "rewards", "update", "exported"])
def test_files_are_readable_as_they_are(
    whole: RolloutStore, exported: Path, tmp_path: Path, reader: str, part: str
) -> None:
    source = exported
    if part != "exported":
        source = whole.runs()[0].path / "rollouts" / "stage=stage2" / "step=000001" / f"{part}.parquet"
    path = tmp_path / "x.parquet"
    path.write_bytes(source.read_bytes())
    expected = pq.ParquetFile(path).read().to_pylist()
    found = READERS[reader](path)
    assert len(found) == len(expected)
    for row, known in zip(found, expected, strict=True):
        assert row.keys() == known.keys()
        for name, value in known.items():
            given = list(row[name]) if isinstance(value, list) else row[name]
            if value is None:
                assert given is None or pd.isna(given), name
            else:
                assert given == (pytest.approx(value) if not isinstance(value, str) else value), name


def test_jsonl_and_csv(whole: RolloutStore, tmp_path: Path) -> None:
    where = RolloutFilter(step_min=1, step_max=1, prompt_id="q-b")
    assert export_rollouts(whole, where, tmp_path / "x.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["response"] for line in lines] == ["step 1 q-b number 0", "step 1 q-b number 1"]
    assert lines[0].keys() == set(RECORD.names)
    assert export_rollouts(whole, where, tmp_path / "x.csv") == 2
    csv.field_size_limit(sys.maxsize)
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == set(RECORD.names)
    assert (rows[1]["sample"], rows[1]["extracted"], rows[0]["extracted"]) == ("1", "7", "")
    assert json.loads(rows[0]["token_ids"]) == lines[0]["token_ids"]


def test_texts_that_a_spreadsheet_would_run_are_told_and_quoted(artifacts: Path, tmp_path: Path) -> None:
    hostile = ["=1+1", "+1", "-1", "@x", "\tx", "\rx"]
    run = make_run(artifacts, "formulas", steps=0)
    write_step(run, "stage2", 0, response=hostile)
    with RolloutStore.open([run.name]) as store:
        for quote, expected in ((False, hostile), (True, [f"'{text}" for text in hostile])):
            told: list[int] = []
            path = tmp_path / f"{quote}.csv"
            columns = ["response", "kl_sum", "log_ratio_sum"]  # negative numbers are none
            export_rollouts(store, EVERYTHING, path, columns=columns, quote_formulas=quote, on_formulas=told.append)
            with path.open(newline="") as file:
                assert [row["response"] for row in csv.DictReader(file)] == expected
            assert told == [6]
        export_rollouts(store, EVERYTHING, path, columns=["prompt"], on_formulas=told.append)
        export_rollouts(store, EVERYTHING, tmp_path / "x.jsonl", quote_formulas=True, on_formulas=told.append)
        assert told == [6]
        assert json.loads((tmp_path / "x.jsonl").read_text().splitlines()[0])["response"] == "=1+1"
    done = CliRunner().invoke(app, ["rollouts", "export", "formulas", "-o", str(tmp_path / "cli.csv")])
    assert "6 texts begin with =, +, -, @, tab or CR: a spreadsheet may run them" in " ".join(done.stderr.split())
    assert "--quote-formulas" in done.stderr


def test_some_columns_and_rows_alone(whole: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    assert export_rollouts(whole, EVERYTHING, path, columns=["reward", "step", "reward"], limit=8) == 8
    table = pq.ParquetFile(path).read()
    assert table.column_names == ["reward", "step"]
    assert table["step"].to_pylist() == [0] * 6 + [1] * 2
    with pytest.raises(DataError, match="no column 'rewrd', did you mean 'reward'"):
        record_schema(["rewrd"])
    with pytest.raises(DataError, match=r"exported as \.parquet, \.jsonl, \.csv"):
        export_rollouts(whole, EVERYTHING, tmp_path / "x.xlsx")


def test_an_export_that_fails_leaves_what_was_there(store: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("kept")
    file = part_path_of_last(store)
    file.write_bytes(b"torn")
    with pytest.raises(Exception, match="is damaged"):
        export_rollouts(store, EVERYTHING, path)
    assert path.read_text() == "kept"
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["x.jsonl"]


def part_path_of_last(store: RolloutStore) -> Path:
    from kdrl_core.ledger import RunPaths

    return part_path(RunPaths(store.runs()[0].path), "stage2", 2, "rollouts")


def test_hostile_texts_survive_every_format(tmp_path: Path, artifacts: Path) -> None:
    from rollout_runs import make_run, write_step

    texts = ['a "quoted", text\n', "\x1b[2J\x00", "=cmd()", "\r\n", "𝔘\u2028", "{}"]
    write_step(make_run(artifacts, "hostile", steps=0), "stage2", 0, response=texts)
    with RolloutStore.open(["hostile"]) as store:
        for suffix in (".parquet", ".jsonl", ".csv"):
            export_rollouts(store, EVERYTHING, tmp_path / f"x{suffix}", columns=["response"])
    assert pq.read_table(tmp_path / "x.parquet")["response"].to_pylist() == texts
    lines = (tmp_path / "x.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["response"] for line in lines] == texts
    with (tmp_path / "x.csv").open(newline="") as file:
        assert [row["response"] for row in csv.DictReader(file)] == texts


def test_equal_exports_are_equal_bytes(whole: RolloutStore, exported: Path, tmp_path: Path) -> None:
    export_rollouts(whole, EVERYTHING, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == exported.read_bytes()
    assert isinstance(pq.read_schema(exported), pa.Schema)
