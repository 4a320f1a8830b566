"""A rollout engine that speaks from a script, one Verifier for all tests, and labels read back."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import KeptVerifier

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.data import read_problems
from kdrl_core.engines.protocols import OnFinished
from kdrl_core.labelling import LabelPlan, LabelSummary, label, label_problems
from kdrl_core.types import FinishReason, Rollout, RolloutRequest
from kdrl_core.verify import Verifier

SAMPLES = "stage2.data.difficulty.num_samples=4"
LABEL = "DeepSeek-R1-Distill-Qwen-1.5B"
ROWS = [{"problem": question, "answer": answer} for question, answer in [("3+5", "8"), ("2*4", "8"), ("1+1", "2")]]


class Scripted:
    """A rollout engine that answers from a script: question → what its samples say, in turn."""

    def __init__(self, answers: dict[str, Sequence[str]], *, is_thinking: bool = False) -> None:
        self.answers = answers
        self.frame = "{}</think>\\boxed{{{}}}" if is_thinking else "<think>{}</think>\\boxed{{{}}}"
        self.seen: list[RolloutRequest] = []

    def load_weights(self, checkpoint_dir: Path) -> None:
        raise AssertionError(checkpoint_dir)

    def close(self) -> None:
        """Nothing to let go of."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        self.seen += requests
        rollouts = [
            Rollout(
                prompt_id=request.prompt_id,
                sample=request.sample,
                prompt_token_ids=request.prompt_token_ids,
                token_ids=[1, 2],
                logprobs=[0.0, 0.0],
                text=self.frame.format("", self.answers[request.prompt_id][request.sample]),
                finish_reason=FinishReason.STOP,
            )
            for request in requests
        ]
        if on_finished is not None:
            on_finished(rollouts)
        return rollouts


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    kept = KeptVerifier(workers=1)
    yield kept
    Verifier.close(kept)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, verifier: Verifier, tmp_path: Path) -> None:
    monkeypatch.setattr(label, "Verifier", lambda **_: verifier)
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "artifacts"))


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("miniature", [SAMPLES])


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problems_of(path: Path, *, num_samples: int = 4) -> dict[str, dict[str, int]]:
    """problem_id → labels, read as a stage reads it."""
    data = load_recipe("miniature", [SAMPLES]).stage("stage2").data
    difficulty = data.difficulty.model_copy(update={"num_samples": num_samples})
    table = read_problems(
        data.model_copy(update={"files": [str(path)], "format": "problems", "difficulty": difficulty})
    )
    return {row["problem_id"]: dict(row["failures"] or []) for row in table.to_pylist()}


def scripted(plan: LabelPlan, output: Path, engine: Scripted, **options: Any) -> LabelSummary:
    return label_problems(plan, output, make_engine=lambda *_: engine, **options)
