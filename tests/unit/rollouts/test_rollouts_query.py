"""RolloutStore: pages, records, groups, histories and steps of runs that are whole, going on, damaged or of SFT."""

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rollout_runs import (
    GROUP_SIZE,
    KL_SUMS,
    LENGTHS,
    NUM_ROWS,
    PROMPTS,
    make_run,
    part_path,
    publish,
    step_table,
    write_step,
)

from kdrl_core.config import load_recipe
from kdrl_core.errors import DamagedArtifactError, DataError, RunError
from kdrl_core.ledger import Run, create_run, run_lock
from kdrl_core.look.rollouts import database
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.tables.schemas import UPDATE


def keys(rows: list[dict[str, Any]]) -> list[tuple[int, str, int]]:
    return [(row["step"], row["prompt_id"], row["sample"]) for row in rows]


def test_runs_say_what_they_hold(store: RolloutStore, run: Run) -> None:
    (info,) = store.runs()
    assert (info.name, info.path, info.stages) == ("small", run.paths.root, ("stage2",))
    assert (info.num_steps, info.num_rollouts, info.is_running) == ({"stage2": 3}, 3 * NUM_ROWS, False)
    with run_lock(run.paths.lock):
        assert store.runs()[0].is_running


def test_a_step_in_numbers_golden(whole: RolloutStore) -> None:
    row = whole.steps()[1]
    assert (row["run"], row["stage"], row["step"], row["num_rollouts"], row["num_groups"]) == (
        "small",
        "stage2",
        1,
        6,
        3,
    )
    expected = {
        "reward_mean": 2 / 6,
        "length_mean": 84 / 6,
        "length_p05": 5.0,  # a quarter of the way from 4 to 8
        "length_p50": 14.0,
        "length_p95": 23.0,
        "length_max": 24.0,
        "clip_ratio": 1 / 6,
        "repetition_mean": 0.25,
        "repetition_overlong": 0.5,
        "kl_mean": 11.6 / 84,  # over tokens, not over responses
        "entropy": 1.5,  # the stage's metric
        "verdict_correct": 2 / 6,
        "verdict_wrong": 2 / 6,
        "verdict_malformed": 1 / 6,
        "verdict_no_answer": 1 / 6,
        "verdict_timeout": 0.0,
        "reward_std": (((4 * (1 / 3) ** 2) + 2 * (2 / 3) ** 2) / 5) ** 0.5,
        "num_groups_all_wrong": 1,  # q-c
        "num_groups_all_right": 0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row["metrics"] == {"entropy": 1.5, "loss/total": 1.0, "time/rollout_s": 2.5, "time/update_s": 1.5}
    assert len(whole.steps(stage="stage1")) == 0


def test_pages_go_through_all_rows_in_order(whole: RolloutStore) -> None:
    rows = [row for offset in range(0, 20, 4) for row in whole.page(limit=4, offset=offset).rows]
    every = [(step, prompt, sample) for step in range(3) for prompt in PROMPTS for sample in range(GROUP_SIZE)]
    assert keys(rows) == every
    assert whole.page(limit=4, offset=100).rows == []
    newest = whole.page(descending=True, limit=1)
    assert (newest.total, keys(newest.rows)) == (18, [(2, "q-a", 0)])
    assert "row" not in newest.rows[0]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("where", [RolloutFilter(), RolloutFilter(verdicts=("wrong",)), RolloutFilter(text="number 1")])
def test_pages_by_step_are_stretches_of_the_whole(artifacts: Path, where: RolloutFilter, descending: bool) -> None:
    for name in ("one", "two"):
        run = make_run(artifacts, name, steps=2)
        write_step(run, "stage1", 0)
        write_step(run, "stage1", 1)
    with RolloutStore.open(["one", "two"]) as store:
        whole = store.page(where, limit=1000, descending=descending)
        assert len(whole.rows) == whole.total > 10
        order = [(row["run"], row["stage"], row["step"]) for row in whole.rows]
        assert order == sorted(sorted(order, key=lambda key: key[1:], reverse=descending), key=lambda key: key[0])
        for limit in (1, 7):
            for offset in range(0, whole.total + 1, 5):
                page = store.page(where, limit=limit, offset=offset, descending=descending)
                assert (page.total, page.rows) == (whole.total, whole.rows[offset : offset + limit])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (RolloutFilter(step_min=1, step_max=1), 6),
        (RolloutFilter(run="small", stage="stage2"), 18),
        (RolloutFilter(run="other"), 0),
        (RolloutFilter(prompt_id="q-b"), 6),
        (RolloutFilter(prompt_id="q-b", sample=1, step_max=1), 2),
        (RolloutFilter(verdicts=("wrong", "malformed")), 9),
        (RolloutFilter(verdicts=()), 0),
        (RolloutFilter(finish_reason="length"), 3),
        (RolloutFilter(reward_min=0.5), 6),
        (RolloutFilter(reward_max=0.5), 12),
        (RolloutFilter(length_min=12, length_max=16), 6),
        (RolloutFilter(kl_min=0.15), 6),
        (RolloutFilter(kl_max=0.15), 12),
        (RolloutFilter(text="STEP 2 Q-B"), 2),
        (RolloutFilter(text="what is q-c"), 6),  # the prompt
        (RolloutFilter(text="number 1", step_min=2, verdicts=("wrong",)), 2),
        (RolloutFilter(text="nowhere"), 0),
        (RolloutFilter(text="%"), 0),  # no pattern
        (RolloutFilter(text="_"), 0),
        (RolloutFilter(text="'"), 0),
    ],
)
def test_filters(whole: RolloutStore, where: RolloutFilter, expected: int) -> None:
    page = whole.page(where)
    assert (page.total, len(page.rows)) == (expected, expected)
    assert whole.page(where, limit=0).total == expected


def test_text_search_is_asked_again_for_the_next_page(whole: RolloutStore) -> None:
    where = RolloutFilter(text="number 1")
    first, second = whole.page(where, limit=5), whole.page(where, limit=5, offset=5)
    assert (first.total, second.total) == (9, 9)
    assert len({*keys(first.rows), *keys(second.rows)}) == 9


def test_sorting(whole: RolloutStore) -> None:
    rows = whole.page(RolloutFilter(step_max=0), sort="kl_mean", descending=True).rows
    means = [kl / length for kl, length in zip(KL_SUMS, LENGTHS, strict=True)]
    assert [row["kl_mean"] for row in rows] == pytest.approx(sorted(means, reverse=True))
    assert [row["length"] for row in whole.page(sort="length", limit=4).rows] == [4, 4, 4, 8]
    for column, hint in (("kl_men", "did you mean 'kl_mean'"), ("length; drop", "columns: run, stage")):
        with pytest.raises(DataError, match=hint):
            whole.page(sort=column)
    with pytest.raises(DataError, match="must not be negative"):
        whole.page(limit=-1)


def test_what_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="no verdict 'worng', did you mean 'wrong'"):
        RolloutFilter(verdicts=("worng",))
    with pytest.raises(DataError, match="no finish reason 'eos'"):
        RolloutFilter(finish_reason="eos")


def test_a_record_is_the_join_of_its_files(store: RolloutStore, run: Run) -> None:
    record = store.record(run="small", stage="stage2", step=1, prompt_id="q-b", sample=1)
    joined: dict[str, Any] = {}
    for part in ("rollouts", "teacher", "rewards", "update"):
        joined |= pq.ParquetFile(part_path(run.paths, "stage2", 1, part)).read().to_pylist()[3]
    assert {name: record[name] for name in joined} == joined
    assert (record["rollout_s"], record["update_s"], record["verify_s"]) == (2.5, 1.5, None)
    assert record["seed"] == 2**63 + 3  # beyond int64
    assert set(record) == {*RECORD.names, "tokens"}
    assert len(record["tokens"]) == record["length"] == 16
    assert record["tokens"][-1] == "<|end|>"


def test_a_record_that_is_not_there(whole: RolloutStore) -> None:
    for changed, told in (
        ({"sample": 9}, "no sample 9 of prompt 'q-a'"),
        ({"prompt_id": "q-z"}, "no sample 0 of prompt 'q-z'"),
        ({"step": 7}, "no rollouts of stage2 step 7; it has steps 0 to 2"),
        ({"stage": "stage1"}, "stages with rollouts: stage2"),
        ({"run": "other"}, "runs that are open: small"),
    ):
        key: dict[str, Any] = {"run": "small", "stage": "stage2", "step": 0, "prompt_id": "q-a", "sample": 0} | changed
        with pytest.raises(DataError, match=told):
            whole.record(**key)
    with pytest.raises(DataError, match="no prompt 'q-z'"):
        whole.group(run="small", stage="stage2", step=0, prompt_id="q-z")


def test_a_group_is_all_responses_to_a_prompt(whole: RolloutStore) -> None:
    group = whole.group(run="small", stage="stage2", step=2, prompt_id="q-c")
    assert [(one["sample"], one["response"]) for one in group] == [(n, f"step 2 q-c number {n}") for n in (0, 1)]


def test_the_history_of_a_prompt(whole: RolloutStore) -> None:
    history = whole.prompt_history(run="small", prompt_id="q-b")
    assert [row["step"] for row in history] == [0, 1, 2]
    assert history[0]["verdicts"] == {"correct": 1, "malformed": 1}
    assert (history[0]["reward_mean"], history[0]["length_min"], history[0]["length_max"]) == (0.5, 12, 16)
    assert history[0]["kl_mean"] == pytest.approx((2.4 + 1.6) / 28)
    assert whole.prompt_history(run="small", prompt_id="q-z") == []


def test_a_run_that_goes_on(store: RolloutStore, run: Run) -> None:
    assert not store.refresh()
    write_step(run, "stage2", 3, until="rollouts")
    assert store.refresh()
    row = store.page(RolloutFilter(step_min=3)).rows[0]
    assert (row["reward"], row["verdict"], row["length"]) == (None, None, 4)
    record = store.record(run="small", stage="stage2", step=3, prompt_id="q-a", sample=0)
    assert (record["reward"], record["teacher_logprobs"], record["advantage"]) == (None, None, None)
    assert store.steps()[-1]["reward_mean"] is None
    for part in ("teacher", "rewards"):
        publish(run, "stage2", 3, part, step_table(part, 3))
    assert store.refresh()
    assert store.steps()[-1]["reward_mean"] == pytest.approx(1 / 3)
    assert store.steps()[-1]["kl_mean"] is None
    publish(run, "stage2", 3, "update", step_table("update", 3))
    assert store.refresh()
    assert not store.refresh()
    assert store.steps()[-1]["kl_mean"] == pytest.approx(11.6 / 84)
    assert store.page().total == 24
    assert store.sql("select count(*) n, count(teacher_logprobs) t from rollouts").to_pylist() == [{"n": 24, "t": 24}]


def test_metrics_that_come_later_are_news(run: Run) -> None:
    path = run.paths.metrics("stage2")
    content = path.read_bytes()
    path.unlink()
    with RolloutStore.open(["small"]) as store:
        assert store.steps()[0]["entropy"] is None
        path.write_bytes(content)
        assert store.refresh()
        assert not store.refresh()
        assert store.steps()[0]["entropy"] == 0.5
        path.write_bytes(b"torn")  # kdrl resume writes them anew
        assert store.refresh()
        assert store.steps()[0]["metrics"] == {"time/rollout_s": 2.5, "time/update_s": 1.5}


def test_grpo_has_no_teacher(artifacts: Path) -> None:
    run = make_run(artifacts, "grpo", steps=0)
    nothing = {name: pa.nulls(NUM_ROWS, pa.float32()) for name in ("kl_sum", "kl_mean", "log_ratio_sum")}
    write_step(run, "stage1", 0, until="rewards")
    update = step_table("update", 0)
    publish(run, "stage1", 0, "update", pa.table({**columns(update), **nothing}, schema=update.schema))
    with RolloutStore.open(["grpo"]) as store:
        assert store.steps()[0]["kl_mean"] is None
        assert store.page(RolloutFilter(kl_min=0.0)).total == 0
        record = store.record(run="grpo", stage="stage1", step=0, prompt_id="q-a", sample=0)
        assert (record["teacher_logprobs"], record["kl_mean"], record["advantage"]) == (None, None, pytest.approx(0.7))


def columns(table: pa.Table) -> dict[str, Any]:
    return dict(zip(table.column_names, table.columns, strict=True))


def test_entropies_are_read_where_they_are_recorded(run: Run) -> None:
    entropies = [[0.5] * (length - 1) + [1.5] for length in LENGTHS]
    table = step_table("update", 3).append_column("entropies", pa.array(entropies, pa.list_(pa.float32())))
    write_step(run, "stage2", 3, until="rewards")
    publish(run, "stage2", 3, "update", table)
    with RolloutStore.open(["small"]) as store:
        record = store.record(run="small", stage="stage2", step=3, prompt_id="q-a", sample=0)
        assert record["entropies"] == entropies[0]
        assert record["entropy_mean"] == pytest.approx((3 * 0.5 + 1.5) / 4)
        assert store.page(RolloutFilter(step_min=3, prompt_id="q-a")).rows[0]["entropy_mean"] == pytest.approx(0.75)
        found = store.sql("select step, count(entropies) n, min(entropy_mean) e from rollouts group by 1 order by 1")
        assert found["n"].to_pylist() == [0, 0, 0, 6]
        assert found["e"].to_pylist()[2:] == [None, pytest.approx(0.5 + 1 / 24)]


def test_an_sft_stage_has_no_rollouts(artifacts: Path) -> None:
    run = make_run(artifacts, "sft", steps=0)
    publish(run, "stage1", 0, "update", step_table("update", 0))
    with RolloutStore.open(["sft"]) as store:
        assert (store.damaged, store.steps(), store.page().total) == ([], [], 0)
        assert store.runs()[0].num_rollouts == 0
        assert store.sql("select count(*) n from rollouts").to_pylist() == [{"n": 0}]
        assert store.sql("select * from prompts").num_rows == 0


def test_a_run_without_any_step(artifacts: Path) -> None:
    create_run("new", load_recipe("miniature"), artifacts=artifacts)
    with RolloutStore.open(["new"]) as store:
        assert (store.steps(), store.page().rows, store.sql("from steps").num_rows) == ([], [], 0)


@pytest.mark.parametrize("content", [b"", b"PAR1 not really PAR1", None])
def test_damaged_rewards_are_named_and_the_rest_is_shown(run: Run, content: bytes | None) -> None:
    path = part_path(run.paths, "stage2", 1, "rewards")
    if content is None:  # whole Parquet, but not what was published
        pq.write_table(step_table("rewards", 1).slice(0, 6).replace_schema_metadata(None), path)
    else:
        path.write_bytes(content)
    with RolloutStore.open(["small"]) as store:
        (damaged,) = store.damaged
        assert (damaged.path, store.page().total) == (path, 18)
        assert "are not the" in damaged.problem
        assert [row["reward_mean"] for row in store.steps()] == [pytest.approx(1 / 3), None, pytest.approx(1 / 3)]
        record = store.record(run="small", stage="stage2", step=1, prompt_id="q-a", sample=0)
        assert (record["reward"], record["kl_sum"]) == (None, pytest.approx(0.4))


def test_damaged_rollouts_take_their_step_with_them(run: Run) -> None:
    path = part_path(run.paths, "stage2", 1, "rollouts")
    path.write_bytes(path.read_bytes()[:-7])
    part_path(run.paths, "stage2", 2, "rollouts").unlink()
    with RolloutStore.open(["small"]) as store:
        assert {file.path.parent.name: file.problem for file in store.damaged}["step=000002"] == "is missing"
        assert len(store.damaged) == 2
        assert {row["step"] for row in store.page().rows} == {0}
        assert [row["step"] for row in store.steps()] == [0]
        assert store.sql("select distinct step from rollouts where response is not null")["step"].to_pylist() == [0]


def test_a_file_that_is_damaged_after_it_was_indexed(store: RolloutStore, run: Run) -> None:
    path = part_path(run.paths, "stage2", 1, "teacher")
    path.write_bytes(b"torn")
    record = store.record(run="small", stage="stage2", step=1, prompt_id="q-a", sample=0)
    assert (record["teacher_logprobs"], record["reward"]) == (None, 1.0)
    assert [file.path for file in store.damaged] == [path]
    found = store.sql("select step, count(teacher_logprobs) n from rollouts group by 1 order by 1")
    assert found["n"].to_pylist() == [6, 0, 6]
    part_path(run.paths, "stage2", 2, "rollouts").write_bytes(b"torn")
    with pytest.raises(DamagedArtifactError, match=r"step=000002/rollouts\.parquet is damaged"):
        store.record(run="small", stage="stage2", step=2, prompt_id="q-a", sample=0)
    assert store.page(RolloutFilter(text="number")).total == 12  # looked again, and left it out


def test_another_schema_version_is_named_with_the_remedy(run: Run) -> None:
    table = step_table("rewards", 1)
    path = part_path(run.paths, "stage2", 1, "rewards")
    path.with_name("_rewards.manifest.json").unlink()
    pq.write_table(table.replace_schema_metadata({b"kdrl.schema_version": b"9"}), path)
    with RolloutStore.open(["small"]) as store:
        assert [file.problem for file in store.damaged] == [
            "has schema version 9, and this kdrl reads version 1; install the kdrl that wrote it, "
            "or read it with DuckDB or pandas"
        ]
        assert store.page().total == 18


def test_rows_in_another_order_are_not_joined(run: Run) -> None:
    path = part_path(run.paths, "stage2", 0, "rewards")
    path.with_name("_rewards.manifest.json").unlink()
    pq.write_table(step_table("rewards", 0).take([1, 0, 2, 3, 4, 5]), path)
    with RolloutStore.open(["small"]) as store:
        assert [file.problem for file in store.damaged] == ["its rows are not those of rollouts.parquet"]


def test_unknown_runs_are_told_with_the_nearest_name(run: Run, artifacts: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run 'smal' in .*, did you mean 'small'\?; runs here: small"):
        RolloutStore.open(["smal"])
    with pytest.raises(RunError, match="no such folder"):
        RolloutStore.open([str(tmp_path / "nowhere")])
    with pytest.raises(RunError, match="is not a run: it has no folder rollouts"):
        RolloutStore.open([tmp_path])
    with pytest.raises(RunError, match="is not allowed"):
        RolloutStore.open(["a;b"])
    with pytest.raises(RunError, match="no run is named"):
        RolloutStore.open([])


def test_runs_are_opened_by_name_and_by_folder(run: Run, tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere", "small", steps=1)
    elsewhere = tmp_path / "elsewhere" / "runs" / "small"
    with RolloutStore.open(["small", run.paths.root, str(elsewhere)]) as store:
        assert [info.name for info in store.runs()] == ["artifacts/runs/small", "elsewhere/runs/small"]
        assert store.page().total == 24


def test_two_runs_side_by_side(run: Run, artifacts: Path) -> None:
    make_run(artifacts, "other", steps=1)
    with RolloutStore.open(["small", "other"]) as store:
        assert [info.name for info in store.runs()] == ["small", "other"]
        assert store.page(RolloutFilter(run="other")).total == 6
        found = store.sql("select run, count(*) n, count(response) r from rollouts group by run order by run")
        assert found.to_pylist() == [{"run": "other", "n": 6, "r": 6}, {"run": "small", "n": 18, "r": 18}]
        assert store.record(run="other", stage="stage2", step=0, prompt_id="q-a", sample=0)["run"] == "other"


def test_a_question_that_needs_too_much_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(database._CONFINED, "memory_limit", "1MB")
    with RolloutStore.open(["small"]) as store, pytest.raises(DataError, match="choose fewer steps"):
        store.aggregate(RolloutFilter(), "select list(i) as many from rows, range(10000000) as numbers(i)")


def test_hostile_texts_come_back_as_they_are(artifacts: Path) -> None:
    texts = ["<script>alert(1)</script>", "\x1b[2J\x00\x07", "' or 1=1 --", "𝔘😀\u202e", "", "a" * 100_000]
    run = make_run(artifacts, "hostile", steps=0)
    write_step(run, "stage2", 0, response=texts)
    with RolloutStore.open(["hostile"]) as store:
        assert [row["response_preview"] for row in store.page().rows] == [text[:200] for text in texts]
        assert store.record(run="hostile", stage="stage2", step=0, prompt_id="q-a", sample=1)["response"] == texts[1]
        assert [store.page(RolloutFilter(text=text)).total for text in texts[:4]] == [1, 1, 1, 1]


def test_folders_with_odd_names(tmp_path: Path) -> None:
    root = tmp_path / "it's [odd] *=1"
    make_run(root, "small", steps=2)
    with RolloutStore.open([root / "runs" / "small"]) as store:
        assert store.page(RolloutFilter(text="step 1")).total == 6
        assert store.sql("select count(response) n from rollouts").to_pylist() == [{"n": 12}]


def test_numbers_that_are_none_are_none(artifacts: Path) -> None:
    run = make_run(artifacts, "nan", steps=0)
    write_step(run, "stage2", 0, until="rewards")
    table = step_table("update", 0)
    position, field = table.column_names.index("kl_mean"), UPDATE.field("kl_mean")
    broken = table.set_column(position, field, pa.array([float("nan")] * NUM_ROWS, pa.float32()))
    publish(run, "stage2", 0, "update", broken)
    with RolloutStore.open(["nan"]) as store:
        assert store.page().rows[0]["kl_mean"] is None


def test_several_threads_share_a_store(store: RolloutStore, run: Run) -> None:
    failures: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(10):
                assert store.page(RolloutFilter(text="number 1"), limit=2).total % 3 == 0
                assert store.sql("select count(*) n from rollouts").to_pylist()[0]["n"] % 6 == 0
                store.record(run="small", stage="stage2", step=0, prompt_id="q-a", sample=0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(3, 7):
        write_step(run, "stage2", step)
        store.refresh()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.page().total == 42
