"""Scoring by vLLM in this process: `prompt_logprobs` of prompt and response together, at the student's temperature."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.transformers_engines import refuse_not_finite
from kdrl_core.engines.vllm_engine import VLLMEngine, VLLMSettings
from kdrl_core.models.loading import read_config
from kdrl_core.types import ScoreRequest

_SPARE = 4
"""Tokens beyond k in the first request, since some may be padding ids. If that is too few, a second request asks for k
tokens and one for each padding id."""

_Taken = TypeVar("_Taken")


class VLLMScorer:
    """`TeacherScorer` over vLLM. Raises EngineError as `VLLMEngine`.

    Args:
        model: directory of the frozen model.
        settings: how the engine is started; `temperature` is the student's.
        num_tokens: ids from this number on are padding of the embedding, never among the top-K.
        max_topk: most tokens that `score_topk` will be asked for.
    """

    def __init__(self, model: Path, settings: VLLMSettings, *, num_tokens: int, max_topk: int = 0) -> None:
        size: int = read_config(model)["vocab_size"]
        self._num_tokens = min(num_tokens, size)
        self._num_padding = size - self._num_tokens
        # vLLM must sample one token, which takes a place in the context.
        settings = replace(
            settings,
            samples=False,
            max_model_len=settings.max_model_len + 1,
            max_logprobs=max_topk + self._num_padding if max_topk else 0,
        )
        self._engine = VLLMEngine(model, settings)

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        """Raises EngineError if a request does not fit the context, a logprob is not finite, or vLLM fails."""
        scores = [logprobs[:, 0] for logprobs in self._score(requests, 0, lambda _, logprobs: logprobs)]
        refuse_not_finite(scores)
        return scores

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Raises as `score`, and ValueError if k is above the number of tokens."""
        if not 1 <= k <= self._num_tokens:
            raise ValueError(f"k: expected 1 to {self._num_tokens}, the tokens of the vocabulary, given {k}")

        def best(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> TopKScore | None:
            return _best(ids, logprobs, k, self._num_tokens)

        found = self._score(requests, k + min(_SPARE, self._num_padding), best)
        lacking = [row for row, score in enumerate(found) if score is None]
        again = self._score([requests[row] for row in lacking], k + self._num_padding, best)
        mended = dict(zip(lacking, again, strict=True))
        scores = [score for row, first in enumerate(found) if (score := mended.get(row, first)) is not None]
        refuse_not_finite([score.logprobs for score in scores])
        return scores

    def sleep(self) -> None:
        self._engine.sleep()

    def close(self) -> None:
        self._engine.close()

    def _score(
        self, requests: Sequence[ScoreRequest], k: int, take: Callable[[NDArray[np.int32], NDArray[np.float32]], _Taken]
    ) -> list[_Taken]:
        """`take` applied to the ids and logprobs [n, 1 + k] of each response: the token itself, then the likeliest."""
        prompts = [[*request.prompt_token_ids, *request.token_ids] for request in requests]
        parameters = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": k}
        taken: dict[int, _Taken] = {}

        def finish(row: int, output: Any) -> None:
            flat, size = output.prompt_logprobs, len(requests[row].token_ids) * (1 + k)
            first = len(flat.token_ids) - size
            taken[row] = take(
                np.array(flat.token_ids[first:], np.int32).reshape(-1, 1 + k),
                np.array(flat.logprobs[first:], np.float32).reshape(-1, 1 + k),
            )

        self._engine.run(prompts, lambda _: parameters, finish)
        return [taken[row] for row in range(len(requests))]


def _best(ids: NDArray[np.int32], logprobs: NDArray[np.float32], k: int, num_tokens: int) -> TopKScore | None:
    """The k likeliest tokens without padding; None if a position has fewer."""
    is_known = ids[:, 1:] < num_tokens
    if (is_known.sum(axis=1) < k).any():
        return None
    first = np.argsort(~is_known, axis=1, kind="stable")[:, :k]
    return TopKScore(
        logprobs=logprobs[:, 0],
        topk_ids=np.take_along_axis(ids[:, 1:], first, axis=1),
        topk_logprobs=np.take_along_axis(logprobs[:, 1:], first, axis=1),
    )
