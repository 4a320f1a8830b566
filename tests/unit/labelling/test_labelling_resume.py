"""A labelling goes on where it stopped, and only with the settings it began with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.labelling.conftest import ROWS, SAMPLES, Scripted, scripted, write

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.labelling import LabelPlan, plan_labels, work_folder
from kdrl_core.labelling.work import open_work
from kdrl_core.types import Rollout, RolloutRequest


def interrupted(plan: LabelPlan, output: Path, answers: dict[str, str], after: int) -> None:
    """A labelling that stops like Ctrl-C after some shards."""
    engine = Scripted(answers)
    generate = engine.generate

    def stop(requests: Sequence[RolloutRequest], **options: Any) -> list[Rollout]:
        if len(engine.seen) >= 4 * after:
            raise KeyboardInterrupt
        return generate(requests, **options)

    engine.generate = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        scripted(plan, output, engine, shard_problems=1)


@pytest.fixture
def begun(recipe: Recipe, tmp_path: Path) -> tuple[LabelPlan, Path, dict[str, str]]:
    """A labelling of three problems that was stopped after two."""
    source = write(tmp_path / "in.jsonl", [{**row, "id": f"p{i}"} for i, row in enumerate(ROWS)])
    plan, output = plan_labels(recipe, [source]), tmp_path / "out.parquet"
    answers = {"p0": "8888", "p1": "8911", "p2": "2221"}
    interrupted(plan, output, answers, after=2)
    return plan, output, answers


def test_a_second_call_goes_on(begun: tuple[LabelPlan, Path, dict[str, str]], tmp_path: Path) -> None:
    plan, output, answers = begun
    assert not output.exists()
    engine, heard = Scripted(answers), []
    summary = scripted(plan, output, engine, shard_problems=1, on_progress=lambda *at: heard.append(at))
    assert {request.prompt_id for request in engine.seen} == {"p2"}
    assert heard[0] == (4, 12)
    assert (summary.num_sampled, summary.histogram) == (3, (1, 1, 0, 1, 0))
    whole = tmp_path / "whole.parquet"
    scripted(plan, whole, Scripted(answers), shard_problems=1)
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        (["stage2.temperature=0.6"], "temperature: 1.0 → 0.6"),
        (["seed=7"], "seed: 0 → 7"),
        (["student.path=builtin:miniature/teacher"], "model: student sha256 "),
    ],
)
def test_changed_settings_are_refused_with_the_difference(
    begun: tuple[LabelPlan, Path, dict[str, str]], tmp_path: Path, overrides: list[str], difference: str
) -> None:
    _, output, answers = begun
    plan = plan_labels(load_recipe("miniature", [SAMPLES, *overrides]), [str(tmp_path / "in.jsonl")])
    with pytest.raises(
        RunError, match=r"was begun with other settings .*; set them back, give another --output"
    ) as caught:
        scripted(plan, output, Scripted(answers), shard_problems=1)
    assert difference in str(caught.value)
    assert not output.exists()


def test_other_problems_are_refused(
    begun: tuple[LabelPlan, Path, dict[str, str]], tmp_path: Path, recipe: Recipe
) -> None:
    source = write(tmp_path / "in.jsonl", [{**ROWS[0], "id": "p0", "answer": "9"}])
    with pytest.raises(RunError, match=r"\(problems: 3 sha256 \w+ → 1 sha256 \w+\)"):
        scripted(plan_labels(recipe, [source]), begun[1], Scripted(begun[2]), shard_problems=1)


def test_an_altered_shard_is_named(begun: tuple[LabelPlan, Path, dict[str, str]]) -> None:
    plan, output, answers = begun
    shard = work_folder(output) / "shards" / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedArtifactError, match=r"shard-00001\.parquet is damaged"):
        scripted(plan, output, Scripted(answers), shard_problems=1)


def test_settings_that_cannot_be_read_are_told(begun: tuple[LabelPlan, Path, dict[str, str]]) -> None:
    plan, output, answers = begun
    (work_folder(output) / "label.json").write_text("{")
    with pytest.raises(RunError, match=r"label\.json cannot be read .*; give another --output, or delete the folder"):
        scripted(plan, output, Scripted(answers))


def test_the_work_folder_is_swept_and_held(tmp_path: Path) -> None:
    leftover = tmp_path / "w" / "shards" / ".tmp-x"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("")
    with open_work(tmp_path / "w", {"a": 1}):
        assert not leftover.exists()
    with (
        open_work(tmp_path / "w", {"a": 1}),
        pytest.raises(RunError, match="a: 1 → 2"),
        open_work(tmp_path / "w", {"a": 2}),
    ):
        pass
