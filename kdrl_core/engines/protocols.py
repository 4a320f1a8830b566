"""What an engine must do; everything else about it is its own business."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from numpy import float32
from numpy.typing import NDArray

from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest


class RolloutEngine(Protocol):
    """Samples responses from the current policy."""

    def generate(
        self, requests: Sequence[RolloutRequest], *, on_progress: Callable[[int], None] | None = None
    ) -> list[Rollout]:
        """One response per request, in the order of the requests; `on_progress` hears how many are finished."""
        ...

    def load_weights(self, checkpoint_dir: Path) -> None:
        """Take the weights of a Hugging Face model directory of the same architecture."""
        ...


class TeacherScorer(Protocol):
    """A frozen model that tells how likely it finds the tokens of a response."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[float32]]:
        """Per request the logprob of each response token, [len(token_ids)] float32, under softmax(logits / T)."""
        ...
