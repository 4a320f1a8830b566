"""What an engine must do; everything else about it is its own business."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from numpy import float32, int32
from numpy.typing import NDArray

from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest

OnFinished = Callable[[Sequence[Rollout]], None]
"""Called with responses that have just been finished, in any order, while others are still being generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKScore:
    """What a frozen model finds of one response of T tokens, under softmax(logits / T) over the whole vocabulary."""

    logprobs: NDArray[float32]
    """[T] of the response's own tokens."""
    topk_ids: NDArray[int32]
    """[T, k] the likeliest tokens, best first."""
    topk_logprobs: NDArray[float32]
    """[T, k] their logprobs."""


class RolloutEngine(Protocol):
    """Samples responses from the current policy."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        """One response per request, in the order of the requests; `on_finished` hears each once it is finished.

        Args:
            max_response_tokens: fewer than the engine's own limit; None: that one.
        """
        ...

    def load_weights(self, checkpoint_dir: Path) -> None:
        """Take the weights of a Hugging Face model directory of the same architecture."""
        ...

    def sleep(self) -> None:
        """Let go of what memory it can do without until it is used again; others may need it."""
        ...

    def close(self) -> None:
        """Let go of memory, processes and connections."""
        ...


class TeacherScorer(Protocol):
    """A frozen model that tells how likely it finds the tokens of a response."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[float32]]:
        """Per request the logprob of each response token, [len(token_ids)] float32, under softmax(logits / T)."""
        ...

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """As `score`, with the k likeliest tokens at every position; ids that the tokenizer does not know left out."""
        ...

    def sleep(self) -> None:
        """As `RolloutEngine.sleep`."""
        ...

    def close(self) -> None:
        """Let go of memory and connections."""
        ...
