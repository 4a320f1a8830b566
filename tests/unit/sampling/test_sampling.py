"""Requests with derived seeds, and generation that hands on what is finished."""

from collections.abc import Sequence
from typing import Any, cast

from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.ledger import derive_seed
from kdrl_core.sampling.responses import Response, engine_source, generate, requests_for, rollouts_table
from kdrl_core.tables.schemas import ROLLOUTS
from kdrl_core.types import FinishReason, Rollout, RolloutRequest


class Backwards:
    """Finishes the last response first."""

    def generate(self, requests: Sequence[RolloutRequest], *, on_finished: Any, **_: Any) -> list[Rollout]:
        rollouts = [
            Rollout(
                prompt_id=request.prompt_id,
                sample=request.sample,
                prompt_token_ids=request.prompt_token_ids,
                token_ids=[1, 2],
                logprobs=[-0.5, -1.0],
                text=f"{request.prompt_id}{request.sample}",
                finish_reason=FinishReason.STOP,
            )
            for request in requests
        ]
        for rollout in reversed(rollouts):
            on_finished([rollout])
        return rollouts


ENGINE = cast("RolloutEngine", Backwards())
REQUESTS = requests_for({"b": [5], "a": [6, 7]}, 2, 3, "stage1", 12)


def test_requests_are_grouped_and_have_seeds_of_their_own() -> None:
    assert [(r.prompt_id, r.sample, list(r.prompt_token_ids)) for r in REQUESTS] == [
        ("b", 0, [5]),
        ("b", 1, [5]),
        ("a", 0, [6, 7]),
        ("a", 1, [6, 7]),
    ]
    assert [r.seed for r in REQUESTS] == [
        derive_seed(3, "stage1", 12, prompt_id, sample) for prompt_id in ("b", "a") for sample in (0, 1)
    ]
    assert requests_for({"a": [6, 7]}, 1, 3, "stage1", 12) == REQUESTS[2:3]


def test_finished_rollouts_are_handed_on_and_counted() -> None:
    heard: list[str] = []
    counted: list[tuple[int, int]] = []
    rollouts = generate(
        ENGINE,
        REQUESTS,
        on_finished=lambda new: heard.extend(rollout.text for rollout in new),
        on_progress=lambda *at: counted.append(at),
    )
    assert [rollout.text for rollout in rollouts] == ["b0", "b1", "a0", "a1"]
    assert heard == ["a1", "a0", "b1", "b0"]
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_rollouts_and_responses_keep_their_seeds() -> None:
    heard: list[Response] = []
    responses = engine_source(ENGINE)(REQUESTS, heard.extend)
    assert [response.seed for response in responses] == [request.seed for request in REQUESTS]
    assert heard == responses[::-1]
    problems = {name: {"problem_id": name, "answer": f"{name}!", "prompt": f"{name}?"} for name in ("a", "b")}
    rollouts = generate(ENGINE, REQUESTS, on_finished=lambda _: None, on_progress=lambda *_: None)
    table = rollouts_table(REQUESTS, rollouts, problems, policy_version=12, engine="scripted")
    assert table.schema == ROLLOUTS
    row = table.to_pylist()[2]
    assert (row["prompt"], row["ground_truth"], row["response"], row["length"]) == ("a?", "a!", "a0", 2)
    assert (row["seed"], row["policy_version"]) == (REQUESTS[2].seed, 12)
