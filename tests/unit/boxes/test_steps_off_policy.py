"""DAPO's fields through real steps: several optimiser steps on the responses of one, and cut responses left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash.tiny_run import differing, open_tiny, rows, train

from kdrl_core.boxes.session import stage_session
from kdrl_core.config import config_hash, load_recipe
from kdrl_core.errors import EngineError, RunError
from kdrl_core.ledger import Run
from kdrl_core.objectives import Objective
from kdrl_core.tables.files import load_metrics
from kdrl_core.training.protocols import UpdateBatch
from kdrl_core.training.torch_trainer import refuse_not_finite, totals_of
from kdrl_core.types import ScoreRequest

pytestmark = pytest.mark.usefixtures("fast_sessions")

FIELDS = [
    "stage1=null",
    "stage2.steps=3",
    "stage2.mini_batch_prompts=2",  # of 4: two optimiser steps
    "stage2.clip_low=0.2",
    "stage2.clip_high=0.28",
    "stage2.overlong_filtering=true",
    "stage2.warmup_steps=3",
    "stage2.learning_rate=1e-3",
    "stage2.checkpoint.every=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_tiny(tmp_path_factory.mktemp("dapo"), "whole", FIELDS)
    train(run)
    return run


def test_a_step_makes_several_optimiser_steps(trained: Run) -> None:
    state = json.loads((trained.paths.checkpoint("stage2", 3) / "trainer" / "state.json").read_text())
    assert state["step"] == 6
    metrics = load_metrics(trained, "stage2")
    assert [row["optim/learning_rate"] for row in metrics] == [0.5e-3, 1e-3, 1e-3]  # 2/4, 4/4, 4/4 of the warm-up
    assert [row["beta"] for row in metrics] == pytest.approx([0.5, 0.495, 0.49])  # of the step
    # All responses of step 0's first half are cut: its optimiser step has gradient 0, so the policy has not moved.
    assert [row["finish_reason"] for row in rows(trained.paths.rollouts("stage2", 0))[:8]] == ["length"] * 8
    assert (metrics[0]["ratio/max"], metrics[0]["ratio/mean"]) == (1.0, 1.0)
    assert all(row["ratio/max"] > 1.1 > row["ratio/mean"] > 0.9 for row in metrics[1:])


def test_what_is_recorded_is_of_the_policy_that_sampled(trained: Run) -> None:
    """Also for responses that are trained on after the policy has moved; the engine samples with its logprobs."""
    for step in range(3):
        own, sampled = (
            np.concatenate([row[name] for row in rows(getattr(trained.paths, kind)("stage2", step))])  # type: ignore[arg-type]
            for kind, name in (("update", "logprobs"), ("rollouts", "rollout_logprobs"))
        )
        np.testing.assert_allclose(own, sampled, atol=1e-4)
    assert max(row["engine/logprob_gap_max"] for row in load_metrics(trained, "stage2")) < 1e-4


def test_cut_responses_have_no_part_in_the_loss(trained: Run) -> None:
    found = 0
    for step, metrics in enumerate(load_metrics(trained, "stage2")):
        sampled, update = rows(trained.paths.rollouts("stage2", step)), rows(trained.paths.update("stage2", step))
        is_cut = np.array([row["finish_reason"] == "length" for row in sampled])
        weights = np.array([row["kd_weight"] for row in update])
        lengths = np.array([row["length"] for row in sampled])
        assert (weights == ~is_cut).all()
        assert not any(row["advantage"] for row, cut in zip(update, is_cut, strict=True) if cut)
        assert metrics["kd/active_frac"] == pytest.approx(1.0)  # of the tokens that count
        assert metrics["response/clip_ratio"] == pytest.approx(is_cut.mean())
        assert len(lengths) == 16
        found += is_cut.sum()
    assert found > 0


@pytest.mark.parametrize("until", [1, 2])
def test_a_resumed_run_ends_in_the_same_bytes(trained: Run, tmp_path: Path, until: int) -> None:
    """Step 1 is replayed from its rollouts where the run stopped before its checkpoint."""
    run = open_tiny(tmp_path, "stopped", FIELDS)
    train(run, until=("stage2", until))
    train(open_tiny(tmp_path, "stopped", FIELDS))
    assert differing(run, trained) == []


def test_a_step_that_failed_between_its_optimiser_steps_is_not_gone_on_with(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", FIELDS)
    train(run, until=("stage2", 0))
    session = stage_session(run.paths.root, "stage2")
    session.trainer_at(0)._step = 1  # type: ignore[attr-defined]
    told = "stage2 is at step 0 after 1 of its 2 optimiser steps, but step 0 was asked for; resume the run with"
    with pytest.raises(RunError, match=told):
        session.trainer_at(0)


def test_a_step_of_cut_responses_alone_has_no_metrics_of_the_loss(tmp_path: Path) -> None:
    fields = [*FIELDS, "stage2.max_response_tokens=1", "alarms.clip_ratio=null", "stage2.steps=4"]
    train(run := open_tiny(tmp_path, "cut", fields))
    found = load_metrics(run, "stage2")
    assert {row["response/clip_ratio"] == 1.0 for row in found} == {True, False}
    for row in found:
        is_cut = row["response/clip_ratio"] == 1.0
        of_loss = [name for name in row if name.startswith(("loss/", "kd/", "ratio/")) or name == "entropy"]
        assert [row[name] is None for name in of_loss] == [is_cut] * len(of_loss), row["step"]
        assert (row["optim/grad_norm"] == 0.0) is is_cut


def test_groups_that_are_left_out_whole_are_not_counted() -> None:
    sequences = [ScoreRequest(prompt_token_ids=[1], token_ids=[2] * length) for length in (3, 4, 5, 6)]
    objective = Objective(kind="grpo", aggregation="group_mean", group_size=2)
    signals: dict[str, Any] = {
        "sequences": sequences,
        "objective": objective,
        "advantages": [0.0] * 4,
        "kd_weights": [0.0] * 4,
    }
    for mask, groups, tokens in (
        (None, 2.0, [7, 7, 11, 11]),
        ([1.0, 1.0, 0.0, 0.0], 1.0, [7, 7, 0, 0]),
        ([1.0, 0.0, 0.0, 1.0], 2.0, [3, 3, 6, 6]),
        ([0.0] * 4, 1.0, [0] * 4),
    ):
        totals = totals_of(UpdateBatch(**signals, loss_mask=mask))
        assert (totals.num_groups, totals.group_tokens) == (groups, tokens)


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        (
            {"loss/total": float("nan"), "term/mine": float("nan")},
            "term/mine or gradient norm 1.0 .*; correct term/mine",
        ),
        ({"loss/total": float("inf")}, "loss inf or gradient norm 1.0 is not finite; training has diverged, lower"),
    ],
)
def test_what_is_not_finite_is_named(metrics: dict[str, float], told: str) -> None:
    with pytest.raises(EngineError, match=told):
        refuse_not_finite(7, metrics, 1.0)


def test_the_fields_are_off_and_do_not_count_until_they_are_set() -> None:
    plain = load_recipe("miniature")
    stage = plain.stage("stage2")
    assert (stage.updates_per_step, stage.overlong_filtering) == (1, False)
    neutral = load_recipe("miniature", ["stage2.overlong_filtering=false"])
    assert config_hash(neutral) == config_hash(plain)
    for field in ("overlong_filtering=true", "mini_batch_prompts=8"):
        assert config_hash(load_recipe("miniature", [f"stage2.{field}"])) != config_hash(plain)
