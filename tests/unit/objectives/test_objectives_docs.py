"""docs/method.md says what the code does: its numbers are those that the benchmark computes, its tests exist."""

import re
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import pytest
from support import script

ROOT = Path(__file__).parents[3]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bias() -> ModuleType:
    return script("estimator_bias")


def numbers(cell: str) -> list[float]:
    """ "1.067 / 3.867" → two numbers; a dash is NaN."""
    return [float("nan") if part.strip() == "–" else float(part) for part in cell.split("/")]


def test_the_table_of_estimators_is_the_benchmarks(bias: ModuleType) -> None:
    worlds = [bias.World(3, 3, distance) for distance in (0.3, 1.5)]
    lines = [re.split(r" *\| *", line.strip("| \n")) for line in METHOD.splitlines()]
    printed = {
        cells[0]: [numbers(cell) for cell in cells[1:]] for cells in lines if len(cells) == 7 and "/" in cells[1]
    }
    close, far = map(bias.rows, worlds)
    assert list(printed) == [row.estimator for row in close]
    for row, other in zip(close, far, strict=True):
        expected = list(zip(astuple(row)[1:], astuple(other)[1:], strict=True))
        for found, pair in zip(printed[row.estimator], expected, strict=True):
            assert found == pytest.approx(pair, rel=2e-3, abs=6e-4, nan_ok=True), row.estimator
    for world in worlds:
        assert f"KL {world.exact()[0]:.4f}" in METHOD
    errors = [bias.own_length_errors(world) for world in worlds]
    for pair in zip(*errors, strict=True):
        assert re.search(r"{:.3f} /\s+{:.3f}".format(*pair), METHOD)


def test_what_the_page_claims(bias: ModuleType) -> None:
    """The sentences below the table, and that a zero in it is one."""
    for length in (1, 3):
        for distance in (0.3, 1.5):
            found = {row.estimator: row for row in bias.rows(bias.World(3, length, distance))}
            for name in ("k1", "k2", "k3_k2grad"):
                assert found[f"{name}, per token"].token_error < 1e-12
            for name in ("k1", "k2"):
                assert found[f"{name} of the summed R"].whole_error < 1e-12
            for name in ("k1", "k3", "k3_k2grad"):
                assert found[f"{name}, per token"].value == pytest.approx(1.0, abs=1e-12)
            assert found["k1 differentiated"].token_error == pytest.approx(1.0, abs=1e-12)
            assert found["top-3 (all)"].token_error < 1e-12
            k3 = found["k3, per token"]
            assert k3.token_error > 0.1
            assert f"{100 * k3.token_error:.1f} %" in METHOD
            assert (k3.token_error == pytest.approx(k3.whole_error)) == (length == 1)
            if length == 3:
                ratio = found["k2 of the summed R"].variance / found["k2, per token"].variance
                assert f"{ratio:.1f}" in METHOD


@pytest.mark.slow
def test_the_norms_of_top_k_by_floor_are_the_benchmark_s() -> None:
    lines = [re.split(r" *\| *", line.strip("| \n")) for line in METHOD.splitlines()]
    printed = {
        cells[0]: [float(cell) for cell in cells[1:]] for cells in lines if len(cells) == 6 and cells[0].isdigit()
    }
    topk = script("topk_floor")
    assert list(printed) == [str(k) for k in topk.KS]
    for floor in (-20.0, -1000.0):
        assert printed["4"][topk.FLOORS.index(floor)] == pytest.approx(topk.topk_norm(4, floor), rel=0.02)


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", METHOD))
    assert len(named) >= 15
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not {name for name in named if f"def {name}(" not in sources}
