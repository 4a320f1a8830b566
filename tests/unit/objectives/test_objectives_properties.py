"""Properties: padding never matters; how a step is cut and ordered never matters; masks never change a denominator."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrl_core.objectives import (
    group_advantages,
    kd_mask,
    kd_rkl_loss,
    kdrl_loss,
    kl_estimate,
    kl_policy_gradient,
    sft_loss,
    shape_rewards,
    token_mean,
)

COMMON = settings(max_examples=100, deadline=None)
ESTIMATORS = ("k1", "k2", "k3", "k3_k2grad", "topk")
PER_TOKEN = ("teacher_logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy", "topk")
PER_ROW = ("advantages", "rewards", "kd_weights", "group_tokens")
MASK_DTYPES = st.sampled_from([torch.bool, torch.int64, torch.float32, torch.float64])


@st.composite
def batches(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)) -> dict[str, Any]:
    """A whole optimiser step with every term of the loss switched on; ragged, some responses empty."""
    dtype = draw(st.sampled_from(dtypes))
    num_groups, group_size, width = draw(st.integers(1, 4)), draw(st.integers(2, 4)), draw(st.integers(1, 6))
    rows = num_groups * group_size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tokens(scale: float = -3.0) -> Tensor:
        return (scale * torch.rand(rows, width, generator=generator, dtype=torch.float64)).to(dtype)

    lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    lengths[draw(st.integers(0, rows - 1))] = draw(st.integers(1, width))  # at least one token
    rewards = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=rows, max_size=rows))).to(dtype)
    mask = torch.arange(width) < lengths[:, None]
    logprobs = tokens()
    level = draw(st.sampled_from(["none", "response", "group"]))
    aggregation = draw(st.sampled_from(["token_mean", "group_mean"]))
    return {
        "logprobs": logprobs,
        "advantages": group_advantages(rewards, group_size),
        "teacher_logprobs": tokens(),
        "response_mask": mask.to(draw(MASK_DTYPES)),
        "rewards": rewards,
        "group_size": group_size,
        "beta": draw(st.sampled_from([0.0, 2e-3, 1.0])),
        "kl_estimator": draw(st.sampled_from(ESTIMATORS)),
        "kd_masking": level,
        "topk": tokens(1.0),
        "old_logprobs": draw(st.sampled_from([None, logprobs + tokens(0.3) - 0.15])),
        "clip_low": draw(st.sampled_from([None, 0.1])),
        "clip_high": draw(st.sampled_from([None, 0.1])),
        "rollout_logprobs": logprobs + tokens(0.5) - 0.25,
        "tis_cap": 1.1,
        "ref_logprobs": tokens(),
        "ref_beta": 0.05,
        "entropy": tokens(2.0),
        "entropy_coef": 0.01,
        "aggregation": aggregation,
    }


def evaluate(batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss metrics, and the gradients by every differentiable input; the loss is "loss/total"."""
    inputs = {
        name: batch[name].detach().clone().requires_grad_()
        for name in ("logprobs", "teacher_logprobs", "entropy", "topk")
    }
    loss, metrics = kdrl_loss(**(batch | inputs))
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return metrics, {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(inputs.items(), gradients, strict=True)
    }


def take(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The batch of these rows, in this order."""
    names = ("logprobs", "response_mask", *PER_TOKEN, *PER_ROW)
    return {name: value[rows] if name in names and value is not None else value for name, value in batch.items()}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Float64 to 1e-10; float32 to 1e-5 of values around 1, so gradients (below 1) to 1e-6."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        rtol, atol = (1e-10, 1e-13) if value.dtype == torch.float64 else (1e-5, 1e-6)
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=f"{name}: {actual[name]} is not {value}"
        )


GARBAGE = st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, 1e30, -1e30, 5.0])


@COMMON
@given(batches((torch.float64, torch.float32, torch.bfloat16)), st.data())
def test_padding_content_never_matters(batch: dict[str, Any], data: st.DataObject) -> None:
    """To the bit, in values and gradients; no gradient reaches padding, and none reaches the teacher."""
    is_padding = batch["response_mask"] == 0
    dirty = dict(batch)
    for name in ("logprobs", *PER_TOKEN):
        if batch[name] is not None:
            dirty[name] = torch.where(is_padding, data.draw(GARBAGE, label=name), batch[name])
    metrics, gradients = evaluate(batch)
    dirty_metrics, dirty_gradients = evaluate(dirty)
    for name, value in metrics.items():
        assert torch.equal(dirty_metrics[name], value), name
        assert value.isfinite()
    for name, gradient in gradients.items():
        assert torch.equal(dirty_gradients[name], gradient), name
        assert gradient.isfinite().all()
        assert not gradient[is_padding].any()
    assert not gradients["teacher_logprobs"].any()


@COMMON
@given(batches((torch.float64, torch.float32, torch.bfloat16)), GARBAGE)
def test_padding_never_matters_to_the_other_functions(batch: dict[str, Any], garbage: float) -> None:
    mask, rewards, size, ratio = batch["response_mask"], batch["rewards"], batch["group_size"], batch["topk"]
    is_padding = mask == 0
    results = []
    for fill in (0.0, garbage):
        logprobs, teacher = (
            torch.where(is_padding, fill, batch[name]).requires_grad_() for name in ("logprobs", "teacher_logprobs")
        )
        sft, rkl = sft_loss(logprobs, mask), kd_rkl_loss(logprobs, teacher, mask)
        losses = [
            sft,
            sft_loss(logprobs, mask, aggregation="token_mean"),
            rkl,
            token_mean(kl_policy_gradient(logprobs, teacher, ratio * logprobs), mask),
        ]
        losses += [token_mean(kl_estimate(logprobs, teacher, name), mask) for name in ("k1", "k2", "k3", "k3_k2grad")]
        gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in losses]
        shaped = group_advantages(shape_rewards(rewards, logprobs, teacher, mask, 0.5), size)
        results.append([*losses, shaped, *gradients])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))
    assert all(value.isfinite().all() for value in results[1])


@COMMON
@given(batches(), st.data())
def test_micro_batching_never_matters(batch: dict[str, Any], data: st.DataObject) -> None:
    """Any cut of the rows, groups split and shuffled: losses, metrics and gradients add up to the whole batch's."""
    num_rows = len(batch["logprobs"])
    whole_metrics, whole_gradients = evaluate(batch)
    mask = batch["response_mask"] != 0
    kd_weights = kd_mask(batch["rewards"], batch["group_size"], batch["kd_masking"])
    lengths = mask.sum(1)
    batch = batch | {
        "kd_weights": kd_weights,
        "total_tokens": int(lengths.sum()),
        "kd_tokens": int((lengths * kd_weights).sum()),
        "num_groups": num_rows // batch["group_size"],
        "group_tokens": lengths.view(-1, batch["group_size"]).sum(1).repeat_interleave(batch["group_size"]),
    }
    order = torch.tensor(data.draw(st.permutations(range(num_rows))))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_rows - 1), max_size=4)))
    metrics = {name: torch.zeros_like(value) for name, value in whole_metrics.items()}
    gradients = {name: torch.zeros_like(value) for name, value in whole_gradients.items()}
    for rows in torch.tensor_split(order, cuts):
        part_metrics, part_gradients = evaluate(take(batch, rows))
        assert part_metrics.keys() == metrics.keys()
        for name, value in part_metrics.items():
            metrics[name] += value
        for name, gradient in part_gradients.items():
            gradients[name][rows] += gradient
    close(metrics, whole_metrics)
    close(gradients, whole_gradients)


@COMMON
@given(batches(), st.data())
def test_order_of_groups_and_within_them_never_matters(batch: dict[str, Any], data: st.DataObject) -> None:
    size = batch["group_size"]
    groups = data.draw(st.permutations(range(len(batch["logprobs"]) // size)))
    order = torch.tensor([group * size + i for group in groups for i in data.draw(st.permutations(range(size)))])
    metrics, gradients = evaluate(batch)
    reordered = take(batch, order)
    advantages = group_advantages(reordered["rewards"], size)
    close({"advantages": advantages}, {"advantages": batch["advantages"][order]})
    reordered_metrics, reordered_gradients = evaluate(reordered | {"advantages": advantages})
    close(reordered_metrics, metrics)
    close(reordered_gradients, {name: gradient[order] for name, gradient in gradients.items()})


@COMMON
@given(batches())
def test_masks_never_change_the_denominator(batch: dict[str, Any]) -> None:
    """A masked response contributes 0 and still counts: the KD parts of both halves of the rows add up to the whole.

    So do their gradients, by either mean. A denominator of unmasked tokens alone would break it.
    """
    batch |= {"beta": 1.0}
    mask = batch["response_mask"] != 0
    weights = kd_mask(batch["rewards"], batch["group_size"], batch["kd_masking"])
    kd, kd_gradients = evaluate(batch)
    rest, rest_gradients = evaluate(batch | {"kd_weights": 1.0 - weights})
    everything, gradients = evaluate(batch | {"kd_masking": "none"})
    nothing, without_kd = evaluate(batch | {"beta": 0.0})
    close({"kl": kd["kd/kl"] + rest["kd/kl"]}, {"kl": everything["kd/kl"]})
    for name in ("loss/policy", "kd/kl_sampled", "ref/kl", "entropy"):
        assert torch.equal(kd[name], everything[name])
    for name, gradient in without_kd.items():  # whole = both halves, less what is no KD and was counted twice
        close({name: kd_gradients[name] + rest_gradients[name] - gradient}, {name: gradients[name]})
    if batch["aggregation"] == "token_mean":
        assert kd["kd/active_frac"].item() == pytest.approx(((mask * weights[:, None]).sum() / mask.sum()).item())
    assert torch.equal(nothing["kd/kl"], kd["kd/kl"])


@COMMON
@given(batches(), st.integers(1, 3))
def test_wider_padding_never_matters(batch: dict[str, Any], extra: int) -> None:
    """Columns of padding on the right change nothing."""
    wider = dict(batch)
    for name in ("logprobs", *PER_TOKEN):
        if batch[name] is not None:
            wider[name] = torch.nn.functional.pad(batch[name], (0, extra), value=float("nan"))
    wider["response_mask"] = torch.nn.functional.pad(batch["response_mask"], (0, extra))
    close(evaluate(wider)[0], evaluate(batch)[0])


@COMMON
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3),
    st.sampled_from([0.5, 2.0, 4.0]),
    st.sampled_from([-8.0, 0.0, 16.0]),
)
def test_advantages_are_centred_and_ignore_scale_and_shift(rewards: list[float], scale: float, shift: float) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(values, 3, eps=0.0)
    assert advantages.isfinite().all()
    assert advantages.sum().item() == pytest.approx(0.0, abs=1e-6)
    if values.std() > 1e-3:
        moved = group_advantages(values * scale + shift, 3, eps=0.0)
        torch.testing.assert_close(moved, advantages, rtol=1e-8, atol=1e-8)
        assert advantages.std().item() == pytest.approx(1.0)


@COMMON
@given(batches((torch.float64,)))
def test_token_mean_lies_between_the_extremes(batch: dict[str, Any]) -> None:
    values, mask = batch["teacher_logprobs"], batch["response_mask"]
    kept = values[mask != 0]
    assert kept.min() - 1e-12 <= token_mean(values, mask) <= kept.max() + 1e-12
