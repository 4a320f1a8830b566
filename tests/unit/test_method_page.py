"""docs/method.md maps the whole paper, has every departure, and names only what exists."""

import ast
import re
from pathlib import Path

import pytest

from kdrl_core.config import list_recipes
from kdrl_core.look.sweeps.spec import list_sweeps

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
NAMES = r"((?:`[\w.-]+`(?:, (?:and )?| and )?)+)"
PAPER = [
    *(f"Eq. {number}" for number in (*range(1, 9), 14, 19, 27)),
    *(f"Sec. {section}" for section in ("2.3", "3.1", "3.2", "3.3", "3.4", "4.1", "4.2", "4.3", "4.4", "4.5")),
    *("A.3", "B.1.1", "B.1.2", "B.2", "B.3", "footnote 3"),
    *(f"Table {number}" for number in range(1, 6)),
    *(f"Figure {number}" for number in range(2, 8)),
]


def section(title: str) -> str:
    """The text below a heading; below the page's own for ""."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.M)
    return parts[0] if not title else parts[parts.index(title) + 1]


def rows(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_map_has_every_part_of_the_paper_once() -> None:
    mapped = [name for first, *_ in rows(section(""))[2:] for name in first.split(", ")]
    assert sorted(name for name in mapped if not name.startswith("findings")) == sorted(PAPER)


def test_every_path_that_the_page_names_exists() -> None:
    paths = re.findall(r"`((?:kdrl_core|flows|tasks|tests|benchmarks|docs)/[\w./-]*)`", PAGE)
    paths += re.findall(r"python (\S+\.py)", PAGE)
    pages = re.findall(r"\]\((\w[\w.-]*\.(?:md|json))", PAGE)
    assert len(paths) > 30
    assert [path for path in (*paths, *(f"docs/{page}" for page in pages)) if not (ROOT / path).exists()] == []
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^## (.+)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings


@pytest.mark.parametrize(("kind", "known"), [("sweep", list_sweeps()), ("recipe", list_recipes())])
def test_every_sweep_and_recipe_that_the_page_names_is_shipped(kind: str, known: list[str]) -> None:
    named = {name for found in re.findall(rf"{kind}s? {NAMES}", PAGE) for name in re.findall(r"`([\w.-]+)`", found)}
    named |= set(re.findall({"sweep": r"kdrl sweep \w+ (\S+)", "recipe": r"--recipe (\S+)"}[kind], PAGE))
    assert len(named) >= 5
    assert named <= set(known)


def test_every_module_that_departs_from_the_paper_is_listed() -> None:
    """A module says so at its top, with one of these words. lm_eval.py departs from a file format."""
    departs = re.compile(r"\b(Departures?|Restriction|kdrl's choice)\b")
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "kdrl_core").rglob("*.py") if departs.search(top(path))}
    listed = section("Departures") + section("kdrl's choices")
    assert {file for file in files if f"`{file}`" not in listed} == {"kdrl_core/evaluation/lm_eval.py"}
    for row in (*rows(section("Departures"))[2:], *rows(section("kdrl's choices"))[2:]):
        assert len(row) == 3, row


def top(path: Path) -> str:
    """The docstrings of a module and of its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = (ast.Module, ast.FunctionDef, ast.ClassDef)
    return "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, named))
