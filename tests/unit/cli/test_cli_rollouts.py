"""`kdrl rollouts`: what the commands print, as JSON and for people, and how they refuse."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rollout_runs import make_run, part_path, write_step
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.cli.shared import out
from kdrl_core.ledger import Run
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.look.rollouts.views import PROMPTS, STEPS

Rollouts = Callable[..., Result]


@pytest.fixture
def run(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Three steps of six responses, at a place of the test's own."""
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    return make_run(artifacts)


@pytest.fixture
def rollouts(run: Run, monkeypatch: pytest.MonkeyPatch) -> Rollouts:
    """`rollouts("show", "small", …)` in this process."""
    for name, value in {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["rollouts", *arguments], catch_exceptions=False)

    return call


@pytest.fixture
def on_terminal(rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `rollouts` prints on a terminal without a pager, styles removed."""

    def call(*arguments: str, columns: int = 200) -> str:
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "PAGER": "none"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(out, "_width", columns)
        return re.sub(r"\x1b\[[0-9;]*m", "", rollouts(*arguments).stdout)

    return call


def rows_of(done: Result) -> list[dict[str, str]]:
    """The rows of tab-separated values."""
    return list(csv.DictReader(done.stdout.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def printed(done: Result) -> Any:
    assert (done.exit_code, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_stats(rollouts: Rollouts, on_terminal: Callable[..., str]) -> None:
    rows = printed(rollouts("stats", "small", "--json"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["metrics"]["loss/total"] == 0.0
    piped = rows_of(rollouts("stats", "small"))
    assert [(row["stage"], row["step"], row["entropy"]) for row in piped] == [
        ("stage2", "0", "0.5"), ("stage2", "1", "1.5"), ("stage2", "2", "2.5")
    ]  # fmt: skip
    shown = on_terminal("stats", "small")
    assert "small stage2: steps 0 to 2, 18 rollouts" in shown
    assert re.search(r"entropy +0\.500 +→ +2\.500 +▁▅█", shown)
    assert re.search(r"^ +2 +6 +0\.333 +5 +14 +23 +0\.167 +0\.138 +2\.500", shown, re.MULTILINE)
    narrow = on_terminal("stats", "small", columns=60)
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines()[:-2])) <= 60
    assert "no room for all right, all wrong, " in narrow


def test_stats_of_some_steps(rollouts: Rollouts) -> None:
    assert [row["step"] for row in printed(rollouts("stats", "small", "--step", "1-", "--json"))] == [1, 2]


def test_many_steps_are_put_together_unless_all_are_asked_for(
    on_terminal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.cli.rollouts._SHOWN_STEPS", 2)
    shown = on_terminal("stats", "small")
    assert "0–1" in shown
    assert "means over several steps; --all has each alone" in shown
    assert "0–1" not in on_terminal("stats", "small", "--all")


def test_show_lists_what_meets_the_conditions(rollouts: Rollouts, on_terminal: Callable[..., str]) -> None:
    found = printed(rollouts("show", "small", "--step", "1", "--verdict", "wrong", "--verdict", "malformed", "--json"))
    assert (found["total"], [row["prompt_id"] for row in found["rows"]]) == (3, ["q-a", "q-b", "q-c"])
    found = printed(rollouts("show", "small", "--sort", "kl_mean", "--desc", "--limit", "2", "--reward", "0", "--json"))
    assert (found["total"], len(found["rows"])) == (12, 2)
    asked = ("show", "small", "--text", "q-b number 1", "--limit", "2")
    piped = rows_of(rollouts(*asked))
    assert [row["response_preview"] for row in piped] == ["step 0 q-b number 1", "step 1 q-b number 1"]
    assert (piped[0]["reward"], piped[0]["finish_reason"]) == ("1.0", "stop")
    assert "no room for KL, " in on_terminal(*asked, columns=60)
    shown = on_terminal(*asked)
    assert re.search(r"stage2 +0 +q-b +1 +correct +1\.00 +16 +0\.100 +step 0 q-b number 1", shown)
    assert "1–2 of 3; --limit, --offset and --sort show others" in shown
    found = printed(rollouts("show", "small", "--length", "12..16", "--kl", "-0.15", "--finish", "stop", "--json"))
    assert found["total"] == 3


def test_show_a_response_in_full(rollouts: Rollouts) -> None:
    arguments = ("show", "small", "--step", "1", "--prompt", "q-b", "--sample", "1")
    (record,) = printed(rollouts(*arguments, "--json"))["rows"]
    assert record.keys() == {*RECORD.names, "tokens", "log_ratios"}
    assert record["log_ratios"] == pytest.approx([-0.5] * 16)
    shown = rollouts(*arguments).stdout
    assert "small stage2 step 1, prompt q-b, sample 1" in shown
    assert "correct: it is correct" in shown
    assert "found 7 · true 7 · advantage 0.700 · KL 0.100 a token, 1.60 in all" in shown
    assert "\nprompt\nWhat is q-b?\n" in shown
    assert re.search(r"6 +-0\.50 +-0\.60 +-1\.10 +'</think>'", shown)  # for whom colours say nothing


def test_tokens_stand_on_the_colour_of_their_log_ratio() -> None:
    from flows.cli.rollouts_shared import log_ratios, token_text

    record = {
        "teacher_logprobs": [-4.0, -1.0, -0.5, None],
        "logprobs": [-1.0, -1.0, -3.5, -1.0],
        "rollout_logprobs": None,
    }
    ratios = log_ratios(record)
    assert ratios == [-3.0, 0.0, 3.0, None]
    text = token_text(["[bold]a", "b", "c", "d"], ratios)
    assert text.plain == "[bold]abcd"
    assert [(text.plain[span.start : span.end], str(span.style)) for span in text.spans] == [
        ("[bold]a", "black on rgb(235,0,0)"),
        ("c", "black on rgb(0,150,235)"),
    ]
    assert token_text(["\x1b[2J\n"], [None]).plain == "\\x1b[2J\n"
    assert log_ratios({**record, "teacher_logprobs": None}) is None
    assert log_ratios({**record, "logprobs": None, "rollout_logprobs": [0.0] * 4}) == [-4.0, -1.0, -0.5, None]


def test_hostile_texts_do_not_reach_the_terminal(rollouts: Rollouts, artifacts: Path) -> None:
    texts = ["\x1b]0;owned\x07\x1b[2J\x1b[1A", "[bold red]markup[/] :skull:", "<script>alert(1)</script>"]
    texts += ["\u202edesrever", "\x9b2J", "a\rb"]
    write_step(make_run(artifacts, "hostile", steps=0), "stage2", 0, until="rollouts", response=texts)
    listed = rollouts("show", "hostile").stdout
    full = "".join(rollouts("show", "hostile", "--full", "--offset", str(row)).stdout for row in range(6))
    asked = rollouts("sql", "hostile", "select response from rollouts").stdout
    as_json = rollouts("show", "hostile", "--json").stdout
    for shown in (listed, full, asked, as_json):
        assert not set(shown) & set("\x1b\x07\x9b\r\u202e")
    for shown in (listed, full, asked):
        assert r"\x1b]0;owned\x07\x1b[2J\x1b[1A" in shown
        assert "[bold red]markup[/] :skull:" in shown
        assert "<script>alert(1)</script>" in shown
    assert [row["response_preview"] for row in json.loads(as_json)["rows"]] == texts


def test_diff_of_two_steps(rollouts: Rollouts) -> None:
    found = printed(rollouts("diff", "small", "0", "2", "--json"))
    assert (found["counts"]["common"], found["counts"]["same"]) == (3, 3)
    shown = rollouts("diff", "small", "stage2:0-1", "2").stdout
    assert "3 common problems: 0 better, 0 worse, 3 the same" in shown
    assert re.search(r"small stage2 steps 0–1 +12 +3 +0\.333", shown)
    assert re.search(r"q-a +\+0\.00 +0\.50 → 0\.50 +2/4 → 1/2", shown)
    shown = rollouts("diff", "small", "0", "2", "--prompt", "q-a").stdout
    assert "small stage2 step 0: 2 responses" in shown
    assert "step 2 q-a number 1" in shown


def test_diff_names_the_steps_that_share_problems(rollouts: Rollouts, artifacts: Path) -> None:
    others = [f"other-{row}" for row in range(6)]
    run = make_run(artifacts, "turns", steps=1)
    write_step(run, "stage2", 1, prompt_id=others)
    write_step(run, "stage2", 2)
    shown = rollouts("diff", "turns", "0", "1").stdout
    assert "no problem is on both sides; steps that share problems: 2 (3)" in shown


def test_diff_of_two_runs(rollouts: Rollouts, artifacts: Path) -> None:
    make_run(artifacts, "other", steps=2)
    found = printed(rollouts("diff", "small", "other", "--step", "1", "--json"))
    assert (found["before"]["label"], found["after"]["label"]) == ("small step 1", "other step 1")
    assert found["counts"]["same"] == 3


def test_sql(rollouts: Rollouts, on_terminal: Callable[..., str]) -> None:
    query = "select verdict, count(*) n, sum(length) tokens from rollouts group by 1 order by 1"
    assert printed(rollouts("sql", "small", query, "--json"))[0] == {"verdict": "correct", "n": 6, "tokens": 60}
    assert rows_of(rollouts("sql", "small", query))[0] == {"verdict": "correct", "n": "6", "tokens": "60"}
    cut = rollouts("sql", "small", "from rollouts", "--limit", "2")
    assert (len(rows_of(cut)), cut.stderr) == (2, "first 2 rows; --limit 0 prints all\n")
    shown = on_terminal("sql", "small", query)
    assert re.search(r"correct +6 +60", shown)
    assert "4 rows" in shown
    assert "first 2 rows; --limit 0 prints all" in on_terminal("sql", "small", "from rollouts", "--limit", "2")
    assert len(printed(rollouts("sql", "small", "from range(300)", "--limit", "0", "--json"))) == 300
    wide = on_terminal("sql", "small", "from rollouts", "--limit", "1")
    assert re.search(r"response +step 0 q-a number 0", wide)  # a line a column


def test_help_of_sql_lists_every_column(rollouts: Rollouts) -> None:
    shown = rollouts("sql", "--help").stdout
    for name in (*RECORD.names, *STEPS, *PROMPTS):
        assert re.search(rf"^ +{name}\b", shown, re.MULTILINE), name
    assert "View prompts" in shown


@pytest.mark.parametrize("command", ["stats", "show", "diff", "sql", "export", "import"])
def test_help_teaches_by_example(rollouts: Rollouts, command: str) -> None:
    shown = rollouts(command, "--help").stdout
    assert shown.count(f"kdrl rollouts {command} ") >= 2
    assert "--json" in shown


def test_export(rollouts: Rollouts, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    done = rollouts("export", "small", "-o", str(path), "--step", "1", "--columns", "step,prompt_id,reward", "--json")
    assert json.loads(done.stdout)["rollouts"] == 6
    assert path.read_text().splitlines()[:2] == ["step,prompt_id,reward", "1,q-a,1.0"]
    again = rollouts("export", "small", "-o", str(path))
    assert (again.exit_code, "exists; give another file, or --force to replace it" in again.stderr) == (1, True)
    assert "18 rollouts" in rollouts("export", "small", "-o", str(path), "--force").stdout
    nothing = rollouts("export", "small", "-o", str(tmp_path / "y.csv"), "--text", "nowhere")
    assert (nothing.exit_code, "nothing was written" in nothing.stderr) == (1, True)
    assert not (tmp_path / "y.csv").exists()


def test_import(rollouts: Rollouts, tmp_path: Path, artifacts: Path) -> None:
    dump = tmp_path / "1.jsonl"
    dump.write_text(json.dumps({"input": "a", "output": "b", "score": 1.0, "step": 1}) + "\n")
    done = rollouts("import", str(dump), "--from", "verl", "--output", "theirs")
    assert "1 rollouts of 1 steps; reward: score" in done.stdout
    assert printed(rollouts("stats", "theirs", "--json"))[0]["reward_mean"] == 1.0
    assert (artifacts / "runs" / "theirs" / "import.json").is_file()
    made = json.loads(rollouts("import", str(dump), "--from", "verl", "--output", f"{tmp_path}/new", "--json").stdout)
    assert (made["num_rollouts"], made["path"]) == (1, f"{tmp_path}/new")


def test_damaged_files_are_named_and_the_rest_is_shown(rollouts: Rollouts, run: Run) -> None:
    path = part_path(run.paths, "stage2", 1, "rewards")
    path.write_bytes(b"torn")
    done = rollouts("show", "small", "--json")
    assert (done.exit_code, json.loads(done.stdout)["total"]) == (0, 18)
    assert done.stderr.startswith(f"left out: {path} is damaged: 4 bytes are not the")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stats", "smal"], "no run 'smal' in .*, did you mean 'small'"),
        (["show", "../small"], "no such folder"),
        (["stats", "small", "--stage", "stage3"], "no rollout meets these conditions; there are small: stage2 3 steps"),
        (["show", "small", "--step", "7"], "no rollout meets these conditions"),
        (["show", "small", "--step", "1.5"], "--step 1.5: steps are whole numbers"),
        (["show", "small", "--length", "9-5"], "--length 9-5: nothing is from 9 to 5; give the smaller number first"),
        (["show", "small", "--reward", "-"], "--reward -: give a number or a range"),
        (["show", "small", "--verdict", "rigth"], "no verdict 'rigth'"),
        (["show", "small", "--sort", "response"], "cannot sort by 'response'; columns: run,"),
        (["show", "small", "--sort", "lenght"], "cannot sort by 'lenght', did you mean 'length'"),
        (["diff", "small", "1"], "no run '1'"),
        (["diff", "small"], "give a run and two steps"),
        (["diff", "small", "small"], "compared with itself"),
        (["diff", "small", "1", "x"], "give a run and two steps"),
        (["diff", "small", "1", "99"], "there are no rollouts of small stage2 step 99"),
        (["diff", "small", "1", "2", "--step", "1"], "--step is for two runs"),
        (["sql", "small", "select 1 from nope"], "Table with name nope does not exist"),
        (["sql", "small", "copy rollouts to 'x'"], "COPY is not possible here"),
        (["sql", "small"], "give a run and a query"),
        (["export", "small", "-o", "x.txt"], r"give a name that ends in \.parquet or \.jsonl or \.csv"),
        (["export", "small", "-o", "x.csv", "--columns", "rewrd"], "no column 'rewrd', did you mean 'reward'"),
    ],
)
def test_refusals_are_one_line(rollouts: Rollouts, arguments: list[str], told: str) -> None:
    done = rollouts(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.match(f"error: .*{told}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_ranges() -> None:
    from flows.cli.rollouts_shared import number_range

    cases = {
        "5": (5, 5),
        "5-8": (5, 8),
        "5-": (5, None),
        "-8": (None, 8),
        "0..1": (0, 1),
        "..-1": (None, -1),
        "-2..-1": (-2, -1),
    }
    for text, expected in cases.items():
        assert number_range("--x", text) == expected, text


def test_sparklines() -> None:
    from flows.cli.rollouts_shared import sparkline

    assert sparkline([0.0, 1.0, None, 0.5]) == "▁█ ▅"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == sparkline([None]) == ""
    assert sparkline([float(n) for n in range(600)], width=8) == "▁▂▃▄▅▆▇█"


def test_a_pager_gets_what_is_longer_than_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from flows.cli import rollouts_shared
    from flows.cli.shared import PlainConsole

    got = tmp_path / "got"
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > {got}\n")
    pager.chmod(0o755)
    monkeypatch.setenv("PAGER", str(pager))
    with (tmp_path / "terminal").open("w") as terminal:
        console: Console = PlainConsole(file=terminal, force_terminal=True, width=80, height=10)
        monkeypatch.setattr(rollouts_shared, "out", console)
        with rollouts_shared.paged() as shown:
            shown.print("short \x1b[2J", highlight=False)
        assert not got.exists()
        with rollouts_shared.paged() as shown:
            for number in range(20):
                shown.print(f"line {number} \x1b[2J", highlight=False)
    assert (tmp_path / "terminal").read_text() == "short \\x1b[2J\n"
    assert got.read_text().splitlines()[19] == r"line 19 \x1b[2J"
