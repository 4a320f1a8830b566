"""Bad input is a `ValueError` that names the argument, what was expected and what was given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdrl_core.objectives import (
    BetaSchedule,
    Totals,
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
R4, BT = torch.zeros(4), torch.zeros(4, 3)
ONES = torch.ones(4, 3)
LOGITS = torch.zeros(4, 3, 7)
IDS = torch.arange(2).expand(4, 3, 2).clone()
TOPK = torch.zeros(4, 3, 2)


def valid() -> dict[str, Any]:
    mask = torch.ones(4, 3)
    mask[2, 2] = 0.0
    return {
        "logprobs": -torch.rand(4, 3),
        "advantages": torch.zeros(4),
        "teacher_logprobs": -torch.rand(4, 3),
        "response_mask": mask,
        "rewards": torch.tensor([0.0, 1.0, 0.0, 0.0]),
        "group_size": 2,
        "beta": 0.1,
    }


def set_at(value: float, row: int = 1, token: int = 2) -> torch.Tensor:
    tensor = -torch.rand(4, 3)
    tensor[row, token] = value
    return tensor


LOSS_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": torch.zeros(12)}, r"^logprobs: expected shape \[B, T\], given \(12,\)"),
    ({"response_mask": torch.ones(4, 2)}, r"^response_mask: expected shape \[B, T\] = \(4, 3\), given \(4, 2\)"),
    ({"response_mask": torch.full((4, 3), 0.5)}, r"^response_mask: expected 0 or 1, given 0.5 at row 0, token 0"),
    ({"response_mask": torch.zeros(4, 3)}, r"^response_mask: expected at least one response token, given none"),
    ({"teacher_logprobs": torch.zeros(4, 1)}, r"^teacher_logprobs: expected shape \[B, T\] = \(4, 3\), given \(4, 1\)"),
    ({"teacher_logprobs": None}, r"^teacher_logprobs: expected a value with beta=0.1, given None"),
    (
        {"teacher_logprobs": set_at(NAN)},
        r"^teacher_logprobs: expected finite values on every response token, given nan at row 1, token 2",
    ),
    ({"teacher_logprobs": set_at(-INF, 3, 0)}, r"^teacher_logprobs: .*given -inf at row 3, token 0"),
    ({"teacher_logprobs": set_at(-INF, 3, 0), "beta": 0.0}, r"^teacher_logprobs: .*given -inf at row 3, token 0"),
    ({"advantages": torch.zeros(4, 3)}, r"^advantages: expected shape \[B\] = \(4,\), given \(4, 3\)"),
    ({"advantages": torch.tensor([0.0, NAN, 0.0, 0.0])}, r"^advantages: expected finite values, given nan at row 1"),
    ({"rewards": torch.zeros(2)}, r"^rewards: expected shape \[B\] = \(4,\), given \(2,\)"),
    ({"rewards": torch.tensor([0.0, 0.0, INF, 0.0])}, r"^rewards: expected finite values, given inf at row 2"),
    ({"rewards": None, "kd_masking": "response"}, r"^rewards: expected a value with kd_masking='response'"),
    ({"group_size": None, "kd_masking": "group"}, r"^group_size: expected a value with kd_masking='group'"),
    ({"group_size": 3}, r"^group_size: expected a divisor of the number of responses 4, given 3"),
    ({"group_size": 3, "kd_masking": "group", "total_tokens": 50}, r"^group_size: expected a divisor"),
    ({"group_size": 1}, r"^group_size: expected an integer of at least 2, given 1"),
    ({"group_size": 0}, r"^group_size: expected an integer of at least 2, given 0"),
    ({"group_size": 2.0}, r"^group_size: expected an integer of at least 2, given 2.0"),
    ({"beta": -1e-3}, r"^beta: expected a finite number of at least 0, given -0.001"),
    ({"beta": NAN}, r"^beta: expected a finite number of at least 0, given nan"),
    ({"beta": None}, r"^beta: expected a finite number of at least 0, given None"),
    ({"beta": "0.1"}, r"^beta: expected a finite number of at least 0, given '0.1'"),
    ({"beta": True}, r"^beta: expected a finite number of at least 0, given True"),
    ({"beta": R4}, r"^beta: expected a finite number of at least 0, given tensor\(\[0., 0., 0., 0.\]\)"),
    ({"beta": 10**400}, r"^beta: expected a finite number of at least 0, given 1000"),
    ({"kl_estimator": "k4"}, r"^kl_estimator: expected one of k1, k2, k3, k3_k2grad, topk, given 'k4'"),
    ({"kl_estimator": "topk"}, r"^topk: expected a value with kl_estimator='topk', given None"),
    ({"kl_estimator": "topk", "topk": torch.zeros(4, 3, 7)}, r"^topk: expected shape \[B, T\]"),
    ({"ref_kl_estimator": "topk"}, r"^ref_kl_estimator: expected one of k1, k2, k3, k3_k2grad, given 'topk'"),
    ({"kd_masking": "token"}, r"^kd_masking: expected one of none, response, group, given 'token'"),
    ({"kd_weights": torch.zeros(3)}, r"^kd_weights: expected shape \[B\] = \(4,\), given \(3,\)"),
    ({"kd_weights": -torch.ones(4)}, r"^kd_weights: expected weights of at least 0, given -1"),
    ({"old_logprobs": torch.zeros(3, 4)}, r"^old_logprobs: expected shape"),
    ({"old_logprobs": set_at(INF)}, r"^old_logprobs: .*given inf at row 1, token 2"),
    ({"clip_low": -0.1}, r"^clip_low: expected a finite number of at least 0, given -0.1"),
    ({"clip_high": NAN}, r"^clip_high: expected a finite number of at least 0, given nan"),
    ({"rollout_logprobs": BT}, r"^tis_cap: expected a value with rollout_logprobs, given None"),
    ({"tis_cap": 2.0}, r"^rollout_logprobs: expected a value with tis_cap, given None"),
    ({"rollout_logprobs": BT, "tis_cap": 0.0}, r"^tis_cap: expected a finite number above 0, given 0"),
    ({"rollout_logprobs": set_at(NAN), "tis_cap": 2.0}, r"^rollout_logprobs: .*given nan at row 1, token 2"),
    ({"rollout_logprobs": BT, "tis_cap": "2"}, r"^tis_cap: expected a finite number above 0, given '2'"),
    ({"ref_beta": -1.0}, r"^ref_beta: expected a finite number of at least 0, given -1"),
    ({"ref_beta": 1.0}, r"^ref_logprobs: expected a value with ref_beta=1.0, given None"),
    ({"ref_logprobs": set_at(NAN)}, r"^ref_logprobs: .*given nan at row 1, token 2"),
    ({"entropy_coef": -1.0}, r"^entropy_coef: expected a finite number of at least 0, given -1"),
    ({"entropy_coef": 1e-3}, r"^entropy: expected a value with entropy_coef=0.001, given None"),
    ({"entropy": torch.zeros(4)}, r"^entropy: expected shape"),
    (
        {"entropy": set_at(NAN), "entropy_coef": 0.1},
        r"^entropy: expected finite values on every response token, given nan at row 1, token 2",
    ),
    (
        {"topk": set_at(INF, 3, 1), "kl_estimator": "topk"},
        r"^topk: expected finite values on every response token, given inf at row 3, token 1",
    ),
    ({"topk": set_at(NAN), "kl_estimator": "topk"}, r"^topk: expected finite values .*given nan at row 1, token 2"),
    ({"entropy": set_at(NAN), "ref_logprobs": set_at(INF)}, r"^ref_logprobs: .*given inf at row 1, token 2"),
    ({"aggregation": "sequence_mean"}, r"^aggregation: expected one of token_mean, group_mean, given 'sequence_mean'"),
    ({"total_tokens": 0}, r"^total_tokens: expected a finite number above 0, given 0"),
    ({"total_tokens": R4 + 9}, r"^total_tokens: expected a finite number above 0, given tensor\(\[9., 9., 9., 9.\]\)"),
    ({"total_tokens": torch.ones(1)}, r"^total_tokens: expected a finite number above 0, given tensor\(\[1.\]\)"),
    ({"total_tokens": torch.tensor(NAN)}, r"^total_tokens: expected a finite number above 0, given tensor\(nan\)"),
    ({"total_tokens": "9", "aggregation": "group_mean"}, r"^total_tokens: expected a finite number above 0, given '9'"),
    ({"num_groups": INF}, r"^num_groups: expected a finite number above 0, given inf"),
    ({"kd_tokens": NAN}, r"^kd_tokens: expected a finite number of at least 0, given nan"),
    ({"kd_tokens": -1}, r"^kd_tokens: expected a finite number of at least 0, given -1"),
    ({"kd_tokens": R4}, r"^kd_tokens: expected a finite number of at least 0, given tensor"),
    (
        {"aggregation": "group_mean", "num_groups": 2, "group_tokens": torch.tensor([6.0, 6.0, NAN, 5.0])},
        r"^group_tokens: expected finite numbers of at least 0, given nan at row 2",
    ),
    ({"aggregation": "group_mean", "group_size": None}, r"^group_size: expected an integer of at least 2, or"),
    ({"aggregation": "group_mean", "group_tokens": R4 + 1}, r"^num_groups: expected the number of groups"),
]


@pytest.mark.parametrize(
    ("changes", "message"), LOSS_ERRORS, ids=lambda value: ",".join(value) if isinstance(value, dict) else ""
)
def test_the_loss_refuses_bad_input(changes: dict[str, Any], message: str) -> None:
    kdrl_loss(**valid())
    with pytest.raises(ValueError, match=message):
        kdrl_loss(**(valid() | changes))


def repeated_ids() -> torch.Tensor:
    ids = IDS.clone()
    ids[3, 1] = 5
    return ids


OTHER_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: group_advantages(torch.zeros(7), 4), r"^group_size: expected a divisor of .* 7, given 4"),
    (lambda: group_advantages(R4, 1), r"^group_size: expected an integer of at least 2, given 1"),
    (lambda: group_advantages(BT, 2), r"^rewards: expected shape \[B\], given \(4, 3\)"),
    (lambda: group_advantages(R4, 2, eps=-1.0), r"^eps: expected"),
    (lambda: group_advantages(torch.tensor([0.0, NAN]), 2), r"^rewards: expected finite values, given nan at row 1"),
    (lambda: kl_estimate(BT, torch.zeros(4, 2), "k2"), r"^teacher_logprobs: expected shape .*\(4, 3\), given \(4, 2\)"),
    (lambda: kl_estimate(BT, BT, "K2"), r"^estimator: expected one of k1, k2, k3, k3_k2grad, given 'K2'"),
    (lambda: kl_estimate(R4, R4, "k2"), r"^student_logprobs: expected shape \[B, T\], given \(4,\)"),
    (lambda: kl_policy_gradient(BT, BT, R4), r"^ratio: expected shape"),
    (lambda: kd_mask(R4, 2, "all"), r"^level: expected one of none, response, group, given 'all'"),
    (lambda: kd_mask(R4, 3, "group"), r"^group_size: expected a divisor"),
    (lambda: kd_mask(BT, 2, "group"), r"^rewards: expected shape"),
    (lambda: kd_mask(torch.tensor([NAN, 0.0]), 2, "response"), r"^rewards: expected finite values"),
    (lambda: shape_rewards(R4, BT, BT, ONES, -1.0), r"^beta: expected"),
    (lambda: shape_rewards(R4, BT, set_at(NAN), ONES, 1.0), r"^teacher_logprobs: .*given nan at row 1, token 2"),
    (lambda: shape_rewards(R4, set_at(NAN), BT, ONES, 1.0), r"^student_logprobs: .*given nan at row 1, token 2"),
    (lambda: shape_rewards(R4, BT, torch.zeros(4, 1), ONES, 1.0), r"^teacher_logprobs: expected shape"),
    (lambda: shape_rewards(torch.zeros(3), BT, BT, ONES, 1.0), r"^rewards: expected shape"),
    (lambda: token_mean(BT, torch.ones(4, 2)), r"^response_mask: expected shape"),
    (lambda: token_mean(R4, R4), r"^values: expected shape"),
    (lambda: token_mean(BT, ONES, total_tokens=-1), r"^total_tokens: expected"),
    (lambda: token_mean(BT, BT), r"^response_mask: expected at least one response token"),
    (lambda: group_mean(BT, ONES, 3), r"^group_size: expected a divisor"),
    (lambda: group_mean(BT, ONES, 2, num_groups=0), r"^num_groups: expected"),
    (lambda: group_mean(BT, ONES, num_groups=1, group_tokens=torch.ones(2)), r"^group_tokens: expected shape"),
    (lambda: group_mean(BT, ONES, num_groups=1, group_tokens=R4 - 1), r"^group_tokens: .* given -1.0 at row 0"),
    (lambda: group_mean(BT, ONES, num_groups=1, group_tokens=R4 * NAN), r"^group_tokens: .* given nan at row 0"),
    (lambda: group_mean(BT, ONES, num_groups=1, group_tokens=R4 + INF), r"^group_tokens: .* given inf at row 0"),
    (lambda: group_mean(BT, ONES, 2, num_groups="2"), r"^num_groups: .*, given '2'"),  # type: ignore[arg-type]
    (lambda: token_mean(BT, ONES, total_tokens=R4 + 1), r"^total_tokens: expected a finite number above 0, given"),
    (lambda: token_mean(BT, ONES, total_tokens=[1.0]), r"^total_tokens: .*, given \[1.0\]"),  # type: ignore[arg-type]
    (
        lambda: sft_loss(BT, ONES, aggregation="token_mean", totals=Totals(tokens=torch.ones(2))),
        r"^total_tokens: expected a finite number above 0",
    ),
    (lambda: sft_loss(BT, ONES, totals=Totals(responses=0)), r"^totals.responses: expected a finite number above 0"),
    (lambda: sft_loss(BT, ONES, aggregation="group_mean"), r"^aggregation: expected one of response_mean, token_mean"),
    (lambda: group_advantages(R4, 2, eps=None), r"^eps: expected .*, given None"),  # type: ignore[arg-type]
    (lambda: shape_rewards(R4, BT, BT, ONES, None), r"^beta: expected .*, given None"),  # type: ignore[arg-type]
    (lambda: sft_loss(BT, torch.ones(4, 1)), r"^response_mask: expected shape"),
    (lambda: kd_rkl_loss(BT, set_at(NAN), ONES), r"^teacher_logprobs: .*given nan at row 1, token 2"),
    (lambda: kd_rkl_loss(BT, torch.zeros(4, 1), ONES), r"^teacher_logprobs: expected shape"),
    (lambda: kd_rkl_loss(BT, BT, ONES, old_logprobs=R4), r"^old_logprobs: expected shape"),
    (
        lambda: topk_kl(LOGITS, IDS, TOPK, floor=-INF),
        r"^floor: expected a finite log-probability, at most 0, given -inf",
    ),
    (lambda: topk_kl(LOGITS, IDS, TOPK, floor=0.1), r"^floor: expected"),
    (lambda: topk_kl(LOGITS, IDS, TOPK, floor=NAN), r"^floor: expected"),
    (lambda: topk_kl(LOGITS, IDS, TOPK, floor=None), r"^floor: .* at most 0, given None"),  # type: ignore[arg-type]
    (lambda: topk_kl(LOGITS, IDS, TOPK, floor="-9"), r"^floor: .* at most 0, given '-9'"),  # type: ignore[arg-type]
    (lambda: topk_kl(BT, IDS, TOPK, floor=-9.0), r"^student_logits: expected shape \[B, T, V\], given \(4, 3\)"),
    (lambda: topk_kl(LOGITS, IDS[:2], TOPK, floor=-9.0), r"^topk_ids: expected shape"),
    (lambda: topk_kl(LOGITS, IDS, TOPK[..., :1], floor=-9.0), r"^topk_logits: expected shape"),
    (
        lambda: topk_kl(LOGITS, IDS.float(), TOPK, floor=-9.0),
        r"^topk_ids: expected an integer dtype, given torch.float32",
    ),
    (
        lambda: topk_kl(LOGITS[..., :1], IDS, TOPK, floor=-9.0),
        r"^topk_ids: expected K between 1 and V = 1, given K = 2",
    ),
    (lambda: topk_kl(LOGITS, IDS + 6, TOPK, floor=-9.0), r"^topk_ids: expected ids in \[0, V = 7\), given 7 at row 0"),
    (lambda: topk_kl(LOGITS, IDS - 1, TOPK, floor=-9.0), r"^topk_ids: expected ids in \[0, V = 7\), given -1 at row 0"),
    (lambda: topk_kl(LOGITS, repeated_ids(), TOPK, floor=-9.0), r"^topk_ids: expected distinct ids, given 5 twice"),
    (lambda: topk_kl(LOGITS, IDS, TOPK * NAN, floor=-9.0), r"^topk_logits: .*given nan at row 0, token 0, entry 0"),
    (lambda: topk_kl(LOGITS, IDS, TOPK, floor=-9.0, response_mask=R4), r"^response_mask: expected shape"),
    (lambda: BetaSchedule(-1.0), r"^init: expected"),
    (lambda: BetaSchedule(1.0, -0.1), r"^decay: expected"),
    (lambda: BetaSchedule(1.0, 0.1, -0.1), r"^minimum: expected a finite"),
    (lambda: BetaSchedule(NAN), r"^init: expected"),
    (lambda: BetaSchedule("1e-3"), r"^init: .* of at least 0, given '1e-3'"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(None), r"^init: .* of at least 0, given None"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(1.0, None), r"^decay: .* of at least 0, given None"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(True), r"^init: .* of at least 0, given True"),
    (lambda: BetaSchedule(1.0)(None), r"^step: expected a whole number .* given None"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(1.0)("3"), r"^step: expected a whole number .* given '3'"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(1.0)(-1), r"^step: expected a whole number of at least 0, given -1"),
    (lambda: BetaSchedule(1.0)(0.5), r"^step: expected"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(1.0)(NAN), r"^step: expected"),  # type: ignore[arg-type]
    (lambda: BetaSchedule(1.0)(INF), r"^step: expected"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), OTHER_ERRORS, ids=[message for _, message in OTHER_ERRORS])
def test_other_functions(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_may_hold_anything_and_micro_batches_any_rows() -> None:
    """The neighbours of the refusals: these are fine."""
    kdrl_loss(**(valid() | {"teacher_logprobs": set_at(NAN, 2, 2), "old_logprobs": set_at(INF, 2, 2)}))
    padded = {"entropy": set_at(NAN, 2, 2), "topk": set_at(-INF, 2, 2), "kl_estimator": "topk", "entropy_coef": 1e-3}
    assert kdrl_loss(**(valid() | padded))[0].isfinite()
    assert kdrl_loss(**(valid() | {"entropy": set_at(NAN), "topk": set_at(NAN)}))[0].isfinite()
    switched_off = {"topk": set_at(NAN), "kl_estimator": "topk", "beta": 0.0}
    assert kdrl_loss(**(valid() | switched_off))[0].isfinite()
    kdrl_loss(**(valid() | {"beta": 0.0, "teacher_logprobs": None, "rewards": None, "group_size": None}))
    kdrl_loss(**(valid() | {"group_size": 16, "total_tokens": 50}))
    kdrl_loss(**(valid() | {"group_size": 16, "kd_masking": "group", "kd_weights": R4 + 1}))
    kdrl_loss(**(valid() | {"total_tokens": 50, "response_mask": BT}))
    kdrl_loss(**(valid() | {"group_size": 16, "total_tokens": 50, "kd_masking": "response"}))
    kdrl_loss(**(valid() | {"group_size": None, "kd_masking": "response"}))
    none = {name: value[:0] for name, value in valid().items() if isinstance(value, torch.Tensor)}
    assert kdrl_loss(**(valid() | none | {"total_tokens": 50, "kd_masking": "group"}))[0].item() == 0.0


@pytest.mark.parametrize("name", ["logprobs", "advantages", "response_mask"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    for value in (None, [[0.0]]):
        with pytest.raises(TypeError, match=rf"^{name}: expected a tensor \[B.*\], given"):
            kdrl_loss(**(valid() | {name: value}))


def test_diverged_logprobs_reach_the_loss() -> None:
    """The student's own NaN is not bad input: the trainer sees it in the loss and reports divergence."""
    diverged = {"logprobs": set_at(NAN), "entropy": set_at(NAN), "entropy_coef": 1e-3}
    for changes in ({}, {"topk": set_at(NAN), "kl_estimator": "topk"}):
        loss, metrics = kdrl_loss(**(valid() | diverged | changes))
        assert loss.isnan()
        assert metrics["loss/total"].isnan()
        assert metrics["entropy"].isnan()


def test_numbers_may_be_tensors_without_dimensions() -> None:
    plain = valid() | {"total_tokens": 50, "kd_tokens": 20}
    tensors = {name: torch.tensor(plain[name]) for name in ("total_tokens", "kd_tokens", "beta")}
    for found, expected in zip(kdrl_loss(**(plain | tensors)), kdrl_loss(**plain), strict=True):
        torch.testing.assert_close(found, expected)
    assert token_mean(ONES, ONES, total_tokens=torch.tensor(6)) == 2.0


def test_a_group_without_tokens_counts_as_zero() -> None:
    mask = torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3])
    tokens = torch.tensor([6, 6, 0, 0])
    assert group_mean(ONES, mask, num_groups=2, group_tokens=tokens) == group_mean(ONES, mask, 2) == 0.5


def test_finiteness_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every answer is waited for: all arguments per token cost one, however many are given."""
    asked: list[torch.Tensor] = []
    answer = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: asked.append(self) or answer(self))
    counts: dict[str, Any] = {"total_tokens": 50, "response_mask": valid()["response_mask"].bool()}
    few, many = dict.fromkeys(("old_logprobs", "entropy"), BT), {"ref_logprobs": BT, "topk": BT, "tis_cap": 2.0}
    numbers = []
    for changes in ({}, few, few | many | {"rollout_logprobs": BT}):
        asked.clear()
        kdrl_loss(**(valid() | counts | changes))
        numbers.append(len(asked))
    assert numbers == [3, 3, 3]  # advantages, rewards, and these
