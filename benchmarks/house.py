"""What one training step runs through, and how long the code is, beside the target for each figure.

    python benchmarks/house.py                       # this checkout
    python benchmarks/house.py OLD NEW --turns 3     # two, their step times measured in turns
    python benchmarks/house.py --json

The step is one of the miniature's second stage (KDRL, a checkpoint every step), run by `kdrl run` in one process. It
begins when the manifest of one update.parquet is renamed into place, and ends when the next one is. So each part of a
step counts once: the flow, the boxes, metrics, checkpoint, retention. This script imports nothing of kdrl, so it can
measure any checkout, whatever its modules are called. How each figure is counted:

    files, functions    whose code runs in the step, in any thread (sys.setprofile); functions by code object, so a
                        comprehension counts as one; generated code (dataclasses) does not count
    opens               audit events `open` of a file or folder of the run, without those by pyarrow and safetensors
    hashes              calls of hashlib.file_digest
    manifest reads      opens of a `*manifest.json` of the run for reading, apart from those for fsync
    Parquet opens       new pyarrow.parquet.ParquetFile; `--parquet` lists them by file
    step time           median over the steps after the warm-up, in runs without any probe; also the CPU time of the
                        process, which other programs on the machine disturb less
    functions, files    of kdrl_core by `ast`: a function is its whole `def`; self and cls are no parameters
    upward imports      against STOREYS in the checkout's tests/unit/test_layering.py, if it is there
    lines               of all *.py in kdrl_core, tasks and flows

Commit 9d4b643, before the rebuild, has 80 opens, 17 hashes, 19 manifest reads and 9 Parquet opens. There 44 files of
kdrl_core run, without the tracker's. The number of functions depends a little on the data: 311 with 4 prompts a step,
323 with 16.
"""

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PRODUCT = ("kdrl_core", "tasks", "flows")
_WARM_UP = 3
_MAX_LINES, _MAX_FUNCTION_LINES, _MAX_PARAMETERS = 350, 60, 8

_PROBE = """
import hashlib, json, os, sys, threading, time
from pathlib import Path

checkout, result, is_probed, first, last = sys.argv[1], sys.argv[2], sys.argv[3] == "probed", *map(int, sys.argv[4:6])
run = os.path.join(os.environ["KDRL_ARTIFACTS"], "runs", "house") + os.sep
product = tuple(os.path.join(checkout, name) + os.sep for name in ("kdrl_core", "tasks", "flows"))
ends, ran, events = {}, set(), []
is_inside = False


def audit(event, arguments):
    if event == "os.rename":
        target = os.fsdecode(arguments[1])
        if target.endswith("_update.manifest.json"):
            end_step(int(os.path.basename(os.path.dirname(target)).removeprefix("step=")))
    elif is_inside and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(run):
            is_read = arguments[1] is not None and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            events.append(["read" if is_read else "open", path.removeprefix(run)])


def end_step(step):
    global is_inside
    ends[step] = time.perf_counter(), time.process_time()
    if step == first and is_probed:
        is_inside = True
        for frame in sys._current_frames().values():  # what has been called already and goes on
            while frame:
                profile(frame, "call", None)
                frame = frame.f_back
    if step == last:
        is_inside = False
        functions = [[code.co_filename.removeprefix(checkout + os.sep), code.co_qualname] for code in ran]
        Path(result).write_text(json.dumps({"ends": ends, "functions": sorted(functions), "events": events}))


def profile(frame, event, argument):
    if is_inside and event == "call" and frame.f_code.co_filename.startswith(product):
        ran.add(frame.f_code)


def probe():
    import pyarrow.parquet as pq

    class Probed(pq.ParquetFile):
        def __init__(self, source, *arguments, **options):
            if is_inside:
                events.append(["parquet", str(source).removeprefix(run)])
            super().__init__(source, *arguments, **options)

    def file_digest(file, *arguments, **options):
        if is_inside:
            events.append(["hash", str(file.name).removeprefix(run)])
        return plain_digest(file, *arguments, **options)

    plain_digest, hashlib.file_digest = hashlib.file_digest, file_digest
    pq.ParquetFile = pq.core.ParquetFile = Probed
    threading.setprofile(profile)
    sys.setprofile(profile)


sys.addaudithook(audit)
if is_probed:
    probe()
from flows.cli import main

sys.argv = ["kdrl", *sys.argv[6:]]
main()
"""
"""Runs in the checkout: `kdrl run`, watched from outside."""


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("checkouts", type=Path, nargs="*", default=[here], help="default: the checkout of this script")
    parser.add_argument("--turns", type=int, default=1, help="runs of each checkout for the step time; 0: none")
    parser.add_argument("--steps", type=int, default=30, help="steps of each of these runs")
    parser.add_argument("--prompts", type=int, default=16, help="prompts per step; 8 rollouts each, up to 64 tokens")
    parser.add_argument("--parquet", action="store_true", help="list which file is parsed how often")
    parser.add_argument("--json", action="store_true", help="everything as JSON, with the names of what ran")
    asked = parser.parse_args()
    checkouts = [path.resolve() for path in asked.checkouts]
    found = [{"checkout": str(path), **_step(path, prompts=asked.prompts), **_code(path)} for path in checkouts]
    seconds: list[list[tuple[float, float]]] = [[] for _ in checkouts]
    for _ in range(asked.turns):
        for path, taken in zip(checkouts, seconds, strict=True):
            taken += _step_seconds(path, prompts=asked.prompts, steps=asked.steps)
    for each, taken in zip(found, seconds, strict=True):
        for index, key in enumerate(("step_ms", "step_cpu_ms")):
            each[key] = round(1e3 * statistics.median(one[index] for one in taken), 1) if taken else None
    if asked.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, with_parquet=asked.parquet)


# --- the step --------------------------------------------------------------------------------------------------------


def _step(checkout: Path, *, prompts: int) -> dict[str, Any]:
    """What one steady step does."""
    last = _WARM_UP + 2
    found = _run(checkout, "probed", first=last - 1, last=last, prompts=prompts, steps=last + 2)
    files = {file for file, _ in found["functions"]}
    of = {
        kind: [name for each, name in found["events"] if each == kind] for kind in ("open", "read", "hash", "parquet")
    }
    return {
        "files": len(files),
        "files_core": sum(file.startswith("kdrl_core/") and "/tracking/" not in file for file in files),
        "functions": len(found["functions"]),
        "functions_core": sum(file.startswith("kdrl_core/") for file, _ in found["functions"]),
        "opens": len(of["open"]) + len(of["read"]),
        "hashes": len(of["hash"]),
        "manifest_reads": sum(name.endswith("manifest.json") for name in of["read"]),
        "parquet_opens": len(of["parquet"]),
        "hashed": _counted(of["hash"]),
        "parsed": _counted(of["parquet"]),
        "opened": _counted([*of["open"], *of["read"]]),
        "ran": [f"{file}: {name}" for file, name in found["functions"]],
    }


def _counted(names: list[str]) -> dict[str, int]:
    """How often each file is named; a temporary file is called by the name that it gets."""
    plain = (re.sub(r"\.tmp-([^/]+?)-\d+-[0-9a-f]+", r"\1", re.sub(r"step[=-]\d+", "step", name)) for name in names)
    return dict(Counter(plain).most_common())


def _step_seconds(checkout: Path, *, prompts: int, steps: int) -> list[tuple[float, float]]:
    """Seconds and CPU seconds of each step after the warm-up."""
    ends = _run(checkout, "plain", first=0, last=steps - 1, prompts=prompts, steps=steps)["ends"]
    times = [ends[str(step)] for step in range(_WARM_UP, steps)]
    return [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(times)]


def _run(checkout: Path, mode: str, *, first: int, last: int, prompts: int, steps: int) -> dict[str, Any]:
    """Run the miniature's second stage under the probe, which looks at the steps after `first` up to `last`."""
    sizes = [f"steps={steps}", f"prompts_per_step={prompts}", f"mini_batch_prompts={prompts}", "evaluate_every=null"]
    overrides = ["stage1=null", *(f"stage2.{size}" for size in sizes)]
    overrides += [f"evaluation.benchmarks.{i}.{field}=1" for i in range(4) for field in ("samples", "max_problems")]
    with tempfile.TemporaryDirectory(prefix="kdrl-house-") as folder:
        (script := Path(folder, "probe.py")).write_text(_PROBE)
        result = Path(folder, "result.json")
        command = [sys.executable, str(script), str(checkout), str(result), mode, str(first), str(last)]
        command += ["run", "--recipe", "miniature", "--name", "house", "--verbose"]  # without the progress display
        command += [part for override in overrides for part in ("--set", override)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "KDRL_"))}
        environment |= {
            "PYTHONPATH": str(checkout),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "KDRL_ARTIFACTS": str(Path(folder, "artifacts")),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not result.is_file():
            sys.exit(f"{checkout}: the run failed:\n{(done.stdout + done.stderr)[-4000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


# --- the code --------------------------------------------------------------------------------------------------------


def _code(checkout: Path) -> dict[str, Any]:
    """Counts from the source files."""
    lines = {file: len(file.read_text().splitlines()) for package in _PRODUCT for file in _files(checkout / package)}
    functions = [each for file in _files(checkout / "kdrl_core") for each in _functions(file)]
    upward = _upward_imports(checkout)
    return {
        "long_functions": [name for name, length, _ in functions if length > _MAX_FUNCTION_LINES],
        "wide_functions": [name for name, _, parameters in functions if parameters > _MAX_PARAMETERS],
        "long_files": [file.relative_to(checkout).as_posix() for file, count in lines.items() if count > _MAX_LINES],
        "upward_imports": upward,
        "lines": sum(lines.values()),
        **{f"lines_{package}": sum(lines[file] for file in _files(checkout / package)) for package in _PRODUCT},
    }


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _functions(file: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and parameters of each function of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            yield f"{file.stem}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1, count


def _upward_imports(checkout: Path) -> list[str] | None:
    """Imports of kdrl_core from a part of a higher storey, or of another part of the same. None without storeys."""
    storeys = _storeys(checkout / "tests" / "unit" / "test_layering.py")
    if storeys is None:
        return None
    level = {part: index for index, parts in enumerate(storeys) for part in parts}
    found = []
    for file in _files(checkout / "kdrl_core"):
        part = file.relative_to(checkout / "kdrl_core").with_suffix("").parts[0]
        for target in sorted(_imported_parts(file) & level.keys() - {part}):
            if part in level and level[target] >= level[part]:
                found.append(f"{file.relative_to(checkout).as_posix()} → {target}")
    return found


def _storeys(file: Path) -> list[set[str]] | None:
    if file.is_file():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STOREYS":
                return list(ast.literal_eval(node.value))
    return None


def _imported_parts(file: Path) -> set[str]:
    """Parts of kdrl_core that a file imports from, inside functions as well."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("kdrl_core.")}


# --- the table -------------------------------------------------------------------------------------------------------

_ROWS: list[tuple[str, str, str]] = [
    ("files in a steady step: kdrl_core, tracker aside", "files_core", "≤ 28"),
    ("files in a steady step: with tasks, flows", "files", ""),
    ("functions in a steady step: kdrl_core", "functions_core", ""),
    ("functions in a steady step: with tasks, flows", "functions", ""),
    ("opens in the run's folder, per step", "opens", "≤ 40"),
    ("sha256 of files, per step", "hashes", "≤ 9"),
    ("manifest reads, per step", "manifest_reads", ""),
    ("Parquet opens, per step", "parquet_opens", "once per box"),
    (f"functions > {_MAX_FUNCTION_LINES} lines, kdrl_core", "long_functions", "0"),
    (f"functions > {_MAX_PARAMETERS} parameters, kdrl_core", "wide_functions", "≤ 6"),
    (f"files > {_MAX_LINES} lines", "long_files", "0"),
    ("upward imports", "upward_imports", "0"),
    ("lines: kdrl_core", "lines_kdrl_core", ""),
    ("lines: tasks", "lines_tasks", ""),
    ("lines: flows", "lines_flows", ""),
    ("lines of product code", "lines", "≤ 31.9k"),
    ("step of the miniature, median ms", "step_ms", "not slower"),
    ("step of the miniature, median CPU ms", "step_cpu_ms", "not slower"),
]


def _print(found: list[dict[str, Any]], *, with_parquet: bool) -> None:
    console = Console()
    table = Table("what", *(Path(each["checkout"]).name for each in found), "target")
    for title, key, target in _ROWS:
        table.add_row(title, *(_shown(each[key]) for each in found), target)
    console.print(table)
    for each in found if with_parquet else []:
        for what in ("parsed", "hashed"):
            console.print(f"{Path(each['checkout']).name}, {what} per step", highlight=False)
            for name, count in each[what].items():
                console.print(f"  {count}  {name}", highlight=False, soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return str(len(value)) if isinstance(value, list) else f"{value:,}"


if __name__ == "__main__":
    main()
