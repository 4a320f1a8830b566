"""Top-K distillation (Sec. 2.3, A.3): the reverse KL over the vocabulary against the teacher's K best tokens.

    KL_t = Σ_v π_θ(v) (log π_θ(v) − log π'_T(v)),   log π'_T(v) = log_softmax(top-K logits)(v), v in the top-K
                                                                = floor,                        otherwise

Departure: the paper sets the other logits to −∞, which makes the KL infinite as soon as the student has any mass
outside the top-K; frameworks hide that behind the smallest number of their dtype. Here the log-probability of those
tokens is the argument `floor`, so each unit of mass outside costs −floor nats. π'_T is not renormalised for it: the K
tokens alone sum to 1, and may have logprobs below the floor. So with K = V this is the exact KL for any floor. The
gradient is linear in the floor: −floor · ∇ mass outside. On the miniature with K = 4 it is 1.6 times k2's at −20, which
all shipped recipes and sweeps use, and 85 times at −1000, where nothing else counts: another method (docs/method.md has
the norms). The paper's −∞ is like the latter; it finds training on it unstable.
"""

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, as_is_response, check_finite, check_num_dims, check_shape
from kdrl_core.objectives.inputs import check_log_probability


def topk_kl(
    student_logits: Tensor, topk_ids: Tensor, topk_logits: Tensor, *, floor: float, response_mask: Tensor | None = None
) -> Tensor:
    """Reverse KL per token against the renormalised top-K teacher (A.3); lower is closer to the teacher.

    Args:
        student_logits: [B, T, V] at the sampling temperature, i.e. logits / T; the gradient flows here.
        topk_ids: [B, T, K] integers, the teacher's K best tokens, distinct, without padding ids.
        topk_logits: [B, T, K] their logits (or logprobs) / T; no gradient.
        floor: log-probability of every token outside the top-K, finite and ≤ 0, e.g. −20.
        response_mask: [B, T]; where 0, the inputs may hold anything and the result and gradient are 0. None: all count.

    Returns:
        [B, T] in the dtype of `student_logits`, float32 at least; for `kdrl_loss(kl_estimator="topk", topk=…)`.

    Raises:
        ValueError: shapes do not match, `floor` is no finite number or above 0, or on a response token an id is outside
            [0, V) or repeated, or a top-K logit is not finite.
    """
    check_log_probability("floor", floor)
    check_num_dims("student_logits", student_logits, "[B, T, V]")
    check_num_dims("topk_ids", topk_ids, "[B, T, K]")
    num_rows, num_tokens, vocabulary = student_logits.shape
    check_shape("topk_ids", topk_ids, (num_rows, num_tokens, topk_ids.shape[-1]), "[B, T, K]")
    check_shape("topk_logits", topk_logits, topk_ids.shape, "[B, T, K]")
    if topk_ids.is_floating_point() or topk_ids.dtype == torch.bool:
        raise ValueError(f"topk_ids: expected an integer dtype, given {topk_ids.dtype}")
    if not 1 <= topk_ids.shape[-1] <= vocabulary:
        raise ValueError(f"topk_ids: expected K between 1 and V = {vocabulary}, given K = {topk_ids.shape[-1]}")
    if response_mask is None:
        response_mask = torch.ones(num_rows, num_tokens, dtype=torch.bool, device=student_logits.device)
    is_response = as_is_response(response_mask, (num_rows, num_tokens))[..., None]
    check_finite("topk_logits", topk_logits, is_response)
    _check_ids(topk_ids, is_response, vocabulary)

    # Padding must not meet arithmetic: equal logits, and K distinct ids.
    student = torch.where(is_response, as_float(student_logits), 0.0).log_softmax(-1)
    student = student.clamp(min=torch.finfo(student.dtype).min)  # a token that the student excludes costs 0 · log 0 = 0
    ids = torch.where(is_response, topk_ids.long(), torch.arange(topk_ids.shape[-1], device=topk_ids.device))
    teacher_topk = torch.where(is_response, as_float(topk_logits.detach()), 0.0).log_softmax(-1).to(student.dtype)
    teacher = torch.full_like(student, floor, requires_grad=False).scatter(-1, ids, teacher_topk)
    kl = (student.exp() * (student - teacher)).sum(-1)
    return torch.where(is_response[..., 0], kl, 0.0)


def _check_ids(topk_ids: Tensor, is_response: Tensor, vocabulary: int) -> None:
    is_outside = ((topk_ids < 0) | (topk_ids >= vocabulary)) & is_response
    if is_outside.any():
        row, token, entry = is_outside.nonzero()[0].tolist()
        raise ValueError(
            f"topk_ids: expected ids in [0, V = {vocabulary}), given {topk_ids[row, token, entry].item()} "
            f"at row {row}, token {token}; the teacher's padding ids must be left out"
        )
    ordered = topk_ids.sort(-1).values
    is_repeated = (ordered[..., 1:] == ordered[..., :-1]) & is_response
    if is_repeated.any():
        row, token, entry = is_repeated.nonzero()[0].tolist()
        raise ValueError(
            f"topk_ids: expected distinct ids, given {ordered[row, token, entry].item()} twice "
            f"at row {row}, token {token}"
        )
