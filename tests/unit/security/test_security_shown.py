"""What models, data and files of others say is shown as text: it moves no cursor, opens no link, runs in no browser."""

import io
import json
import logging
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from flows.cli.shared import PlainConsole
from flows.cli.watch import RunView
from kdrl_core.boxes.make import read_progress
from kdrl_core.config import load_recipe
from kdrl_core.errors import DataError, KdrlError, StorageError, visible
from kdrl_core.ledger import create_run, list_runs, publish_directory, replace_file, run_lock
from kdrl_core.look.reporting.run_report import render_report
from kdrl_core.look.reporting.run_summary import named_status
from kdrl_core.tables.files import write_table

ESCAPES = "\x1b[2J\x1b[31m\x1b]0;title\x07\x1b]8;;http://evil\x1b\\ \x9b1A\x08\x7f\x00\u202e\u2066\u2028"
MARKUP = "[red]x[/red] [link=http://evil]y[/link] :boom: [/]"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HTML = "<script>alert(1)</script><img src=x onerror=alert(2)></script></pre></code>\"'><svg onload=alert(3)>"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_console_spells_control_characters_out_and_knows_no_markup(is_terminal: bool) -> None:
    shown = io.StringIO()
    console = PlainConsole(file=shown, force_terminal=is_terminal, color_system=None, width=400, legacy_windows=False)
    table = Table(ESCAPES, title=ESCAPES)
    table.add_row(ESCAPES + MARKUP)
    for what in (ESCAPES + MARKUP, Text(ESCAPES), table):
        console.print(what, highlight=False)
    console.print(ESCAPES, style="red", soft_wrap=True)
    console.print_json(data={"a": ESCAPES})
    assert not CONTROL.search(shown.getvalue())
    assert shown.getvalue().count(r"\x1b[2J") == 6
    assert MARKUP in shown.getvalue()


def test_errors_are_visible_wherever_they_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    for kind in (KdrlError, DataError, StorageError):
        error = kind(f"row 1, field {ESCAPES!s}: bad")
        assert str(error) == str(pickle.loads(pickle.dumps(error)))
        assert not CONTROL.search(str(error))
        assert r"\x1b[2J" in str(error)
        logging.getLogger("kdrl").error("failed: %s", error, exc_info=error)  # as Prefect logs it
    assert caplog.text
    assert not CONTROL.search(caplog.text)
    assert visible("α → β\n\tx") == "α → β\n\tx"


def test_hostile_rows_are_verified_and_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    monkeypatch.chdir(tmp_path)
    row = {"response": rf"{ESCAPES}\boxed{{7}}", "answer": "7", "group": ESCAPES + MARKUP}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n" + '{"response": 1}\n')
    arguments = ["verify", "rows.jsonl", "--no-format", "--by", "group", "--on-error", "drop", "--workers", "1"]
    arguments += ["--max-malformed-share", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "\ufffd[2J" in done.stdout
    assert "[red]x[/red]" in done.stdout
    assert not CONTROL.search(done.stdout + done.stderr)
    bad = {"response": "x", "answer": "7", ESCAPES: 1}
    Path("bad.jsonl").write_text(json.dumps(bad) + "\n")
    for faulty in (["verify", "bad.jsonl", "--response", ESCAPES[1:9]], ["verify", f"{ESCAPES[1:9]}.jsonl"]):
        done = CliRunner().invoke(app, faulty)
        assert done.exit_code == 1
        assert not CONTROL.search(done.stdout + done.stderr)


def test_a_hostile_run_directory_is_shown_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    held = create_run("held", load_recipe("miniature", ["description=" + json.dumps(ESCAPES)]))
    spoilt = create_run("spoilt", load_recipe("miniature"))
    spoilt.paths.recipe.write_text(json.dumps({ESCAPES + MARKUP: 1}))
    with run_lock(held.paths.lock):
        holder = {"pid": ESCAPES, "host": MARKUP, "since": {"deep": [1]}}
        held.paths.lock.with_suffix(".holder.json").write_text(json.dumps(holder))
        held.paths.scratch.mkdir()
        (held.paths.scratch / "progress.json").write_text(json.dumps({"stage": ESCAPES, "phase": MARKUP}))
        assert list_runs() == ["held", "spoilt"]
        assert named_status("spoilt")["state"].startswith("unusable: ")
        for arguments in (["status"], ["status", "--json"], ["status", "held"], ["recipes", str(held.paths.recipe)]):
            done = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
            assert done.exit_code == 0, done.stderr
            assert not CONTROL.search(done.stdout + done.stderr)


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "[]", "{}", '{"stage": 1, "step": "x", "phase": {}}', "\x00", '{"stage": "stage1"}']
)
def test_a_progress_file_that_is_none_is_passed_over(content: str, tmp_path: Path) -> None:
    run = create_run("mine", load_recipe("miniature"), artifacts=tmp_path)
    run.paths.scratch.mkdir()
    (run.paths.scratch / "progress.json").write_text(content)
    assert read_progress(run.paths) is None
    assert RunView(run.paths).new_lines() == []


class _Elements(HTMLParser):
    """Elements of a page that can run or fetch something, and attributes that do."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        active = tag in ("script", "img", "svg", "iframe", "object", "embed", "link", "base", "form")
        handlers = [name for name, _ in attrs if name.startswith("on") or name in ("src", "href", "srcdoc")]
        if active or handlers:
            self.found.append(f"{tag} {handlers}")


def rendered(folder: Path, text: str) -> tuple[list[str], str]:
    """Active elements of the report on a run in which everybody says `text`, and the page."""
    overrides = [f"description={json.dumps(text)}", f"prompt.template={json.dumps(text + '{question}')}"]
    run = create_run("mine", load_recipe("miniature", overrides), artifacts=folder)
    manifest = json.loads(run.paths.manifest.read_text())
    manifest["versions"] |= {"torch": text, "kdrl": text}
    run.paths.manifest.write_text(json.dumps(manifest))
    replace_file(run.paths.filter_report, b"{}")
    response = dict.fromkeys(("question", "response", "verdict", "reason", "ground_truth"), text)
    result = {"benchmarks": {text: {"accuracy": 0.5, "low": 0.4, "high": 0.6}}}

    def write(folder: Path) -> None:
        write_table(
            pa.Table.from_pylist([{**response, "accuracy_reward": 1.0, "length": 3}]), folder / "responses.parquet"
        )
        (folder / "results.json").write_text(json.dumps(result))

    publish_directory(run.paths.evaluation("stage2"), write)
    (folder / "report").mkdir()
    render_report(run, folder / "report")
    page = (folder / "report" / "report.html").read_text()
    elements = _Elements()
    elements.feed(page)
    return elements.found, page


def test_the_report_runs_nothing_that_models_or_data_say(tmp_path: Path) -> None:
    harmless, _ = rendered(tmp_path / "harmless", "plain")
    hostile, page = rendered(tmp_path / "hostile", HTML)
    assert hostile == harmless
    assert set(harmless) == {"script []"}  # nothing is fetched either
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
