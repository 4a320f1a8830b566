"""The report of a sweep as a page: complete, without network, of partial sweeps as well, and alive in a browser."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from browser import look, needs_chromium

from kdrl_core.ledger import Run
from kdrl_core.look.reporting.run_report import ema
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.comparison import render_markdown, render_page
from kdrl_core.look.sweeps.dynamics import SweepDynamics, VariantDynamics, mean_lines, read_dynamics
from kdrl_core.look.sweeps.figures import panels_of
from kdrl_core.look.sweeps.results import ModelScores, SweepResults, Watched, read_results_of
from kdrl_core.look.sweeps.state import CellState, CellStatus
from kdrl_core.tables.files import load_metrics

HOSTILE = "</script><script>alert(1)</script><b>bold"


@pytest.fixture
def results(donor_and_alone: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepResults:
    """Two finished variants, one that has not begun."""
    for run in donor_and_alone:
        shutil.copytree(run.paths.root, tmp_path / "artifacts" / "runs" / run.name)
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "artifacts"))
    statuses = [
        CellStatus(run="kdrl", variant="KDRL", seed=0, state=CellState.FINISHED),
        CellStatus(run="alone", variant="GRPO", seed=0, state=CellState.FINISHED),
        CellStatus(run="never", variant=HOSTILE, seed=0, state=CellState.PENDING),
    ]
    return read_results_of("s", "A sweep.", "miniature", statuses)


def page_of(results: SweepResults) -> str:
    return render_page(build_table(results), results, read_dynamics(results))


def test_means_over_seeds_golden() -> None:
    runs = [
        [{"step": 0, "reward/mean": 0.25}, {"step": 1, "reward/mean": 0.5, "entropy": None}],
        [{"step": 0, "reward/mean": 0.75}],
    ]
    assert mean_lines(runs) == {"reward/mean": ([0.0, 1.0], [0.5, 0.5])}


def test_figures_draw_what_the_runs_say(results: SweepResults, donor_and_alone: tuple[Run, Run]) -> None:
    panels = {panel.key: panel.figure for panel in panels_of(build_table(results), results, read_dynamics(results))}
    raw, smooth = (trace for trace in panels["reward-mean"].data if trace.legendgroup == "GRPO")
    rewards = [row["reward/mean"] for row in load_metrics(donor_and_alone[1], "stage2")]
    assert list(raw.y) == pytest.approx(rewards)
    assert list(smooth.y) == pytest.approx(ema(rewards))
    assert {trace.legendgroup for trace in panels["kd-kl_unmasked"].data} <= {"KDRL", "GRPO"}
    (dot,) = (trace for trace in panels["accuracy"].data if trace.name == "KDRL")
    score = next(row for row in build_table(results).rows if row.label == "KDRL").scores["avg"]
    assert list(dot.x) == [pytest.approx(100 * score.mean)]
    assert dot.error_x.array[0] == pytest.approx(100 * (score.high - score.mean))
    seconds = sum(trace.x[list(trace.y).index("KDRL")] for trace in panels["phases"].data)
    spent = [v for row in load_metrics(donor_and_alone[0], "stage2") for n, v in row.items() if n.startswith("time/")]
    assert 0.0 < seconds <= sum(spent) + 1e-9


def test_figure_6_golden(results: SweepResults) -> None:
    """Two seeds of one variant: means at the steps that both have evaluated."""

    def watched(step: int, seconds: float, length: float, right: float) -> Watched:
        lengths = {"a": {"p": length - 5.0, "q": length + 5.0}, "b": {"r": length}}
        model = ModelScores(scores={"a": {"p": right, "q": 0.0}, "b": {"r": 1.0}}, lengths=lengths)
        return Watched(step=step, seconds=seconds, model=model)

    cell = results.cells[0]
    cells = [
        replace(cell, watched=[watched(5, 10.0, 20.0, 0.0), watched(10, 30.0, 40.0, 1.0)]),
        replace(cell, seed=1, watched=[watched(5, 20.0, 30.0, 1.0)]),
    ]
    dynamics = SweepDynamics(variants=[VariantDynamics(label=cell.variant)], filters={}, environments={})
    seen = replace(results, cells=cells)
    panels = {panel.key: panel.figure for panel in panels_of(build_table(results), seen, dynamics)}
    for key, x in {"accuracy-steps": 5.0, "accuracy-length": 25.0, "accuracy-time": 15.0}.items():
        (line,) = panels[key].data
        # benchmark a: (0 + 0) / 2 and (1 + 0) / 2, b: 1 and 1; their mean over benchmarks and seeds is 0.625
        assert (list(line.x), list(line.y)) == ([x], [pytest.approx(62.5)])


def test_the_page_holds_all_and_asks_nobody(results: SweepResults) -> None:
    page = page_of(results)
    assert "2 of 3 runs are finished" in page
    assert "stage2.objective: &#39;kdrl&#39; → &#39;grpo&#39;" in page
    assert "filter of stage1" in page
    assert "Not finished" in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:,)', outside)
    assert "url(" not in outside


def test_the_markdown_holds_what_the_page_does_but_for_figures(results: SweepResults) -> None:
    text = render_markdown(build_table(results), results, read_dynamics(results))
    assert "2 of 3 runs are finished." in text
    assert "```text\nstage2.objective: 'kdrl' → 'grpo'\n```" in text
    for title in ("Accuracy, %", "Data filter", "Recipes", "Environment", "Responses", "Not finished"):
        assert f"\n## {title}" in text
    assert HOSTILE not in re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_rows_that_were_not_trained_alike_are_marked(results: SweepResults) -> None:
    (first, recipe), *others = results.recipes.items()
    longer = recipe.model_copy(update={"stage2": recipe.stage("stage2").model_copy(update={"steps": 99})})
    marked = replace(results, recipes={first: longer, **dict(others)})
    steps = results.recipes[others[0][0]].stage("stage2").steps
    note = f"Not trained alike: {others[0][0]} with {steps} steps; {first} with 99 steps."
    assert note in page_of(marked)
    assert f"\n\n{note}\n\n" in build_table(marked).to_markdown()
    assert "Not trained alike" not in page_of(results)


def test_foreign_text_stays_text(results: SweepResults) -> None:
    """A variant's name is in tables, legend and the figures' data."""
    statuses = [replace(status, variant=HOSTILE) for status in results.statuses if status.run == "kdrl"]
    page = page_of(read_results_of("s", HOSTILE, "miniature", statuses))
    assert HOSTILE not in page
    assert page.count("alert(1)") > 10
    assert page.count("<script>") == 3
    assert "<b>bold" not in page


def test_a_sweep_in_which_nothing_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    status = CellStatus(run="a", variant="KDRL", seed=0, state=CellState.FAILED, detail="out of <memory>")
    page = page_of(read_results_of("s", "", "miniature", [status]))
    assert "0 of 1 runs are finished" in page
    assert "out of &lt;memory&gt;" in page
    assert "No run is finished." in page


@needs_chromium
def test_in_a_browser(results: SweepResults, tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    page.write_text(page_of(results))
    found, console = look(
        page,
        """
        const plots = [...document.querySelectorAll(".plot")];
        const lines = document.querySelectorAll("#reward-mean .scatterlayer .trace").length;
        const header = [...document.querySelectorAll("table.sortable")[1].querySelectorAll("th button")];
        const names = () => [...document.querySelectorAll("table.sortable")[1].tBodies[0].rows]
            .map(row => [row.cells[0].textContent, row.cells[3].textContent]);
        header[3].click();
        const down = names();
        header[3].click();
        const up = names();
        document.querySelector(".legend button[data-variant=GRPO]").click();
        return {
          plots: plots.length, drawn: plots.filter(plot => plot.querySelector("svg.main-svg")).length, lines, down, up,
          hidden: document.getElementById("reward-mean").data.filter(trace => trace.visible === false).length,
        };
        """,
    )
    assert console == []
    assert found["plots"] == found["drawn"] >= 8
    assert found["lines"] == 4  # raw and smooth of two variants
    numbers = [cell for _, cell in found["down"] if cell != "–"]
    assert numbers == sorted(numbers, key=float, reverse=True)
    assert [cell for _, cell in found["up"] if cell != "–"] == sorted(numbers, key=float)
    assert found["down"][-1][1] == found["up"][-1][1] == "–"  # missing comes last both ways
    assert found["hidden"] == 2


@needs_chromium
@pytest.mark.parametrize("label", ["KDRL", "KDRL-Annealing, beta.init=0.2, learning_rate=0.0003, warm", "2026-01-02"])
def test_on_a_phone_nothing_is_cut_off(label: str, results: SweepResults, tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    statuses = [replace(one, variant=label) if one.run == "kdrl" else one for one in results.statuses[:2]]
    page.write_text(page_of(read_results_of("s", "A sweep.", "miniature", statuses)))
    script = """
        const width = document.documentElement.clientWidth;
        return { width, page: document.documentElement.scrollWidth,
          plots: Math.max(...[...document.querySelectorAll(".plot svg.main-svg")].map(p => p.clientWidth)),
          area: document.getElementById("accuracy")._fullLayout._size.w,
          ticks: [...document.querySelectorAll("#accuracy .ytick text")].map(tick => tick.textContent) };
    """
    found, console = look(page, script, width=390)
    assert console == []
    assert found["page"] <= found["width"] <= 390
    assert found["plots"] <= found["width"]
    assert found["area"] > 120  # a third of the phone is left to the figure
    assert label.replace(" ", "") in [tick.replace(" ", "") for tick in found["ticks"]]
