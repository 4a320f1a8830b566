"""`kdrl plan` as a program."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from crash.tiny_run import open_tiny, train

from kdrl_core.boxes.session import close_sessions
from kdrl_core.look.planning.measured import rates_of_run
from kdrl_core.tables.files import load_metrics

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_paper_fits_eight_gpus(cli: Cli) -> None:
    done = cli("plan", "--recipe", "paper-1.5b", "--gpus", "8", "--gpu-memory", "80GB", "--set", "vllm.replicas=1")
    assert done.returncode == 0, done.stderr
    for part in (
        "placement: colocated",
        "teacher-score",
        "optimizer step",
        "KV cache",
        "(assumed)",
        "GPU-hours",
        "1,029",
        "one engine each",
        "--set vllm.replicas=8",
    ):
        assert part in done.stdout


def test_set_changes_the_plan_as_it_changes_the_run(cli: Cli) -> None:
    settings = ("trainer.zero_stage=3", "trainer.ranks=4", "vllm.replicas=1")
    done = cli("plan", "-r", "paper-1.5b", *(part for each in settings for part in ("--set", each)), "--json")
    assert done.returncode == 0, done.stderr
    stage = json.loads(done.stdout)["stages"][-1]
    assert stage["assumed"]["engines"]["zero_stage"] == 3
    assert stage["assumed"]["cluster"]["gpus"] == 4
    update = next(phase for phase in stage["placements"][0]["memory"] if phase["phase"] == "update")
    assert update["components"]["trainer weights"] == 2 * 1_777_088_000 / 4
    assert any("--set vllm.replicas=4" in each for each in stage["conditions"])


def test_json_says_the_same(cli: Cli) -> None:
    done = cli("plan", "-r", "paper-1.5b", "--gpus", "8", "--json")
    assert done.returncode == 0, done.stderr
    stages = {stage["stage"]: stage for stage in json.loads(done.stdout)["stages"]}
    assert stages["stage2"]["parameters"] == {"student": 1_777_088_000, "teacher": 7_615_616_512}
    chosen = stages["stage2"]["placements"][0]
    assert chosen["time_s"]["total"] == stages["stage2"]["step_s"]
    assert sum(chosen["memory"][0]["components"].values()) == chosen["memory"][0]["bytes"]


def test_exit_code_1_where_nothing_fits(cli: Cli) -> None:
    done = cli("plan", "-r", "paper-1.5b", "--gpus", "1", "--gpu-memory", "16GB")
    assert done.returncode == 1
    assert "does not fit, because" in done.stdout
    assert "would fit with: " in done.stdout
    assert done.stderr == "error: stage1, stage2 of paper-1.5b does not fit\n"
    as_json = cli("plan", "-r", "paper-1.5b", "--gpus", "1", "--gpu-memory", "16GB", "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["hours"] is None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpu-memory", "80"], ["--gpu-memory 80", "80GB or 24GiB"]),
        (["--gpu-memory", "0GB"], ["--gpu-memory 0GB"]),
        (["--gpus", "8", "--nodes", "2"], ["--gpus 8 is not --nodes 2"]),
        (["--set", "trainer.zero_stage=1"], ["trainer.zero_stage"]),
        (
            ["--recipe", "miniature", "--gpus", "8"],
            ["one process on one GPU", "--gpus 1", "--set teacher.engine=vllm", "--set trainer.ranks=8"],
        ),
        (["--recipe", "paper"], ["no recipe 'paper'"]),
        (["--set", "teacher.path=models/other"], ["teacher.path=models/other", "config.json"]),
        (["--from-run", "none"], ["none"]),
        (["--mean-response-tokens", "9000"], ["limit of 8192"]),
    ],
)
def test_bad_input_is_one_line(cli: Cli, arguments: list[str], parts: list[str]) -> None:
    done = cli("plan", "-r", "paper-1.5b", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        pytest.param([], 1, id="torch"),
        pytest.param(["trainer.activation_checkpointing=true"], 1, id="activation checkpointing"),
        pytest.param(
            ["trainer={engine: deepspeed, ranks: 2, activation_checkpointing: true}"],
            2,
            id="two ranks",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
            ],
        ),
    ],
)
def test_a_run_predicts_its_own_steps(
    overrides: list[str], gpus: int, cli: Cli, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring and update of a plan from a run are the medians that the run measured, on as many GPUs as it used."""
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    run = open_tiny(artifacts, "measured", overrides)
    try:
        train(run)
    finally:
        close_sessions()
    rates, work = rates_of_run("measured")
    assert rates.rollout_tokens_per_s is not None
    assert work.mean_response > 1
    done = cli("plan", "--recipe", str(run.paths.recipe), "--from-run", "measured", "--json")
    assert done.returncode == 0, done.stderr
    stage = json.loads(done.stdout)["stages"][-1]
    assert stage["assumed"]["cluster"]["gpus"] == gpus
    time = stage["placements"][0]["time_s"]
    assert time["communication"] == 0.0
    rows = load_metrics(run, "stage2")[1:]
    for phase, name in (("teacher_score", "time/teacher_score_s"), ("update", "time/update_s")):
        low, high = min(each[name] for each in rows), max(each[name] for each in rows)
        assert 0.99 * low <= time[phase] <= 1.01 * high


def test_without_options_the_plan_is_for_this_machines_gpus(cli: Cli, smi: Callable[..., None]) -> None:
    smi()  # four of 80 GiB
    plan = partial(cli, "plan", "-r", "paper-1.5b", "--json", PATH=os.environ["PATH"])
    done = plan()
    assert done.returncode == 0, done.stderr
    cluster = json.loads(done.stdout)["stages"][-1]["assumed"]["cluster"]
    assert (cluster["gpus"], cluster["gpus_per_node"], cluster["gpu_memory"]) == (4, 4, 80 * 2**30)
    given = json.loads(plan("--gpus", "2").stdout)["stages"][-1]["assumed"]["cluster"]
    assert (given["gpus"], given["gpu_memory"]) == (2, 80e9)
