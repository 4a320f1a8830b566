"""Tripwire: run the same tiny runs with the code of two checkouts and compare what they publish, byte by byte.

    python tests/tripwire.py diff CHECKOUT_A CHECKOUT_B              # on one machine, with this Python's packages
    python tests/tripwire.py record CHECKOUT --output a.json         # or in two steps
    python tests/tripwire.py compare a.json b.json
    python tests/tripwire.py since [COMMIT]                          # the working tree against a commit

The runs (`_RUNS`, `_COMMANDS`) cover every objective, estimator and masking, the reference penalty, both aggregations,
SFT, evaluation, retention of checkpoints, a stopped run that is resumed, `kdrl label`, `kdrl evaluate`, `kdrl filter`.
Only the command line is used, so the script works with any checkout; it imports nothing of kdrl itself.

Every file below the artifacts folder counts, except those of `LEFT_OUT`. JSON and the report's Markdown are compared
without times and absolute paths (`VOLATILE`). Exit status: 0 if the records are equal, 1 if they differ, 2 if a
checkout could not be recorded. Where a change of bytes is meant, `--meant PATTERN` lets it pass. `--only RUN` makes one
run, in half a minute; its record can be compared with a whole one.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LEFT_OUT = {
    "prefect/*": "Prefect's own database",
    "*/.scratch/*": "working files, which may be deleted at any time",
    "*.lock": "empty; held by the process that works there",
    "*.holder.json": "process id, host and time of that process",
    "*.log*": "logs have times",
    "*.error.json": "the error that ended the last session, with its time",
    "*/READ-WITH-kdrl.open_run.txt": "says how to read the folder; no artifact",
    "*/report/report.html": "its figures show times; summary.json beside it has the rest",
}
"""Files that are not compared, and why. Patterns of the path below the artifacts folder."""

VOLATILE = {
    "at",
    "created_at",
    "date",
    "hidden_seconds",
    "kdrl_version",
    "manifest_sha256",
    "sample_s",
    "seconds",
    "stamp",
    "timings",
    "total_evaluation_time_seconds",
    "verify_s",
    "versions",
}
"""JSON fields of which only the kind of value counts: times, inodes, versions of packages, checksums over these."""

_SHOWN = 20
_PRODUCT = ("kdrl_core", "tasks", "flows")
_MAX_COMMITS = 50

# --- what is run -----------------------------------------------------------------------------------------------------

_STAGE: dict[str, Any] = {
    "objective": "grpo",
    "data": {"files": ["builtin:miniature/stage1.json"], "missing_labels": "keep", "max_problems": 24},
    "steps": 2,
    "prompts_per_step": 4,
    "mini_batch_prompts": 4,
    "group_size": 4,
    "learning_rate": 3.0e-4,
    "warmup_steps": 1,
    "temperature": 1.0,
    "max_prompt_tokens": 24,
    "max_response_tokens": 44,
    "entropy_coef": 0.0,
    "micro_batch_tokens": 512,  # so that a step has several micro-batches
}
_KD = {"objective": "kdrl", "beta": {"init": 0.3}}
_RULES = {
    "files": ["builtin:miniature/stage2.parquet"],
    "format": "skywork",
    "drop_passes_at_least": 15,
    "drop_all_failed": True,
    "max_unsolved_share": 0.1,
    "max_problems": 24,
}

_RUNS: dict[str, dict[str, Any]] = {
    "whole": {
        "stage1": {"ref_beta": 0.01, "entropy_coef": 0.001, "evaluate_every": 1, "weight_decay": 0.01},
        "stage2": {
            **_KD,
            "data": _RULES,
            "steps": 4,
            "beta": {"init": 0.5, "decay": 0.2, "minimum": 0.05},
            "tis_cap": 1.0,
            "evaluate_every": 2,
            "checkpoint": {"keep_last": 1, "keep_every": 2},
        },
        "alarms": {"clip_ratio": {"above": 0.05, "patience": 1}},
    },
    "masks": {
        "stage1": {**_KD, "kl_estimator": "k1", "kd_masking": "response"},
        "stage2": {**_KD, "kl_estimator": "k3", "kd_masking": "group", "aggregation": "group_mean", "ref_beta": 0.02},
    },
    "topk": {
        "stage1": {**_KD, "objective": "kd_rkl", "kl_estimator": "topk", "topk": {"k": 5}},
        "stage2": {
            **_KD,
            "kl_estimator": "topk",
            "topk": {"k": 3, "floor": -12.0},
            "kd_masking": "group",
            "temperature": 0.7,
            "entropy_coef": 0.01,
        },
    },
    "shaping": {
        "stage1": {**_KD, "objective": "reward_shaping", "temperature": 0.8, "steps": 3, "checkpoint": {"every": 2}},
        "stage2": {**_KD, "kl_estimator": "k3_k2grad", "normalize_std": False, "tis_cap": 2.0},
    },
    "sft": {
        "stage1": {"objective": "sft", "sft": {"samples": 2, "batch_size": 8, "shard_prompts": 10}},
        "stage2": {
            **_KD,
            "objective": "kd_rkl",
            "ref_beta": 0.02,
            "ref_kl_estimator": "k2",
            "aggregation": "group_mean",
        },
    },
    "zero": {  # no format reward; the other teacher; the masks with the other aggregation
        "reward": {"require_format": False},
        "teacher": {"path": "builtin:miniature/teacher-broad"},
        "stage1": {**_KD, "objective": "kd_rkl", "kl_estimator": "k1", "tis_cap": 1.0, "entropy_coef": 0.001},
        "stage2": {**_KD, "kd_masking": "response", "aggregation": "group_mean", "ref_beta": 0.01},
    },
    "ranks": {  # the objective goes over the ranks' messages, in every field
        "stage1": {**_KD, "kl_estimator": "k3_k2grad", "kd_masking": "group", "ref_beta": 0.01, "tis_cap": 1.0},
        "stage2": {**_KD, "kl_estimator": "topk", "topk": {"k": 4}, "aggregation": "group_mean", "entropy_coef": 0.01},
        "trainer": {"engine": "deepspeed", "ranks": 2, "zero_stage": 2},
    },
    "stopped": {
        "stage2": {**_KD, "objective": "kd_rkl", "kl_estimator": "k3", "steps": 3, "checkpoint": {"every": 3}},
        "alarms": {"clip_ratio": {"above": 0.0, "patience": 2, "stop": True}},
    },
}


def _recipe(name: str) -> dict[str, Any]:
    """The recipe of a run, every stage filled up from `_STAGE`."""
    recipe: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "student": {"path": "builtin:miniature/student"},
        "teacher": {"path": "builtin:miniature/teacher"},
        "prompt": {"template": "{question}"},
        "evaluation": {
            "benchmarks": [
                {"name": "test", "file": "builtin:miniature/benchmarks/test.jsonl", "samples": 2, "max_problems": 5},
                {"name": "ood", "file": "builtin:miniature/benchmarks/ood.jsonl", "samples": 1, "max_problems": 5},
            ],
            "periodic": ["test"],
            "temperature": 1.0,
            "max_context_tokens": 72,
        },
        "verification": {"workers": 1},
        "runtime": {"num_threads": 1, "rollout_batch_size": 12, "score_batch_tokens": 512},
    }
    for field, value in _RUNS[name].items():
        recipe[field] = {**_STAGE, **value} if field.startswith("stage") else value
    return recipe


_LACKING = () if find_spec("deepspeed") else ("ranks",)
"""Runs that need what is not installed here."""

_LABEL = "label -r {work}/whole.yaml -i builtin:miniature/stage2.parquet --model builtin:miniature/student --label tiny"

_COMMANDS = [
    *(f"run --recipe {{work}}/{name}.yaml --name {name}" for name in _RUNS if name not in ("stopped", *_LACKING)),
    "fails run --recipe {work}/stopped.yaml --name stopped",
    "damage runs/stopped/rollouts/stage=stage2/step=000000/rewards.parquet",
    "resume stopped --set alarms.clip_ratio.stop=false --set stage2.steps=4",
    "run --recipe {work}/stopped.yaml --name more --set alarms.clip_ratio.stop=false",
    "resume more --set stage2.steps=5",
    "evaluate builtin:miniature/student -r {work}/whole.yaml --lm-eval {artifacts}/lm_eval.json",
    "evaluate run:whole -r {work}/whole.yaml -b ood --samples 3 --max-problems 4",
    f"{_LABEL} --output {{artifacts}}/labels.parquet --keep-work --max-problems 7 --shard-problems 3 --all",
    "filter -r {work}/whole.yaml --input builtin:miniature/stage2.parquet --output {artifacts}/filtered.parquet",
]
"""Arguments of `kdrl`, one call after the other. {work} has the recipes, {artifacts} is the artifacts folder.

`fails` before a command: it has to end with exit status 1. `damage FILE` is no command of kdrl: it changes the last
byte of a published file, which the resume has to mend.
"""

_DRIVER = """
import json, os, sys, time, traceback
from pathlib import Path
import kdrl_core
from flows.cli import main
checkout = Path(sys.argv[1])
if Path(kdrl_core.__file__).parent.parent != checkout:
    sys.exit(f"kdrl_core was imported from {kdrl_core.__file__}, not from {checkout}")
for arguments in json.loads(Path(sys.argv[2]).read_text()):
    began, status, expected = time.perf_counter(), 0, 0
    if arguments[0] == "fails":
        arguments, expected = arguments[1:], 1
    print("$ kdrl", *arguments, flush=True)
    if arguments[0] == "damage":
        path = Path(os.environ["KDRL_ARTIFACTS"], arguments[1])
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        sys.argv = ["kdrl", *arguments]
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 70
    print(f"# exit status {status} after {time.perf_counter() - began:.1f} s", flush=True)
    if status != expected:
        sys.exit(f"kdrl {' '.join(arguments)}: exit status {status}, expected was {expected}")
"""
"""Runs in the checkout: all commands in one process, which imports once and starts one private Prefect server."""


class RecordError(Exception):
    """A checkout's runs did not come to their end."""


def record(checkout: Path, *, keep: Path | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Make all runs with the code of `checkout` and describe what they left.

    Args:
        checkout: folder with kdrl_core/, tasks/ and flows/.
        keep: artifacts folder to use and to leave behind; default: a temporary one.
        only: names of the runs to make; default: all, and the other commands.

    Raises:
        RecordError: a command did not end as expected; the message has the end of its output.
    """
    checkout = checkout.resolve()
    if not (checkout / "kdrl_core").is_dir():
        raise RecordError(f"{checkout} is not a checkout of kdrl: it has no kdrl_core/")
    with tempfile.TemporaryDirectory(prefix="kdrl-tripwire-") as temporary:
        work = Path(temporary)
        artifacts = keep.resolve() if keep is not None else work / "artifacts"
        for name in _RUNS:
            (work / f"{name}.yaml").write_text(json.dumps(_recipe(name), indent=1))
        commands = [command for command in _COMMANDS if not only or _run_of(command) in only]
        if not commands:
            raise RecordError(f"there is no run {' or '.join(only)}; there are {', '.join(_RUNS)}, more")
        began = time.perf_counter()
        _run_commands(commands, checkout, work, artifacts)
        return {
            "checkout": str(checkout),
            "commands": commands,
            "seconds": round(time.perf_counter() - began, 1),
            **describe(artifacts, {str(checkout): "CHECKOUT", str(artifacts): "ARTIFACTS", temporary: "WORK"}),
        }


def _run_of(command: str) -> str | None:
    """The run that a command makes or goes on with."""
    found = re.search(r"--name (\S+)|^resume (\S+)|^damage runs/([^/]+)/", command)
    return next(filter(None, found.groups())) if found else None


def _run_commands(commands: Sequence[str], checkout: Path, work: Path, artifacts: Path) -> None:
    filled = [[part.format(work=work, artifacts=artifacts) for part in command.split()] for command in commands]
    (work / "commands.json").write_text(json.dumps(filled))
    (work / "driver.py").write_text(_DRIVER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "KDRL_"))}
    environment |= {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkout may be read-only, and is left as it was
        "PYTHONSAFEPATH": "1",
        "KDRL_ARTIFACTS": str(artifacts),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, str(work / "driver.py"), str(checkout), str(work / "commands.json")]
    with (work / "log.txt").open("w+") as log:
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        said = log.read()
    if done.returncode:
        raise RecordError(f"{checkout} could not be recorded; the end of its output:\n{said[-4000:]}")


# --- what is recorded ------------------------------------------------------------------------------------------------


def describe(artifacts: Path, places: Mapping[str, str]) -> dict[str, Any]:
    """What lies below an artifacts folder.

    Args:
        artifacts: the folder.
        places: absolute paths and the word that stands for each, wherever they are written into a file.

    Returns:
        `files`: path → sha256 of its content, without what is volatile. `manifests`: path of an artifact → its
        manifest's `inputs` and all other fields; inputs that have volatile files are given by their content here.
    """
    files: dict[str, str] = {}
    for path in sorted(artifacts.rglob("*")):
        name = path.relative_to(artifacts).as_posix()
        if path.is_file() and not is_left_out(name):
            files[name] = content_hash(path, places)
    manifests = dict(_manifests(artifacts, files, places))
    return {"files": files, "manifests": manifests}


def is_left_out(name: str) -> bool:
    """Whether a file does not count."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)


def content_hash(path: Path, places: Mapping[str, str]) -> str:
    """sha256 of a file, without what is volatile in it."""
    content = path.read_bytes()
    if path.name == "timings.parquet":
        content = _shape_of_table(path)
    elif path.suffix == ".json":
        shown = json.dumps(steady(json.loads(content), places))  # in the order of the file
        content = f"{shown}\n{len(content.splitlines())} lines".encode()
    elif path.suffix == ".md":
        content = _steady_text(content.decode(), places).encode()
    return hashlib.sha256(content).hexdigest()


def steady(value: Any, places: Mapping[str, str]) -> Any:
    """JSON without what is volatile, with words in place of absolute paths."""
    if isinstance(value, dict):
        if "manifest_sha256" in value:
            value = _steady_manifest(value)
        return {
            _renamed(key, places): _kind(child) if key in VOLATILE else steady(child, places)
            for key, child in value.items()
        }
    if isinstance(value, list):
        return [steady(child, places) for child in value]
    return _renamed(value, places) if isinstance(value, str) else value


def _kind(value: Any) -> Any:
    """The fields of a JSON value, with the kind of each leaf in place of the leaf."""
    if isinstance(value, dict):
        return {key: _kind(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_kind(child) for child in value]
    return "number" if isinstance(value, int | float) else type(value).__name__


def _steady_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes are compared by `files` and, with other words, by `manifests`: here are the fields alone."""
    dull = {"sha256": "", "size": 0, "inputs": sorted(manifest.get("inputs", {}))}
    files = manifest.get("files")
    return {**manifest, **dull, "files": files if files is None else sorted(files)}


def _renamed(text: str, places: Mapping[str, str]) -> str:
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def _steady_text(text: str, places: Mapping[str, str]) -> str:
    """The report: the last column of the table of stages is seconds."""
    rows = (re.sub(r"\|[^|]*\|$", "| |", row) if re.match(r"\| stage\d", row) else row for row in text.splitlines())
    return _renamed("\n".join(rows), places)


def _shape_of_table(path: Path) -> bytes:
    """Columns, types and number of rows: the values are times."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path)
    return f"{table.metadata.num_rows} rows\n{table.schema_arrow.remove_metadata()}".encode()


def _manifests(
    artifacts: Path, files: Mapping[str, str], places: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for where in sorted(artifacts.rglob("*manifest.json")):
        name = where.relative_to(artifacts).as_posix()
        manifest = json.loads(where.read_text())
        if is_left_out(name) or "artifact" not in manifest:
            continue
        root = _root_of(where, manifest["artifact"])
        inputs = {
            _renamed(place, places): _volatile_by_content(root / place, artifacts, files) or sha256
            for place, sha256 in manifest["inputs"].items()
        }
        dull = ("inputs", "files", "sha256", "size", "manifest_sha256")
        facts = {key: value for key, value in manifest.items() if key not in dull}
        yield name, {**steady(facts, places), "inputs": inputs}


def _root_of(where: Path, artifact: str) -> Path:
    """The folder that an artifact's path is relative to: the run, if it belongs to one."""
    for root in where.parents:
        if (root / artifact).exists():
            return root
    return where.parent


def _volatile_by_content(path: Path, artifacts: Path, files: Mapping[str, str]) -> str | None:
    """For a folder with times in it: a hash over the steady content of its files. None for all other artifacts."""
    if not (path / "results.json").is_file():
        return None
    below = f"{path.relative_to(artifacts).as_posix()}/"
    lines = [f"{sha256} {name}" for name, sha256 in files.items() if name.startswith(below)]
    return "steady " + hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --- what is compared ------------------------------------------------------------------------------------------------


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], meant: Sequence[str] = ()) -> list[str]:
    """One line for each difference of two records, the earliest cause first.

    Files that come first in a run's order are named first: a rollout before the update that was made from it. Paths
    that match a pattern of `meant` may differ.
    """
    found: list[tuple[tuple[Any, ...], str]] = []
    names = {**ours["files"], **theirs["files"], **ours["manifests"], **theirs["manifests"]}
    compared = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in meant)]
    for name in compared:
        before, after = ours["files"].get(name), theirs["files"].get(name)
        if before == after:
            continue
        if before is None or after is None:
            found.append((_order(name), f"{'new' if before is None else 'missing'}: {name}"))
        else:
            found.append((_order(name), f"bytes differ: {name} ({before[:12]} → {after[:12]})"))
    for name in compared:
        before, after = (record["manifests"].get(name) for record in (ours, theirs))
        if before is None or after is None:
            continue  # of a file that is new or missing
        for key in sorted(before.keys() | after.keys()):
            old, new = before.get(key), after.get(key)
            if old != new:
                what = "inputs" if key == "inputs" else f"manifest's {key}"
                found.append((_order(name), f"{what} differ: {name}: {_difference(old, new)}"))
    return [line for _, line in sorted(found)]


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The leaves in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key, ...) != new.get(key, ...)]
        shown = [_difference(old.get(key, ...), new.get(key, ...), f"{path}.{key}" if path else key) for key in keys]
        return "; ".join(shown)
    told = ["absent" if value is ... else str(value)[:60] for value in (old, new)]
    return f"{path} {told[0]} → {told[1]}".strip()


_PARTS = ("recipe", "manifest", "data", "samples", "rollouts", "metrics", "checkpoints", "evaluation", "student")
_STEP_FILES = ("rollouts", "teacher", "reference", "rewards", "update")


def _order(name: str) -> tuple[Any, ...]:
    """Where a file stands in the order in which a run makes its files."""
    parts = name.split("/")
    inside = parts[2:] if parts[0] == "runs" else parts
    room = next((i for i, part in enumerate(_PARTS) if inside and inside[0].startswith(part)), len(_PARTS))
    stem = re.sub(r"^_|\..*$", "", parts[-1])
    position = _STEP_FILES.index(stem) if stem in _STEP_FILES else len(_STEP_FILES)
    run = parts[1] if parts[0] == "runs" else ""
    run_order = list(_RUNS).index(run) if run in _RUNS else len(_RUNS)
    return run_order, run, room, "/".join(parts[:-1]), position, name


def told(ours: Mapping[str, Any], theirs: Mapping[str, Any], meant: Sequence[str] = ()) -> int:
    """Print the differences, or that there are none. Returns the exit status."""
    both = [command for command in ours["commands"] if command in theirs["commands"]]
    if both not in (ours["commands"], theirs["commands"]) or not both:
        print("the records were made with other commands: record both checkouts with the same tripwire.py")
        return 2
    if ours["commands"] != theirs["commands"]:
        left_out = {*ours["commands"], *theirs["commands"]} - {*both}
        ours, theirs = _limited(ours, both, left_out), _limited(theirs, both, left_out)
    lines = differences(ours, theirs, meant)
    for line in lines[:_SHOWN]:
        print(line)
    if len(lines) > _SHOWN:
        print(f"… and {len(lines) - _SHOWN} more")
    counts = f"{len(ours['files'])} files and {len(ours['manifests'])} manifests of {len(ours['commands'])} commands"
    print(f"{len(lines)} differences: {counts}" if lines else f"no differences: {counts} are equal")
    return 1 if lines else 0


def _limited(record: Mapping[str, Any], commands: list[str], left_out: set[str]) -> dict[str, Any]:
    """A record without what only the commands `left_out` make."""
    runs = {_run_of(command) for command in left_out}
    places = tuple(f"runs/{run}/" for run in runs if run)

    def is_kept(name: str) -> bool:
        return not name.startswith(places) and (None not in runs or name.startswith("runs/"))

    kept = {kind: {n: value for n, value in record[kind].items() if is_kept(n)} for kind in ("files", "manifests")}
    return {"commands": commands, **kept}


# --- against a commit ------------------------------------------------------------------------------------------------


class NoBaseError(Exception):
    """There is no commit to compare with."""


def base_commit(root: Path) -> str:
    """The commit to compare the working tree in `root` with.

    On a branch it is the one where the branch left main; on main, or where nothing has changed since, the newest one
    whose product code differs from the working tree.

    Raises:
        NoBaseError: no git, no repository, or no such commit in a shallow clone.
    """
    merged = [_git(root, "merge-base", "HEAD", main) for main in ("origin/main", "main") if _has(root, main)]
    recent = _git(root, "rev-list", "--first-parent", f"--max-count={_MAX_COMMITS}", "HEAD").split()
    for commit in [*merged, *recent]:
        if _git(root, "diff", "--name-only", commit, "--", *_PRODUCT):
            return commit
    raise NoBaseError(f"the last {len(recent)} commits have the product code of the working tree")


def unpack(root: Path, commit: str, folder: Path) -> Path:
    """Write the product code of a commit into `folder`; the repository stays as it is. Returns the folder.

    Raises NoBaseError if there is no such commit.
    """
    _git(root, "archive", f"--output={folder}.tar", commit, "--", *_PRODUCT)
    shutil.unpack_archive(f"{folder}.tar", folder, filter="data")
    return folder


def _has(root: Path, name: str) -> bool:
    try:
        return bool(_git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"))
    except NoBaseError:
        return False


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise NoBaseError(f"git {arguments[0]}: {said}") from error
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run a checkout's code and write the hashes of what it published")
    recorder.add_argument("checkout", type=Path)
    recorder.add_argument("--output", "-o", type=Path, required=True, help="JSON file to write")
    recorder.add_argument("--keep", type=Path, help="artifacts folder to leave behind (must not exist)")
    comparer = commands.add_parser("compare", help="compare two records")
    comparer.add_argument("records", type=Path, nargs=2, metavar="RECORD")
    differ = commands.add_parser("diff", help="record two checkouts and compare them")
    differ.add_argument("checkouts", type=Path, nargs=2, metavar="CHECKOUT")
    since = commands.add_parser("since", help="compare the working tree with a commit")
    since.add_argument("commit", nargs="?", help="default: where the branch left main, or the last other product code")
    for each in (recorder, differ, since):
        each.add_argument("--only", action="append", default=[], metavar="RUN", help="one run in place of all")
    for each in (comparer, differ, since):
        each.add_argument("--meant", action="append", default=[], metavar="PATTERN", help="paths that may differ")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is going on ends with this process
    try:
        if asked.command == "compare":
            return told(*(json.loads(path.read_text()) for path in asked.records), asked.meant)
        if asked.command == "diff":
            return told(*(record(checkout, only=asked.only) for checkout in asked.checkouts), asked.meant)
        if asked.command == "since":
            return compare_with(asked.commit, asked.meant, only=asked.only)
        if asked.keep is not None and asked.keep.exists():
            raise RecordError(f"{asked.keep} exists; --keep takes a new folder")
        made = record(asked.checkout, keep=asked.keep, only=asked.only)
    except (RecordError, NoBaseError) as error:
        print(error, file=sys.stderr)
        return 2
    asked.output.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{asked.output}: {len(made['files'])} files, {len(made['manifests'])} manifests, {made['seconds']} s")
    return 0


def compare_with(commit: str | None = None, meant: Sequence[str] = (), *, only: Sequence[str] = ()) -> int:
    """Compare the working tree that holds this script with a commit; prints and returns what `told` does.

    Args:
        commit: default: that of `base_commit`.
        meant: patterns of paths that may differ.
        only: as `record` takes it.

    Raises:
        NoBaseError: there is no such commit.
        RecordError: one of both did not run to its end.
    """
    root = Path(__file__).resolve().parent.parent
    commit = commit or base_commit(root)
    with tempfile.TemporaryDirectory(prefix="kdrl-tripwire-") as folder:
        base = unpack(root, commit, Path(folder, "base"))
        print(f"comparing with {_git(root, 'log', '-1', '--format=%h %s', commit)}", flush=True)
        return told(record(base, only=only), record(root, only=only), meant)


if __name__ == "__main__":
    sys.exit(main())
