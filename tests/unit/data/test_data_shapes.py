r"""The shapes of docs/data.md: each published set's own columns, in each kind of file, give the same problem."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdrl_core.config import BenchmarkConfig, ColumnsConfig, DataConfig
from kdrl_core.config.shapes import FORMATS, Shape
from kdrl_core.data import Reading, malformed_rows, read_problems
from kdrl_core.data import shapes as data_shapes
from kdrl_core.data.benchmarks import load_benchmark
from kdrl_core.data.fitting import require_fitting
from kdrl_core.data.shapes import file_shape
from kdrl_core.errors import DataError, RecipeError

Row = dict[str, Any]


def read(*files: Path | str, **options: Any) -> pa.Table:
    return read_problems(DataConfig(files=[str(file) for file in files], **options))


def error_of(*files: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*files, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def asked(text: str, *, system: str | None = None) -> list[Row]:
    own = [] if system is None else [{"role": "system", "content": system}]
    return [*own, {"role": "user", "content": text}]


Q = "What is 6 times 7?"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    f"$Answer (without quotes) where $Answer is the answer to the problem.\n\n{Q}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
VERL = {"data_source": "s", "prompt": asked(Q), "ability": "math", "extra_info": {"index": 0, "split": "train"}}
ROWS: dict[str, Row] = {
    "verl, plain truth": {**VERL, "reward_model": {"ground_truth": "42", "style": "rule"}},
    "verl, whole number": {**VERL, "reward_model": {"ground_truth": 42, "style": "rule"}},
    "verl, decimal": {**VERL, "reward_model": {"ground_truth": 42.0, "style": "rule"}},
    "verl, list": {**VERL, "reward_model": {"ground_truth": ["42"], "style": "rule"}},
    "verl, JSON list": {**VERL, "reward_model": {"ground_truth": '["42"]', "style": "rule"}},
    "verl, JSON list of a number": {**VERL, "reward_model": {"ground_truth": "[42]", "style": "rule"}},
    "verl, system message": {**VERL, "prompt": asked(Q, system="Be brief."), "reward_model": {"ground_truth": "42"}},
    "verl, text": {**VERL, "prompt": Q, "reward_model": {"ground_truth": "42"}},
    "verl, GSM8K": {
        **VERL,
        "prompt": asked(f'{Q} Let\'s think step by step and output the final answer after "####".'),
        "reward_model": {"ground_truth": "42", "style": "rule"},
    },
    "DAPO-Math-17k": {**VERL, "prompt": asked(DAPO), "reward_model": {"ground_truth": "42", "style": "rule"}},
    "slime, text": {"prompt": Q, "label": "42"},
    "slime, messages": {"prompt": asked(Q), "label": "42", "metadata": {"a": 1}},
    "DeepScaleR, answer as a list": {"problem": Q, "answer": ["42"], "solution": "s"},
    "whole number": {"problem": Q, "answer": 42},
    "whole decimal": {"problem": Q, "answer": 42.0},
    "GSM8K": {"question": Q, "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
    "MATH": {"problem": Q, "level": "Level 1", "type": "Algebra", "solution": r"So $6\cdot 7=\boxed{42}$."},
    "NuminaMath-1.5": {
        "problem": Q, "solution": "s", "answer": "42", "problem_type": "Algebra", "question_type": "multiple choice",
        "source": "olympiads", "problem_is_valid": "Yes", "solution_is_valid": "Yes", "synthetic": False,
    },
    "OpenR1-Math": {
        "problem": Q, "solution": "s", "answer": "42", "problem_type": "Algebra", "source": "o", "uuid": "u",
        "generations": ["<think>…"], "correctness_math_verify": [True], "messages": asked(Q),
    },
    "Big-Math": {"problem": Q, "answer": "42", "source": "orca_math", "domain": ["A"], "llama8b_solve_rate": 0.8},
    "TRL, text": {"prompt": Q, "solution": "42"},
    "TRL, messages": {"prompt": asked(Q), "solution": r"$\boxed{42}$"},
    "prompt and answer": {"prompt": asked(Q), "answer": "42"},
    "messages as JSON": {"prompt": json.dumps(asked(Q)), "answer": "42"},
    "parts of text": {"prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}], "answer": "42"},
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_each_set_is_read_as_it_was_published(tmp_path: Path, row: Row) -> None:
    for file in (lines(tmp_path / "p.jsonl", [row, row]), parquet(tmp_path / "p.parquet", [row, row])):
        table = read(file)
        assert table["question"].to_pylist() == [Q, Q]
        assert table["answer"].to_pylist() == ["42", "42"]


def test_the_table_of_the_docs_is_true(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## What files may look like")[1].split("\n## ")[0]
    shown = re.findall(r"^\| (?:`(\w+)`[^|]*)?\| [^|]+ \| `(\{.*\})` \|$", section, flags=re.MULTILINE)
    assert len(shown) == section.count("| `{")
    name = ""
    for named, text in shown:
        name = named or name
        row = json.loads(text)
        table = read(lines(tmp_path / "p.jsonl", [row]))
        assert table.select(["question", "answer"]).to_pylist() == [{"question": "1+1?", "answer": "2"}]
        assert file_shape(row, DataConfig(files=["x"]), origin="docs").name == name
    assert {named for named, _ in shown} - {""} == {shape.name for shape in data_shapes.SHAPES}


def test_a_shape_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "p.jsonl", [{"aufgabe": "q", "meta": {"lösung": [7]}}])
    assert "of no known format" in error_of(file)
    row = Shape(name="german", question=("aufgabe",), answer=("meta.lösung",))
    monkeypatch.setattr(data_shapes, "SHAPES", (*data_shapes.SHAPES, row))
    monkeypatch.setitem(FORMATS, "german", row)
    assert read(file)["answer"].to_pylist() == read(file, format="german")["answer"].to_pylist() == ["7"]
    names = [shape.name for shape in data_shapes.SHAPES]
    assert len(set(names)) == len(names)


def test_truths_that_are_numbers_keep_their_digits(tmp_path: Path) -> None:
    """Pandas makes floats of integers where one row has a gap; single precision must not show."""
    for kind, values, expected in (
        (pa.float64(), [5.0, 5.5, 1e-05, 1e16, -3.0, 0.1], ["5", "5.5", "0.00001", "1" + "0" * 16, "-3", "0.1"]),
        (pa.float32(), [5.0, 5.1, -0.25], ["5", "5.1", "-0.25"]),
        (pa.int64(), [5, -7], ["5", "-7"]),
    ):
        table = pa.table({"problem": [f"q{i}" for i in values], "answer": pa.array(values, kind)})
        pq.write_table(table, tmp_path / "p.parquet")
        assert read(tmp_path / "p.parquet")["answer"].to_pylist() == expected
    large = lines(tmp_path / "l.jsonl", [{"problem": "q", "answer": 10**400}, {"problem": "r", "answer": 1e300}])
    assert read(large)["answer"].to_pylist() == [str(10**400), str(int(1e300))[:1] + "0" * 300]
    assert "row 1, field 'answer': inf is no number" in error_of(
        lines(tmp_path / "i.jsonl", [{"problem": "q", "answer": float("inf")}])
    )
    gap = pa.table({"problem": ["a", "b"], "answer": [5.0, float("nan")], "id": [1.0, 2.0]})
    pq.write_table(gap, tmp_path / "g.parquet")
    assert "row 2, field 'answer': missing" in error_of(tmp_path / "g.parquet")
    assert read(tmp_path / "g.parquet", on_error="drop", max_malformed_share=0.5)["problem_id"].to_pylist() == ["1"]


def test_an_interval_is_no_list_and_several_answers_are_none(tmp_path: Path) -> None:
    truths = ["[0, 1]", "(0, 1]", r"[0, \infty)", "{1, 2}", ["7", " 7 "]]
    rows = [{"problem": f"q{i}", "answer": truth} for i, truth in enumerate(truths)]
    assert read(lines(tmp_path / "p.jsonl", rows))["answer"].to_pylist() == [*truths[:-1], "7"]
    python = lines(tmp_path / "l.jsonl", [{"problem": "q", "answer": "['7']"}])
    assert """"['7']" begins like JSON but is not; write ["204"] or 204""" in error_of(python)
    several = lines(tmp_path / "s.jsonl", [{"problem": "q", "answer": ["1", "2"]}])
    assert "field 'answer': 2 answers ('1', '2'); a list may mean any of them or all of them" in error_of(several)


def test_a_solution_without_a_box_and_numina_without_an_answer(tmp_path: Path) -> None:
    rows = [
        {"problem": "q", "solution": r"\boxed{1}, hence \boxed{\frac{1}{2}}."},
        {"problem": "r", "solution": "By symmetry."},
        {"problem": "s", "solution": r"We get $\boxed 3$ and $x$."},
        {"problem": "t", "solution": r"\boxed{1}, hence \fbox{4}."},
    ]
    file = lines(tmp_path / "p.jsonl", rows)
    assert r"row 2, field 'solution': no \boxed{} in the solution, so no answer" in error_of(file)
    assert read(file, on_error="drop", max_malformed_share=0.5)["answer"].to_pylist() == [r"\frac{1}{2}", "3", "4"]
    known = {"problem": "p", "answer": "1"}
    numina = [known, {"problem": "q", "answer": "proof"}, {"problem": "r", "answer": "notfound"}]
    for file in (lines(tmp_path / "n.jsonl", numina), parquet(tmp_path / "n.parquet", numina)):
        table = read(file)  # neither malformed nor counted as such
        assert (table["question"].to_pylist(), malformed_rows(table)) == (["p"], 0)
        assert Reading.of(table).told() == [
            f"no_answer: 2 × {file} row 2, field 'answer': 'proof' stands for a problem without an answer"
        ]
        with pytest.raises(
            DataError, match=r"row 2, field 'answer': 'proof' stands for .*; fill it in or drop the row"
        ):
            load_benchmark(BenchmarkConfig(name="b", file=str(file)))


def test_csv_and_packed_files(tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerows([["problem", "answer", "id"], ["What is\n1, 2?", "3", "a"], ["π?", "", "b"]])
    message = "row 3, field 'answer': missing; drop the row or set <stage>.data.on_error=drop"
    assert error_of(tmp_path / "p.csv").endswith(message)
    dropped = read(tmp_path / "p.csv", on_error="drop", max_malformed_share=0.5)
    assert dropped.select(["problem_id", "question", "answer"]).to_pylist() == [
        {"problem_id": "a", "question": "What is\n1, 2?", "answer": "3"}
    ]
    rows = [{"problem": "q", "answer": "1"}]
    for name, content in {
        "p.csv.gz": "problem,answer\nq,1\n",
        "p.jsonl.gz": json.dumps(rows[0]),
        "p.json.gz": json.dumps(rows),
    }.items():
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert read(tmp_path / name)["question"].to_pylist() == ["q"]
    packed = (tmp_path / "p.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-9])
    assert "cut.jsonl.gz: cannot be unpacked (" in error_of(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(rows[0]))
    assert "plain.jsonl.gz: cannot be unpacked (" in error_of(tmp_path / "plain.jsonl.gz")
    (tmp_path / "wide.csv").write_text("problem,answer\nq,1,2\n")
    assert "wide.csv row 2, field 'row': 1 value beyond the 2 columns" in error_of(tmp_path / "wide.csv")
    # Semicolons or tabs, blank lines (which a spreadsheet counts), empty cells after the last column.
    (tmp_path / "own.csv").write_text('problem; answer ;;\n\n"a;b";1,5;;\n')
    (tmp_path / "own.tsv").write_text("problem\tanswer\n\na;b\t1,5\n")
    for name in ("own.csv", "own.tsv"):
        table = read(tmp_path / name)
        assert table.select(["question", "answer"]).to_pylist() == [{"question": "a;b", "answer": "1,5"}]
        assert Reading.of(table).place(0) == f"{tmp_path / name} row 3"
    (tmp_path / "twice.csv").write_text("problem,answer,answer\nq,1,2\n")
    assert "twice.csv has several columns 'answer'; rename them" in error_of(tmp_path / "twice.csv")
    (tmp_path / "open.csv").write_text('problem,answer\n"q,1\n')
    assert "open.csv line 2: not CSV (" in error_of(tmp_path / "open.csv")
    (tmp_path / "p.parquet.gz").write_bytes(b"")
    assert "p.parquet.gz: unknown kind of file" in error_of(tmp_path / "p.parquet.gz")


def test_folders_that_datasets_has_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([{"problem": f"q{i}", "answer": str(i)} for i in range(5)])
    whole.select([3, 1]).save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one")["question"].to_pylist() == ["q3", "q1"]
    splits = datasets.DatasetDict({"train": whole, "test": whole.select([0])})
    splits.save_to_disk(tmp_path / "both")
    assert error_of(tmp_path / "both") == (
        f"{tmp_path}/both: the set has 2 splits; name one of them: {tmp_path}/both/train, {tmp_path}/both/test"
    )
    assert read(tmp_path / "both" / "test")["question"].to_pylist() == ["q0"]
    datasets.DatasetDict({"train": whole}).save_to_disk(tmp_path / "single")
    assert read(tmp_path / "single").num_rows == 5
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "is missing, which state.json names; save or copy the set again" in error_of(tmp_path / "one")
    file = next((tmp_path / "single" / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read as Arrow (" in error_of(tmp_path / "single")


def test_folders_of_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number in range(2):
        parquet(folder / f"train-{number:05}-of-00002.parquet", [{"problem": f"q{number}", "answer": "1"}])
    assert read(tmp_path / "set")["question"].to_pylist() == ["q0", "q1"]
    parquet(folder / "test-00000-of-00001.parquet", [{"problem": "t", "answer": "1"}])
    patterns = f"{tmp_path}/set/data/test-*-of-*.parquet, {tmp_path}/set/data/train-*-of-*.parquet"
    assert error_of(tmp_path / "set") == f"{tmp_path}/set: the set has 2 splits; name one of them: {patterns}"
    assert read(f"{tmp_path}/set/data/train-*-of-*.parquet").num_rows == 2
    (tmp_path / "verl").mkdir()
    for name in ("train", "test"):
        parquet(tmp_path / "verl" / f"{name}.parquet", [{"problem": name, "answer": "1"}])
    patterns = f"{tmp_path}/verl/test.parquet, {tmp_path}/verl/train.parquet"
    assert error_of(tmp_path / "verl") == f"{tmp_path}/verl: the set has 2 splits; name one of them: {patterns}"


def test_a_folder_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "data[1]").mkdir()
    (tmp_path / "data2").mkdir()
    lines(tmp_path / "data[1]" / "a.jsonl", [{"problem": "a", "answer": "1"}])
    lines(tmp_path / "data2" / "b.jsonl", [{"problem": "b", "answer": "1"}])
    assert read(tmp_path / "data[1]" / "*.jsonl")["question"].to_pylist() == ["a"]
    assert read(tmp_path / "data[12]" / "*.jsonl")["question"].to_pylist() == ["b"]


def test_columns_of_your_own(tmp_path: Path) -> None:
    row = {"task": {"text": "q"}, "meta": {"key": [" 7 "], "origin": "mine"}, "uid": 3, "label": 0}
    columns = {"problem": "task.text", "answer": "meta.key", "id": "uid", "source": "meta.origin"}
    for file in (lines(tmp_path / "p.jsonl", [row]), parquet(tmp_path / "p.parquet", [row])):
        assert read(file, columns=columns).to_pylist() == [
            {"problem_id": "3", "question": "q", "answer": "7", "source": "mine", "failures": None}
        ]
        assert error_of(file, columns={"problem": "task.text", "answer": "meta.keys"}).startswith(f"{file}")
        assert error_of(file, columns={"problem": "tasks", "answer": "meta.key"}) == (
            f"{file}: no column 'tasks', which <stage>.data.columns gives for problem (found: label, meta, task, uid), "
            "did you mean 'task'?; correct <stage>.data.columns.problem"
        )
    # A mapping that names one column keeps the others.
    for name in ("question", "prompt"):
        rows = [{name: "q", "key": "1", "id": "a", "source": "s", "failures": {"m": 3.0}}]
        for file in (lines(tmp_path / "h.jsonl", rows), parquet(tmp_path / "h.parquet", rows)):
            assert read(file, columns={"answer": "key"}).to_pylist() == [
                {"problem_id": "a", "question": "q", "answer": "1", "source": "s", "failures": [("m", 3)]}
            ]
    assert ColumnsConfig.of("problem=question, answer=a.b") == ColumnsConfig(problem="question", answer="a.b")
    for wrong in ("problem", "question=problem", "problem=a,problem=b", "problem=,answer=b"):
        with pytest.raises(
            RecipeError, match="is not FIELD=COLUMN, with each FIELD of problem, answer, id, source once"
        ):
            ColumnsConfig.of(wrong)


def test_of_two_columns_each_row_has_the_one_with_a_value(tmp_path: Path) -> None:
    rows = [{"problem": "a", "question": None, "answer": "1"}, {"problem": None, "question": "b", "answer": "2"}]
    for file in (lines(tmp_path / "p.jsonl", rows), parquet(tmp_path / "p.parquet", rows)):
        assert read(file)["question"].to_pylist() == ["a", "b"]


def test_images_are_refused(tmp_path: Path) -> None:
    plain = {"problem": "q", "answer": "1", "images": []}
    held = "holds an image; kdrl reads problems of text alone"
    for changes, field, problem in (
        ({"images": [{"bytes": b"x".hex(), "path": None}]}, "images", held),
        ({"problem": "<image>What is shown?"}, "problem", "has <image>; kdrl reads problems of text alone"),
    ):
        bad = {**plain, **changes}
        for file in (lines(tmp_path / "p.jsonl", [plain, bad]), parquet(tmp_path / "p.parquet", [plain, bad])):
            assert f"row 2, field '{field}': {problem}; drop the row" in error_of(file)
    part = {"prompt": [{"role": "user", "content": [{"type": "image", "image": "x"}]}], "answer": "1"}
    assert "field 'prompt[0].content': a part of type 'image', kdrl reads text alone" in error_of(
        lines(tmp_path / "c.jsonl", [part])
    )


def test_system_messages_are_counted_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": asked(f"q{i}", system="s" if i % 2 else None), "answer": "1"} for i in range(6)]
    for file in (lines(tmp_path / "p.jsonl", rows), parquet(tmp_path / "p.parquet", rows)):
        caplog.clear()
        table = read(file)
        told = f"system messages left out: 3 rows, the first: {file} row 2"
        assert Reading.of(table).told() == [told]
        assert [record.getMessage() for record in caplog.records] == [told]


def test_most_rows_are_never_dropped_with_a_smile(tmp_path: Path) -> None:
    bad: list[Row] = [
        {"problem": "q"},
        {"problem": "", "answer": "1"},
        {"problem": "q", "answer": True},
        {"problem": 3, "answer": "1"},
    ]
    rows: list[Row] = [{"problem": f"q{i}", "answer": "1"} for i in range(89)]
    file = lines(tmp_path / "p.jsonl", [*rows, *bad[:1] * 5, *bad[1:2] * 3, *bad[2:3] * 2, bad[3]])
    assert error_of(file, on_error="drop") == (
        f"problems: 11 of 100 rows are malformed, which is 11.0 %; at most 10 % are dropped. The commonest reasons: "
        f"5 × {file} row 90, field 'answer': missing; 3 × {file} row 95, field 'problem': empty; 2 × {file} row 98, "
        "field 'answer': text is expected, found true/false (True); 1 for other reasons; correct the rows, name the "
        "right columns in <stage>.data.columns, or raise <stage>.data.max_malformed_share"
    )
    assert read(file, on_error="drop", max_malformed_share=0.11).num_rows == 89


def test_data_files_without_the_rest_is_told_at_once(tmp_path: Path, make_recipe: Any) -> None:
    """Other files than the recipe's own, with the format and the label rules of those."""
    file = lines(tmp_path / "p.jsonl", [{"problem": "q", "answer": "1"}])
    recipe = make_recipe(files=[str(file)], format="skywork")
    with pytest.raises(DataError) as told:
        require_fitting(recipe, "stage1")
    assert str(told.value) == (
        f"{file}: no column 'prompt' and no column 'reward_model.ground_truth', which format skywork needs (found: "
        "answer, problem); set stage1.data.format=auto, which reads these columns"
    )
    recipe = make_recipe(files=[str(file)], drop_passes_at_least=15, max_unsolved_share=0.1)
    with pytest.raises(DataError) as told:
        require_fitting(recipe, "stage1")
    assert str(told.value) == (
        "stage1.data.files: no file has difficulty labels, which drop_passes_at_least, max_unsolved_share of "
        "stage1.data need; measure them with `kdrl label`, or set stage1.data.missing_labels=keep to leave these rules "
        "out"
    )
    recipe = make_recipe(files=[str(file)], columns={"answer": "key"})
    with pytest.raises(DataError, match=r"no column 'key', which stage1\.data\.columns gives for answer"):
        require_fitting(recipe, "stage1")
    require_fitting(make_recipe(files=[str(file)]), "stage1")
    labelled = lines(tmp_path / "l.jsonl", [{"problem": "q", "answer": "1", "failures": {"m": 1}}])
    require_fitting(make_recipe(files=[str(labelled)], drop_passes_at_least=15), "stage1")
