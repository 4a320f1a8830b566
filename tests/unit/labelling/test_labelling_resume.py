"""A labelling goes on where it stopped, and only with the settings it began with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from unit.labelling.conftest import ROWS, SAMPLES, Scripted, scripted, write

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.labelling import LabelPlan, plan_labels, work_folder
from kdrl_core.labelling.label import open_work
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


def test_shards_of_other_settings_do_not_count(
    begun: tuple[LabelPlan, Path, dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A labelling was killed while it removed its work folder: the settings are gone, shards are left."""
    _, output, _ = begun
    (work_folder(output) / "label.json").unlink()
    other = load_recipe("miniature", [SAMPLES, "seed=7", "student.path=builtin:miniature/teacher"])
    plan = plan_labels(other, [str(tmp_path / "in.jsonl")])
    engine = Scripted({"p0": "9999", "p1": "9999", "p2": "9999"})
    summary = scripted(plan, output, engine, shard_problems=1, keep_work=True)
    assert [request.prompt_id for request in engine.seen] == ["p0"] * 4 + ["p1"] * 4 + ["p2"] * 4
    assert (summary.num_sampled, summary.histogram) == (3, (0, 0, 0, 0, 3))
    told = [one.getMessage() for one in caplog.records if one.name == "kdrl" and "with other settings" in one.msg]
    assert len(told) == 2
    assert "shard-00000.parquet" in told[0]
    again = Scripted({})
    assert scripted(plan, output, again, shard_problems=1).histogram == (0, 0, 0, 0, 3)
    assert again.seen == []


def test_it_goes_on_behind_the_last_response(recipe: Recipe, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{**row, "id": f"p{i}"} for i, row in enumerate(ROWS)])
    plan, answers = plan_labels(recipe, [source]), {"p0": "8888", "p1": "8911", "p2": "2221"}
    engine = Scripted(answers)
    generate = engine.generate

    def stop(requests: Sequence[RolloutRequest], **options: Any) -> list[Rollout]:
        generate(requests[:7], **options)
        raise KeyboardInterrupt

    engine.generate = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        scripted(plan, tmp_path / "out.parquet", engine)
    rest, heard = Scripted(answers), []
    scripted(plan, tmp_path / "out.parquet", rest, keep_work=True, on_progress=lambda *at: heard.append(at))
    assert [(request.prompt_id, request.sample) for request in rest.seen] == [("p1", 3), *(("p2", i) for i in range(4))]
    assert (heard[0], heard[-1]) == ((7, 12), (12, 12))
    assert not list(work_folder(tmp_path / "out.parquet").rglob("*.jsonl"))
    scripted(plan, tmp_path / "whole.parquet", Scripted(answers), keep_work=True)
    for name in ("out.parquet", "out.parquet.work/shards/shard-00000.parquet"):
        whole = tmp_path / name.replace("out", "whole", 1)
        assert (tmp_path / name).read_bytes() == whole.read_bytes()


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
