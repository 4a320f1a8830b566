"""What `make` does for every box, shown on one that only this file knows: a row, a function, and a task."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from crash.damage import flip
from rollout_runs import make_run, publish, step_table

from kdrl_core.boxes import make as make_module
from kdrl_core.boxes.make import Box, Product, box, make, read_progress, timed
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Run, manifest_of, verify_own
from kdrl_core.ledger.graph import ARTIFACTS, ROLLOUTS, Artifact
from kdrl_core.tables.files import read_table
from tasks.boxes import making, stage_task

WORDS = Artifact(
    name="words",
    pattern="rollouts/stage={stage}/step={step:06d}/words.parquet",
    needs=lambda recipe, node: ((ROLLOUTS.node(node.stage, node.at),),),
)


@box(WORDS, rollouts=["prompt_id", "response"])
def count_words(session: Any, at: int, rollouts: pa.Table) -> pa.Table:
    """Words of each response."""
    session.calls.append((at, rollouts.column_names))
    counts = pc.list_value_length(pc.utf8_split_whitespace(rollouts["response"]))
    return pa.table({"prompt_id": rollouts["prompt_id"], "words": counts})


@dataclass
class Session:
    """What a box works with: here nothing but the run and the stage."""

    run: Run
    stage: str = "stage2"
    calls: list[tuple[int, list[str]]] = field(default_factory=list)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setitem(ARTIFACTS, WORDS.name, WORDS)
    return Session(make_run(tmp_path, steps=2))


def test_a_row_and_a_function_are_an_artifact_with_its_lineage(session: Session) -> None:
    made = make(session, count_words, 1)
    assert made.path == session.run.paths.step("stage2", 1) / "words.parquet"
    assert read_table(made.path)["words"].to_pylist() == [5] * 6  # "step 1 q-a number 0" …
    source = session.run.paths.rollouts("stage2", 1)
    assert made.manifest == verify_own(session.run, made.path)
    assert made.manifest.inputs == {session.run.paths.relative(source): manifest_of(source).sha256}
    assert list(made.manifest.metadata) == ["seconds"]
    assert session.calls == [(1, ["prompt_id", "response"])]


def test_what_is_published_is_found(session: Session) -> None:
    first = make(session, count_words, 0)
    again = make(session, count_words, 0)
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    assert len(session.calls) == 1


def test_what_is_damaged_is_made_again(session: Session) -> None:
    path = make(session, count_words, 0).path
    content = path.read_bytes()
    flip(path)
    assert not make(session, count_words, 0).reused
    assert path.read_bytes() == content
    assert not list(path.parent.glob(".damaged-*"))


def test_what_comes_out_otherwise_is_refused(session: Session) -> None:
    path = make(session, count_words, 0).path
    flip(path)
    other = Box(row=WORDS, function=lambda session, at, rollouts: pa.table({"words": [0]}))
    with pytest.raises(DamagedArtifactError, match=r"words\.parquet was made again and came out otherwise"):
        make(session, other, 0)
    assert not path.exists()


def test_a_table_of_another_schema_than_the_rows_is_not_published(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = replace(WORDS, schemas=("REWARDS", "REFERENCE"))
    monkeypatch.setitem(ARTIFACTS, WORDS.name, held)
    with pytest.raises(TypeError, match="words: the box made a table of another schema than REWARDS or REFERENCE"):
        make(session, replace(count_words, row=held), 0)
    assert not (session.run.paths.step("stage2", 0) / "words.parquet").exists()


def test_altered_inputs_are_refused(session: Session) -> None:
    flip(session.run.paths.rollouts("stage2", 0))
    with pytest.raises(DamagedArtifactError, match=r"rollouts\.parquet is damaged"):
        make(session, count_words, 0)
    with pytest.raises(RunError, match=r"rollouts\.parquet is not published"):
        make(session, count_words, 7)
    assert session.calls == []


def test_other_inputs_make_another(session: Session) -> None:
    made = make(session, count_words, 0)
    publish(session.run, "stage2", 0, "rollouts", step_table("rollouts", 0, response=["one two"] * 6))
    again = make(session, count_words, 0)
    assert not again.reused
    assert read_table(made.path)["words"].to_pylist() == [2] * 6
    assert again.manifest.inputs != made.manifest.inputs


def test_each_input_is_parsed_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def noted(path: Path, columns: list[str] | None = None) -> pa.Table:
        parsed.append(path.name)
        return read_table(path, columns)

    monkeypatch.setattr(make_module, "read_table", noted)
    make(session, count_words, 0)
    make(session, count_words, 0)
    assert parsed == ["rollouts.parquet"]


def test_a_folder_a_default_and_facts_of_its_own(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Artifact(name="notes", pattern="notes/{stage}/{step:06d}", needs=WORDS.needs)
    monkeypatch.setitem(ARTIFACTS, folder.name, folder)

    @box(folder, phase="note")
    def note(session: Session, manifests: Any, rollouts: pa.Table, teacher: pa.Table | None = None) -> Product:
        assert teacher is None  # the row does not need it
        assert [node.name for node in manifests] == ["rollouts"]
        return Product(content=lambda path: (path / "rows.txt").write_text(str(len(rollouts))), facts=timed(rows=6))

    made = make(session, note, 1)
    assert (made.path / "rows.txt").read_text() == "6"
    assert made.manifest.metadata["rows"] == 6
    progress = read_progress(session.run.paths)
    assert progress is None or (progress["stage"], progress["step"], progress["phase"]) == ("stage2", 1, "note")


def test_the_factory_makes_a_task_of_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.boxes.stage_session", lambda run_dir, stage: session)
    task = stage_task("count-words", making(count_words), retries=1)
    assert (task.name, task.task_run_name, task.retries) == ("count-words", "{stage}-{at:06d}-count-words", 1)
    path = session.run.paths.step("stage2", 1) / "words.parquet"
    assert task.fn(str(session.run.paths.root), "stage2", 1) == str(path)
    assert verify_own(session.run, path).inputs
