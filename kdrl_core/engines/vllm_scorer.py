"""Scoring by vLLM in this process: `prompt_logprobs` of prompt and response together, at the student's temperature."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.vllm_engine import VLLMEngine, VLLMSettings
from kdrl_core.errors import EngineError
from kdrl_core.types import ScoreRequest

_NUM_PADDING = 4
"""More tokens than k are asked for, since some may be padding of the embedding."""


class VLLMScorer:
    """`TeacherScorer` over vLLM.

    Args:
        model: directory of the frozen model.
        settings: how the engine is started; `temperature` is the student's.
        num_tokens: ids from here on are padding of the embedding, never among the top-K.
        max_topk: most tokens that `score_topk` will be asked for.

    Raises:
        EngineError: as `VLLMEngine`.
    """

    def __init__(self, model: Path, settings: VLLMSettings, *, num_tokens: int, max_topk: int = 0) -> None:
        self._num_tokens = num_tokens
        # One token has to be sampled, which costs a place in the context.
        settings = replace(
            settings,
            samples=False,
            max_model_len=settings.max_model_len + 1,
            max_logprobs=max_topk + _NUM_PADDING if max_topk else 0,
        )
        self._engine = VLLMEngine(model, settings)

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        """Logprobs [len(token_ids)] float32 per request, in order. Raises EngineError if vLLM fails."""
        scores: dict[int, NDArray[np.float32]] = {}
        self._score(requests, 0, lambda row, positions: scores.update({row: _own(requests[row], positions)}))
        return [scores[row] for row in range(len(requests))]

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Logprobs and the k likeliest tokens per request, in order. Raises EngineError if vLLM fails."""
        scores: dict[int, TopKScore] = {}

        def take(row: int, positions: Sequence[Any]) -> None:
            best = [self._best(position, k) for position in positions]
            scores[row] = TopKScore(
                logprobs=_own(requests[row], positions),
                topk_ids=np.array([[token for token, _ in each] for each in best], np.int32).reshape(-1, k),
                topk_logprobs=np.array([[value for _, value in each] for each in best], np.float32).reshape(-1, k),
            )

        self._score(requests, k + _NUM_PADDING, take)
        return [scores[row] for row in range(len(requests))]

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _score(
        self, requests: Sequence[ScoreRequest], num_logprobs: int, take: Callable[[int, Sequence[Any]], None]
    ) -> None:
        """`take` hears row and positions of each response, token id → logprob, and keeps what it needs of them."""
        prompts = [[*request.prompt_token_ids, *request.token_ids] for request in requests]
        parameters = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": num_logprobs, "flat_logprobs": True}

        def finish(row: int, output: Any) -> None:
            take(row, output.prompt_logprobs[len(requests[row].prompt_token_ids) :])

        self._engine.run(prompts, lambda _: parameters, finish)

    def _best(self, position: Any, k: int) -> list[tuple[int, float]]:
        found = [(token, entry.logprob) for token, entry in position.items() if token < self._num_tokens]
        return sorted(found, key=lambda each: (-each[1], each[0]))[:k]


def _own(request: ScoreRequest, positions: Sequence[Any]) -> NDArray[np.float32]:
    tokens = zip(positions, request.token_ids, strict=True)
    logprobs = np.array([position[token].logprob for position, token in tokens], np.float32)
    if not np.isfinite(logprobs).all():
        raise EngineError("the scoring model gives a logprob that is not finite; check its weights and dtype")
    return logprobs
