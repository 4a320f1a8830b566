"""What a finished run's files hold: every arrow with its manifest, and the numbers that follow from others."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from kdrl_core.alarms import load_alarms
from kdrl_core.ledger import Run, derive_seed, is_published, manifest_of, verify_published
from kdrl_core.tables.files import load_metrics
from kdrl_core.tables.schemas import REFERENCE, REWARDS, ROLLOUTS, TEACHER, UPDATE

STEPS = [("stage1", 0), ("stage1", 1), ("stage2", 0), ("stage2", 1), ("stage2", 2), ("stage2", 3)]


def frame(path: Path) -> pd.DataFrame:
    return pq.ParquetFile(path).read().to_pandas()


def manifests(run: Run) -> dict[Path, Path]:
    """Artifact → manifest, of everything published in the run."""
    found = {}
    for path in run.paths.root.rglob("*manifest.json"):
        if path == run.paths.manifest:
            continue
        found[run.paths.root / json.loads(path.read_text())["artifact"]] = path
    return found


def test_every_arrow_is_published(finished: Run) -> None:
    paths = finished.paths
    expected = {paths.pool, paths.filter_report, paths.student, paths.report}
    expected |= {paths.evaluation(label) for label in ("base", "stage1", "stage2", "teacher")}
    for stage, step in STEPS:
        scored = paths.teacher(stage, step) if stage == "stage2" else paths.reference(stage, step)
        expected |= {paths.rollouts(stage, step), scored, paths.rewards(stage, step), paths.update(stage, step)}
    found = manifests(finished)
    assert expected <= set(found)
    assert {path.parent.name for path in set(found) - expected} <= {"stage1", "stage2"}  # the checkpoints
    for path in found:
        verify_published(path)
    assert not list(paths.root.rglob(".tmp-*"))


def test_inputs_are_the_files_that_lie_there(finished: Run) -> None:
    checked = 0
    for path in manifests(finished):
        for name, sha256 in manifest_of(path).inputs.items():
            source = finished.paths.root / name
            if not source.exists():  # a checkpoint beyond the retention
                assert source.parent.parent.name == "checkpoints"
                continue
            assert manifest_of(source).sha256 == sha256, (path, name)
            checked += 1
    assert checked > 40


def test_inputs_of_each_arrow(finished: Run) -> None:
    paths = finished.paths

    def inputs(path: Path) -> set[Path]:
        return {paths.root / name for name in manifest_of(path).inputs}

    for stage, step in STEPS:
        rollouts = paths.rollouts(stage, step)
        scored = paths.teacher(stage, step) if stage == "stage2" else paths.reference(stage, step)
        assert inputs(scored) == inputs(paths.rewards(stage, step)) == {rollouts}
        assert inputs(paths.update(stage, step)) == {rollouts, scored, paths.rewards(stage, step)}
        policy = {paths.checkpoint(stage, step)} if step > 0 else set()
        if (stage, step) == ("stage2", 0):
            policy = {paths.checkpoint("stage1", 2)}
        assert inputs(rollouts) == {paths.pool} | policy
    assert inputs(paths.checkpoint("stage2", 4)) == {paths.update("stage2", 3)}
    assert inputs(paths.evaluation("stage1")) == {paths.checkpoint("stage1", 2)}
    assert inputs(paths.student) == inputs(paths.evaluation("stage2")) == {paths.checkpoint("stage2", 4)}
    assert inputs(paths.evaluation("base")) == inputs(paths.evaluation("teacher")) == set()


@pytest.mark.parametrize(("stage", "step"), STEPS)
def test_files_of_a_step_have_the_schema_and_join(finished: Run, stage: str, step: int) -> None:
    paths = finished.paths
    files = {paths.rollouts: ROLLOUTS, paths.rewards: REWARDS, paths.update: UPDATE}
    files |= {paths.teacher: TEACHER} if stage == "stage2" else {paths.reference: REFERENCE}
    keys = None
    for path, schema in files.items():
        table = pq.ParquetFile(path(stage, step)).read()
        assert table.schema.remove_metadata().equals(schema.remove_metadata())
        for field in schema:
            assert table.schema.field(field.name).metadata == field.metadata
        these = list(zip(table["prompt_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
        assert keys in (None, these)
        keys = these
    assert keys is not None
    assert [sample for _, sample in keys] == [0, 1, 2, 3] * 4
    assert len({prompt for prompt, _ in keys}) == 4


@pytest.mark.parametrize(("stage", "step"), STEPS)
def test_rollouts_of_a_step(finished: Run, stage: str, step: int) -> None:
    rollouts = frame(finished.paths.rollouts(stage, step))
    assert (rollouts["policy_version"] == step).all()
    assert (rollouts["engine"] == "transformers").all()
    assert (rollouts["length"] == rollouts["token_ids"].map(len)).all()
    assert (rollouts["length"] == rollouts["rollout_logprobs"].map(len)).all()
    longest = finished.recipe.stage(stage).max_response_tokens
    assert (rollouts.loc[rollouts["finish_reason"] == "length", "length"] == longest).all()
    assert (rollouts.groupby("prompt_id")["prompt"].nunique() == 1).all()
    seeds = [
        derive_seed(0, stage, step, prompt, sample)
        for prompt, sample in zip(rollouts["prompt_id"], rollouts["sample"], strict=True)
    ]
    assert rollouts["seed"].tolist() == seeds
    pool = frame(finished.paths.pool)
    answers = pool[pool["stage"] == stage].set_index("problem_id")["answer"]
    assert (rollouts["ground_truth"] == rollouts["prompt_id"].map(answers)).all()


def test_no_prompt_comes_back_before_the_pool_was_gone_through(finished: Run) -> None:
    drawn = [i for step in range(4) for i in frame(finished.paths.rollouts("stage2", step))["prompt_id"].unique()]
    assert len(set(drawn)) == 16


@pytest.mark.parametrize(("stage", "step"), STEPS)
def test_advantages_are_those_of_the_rewards(finished: Run, stage: str, step: int) -> None:
    rewards = frame(finished.paths.rewards(stage, step))
    update = frame(finished.paths.update(stage, step))
    groups = rewards.groupby("prompt_id", sort=False)["reward"]
    expected = (rewards["reward"] - groups.transform("mean")) / (groups.transform("std") + 1e-6)
    np.testing.assert_allclose(update["advantage"], expected, atol=1e-5)
    assert (rewards["reward"] == rewards["format_reward"] * rewards["accuracy_reward"]).all()
    assert (update["kd_weight"] == (1.0 if stage == "stage2" else 0.0)).all()


@pytest.mark.parametrize("step", range(4))
def test_kl_follows_from_the_logprobs(finished: Run, step: int) -> None:
    update = frame(finished.paths.update("stage2", step))
    teacher = frame(finished.paths.teacher("stage2", step))["teacher_logprobs"]
    log_ratio = [t - s for t, s in zip(teacher, update["logprobs"], strict=True)]
    np.testing.assert_allclose(update["kl_sum"], [float((0.5 * r * r).sum()) for r in log_ratio], rtol=1e-4)
    np.testing.assert_allclose(update["kl_mean"], [float((0.5 * r * r).mean()) for r in log_ratio], rtol=1e-4)
    np.testing.assert_allclose(update["log_ratio_sum"], [float(r.sum()) for r in log_ratio], rtol=1e-4, atol=1e-5)
    metrics = load_metrics(finished, "stage2")[step]
    kl = np.concatenate([0.5 * r * r for r in log_ratio])
    assert metrics["kd/kl_unmasked"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert metrics["kd/kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert metrics["kd/kl_sampled"] == pytest.approx(-float(np.concatenate(log_ratio).mean()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("stage", "step"), STEPS)
def test_entropies_are_there_for_every_token_and_their_mean_is_the_metric(finished: Run, stage: str, step: int) -> None:
    update = frame(finished.paths.update(stage, step))
    entropies = np.concatenate(update["entropies"])
    assert update["entropies"].map(len).equals(update["logprobs"].map(len))
    assert (entropies >= -1e-6).all()
    assert load_metrics(finished, stage)[step]["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-5)


def test_alarms_of_the_steps_are_kept(finished: Run) -> None:
    """The recipe of these tests tells of every step in which a tenth of the responses is cut, unless the last did."""
    raised = {stage: [alarm.step for alarm in load_alarms(finished, stage)] for stage in ("stage1", "stage2")}
    cut = {
        stage: [row["response/clip_ratio"] > 0.1 for row in load_metrics(finished, stage)]
        for stage in ("stage1", "stage2")
    }
    expected = {
        stage: [step for step, is_cut in enumerate(steps) if is_cut and (step == 0 or not steps[step - 1])]
        for stage, steps in cut.items()
    }
    assert raised == expected
    assert any(raised.values())


def test_stage_without_teacher_has_no_kl(finished: Run) -> None:
    update = frame(finished.paths.update("stage1", 0))
    assert update[["kl_sum", "kl_mean", "log_ratio_sum"]].isna().all().all()
    assert not any(name.startswith("kd/") for name in load_metrics(finished, "stage1")[0])


def test_reference_is_the_initial_policy(finished: Run) -> None:
    """At step 0 they are the same model, so the penalty is 0; later it is not."""
    update = frame(finished.paths.update("stage1", 0))
    reference = frame(finished.paths.reference("stage1", 0))
    np.testing.assert_allclose(
        np.concatenate(update["logprobs"]), np.concatenate(reference["ref_logprobs"]), rtol=1e-5, atol=1e-5
    )
    first, second = load_metrics(finished, "stage1")
    assert first["ref/kl"] == pytest.approx(0.0, abs=1e-9)
    assert second["ref/kl"] > 1e-9


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_metrics_have_a_row_per_step(finished: Run, stage: str) -> None:
    config = finished.recipe.stage(stage)
    rows = load_metrics(finished, stage)
    assert [row["step"] for row in rows] == list(range(config.steps))
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    rates = [config.learning_rate * min(1.0, (k + 1) / (config.warmup_steps + 1)) for k in range(config.steps)]
    assert [row["optim/learning_rate"] for row in rows] == pytest.approx(rates)
    if config.beta is not None:
        init, decay, minimum = config.beta.init, config.beta.decay, config.beta.minimum
        assert [row["beta"] for row in rows] == pytest.approx([max(init - decay * k, minimum) for k in range(4)])
    else:
        assert [row["beta"] for row in rows] == [0.0] * config.steps
    for step, row in enumerate(rows):
        rollouts, rewards = frame(finished.paths.rollouts(stage, step)), frame(finished.paths.rewards(stage, step))
        assert row["reward/mean"] == pytest.approx(rewards["reward"].mean())
        assert row["response/length_mean"] == pytest.approx(rollouts["length"].mean())
        assert row["engine/logprob_gap_max"] < 1e-4  # fresh weights in the engine, every step
        assert row["time/rollout_s"] > 0.0


def test_policy_moves_between_steps(finished: Run) -> None:
    weights = [manifest_of(finished.paths.checkpoint("stage2", step)) for step in (3, 4)]
    hashes = [manifest.files["model.safetensors"]["sha256"] for manifest in weights if manifest.files]
    assert len(set(hashes)) == 2


def test_checkpoints_are_model_directories_with_state(finished: Run) -> None:
    for stage, step in (("stage1", 2), ("stage2", 4)):
        names = {file.name for file in finished.paths.checkpoint(stage, step).iterdir()}
        assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "trainer"}
        assert is_published(finished.paths.checkpoint(stage, step))


def test_evaluations_agree_with_their_responses(finished: Run) -> None:
    for label in ("base", "stage1", "stage2", "teacher"):
        path = finished.paths.evaluation(label)
        results: dict[str, Any] = json.loads((path / "results.json").read_text())
        responses = frame(path / "responses.parquet")
        assert results["label"] == label
        assert set(results["benchmarks"]) == {"validation", "test", "hard"}
        for name, result in results["benchmarks"].items():
            rows = responses[responses["benchmark"] == name]
            assert (result["num_problems"], result["num_samples"], len(rows)) == (6, 2, 12)
            assert result["accuracy"] == pytest.approx(rows["accuracy_reward"].mean())
            assert 0.0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1.0
            assert result["length_mean"] == pytest.approx(rows["length"].mean())
            assert result["clip_ratio"] == pytest.approx((rows["finish_reason"] == "length").mean())
