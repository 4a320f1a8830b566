"""`kdrl sweep`: what it says of shipped sweeps, and of input that is wrong, before anything runs."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# arguments → parts of the line: the cause with file and field, and the fix
FAULTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown sweep": (["run", "tabel1"], ["no sweep 'tabel1', did you mean 'table1'?", "path of a .yaml file"]),
    "missing file": (["run", "my.yaml"], ["sweep file my.yaml does not exist", "one of ablation"]),
    "unknown field in a file": (
        ["run", "bad.yaml"],
        ["sweep bad.yaml: field 'sets': unknown field, did you mean 'set'?"],
    ),
    "unknown field in a variant": (
        ["run", "variant.yaml"],
        ["sweep variant.yaml, variant 'a':", "'stage2.stesp': unknown field, did you mean 'steps'?"],
    ),
    "recipe without values": (["run", "table1", "--recipe", "zero-3b"], ["field 'recipes'", "none for recipe zero-3b"]),
    "models that are not there": (
        ["run", "table1", "--recipe", "paper-1.5b"],
        ["sweep table1, variant 'KDRL-Annealing', seed 0: student.path=models/", "no such directory"],
    ),
    "teacher that was not run": (["run", "figure7"], ["run miniature-zero-teacher has no finished student"]),
    "no values": (["--vary", "stage2.steps"], ["--vary stage2.steps: expected FIELD=a,b,c"]),
    "a value of the wrong kind": (
        ["--vary", "stage2.steps=2,x", "--name", "g"],
        ["sweep g, variant 'steps=x': ", "field 'stage2.steps'", "got 'x'"],
    ),
    "seeds that are none": (["show", "table1", "--seeds", "many"], ["--seeds many: give how many, e.g. 5"]),
    "name that leads elsewhere": (["run", "table1", "--name", "../x"], ["run name '../x' is not allowed"]),
    "not started": (["status", "table1"], ["no sweep 'table1' was started here", "kdrl sweep run table1"]),
    "sharing with one that was not started": (
        ["run", "table1", "--share-with", "figure2"],
        ["no sweep 'figure2' was started here"],
    ),
    "options before the command": (["--seeds", "3", "run", "table1"], ["options go after the command"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_leaves_nothing(fault: str, cli: Cli, tmp_path: Path, artifacts: Path) -> None:
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"name": "bad", "sets": {}}))
    variants = {"a": {"stage2.stesp": 1}}
    (tmp_path / "variant.yaml").write_text(yaml.safe_dump({"name": "variant", "variants": variants}))
    arguments, parts = FAULTS[fault]
    done = cli("sweep", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not artifacts.exists()


def test_show_tells_cells_sharing_and_steps(cli: Cli) -> None:
    done = cli("sweep", "show", "table1", "--json")
    shown = json.loads(done.stdout)
    assert shown["steps"] == {"alone": 3000, "shared": 800, "to_train": 2200}
    assert shown["shared"]["stage1"] == {"cells": 25, "made": 5}
    assert shown["cells"][1]["run"] == "table1--kdrl--seed0"


def test_show_tells_what_each_variant_is_beside_the_paper_without_models_or_data(cli: Cli) -> None:
    shown = json.loads(cli("sweep", "show", "table1", "--recipe", "paper-1.5b", "--json").stdout)["variants"]
    assert "stage2.steps: 280" in shown[0]["fields"]
    assert "stage2.beta.decay: 5e-05" in shown[0]["fields"]
    assert {one["variant"]: one["fields"] for one in shown[2:]} == {
        "GRPO": ["stage2.objective: 'kdrl' → 'grpo'"],  # its β is not read
        "KD-RKL": [
            "stage2.objective: 'kdrl' → 'kd_rkl'",
            "stage2.beta.init: 0.005 → 0.002",
            "stage2.beta.decay: 5e-05 → 0.0",
            "stage2.beta.minimum: 0.001 → 0.0",
        ],
        "SFT": ["stage2.objective: 'kdrl' → 'sft'", "stage2.learning_rate: 1e-06 → 2e-07"],
    }
    assert shown[4]["source"].startswith("B.2: 8 samples of the teacher per problem")
    text = cli("sweep", "show", "figure6", "--recipe", "paper-1.5b").stdout
    assert "Not trained alike: KD-RKL with 200 steps; GRPO with 460 steps; KDRL with 280 steps." in text


def test_a_shown_file_is_a_sweep_again(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(cli("sweep", "show", "figure4", "--yaml").stdout)
    again = cli("sweep", "show", "mine.yaml", "--json")
    assert json.loads(again.stdout)["cells"] == json.loads(cli("sweep", "show", "figure4", "--json").stdout)["cells"]


def test_without_anything_the_help_is_shown(cli: Cli) -> None:
    done = cli("sweep")
    assert done.returncode == 2
    assert "kdrl sweep --recipe miniature --vary" in " ".join(done.stdout.split())
