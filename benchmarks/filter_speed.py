"""How fast `kdrl filter` is, and how much memory it takes: `make bench-filter`.

A million problems are made from the shipped real ones, each with numbers and words of its own, in the columns of
Skywork-OR1-RL-Data. The rules are the paper's (recipe paper-1.5b), the tokenizer is R1-Distill's (Qwen's vocabulary).
Each filter runs in a process of its own, on one core; the kernel reports its peak memory. Most prompts
are too short in bytes to be too long in tokens; tokenising the other 3 % is more work than all the rest.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import DataConfig
from kdrl_core.data import SKYWORK_SCHEMA, read_problems
from kdrl_core.data.schema import SKYWORK_LABELS

_FILTER = """
import json, os, re, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pathlib import Path
from kdrl_core.config import ModelConfig, load_recipe
from kdrl_core.data import filter_files, load_tokenizer
file, tokenizer, output, *overrides = sys.argv[1:]
recipe = load_recipe("paper-1.5b", [f"stage2.data.files=[{file}]", *overrides])
tokenizer = load_tokenizer(ModelConfig(path=tokenizer))
started = time.perf_counter()
report = filter_files(recipe, Path(output), tokenizer=tokenizer)
seconds = time.perf_counter() - started
peak = int(re.search(r"VmHWM:[ \\t]*([0-9]+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"seconds": seconds, "peak_mb": peak, "rows_in": report.rows_in, "rows_out": report.rows_out}))
"""


def write_problems(path: Path, count: int) -> None:
    """`count` distinct problems, a tenth of them never solved by the student."""
    source = read_problems(DataConfig(files=["builtin:problems/skywork_synthetic_labels.parquet"]))
    questions, answers = source["question"].to_pylist(), source["answer"].to_pylist()
    rng = random.Random(0)
    with pq.ParquetWriter(path, SKYWORK_SCHEMA, compression="zstd") as writer:
        for start in range(0, count, 20_000):
            rows = []
            for number in range(start, min(start + 20_000, count)):
                which = rng.randrange(len(questions))
                question = _vary(questions[which], number % 997)
                rows.append(
                    {
                        "data_source": "benchmark",
                        "prompt": [{"content": f"{question} (variant {number})", "role": "user"}],
                        "ability": "math",
                        "reward_model": {"ground_truth": json.dumps([answers[which]]), "style": "rule"},
                        "extra_info": {
                            "index": number,
                            "model_difficulty": {name: rng.randrange(17) for name in SKYWORK_LABELS},
                        },
                    }
                )
            writer.write_table(pa.Table.from_pylist(rows, schema=SKYWORK_SCHEMA))


def _vary(question: str, shift: int) -> str:
    return re.sub(r"\d+", lambda match: str(int(match[0][:6]) + shift), question)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure kdrl filter on generated problems.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    off = ["stage2.data.decontamination=null", "stage2.data.unparsable_answers=keep"]
    variants = {
        "labels and duplicates": [*off, "stage2.max_prompt_tokens=16384"],  # no prompt can be longer: none is tokenised
        "… and length": off,
        "… and unparsable answers": off[:1],
        "… and decontamination": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        file, tokenizer = Path(folder) / "problems.parquet", Path(folder) / "tokenizer"
        write_problems(file, rows)
        subprocess.run([sys.executable, "-m", "kdrl_core.models.qwen_tokenizer", "r1-distill", tokenizer], check=True)
        print(f"{rows:,} rows, {file.stat().st_size / 2**20:.0f} MiB of Parquet")
        for number, (name, overrides) in enumerate(variants.items()):
            command = [sys.executable, "-c", _FILTER, file, tokenizer, Path(folder) / f"{number}.parquet", *overrides]
            started = time.perf_counter()
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{name:28} {rows / found['seconds']:>9,.0f} rows/s  {found['seconds']:6.1f} s "
                f"({time.perf_counter() - started:.1f} s with start)  peak {found['peak_mb']:,.0f} MiB  "
                f"kept {found['rows_out']:,}"
            )


if __name__ == "__main__":
    main()
