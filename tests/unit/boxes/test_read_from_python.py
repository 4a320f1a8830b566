"""`kdrl.open_run` on real runs: every frame against the files that it is read from, docs/python.md and its notebook."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from crash.tiny_run import rows
from rollout_runs import NUM_ROWS, make_run, part_path, write_step

import kdrl_core as kdrl
from kdrl_core.boxes.stage import SEVERAL_TABLES, open_stage
from kdrl_core.errors import DataError, KdrlError, RunError
from kdrl_core.ledger import Run
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.look.rollouts.views import PROMPTS

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def runs_of(finished: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifacts folder of the finished run is the user's."""
    monkeypatch.setenv("KDRL_ARTIFACTS", str(finished.paths.root.parents[1]))
    return finished.paths.root.parents[1]


@pytest.fixture
def small(artifacts: Path) -> Run:
    """Three whole steps of stage2 and one whose rewards are not there yet; stage1 has none, nothing is evaluated."""
    run = make_run(artifacts)
    write_step(run, "stage2", 3, until="teacher")
    return run


@pytest.mark.usefixtures("runs_of")
def test_the_notebook_runs() -> None:
    notebook = json.loads((DOCS / "reading-a-run.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)  # noqa: S102 (our own page)
    assert (names["run"].name, names["stage"], names["last"]) == ("whole", "stage2", 3)
    assert len(names["responses"]) == len(names["tokens"]) == 16  # 4 prompts of 4 responses
    assert len(names["answers"]) == 3 * 6 * 2  # benchmarks, problems, samples


@pytest.mark.usefixtures("runs_of")
def test_the_first_example_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the run, which is there already."""
    monkeypatch.setattr(kdrl, "run", lambda recipe, overrides, *, name: kdrl.open_run("whole"))
    example = (DOCS / "python.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(example.replace("\nrun.rollouts", "\nmeans = run.rollouts"), names)  # noqa: S102 (our own page)
    assert names["means"].index.tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("runs_of")
def test_every_frame_has_the_columns_and_types_of_its_page() -> None:
    run = kdrl.open_run("whole")
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    found = {
        "`runs()`": kdrl.runs(),
        "`run.metrics()`": run.metrics(),
        "`run.accuracy()`": run.accuracy(),
        "`run.evaluation(label)`": run.evaluation("base"),
        "`run.alarms()`": run.alarms(),
    }
    for title, frame in found.items():
        table = page.split(f"**{title}**", 1)[1].split("**", 1)[0]
        told = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| .+ \|$", table, re.MULTILINE)
        shown = [(name, str(kind)) for name, kind in frame.dtypes.items()]
        expected = [(name, str(pd.Series(["x"]).dtype) if kind == "text" else kind) for name, kind in told]
        assert len(told) > 2
        assert shown[: len(expected)] == expected, title
        assert {kind for _, kind in shown[len(expected) :]} <= {"float64"}, title
    assert list(run.rollouts(columns=RECORD.names)) == RECORD.names
    assert list(run.prompts()) == list(PROMPTS)


def test_rollouts_are_the_files_of_their_steps_joined(finished: Run) -> None:
    run = kdrl.open_run(finished.paths.root)
    columns = ["step", "prompt_id", "sample", "response", "reward", "advantage", "seed", "teacher_logprobs"]
    frame = run.rollouts("stage2", steps=[3, 1], columns=columns)
    assert list(frame) == columns
    assert frame["step"].unique().tolist() == [1, 3]
    paths = finished.paths
    for step in (1, 3):
        here = frame[frame["step"] == step]
        for part in (paths.rollouts, paths.rewards, paths.update, paths.teacher):
            for name in set(columns) & set(rows(part("stage2", step))[0]) - {"teacher_logprobs"}:
                assert here[name].tolist() == [row[name] for row in rows(part("stage2", step))], name
        teacher = [row["teacher_logprobs"] for row in rows(paths.teacher("stage2", step))]
        assert [found.tolist() for found in here["teacher_logprobs"]] == teacher
        assert here["teacher_logprobs"].iloc[0].dtype == np.float32
    assert frame["seed"].dtype == np.uint64
    assert len(run.rollouts()) == 16 * (2 + 4)
    assert not {"token_ids", "logprobs"} & set(run.rollouts(steps=0))
    assert run.rollouts(steps=range(1, 99), columns="stage")["stage"].tolist() == ["stage1"] * 16 + ["stage2"] * 48


def test_metrics_and_accuracy_are_those_of_the_files(finished: Run) -> None:
    run = kdrl.open_run(finished.paths.root)
    metrics = run.metrics()
    assert metrics["stage"].tolist() == ["stage1"] * 2 + ["stage2"] * 4
    assert metrics["step"].tolist() == [0, 1, 0, 1, 2, 3]
    own = rows(finished.paths.metrics("stage2"))
    assert run.metrics("stage2")["kd/kl"].tolist() == [row["kd/kl"] for row in own]
    assert metrics["kd/kl"].isna().tolist() == [True] * 2 + [False] * 4  # stage1 has no teacher
    times = rows(finished.paths.timings("stage1"))
    assert run.metrics("stage1")["time/update_s"].tolist() == [row["time/update_s"] for row in times]

    accuracy = run.accuracy().set_index(["label", "benchmark"])
    assert accuracy.index.get_level_values(0).unique().tolist() == ["base", "stage1", "stage2", "teacher"]
    for label, benchmark in accuracy.index:
        results = json.loads((finished.paths.evaluation(label) / "results.json").read_text())["benchmarks"][benchmark]
        row = accuracy.loc[(label, benchmark)]
        assert [row["accuracy"], row["low"], row["pass@2"]] == [
            results["accuracy"],
            results["low"],
            results["pass_at_k"]["2"],
        ]
        answers = run.evaluation(label, benchmark)
        assert answers["accuracy_reward"].mean() == pytest.approx(row["accuracy"])
    assert accuracy.loc["stage2", "step"].tolist() == [4] * 3
    assert accuracy.loc["teacher", "step"].isna().all()
    assert run.student == finished.paths.student
    assert run.status()["state"] == "finished"


def test_the_folder_of_a_stage_is_not_read_as_one_table(finished: Run) -> None:
    folder = finished.paths.root / "rollouts"
    for place in (folder, folder / "stage=stage2"):
        with pytest.raises(ValueError, match=re.escape(SEVERAL_TABLES)):
            pd.read_parquet(place)
    assert len(pd.read_parquet(folder / "stage=stage2" / "step=000001" / "rewards.parquet")) == 16


def test_a_run_of_an_earlier_version_gets_the_file_when_it_is_resumed(small: Run) -> None:
    folder = small.paths.root / "rollouts" / "stage=stage2"
    assert not (folder / SEVERAL_TABLES).exists()
    open_stage(small, "stage2")
    assert b"kdrl.open_run(RUN).rollouts()" in (folder / SEVERAL_TABLES).read_bytes()


@pytest.mark.usefixtures("artifacts")
def test_without_runs_the_list_is_empty() -> None:
    assert kdrl.runs().empty
    with pytest.raises(RunError, match=r"there are none yet; start one with kdrl run"):
        kdrl.open_run("mine")


def test_an_unfinished_run_says_what_it_has(small: Run) -> None:
    run = kdrl.open_run("small")
    frame = run.rollouts("stage2")
    assert frame["reward"].isna().tolist() == [False] * 3 * NUM_ROWS + [True] * NUM_ROWS
    assert frame["reward"].dtype == np.float32
    assert run.metrics("stage1").empty
    assert run.accuracy().empty
    assert run.alarms().empty
    (listed,) = kdrl.runs().itertuples()
    assert (listed.run, listed.recipe, listed.alarms) == ("small", "miniature", 0)
    assert (listed.progress.split("/")[0], listed.state) == ("stage1 0", "stopped; kdrl resume small")
    with pytest.raises(RunError, match=r"run small has not evaluated base yet; it has none; .*: kdrl resume small"):
        run.evaluation("base")
    with pytest.raises(RunError, match=r"run small is not finished, .*: kdrl resume small"):
        _ = run.student
    with pytest.raises(RunError, match=r"no rollouts of stage1 at steps=0; there are none yet"):
        run.rollouts("stage1", steps=0)
    assert run.rollouts("stage1").empty


@pytest.mark.parametrize(
    ("ask", "kind", "told"),
    [
        (lambda run: kdrl.open_run("smal"), RunError, r"no run 'smal' .*did you mean 'small'"),
        (
            lambda run: run.metrics("stge2"),
            RunError,
            r"no stage 'stge2', did you mean 'stage2'\?; it has stage1, stage2",
        ),
        (lambda run: run.prompts("stage'"), RunError, "no stage"),
        (lambda run: run.rollouts(columns=["rewrd"]), DataError, r"no column 'rewrd', did you mean 'reward'"),
        (lambda run: run.rollouts(steps=7), RunError, r"no rollouts of any stage at steps=7; its steps are 0 to 3"),
        (lambda run: run.rollouts(steps=[-1]), DataError, "step_min must not be negative"),
        (lambda run: run.rollouts(steps="3"), DataError, r"steps='3': give a whole number"),
        (lambda run: run.evaluation("bose"), RunError, r"no evaluation 'bose', did you mean 'base'\?; it has none"),
        (lambda run: run.sql("drop table rollouts"), DataError, "give a SELECT"),
    ],
)
@pytest.mark.usefixtures("small")
def test_what_is_not_there_is_named(ask: Callable[[Any], Any], kind: type[KdrlError], told: str) -> None:
    with pytest.raises(kind, match=told):
        ask(kdrl.open_run("small"))


def test_an_unknown_benchmark_is_named(finished: Run) -> None:
    with pytest.raises(DataError, match=r"no benchmark 'tes', did you mean 'test'\?; there are test, hard, validation"):
        kdrl.open_run(finished.paths.root).evaluation("base", "tes")


def test_a_damaged_file_is_left_out_with_a_warning(small: Run) -> None:
    path = part_path(small.paths, "stage2", 1, "rewards")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"left out: .*rewards\.parquet is damaged"):
        frame = kdrl.open_run("small").rollouts(columns=["step", "reward"])
    assert frame[frame["reward"].isna()]["step"].unique().tolist() == [1, 3]


def test_a_folder_anywhere_and_a_dump_of_others(small: Run, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "copy"
    shutil.copytree(small.paths.root, moved)
    assert len(kdrl.open_run(moved).metrics()) == 3
    (moved / "recipe.yaml").unlink()
    (moved / "manifest.json").unlink()
    dump = kdrl.open_run(moved)
    assert (dump.name, dump.stages) == ("copy", ["stage2"])
    assert dump.prompts("stage2")["num_steps"].tolist() == [4] * 3
    with pytest.raises(RunError, match=r"no recipe\.yaml: another trainer's dump has rollouts\(\)"):
        dump.metrics()
