"""Files of any size: the same rows as the filter in memory, in the same bytes whatever their order."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kdrl_core.config import Recipe
from kdrl_core.data import FilterReport, files, filter_files, filter_problems, read_problems, stream
from kdrl_core.data.prompts import load_tokenizer
from kdrl_core.errors import DataError

LABELS = ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-32B")
RULES: dict[str, Any] = {
    "drop_passes_at_least": 15,
    "drop_all_failed": True,
    "max_unsolved_share": 0.1,
    "missing_labels": "drop",
    "on_error": "drop",
    "max_problems": 60,
}
MakeRecipe = Callable[..., Recipe]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Problems with every kind of fate: duplicates, unlabelled, malformed, long, not ASCII, unreadable answers."""
    rng = random.Random(seed)
    result: list[dict[str, Any]] = []
    for number in range(count):
        question = f"Problem {number}: " + "word " * rng.randrange(3, 50) + ("é" if number % 7 == 0 else "")
        answer = rng.choice(["12", "3/4", "x=", r"\sqrt{2}"])
        failures = {name: rng.choice([*range(17), 16, 16, 16]) for name in LABELS}
        row: dict[str, Any] = {"id": f"p{number:05}", "problem": question, "answer": answer, "failures": failures}
        if number % 11 == 0:
            row |= {"failures": None}
        if number % 13 == 0:
            row |= {"answer": ""}
        result.append(row)
        if number % 5 == 0:
            result.append({**row, "id": f"twin{number:05}", "problem": question.replace(" ", "  ")})
    return result


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return str(path)


def run(recipe: Recipe, output: Path, tokenizer: Any) -> tuple[FilterReport, bytes]:
    report = filter_files(recipe, output, tokenizer=tokenizer)
    return report, output.read_bytes()


@pytest.fixture
def tokenizer(tokenizer_dir: Path, make_recipe: MakeRecipe) -> Any:
    return load_tokenizer(make_recipe().student.model_copy(update={"path": str(tokenizer_dir)}))


def test_it_keeps_what_the_filter_in_memory_keeps(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", 37)
    monkeypatch.setattr(stream, "_ROWS_PER_RANGE", 16)
    recipe = make_recipe(files=[write(tmp_path / "p.jsonl", rows(400))], max_prompt_tokens=300, **RULES)
    pool, expected = filter_problems(read_problems(recipe.stage("stage1").data), recipe, tokenizer=tokenizer)
    report, _ = run(recipe, tmp_path / "out.parquet", tokenizer)
    assert report == expected
    assert all(report.dropped(rule) > 0 for rule in ("malformed", "duplicates", "missing_labels", "max_prompt_tokens"))
    assert all(report.dropped(rule) > 0 for rule in ("unparsable_answers", "max_unsolved_share", "max_problems"))
    kept = pq.read_table(tmp_path / "out.parquet")
    for name in ("problem_id", "question", "answer", "source"):
        assert kept[name].to_pylist() == pool[name].to_pylist()
    assert FilterReport.from_json(json.loads(kept.schema.metadata[stream.REPORT_KEY])) == report


def test_order_of_rows_files_and_batches_changes_no_byte(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [{**row, "source": "here"} for row in rows(300)]
    found = set()
    for seed in range(3):
        shuffled = random.Random(seed).sample(content, len(content))
        cut = 100 * (seed + 1)
        monkeypatch.setattr(files, "BATCH_ROWS", 17 + 50 * seed)
        halves = [write(tmp_path / "b.jsonl", shuffled[:cut]), write(tmp_path / "a.jsonl", shuffled[cut:])]
        recipe = make_recipe(files=halves, max_prompt_tokens=300, **RULES)
        found.add(run(recipe, tmp_path / f"{seed}.parquet", tokenizer)[1])
    assert len(found) == 1


def test_the_output_can_be_filtered_again(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    recipe = make_recipe(files=[write(tmp_path / "p.jsonl", rows(100))], max_prompt_tokens=300, **RULES)
    first, _ = run(recipe, tmp_path / "one.parquet", tokenizer)
    again = make_recipe(files=[str(tmp_path / "one.parquet")], max_prompt_tokens=300, **RULES)
    second, _ = run(again, tmp_path / "two.parquet", tokenizer)
    assert second.rows_in == second.rows_out == first.rows_out
    assert pq.read_table(tmp_path / "one.parquet").equals(pq.read_table(tmp_path / "two.parquet"))


def test_lengths_are_exact_at_the_limit(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    """The tokenizer has one token a byte: `<|user|>`, the question with the template, `<|assistant|>`, `<think>`."""
    questions = ["a" * size for size in range(1, 60)] + ["é" * size for size in range(1, 30)]
    content = [{"id": f"p{i}", "problem": question, "answer": "1"} for i, question in enumerate(questions)]
    for limit in (110, 120, 130):
        recipe = make_recipe(
            files=[write(tmp_path / "p.jsonl", content)], max_prompt_tokens=limit, missing_labels="keep"
        )
        pool, expected = filter_problems(read_problems(recipe.stage("stage1").data), recipe, tokenizer=tokenizer)
        report, _ = run(recipe, tmp_path / f"{limit}.parquet", tokenizer)
        assert report == expected
        assert max(len(ids) for ids in pool["prompt_token_ids"].to_pylist()) == limit
        assert 0 < report.rows_out < len(questions)


def test_labels_of_every_batch_are_known(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BATCH_ROWS", 2)
    content = [{"problem": f"q{i}", "answer": "1", "failures": {f"m{i // 2}": 3}} for i in range(6)]
    recipe = make_recipe(files=[write(tmp_path / "p.jsonl", content)], drop_passes_at_least=15)
    with pytest.raises(DataError, match=r"labels found: m0, m1, m2"):
        filter_files(recipe, tmp_path / "o.parquet", tokenizer=tokenizer)
    assert not (tmp_path / "o.parquet").exists()


def test_a_chat_template_may_write_the_question_twice(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    twice = "{% for m in messages %}{{ m.content }}<|user|>{{ m.content }}{% endfor %}"
    content = [{"problem": "a" * size, "answer": "1"} for size in range(1, 60)]
    values = {"student": {"path": "no-such-model", "chat_template": twice}}
    file = write(tmp_path / "p.jsonl", content)
    recipe = make_recipe(files=[file], max_prompt_tokens=220, missing_labels="keep", values=values)
    _, expected = filter_problems(read_problems(recipe.stage("stage1").data), recipe, tokenizer=tokenizer)
    report, _ = run(recipe, tmp_path / "o.parquet", tokenizer)
    assert report == expected
    assert 0 < report.dropped("max_prompt_tokens") < len(content)


def test_files_are_read_once(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    """What happens to the input after the first pass changes nothing, and nothing temporary is left."""
    file = tmp_path / "p.jsonl"
    recipe = make_recipe(files=[write(file, rows(50))], max_prompt_tokens=300, **RULES)
    _, expected = run(recipe, tmp_path / "one.parquet", tokenizer)

    def remove(name: str, count: int) -> None:
        if name == "checking prompts":
            file.unlink(missing_ok=True)

    filter_files(recipe, tmp_path / "two.parquet", tokenizer=tokenizer, on_progress=remove)
    assert (tmp_path / "two.parquet").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]


def test_twins_with_equal_labels_are_told_apart_by_their_text(
    tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same id, answer, source and labels, other white space: the order of the rows must not decide."""
    monkeypatch.setattr(files, "BATCH_ROWS", 3)
    common = {"id": "same", "answer": "1", "source": "here", "failures": dict.fromkeys(LABELS, 8)}
    others = [{**common, "id": f"o{i}", "problem": f"Other {i}", "answer": str(i)} for i in range(7)]
    twins = [{**common, "problem": "What" + " " * size + "is it?"} for size in range(1, 6)]
    found = set()
    for seed in range(4):
        content = random.Random(seed).sample([*others, *twins], 12)
        recipe = make_recipe(files=[write(tmp_path / f"{seed}.jsonl", content)], max_prompt_tokens=300)
        pool, _ = filter_problems(read_problems(recipe.stage("stage1").data), recipe, tokenizer=tokenizer)
        report, output = run(recipe, tmp_path / "o.parquet", tokenizer)
        assert report.dropped("duplicates") == 4
        assert pq.read_table(tmp_path / "o.parquet")["question"].to_pylist() == pool["question"].to_pylist()
        found.add(output)
    assert len(found) == 1


def test_a_killed_filter_leaves_no_output(tmp_path: Path) -> None:
    """SIGKILL while the output is written: what stood there before still does."""
    file, output = write(tmp_path / "p.jsonl", rows(200)), tmp_path / "o.parquet"
    output.write_bytes(b"before")
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from kdrl_core.config import load_recipe\n"
        "from kdrl_core.data import filter_files\n"
        f"data = \"{{files: ['{file}'], missing_labels: keep, on_error: drop, unparsable_answers: keep}}\"\n"
        "recipe = load_recipe('miniature', [f'stage2.data={data}', 'stage2.max_prompt_tokens=1000'])\n"
        "kill = lambda name, rows: name == 'writing' and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"filter_files(recipe, Path('{output}'), on_progress=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=dict(os.environ), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert output.read_bytes() == b"before"
    assert sorted(tmp_path.glob("*")) == [output, tmp_path / "p.jsonl"]


def test_notes_name_rows_and_stay_out_of_the_output(tmp_path: Path, make_recipe: MakeRecipe, tokenizer: Any) -> None:
    content = [{"problem": f"q{i}", "answer": "1"} for i in range(20)]
    content += [{"problem": "q3", "answer": "2"}, {"problem": "q", "answer": ""}]
    file = write(tmp_path / "p.jsonl", content)
    recipe = make_recipe(files=[file], on_error="drop", max_prompt_tokens=300)
    report, _ = run(recipe, tmp_path / "o.parquet", tokenizer)
    assert report.notes == (
        f"malformed: 1 × {file} row 22, field 'answer': empty",
        f"conflicting_answers: 1 question with different answers, the first: {file} row 4 '1', {file} row 21 '2'",
    )
    assert report.rows_out == 19
    kept = FilterReport.from_json(json.loads(pq.read_schema(tmp_path / "o.parquet").metadata[stream.REPORT_KEY]))
    assert (kept, kept.notes) == (report, ())
    assert report.to_text().splitlines()[-1] == report.notes[-1]
