"""`kdrl` as a program: version, help, hints beside errors of usage, completion, lists in pipes and narrow terminals."""

import csv
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.cells import cell_len

from flows.cli import program
from flows.cli.app import app
from flows.cli.printed_tables import narrowed
from kdrl_core import __version__
from kdrl_core.config import list_recipes, load_recipe
from kdrl_core.ledger import create_run
from kdrl_core.types import VerdictKind

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

GROUP: Any = typer.main.get_command(app)


def commands(group: Any = GROUP, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def examples() -> list[str]:
    helps = [GROUP.help, *(command.help for _, command in commands())]
    return [line.split("   ")[0].strip() for text in helps for line in text.splitlines() if re.match(r" *kdrl ", line)]


def test_version(cli: Cli) -> None:
    done = cli("--version")
    assert (done.returncode, done.stdout) == (0, f"kdrl {__version__}\n")


@pytest.mark.parametrize("path", [[], ["run"], ["sweep"], ["sweep", "run"], ["rollouts", "show"]])
def test_h_is_help_everywhere(path: list[str], cli: Cli) -> None:
    short, long = cli(*path, "-h"), cli(*path, "--help")
    assert short.returncode == 0
    assert short.stdout == long.stdout
    assert "-h, --help" in short.stdout


def test_help_uses_the_terminal_and_cuts_no_summary(cli: Cli) -> None:
    wide, narrow = (cli("--help", COLUMNS=columns).stdout for columns in ("150", "60"))
    assert max(map(len, wide.splitlines())) > 100
    assert max(map(len, narrow.splitlines())) <= 60
    for text in (wide, narrow):
        assert "..." not in text.partition("\n")[2]
        words = " ".join(text.split())
        told = "Say whether a recipe fits the GPUs, where its models go, and how long a step and all stages take."
        assert f"plan {told}" in words


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_an_example(name: str, command: Any) -> None:
    assert re.search(rf"^ *kdrl {name} ?", command.help, re.MULTILINE), f"add an example to the help of kdrl {name}"


@pytest.mark.parametrize("example", examples())
def test_every_example_is_a_command_line_that_kdrl_takes(example: str) -> None:
    words = shlex.split(re.split(r" [|>] ", example)[0])[1:]
    group, context = GROUP, GROUP.make_context("kdrl", ["status"])
    while words and hasattr(group, "commands") and words[0] in group.commands:
        group = group.commands[words.pop(0)]
    group.make_context("kdrl", words, parent=context)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--set", "a=1", "b=2", "c=3"], "(b=2 c=3); every field needs a --set of its own: --set b=2 --set c=3"),
        (["plan"], "Missing option '--recipe' / '-r'. kdrl recipes lists them; the one to try is --recipe miniature"),
        (["run", "--recip", "x"], "No such option: --recip"),
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
    ],
)
def test_errors_of_usage_say_what_to_do(arguments: list[str], told: str, cli: Cli) -> None:
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_the_nearest_run_is_named(cli: Cli, artifacts: Path) -> None:
    create_run("first", load_recipe("miniature"), artifacts=artifacts)
    assert "no run 'frist'" in (told := cli("status", "frist").stderr)
    assert ", did you mean 'first'?; runs here: first" in told


@pytest.mark.parametrize("command", [["status"], ["sweep", "list"], ["run"], ["rollouts", "stats", "first"]])
def test_artifacts_that_are_a_file_are_refused_in_one_line(command: list[str], cli: Cli, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("mine")
    done = cli(*command, KDRL_ARTIFACTS=str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: KDRL_ARTIFACTS: {file} is a file; give a folder, which is made if it is missing\n"
    assert file.read_text() == "mine"


def test_artifacts_that_cannot_be_made_are_refused_in_one_line(cli: Cli) -> None:
    done = cli("run", KDRL_ARTIFACTS="/proc/kdrl")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: cannot write /proc/kdrl/\S+: .*; set KDRL_ARTIFACTS .*\n", done.stderr)


# --- completion -------------------------------------------------------------------------------------------------------


def completed(cli: Cli, line: str) -> list[str]:
    words = line.split(" ")
    done = cli(_KDRL_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1))
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("kdrl run --recipe miniature-c", ["miniature-choice", "miniature-code"]),
        ("kdrl recipes paper", ["paper-1.5b"]),
        ("kdrl run --set stage2.beta.i", ["stage2.beta.init="]),
        ("kdrl run --set student.lora.r", ["student.lora.rank="]),
        ("kdrl sweep run tabl", ["table1", "table2", "table4"]),
        ("kdrl rollouts show first --verdict ma", [VerdictKind.MALFORMED.value]),
        ("kdrl rollouts show first --sort kl_m", ["kl_mean"]),
        ("kdrl rollouts stats first --stage ", ["stage1", "stage2"]),
        ("kdrl status f", ["first"]),
        ("kdrl resume ", ["second", "first"]),
        ("kdrl run --recipe mi", [*(name for name in list_recipes() if name.startswith("mi")), "mine.yaml"]),
    ],
)
def test_a_shell_completes_names(line: str, found: list[str], cli: Cli, artifacts: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        create_run(name, load_recipe("miniature"), artifacts=artifacts)
    (tmp_path / "mine.yaml").write_text("")
    assert completed(cli, line) == found


def test_every_field_of_a_recipe_is_completed() -> None:
    def leaves(values: Any, prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            yield f"{prefix}{name}="
            if isinstance(value, dict) and name not in ("benchmarks", "also", "chat_template_kwargs", "by_metric"):
                yield from leaves(value, f"{prefix}{name}.")

    offered = {name for name, _ in program.complete_field("")}
    shown = set(leaves(load_recipe("miniature").model_dump(mode="json")))
    assert shown <= offered, sorted(shown - offered)


# --- lists ------------------------------------------------------------------------------------------------------------


def test_a_list_in_a_pipe_is_tab_separated(cli: Cli, artifacts: Path) -> None:
    create_run("first", load_recipe("miniature"), artifacts=artifacts)
    for command, column, value in (
        (["status"], "run", "first"),
        (["recipes"], "recipe", "miniature"),
        (["sweep", "list"], "sweep", "baselines"),
    ):
        rows = list(csv.DictReader(cli(*command).stdout.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
        assert value in [row[column] for row in rows]


def test_a_narrow_terminal_has_fewer_columns_and_whole_names(cli: Cli, artifacts: Path) -> None:
    name = "a-run-with-a-rather-long-name"
    create_run(name, load_recipe("miniature"), artifacts=artifacts)
    lines = cli("status", FORCE_COLOR="1", TERM="xterm", COLUMNS="60").stdout.splitlines()
    assert name in "\n".join(lines)
    assert "…" not in "\n".join(lines)
    assert max(cell_len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in lines[:-1]) <= 60
    assert "no room for started, alarms, reward" in lines[-1]


def test_columns_are_left_out_in_order() -> None:
    header, rows = ["name", "text", "number"], [["a" * 10, "several words that can be folded here", "12345"]]
    assert narrowed(header, rows, 80) == (header, rows, [])
    assert narrowed(header, rows, 42) == (header, rows, [])  # 10 + 20 + 6 and two gaps of 3
    assert narrowed(header, rows, 41) == (["name", "text"], [rows[0][:2]], ["number"])
    assert narrowed(header, rows, 41, drop=["text"]) == (["name", "number"], [[rows[0][0], "12345"]], ["text"])
    assert narrowed(header, rows, 1) == (["name"], [["a" * 10]], ["number", "text"])
