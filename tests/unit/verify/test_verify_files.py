"""kdrl_core/verify: grading files. Rows are kept whole and in order, faults told, outputs all or nothing."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdrl_core.errors import DataError, VerificationError
from kdrl_core.tables.schemas import REWARDS
from kdrl_core.types import VerdictKind
from kdrl_core.verify import VerdictOptions, Verifier, row_files
from kdrl_core.verify.grading import MAX_GROUPS, FileTally, GradingOptions, OnProgress, box_answer, grade_file
from kdrl_core.verify.row_files import VERDICT_NAMES, open_rows
from kdrl_core.verify.rows import choose_columns

ACCURACY = VerdictOptions(require_format=False, think_opened=False)
FORMAT = VerdictOptions(require_format=True, think_opened=False)
HALF = r"\frac{1}{2}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with closing(Verifier(workers=1, timeout_s=5.0)) as shared:
        yield shared


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "BATCH_ROWS", 3)


def boxed(answer: str) -> str:
    return rf"<think>a</think>\boxed{{{answer}}}"


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def judge(
    path: Path,
    verifier: Verifier,
    output: Path | None = None,
    *,
    options: VerdictOptions = ACCURACY,
    chosen: dict[str, str] | None = None,
    on_progress: OnProgress | None = None,
    **more: Any,
) -> FileTally:
    file = open_rows(path)
    columns = choose_columns(file.names, origin=file.origin, **(chosen or {}))
    grading = GradingOptions(verdicts=options, **more)
    return grade_file(file, columns, verifier, options=grading, output=output, on_progress=on_progress)


def ten_rows() -> list[dict[str, Any]]:
    answers = ["1", HALF, "3", "4", "5", r"\frac{12}{2}", "many", "8", "9", "10"]
    truths = ["1", "0.5", "3", "4", "0", "6", "7", "8", "9", "11"]
    return [
        {"id": number, "response": boxed(answer), "meta": {"k": [number, None]}, "answer": truth}
        for number, (answer, truth) in enumerate(zip(answers, truths, strict=True))
    ]


FOUND = ["correct", "correct", "correct", "correct", "wrong", "correct", "wrong", "correct", "correct", "wrong"]


@pytest.mark.usefixtures("small_batches")
def test_json_lines_keep_every_byte_and_their_order(tmp_path: Path, verifier: Verifier) -> None:
    lines = [json.dumps(row) for row in ten_rows()]
    lines[2] = '{"response" :"\\\\boxed{3}",  "x": 1.50e0, "é": "\\u00e9\\ud83d\\ude00 \u2028", "answer":"3" }'
    lines[4] = "  " + lines[4] + "\t\r"
    lines.insert(5, "")
    path, output = tmp_path / "in.jsonl", tmp_path / "out.ndjson"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # no line break at the end
    summary = judge(path, verifier, output)
    written = output.read_bytes().decode().split("\n")
    assert written.pop() == ""
    kept = [line.strip() for line in lines if line]
    assert [line.startswith(old[:-1].rstrip() + ", ") for old, line in zip(kept, written, strict=True)] == [True] * 10
    found = [json.loads(line) for line in written]
    assert [row["verdict"] for row in found] == FOUND
    assert [list(row)[-6:] for row in found] == [REWARDS.names[2:]] * 10
    assert found[1]["extracted"] == HALF
    assert found[1]["reason"] == "equal to the ground truth"
    assert [row["reward"] for row in found] == [float(kind == "correct") for kind in FOUND]
    assert pd.read_json(output, lines=True)["accuracy_reward"].sum() == 7
    assert (summary.total.num_rows, summary.total.accuracy, summary.dropped.total) == (10, 0.7, 0)


@pytest.mark.usefixtures("small_batches")
def test_parquet_keeps_columns_types_metadata_and_order(tmp_path: Path, verifier: Verifier) -> None:
    table = pa.Table.from_pylist(ten_rows())
    table = table.append_column("kind", pa.array([f"k{n % 2}" for n in range(10)]).dictionary_encode())
    when = pa.array([None] * 9 + [7], pa.timestamp("us", "UTC"))
    table = table.append_column(pa.field("when", when.type, metadata={"a": "b"}), when)
    table = table.replace_schema_metadata({"made": "by me"})
    path, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(table, path, row_group_size=4)
    judge(path, verifier, output)
    written = pq.read_table(output)
    assert written.schema.names == [*table.schema.names, *REWARDS.names[2:]]
    assert written.select(table.schema.names).equals(pq.read_table(path), check_metadata=True)
    assert written.schema.metadata == {b"made": b"by me"}
    assert [written.schema.field(name) for name in REWARDS.names[2:]] == [REWARDS.field(n) for n in REWARDS.names[2:]]
    assert written["verdict"].to_pylist() == FOUND
    assert pd.read_parquet(output)["reward"].tolist() == [float(kind == "correct") for kind in FOUND]


def test_format_counts_when_asked_for(tmp_path: Path, verifier: Verifier) -> None:
    path = write_lines(
        tmp_path / "in.jsonl",
        {"response": boxed("1"), "answer": "1"},
        {"response": r"\boxed{1}", "answer": "1"},
        {"response": boxed("2"), "answer": "1"},
        {"response": "<think></think>1", "answer": "1"},
    )
    judge(path, verifier, tmp_path / "out.jsonl", options=FORMAT)
    found = read_lines(tmp_path / "out.jsonl")
    assert [row["verdict"] for row in found] == ["correct", "malformed", "wrong", "no_answer"]
    assert [row["reward"] for row in found] == [1, 0, 0, 0]
    assert [row["format_reward"] for row in found] == [1, 0, 1, 0]
    assert [row["accuracy_reward"] for row in found] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("response", "think_opened", "expected"),
    [
        (" 1/2 \n", False, r"\boxed{1/2}"),
        (r"so \boxed{5}", False, r"so \boxed{5}"),
        (r"<think>\boxed{1}</think> 2 ", False, r"<think>\boxed{1}</think>\boxed{2}"),
        ("a</think> 2", True, r"a</think>\boxed{2}"),
        ("never closed", True, "never closed"),
        ("<think>5", False, "<think>5"),
        ("", False, ""),
    ],
)
def test_bare_answers_are_boxed(response: str, think_opened: bool, expected: str) -> None:
    assert box_answer(response, think_opened=think_opened) == expected


def test_columns_are_found_by_their_usual_names() -> None:
    found = choose_columns(["id", "prediction", "gold"], origin="f")
    assert (found.response, found.truth) == ("prediction", "gold")
    assert choose_columns(["response", "text", "answer"], origin="f", response="text").response == "text"
    # A column that is one of the two is no candidate for the other.
    found = choose_columns(["output", "text", "target", "gold"], origin="f", response="output", truth="gold")
    assert found.used == ["output", "gold"]


@pytest.mark.parametrize(
    ("names", "chosen", "message"),
    [
        (
            ["id", "answer"],
            {},
            "f: no column for the responses (response, completion, prediction, output, generation, text); "
            "it has id, answer; set --response COL",
        ),
        (
            ["response", "a"],
            {},
            "f: no column for the ground truths (ground_truth, gold, answer, solution, target, "
            "reward_model.ground_truth); "
            "it has response, a; set --truth COL",
        ),
        (
            ["response", "text", "gold"],
            {},
            "f: response and text may each be the responses; choose with --response COL",
        ),
        (
            ["response", "answer", "solution"],
            {},
            "f: answer and solution may each be the ground truths; choose with --truth COL",
        ),
        (["response", "gold"], {"by": "source"}, "f has no column 'source' (--by); it has response, gold"),
        (["a", "b"], {"response": "c"}, "f has no column 'c' (--response); it has a, b"),
        (
            ["a"],
            {"response": "a", "truth": "a"},
            "f: column 'a' cannot be response and ground truth; set --response or --truth",
        ),
    ],
)
def test_columns_in_doubt_are_asked_for(names: list[str], chosen: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as told:
        choose_columns(names, origin="f", **chosen)
    assert str(told.value) == message


GOOD = {"response": boxed("1"), "gold": "1", "ok": 1}
FAULTS: dict[str, tuple[object, str]] = {
    "no object": ("[1]", ": an object is expected, found a list ([1])"),
    "null": ("null", ": an object is expected, found null"),
    "no JSON": ('{"response": ', ": not JSON (Expecting value at column 13)"),
    "raw NUL": ('{"response": "\0"}', ": not JSON (Invalid control character at column 15)"),
    "missing response": ({"gold": "1"}, ", field 'response': missing"),
    "null response": ({**GOOD, "response": None}, ", field 'response': null"),
    "list of responses": ({**GOOD, "response": ["a"]}, ", field 'response': text is expected, found a list (['a'])"),
    "missing truth": ({"response": "1"}, ", field 'gold': missing"),
    "list of truths": ({**GOOD, "gold": []}, ", field 'gold': an empty list; one answer is expected"),
    "true": ({**GOOD, "gold": True}, ", field 'gold': text is expected, found true/false (True)"),
    "empty truth": ({**GOOD, "gold": " "}, ", field 'gold': empty"),
    "no flag": ({**GOOD, "ok": 2}, ", field 'ok': true, false, 1 or 0 is expected, found 2"),
    "text as flag": ({**GOOD, "ok": "yes"}, ", field 'ok': true, false, 1 or 0 is expected, found text ('yes')"),
    "no expectation": ({"response": "1", "gold": "1"}, ", field 'ok': missing"),
}


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_bad_line_is_told_before_any_worker_starts(fault: object, message: str, tmp_path: Path) -> None:
    path, output = write_lines(tmp_path / "in.jsonl", *[GOOD] * 5, "", fault, GOOD), tmp_path / "out.jsonl"
    output.write_text("old")
    with closing(Verifier(workers=1)) as verifier:
        with pytest.raises(DataError) as told:
            judge(path, verifier, output, chosen={"expected": "ok"})
        assert verifier._workers.pool is None
    where = f"{path} line 7"
    assert str(told.value) == f"{where}{message}; correct the row, or leave such rows out with --on-error drop"
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [path, output]


@pytest.mark.usefixtures("small_batches")
def test_bad_rows_are_dropped_and_counted(tmp_path: Path, verifier: Verifier) -> None:
    lines = [line for fault, _ in FAULTS.values() for line in (GOOD, fault)]
    path, output = write_lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    with path.open("ab") as file:
        file.write(b'{"response": "\xff"}\n')
    summary = judge(path, verifier, output, chosen={"expected": "ok"}, on_error="drop", max_malformed_share=1.0)
    assert (summary.total.num_rows, summary.dropped.total) == (len(FAULTS), len(FAULTS) + 1)
    assert summary.dropped.first == f"{path} line 2: an object is expected, found a list ([1])"
    assert [row["verdict"] for row in read_lines(output)] == ["correct"] * len(FAULTS)


@pytest.mark.usefixtures("small_batches")
def test_bad_parquet_rows(tmp_path: Path, verifier: Verifier) -> None:
    responses = [boxed("1")] * 7
    truths = ["1", "1", "1", "1", None, "2", " "]
    path, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"n": list(range(7)), "response": responses, "gold": truths}), path)
    with pytest.raises(DataError) as told:
        judge(path, verifier, output)
    where = f"{path} row 5, field 'gold': null"
    assert str(told.value) == f"{where}; correct the row, or leave such rows out with --on-error drop"
    assert not output.exists()
    summary = judge(path, verifier, output, on_error="drop", max_malformed_share=0.3)
    assert (summary.total.num_rows, summary.dropped.total, summary.dropped.first) == (5, 2, where)
    assert pq.read_table(output).select(["n", "verdict"]).to_pydict() == {
        "n": [0, 1, 2, 3, 5],
        "verdict": ["correct"] * 4 + ["wrong"],
    }


def test_parquet_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path, verifier: Verifier) -> None:
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe"))
    path, output = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"response": broken, "gold": ["1", "1"]}), path)
    summary = judge(path, verifier, output, on_error="drop", max_malformed_share=0.5)
    assert summary.dropped.first == f"{path} row 2, field 'response': text is expected, found bytes (b'')"
    assert len(pq.read_table(output)) == 1


def test_files_that_cannot_be_used(tmp_path: Path, verifier: Verifier) -> None:
    def told(path: Path, **chosen: str) -> str:
        with pytest.raises(DataError) as error:
            judge(path, verifier, chosen=chosen)
        return str(error.value)

    assert told(tmp_path / "no.jsonl") == f"{tmp_path / 'no.jsonl'} does not exist or is not a file; check the path"
    assert told(tmp_path) == f"{tmp_path} is a folder; name a file in it"
    other = write_lines(tmp_path / "a.json", "[]")
    wanted = "unknown kind of file; give JSON Lines (.jsonl, .ndjson) or Parquet (.parquet)"
    assert told(other) == f"{other}: {wanted}"
    empty = write_lines(tmp_path / "empty.jsonl", "")
    assert told(empty) == f"{empty} has no rows; give a file with at least one"
    array = write_lines(tmp_path / "array.jsonl", "[", "1]")
    assert told(array).startswith(f"{array} line 1: not JSON (")
    bad = write_lines(tmp_path / "bad.parquet", "text")
    assert told(bad).startswith(f"{bad} cannot be read as Parquet (")
    no_rows = tmp_path / "none.parquet"
    pq.write_table(pa.table({"response": pa.array([], pa.string()), "gold": pa.array([], pa.string())}), no_rows)
    assert told(no_rows) == f"{no_rows} has no rows; give a file with at least one"
    numbers = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"response": ["1"], "gold": [b"1"]}), numbers)
    assert told(numbers) == f"{numbers}: column 'gold' is binary, not text; choose another or cast it"
    all_bad = write_lines(tmp_path / "all.jsonl", {"response": 1, "gold": "1"})
    with pytest.raises(DataError, match=r"every row is malformed; the first: .*field 'response': text is expected"):
        judge(all_bad, verifier, on_error="drop", max_malformed_share=1.0)
    many = write_lines(tmp_path / "many.jsonl", *({**GOOD, "id": n} for n in range(MAX_GROUPS + 1)))
    assert "column 'id' has over 1,000 different values" in told(many, by="id")


@pytest.mark.usefixtures("small_batches")
def test_verdicts_that_a_file_has_are_replaced_only_on_request(tmp_path: Path, verifier: Verifier) -> None:
    old = {**GOOD, "reward": 7, "note": "\ud800 é", "verdict": "?"}
    path, output = write_lines(tmp_path / "in.jsonl", *[GOOD] * 5, old), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"has a column 'reward' already.*or replace it with --force"):
        judge(path, verifier, output)
    assert not output.exists()
    judge(path, verifier)  # without an output nothing is replaced
    judge(path, verifier, output, replace_columns=True)
    assert list(read_lines(output)[5]) == ["response", "gold", "ok", "note", *REWARDS.names[2:]]
    assert read_lines(output)[5]["note"] == "\ud800 é"
    assert read_lines(output)[5]["verdict"] == "correct"

    table = tmp_path / "in.parquet"
    pq.write_table(pa.table({"verdict": [1], "response": [boxed("1")], "gold": ["1"]}), table)
    with pytest.raises(DataError, match="has a column 'verdict' already"):
        judge(table, verifier, tmp_path / "out.parquet")
    judge(table, verifier, tmp_path / "out.parquet", replace_columns=True)
    assert pq.read_table(tmp_path / "out.parquet").schema.names == ["response", "gold", *REWARDS.names[2:]]
    path = write_lines(tmp_path / "lost.jsonl", {"reason": "1", "gold": "1"})
    with pytest.raises(DataError, match="column 'reason' is an input, and verdicts have that name; rename it"):
        judge(path, verifier, tmp_path / "lost-out.jsonl", chosen={"response": "reason"}, replace_columns=True)


@pytest.mark.usefixtures("small_batches")
def test_a_failure_half_way_leaves_the_old_output(tmp_path: Path) -> None:
    path, output = write_lines(tmp_path / "in.jsonl", *ten_rows()), tmp_path / "out.jsonl"
    output.write_bytes(b"old")
    verifier = Verifier(workers=1)
    reports: list[tuple[str, int, int | None]] = []

    def close_in_the_second_batch(name: str, done: int, total: int | None) -> None:
        reports.append((name, done, total))
        if name == "verifying" and done == 3:
            verifier.close()

    with pytest.raises(VerificationError, match="closed"):
        judge(path, verifier, output, on_progress=close_in_the_second_batch)
    assert reports[-1] == ("verifying", 3, 10)
    assert output.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path, output]


@pytest.mark.usefixtures("small_batches")
def test_a_file_that_changes_between_the_passes_leaves_the_old_output(tmp_path: Path, verifier: Verifier) -> None:
    path, output = write_lines(tmp_path / "in.jsonl", *ten_rows()), tmp_path / "out.jsonl"
    output.write_bytes(b"old")

    def spoil(name: str, done: int, total: int | None) -> None:
        if (name, done) == ("reading", 10):
            write_lines(path, *ten_rows()[:7], {"response": "1"})

    with pytest.raises(DataError, match="line 8, field 'answer': missing"):
        judge(path, verifier, output, on_progress=spoil)
    assert output.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path, output]


def test_a_hostile_answer_costs_its_time_limit_and_no_other_row(tmp_path: Path) -> None:
    answers = [HALF, "9^{9^{9^{9}}}", r"\frac{2}{4}", r"\frac{3}{6}"]
    path = write_lines(tmp_path / "in.jsonl", *({"response": boxed(answer), "gold": "0.5"} for answer in answers))
    with closing(Verifier(workers=1, timeout_s=1.0)) as verifier:
        summary = judge(path, verifier, tmp_path / "out.jsonl")
    verdicts = [row["verdict"] for row in read_lines(tmp_path / "out.jsonl")]
    assert verdicts == ["correct", "timeout", "correct", "correct"]
    assert summary.total.num_failed == 1
    assert summary.first_failed == "line 2: no result within 1 s; the worker was killed"


def test_nul_and_lone_surrogates_in_responses(tmp_path: Path, verifier: Verifier) -> None:
    lines = [
        r'{"response": "\\boxed{1}\u0000\ud800", "gold": "1"}',
        r'{"response": "\\boxed{\udfff\u0000}", "gold": "1\ud800", "\ud800": "\udc00"}',
    ]
    path, output = write_lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    judge(path, verifier, output)
    written = output.read_text(encoding="utf-8").splitlines()
    assert [line.startswith(old[:-1]) for old, line in zip(lines, written, strict=True)] == [True, True]
    assert [json.loads(line)["verdict"] for line in written] == ["correct", "wrong"]
    assert json.loads(written[1])["extracted"] == "\ufffd\ufffd"


def test_summary_by_group_and_against_expectations(tmp_path: Path, verifier: Verifier) -> None:
    cases: list[tuple[str, str, object, object]] = [
        ("1", "1", True, "a"),
        ("1", "1", 0, "a"),  # found correct, expected wrong
        ("2", "1", False, "a"),
        ("3", "1", 1.0, "b"),  # found wrong, expected right
        (HALF, "0.5", 1, "b"),
        (HALF, "0.5", 1, None),  # the same pair again: no further comparison
    ]
    keys = ("response", "gold", "ok", "source")
    data = [dict(zip(keys, (boxed(case[0]), *case[1:]), strict=True)) for case in cases]
    path = write_lines(tmp_path / "in.jsonl", *data)
    with closing(Verifier(workers=1)) as fresh:
        summary = judge(path, fresh, chosen={"expected": "ok", "by": "source"})
    total = summary.total
    assert (total.false_positives, total.false_negatives, total.agreement) == (1, 1, 4 / 6)
    assert (total.reward_mean, total.format_share, total.accuracy) == (4 / 6, 1.0, 4 / 6)
    assert summary.num_computed == 1
    assert list(summary.groups) == ["a", "b", "null"]
    a, b = summary.groups["a"], summary.groups["b"]
    assert (a.num_rows, a.kinds[VerdictKind.CORRECT], a.false_positives, a.false_negatives) == (3, 2, 1, 0)
    assert (b.num_rows, b.kinds[VerdictKind.WRONG], b.false_positives, b.false_negatives) == (2, 1, 0, 1)
    found = summary.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["verdicts"]["correct"] == {"count": 4, "share": 4 / 6}
    assert found["by"]["null"]["expected"] == {"agreement": 1.0, "false_positives": 0, "false_negatives": 0}

    parquet = tmp_path / "in.parquet"
    pq.write_table(
        pa.table({**{k: [r[k] for r in data] for k in ("response", "gold", "source")}, "ok": [1.0] * 6}), parquet
    )
    again = judge(parquet, verifier, chosen={"expected": "ok", "by": "source"})
    assert {name: tally.kinds for name, tally in again.groups.items()} == {
        name: tally.kinds for name, tally in summary.groups.items()
    }


def test_the_columns_are_those_of_a_step() -> None:
    assert set(REWARDS.names[2:]) == VERDICT_NAMES


def test_whole_numbers_are_truths_and_a_last_backslash_does_not_open_the_box(tmp_path: Path) -> None:
    rows = [{"response": boxed("42"), "answer": 42}, {"response": boxed("41"), "answer": 42}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "n.parquet")
    for file in (write_lines(tmp_path / "n.jsonl", *rows), tmp_path / "n.parquet"):
        opened = open_rows(file)
        batches = list(opened.batches(choose_columns(opened.names, origin=opened.origin), with_rows=False))
        assert [item[1] for item in batches[0].items] == ["42", "42"]
    assert box_answer("185\\") == r"\boxed{185\ }"


def test_rows_of_other_projects_are_read_as_they_are(tmp_path: Path, verifier: Verifier) -> None:
    """verl's nested truths, message lists as responses, numbers, and a list of one."""
    said = [{"role": "user", "content": "6 · 7?"}, {"role": "assistant", "content": boxed("42")}]
    rows = [
        {"response": said, "reward_model": {"ground_truth": truth, "style": "rule"}, "extra": {"level": "easy"}}
        for truth in ("42", '["42"]', "#### 42", "41")
    ]
    path = write_lines(tmp_path / "in.jsonl", *rows)
    table = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    for file in (path, table):
        output = tmp_path / f"out{file.suffix}"
        tally = judge(file, verifier, output, chosen={"by": "extra.level"})
        assert tally.columns.truth == "reward_model.ground_truth"
        assert [tally.total.kinds[kind] for kind in (VerdictKind.CORRECT, VerdictKind.WRONG)] == [3, 1]
        assert list(tally.groups) == ["easy"]
    assert pq.read_table(tmp_path / "out.parquet").select(pq.read_schema(table).names).equals(pq.read_table(table))
    numbers = write_lines(tmp_path / "n.jsonl", *({**GOOD, "gold": truth} for truth in (1, 1.0, [1], ["1"])))
    assert judge(numbers, verifier).total.accuracy == 1
    table = pa.table({"response": [boxed("5.1"), boxed("5")], "gold": pa.array([5.1, 5.0], pa.float32())})
    pq.write_table(table, tmp_path / "f.parquet")
    assert judge(tmp_path / "f.parquet", verifier).total.accuracy == 1
    silent = write_lines(tmp_path / "s.jsonl", {"response": said[:1], "gold": "1"})
    with pytest.raises(DataError, match="field 'response': no message of an assistant among the messages; correct the"):
        judge(silent, verifier)
    with pytest.raises(DataError, match=r"has no column 'reward\.truth' \(--truth\); it has response, reward_model"):
        judge(path, verifier, chosen={"truth": "reward.truth"})
    with pytest.raises(DataError, match=r"field 'reward_model\.truth': missing"):
        judge(path, verifier, chosen={"truth": "reward_model.truth"})


def test_most_rows_are_never_dropped_with_a_smile(tmp_path: Path, verifier: Verifier) -> None:
    path = write_lines(tmp_path / "in.jsonl", *[GOOD] * 4, {"gold": "1"}, {"response": "1", "gold": None})
    with pytest.raises(DataError) as told:
        judge(path, verifier, on_error="drop", max_malformed_share=0.3)
    assert str(told.value) == (
        f"{path}: 2 of 6 rows are malformed, which is 33.3 %; at most 30 % are dropped. The commonest reasons: "
        f"1 × {path} line 5, field 'response': missing; 1 × {path} line 6, field 'gold': null; name the right columns "
        "with --response and --truth, correct the rows, or raise --max-malformed-share"
    )
