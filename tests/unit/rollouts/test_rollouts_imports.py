"""Dumps of verl and TRL become runs that everything works on; what is wrong with one is told with file and line."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdrl_core.config.paths import ASSETS
from kdrl_core.errors import DataError, ModelError
from kdrl_core.ledger import verify_published
from kdrl_core.look.rollouts.diff import compare
from kdrl_core.look.rollouts.files import IMPORTED, export_rollouts, import_dump
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.rollouts.record import RECORD


def verl_line(at: int, number: int, **changed: Any) -> dict[str, Any]:
    """As verl's trainer dumps it: input, output, gts, score, step, then what the reward function returned beside."""
    return {
        "input": f"user\nWhat is {number % 2}?\nassistant\n",
        "output": f"It is {number}.",
        "gts": "7",
        "score": float(number % 3 == 0),
        "step": at,
        "acc": number % 3 == 0,
        "pred": str(number),
        "format_score": 0.5,
    } | changed


def write_verl(folder: Path, steps: range = range(1, 13)) -> Path:
    folder.mkdir()
    for step in steps:
        lines = [json.dumps(verl_line(step, number), ensure_ascii=False) for number in range(4)]
        (folder / f"{step}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_trl(folder: Path, steps: range = range(5, 8)) -> Path:
    """As TRL's GRPOTrainer writes its table with pandas."""
    folder.mkdir()
    for step in steps:
        frame = pd.DataFrame(
            {
                "step": [step] * 4,
                "prompt": ["What is a?", "What is a?", "What is b?", "What is b?"],
                "completion": [f"It is {number}." for number in range(4)],
                "accuracy_reward": [1.0, 0.0, None, 0.0],
                "format_reward": [0.5, 0.5, 0.0, 0.5],
                "solution": ["7"] * 4,
                "advantage": [0.7, -0.7, 0.0, 0.0],
            }
        )
        frame.to_parquet(folder / f"completions_{step:05d}.parquet")
    return folder


def test_verl(tmp_path: Path, artifacts: Path) -> None:
    source = write_verl(tmp_path / "dump")
    told: list[tuple[int, int]] = []
    made = import_dump(source, "verl", artifacts / "runs" / "theirs", on_file=lambda *both: told.append(both))
    assert (made.num_steps, made.num_rollouts, made.reward_columns) == (12, 48, ["score"])
    assert told[-1] == (12, 12)
    with RolloutStore.open(["theirs"]) as store:
        assert store.damaged == []
        assert [row["step"] for row in store.steps()] == [*range(1, 13)]  # 10 after 9
        assert (store.steps()[0]["reward_mean"], store.steps()[0]["verdict_correct"]) == (0.5, 0.5)
        row = store.page(RolloutFilter(text="it is 3", step_max=1)).rows[0]
        record = store.record(**{name: row[name] for name in ("run", "stage", "step", "prompt_id", "sample")})
        assert record["prompt"] == "user\nWhat is 1?\nassistant\n"
        assert (record["response"], record["ground_truth"], record["extracted"]) == ("It is 3.", "7", "3")
        assert (record["reward"], record["accuracy_reward"], record["verdict"]) == (1.0, 1.0, "correct")
        assert (record["reason"], record["sample"]) == ("format_score 0.5", 1)
        for name in ("token_ids", "length", "logprobs", "teacher_logprobs", "kl_mean", "seed", "rollout_s", "tokens"):
            assert record[name] is None
        assert len(store.prompt_history(run="theirs", prompt_id=row["prompt_id"])) == 12


def test_trl(tmp_path: Path, artifacts: Path) -> None:
    made = import_dump(write_trl(tmp_path / "completions"), "trl", artifacts / "runs" / "theirs")
    assert (made.num_steps, made.num_rollouts) == (3, 12)
    assert made.reward_columns == ["accuracy_reward", "format_reward"]
    with RolloutStore.open(["theirs"]) as store:
        rows = store.page(RolloutFilter(step_max=5), sort="prompt_id").rows
        assert sorted(row["reward"] for row in rows) == [0.0, 0.5, 0.5, 1.5]  # a reward function that has none counts 0
        assert len({(row["prompt_id"], row["sample"]) for row in rows}) == 4
        assert sorted(row["advantage"] for row in rows) == pytest.approx([-0.7, 0.0, 0.0, 0.7])
        assert rows[0]["verdict"] is None
        assert "solution 7" in rows[0]["reason"]
        assert store.steps()[0]["verdict_correct"] is None


@pytest.mark.parametrize("kind", ["verl", "trl"])
def test_everything_works_on_an_imported_run(tmp_path: Path, artifacts: Path, kind: str) -> None:
    write = {"verl": write_verl, "trl": write_trl}[kind]
    target = artifacts / "runs" / "theirs"
    import_dump(write(tmp_path / "dump"), kind, target)
    with RolloutStore.open(["theirs"]) as store:
        total = store.page().total
        key = {name: store.page().rows[0][name] for name in ("run", "stage", "step", "prompt_id")}
        assert len(store.group(**key)) == 2
        counted = store.sql("select count(response) n, count(length) l from rollouts").to_pylist()
        assert counted == [{"n": total, "l": 0}]
        assert store.sql("select count(*) n from prompts").to_pylist() == [{"n": 2}]
        first, last = store.steps()[0]["step"], store.steps()[-1]["step"]
        sides = [RolloutFilter(step_min=step, step_max=step) for step in (first, last)]
        found = compare(store, sides[0], sides[1], ("a", "b"))
        assert (found.counts["common"], found.counts["same"]) == (2, 2)
        assert found.before.length_mean is None
        assert export_rollouts(store, RolloutFilter(), tmp_path / "x.parquet") == total
    assert pq.read_schema(tmp_path / "x.parquet").equals(RECORD)
    files = sorted(target.rglob("rollouts.parquet"))
    assert pq.read_schema(files[0]).names == IMPORTED.names
    for file in files:
        verify_published(file)
    assert json.loads((target / "import.json").read_text())["from"] == kind


def test_with_a_tokenizer_lengths_are_known(tmp_path: Path) -> None:
    folder = ASSETS / "miniature" / "student"
    import_dump(write_trl(tmp_path / "dump"), "trl", tmp_path / "theirs", tokenizer=folder)
    with RolloutStore.open([tmp_path / "theirs"]) as store:
        lengths = [len(ids) for ids in store.sql("select token_ids from rollouts")["token_ids"].to_pylist()]
        assert store.steps()[0]["length_mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert sum(lengths) > 0
    with pytest.raises(ModelError, match=r"has no usable tokenizer\.json"):
        import_dump(write_trl(tmp_path / "again"), "trl", tmp_path / "other", tokenizer=tmp_path)
    assert not (tmp_path / "other").exists()


BAD_LINES = {
    "no json": ("{", r"2\.jsonl line 2: not JSON"),
    "no object": ("[1]", r"2\.jsonl line 2: not a JSON object"),
    "no prompt": (json.dumps({"output": "x", "score": 1.0, "step": 2}), "field 'input' is missing or not text"),
    "no step": (json.dumps(verl_line(2, 0, step="two")), "field 'step' is 'two'"),
    "negative step": (json.dumps(verl_line(2, 0, step=-1)), "field 'step' is -1"),
    "no score": (json.dumps(verl_line(2, 0, score="high")), "field 'score' is 'high'; a number is expected"),
    "deep": ("[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    line, told = BAD_LINES[case]
    source = write_verl(tmp_path / "dump", range(1, 3))
    (source / "2.jsonl").write_text(json.dumps(verl_line(2, 0)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=told):
        import_dump(source, "verl", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]


def test_what_cannot_be_imported_is_told(tmp_path: Path) -> None:
    source = write_verl(tmp_path / "dump", range(1, 3))
    for given, kind, told in (
        (tmp_path / "nowhere", "verl", "no such file or folder"),
        (source, "trl", r"has no dump of trl: files are called completions_<step>\.parquet"),
        (source / "1.jsonl", "trl", "cannot be read as Parquet"),
    ):
        with pytest.raises(DataError, match=told):
            import_dump(given, kind, tmp_path / "theirs")
    (source / "copy").mkdir()
    (source / "copy" / "1.jsonl").write_text((source / "1.jsonl").read_text())
    with pytest.raises(DataError, match="step 1 is in an earlier file as well"):
        import_dump(source, "verl", tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    with pytest.raises(DataError, match="exists; give a new name"):
        import_dump(source, "verl", tmp_path / "theirs")


def test_odd_but_right_dumps(tmp_path: Path) -> None:
    source = tmp_path / "dump"
    source.mkdir()
    lines = [
        verl_line(1, 0, score=None, acc=None, pred=None, gts=["7", "8"], step="1"),
        verl_line(1, 1, output="\ud800 half \x00", extra={"a": [1]}),
        {"input": [{"role": "user", "content": "x"}], "output": "y", "score": 1, "step": 1},
    ]
    (source / "1.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    import_dump(source, "verl", tmp_path / "theirs")
    with RolloutStore.open([tmp_path / "theirs"]) as store:
        rows = store.sql("select prompt, response, ground_truth, reward, reason from rollouts").to_pylist()
    by_response = {row["response"]: row for row in rows}
    assert by_response["It is 0."]["ground_truth"] == '["7", "8"]'
    assert by_response["It is 0."]["reward"] is None
    assert by_response["y"]["prompt"] == "user: x"
    assert by_response["? half \x00"]["reason"] == 'format_score 0.5, extra {"a": [1]}'


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("score", "1" + "0" * 400, "'score' is 1000.*…; a number up to 3.4e38"),
        ("score", "NaN", "'score' is nan; a number up to"),
        ("score", "1e999", "'score' is inf; a number up to"),
        ("score", "-1e300", "'score' is -1e\\+300; a number up to"),
        ("score", "[1]", r"'score' is \[1\]; a number is expected"),
        ("acc", "1" + "0" * 400, "'acc' is 1000"),
        ("step", "1" + "0" * 25, "'step' is 10000000000000000000000000; a whole number from 0 to 999,999,999"),
        ("step", '"' + "1" * 5000 + '"', "'step' is '1111.*…; a whole number"),
        ("step", "1e25", r"'step' is 1e\+25; a whole number"),
        ("step", "-1", "'step' is -1; a whole number"),
        ("score", "1" * 5000, "not JSON"),
    ],
)
def test_numbers_that_no_column_holds_are_told(tmp_path: Path, field: str, value: str, told: str) -> None:
    (tmp_path / "7.jsonl").write_text(f'{{"input": "a", "output": "b", "score": 1, "step": 1, "{field}": {value}}}\n')
    with pytest.raises(DataError, match=told) as raised:
        import_dump(tmp_path, "verl", tmp_path / "run")
    assert "7.jsonl line 1" in str(raised.value)
    assert len(str(raised.value)) < 400
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    source = write_trl(tmp_path / "dump", range(5, 6))
    (file,) = source.iterdir()
    table = pq.read_table(file)
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pa.py_buffer(b"\xff")]
    )
    place = table.column_names.index("completion")
    pq.write_table(table.slice(0, 1).set_column(place, "completion", bad), file)
    with pytest.raises(DataError, match=r"completions_00005\.parquet has a value that cannot be read \(.*utf-8"):
        import_dump(source, "trl", tmp_path / "theirs")
