"""The public contract as a stranger would use it: signatures, dtypes, masks, edges, the parts put together."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objectives_support import BETA, G, close, gradient, log_ratio
from torch import Tensor

from kdrl_core.objectives import (
    BetaSchedule,
    group_advantages,
    group_mean,
    kd_mask,
    kd_rkl_loss,
    kdrl_loss,
    kl_estimate,
    kl_policy_gradient,
    sft_loss,
    shape_rewards,
    token_mean,
    topk_kl,
)

NAN, INF = float("nan"), float("inf")
HALF = (torch.bfloat16, torch.float16)


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names in order, those by keyword alone marked with *, defaults added."""
    return [
        ("*" if p.kind is p.KEYWORD_ONLY else "") + name + ("" if p.default is p.empty else f"={p.default}")
        for name, p in inspect.signature(function).parameters.items()
    ]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (group_advantages, ["rewards", "group_size", "*normalize_std=True", "*eps=1e-06"]),
        (kl_estimate, ["student_logprobs", "teacher_logprobs", "estimator"]),
        (topk_kl, ["student_logits", "topk_ids", "topk_logits", "*floor"]),
        (kd_mask, ["rewards", "group_size", "level"]),
        (shape_rewards, ["rewards", "student_logprobs", "teacher_logprobs", "response_mask", "beta"]),
        (BetaSchedule, ["init", "decay=0.0", "minimum=0.0"]),
        (token_mean, ["values", "response_mask", "*total_tokens=None"]),
    ],
)
def test_signatures(function: Callable[..., Any], expected: list[str]) -> None:
    assert parameters(function)[: len(expected)] == expected
    rest = inspect.signature(function).parameters.values()
    assert all(p.default is not p.empty for p in list(rest)[len(expected) :])


def test_signature_of_the_loss() -> None:
    first, *keywords = parameters(kdrl_loss)
    assert first == "logprobs"
    required = ["advantages", "teacher_logprobs", "response_mask", "rewards", "group_size", "beta"]
    assert keywords[:6] == [f"*{name}" for name in required]
    defaults = {"*kl_estimator=k2", "*kd_masking=none", "*old_logprobs=None", "*total_tokens=None", "*entropy=None"}
    assert set(keywords) >= defaults | {"*entropy_coef=0.0"}
    assert all("=" in name for name in keywords[6:])


def test_the_parts_put_together_are_the_loss(batch: dict[str, Any]) -> None:
    """−mean[Â ρ] + β mean[m k2], written with the public functions alone, has the loss's value and gradient."""
    mask, teacher = batch["response_mask"], batch["teacher_logprobs"]
    kl = kl_estimate(batch["logprobs"], teacher, "k2") * kd_mask(batch["rewards"], G, "response")[:, None]
    ratio = torch.exp(batch["logprobs"] - batch["logprobs"].detach())
    by_hand = -token_mean(ratio * batch["advantages"][:, None], mask) + BETA * token_mean(kl, mask)
    loss, _ = kdrl_loss(kd_masking="response", **batch)
    close(loss, by_hand)
    close(gradient(batch, kd_masking="response"), torch.autograd.grad(by_hand, batch["logprobs"])[0])


@pytest.mark.parametrize("padding", [NAN, INF, -INF, 1e30, -1e30, -100.0, 0.0])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_k2grad", "policy gradient"])
def test_a_mask_may_come_after_the_estimate(estimator: str, side: str, padding: float) -> None:
    """0 · ∞ is NaN: bad padding must leave no trace in the gradient, in float32, under the mean that follows."""
    clean = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -0.5, -2.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    gradients = []
    for fill in (clean[0][0, 2].item(), padding):
        student, teacher = (values.clone() for values in clean)
        if side in ("student", "both"):
            student[0, 2] = fill
        if side in ("teacher", "both"):
            teacher[0, 2] = fill
        student.requires_grad_()
        if estimator == "policy gradient":
            estimate = kl_policy_gradient(student, teacher)
        else:
            estimate = kl_estimate(student, teacher, estimator)
        gradients.append(torch.autograd.grad(token_mean(estimate, mask), student)[0])
    assert torch.equal(*gradients), gradients
    assert gradients[0][0, 2] == 0.0


@pytest.mark.parametrize("size", [12.0, 50.0, 200.0])
def test_huge_log_ratios_are_not_clamped(size: float) -> None:
    """Beyond ±10, where peers clamp, every token still has its slope; float32. k3 overflows at 88, and says so."""
    student = torch.full((2, 1), -250.0, requires_grad=True)
    ratios = torch.tensor([[size], [-size]])
    for name, slopes in {
        "k1": -ratios,
        "k2": -ratios,
        "k3": 1 - ratios.exp(),
        "k3_k2grad": -ratios,
    }.items():
        loss, metrics = kdrl_loss(
            student,
            advantages=torch.zeros(2),
            teacher_logprobs=ratios - 250.0,
            response_mask=torch.ones(2, 1),
            rewards=torch.zeros(2),
            group_size=2,
            beta=1.0,
            kl_estimator=name,
        )
        (found,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(found, slopes / 2, rtol=1e-5, atol=0.0)
        assert not loss.isnan()
        assert loss.isinf() == (name.startswith("k3") and size > 88)
        assert metrics["kd/kl"] == loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_dtypes(batch: dict[str, Any], dtype: torch.dtype) -> None:
    """Float32 at least: half precision is computed, and returned, in float32; the gradient has the input's dtype."""
    exact, rounded = dict(batch), dict(batch)
    batch |= {"old_logprobs": batch["logprobs"].detach() + 0.3, "rollout_logprobs": batch["logprobs"].detach() - 0.3}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            continue
        rounded[name] = value.detach().to(dtype)
        exact[name] = rounded[name].double()
    rounded["logprobs"].requires_grad_()
    exact["logprobs"].requires_grad_()
    extras = {"kl_estimator": "k3", "kd_masking": "response", "tis_cap": 2.0}
    loss, metrics = kdrl_loss(**rounded, **extras)
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {expected}
    torch.testing.assert_close(loss.double(), kdrl_loss(**exact, **extras)[0], rtol=1e-6, atol=0.0)
    on_policy = {"old_logprobs": None, "rollout_logprobs": None, "kl_estimator": "topk", "beta": 0.0}
    on_policy |= {"topk": -rounded["teacher_logprobs"]}
    for name, value in kdrl_loss(**(rounded | on_policy))[1].items():
        exact_value = kdrl_loss(**(exact | on_policy | {"topk": on_policy["topk"].double()}))[1][name]
        torch.testing.assert_close(value.double(), exact_value, rtol=1e-6, atol=1e-7, msg=name)
    found = torch.autograd.grad(loss, rounded["logprobs"])[0]
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    torch.testing.assert_close(found.double(), gradient(exact, **extras), rtol=tolerance, atol=1e-6)

    logprobs, teacher, rewards, mask = (
        rounded[name].detach() for name in ("logprobs", "teacher_logprobs", "rewards", "response_mask")
    )
    logits, ids = torch.randn(8, 6, 7).to(dtype).topk(7)
    results = [
        group_advantages(rewards, G),
        kd_mask(rewards, G, "group"),
        kl_estimate(logprobs, teacher, "k2"),
        kl_policy_gradient(logprobs, teacher),
        shape_rewards(rewards, logprobs, teacher, mask, 0.1),
        token_mean(logprobs, mask),
        group_mean(logprobs, mask, G),
        sft_loss(logprobs, mask),
        kd_rkl_loss(logprobs, teacher, mask),
        topk_kl(logits, ids, logits, floor=-20.0),
    ]
    assert {value.dtype for value in results} == {expected}
    exact_topk = topk_kl(logits.double(), ids, logits.double().flip(-1), floor=-20.0)
    found_topk = topk_kl(logits, ids, logits.flip(-1), floor=-20.0)
    torch.testing.assert_close(found_topk.double(), exact_topk, rtol=1e-5, atol=1e-5)


def test_a_sum_in_bfloat16_counts_past_256() -> None:
    """1,000 ones and one 1 more: bfloat16 has eight bits, and would stop at 256 or round to 1,000."""
    ones = torch.ones(1, 1001, dtype=torch.bfloat16)
    assert token_mean(ones, ones, total_tokens=1).item() == 1001.0
    assert shape_rewards(torch.zeros(1), -ones, torch.zeros_like(ones), ones, 1.0).item() == 1001.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32])
def test_masks_and_rewards_of_any_dtype(batch: dict[str, Any], dtype: torch.dtype) -> None:
    expected = gradient(batch, kd_masking="group")
    changes = {"response_mask": batch["response_mask"].to(dtype), "rewards": batch["rewards"].to(dtype)}
    assert torch.equal(gradient(batch, kd_masking="group", **changes), expected)
    rewards = batch["rewards"].to(dtype)
    torch.testing.assert_close(group_advantages(rewards, G).double(), batch["advantages"], rtol=1e-6, atol=1e-7)


def test_group_of_all_responses_and_one_token_each() -> None:
    logprobs = torch.tensor([[-1.0], [-2.0], [-0.5]], dtype=torch.float64, requires_grad=True)
    arguments: dict[str, Any] = {
        "logprobs": logprobs,
        "teacher_logprobs": torch.full((3, 1), -1.5, dtype=torch.float64),
        "response_mask": torch.ones(3, 1),
        "rewards": torch.tensor([1, 0, 0]),
        "advantages": group_advantages(torch.tensor([1, 0, 0]), 3),
        "group_size": 3,
        "beta": 1.0,
    }
    ratios = torch.tensor([[-0.5], [0.5], [-1.0]], dtype=torch.float64)
    expected = -(arguments["advantages"].double()[:, None] + ratios) / 3
    close(gradient(arguments), expected)
    close(gradient(arguments, kd_masking="group"), -arguments["advantages"].double()[:, None] / 3)


def test_a_response_without_tokens_is_counted_nowhere(batch: dict[str, Any]) -> None:
    """Its row may hold anything and has gradient 0; the denominator is that of the others."""
    batch["response_mask"][1] = 0.0
    batch["teacher_logprobs"][1] = NAN
    mask = batch["response_mask"]
    expected = -(batch["advantages"][:, None] + BETA * torch.where(mask > 0, log_ratio(batch), 0.0)) * mask / mask.sum()
    close(gradient(batch), expected)


@pytest.mark.parametrize("level", ["none", "response", "group"])
def test_micro_batches_by_the_contract_alone(batch: dict[str, Any], level: str) -> None:
    """total_tokens is all that a caller needs: any rows for "none" and "response", whole groups for "group"."""
    total = int(batch["response_mask"].sum())
    whole = gradient(batch, kd_masking=level)
    found = torch.zeros_like(whole)
    for rows in torch.arange(8).split(G if level == "group" else 1):
        part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
        loss, _ = kdrl_loss(**(part | {"total_tokens": total, "kd_masking": level}))
        found += torch.autograd.grad(loss, batch["logprobs"])[0]
    close(found, whole)


CONSTANTS = ["teacher_logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "kd_weights"]


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_get_no_gradient(batch: dict[str, Any], name: str) -> None:
    batch |= {"ref_logprobs": batch["teacher_logprobs"].clone(), "ref_beta": 0.1, "tis_cap": 2.0}
    batch["kd_weights"] = torch.ones(8, dtype=torch.float64)
    batch |= {key: batch["logprobs"].detach().clone() for key in ("old_logprobs", "rollout_logprobs")}
    for estimator in ("k1", "k2", "k3", "k3_k2grad"):
        constant = batch[name].detach().clone().requires_grad_()
        loss, _ = kdrl_loss(**(batch | {name: constant, "kl_estimator": estimator}))
        assert torch.autograd.grad(loss, constant, allow_unused=True) == (None,)


def test_what_is_computed_once_keeps_no_gradient() -> None:
    """Advantages, masks and shaped rewards are constants, even of rewards that a reward model has computed."""
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    logprobs = torch.zeros(2, 3, requires_grad=True)
    assert not group_advantages(rewards, 2).requires_grad
    assert not kd_mask(rewards, 2, "response").requires_grad
    assert not shape_rewards(rewards, logprobs, logprobs - 1.0, torch.ones(2, 3), 0.5).requires_grad


def test_numpy_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    assert torch.equal(group_advantages(torch.eye(2)[0], numpy.int64(2)), group_advantages(torch.eye(2)[0], 2))
