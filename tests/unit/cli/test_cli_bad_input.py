"""Bad input that can be seen before a run begins: one line with cause and fix, exit code 1, nothing written."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import KDRL

from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.ledger import create_run

SERVE = ["--max-model-len", "96", "--cpu"]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def assert_told(done: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """One line on stderr that begins with `error:` and has every part; nothing on stdout; exit code 1."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for part in parts:
        assert part in line


def copy_of(role: str, folder: Path) -> Path:
    """A copy of the miniature's model that a test may spoil."""
    return Path(shutil.copytree(resolve_path(f"builtin:miniature/{role}"), folder / role))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# arguments of `kdrl run` → parts of the line: the cause with its field, and the fix
FAULTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (
        ["--recipe", "minature"],
        ["no recipe 'minature'", "did you mean 'miniature'?", "path of a .yaml"],
    ),
    "missing recipe file": (["--recipe", "my.yaml"], ["recipe file my.yaml does not exist", "one of miniature"]),
    "paper's recipe without models": (
        ["--recipe", "paper-1.5b"],
        ["student.path=models/DeepSeek-R1-Distill-Qwen-1.5B: no such directory", "give a local"],
    ),
    "unknown field": (["--set", "stage2.betta.init=1"], ["'stage2.betta'", "did you mean 'beta'?"]),
    "KD without a teacher": (
        ["--set", "teacher=null"],
        ["distils from a teacher", "set teacher.path or stage2.objective=grpo"],
    ),
    "batch not divisible": (
        ["--set", "stage1.batch_size=9", "--set", "stage1.group_size=8"],
        ["batch_size 9 is not divisible by group_size 8", "set batch_size="],
    ),
    "run name with ../": (["--name", "../x"], ["run name '../x' is not allowed: use letters"]),
    "run name with a line break": (["--name", "a\nb"], ["run name 'a\\nb' is not allowed"]),
    "missing teacher": (
        ["--set", "teacher.path=models/nosuch"],
        ["teacher.path=models/nosuch: no such directory", "give a local"],
    ),
    "not a model": (
        ["--set", "student.path=."],
        ["student.path=.:", "is not a model directory, it has no config.json", "give the"],
    ),
    "missing GGUF file": (["--set", "student.gguf_file=x.gguf"], ["no file x.gguf", "correct student.gguf_file"]),
    "path out of the assets": (["--set", "student.path=builtin:../.."], ["'builtin:../..' leaves"]),
    "missing data": (
        ["--set", "stage2.data.files=[data/nosuch.parquet]"],
        ["stage2.data.files: data/nosuch.parquet", "does not exist", "check the path"],
    ),
    "pattern without match": (
        ["--set", "stage1.data.files=['data/*.json']"],
        ["stage1.data.files: data/*.json matches no file"],
    ),
    "missing benchmark": (
        ["--set", "evaluation.benchmarks.0.file=b.jsonl"],
        ["benchmark test: evaluation.benchmarks file: b.jsonl does not exist"],
    ),
    "response beyond context": (
        ["--set", "stage2.max_response_tokens=500", "--set", "stage2.max_prompt_tokens=24"],
        ["'stage2.max_response_tokens'", "500 response and 24 prompt tokens are 524", "context of 128", "to 104"],
    ),
}


@pytest.mark.parametrize(("arguments", "parts"), FAULTS.values(), ids=FAULTS)
def test_run_refuses(arguments: list[str], parts: list[str], cli: Cli, artifacts: Path) -> None:
    assert_told(cli("run", *arguments), *parts)
    assert not artifacts.exists()


def spoil_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def spoil_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()


def spoil_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def config_of_another_kind(model: Path) -> None:
    (model / "config.json").write_text("[]")


def lose_a_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_weights, ["has no model.safetensors", "convert them first"]),
        (spoil_tokenizer, ["has no tokenizer files", "copy the model's tokenizer.json"]),
        (spoil_config, ["config.json cannot be read", "download the model again"]),
        (config_of_another_kind, ["config.json is not a JSON object", "download the model again"]),
        (lose_a_shard, ["lacks model-00002-of-00002.safetensors", "download the model again"]),
    ],
)
def test_run_refuses_an_incomplete_model(
    spoil: Callable[[Path], None], parts: list[str], cli: Cli, artifacts: Path, tmp_path: Path
) -> None:
    model = copy_of("student", tmp_path)
    spoil(model)
    assert_told(cli("run", "--set", f"student.path={model}"), f"student.path={model}", *parts)
    assert not artifacts.exists()


def other_id(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted((t for t in vocabulary if t.isdigit()), key=vocabulary.__getitem__)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def other_end(config: dict[str, Any]) -> None:
    config["eos_token"] = {"content": "<|stop|>"}


@pytest.mark.parametrize(
    ("file", "change", "parts"),
    [
        ("tokenizer.json", other_id, ["token '0' is", "for the student and", "for the teacher"]),
        ("tokenizer_config.json", other_end, ["the student ends with '<|end|>', the teacher with '<|stop|>'"]),
    ],
)
def test_run_refuses_a_teacher_with_another_tokenizer(
    file: str,
    change: Callable[[dict[str, Any]], None],
    parts: list[str],
    cli: Cli,
    artifacts: Path,
    tmp_path: Path,
) -> None:
    teacher = copy_of("teacher", tmp_path)
    edit_json(teacher / file, change)
    assert_told(cli("run", "--set", f"teacher.path={teacher}"), "student and teacher tokenizers differ", *parts)
    assert not artifacts.exists()


def test_run_refuses_a_teacher_with_a_shorter_context(cli: Cli, artifacts: Path, tmp_path: Path) -> None:
    teacher = copy_of("teacher", tmp_path)
    edit_json(teacher / "config.json", lambda config: config.update(max_position_embeddings=80))
    done = cli("run", "--set", f"teacher.path={teacher}")
    assert_told(done, "its context of 80 tokens is shorter than stage2's", "lower stage2.max_response_tokens")
    assert not artifacts.exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["has no problems; give a file with at least one row"]),
        (
            '{"id": "1", "problem": "1+1", "answer": ""}\n',
            ["b.jsonl row 1, field 'answer': empty; fill it in or drop the row"],
        ),
    ],
)
def test_run_refuses_a_bad_benchmark(content: str, parts: list[str], cli: Cli, artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(content)
    assert_told(cli("run", "--set", "evaluation.benchmarks.0.file=b.jsonl"), *parts)
    assert not artifacts.exists()


def test_a_bad_field_takes_less_than_two_seconds() -> None:
    """The whole program, with what it imports."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        done = subprocess.run(
            [KDRL, "run", "--set", "stage2.betta=1"], capture_output=True, text=True, timeout=120, check=False
        )
        times.append(time.perf_counter() - started)
        assert_told(done, "did you mean 'beta'?")
    assert min(times) < 2.0


@pytest.mark.parametrize("command", [["status"], ["resume"]])
def test_an_unknown_run_is_told(command: list[str], cli: Cli, artifacts: Path) -> None:
    assert_told(cli(*command, "nosuch"), "no run 'nosuch' in", "there are none yet; start one with kdrl run")
    assert_told(cli(*command, "../nosuch"), "run name '../nosuch' is not allowed")
    assert not artifacts.exists()


def test_an_unknown_run_is_told_with_the_known_ones(cli: Cli, artifacts: Path) -> None:
    create_run("one", load_recipe("miniature"), artifacts=artifacts)
    assert_told(cli("resume", "nosuch"), "no run 'nosuch' in", "runs here: one")


def test_resume_refuses_a_recipe_edited_by_hand(cli: Cli, artifacts: Path) -> None:
    run = create_run("one", load_recipe("miniature"), artifacts=artifacts)
    run.paths.recipe.write_text(run.paths.recipe.read_text().replace("seed: 0", "seed: 1"))
    assert_told(cli("resume", "one"), "was changed by hand", "Undo the change")


@pytest.mark.parametrize("command", [["run", "--name"], ["resume"]])
def test_a_recipe_that_does_not_fit_the_run_is_refused_at_once(command: list[str], cli: Cli, artifacts: Path) -> None:
    create_run("one", load_recipe("miniature"), artifacts=artifacts)
    before = sorted(artifacts.rglob("*"))
    done = cli(*command, "one", "--set", "stage2.learning_rate=0.1")
    assert_told(done, "run one was started with another recipe: stage2.learning_rate: ", " → 0.1. Use another run name")
    assert sorted(artifacts.rglob("*")) == before


def test_resume_refuses_a_bad_field(cli: Cli, artifacts: Path) -> None:
    run = create_run("one", load_recipe("miniature"), artifacts=artifacts)
    assert_told(cli("resume", "one", "--set", "stage2.betta=1"), str(run.paths.recipe), "did you mean 'beta'?")


def test_watching_needs_a_run(cli: Cli) -> None:
    assert_told(cli("status", "--watch"), "--watch follows one run; name it: kdrl status RUN --watch")


@pytest.mark.parametrize("arguments", [["run", "--nosuch"], ["nosuch"]])
def test_misuse_of_the_command_line_is_told_with_the_help(arguments: list[str], cli: Cli, artifacts: Path) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert " -h' for help" in done.stderr
    assert not artifacts.exists()


def test_a_replica_cannot_be_started_on_a_port_that_is_taken(cli: Cli) -> None:
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = cli("serve", "--model", str(resolve_path("builtin:miniature/student-vllm")), "--port", port, *SERVE)
    assert_told(done, f"cannot listen at 127.0.0.1:{port} (Address already in use)", "give another --port")


def test_a_replica_needs_a_model(cli: Cli, tmp_path: Path) -> None:
    assert_told(cli("serve", "--model", str(tmp_path), *SERVE), "is no model directory: it has no config.json")


@pytest.mark.parametrize(
    ("model", "options", "parts"),
    [
        ("student", [], ["has attention heads of size 12; vLLM on a CPU knows 32, 64"]),
        (
            "student-vllm",
            ["--max-model-len", "130"],
            ["--max-model-len 130", "context of 128 tokens; give 128 or less"],
        ),
        ("student-vllm", ["--kv-cache-gb", "0.00001"], ["--kv-cache-gb: 1e-05 GiB, but", "raise it to"]),
        ("student-vllm", ["--port", "65535", "--replicas", "2"], ["2 ports from there on are beyond 65535"]),
    ],
)
def test_a_replica_that_cannot_be_served_is_told_before_vllm_loads_it(
    model: str, options: list[str], parts: list[str], cli: Cli
) -> None:
    pytest.importorskip("vllm")
    assert_told(cli("serve", "--model", str(resolve_path(f"builtin:miniature/{model}")), *SERVE, *options), *parts)
