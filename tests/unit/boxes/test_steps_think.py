"""Training verification and evaluation of real responses, judged again by rules written out here.

The miniature's chat template does not open `<think>`; with one that does, its student goes on inside the thought.
"""

import re
from pathlib import Path

import pytest
from crash.tiny_run import open_tiny, rows
from support import benchmarks

from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import stage_session
from kdrl_core.boxes.step import rollout, verify
from kdrl_core.verify import Verifier

OPENING = "'<|user|>{{ messages[0].content }}<|assistant|><think>'"
MANY = [
    "stage1.max_response_tokens=40",
    benchmarks("test", "hard", "ood", "validation", samples=2, max_problems=6),
    "evaluation.max_context_tokens=48",
]
"""So many and long answers that each kind is among them."""


def judged(response: str, truth: str, *, is_opened: bool) -> tuple[float, float]:
    """(format, accuracy) of a miniature response, whose only tags and boxes are single tokens."""
    counts = response.count("<think>"), response.count("</think>")
    if "</think>" in response:
        region = response.rpartition("</think>")[2].partition("<think>")[0]
    else:
        region = "" if is_opened else response.partition("<think>")[0]
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", region)
    is_closed = bool(re.search(r"\\boxed\{[^{}]+\}[^{]*$", region))
    is_framed = counts == ((0, 1) if is_opened else (1, 1)) and (is_opened or response.startswith("<think>"))
    return float(is_framed and is_closed), float(bool(boxes) and boxes[-1] == truth)


@pytest.mark.usefixtures("fast_sessions")
@pytest.mark.parametrize("require_format", [True, False])
@pytest.mark.parametrize("is_opened", [True, False])
def test_steps_see_the_thought_alike(
    tmp_path: Path, is_opened: bool, require_format: bool, kept_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"student.chat_template={OPENING}"] if is_opened else []
    overrides += [f"reward.require_format={str(require_format).lower()}", "stage1.group_size=8"]
    run = open_tiny(tmp_path, "think", [*MANY, *overrides, "stage1.max_response_tokens=24"])
    filter_run(run)
    session = stage_session(run.paths.root, "stage1")
    assert next(iter(session.pool.values()))["prompt"].endswith("<think>") is is_opened
    begun: list[tuple[str, str]] = []
    monkeypatch.setattr(kept_verifier, "verify_ahead", lambda items, **_: begun.extend(items))
    make(session, rollout, 0)
    answered = [(r["response"], r["ground_truth"]) for r in rows(run.paths.rollouts("stage1", 0))]
    assert sorted(begun) == sorted(answered)  # each is handed to the verifier once, while others are being generated
    make(session, verify, 0)
    seen = set()
    for sampled, verdict in zip(
        rows(run.paths.rollouts("stage1", 0)), rows(run.paths.rewards("stage1", 0)), strict=True
    ):
        response, truth = str(sampled["response"]), str(sampled["ground_truth"])
        layout, accuracy = judged(response, truth, is_opened=is_opened)
        expected = layout * accuracy if require_format else accuracy
        assert (verdict["format_reward"], verdict["reward"]) == (layout, expected), response
        seen.add((layout, expected))
    assert {(1.0, 1.0), (1.0, 0.0), (0.0, 0.0)} <= seen

    evaluate_model(run, "base")
    evaluated = rows(run.paths.evaluation("base") / "responses.parquet")
    assert len(evaluated) == 48
    for row in evaluated:
        _, accuracy = judged(str(row["response"]), str(row["ground_truth"]), is_opened=is_opened)
        assert row["accuracy_reward"] == accuracy, row
    assert 0 < sum(float(str(row["accuracy_reward"])) for row in evaluated) < 48


@pytest.mark.usefixtures("fast_sessions")
@pytest.mark.parametrize("is_opened", [True, False])
def test_a_box_in_an_unfinished_thought_is_no_answer_in_evaluation_and_training(
    tmp_path: Path, is_opened: bool, kept_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `</think>` in the prompt the student gives its box at once; `prompt.think_opened` makes that a thought."""
    answering = "'<|user|>{{ messages[0].content }}<|assistant|><think></think>'"
    opened = f"prompt.think_opened={str(is_opened).lower()}"
    run = open_tiny(
        tmp_path,
        "box",
        [*MANY, f"student.chat_template={answering}", opened, "reward.require_format=false", "stage1.group_size=8"],
    )
    filter_run(run)
    session = stage_session(run.paths.root, "stage1")
    make(session, rollout, 0)
    make(session, verify, 0)
    evaluate_model(run, "base")
    trained = rows(run.paths.rewards("stage1", 0))
    evaluated = rows(run.paths.evaluation("base") / "responses.parquet")
    for found, responses in ((trained, rows(run.paths.rollouts("stage1", 0))), (evaluated, evaluated)):
        texts = [str(row["response"]) for row in responses]
        assert sum(text.startswith("\\boxed{") for text in texts) > len(texts) / 2
        assert not any("</think>" in text for text in texts)
        num_right = sum(float(str(row["accuracy_reward"])) for row in found)
        assert (num_right == 0) is is_opened
        assert all((row["extracted"] is None) for row in found) is is_opened


@pytest.mark.usefixtures("fast_sessions")
def test_a_prompt_that_closes_the_thought_earns_a_reward_without_tags(
    tmp_path: Path, kept_verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Qwen3's chat template with enable_thinking=false: no response has tags, and the format can be right."""
    template = (
        "'<|user|>{{ messages[0].content }}<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}'"
    )
    run = open_tiny(
        tmp_path,
        "closed",
        [
            *MANY,
            f"student.chat_template={template}",
            "prompt.chat_template_kwargs.enable_thinking=false",
            "stage1.group_size=8",
            "evaluation.max_context_tokens=96",
        ],
    )
    filter_run(run)
    session = stage_session(run.paths.root, "stage1")
    make(session, rollout, 0)
    make(session, verify, 0)
    sampled, judged_rows = rows(run.paths.rollouts("stage1", 0)), rows(run.paths.rewards("stage1", 0))
    for row, verdict in zip(sampled, judged_rows, strict=True):
        assert str(row["prompt"]).endswith("<think></think>")
        has_box = bool(re.search(r"\\boxed\{[^{}]+\}[^{]*$", str(row["response"])))
        has_tags = "think>" in str(row["response"])
        assert verdict["format_reward"] == float(has_box and not has_tags), row["response"]
        assert verdict["reward"] == float(str(verdict["format_reward"])) * float(str(verdict["accuracy_reward"]))
    assert sum(float(str(verdict["reward"])) for verdict in judged_rows) > 0
    evaluate_model(run, "base")
    evaluated = rows(run.paths.evaluation("base") / "responses.parquet")
    assert sum(float(str(row["accuracy_reward"])) for row in evaluated) > 0
