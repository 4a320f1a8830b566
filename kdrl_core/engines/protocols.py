"""The methods that rollout engines and scorers must have."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from numpy import float32, int32
from numpy.typing import NDArray

from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest

OnFinished = Callable[[Sequence[Rollout]], None]
"""Called with responses as they are finished, in any order, while others are still generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKScore:
    """Scores of one response of n tokens by a frozen model, under softmax(logits / T) over the whole vocabulary."""

    logprobs: NDArray[float32]
    """[n] of the response's own tokens."""
    topk_ids: NDArray[int32]
    """[n, k] the likeliest tokens, best first."""
    topk_logprobs: NDArray[float32]
    """[n, k] their logprobs."""


class RolloutEngine(Protocol):
    """Samples responses from the current policy.

    Engines are made with a `tokenizer`, which decodes responses without special tokens; `stop_ids`, which end a
    response and belong to it; a `temperature`, 0 for greedy with the logprobs of softmax(logits); and
    `max_response_tokens`: longer responses are cut (`FinishReason.LENGTH`).
    """

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        """One response per request, in order. `on_finished` gets each response as soon as it is finished.

        `max_response_tokens` may lower the engine's own limit.
        """
        ...

    def load_weights(self, checkpoint_dir: Path) -> None:
        """Load the weights of a Hugging Face model directory of the same architecture."""
        ...

    def sleep(self) -> None:
        """Free memory for others until the engine is used again."""
        ...

    def close(self) -> None:
        """Free memory, processes and connections."""
        ...


class TeacherScorer(Protocol):
    """A frozen model that gives the logprobs of a response's tokens."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[float32]]:
        """Per request the logprob of each response token, [len(token_ids)] float32, under softmax(logits / T)."""
        ...

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """As `score`, with the k likeliest tokens at every position, without ids that the tokenizer does not have."""
        ...

    def sleep(self) -> None:
        """As `RolloutEngine.sleep`."""
        ...

    def close(self) -> None:
        """Free memory and connections."""
        ...
