"""docs/extending.md as it stands; and what docs/architecture.md answers under "How do I add", done once for an
objective, a reward and a command.

An artifact with its box and task is added in boxes/test_make.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crash.tiny_run import open_tiny, rows, train
from documented import blocks, python, settings
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.shared import errors, out
from kdrl_core.boxes import builders
from kdrl_core.config import TrackingConfig, resolve_path
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.look.tracking import clients, close_tracking, track
from kdrl_core.objectives.kinds import OBJECTIVES, ObjectiveKind
from kdrl_core.tables.files import load_metrics

ONE_STAGE = ["stage1=null", "stage2.steps=2"]


@pytest.mark.usefixtures("fast_sessions")
def test_an_objective_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation alone, on the responses that failed: a combination that the paper does not have."""
    row = ObjectiveKind(teacher="scores", distils=True, is_masked=True)
    monkeypatch.setitem(OBJECTIVES, "rkl_on_failures", row)
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, "stage2.objective=rkl_on_failures", "stage2.kd_masking=response"])
    train(run)
    for step in range(2):
        update, rewards = rows(run.paths.update("stage2", step)), rows(run.paths.rewards("stage2", step))
        assert {row["advantage"] for row in update} == {0.0}
        assert [row["kd_weight"] for row in update] == [float(row["reward"] == 0.0) for row in rewards]
    assert run.paths.checkpoint("stage2", 2).is_dir()


TITLES = ("An estimator of the KL", "A term of the loss", "Data", "A teacher")


@pytest.mark.usefixtures("fast_sessions", "own_estimators")
def test_an_estimator_a_term_data_and_a_teacher_are_named_in_the_recipe(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_kl.py").write_text(python("extending", "An estimator of the KL"))
    Path("my_terms.py").write_text(python("extending", "A term of the loss"))
    exec(python("extending", "Data"), {})  # noqa: S102 (our own page)
    shutil.copytree(resolve_path("builtin:miniature/teacher"), resolve_path("run:first"))
    sections = [blocks("extending", title) for title in TITLES]
    named = [setting for found in sections for block in found for words in block for setting in settings(words)]
    assert len(named) == 7
    run = open_tiny(artifacts, "r", [*ONE_STAGE, "stage2.steps=1", *named])
    train(run)
    student, teacher = rows(run.paths.update("stage2", 0)), rows(run.paths.teacher("stage2", 0))
    for row, scored in zip(student, teacher, strict=True):
        log_ratio = np.array(scored["teacher_logprobs"]) - np.array(row["logprobs"])
        assert row["kl_sum"] == pytest.approx((0.5 * log_ratio**2).sum(), rel=1e-4)
    asked = {(row["prompt"], row["ground_truth"]) for row in rows(run.paths.rollouts("stage2", 0))}
    assert asked < {(f"<|user|>{a}+{a + 1}<|assistant|>", str(2 * a + 1)) for a in range(5)}
    certain = [logprob for row in student for logprob in row["logprobs"] if logprob > -0.01]
    tokens = sum(len(row["logprobs"]) for row in student)
    (metrics,) = rows(run.paths.metrics("stage2"))
    assert metrics["term/too_certain"] == pytest.approx(sum(certain) / tokens, abs=1e-6)
    manifest = json.loads(run.paths.manifest.read_text())
    assert manifest["outside"].keys() >= {"stage2.kl_estimator", "stage2.terms.0.function", "teacher.path"}


@pytest.mark.usefixtures("fast_sessions")
def test_a_task_is_data_and_a_function(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("parity.py").write_text(python("extending", "A task"))
    exec(python("extending", "A task"), {"__name__": "__main__"})  # noqa: S102 (our own page)
    named = [setting for block in blocks("extending", "A task") for words in block for setting in settings(words)]
    assert len(named) == 5
    run = open_tiny(artifacts, "r", [*ONE_STAGE, "stage2.steps=1", *named])
    train(run)
    rollouts, rewards = rows(run.paths.rollouts("stage2", 0)), rows(run.paths.rewards("stage2", 0))
    assert {row["ground_truth"] for row in rollouts} == {"odd", "even"}
    for rollout, row in zip(rollouts, rewards, strict=True):
        digit = re.search(r"boxed\{(\d)", rollout["response"])
        is_right = digit is not None and ("even", "odd")[int(digit[1]) % 2] == rollout["ground_truth"]
        assert row["reward"] == float(is_right)
    assert 0 < sum(row["reward"] for row in rewards) < len(rewards)


@pytest.mark.usefixtures("fast_sessions")
def test_an_engine_and_a_tracker_are_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    page: dict[str, Any] = {"Tracker": clients.Tracker}
    for title in ("An engine", "A tracker"):
        exec(python("extending", title), page)  # noqa: S102 (our own page)

    def counting(*arguments: Any, **options: Any) -> Any:
        made.append(page["Counting"](rollout_engine(*arguments, **options)))
        return made[-1]

    monkeypatch.setattr(builders, "rollout_engine", counting)
    run = open_tiny(tmp_path, "r", ONE_STAGE)
    train(run)
    assert [engine.asked for engine in made] == [2 * 4 * 4]  # steps × prompts × responses

    monkeypatch.setitem(clients.CLIENTS, "lines", page["Lines"])  # type: ignore[misc]
    config = TrackingConfig.model_construct(trackers=["lines"])  # type: ignore[list-item]
    tracked = replace(run, recipe=run.recipe.model_copy(update={"tracking": config}))
    for _ in range(2):  # the second finds nothing to send
        track(tracked)
        close_tracking()
    points = [json.loads(line) for line in (run.paths.tracking / "points.jsonl").read_text().splitlines()]
    sent = [(point["group"], point["step"], point["reward/mean"]) for point in points]
    assert sent == [("stage2", row["step"], row["reward/mean"]) for row in load_metrics(run, "stage2")]


REWARD = {
    "config/answers.py": (
        '    require_format: bool = Field(True, description="multiply by the format reward")\n',
        '    unformatted: float = Field(0.0, description="reward of a right answer in the wrong format")\n',
    ),
    "verify/screening.py": (
        "    require_format: bool\n",
        "    unformatted: float\n",
        "    accuracy = 1.0 if outcome.kind is VerdictKind.CORRECT else 0.0\n",
        "    if form.kind is not None and accuracy:\n"
        "        return Verdict(\n"
        "            kind=form.kind, reward=options['unformatted'], format_reward=0.0, accuracy_reward=1.0,\n"
        "            extracted=form.answer, reason='right, in the wrong format',\n"
        "        )\n",
    ),
}
"""File → lines of it, each followed by what is added behind it."""
REWARDED = """
import sys
from dataclasses import replace
from pathlib import Path
from crash.tiny_run import open_tiny, rows, train
from kdrl_core.boxes.session import stage_session

run = open_tiny(Path(sys.argv[1]), "r", ["stage1=null", "stage2.steps=1", "reward.unformatted=0.25"])
train(run)
rewards = rows(run.paths.rewards("stage2", 0))
options = stage_session(run.paths.root, "stage2").verdict_options(rows(run.paths.rollouts("stage2", 0))[0]["prompt"])
verifier = stage_session(run.paths.root, "stage2").verifier
print(*(verifier.verify(text, "4", **options).reward for text in (r"\\boxed{4}", r"\\boxed{5}")))
print(all(row["reward"] == (0.25 if row["format_reward"] == 0 else 1) * row["accuracy_reward"] for row in rewards))
"""


def test_a_switch_of_the_reward_is_a_field_and_two_lines(tmp_path: Path) -> None:
    """A right answer in the wrong format gets a quarter: in a copy of the core with these lines added."""
    root = Path(__file__).parent.parent.parent
    core = tmp_path / "kdrl_core"
    shutil.copytree(root / "kdrl_core", core, ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in REWARD.items():
        text = (core / name).read_text()
        for anchor, added in zip(lines[::2], lines[1::2], strict=True):
            assert text.count(anchor) == 1
            text = text.replace(anchor, anchor + added)
        (core / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", REWARDED, str(tmp_path / "artifacts")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}:{root / 'tests'}", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.25", "0.0", "True"]


def test_a_command_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    @app.command()
    def hello(name: str) -> None:
        """Greet a run."""
        with errors():
            out.print(f"hello {name}")

    found = CliRunner().invoke(app, ["hello", "mine"])
    assert (found.exit_code, "hello mine" in found.output) == (0, True)
    assert "Greet a run." in CliRunner().invoke(app, ["--help"]).output
