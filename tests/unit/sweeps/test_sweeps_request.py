"""What a command asks for, and what is kept of it for the next one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.errors import ModelError, RecipeError, RunError
from kdrl_core.ledger import RunPaths, create_run
from kdrl_core.look.sweeps.comparison import read_sweep, write_sweep_report
from kdrl_core.look.sweeps.request import Request, check_request, donors_of, make_request, parse_vary, write_record
from kdrl_core.look.sweeps.state import CellState, SweepPaths, cell_status, list_started, note_failure, read_record

pytestmark = pytest.mark.usefixtures("artifacts")


def _start(source: str | None = "figure5", **options: Any) -> Request:
    request = make_request(source, **options)
    write_record(request)
    return request


def _runs(request: Request) -> Sequence[str]:
    return [cell.run for cell in request.cells]


def test_a_started_sweep_goes_on_as_it_was_started() -> None:
    first = _start(seeds=2, overrides=["stage2.steps=5"])
    again = make_request("figure5")
    assert again == first
    assert _runs(again)[3] == "figure5--kdrl--seed1"
    assert make_request("figure5", name="other").cells[0].recipe.stage("stage2").steps == 80
    assert list_started() == ["figure5"]


def test_a_sweep_that_an_earlier_version_started_goes_on_with_its_own_variants() -> None:
    """figure3 as it was before there was a catalogue: other labels, no `vary_each`, `equal` or seeds by recipe."""
    grid = {"set": {"stage2.beta": {"init": 0.2}}, "variants": {"Top-K": {"stage2.topk.k": 4}}, "vary": {}}
    variants = {"k2": {}, "Top-K": {"stage2.kl_estimator": "topk"}}
    spec = {"name": "figure3", "description": "", "recipe": "miniature", "seeds": 2, "set": {}, "variants": variants}
    spec |= {"vary": {}, "recipes": {"miniature": grid}, "claims": []}
    cells = [{"run": "figure3--k2--seed0", "variant": "k2", "seed": 0}]
    record = {"spec": spec, "overrides": [], "share_with": [], "cells": cells, "origin": {"source": "figure3"}}
    file = SweepPaths.of("figure3").record
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(record))
    assert read_record("figure3").cells[0].variant == "k2"
    again = make_request("figure3")
    assert _runs(again) == [f"figure3--{label}--seed{seed}" for seed in (0, 1) for label in ("k2", "top-k")]
    assert {cell.recipe.stage("stage2").topk.k for cell in again.cells if cell.variant == "Top-K"} == {4}
    assert {cell.seed for cell in make_request("figure3", seeds=[7]).cells} == {7}


def test_what_is_given_takes_the_place_of_what_was_kept() -> None:
    _start(seeds=2, overrides=["stage2.steps=5"])
    more = make_request("figure5", seeds=[0, 7], overrides=["stage2.steps=6"])
    assert {cell.seed for cell in more.cells} == {0, 7}
    assert {cell.recipe.stage("stage2").steps for cell in more.cells} == {6}


def test_a_grid_without_a_file_has_a_name_of_its_own_and_goes_on() -> None:
    vary = ["stage2.learning_rate=1e-4, 3e-4", "stage2.beta={init: 0.2}"]
    first = _start(None, vary=vary, seeds=2)
    assert first.spec.name == "miniature-by-stage2.learning_rate-stage2.beta"
    assert _runs(first)[0] == "miniature-by-stage2.learning_rate-stage2.beta--learning-rate-0.0001-beta-init-0.2--seed0"
    assert make_request(None, vary=vary) == first
    assert make_request("miniature-by-stage2.learning_rate-stage2.beta") == first


def test_grids_over_fields_of_one_name_are_two() -> None:
    names = {make_request(None, vary=[f"{stage}.learning_rate=1e-4,2e-4"]).spec.name for stage in ("stage1", "stage2")}
    assert names == {f"miniature-by-{stage}.learning_rate" for stage in ("stage1", "stage2")}
    with pytest.raises(RecipeError, match="too long a name for a sweep; give it one with --name"):
        make_request(None, vary=[f"stage{n}.checkpoint.every=10,20" for n in (1, 2, 3)])


def test_another_sweep_under_a_name_that_is_taken_is_refused() -> None:
    first = _start("figure2", name="mine")
    with pytest.raises(RecipeError, match="--name mine: a sweep of that name was made of figure2, not of table1"):
        make_request("table1", name="mine")
    assert make_request("figure2", name="mine") == make_request("mine") == first


def test_nor_is_one_that_another_file_or_a_grid_was_made_under_taken(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.yaml").write_text("{name: x, variants: {KDRL: {}, GRPO: {stage2.objective: grpo}}}")
    _start(str(tmp_path / "a.yaml"), name="x", seeds=5, vary=["stage2.steps=4,5"])
    with pytest.raises(RecipeError, match=r"--name x: a sweep of that name was made of a\.yaml, not of b\.yaml"):
        make_request(str(tmp_path / "b.yaml"), name="x")
    assert (
        len(make_request(str(tmp_path / "b.yaml")).cells) == 2
    )  # the file's own name: what a.yaml was given is not b's
    _start(None, name="v", vary=["stage2.steps=4,5"])
    with pytest.raises(RecipeError, match="was made of --vary, not of table1"):
        make_request("table1", name="v")
    assert len(make_request("x", vary=["stage2.learning_rate=1e-4,2e-4"]).cells) == 2 * 2 * 2 * 5
    assert make_request("x").origin.options["vary"] == {"stage2.steps": [4, 5]}


def test_a_file_is_read_anew_with_the_options_that_the_sweep_was_started_with(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("{name: mine, seeds: 3, variants: {KDRL: {}, GRPO: {stage2.objective: grpo}}}")
    _start(str(file), seeds=5, vary=["stage2.steps=4,5"], overrides=["stage2.warmup_steps=0"])
    file.write_text("{name: mine, seeds: 3, variants: {KDRL: {}, KD-RKL: {stage2.objective: kd_rkl}}}")
    again = make_request(str(file))
    assert len(again.cells) == 2 * 5 * 2
    assert {cell.variant for cell in again.cells} == {f"{v}, steps={n}" for v in ("KDRL", "KD-RKL") for n in (4, 5)}
    assert {cell.recipe.stage("stage2").warmup_steps for cell in again.cells} == {0}
    assert len(make_request(str(file), seeds=1).cells) == 4


def test_values_of_the_command_line_stand_above_those_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("{name: mine, recipes: {miniature: {vary: {stage2.steps: [3], stage2.learning_rate: [1.0e-4]}}}}")
    cells = make_request(str(file), vary=["stage2.steps=4,5"]).cells
    assert [cell.recipe.stage("stage2").steps for cell in cells] == [4, 5]
    assert {cell.recipe.stage("stage2").learning_rate for cell in cells} == {1e-4}


def test_cells_of_another_sweep_are_donors_if_asked_for() -> None:
    _start("figure5", seeds=1)
    own = _start("figure3", seeds=1, share_with=["figure5"])
    assert donors_of(own) == [*_runs(own), *(cell.run for cell in read_record("figure5").cells)]
    assert make_request("figure3").share_with == ("figure5",)


@pytest.mark.parametrize("text", ["stage2.steps", "=3", "stage2.steps=", "stage2.steps=[1"])
def test_values_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--vary .*(expected FIELD=a,b,c|not YAML)"):
        parse_vary(text)


def test_every_cell_is_looked_at_before_any_runs(artifacts: Path) -> None:
    request = make_request("figure5", seeds=1)
    check_request(request)
    last = request.cells[-1]
    create_run(last.run, make_request("figure5", overrides=["stage2.steps=3"]).cells[-1].recipe)
    with pytest.raises(RunError, match="variant 'group mask', seed 0: run figure5--group-mask--seed0 was started"):
        check_request(make_request("figure5", seeds=1, overrides=["stage2.learning_rate=0.1"]))
    missing = make_request(None, vary=["teacher.path='builtin:miniature/teacher',models/nix"], name="g")
    with pytest.raises(ModelError, match=r"variant 'path=models/nix', seed 0: teacher\.path=models/nix: no such"):
        check_request(missing)
    also = make_request("figure5", seeds=1, overrides=["evaluation.also.weak.path=models/nix"], name="a")
    with pytest.raises(ModelError, match=r"variant 'KDRL', seed 0: evaluation\.also\.weak\.path=models/nix: no such"):
        check_request(also)


def test_states_of_cells_come_from_their_runs(artifacts: Path) -> None:
    request = _start(seeds=1)
    paths = SweepPaths.of("figure5")
    _, stopped, failed = request.cells
    for cell in (stopped, failed):
        create_run(cell.run, cell.recipe)
    note_failure(paths, failed.run, "it broke")
    found = [cell_status(paths, cell) for cell in request.cells]
    assert [status.state for status in found] == [CellState.PENDING, CellState.STOPPED, CellState.FAILED]
    assert [status.detail for status in found] == ["", f"kdrl resume {stopped.run}", "it broke"]
    RunPaths.of(failed.run).recipe.write_text("name: torn")
    assert cell_status(paths, failed).state is CellState.FAILED
    assert [row["state"] for row in write_sweep_report("figure5").missing] == ["pending", "stopped", "failed"]
    assert read_sweep("figure5").cells == []


def test_a_record_that_cannot_be_read_says_how_to_write_it_anew(artifacts: Path) -> None:
    _start()
    SweepPaths.of("figure5").record.write_text("{")
    with pytest.raises(RunError, match=r"sweep\.json cannot be read .* have it written anew: kdrl sweep run"):
        read_record("figure5")
