"""The way of a scalar of the objective: recipe field → field of `Objective` → term of the loss, by messages as well.

A new scalar that is forgotten on this way makes one of these tests fail.
"""

from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from parity.ranks import make_batch, with_objective, with_topk

from kdrl_core.config import load_recipe
from kdrl_core.logprobs.chunked import TokenStatistics
from kdrl_core.logprobs.model import pad_sequences
from kdrl_core.objectives import Objective, Responses, Totals, joint_loss, training_signals
from kdrl_core.training.messages import RankWork, share_of, unpack
from kdrl_core.training.torch_trainer import micro_batch_statistics, totals_of

RECIPE_FIELDS: dict[str, tuple[str, Any]] = {
    "kind": ("objective=reward_shaping", "reward_shaping"),
    "beta": ("beta.init=0.75", 0.75),
    "kl_estimator": ("kl_estimator=k3_k2grad", "k3_k2grad"),
    "kd_masking": ("kd_masking=group", "group"),
    "topk_floor": ("topk.floor=-7.5", -7.5),
    "group_size": ("group_size=12", 12),
    "normalize_std": ("normalize_std=false", False),
    "clip_low": ("clip_low=0.2", 0.2),
    "clip_high": ("clip_high=0.28", 0.28),
    "tis_cap": ("tis_cap=2.5", 2.5),
    "ref_beta": ("ref_beta=0.125", 0.125),
    "ref_kl_estimator": ("ref_kl_estimator=k2", "k2"),
    "entropy_coef": ("entropy_coef=0.375", 0.375),
    "aggregation": ("aggregation=group_mean", "group_mean"),
    "terms": ("terms=[{function: 'parity.ranks:square', coefficient: 0.5}]", (("parity.ranks:square", 0.5),)),
}
"""Field of the record → how a recipe sets it, and to what."""


def test_every_field_of_the_record_can_be_set_by_a_recipe() -> None:
    assert set(RECIPE_FIELDS) == {field.name for field in fields(Objective)}


@pytest.mark.parametrize("name", RECIPE_FIELDS)
def test_a_recipe_field_changes_its_field_of_the_record_alone(name: str) -> None:
    override, value = RECIPE_FIELDS[name]
    plain = asdict(load_recipe("miniature").stage("stage2").objective_at(0))
    changed = asdict(load_recipe("miniature", [f"stage2.{override}"]).stage("stage2").objective_at(0))
    assert changed[name] == value != plain[name]
    assert {each for each in plain if changed[each] != plain[each]} == {name}


def test_what_is_off_policy_arrives_at_a_rank_with_its_rows() -> None:
    batch = make_batch(0)
    batch = replace(
        batch, old_logprobs=batch.ref_logprobs, loss_mask=[float(row % 2) for row in range(len(batch.sequences))]
    )
    work = share_of(batch, [[5, 2], [7]], num_idle=0, totals=totals_of(batch))
    found = RankWork.unpack(*unpack(work.pack({"command": "update"}))).batch
    assert found.loss_mask == [1.0, 0.0, 1.0]
    assert batch.old_logprobs is not None
    assert found.old_logprobs is not None
    assert [row.tolist() for row in found.old_logprobs] == [batch.old_logprobs[row].tolist() for row in (5, 2, 7)]


def test_beta_is_that_of_the_step() -> None:
    stage = load_recipe("miniature", ["stage2.beta={init: 0.5, decay: 0.1, minimum: 0.25}"]).stage("stage2")
    assert [stage.objective_at(step).beta for step in range(4)] == [0.5, 0.4, 0.3, 0.25]
    assert (
        load_recipe("miniature", ["stage2.objective=grpo", "stage2.beta=null"]).stage("stage2").objective_at(3).beta
        == 0
    )


@pytest.mark.parametrize("name", RECIPE_FIELDS)
def test_a_field_of_the_record_arrives_at_a_rank(name: str) -> None:
    batch = with_objective(make_batch(0), **{name: RECIPE_FIELDS[name][1]})
    work = share_of(batch, [[5, 2], [7]], num_idle=0, totals=totals_of(batch))
    found = RankWork.unpack(*unpack(work.pack({"command": "update"}))).batch.objective
    assert found == batch.objective
    assert getattr(found, name) == RECIPE_FIELDS[name][1]


BASE = Objective(beta=0.3, group_size=2, tis_cap=1.2, ref_beta=0.2, entropy_coef=0.1, clip_low=0.1, clip_high=0.1)
TERM_CHANGES: dict[str, Any] = {
    "kind": "reward_shaping",
    "beta": 0.4,
    "kl_estimator": "k3",
    "kd_masking": "response",
    "group_size": 4,
    "normalize_std": False,
    "clip_low": 0.3,
    "clip_high": 0.3,
    "tis_cap": 1.1,
    "ref_beta": 0.3,
    "ref_kl_estimator": "k2",
    "entropy_coef": 0.2,
    "aggregation": "group_mean",
    "terms": (("parity.ranks:square", 0.5),),
}


def outcome(objective: Objective, *, off_policy: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of eight responses with everything that a term may read."""
    draws = torch.Generator().manual_seed(0)
    student, teacher, old, engine, reference = (-2 * torch.rand(8, 6, generator=draws) for _ in range(5))
    rewards = (torch.rand(8, generator=draws) < 0.5).float()
    mask = (torch.arange(6)[None] < torch.randint(2, 7, (8, 1), generator=draws)).float()
    advantages, weights = training_signals(
        objective, rewards, student_logprobs=student, teacher_logprobs=teacher, response_mask=mask
    )
    logprobs = student.clone().requires_grad_()
    responses = Responses(
        logprobs=logprobs,
        response_mask=mask,
        advantages=advantages,
        kd_weights=weights,
        teacher_logprobs=teacher,
        old_logprobs=old if off_policy else None,
        rollout_logprobs=None if objective.tis_cap is None else engine,
        ref_logprobs=reference,
        entropy=-student,
    )
    loss, _ = joint_loss(responses, objective, Totals())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient


@pytest.mark.parametrize("name", TERM_CHANGES)
def test_a_field_of_the_record_arrives_at_its_term(name: str) -> None:
    assert set(TERM_CHANGES) | {"topk_floor"} == {field.name for field in fields(Objective)}
    plain, changed = outcome(BASE), outcome(replace(BASE, **{name: TERM_CHANGES[name]}))
    assert not torch.equal(plain[0], changed[0])


def test_the_floor_arrives_at_the_forward_pass() -> None:
    batch, seen = with_topk(make_batch(0)), []
    padded = pad_sequences([batch.sequences[row] for row in (0, 1)])

    def model(*_: Any, floor: float, with_entropy: bool) -> TokenStatistics:
        seen.append(floor)
        return TokenStatistics(padded.response_mask, None, None)

    micro_batch_statistics(model, with_objective(batch, topk_floor=-7.5), [0, 1], padded)
    assert seen == [-7.5]


def test_clipping_changes_nothing_on_policy() -> None:
    """ρ = 1 there, which no bound reaches: a recipe's clip_low and clip_high are without effect."""
    free = replace(BASE, clip_low=None, clip_high=None)
    for bounds in ({"clip_low": 0.0, "clip_high": 0.0}, {"clip_low": 0.2}, {"clip_high": 0.28}):
        for ours, theirs in zip(
            outcome(replace(free, **bounds), off_policy=False), outcome(free, off_policy=False), strict=True
        ):
            assert torch.equal(ours, theirs)
