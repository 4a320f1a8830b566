"""Each objective of the recipe through two real steps: the columns it leaves, and the limits at which a step stops."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from crash.tiny_run import open_tiny, train

from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.step import verify
from kdrl_core.errors import DataError, VerificationError
from kdrl_core.ledger import Run, is_published
from kdrl_core.tables.files import load_metrics
from kdrl_core.types import Verdict, VerdictKind

ONE_STAGE = ["stage1=null", "stage2.steps=2"]


def frames(run: Run, step: int) -> pd.DataFrame:
    """A step's responses, rewards, update and, if there, teacher side by side."""
    names = ["rollouts", "rewards", "update", "teacher"]
    parts = [run.paths.step("stage2", step) / f"{name}.parquet" for name in names]
    tables = [pq.ParquetFile(path).read().to_pandas() for path in parts if path.is_file()]
    joined = pd.concat(tables, axis=1)
    return joined.loc[:, ~joined.columns.duplicated()]


def normalised(values: pd.Series, groups: pd.Series) -> pd.Series:
    grouped = values.groupby(groups, sort=False)
    return (values - grouped.transform("mean")) / (grouped.transform("std") + 1e-6)


@pytest.fixture
def trained(tmp_path: Path, fast_sessions: None, request: pytest.FixtureRequest) -> Run:
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, *request.param])
    train(run)
    return run


@pytest.mark.parametrize("trained", [["stage2.objective=grpo", "stage2.beta=null"]], indirect=True)
def test_grpo_needs_no_teacher(trained: Run) -> None:
    for step in range(2):
        rows = frames(trained, step)
        assert not trained.paths.teacher("stage2", step).exists()
        assert (rows["kd_weight"] == 0.0).all()
        assert rows[["kl_sum", "kl_mean", "log_ratio_sum"]].isna().all().all()
        np.testing.assert_allclose(rows["advantage"], normalised(rows["reward"], rows["prompt_id"]), atol=1e-5)
    assert not any(name.startswith("kd/") for name in load_metrics(trained, "stage2")[0])


@pytest.mark.parametrize("trained", [["stage2.objective=kd_rkl"]], indirect=True)
def test_kd_rkl_has_no_advantages(trained: Run) -> None:
    for step in range(2):
        rows = frames(trained, step)
        assert (rows["advantage"] == 0.0).all()
        assert (rows["kd_weight"] == 1.0).all()
        assert (rows["kl_sum"] > 0.0).all()
    metrics = load_metrics(trained, "stage2")
    assert metrics[0]["loss/policy"] == pytest.approx(0.0)
    assert [row["beta"] for row in metrics] == pytest.approx([0.5, 0.495])
    assert [row["kd/active_frac"] for row in metrics] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("trained", [["stage2.objective=reward_shaping"]], indirect=True)
def test_reward_shaping_turns_log_ratios_into_rewards(trained: Run) -> None:
    for step, beta in ((0, 0.5), (1, 0.495)):
        rows = frames(trained, step)
        log_ratio = [
            float((teacher - student).sum())
            for teacher, student in zip(rows["teacher_logprobs"], rows["rollout_logprobs"], strict=True)
        ]
        shaped = rows["reward"] + beta * np.array(log_ratio)
        np.testing.assert_allclose(rows["advantage"], normalised(shaped, rows["prompt_id"]), rtol=1e-3, atol=1e-4)
        assert (rows["kd_weight"] == 0.0).all()
        assert rows["kl_sum"].notna().all()
    assert load_metrics(trained, "stage2")[0]["beta"] == 0.5


@pytest.mark.parametrize("trained", [["stage2.kd_masking=response"]], indirect=True)
def test_response_masking_distils_on_failed_responses(trained: Run) -> None:
    weights = pd.concat([frames(trained, step) for step in range(2)])
    assert (weights["kd_weight"] == (weights["reward"] == 0.0)).all()
    assert weights["kd_weight"].nunique() == 2
    for step, metrics in enumerate(load_metrics(trained, "stage2")):
        rows = frames(trained, step)
        active = rows[rows["kd_weight"] == 1.0]
        assert metrics["kd/active_frac"] == pytest.approx(active["length"].sum() / rows["length"].sum())
        assert metrics["kd/kl_unmasked"] == pytest.approx(active["kl_sum"].sum() / active["length"].sum(), rel=1e-4)
        assert metrics["kd/kl"] == pytest.approx(active["kl_sum"].sum() / rows["length"].sum(), rel=1e-4)


@pytest.mark.parametrize(
    "trained",
    [["stage2.kd_masking=group", "stage2.prompts_per_step=12", "stage2.mini_batch_prompts=12"]],
    indirect=True,
)
def test_group_masking_distils_where_every_response_failed(trained: Run) -> None:
    for step in range(2):
        rows = frames(trained, step)
        failed = rows.groupby("prompt_id", sort=False)["reward"].transform("max") == 0.0
        assert (rows["kd_weight"] == failed).all()
        assert (rows.loc[failed, "advantage"] == 0.0).all()


@pytest.mark.parametrize("trained", [["stage2.kl_estimator=k3", "stage2.normalize_std=false"]], indirect=True)
def test_k3_and_plain_advantages(trained: Run) -> None:
    rows = frames(trained, 1)
    expected = []
    for teacher, student in zip(rows["teacher_logprobs"], rows["logprobs"], strict=True):
        log_ratio = (teacher - student).astype(np.float64)
        expected.append(float((np.exp(log_ratio) - log_ratio - 1.0).sum()))
    np.testing.assert_allclose(rows["kl_sum"], expected, rtol=1e-3, atol=1e-4)
    grouped = rows.groupby("prompt_id", sort=False)["reward"]
    np.testing.assert_allclose(rows["advantage"], rows["reward"] - grouped.transform("mean"), atol=1e-6)


@pytest.mark.parametrize("trained", [["stage2.kl_estimator=topk", "stage2.topk.k=4"]], indirect=True)
def test_topk_records_the_teachers_best_tokens(trained: Run) -> None:
    rows = frames(trained, 1)
    for ids, logprobs, own, tokens in zip(
        rows["topk_ids"], rows["topk_logprobs"], rows["teacher_logprobs"], rows["token_ids"], strict=True
    ):
        table, values = np.stack(list(ids)), np.stack(list(logprobs))
        assert table.shape == values.shape == (len(tokens), 4)
        assert (np.diff(values, axis=1) <= 0).all()
        assert (np.exp(values).sum(1) <= 1 + 1e-5).all()
        found = table == tokens[:, None]
        np.testing.assert_allclose(values[found], own[found.any(1)], atol=1e-6)
    metrics = load_metrics(trained, "stage2")[1]
    assert metrics["kd/kl"] > 0.0
    assert metrics["kd/kl"] != pytest.approx(rows["kl_sum"].sum() / rows["length"].sum(), rel=1e-2)  # that one is k2


@pytest.mark.parametrize("trained", [["stage2.tis_cap=2.0", "stage2.aggregation=group_mean"]], indirect=True)
def test_importance_weights_and_the_per_group_mean(trained: Run) -> None:
    for step, metrics in enumerate(load_metrics(trained, "stage2")):
        assert metrics["ratio/tis_mean"] == pytest.approx(1.0, abs=1e-4)  # the engine is the trainer, to rounding
        assert metrics["ratio/tis_capped_frac"] == 0.0
        rows = frames(trained, step)
        groups = rows.groupby("prompt_id", sort=False)
        means = groups["kl_sum"].sum() / groups["length"].sum()
        assert metrics["kd/kl"] == pytest.approx(means.mean(), rel=1e-3)


def test_a_stuck_verifier_stops_the_step(tmp_path: Path) -> None:
    """Answers that nobody computes in a fifth of a second: more than a tenth of the verdicts are timeouts."""
    close_sessions()
    problems = [{"problem": f"{a}+{b}", "answer": f"10^{{10^{{10^{{1{a + b}}}}}}}"} for a in range(4) for b in range(4)]
    file = tmp_path / "problems.json"
    file.write_text(json.dumps(problems))
    limits = ["verification.timeout_s=0.2", "reward.require_format=false"]
    data = f"stage2.data={{files: ['{file}'], format: deepscaler, missing_labels: keep, unparsable_answers: keep}}"
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, data, *limits])
    with pytest.raises(VerificationError, match=r"stage2 step 0: .*above verification\.max_failed_share=0\.1; .*Raise"):
        train(run)
    close_sessions()
    assert not is_published(run.paths.rewards("stage2", 0))
    assert is_published(run.paths.rollouts("stage2", 0))


@pytest.mark.usefixtures("fast_sessions")
@pytest.mark.parametrize(("num_failed", "is_refused"), [(1, False), (2, True)])
def test_share_of_failed_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failed: int, is_refused: bool
) -> None:
    """16 responses a step: one failure is 6 %, two are 12.5 %."""
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, "stage2.steps=1"])
    train(run, until=("stage2", 0))
    session = stage_session(run.paths.root, "stage2")

    def verdicts(items: list[tuple[str, str]], **_: object) -> list[Verdict]:
        kinds = [VerdictKind.TIMEOUT] * num_failed + [VerdictKind.WRONG] * (len(items) - num_failed)
        values = {"reward": 0.0, "format_reward": 1.0, "accuracy_reward": 0.0, "extracted": None}
        return [Verdict(kind=kind, reason=f"it was {kind}", **values) for kind in kinds]

    monkeypatch.setattr(session.verifier, "verify_batch", verdicts)
    if not is_refused:
        train(run)
        assert load_metrics(run, "stage2")[0]["verdict/timeout"] == pytest.approx(num_failed / 16)
        return
    with pytest.raises(VerificationError, match=r"2 timeout of 16 verdicts.*first: it was timeout"):
        train(run)
    assert not run.paths.rewards("stage2", 0).exists()
    monkeypatch.undo()
    assert not make(session, verify, 0).reused  # a later try starts from the published responses


def test_pool_smaller_than_a_step(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, "stage2.data.max_problems=3"])
    with pytest.raises(DataError, match=r"stage2: 3 problems are left after filtering, fewer than prompts_per_step=4"):
        filter_run(run)
    assert not run.paths.pool.exists()
    assert not run.paths.filter_report.exists()


def test_filter_is_done_once(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r")
    reports = filter_run(run)
    assert set(reports) == {"stage1", "stage2"}
    before = run.paths.pool.stat().st_mtime_ns
    assert filter_run(run) == {}
    assert run.paths.pool.stat().st_mtime_ns == before
