"""Imports go one way: flows → tasks → kdrl_core, and inside the core only as far as each part's purpose needs.

What a module pulls in is asked of a fresh interpreter, since this one has imported everything already.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HEAVY = {
    "torch",
    "transformers",
    "prefect",
    "pyarrow",
    "pandas",
    "plotly",
    "math_verify",
    "sympy",
    "vllm",
    "deepspeed",
    "duckdb",
}


def modules_of(package: str) -> list[str]:
    """Every module of a package by name."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if ".assets" not in name]


@cache
def imported_by(*modules: str) -> frozenset[str]:
    """Top-level packages in a fresh interpreter after importing these modules."""
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return frozenset(done.stdout.split())


def test_no_module_of_the_core_imports_prefect_tasks_or_flows() -> None:
    modules = modules_of("kdrl_core")
    assert len(modules) > 40
    found = imported_by(*modules)
    assert "torch" in found  # the probe sees what is imported
    assert not found & {"prefect", "tasks", "flows", "typer"}


def test_objectives_import_torch_alone() -> None:
    assert imported_by(*modules_of("kdrl_core/objectives")) & HEAVY == {"torch"}


@pytest.mark.parametrize("module", ["kinds", "inputs", "plugins"])
def test_what_recipes_need_of_the_objectives_imports_nothing_heavy(module: str) -> None:
    assert not imported_by(f"kdrl_core.objectives.{module}") & HEAVY


@pytest.mark.parametrize("module", ["kdrl_core.types", "kdrl_core.errors", "kdrl_core.config", "kdrl_core.ledger"])
def test_foundations_import_nothing_heavy(module: str) -> None:
    assert not imported_by(module) & HEAVY


def test_planning_needs_nothing_heavy() -> None:
    assert not imported_by("kdrl_core.look.planning") & HEAVY


def test_preflight_needs_no_model_library() -> None:
    """So a wrong path is told in a second."""
    assert not imported_by("kdrl_core.boxes.preflight") & {"torch", "transformers", "prefect"}


def test_the_command_line_starts_light() -> None:
    assert not imported_by("flows.cli") & HEAVY


def test_the_door_from_python_opens_at_first_use() -> None:
    """`import kdrl_core` takes a hundredth of a second; to read a run takes neither torch nor Prefect."""
    assert not imported_by("kdrl_core") & {*HEAVY, "numpy", "pydantic", "yaml"}
    assert not imported_by("kdrl_core.look.python.reader", "kdrl_core.look.python.program") & {
        *("torch", "transformers", "prefect", "plotly")
    }


def imports_in(file: Path) -> set[str]:
    """Names imported anywhere in a file, inside functions as well, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


STOREYS = (
    {"errors", "process_guard", "types"},
    {"objectives"},
    {"config"},
    {"ledger"},
    {"tables"},
    {"verify", "models", "logprobs"},
    {"data", "rewards"},
    {"engines", "training"},
    {"sampling", "alarms"},
    {"evaluation", "labelling"},
    {"boxes"},
    {"look", "miniature"},
)
"""The core from the ground up: a part imports what lies below it. Parts of one storey know nothing of each other."""

NOT_EVEN_INSIDE_A_FUNCTION = {
    "kdrl_core": {"tasks", "flows", "prefect", "typer"},
    "tasks": {"flows", "typer"},
    "kdrl_core/objectives": {"transformers"},
    "kdrl_core/config": {"torch", "transformers", "pyarrow"},
    "kdrl_core/ledger": {"torch", "transformers", "pyarrow"},
    "kdrl_core/look/sweeps": {"kdrl_core.training", "torch", "transformers"},
    "kdrl_core/verify": {"torch", "transformers"},
    "kdrl_core/data": {"torch"},
}


def parts_of_the_core() -> set[str]:
    folder = ROOT / "kdrl_core"
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))} - {"__init__"}


def test_every_part_of_the_core_has_its_storey() -> None:
    assert parts_of_the_core() == set().union(*STOREYS)
    assert sum(map(len, STOREYS)) == len(set().union(*STOREYS))


@pytest.mark.parametrize("part", sorted(set().union(*STOREYS)))
def test_no_import_runs_upwards(part: str) -> None:
    """In particular nothing that trains imports what looks, which is the top storey."""
    storey = next(index for index, parts in enumerate(STOREYS) if part in parts)
    below = set().union(*STOREYS[:storey]) | {part}
    place = ROOT / "kdrl_core" / part
    files = [file for file in place.rglob("*.py") if "assets" not in file.parts] or [place.with_suffix(".py")]
    for file in files:
        core = {name.split(".")[1] for name in imports_in(file) if name.startswith("kdrl_core.")}
        known = core & set().union(*STOREYS)  # `import kdrl_core` itself gives the version
        assert known <= below, f"{file.relative_to(ROOT)} imports {sorted(known - below)}"


@pytest.mark.parametrize("package", NOT_EVEN_INSIDE_A_FUNCTION)
def test_no_file_imports_what_its_package_must_not(package: str) -> None:
    files = [file for file in (ROOT / package).rglob("*.py") if "build" not in file.stem]
    assert files
    for file in files:
        wrong = {
            name
            for name in imports_in(file)
            for forbidden in NOT_EVEN_INSIDE_A_FUNCTION[package]
            if name == forbidden or name.startswith(f"{forbidden}.")
        }
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_dag_imports_nothing_of_the_command_line() -> None:
    for file in (ROOT / "flows").glob("*.py"):
        assert not {name for name in imports_in(file) if name.startswith("flows.cli")}, file.name


ALIKE = {"main", "best_tokens", "load_tokenizer", "open_run", "pass_at_k", "ragged", "refuse_not_finite", "verify"}
"""Names that stand twice: they do the same to different inputs. Do not add to them without need."""


def test_one_name_means_one_thing() -> None:
    """Public functions and classes of the core that have one name: a reader who knows one must not be misled."""
    places: dict[str, list[str]] = {}
    for file in (ROOT / "kdrl_core").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body if "assets" not in file.parts else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    several = {name: found for name, found in places.items() if len(found) > 1}
    assert not {name: found for name, found in several.items() if name not in ALIKE}


def test_the_core_does_not_know_where_the_outer_rings_lie() -> None:
    for file in (ROOT / "kdrl_core").rglob("*.py"):
        names = {node.value for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if is_text(node)}
        assert not names & {"flows", "tasks"}, file.relative_to(ROOT)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_errors_and_types_stand_on_the_standard_library() -> None:
    for module in ("errors", "types"):
        names = {name.split(".")[0] for name in imports_in(ROOT / "kdrl_core" / f"{module}.py")}
        assert names <= set(sys.stdlib_module_names)
