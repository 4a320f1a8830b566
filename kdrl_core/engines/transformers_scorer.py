"""Teacher scoring by transformers in process: the logprobs of given tokens under softmax(logits / T) (PITFALLS 3)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kdrl_core.errors import EngineError
from kdrl_core.training.batch import pad_sequences, token_budget_batches
from kdrl_core.training.logprobs import response_logprobs
from kdrl_core.types import ScoreRequest


class TransformersScorer:
    """`TeacherScorer` over a frozen transformers model.

    Args:
        model: in eval mode.
        temperature: the student's sampling temperature; the teacher's logits are divided by it.
        batch_tokens: padded tokens per forward pass.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, batch_tokens: int) -> None:
        self._model = model
        self._temperature = temperature
        self._batch_tokens = batch_tokens

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        """Logprobs [len(token_ids)] per request, in order. Raises EngineError for a logprob that is not finite."""
        scores: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(requests)
        lengths = [(len(r.prompt_token_ids), len(r.token_ids)) for r in requests]
        for rows in token_budget_batches(lengths, max_tokens=self._batch_tokens):
            batch = pad_sequences([requests[row] for row in rows], device=self._model.device)
            logprobs, _ = response_logprobs(self._model, batch, temperature=self._temperature)
            for row, values, mask in zip(rows, logprobs.cpu().numpy(), batch.response_mask.cpu().numpy(), strict=True):
                scores[row] = values[mask.astype(bool)].astype(np.float32)
        for row, values in enumerate(scores):
            if not np.isfinite(values).all():
                token = int(np.flatnonzero(~np.isfinite(values))[0])
                raise EngineError(
                    f"the scoring model gives logprob {values[token]} to token {token} of response {row}; "
                    "check that its weights are complete and its dtype has the range (bfloat16, not float16)"
                )
        return scores
