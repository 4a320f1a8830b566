"""`kdrl report`: any runs side by side, which are one variant, and what is said of those that are missing."""

import json
import shutil
from pathlib import Path

import pytest
from browser import look, needs_chromium
from typer.testing import CliRunner

from flows.cli import app
from kdrl_core.config import load_recipe
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, create_run
from kdrl_core.look.sweeps.comparison import read_runs, write_comparison
from kdrl_core.look.sweeps.state import CellState


@pytest.fixture
def runs(donor_and_alone: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished kdrl and alone (GRPO); kdrl-seed4, which has not begun; plain-0 and plain-1, of another recipe."""
    artifacts = tmp_path / "artifacts"
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    for run in donor_and_alone:
        shutil.copytree(run.paths.root, artifacts / "runs" / run.name)
    create_run("kdrl-seed4", donor_and_alone[0].recipe.model_copy(update={"seed": 4}))
    for seed in (0, 1):
        create_run(f"plain-{seed}", load_recipe("miniature", ["stage2.steps=7", f"seed={seed}"]))
    return artifacts


@pytest.mark.usefixtures("runs")
def test_runs_of_one_recipe_are_one_variant_and_others_their_own() -> None:
    results = read_runs(["alone", "kdrl", "kdrl-seed4", "plain-0", "plain-1"])
    assert [(status.run, status.variant, status.seed, status.state) for status in results.statuses] == [
        ("alone", "alone", 0, CellState.FINISHED),
        ("kdrl", "kdrl", 0, CellState.FINISHED),
        ("kdrl-seed4", "kdrl", 4, CellState.STOPPED),
        ("plain-0", "plain", 0, CellState.STOPPED),
        ("plain-1", "plain", 1, CellState.STOPPED),
    ]
    assert results.missing[0].detail == "kdrl resume kdrl-seed4"
    assert (results.name, results.description) == ("alone, kdrl, plain", "alone, kdrl, kdrl-seed4, plain-0, plain-1")
    assert [cell.run for cell in results.cells] == ["alone", "kdrl"]


def test_a_seed_that_stands_twice_makes_a_variant_of_its_own(runs: Path) -> None:
    shutil.copytree(runs / "runs" / "kdrl", runs / "runs" / "again")
    assert [status.variant for status in read_runs(["kdrl", "again"]).statuses] == ["kdrl", "again"]


@pytest.mark.usefixtures("runs")
def test_labels() -> None:
    found = read_runs(["kdrl", "kdrl-seed4", "alone"], {"kdrl-seed4": "KDRL", "alone": "GRPO"})
    assert [status.variant for status in found.statuses] == ["KDRL", "KDRL", "GRPO"]
    with pytest.raises(RunError, match="'plain-0' is not among the runs"):
        read_runs(["kdrl"], {"plain-0": "x"})
    with pytest.raises(RunError, match="'x' and 'y' are for runs of one variant"):
        read_runs(["plain-0", "plain-1"], {"plain-0": "x", "plain-1": "y"})
    with pytest.raises(RunError, match="'same' would be the name of two variants"):
        read_runs(["kdrl", "alone"], {"kdrl": "same", "alone": "same"})


def test_the_report_s_files_say_the_same(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["report", "kdrl", "alone", "kdrl-seed4", "--label", "alone=GRPO", "-o", str(folder)]
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == [
        f"report.{kind}" for kind in ("csv", "html", "json", "md")
    ]
    content = json.loads((folder / "report.json").read_text())
    assert [row["label"] for row in content["rows"] if not row["is_reference"]] == ["kdrl", "GRPO"]
    assert [one["run"] for one in content["missing"]] == ["kdrl-seed4"]
    score = content["rows"][-1]["scores"]["test"]
    assert f"{100 * score['mean']:.1f}" in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert "2 of 3 runs are finished" in page
    assert "kdrl resume kdrl-seed4" in page
    assert "Not finished" in done.output
    assert list((runs / "runs").glob("*/report.html")) == []


@pytest.mark.usefixtures("runs")
def test_one_run_is_a_report_too(tmp_path: Path) -> None:
    table = write_comparison(read_runs(["plain-0"]), tmp_path, stem="report")
    assert [row.label for row in table.rows] == ["plain-0"]
    assert "0 of 1 runs are finished" in (tmp_path / "report.html").read_text()


FAULTS = {
    "unknown run": (["kdlr"], "no run 'kdlr'"),
    "sweep": (["my-sweep"], "'my-sweep' is a sweep, not a run; for its report: kdrl sweep report my-sweep"),
    "label": (["kdrl", "--label", "kdrl"], "--label kdrl: expected RUN=TEXT"),
    "two labels": (["kdrl", "--label", "kdrl=a", "--label", "kdrl=b"], "kdrl has a label already, a"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_writes_nothing(fault: str, runs: Path, tmp_path: Path) -> None:
    (runs / "sweeps" / "my-sweep").mkdir(parents=True)
    (runs / "sweeps" / "my-sweep" / "sweep.json").write_text("{}")
    arguments, words = FAULTS[fault]
    done = CliRunner().invoke(app, ["report", *arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("runs")
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["report", "kdrl", "--output", str(tmp_path / "file" / "sub")])
    assert done.exit_code == 1
    assert "the folder cannot be made" in done.stderr


@pytest.mark.usefixtures("runs")
@needs_chromium
def test_in_a_browser_on_a_phone(tmp_path: Path) -> None:
    write_comparison(read_runs(["kdrl", "alone", "kdrl-seed4"]), tmp_path, stem="report")
    found, console = look(
        tmp_path / "report.html",
        """
        const plots = [...document.querySelectorAll(".plot")];
        return {
          undrawn: plots.filter(plot => !plot.querySelector("svg.main-svg")).length, plots: plots.length,
          cut: document.documentElement.scrollWidth - document.documentElement.clientWidth,
          title: document.querySelector("h1").textContent,
        };
        """,
        width=390,
    )
    assert console == []
    assert (found["undrawn"], found["cut"]) == (0, 0)
    assert found["plots"] > 5
    assert found["title"].startswith("kdrl, alone ")
