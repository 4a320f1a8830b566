"""What the program prints without a run: recipes, status, help. No message names a page that a wheel does not have."""

import ast
import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdrl_core.config import list_recipes, load_recipe
from kdrl_core.ledger import create_run

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

OPTIONS = {
    "run": ["--recipe", "--name", "--set", "--verbose"],
    "resume": ["RUN", "--set", "--verbose"],
    "status": ["[RUN]", "--json", "--watch"],
    "label": ["--recipe", "--input", "--output", "--only-missing", "--all", "--set", "--json", "--force"],
    "recipes": ["[NAME]", "--set", "--json"],
    "deploy": ["NAME", "--pool", "--work-queue", "--json"],
}
ROOT = Path(__file__).parents[3]


def test_recipes_are_listed(cli: Cli) -> None:
    done = cli("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in list_recipes())
    rows = json.loads(cli("recipes", "--json").stdout)
    assert [row["recipe"] for row in rows] == list_recipes()
    assert all(row["description"] for row in rows)


def test_a_recipe_is_shown_with_every_field(cli: Cli, artifacts: Path) -> None:
    shown = json.loads(cli("recipes", "miniature", "--json", "--set", "seed=7").stdout)
    assert shown == load_recipe("miniature", ["seed=7"]).model_dump(mode="json")
    assert yaml.safe_load(cli("recipes", "miniature").stdout)["stage2"]["checkpoint"]["keep_last"] == 2
    assert not artifacts.exists()


def test_a_shown_recipe_can_be_run_as_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(cli("recipes", "miniature").stdout)
    assert json.loads(cli("recipes", "mine.yaml", "--json").stdout) == load_recipe("miniature").model_dump(mode="json")


def test_a_bad_recipe_is_refused(cli: Cli) -> None:
    done = cli("recipes", "miniature", "--set", "stage2.betta=1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: recipe miniature: field 'stage2.betta': unknown field, did you mean 'beta'?")


def test_status_without_runs(cli: Cli, artifacts: Path) -> None:
    done = cli("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "no runs yet; start one with: kdrl run --recipe miniature\n"
    assert json.loads(cli("status", "--json").stdout) == []
    assert not artifacts.exists()


def test_status_of_runs_that_have_not_begun_and_one_that_cannot_be_opened(cli: Cli, artifacts: Path) -> None:
    recipe = load_recipe("miniature", ["stage1.steps=20", "stage2.steps=40"])
    create_run("good", recipe, artifacts=artifacts)
    broken = create_run("broken", recipe, artifacts=artifacts)
    broken.paths.recipe.write_text("name: [")
    done = cli("status", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["run"]: row for row in json.loads(done.stdout)}
    assert rows["good"]["state"] == "stopped; kdrl resume good"
    assert rows["good"]["progress"] == "stage1 0/20, stage2 0/40"
    assert rows["broken"]["state"].startswith("unusable: recipe ")


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_names_its_options(command: str, cli: Cli) -> None:
    done = cli(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for option in [*OPTIONS[command], "--help"]:
        assert option in done.stdout


def test_help_names_every_command_and_where_to_start(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in OPTIONS)
    assert "kdrl run --recipe miniature" in done.stdout


def test_no_message_names_a_page_of_docs() -> None:
    """Whoever installed a wheel has no docs/: the message itself says what is needed."""
    found = []
    for ring in ("flows", "tasks", "kdrl_core"):
        for file in (
            path for path in (ROOT / ring).rglob("*") if path.suffix in (".py", ".j2", ".js", ".html", ".yaml")
        ):
            if "docs/" in (content := file.read_text(encoding="utf-8")):
                found += [f"{file.relative_to(ROOT)}: {text}" for text in _shown(file, content) if "docs/" in text]
    assert found == []


def _shown(file: Path, content: str) -> list[str]:
    """What a user may see of a file: not the comments, and of docstrings those that `--help` or Prefect shows."""
    if file.suffix == ".yaml":
        return [json.dumps(yaml.safe_load(content), default=str)]
    if file.suffix != ".py":
        return [content]
    nodes = list(ast.walk(ast.parse(content)))
    hidden = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in hidden]
    if "flows" in file.relative_to(ROOT).parts:
        texts += [ast.get_docstring(node) for node in nodes if isinstance(node, ast.FunctionDef)]
    return [text for text in texts if isinstance(text, str)]


def test_no_command_shows_the_help(cli: Cli) -> None:
    done = cli()
    assert "Usage: kdrl" in done.stdout + done.stderr


def test_warnings_are_printed_where_prefects_log_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli.local_prefect import _warnings

    prefect = logging.getLogger("prefect.flow_runs")
    warning = logging.makeLogRecord({"msg": "odd", "levelno": logging.WARNING, "levelname": "WARNING"})
    before = prefect.level
    try:
        for level, printed in ((logging.CRITICAL, "warning: odd\n"), (logging.INFO, "")):
            prefect.setLevel(level)
            _warnings.handle(warning)
            assert capsys.readouterr().err == printed
    finally:
        prefect.setLevel(before)
