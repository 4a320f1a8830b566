"""The Parquet files of a step: documented, byte-identical when written again, and readable by the usual tools."""

import hashlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import RunPaths, publish_file
from kdrl_core.tables.files import read_table, write_table
from kdrl_core.tables.schemas import EVALUATION, REFERENCE, REWARDS, ROLLOUTS, SCHEMA_VERSION, TEACHER, UPDATE

SCHEMAS = {
    "rollouts": ROLLOUTS,
    "teacher": TEACHER,
    "reference": REFERENCE,
    "rewards": REWARDS,
    "update": UPDATE,
    "evaluation": EVALUATION,
}


def rewards(step: int) -> pa.Table:
    return pa.Table.from_pydict(
        {
            "prompt_id": ["a", "a"],
            "sample": [0, 1],
            "reward": [1.0, 0.0],
            "format_reward": [1.0, 1.0],
            "accuracy_reward": [1.0, 0.0],
            "verdict": ["correct", "wrong"],
            "extracted": ["6", None],
            "reason": [f"step {step}", "π ≠ 3"],
        },
        schema=REWARDS,
    )


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """Two stages of published rewards, with the manifests beside them."""
    found = RunPaths(tmp_path / "runs" / "r")
    for stage, steps in (("stage1", 2), ("stage2", 12)):
        for step in range(steps):
            publish_file(found.rewards(stage, step), lambda file, step=step: write_table(rewards(step), file))
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_says_what_it_is(name: str) -> None:
    for field in SCHEMAS[name]:
        assert field.metadata, field.name
        assert len(field.metadata[b"description"]) > 8


@pytest.mark.parametrize("name", SCHEMAS)
def test_rows_can_be_joined(name: str) -> None:
    assert {"prompt_id", "sample"} <= set(SCHEMAS[name].names)
    assert not {"stage", "step"} & set(SCHEMAS[name].names)  # these are the partition


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    digests = set()
    for number in range(3):
        write_table(rewards(0), tmp_path / f"{number}.parquet")
        digests.add(hashlib.sha256((tmp_path / f"{number}.parquet").read_bytes()).hexdigest())
    write_table(pa.concat_tables([rewards(0).slice(0, 1), rewards(0).slice(1)]).combine_chunks(), tmp_path / "c")
    digests.add(hashlib.sha256((tmp_path / "c").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_table(rewards(3), tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet")
    assert table.to_pylist() == rewards(3).to_pylist()
    assert table.schema.metadata[b"kdrl.schema_version"] == SCHEMA_VERSION.encode()
    assert table.schema.field("reward").metadata == REWARDS.field("reward").metadata
    assert read_table(tmp_path / "x.parquet", ["sample"]).column_names == ["sample"]


def test_null_where_none_is_allowed_is_refused(tmp_path: Path) -> None:
    values = rewards(0).to_pydict() | {"reason": ["x", None]}
    with pytest.raises((ValueError, pa.ArrowInvalid), match="reason"):
        write_table(pa.Table.from_pydict(values, schema=REWARDS), tmp_path / "x.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really PAR1", b"{}"])
def test_what_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(content)
    with pytest.raises(DamagedArtifactError, match=r"x\.parquet cannot be read as Parquet"):
        read_table(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedArtifactError, match=r"x\.parquet cannot be read as Parquet"):
        read_table(tmp_path / "x.parquet")


def test_pandas_reads_a_file(paths: RunPaths) -> None:
    frame = pd.read_parquet(paths.rewards("stage2", 7))
    assert frame["reward"].tolist() == [1.0, 0.0]
    assert frame["extracted"].isna().tolist() == [False, True]


def test_pandas_reads_the_folder_with_its_partitions(paths: RunPaths) -> None:
    frame = pd.read_parquet(paths.root / "rollouts")  # the manifests' leading underscore hides them
    assert len(frame) == 28
    assert frame.groupby(["stage", "step"], observed=True).size().tolist() == [2] * 14


def test_arrow_reads_the_folder_with_its_partitions(paths: RunPaths) -> None:
    dataset = ds.dataset(paths.root / "rollouts", partitioning="hive")
    assert {"stage", "step"} <= set(dataset.schema.names)
    table = dataset.to_table(filter=(ds.field("stage") == "stage2") & (ds.field("step") == 11))
    assert table["reason"].to_pylist() == ["step 11", "π ≠ 3"]


def test_duckdb_reads_the_folder_with_its_partitions(paths: RunPaths) -> None:
    duckdb = pytest.importorskip("duckdb")
    pattern = paths.root / "rollouts" / "*" / "*" / "rewards.parquet"
    found = duckdb.sql(
        f"select stage, step::int as step, avg(reward) from read_parquet('{pattern}', hive_partitioning=true) "
        "where stage = 'stage2' group by all order by step"
    ).fetchall()
    assert found == [("stage2", step, 0.5) for step in range(12)]
