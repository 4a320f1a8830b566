"""Labels measured in process: counts, merging, the thought, and what a stage makes of them."""

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.labelling.conftest import LABEL, ROWS, SAMPLES, Scripted, problems_of, scripted, write

from kdrl_core.boxes.filter import filter_run
from kdrl_core.config import Recipe, load_recipe, resolve_path
from kdrl_core.data import PROBLEM_SCHEMA
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.errors import KdrlError
from kdrl_core.labelling import LabelOptions, label_problems, pass_at_k, plan_labels, work_folder
from kdrl_core.ledger import create_run, derive_seed
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import RolloutRequest, Verdict, VerdictKind
from kdrl_core.verify import Verifier


def test_labels_are_an_independent_count_of_the_same_samples(recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_labels(recipe, ["builtin:miniature/stage1.json"], LabelOptions(max_problems=20))
    heard: list[tuple[int, int]] = []
    summary = label_problems(
        plan, tmp_path / "out.parquet", shard_problems=7, on_progress=lambda *at: heard.append(at), keep_work=True
    )
    path = resolve_path("builtin:miniature/student")
    model, tokenizer = load_model(path), load_tokenizer(path)
    engine = TransformersRolloutEngine(
        model,
        tokenizer,
        stop_ids=stop_token_ids(model, tokenizer),
        temperature=1.0,
        max_response_tokens=64,
        batch_size=13,
    )
    expected: dict[str, int] = {}
    answers: dict[str, str] = {}
    for row in plan.problems.to_pylist():
        prompt = tokenizer.encode(f"<|user|>{row['question']}<|assistant|>", add_special_tokens=False)
        requests = [
            RolloutRequest(
                prompt_id=row["problem_id"],
                sample=sample,
                prompt_token_ids=prompt,
                seed=derive_seed(0, "label", row["problem_id"], sample),
            )
            for sample in range(4)
        ]
        answered = [
            rollout.text.rpartition("</think>")[2].rpartition("\\boxed{")[2] for rollout in engine.generate(requests)
        ]
        expected[row["problem_id"]] = sum(text.partition("}")[0] != row["answer"] for text in answered)
        answers[row["problem_id"]] = row["answer"]
    found = problems_of(tmp_path / "out.parquet")
    assert {problem_id: labels[LABEL] for problem_id, labels in found.items()} == expected
    assert len(set(expected.values())) > 2  # neither all solved nor none
    assert summary.histogram == tuple(list(expected.values()).count(count) for count in range(5))
    assert summary.pass_at[1] == pytest.approx(sum(1 - count / 4 for count in expected.values()) / 20)
    assert summary.pass_at[4] == pytest.approx(sum(count < 4 for count in expected.values()) / 20)
    assert heard[-1] == (80, 80)
    shards = pa.concat_tables(
        pq.read_table(file)
        for file in sorted((work_folder(tmp_path / "out.parquet") / "shards").glob("shard-*.parquet"))
    )
    assert len(shards) == 80
    assert set(zip(shards["problem_id"].to_pylist(), shards["ground_truth"].to_pylist(), strict=True)) == set(
        answers.items()
    )


def test_labels_do_not_depend_on_the_shards(recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_labels(recipe, ["builtin:miniature/stage1.json"], LabelOptions(max_problems=6))
    for size in (2, 6):
        label_problems(plan, tmp_path / f"{size}.parquet", shard_problems=size)
    assert problems_of(tmp_path / "2.parquet") == problems_of(tmp_path / "6.parquet")
    assert not work_folder(tmp_path / "2.parquet").exists()


def test_only_missing_labels_are_measured_and_merged(recipe: Recipe, tmp_path: Path) -> None:
    failures: list[dict[str, int] | None] = [{LABEL: 4, "other": 1}, {"other": 2}, None]
    rows = [{**row, "id": f"p{i}", "failures": failures[i]} for i, row in enumerate(ROWS)]
    source = write(tmp_path / "in.jsonl", rows)
    answers = {"p0": "8888", "p1": "8988", "p2": "2999"}
    engine = Scripted(answers)
    summary = scripted(plan_labels(recipe, [source]), tmp_path / "some.parquet", engine)
    assert problems_of(tmp_path / "some.parquet") == {
        "p0": {LABEL: 4, "other": 1},
        "p1": {LABEL: 1, "other": 2},
        "p2": {LABEL: 3},
    }
    assert {request.prompt_id for request in engine.seen} == {"p1", "p2"}
    assert (summary.num_problems, summary.num_labelled, summary.num_sampled) == (3, 3, 2)
    assert summary.histogram == (0, 1, 0, 1, 1)

    scripted(
        plan_labels(recipe, [source], LabelOptions(only_missing=False, label="mine")),
        tmp_path / "all.parquet",
        Scripted(answers),
    )
    assert problems_of(tmp_path / "all.parquet")["p0"] == {LABEL: 4, "other": 1, "mine": 0}
    scripted(
        plan_labels(recipe, [source], LabelOptions(only_missing=False)), tmp_path / "anew.parquet", Scripted(answers)
    )
    assert problems_of(tmp_path / "anew.parquet")["p0"] == {LABEL: 0, "other": 1}

    table = pq.read_table(tmp_path / "anew.parquet")
    assert table.schema.names == PROBLEM_SCHEMA.names
    kept = json.loads(table.schema.metadata[f"kdrl.label.{LABEL}".encode()])
    assert (kept["samples"], kept["temperature"]) == (4, 1.0)


def origin(path: Path, label: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pq.read_schema(path).metadata[f"kdrl.label.{label}".encode()])
    return found


def test_functions_of_the_reward_count_what_a_label_counts(tmp_path: Path) -> None:
    """Truths 8, 8, 2: `near` pays 1 for the truth, 0.5 for a neighbour of it; a success is above 0.4."""
    (code := tmp_path / "mine.py").write_text(
        "def near(response, answer, problem):\n"
        "    assert problem['question'] in ('3+5', '2*4', '1+1') and problem['length'] == 2\n"
        "    return max(0.0, 1 - abs(int(response[-2]) - int(answer)) / 2)\n"
    )
    functions = f"reward.functions=[{{function: '{code}:near'}}]"
    source = write(tmp_path / "in.jsonl", [{**row, "id": f"p{i}"} for i, row in enumerate(ROWS)])
    engine = Scripted({"p0": "8888", "p1": "7965", "p2": "2345"})
    common = [SAMPLES, functions, "verification.workers=1"]
    for above, expected in ((0.4, [0, 2, 2]), (0.6, [0, 4, 3])):
        recipe = load_recipe("miniature", [*common, f"reward.success_above={above}"])
        scripted(plan_labels(recipe, [source]), tmp_path / "out.parquet", engine, keep_work=above == 0.4)
        found = problems_of(tmp_path / "out.parquet")
        assert [found[f"p{i}"][LABEL] for i in range(3)] == expected
        if above == 0.4:  # what was sampled is of another `success_above`
            plan = plan_labels(load_recipe("miniature", [SAMPLES, functions]), [source])
            with pytest.raises(KdrlError, match="reward: "):
                scripted(plan, tmp_path / "out.parquet", engine)
            shutil.rmtree(work_folder(tmp_path / "out.parquet"))


def test_how_labels_were_measured_is_kept_by_the_next_labelling(recipe: Recipe, tmp_path: Path) -> None:
    """first.parquet: A at seed 0; second.parquet: A at seed 1; of both, with B, the later A is told."""
    answers = {f"p{i}": "8888" for i in range(3)}
    for seed, name in enumerate(["first", "second"]):
        source = write(tmp_path / f"{name}.jsonl", [{**ROWS[seed], "id": f"p{seed}"}])
        plan = plan_labels(load_recipe("miniature", [SAMPLES, f"seed={seed}"]), [source], LabelOptions(label="A"))
        scripted(plan, tmp_path / f"{name}.parquet", Scripted(answers))
    table = pq.read_table(tmp_path / "second.parquet")
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"other": b"x"}), tmp_path / "second.parquet"
    )
    files = [str(tmp_path / "[fs]*.parquet"), write(tmp_path / "third.jsonl", [{**ROWS[2], "id": "p2"}])]

    both = tmp_path / "both.parquet"
    scripted(plan_labels(recipe, files, LabelOptions(label="B")), both, Scripted(answers))
    assert (origin(both, "A")["seed"], origin(both, "B")["label"]) == (1, "B")
    assert b"other" not in pq.read_schema(both).metadata
    files.reverse()
    scripted(
        plan_labels(recipe, [*files, str(tmp_path / "first.parquet")], LabelOptions(label="B")), both, Scripted(answers)
    )
    assert origin(both, "A")["seed"] == 0

    again = tmp_path / "again.parquet"  # nothing is missing: the settings of this call measured nothing
    scripted(
        plan_labels(load_recipe("miniature", [SAMPLES, "seed=9"]), [str(both)], LabelOptions(label="B")),
        again,
        Scripted({}),
    )
    assert origin(again, "B")["seed"] == 0
    anew = plan_labels(
        load_recipe("miniature", [SAMPLES, "seed=9"]), [str(both)], LabelOptions(label="B", only_missing=False)
    )
    scripted(anew, again, Scripted(answers))
    assert (origin(again, "B")["seed"], origin(again, "A")["seed"]) == (9, 0)


def test_nothing_is_loaded_where_every_label_is_there(recipe: Recipe, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{**row, "failures": {LABEL: 1}} for row in ROWS])

    def no_engine(*_: object) -> Any:
        raise AssertionError("a model was loaded")

    summary = label_problems(plan_labels(recipe, [source]), tmp_path / "out.parquet", make_engine=no_engine)
    assert (summary.num_labelled, summary.num_sampled, summary.histogram) == (3, 0, (0, 3, 0, 0, 0))


def test_a_problem_that_stands_twice_is_sampled_once(recipe: Recipe, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    plan = plan_labels(recipe, [source])
    ids = plan.problems["problem_id"].to_pylist()
    engine = Scripted({ids[0]: "8811", ids[1]: "8888"})
    summary = scripted(plan, tmp_path / "out.parquet", engine)
    assert len(engine.seen) == 8
    assert summary.histogram == (1, 0, 2, 0, 0)


def test_long_prompts_stay_without_label(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", [{**ROWS[0], "id": "p"}, {"id": "long", "problem": "1+" * 20 + "1", "answer": "1"}]
    )
    plan = plan_labels(load_recipe("miniature", [SAMPLES]), [source])
    summary = scripted(plan, tmp_path / "out.parquet", Scripted({"p": "8888"}))
    assert problems_of(tmp_path / "out.parquet") == {"p": {LABEL: 0}, "long": {}}
    assert (summary.num_labelled, summary.num_too_long) == (1, 1)


@pytest.mark.parametrize(("is_opened", "failures"), [(True, 0), (False, 4)])
def test_a_prompt_that_opens_the_thought_is_known(is_opened: bool, failures: int, tmp_path: Path) -> None:
    """`\\boxed{8}` without `</think>`: inside the thought of a prompt that opened it, else the answer."""
    template = "{{ messages[0].content }}" + ("<think>" if is_opened else "")
    recipe = load_recipe("miniature", [SAMPLES, f"student.chat_template='{template}'"])
    engine = Scripted({"p": "8888"})
    engine.frame = "{}\\boxed{{{}}}"
    source = write(tmp_path / "in.jsonl", [{**ROWS[0], "id": "p"}])
    summary = scripted(plan_labels(recipe, [source]), tmp_path / "out.parquet", engine)
    assert summary.histogram[4 if is_opened else 0] == 1, failures


def test_variables_of_the_chat_template_reach_the_prompt(tmp_path: Path) -> None:
    template = "student.chat_template='{{ messages[0].content }}{{ tail }}'"
    recipe = load_recipe("miniature", [SAMPLES, template, "prompt.chat_template_kwargs.tail='<think></think>'"])
    engine = Scripted({"p": "8888"})
    engine.frame = "{}\\boxed{{{}}}"
    source = write(tmp_path / "in.jsonl", [{**ROWS[0], "id": "p"}])
    summary = scripted(plan_labels(recipe, [source]), tmp_path / "out.parquet", engine, keep_work=True)
    shard = pq.read_table(work_folder(tmp_path / "out.parquet") / "shards" / "shard-00000.parquet")
    assert all(prompt.endswith("<think></think>") for prompt in shard["prompt"].to_pylist())
    assert shard["format_reward"].to_pylist() == [1.0] * 4
    assert summary.histogram[0] == 1


def test_the_format_is_no_part_of_the_label(recipe: Recipe, tmp_path: Path) -> None:
    engine = Scripted({"p": "8888"})
    engine.frame = "{}the answer is \\boxed{{{}}}"
    source = write(tmp_path / "in.jsonl", [{**ROWS[0], "id": "p"}])
    scripted(plan_labels(recipe, [source]), tmp_path / "out.parquet", engine, keep_work=True)
    assert problems_of(tmp_path / "out.parquet") == {"p": {LABEL: 0}}
    shard = pq.read_table(work_folder(tmp_path / "out.parquet") / "shards" / "shard-00000.parquet")
    assert shard["format_reward"].to_pylist() == [0.0] * 4


def test_too_many_timeouts_stop_it(
    recipe: Recipe, tmp_path: Path, verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Verdict(
        kind=VerdictKind.TIMEOUT, reward=0.0, format_reward=1.0, accuracy_reward=0.0, extracted="8", reason="too slow"
    )
    monkeypatch.setattr(verifier, "verify_batch", lambda items, **_: [late] * len(items))
    source = write(tmp_path / "in.jsonl", [{**ROWS[0], "id": "p"}])
    with pytest.raises(
        KdrlError, match=r"problems p to p: 4 timeout of 4 verdicts, above verification\.max_failed_share"
    ):
        scripted(plan_labels(recipe, [source]), tmp_path / "out.parquet", Scripted({"p": "8888"}))
    patient = load_recipe("miniature", [SAMPLES, "verification.max_failed_share=1.0"])
    summary = scripted(plan_labels(patient, [source]), tmp_path / "out.parquet", Scripted({"p": "8888"}))
    assert (summary.timeout_share, summary.histogram) == (1.0, (0, 0, 0, 0, 1))


def test_a_stage_filters_by_measured_labels(tmp_path: Path) -> None:
    """`drop_passes_at_least: 3` of 4 on labels 0 to 4: two problems go."""
    rows = [{"id": f"p{i}", "problem": f"{i}+1", "answer": str(i + 1)} for i in range(5)]
    source = write(tmp_path / "in.jsonl", rows)
    recipe = load_recipe("miniature", [SAMPLES])
    answers = {f"p{i}": [str(i + 1)] * (4 - i) + ["0"] * i for i in range(5)}
    scripted(plan_labels(recipe, [source]), tmp_path / "out.parquet", Scripted(answers))
    assert [labels[LABEL] for labels in problems_of(tmp_path / "out.parquet").values()] == [0, 1, 2, 3, 4]
    trained = load_recipe(
        "miniature",
        [
            SAMPLES,
            "stage1=null",
            f"stage2.data.files=[{tmp_path / 'out.parquet'}]",
            "stage2.data.format=problems",
            "stage2.data.drop_passes_at_least=3",
            "stage2.data.difficulty.others=[]",
            "stage2.data.max_unsolved_share=null",
            "stage2.data.decontamination=null",
            "stage2.prompts_per_step=2",
            "stage2.mini_batch_prompts=2",
        ],
    )
    new = create_run("labelled", trained, artifacts=tmp_path / "artifacts")
    filter_run(new)
    pool = pq.read_table(new.paths.pool)
    # p4 fails all of 4: drop_all_failed; p0 and p1 pass 4 and 3 of 4: drop_passes_at_least
    assert pool["problem_id"].to_pylist() == ["p2", "p3"]
    assert pool["student_failures"].to_pylist() == [2, 3]


@pytest.mark.parametrize("num_samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(num_samples: int) -> None:
    for failures in range(num_samples + 1):
        answers = [0] * failures + [1] * (num_samples - failures)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(failures, num_samples, k) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="lie within the samples"):
        pass_at_k(num_samples + 1, num_samples, 1)
