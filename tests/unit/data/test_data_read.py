"""Reading: every format, and for every kind of bad input one line that names file, row, field and remedy."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdrl_core.config import DataConfig
from kdrl_core.data import PROBLEM_SCHEMA, SKYWORK_SCHEMA, malformed_rows, read_problems
from kdrl_core.data import files as files_module
from kdrl_core.errors import DataError

SMALL, LARGE, MIDDLE = (f"DeepSeek-R1-Distill-Qwen-{size}" for size in ("1.5B", "32B", "7B"))
SUFFIX = " Let's think step by step and output the final answer within \\boxed{}."


def read(*files: Path | str, **options: Any) -> pa.Table:
    if options.get("on_error") == "drop":
        options = {"max_malformed_share": 1.0, **options}
    return read_problems(DataConfig(files=[str(file) for file in files], **options))


def error_of(*files: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*files, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def skywork_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "data_source": "train-math-deepscaler",
        "prompt": [{"content": "What is 1+1?", "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": '["2"]', "style": "rule"},
        "extra_info": {"index": 0, "model_difficulty": {SMALL: 16, LARGE: 0, MIDDLE: 3}},
    }
    return row | changes


def skywork(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, SKYWORK_SCHEMA), path)
    return path


def test_problems_lines(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "problem": " One?\n", "answer": "1", "source": "mine", "failures": {"m": 3, "n": None}},
        {"id": 7, "problem": "Two\u2028?", "answer": " 2 ", "failures": {"k": 16}, "extra": [1]},
        {"problem": "Three?", "answer": "3", "source": "", "failures": None},
    ]
    table = read(lines(tmp_path / "mine.jsonl", rows))
    assert table.schema.equals(PROBLEM_SCHEMA)
    assert table.column("failures").to_pylist() == [[("m", 3)], [("k", 16)], None]
    assert table["problem_id"].to_pylist()[:2] == ["a", "7"]
    assert table["problem_id"][2].as_py().startswith("q-")
    assert table["question"].to_pylist() == ["One?", "Two\u2028?", "Three?"]
    assert table["answer"].to_pylist() == ["1", "2", "3"]
    assert table["source"].to_pylist() == ["mine", "mine.jsonl", "mine.jsonl"]
    assert malformed_rows(table) == 0


def test_ids_made_from_questions_do_not_depend_on_file_or_row(tmp_path: Path) -> None:
    one, two = {"problem": "One?", "answer": "1"}, {"problem": "Two  x", "answer": "2"}
    first = read(lines(tmp_path / "a.jsonl", [one, two]))["problem_id"].to_pylist()
    (tmp_path / "b.json").write_text(json.dumps([two | {"problem": "Two\nx", "solution": "s"}, one]))
    second = read(tmp_path / "b.json")["problem_id"].to_pylist()
    assert first == second[::-1]
    assert len(set(first)) == 2
    accents = [{"problem": text, "answer": "1"} for text in ("caf\u00e9", "cafe\u0301 ")]
    ids = read(lines(tmp_path / "c.jsonl", accents))["problem_id"].to_pylist()
    assert ids == ["q-" + hashlib.sha256("caf\u00e9".encode()).hexdigest()[:16]] * 2


def test_deepscaler_json_array_lines_and_parquet(tmp_path: Path) -> None:
    rows = [{"problem": f"Q{i}", "answer": str(i), "solution": "s"} for i in range(3)]
    (tmp_path / "d.json").write_text("\ufeff" + json.dumps(rows, indent=1))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    lines(tmp_path / "d.jsonl", [rows[0], "", *rows[1:]])
    tables = [
        read(tmp_path / name, format=f) for name in ("d.json", "d.parquet", "d.jsonl") for f in ("auto", "deepscaler")
    ]
    assert all(table["question"].to_pylist() == ["Q0", "Q1", "Q2"] for table in tables)
    assert len({tuple(table["problem_id"].to_pylist()) for table in tables}) == 1


def test_skywork_rows_with_suffix_nulls_and_missing_labels(tmp_path: Path) -> None:
    rows = [
        skywork_row(),
        skywork_row(prompt=[{"content": f"Suffixed?{SUFFIX}", "role": "user"}]),
        skywork_row(
            prompt=[
                {
                    "content": "Zero?\nPlease reason step by step, and put your final answer within \\boxed{}.",
                    "role": "user",
                }
            ],
            reward_model={"ground_truth": '["\\\\frac{1}{2}"]', "style": None},
        ),
        skywork_row(
            prompt=[{"content": f"In the{SUFFIX} middle", "role": "user"}],
            extra_info={"index": None, "model_difficulty": {SMALL: None, LARGE: 2, MIDDLE: 4}},
            data_source=None,
        ),
        skywork_row(
            prompt=[{"content": "No labels", "role": "user"}], extra_info={"index": 1, "model_difficulty": None}
        ),
        skywork_row(prompt=[{"content": "No extra", "role": "user"}], extra_info=None, ability=None),
    ]
    table = read(skywork(tmp_path / "s.parquet", rows))
    assert table["question"].to_pylist() == [
        *("What is 1+1?", "Suffixed?", "Zero?", f"In the{SUFFIX} middle", "No labels", "No extra")
    ]
    assert table["answer"].to_pylist() == ["2", "2", "\\frac{1}{2}", "2", "2", "2"]
    assert table["failures"].to_pylist() == [
        *([(SMALL, 16), (LARGE, 0), (MIDDLE, 3)] for _ in range(3)),
        [(LARGE, 2), (MIDDLE, 4)],
        None,
        None,
    ]
    assert table["source"].to_pylist() == [*["train-math-deepscaler"] * 3, "s.parquet", *["train-math-deepscaler"] * 2]


def test_skywork_from_sliced_and_large_arrow_types(tmp_path: Path) -> None:
    """Row groups, large types and floats with gaps (what pandas writes) read the same."""
    rows = [skywork_row(prompt=[{"role": "user", "content": f"Q{i}"}]) for i in range(10)]
    table = pa.Table.from_pylist(rows, SKYWORK_SCHEMA)
    message = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    difficulty = pa.struct([(SMALL, pa.float64())])
    large = pa.schema(
        [
            ("prompt", pa.large_list(message)),
            ("reward_model", pa.struct([("ground_truth", pa.large_string())])),
            ("extra_info", pa.struct([("model_difficulty", difficulty)])),
        ]
    )
    wide = pa.Table.from_pylist(
        [{**row, "extra_info": {"model_difficulty": {SMALL: None if i == 3 else 16.0}}} for i, row in enumerate(rows)],
        large,
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(wide.slice(2, 5), tmp_path / "b.parquet")
    assert read(tmp_path / "a.parquet")["question"].to_pylist() == [f"Q{i}" for i in range(10)]
    second = read(tmp_path / "b.parquet")
    assert second["question"].to_pylist() == [f"Q{i}" for i in range(2, 7)]
    assert second["failures"].to_pylist() == [[(SMALL, 16)], None, *[[(SMALL, 16)]] * 3]


@pytest.mark.parametrize(
    ("texts", "bad"),
    [
        ([r'["\\frac{1}{2}"]', '["a], [b"]', r'["a\"b"]'], []),
        (['["a"], ["b', r'["c"]'], [1]),
        (['[["x", 2]]', '["a"], ["b"]', r'["\u0041"]'], [1, 2]),
        (['["a"], "', '["a\n', '["b"]'], [1, 2]),
    ],
)
def test_ground_truths_are_read_one_by_one(tmp_path: Path, texts: list[str], bad: list[int]) -> None:
    """They are decoded together: no text may be completed by its neighbour."""
    truths = [skywork_row(prompt=[{"content": f"p{i}", "role": "user"}]) for i in range(len(texts))]
    for row, text in zip(truths, texts, strict=True):
        row["reward_model"] = {"ground_truth": text, "style": "rule"}
    file = skywork(tmp_path / "s.parquet", truths)
    problems = read(file, on_error="drop")
    assert malformed_rows(problems) == len(bad)
    right = [text for row, text in enumerate(texts, start=1) if row not in bad]
    assert problems["answer"].to_pylist() == [json.loads(text)[0] for text in right]


def test_a_row_is_read_as_it_stands_whatever_its_neighbours_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "BATCH_ROWS", 4)
    usual = [{"id": f"a{i}", "problem": f"What is {i}?", "answer": str(i)} for i in range(9)]
    odd = [
        {"problem_id": "b1", "question": "Why?", "answer": "1"},
        {"problem_id": None, "id": "b2", "question": None, "problem": "How?", "answer": "2"},
        {"question": "Where?", "problem": "not this", "answer": "3"},
        {"question": "no answer"},
    ]
    found = []
    for place in (0, 3, 4, 9):
        file = lines(tmp_path / "p.jsonl", [*usual[:place], *odd, *usual[place:]])
        table = read(file, on_error="drop")
        assert malformed_rows(table) == 1
        found.append(sorted(table.select(["problem_id", "question", "answer"]).to_pylist(), key=str))
        fault = f"{file} row {place + 4}, field 'answer': missing; drop the row or set <stage>.data.on_error=drop"
        assert error_of(file) == fault
    assert found == [found[0]] * 4
    assert [row["problem_id"] for row in found[0] if row["problem_id"] < "c"] == [
        *[f"a{i}" for i in range(9)],
        "b1",
        "b2",
    ]
    assert [row["question"] for row in found[0]][-3:] == ["Why?", "How?", "Where?"]


BAD_SKYWORK = [
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": []}, "prompt", "0 messages without the system's, one is expected"),
    ({"prompt": [{"content": "a", "role": "user"}] * 2}, "prompt", "2 messages without the system's, one is expected"),
    ({"prompt": [{"content": "a", "role": "system"}]}, "prompt", "0 messages without the system's, one is expected"),
    ({"prompt": [{"content": "a", "role": "assistant"}]}, "prompt[0].role", "'assistant', 'user' is expected"),
    ({"prompt": [{"content": "a", "role": None}]}, "prompt[0].role", "None, 'user' is expected"),
    ({"prompt": [{"content": None, "role": "user"}]}, "prompt[0].content", "missing"),
    ({"prompt": [{"content": SUFFIX, "role": "user"}]}, "prompt", "empty"),
    ({"reward_model": None}, "reward_model.ground_truth", "missing"),
    ({"reward_model": {"ground_truth": None}}, "reward_model.ground_truth", "missing"),
    ({"reward_model": {"ground_truth": '[""]'}}, "reward_model.ground_truth", "empty"),
    *(
        ({"reward_model": {"ground_truth": text}}, "reward_model.ground_truth", problem)
        for text, problem in {
            '["a", "b"]': "2 answers ('a', 'b'); a list may mean any of them or all of them: leave one, or write them "
            "as one text",
            "[]": "an empty list; one answer is expected",
            '["a': """'["a' begins like JSON but is not; write ["204"] or 204""",
            '{"a": 1}': "text is expected, found JSON of an object ({'a': 1})",
            "[null]": "text is expected, found null",
            '["\\ud800"]': "holds half of a surrogate pair, which is not Unicode text",
        }.items()
    ),
    *(
        (
            {"extra_info": {"index": 0, "model_difficulty": {MIDDLE: count}}},
            f"extra_info.model_difficulty.{MIDDLE}",
            f"{count} is outside 0..16",
        )
        for count in (17, -1)
    ),
]


@pytest.mark.parametrize(("changes", "field", "problem"), BAD_SKYWORK)
def test_malformed_skywork_rows(tmp_path: Path, changes: dict[str, Any], field: str, problem: str) -> None:
    path = skywork(tmp_path / "s.parquet", [skywork_row(), skywork_row(**changes), skywork_row()])
    assert error_of(path) == (
        f"{path} row 2, field '{field}': {problem}; drop the row or set <stage>.data.on_error=drop"
    )
    table = read(path, on_error="drop")
    assert (table.num_rows, malformed_rows(table)) == (2, 1)


BAD_ROWS = [
    ({"problem": "Q"}, "answer", "missing"),
    ({"problem": "Q", "answer": None}, "answer", "missing"),
    ({"problem": "Q", "answer": " \n"}, "answer", "empty"),
    ({"problem": "Q", "answer": True}, "answer", "text is expected, found true/false (True)"),
    ({"problem": "Q", "answer": {"a": 5}}, "answer", "text is expected, found an object ({'a': 5})"),
    ({"problem": "Q", "answer": []}, "answer", "an empty list; one answer is expected"),
    ({"problem": "", "answer": "5"}, "problem", "empty"),
    ({"problem": True, "answer": "5"}, "problem", "text or a list of messages is expected, found true/false (True)"),
    ({"problem": "\ud800", "answer": "5"}, "problem", "holds half of a surrogate pair, which is not Unicode text"),
    (
        {"problem": "Q", "answer": "5", "failures": 3},
        "failures",
        "an object of label: failures is expected, found a number (3)",
    ),
    ({"problem": "Q", "answer": "5", "failures": {"m": 17}}, "failures.m", "17 is outside 0..16"),
    ({"problem": "Q", "answer": "5", "failures": {"m": 1.5}}, "failures.m", "1.5 is not a whole number of failures"),
    ({"problem": "Q", "answer": "5", "failures": {"m": True}}, "failures.m", "True is not a whole number of failures"),
    (
        {"problem": "Q", "answer": "5", "failures": {"m": 10**30}},
        "failures.m",
        f"{10**30} is not a whole number of failures",
    ),
    ({"problem": "Q", "answer": "5", "source": 3}, "source", "text is expected, found a number (3)"),
    ([1], "row", "an object is expected, found a list ([1])"),
    ("{", "row", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
]


@pytest.mark.parametrize(("bad", "field", "problem"), BAD_ROWS)
def test_malformed_json_rows(tmp_path: Path, bad: Any, field: str, problem: str) -> None:
    good = {"problem": "Good", "answer": "1"}
    path = lines(tmp_path / "p.jsonl", [good, "", bad, good])
    assert error_of(path) == f"{path} row 3, field '{field}': {problem}; drop the row or set <stage>.data.on_error=drop"
    table = read(path, on_error="drop")
    assert (table.num_rows, malformed_rows(table)) == (2, 1)


def test_the_first_bad_row_is_named_with_its_number_beyond_the_first_batch(tmp_path: Path) -> None:
    answers = ["1"] * 70_000
    answers[66_000] = answers[69_999] = ""
    pq.write_table(pa.table({"problem": [f"q{i}" for i in range(70_000)], "answer": answers}), tmp_path / "p.parquet")
    assert " row 66001, field 'answer': empty; " in error_of(tmp_path / "p.parquet")
    assert malformed_rows(read(tmp_path / "p.parquet", on_error="drop")) == 2


def test_labels_in_parquet_as_struct_or_map_and_their_bounds(tmp_path: Path) -> None:
    base = {"problem": ["a", "b"], "answer": ["1", "2"]}
    map_type = pa.map_(pa.string(), pa.int64())
    for name, failures in {
        "struct": pa.array([{"m": 1}, {"m": None}]),
        "map": pa.array([[("m", 1)], []], map_type),
    }.items():
        pq.write_table(pa.table({**base, "failures": failures}), tmp_path / f"{name}.parquet")
        assert read(tmp_path / f"{name}.parquet")["failures"].to_pylist() == [[("m", 1)], None]
    pq.write_table(pa.table({**base, "failures": pa.array([{"m": 0.5}, {"m": 9.0}])}), tmp_path / "f.parquet")
    assert "row 1, field 'failures.m': 0.5 is not a whole number" in error_of(tmp_path / "f.parquet")
    pq.write_table(pa.table({**base, "failures": pa.array([[("m", 9)], []], map_type)}), tmp_path / "n.parquet")
    assert "row 1, field 'failures.m': 9 is outside 0..8" in error_of(
        tmp_path / "n.parquet", difficulty={"student": "m", "others": [], "num_samples": 8}
    )


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "bad.json").write_text('[{"problem": "a",')
    (tmp_path / "object.json").write_text('{\n"problem": "a"\n}')
    (tmp_path / "wrapped.json").write_text('{"data": []}')
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é"}'.encode("latin-1"))
    (tmp_path / "p.txt").write_text("problem,answer\n")
    (tmp_path / "folder").mkdir()
    lines(tmp_path / "cols.jsonl", [{"text": "a", "answer": "1"}])
    pq.write_table(pa.table({"problem": ["a"], "answer": [b"1"]}), tmp_path / "types.parquet")
    pq.write_table(pa.table({"prompt": ["a"], "reward_model": ["b"]}), tmp_path / "flat.parquet")
    whole = skywork(tmp_path / "whole.parquet", [skywork_row()] * 50).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])

    assert error_of("absent.jsonl").startswith("data.files: absent.jsonl does not exist (looked at ")
    assert error_of("*.arrow") == "data.files: *.arrow matches no file; check the folder and the pattern"
    assert error_of("folder") == "data.files: folder is a folder; name its files, e.g. folder/*.parquet"
    for name in ("text.parquet", "empty.parquet", "cut.parquet"):
        assert error_of(name).startswith(f"{name}: cannot be read as Parquet (")
    assert error_of("bad.json").startswith("bad.json: not JSON (Expecting property name")
    assert error_of("object.json").startswith("object.json: not JSON (")
    assert error_of("wrapped.json").startswith("wrapped.json: columns data are of no known format; needed: problem")
    assert error_of("latin.jsonl").startswith("latin.jsonl: not UTF-8 text (")
    assert error_of("p.txt") == (
        "p.txt: unknown kind of file; give .parquet, .arrow, .json, .jsonl, .csv or .tsv (text also as .gz)"
    )
    assert error_of("cols.jsonl").startswith("cols.jsonl: columns answer, text are of no known format; ")
    assert error_of("cols.jsonl", format="problems") == (
        "cols.jsonl: no column 'problem', which format problems needs (found: answer, text); "
        "rename the columns, set <stage>.data.format, or name them in <stage>.data.columns"
    )
    assert error_of("types.parquet", format="skywork").startswith(
        "types.parquet: no column 'prompt' and no column 'rew"
    )
    assert error_of("types.parquet") == (
        "types.parquet: column 'answer' has type binary, text is expected; "
        "convert the column or set <stage>.data.format"
    )
    assert error_of("flat.parquet") == (
        "flat.parquet: column 'reward_model' has type string, a struct with 'ground_truth' is expected; "
        "convert the column or set <stage>.data.format"
    )


def test_globs_are_expanded_in_order_and_empty_files_are_empty(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b", "a", "sub/c"):
        lines(tmp_path / f"{name}.jsonl", [{"id": name, "problem": f"Q{name}", "answer": "1"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "none.json").write_text("[]")
    pattern = f"{tmp_path}/**/*.jsonl"
    assert read(pattern, tmp_path / "none.json")["problem_id"].to_pylist() == ["a", "b", "sub/c"]
    assert read(tmp_path / "none.json").num_rows == 0


def test_import_stays_light() -> None:
    code = "import sys, kdrl_core.data; print({'torch', 'transformers', 'prefect'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_whole_numbers_are_answers(tmp_path: Path) -> None:
    rows = [{"problem": "What is 40 + 2?", "answer": 42}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for file in (lines(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet"):
        assert read(file)["answer"].to_pylist() == ["42"]
