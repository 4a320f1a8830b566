"""The table of targets of docs/architecture.md: what one training step runs through, and how long the code is.

    python benchmarks/house.py                       # this checkout
    python benchmarks/house.py OLD NEW --turns 3     # several, their step times measured in turns
    python benchmarks/house.py --json

How each figure is counted. The step is one of the miniature's stage 2 (KDRL, k2, a checkpoint every step), run by
`kdrl run` in one process. It begins when the manifest of update.parquet of one step is renamed into place and ends with
that of the next, so everything of a step is in it once: Prefect's flow, the box bodies, metrics, checkpoint, retention.
Nothing that imports kdrl is needed for that, so every checkout can be measured, whatever its modules are called.

    files, functions     of kdrl_core, tasks and flows that run in that process, in every thread (sys.setprofile);
                         functions by file and qualified name, without comprehensions and generated code
    opens                Python's `open` and `os.open` of files of the run (audit events), folders and locks left out
    sha256 of files      calls of hashlib.file_digest
    manifest reads       those opens that read a `*manifest.json` of the run
    Parquet opens        new pyarrow.parquet.ParquetFile (pyarrow opens its files itself, outside of Python's `open`)
    step time            median over the steps after the warm-up, without any of these probes
"""

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PRODUCT = ("kdrl_core", "tasks", "flows")
_WARM_UP = 3
_MAX_LINES, _MAX_FUNCTION, _MAX_PARAMETERS = 350, 60, 8

_PROBE = '''
import hashlib, json, os, stat, sys, threading, time
from collections import Counter
from pathlib import Path

checkout, result, probed = sys.argv[1], sys.argv[2], sys.argv[3] == "probed"
first, last = int(sys.argv[4]), int(sys.argv[5])
run = os.path.join(os.environ["KDRL_ARTIFACTS"], "runs", "house") + os.sep
product = tuple(os.path.join(checkout, name) + os.sep for name in ("kdrl_core", "tasks", "flows"))
ends, codes, events = {}, set(), []
inside = False

def at_rename(arguments):
    global inside
    source, target = os.fspath(arguments[0]), os.fspath(arguments[1])
    if not target.endswith("_update.manifest.json"):
        return
    step = int(os.path.basename(os.path.dirname(target)).removeprefix("step="))
    ends[step] = time.perf_counter()
    inside = probed and step == first
    if inside:
        for frame in sys._current_frames().values():
            while frame:
                profile(frame, "call", None)
                frame = frame.f_back
    if step == last:
        finish()

def at_open(arguments):
    path, mode, flags = arguments
    if isinstance(path, (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(run):
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
            kind = "folder" if os.path.isdir(path) else "os.open" if mode is None else "open"
            events.append(("write" if writes else "read", kind, path.removeprefix(run)))

def audit(event, arguments):
    if event == "os.rename":
        at_rename(arguments)
    elif inside and event == "open":
        at_open(arguments)

def profile(frame, event, argument):
    if inside and event == "call" and str(frame.f_globals.get("__name__")).split(".")[0] in ("kdrl_core", "tasks", "flows"):
        codes.add(frame.f_code)

def wrapped(function, name):
    def call(*arguments, **options):
        if inside:
            what = arguments[1] if name.startswith("parquet") and len(arguments) > 1 else arguments[0]
            what = getattr(what, "name", None) or getattr(what, "_kdrl_path", None) or what
            events.append((name, "", str(what).removeprefix(run)))
        return function(*arguments, **options)
    return call

def finish():
    global inside
    inside = False
    names = {(code.co_filename.removeprefix(checkout + os.sep), code.co_qualname, code.co_firstlineno) for code in codes}
    Path(result).write_text(json.dumps({"ends": ends, "functions": sorted(names), "events": events}))

sys.addaudithook(audit)
if probed:
    import pyarrow.parquet as pq
    class Probed(pq.ParquetFile):
        def __init__(self, source, *arguments, **options):
            if inside:
                events.append(("parquet open", "", str(source).removeprefix(run)))
            self._kdrl_path = source
            super().__init__(source, *arguments, **options)
        read = wrapped(pq.ParquetFile.read, "parquet read")
    hashlib.file_digest = wrapped(hashlib.file_digest, "sha256")
    pq.ParquetFile = Probed
    import pyarrow.parquet.core
    pyarrow.parquet.core.ParquetFile = Probed
    threading.setprofile(profile)
    sys.setprofile(profile)
from flows.cli import main
sys.argv = ["kdrl", *sys.argv[6:]]
main()
'''


def step_of(checkout: Path, *, prompts: int, steps: int) -> dict[str, Any]:
    """What one steady step does; see the module's docstring."""
    first = steps - 3
    found = _probe(checkout, "probed", first=first, last=first + 1, prompts=prompts, steps=steps)
    events = found["events"]
    opens = [(mode, name) for mode, kind, name in events if kind in ("open", "os.open") and not name.endswith(".lock")]
    manifests = [name for mode, name in opens if mode == "read" and name.endswith("manifest.json")]
    parquet = {what: [name for each, _, name in events if each == f"parquet {what}"] for what in ("open", "read")}
    return {
        "files": len({file for file, *_ in found["functions"]}),
        "functions": len(found['functions']),
        "opens": len(opens),
        "sha256": sum(kind == "sha256" for kind, _, _ in events),
        "manifest_reads": len(manifests),
        "parquet_opens": len(parquet["open"]),
        "events": events,
        "ran": found["functions"],
    }


def _probe(checkout: Path, mode: str, *, first: int, last: int, prompts: int, steps: int) -> dict[str, Any]:
    sizes = [f"steps={steps}", f"prompts_per_step={prompts}", f"mini_batch_prompts={prompts}", "evaluate_every=null"]
    overrides = ["stage1=null", *(f"stage2.{size}" for size in sizes)]
    overrides += [f"evaluation.benchmarks.{i}.{field}=1" for i in range(4) for field in ("samples", "max_problems")]
    with tempfile.TemporaryDirectory(prefix="kdrl-house-") as folder:
        (probe := Path(folder, "probe.py")).write_text(_PROBE)
        result = Path(folder, "result.json")
        command = [sys.executable, str(probe), str(checkout), str(result), mode, str(first), str(last)]
        command += ["run", "--recipe", "miniature", "--name", "house", "--verbose"]
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

if __name__ == "__main__":
    r = step_of(Path(sys.argv[1]), prompts=4, steps=8)
    Path("/tmp/trip/house.json").write_text(json.dumps(r, indent=1))
    print({k: v for k, v in r.items() if k not in ("events", "ran")})
