"""Peak memory and time of logprobs, entropy and Top-K KL at Qwen's vocabulary: full logits against chunks.

Both start from the last hidden states [T, H] of response tokens and an output layer [V, H], and end with the gradients
of both. "full logits" is plain torch, as in `kdrl_core.logprobs.model` and `kdrl_core.objectives.topk_kl`; "chunks"
is `kdrl_core.logprobs.chunked`. Each measurement has a process of its own, the variants take turns, and
medians are printed. Memory is the peak beyond weight and hidden states: resident memory on a CPU (Linux), allocated
memory on a GPU. Results and gradients are compared on 256 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdrl_core.logprobs.chunked import CHUNK_BYTES, OutputLayer, TopKTeacher, token_statistics
from kdrl_core.objectives import topk_kl

TEMPERATURE, K, FLOOR = 0.6, 20, -20.0
TERMS = {"logprobs": "logprobs", "entropy": "logprobs, entropy", "topk": "logprobs, entropy, Top-K KL"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V, rows of the output layer")
    parser.add_argument("--tokens", type=int, default=2048, help="T, response tokens of the micro-batch")
    parser.add_argument("--hidden", type=int, default=1536, help="H, hidden size")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--terms", nargs="+", default=list(TERMS), choices=TERMS, help="what is computed")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of weight and hidden states")
    parser.add_argument("--chunk-mib", type=float, default=CHUNK_BYTES[DEVICE] / 2**20, help="size of a chunk's logits")
    parser.add_argument("--one", choices=["full", "chunks"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments)))
    else:
        _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    console = Console(width=120)
    table = Table(
        "dtype", "computed", "full logits", "chunks", "memory", "time", "CPU", "logprobs", "∂hidden", "∂weight"
    )
    for dtype in arguments.dtypes:
        for terms in arguments.terms:
            found: dict[str, list[dict[str, float]]] = defaultdict(list)
            for _ in range(arguments.rounds):
                for variant in ("full", "chunks"):
                    run = _in_process(arguments, variant, dtype, terms)
                    console.print(
                        f"{dtype}, {TERMS[terms]}, {variant}: {run['peak_gib']:.2f} GiB, "
                        f"{run['seconds']:.1f} s, {run['cpu_seconds']:.1f} s of CPU",
                        style="dim",
                    )
                    found[variant].append(run)
            memory, seconds, cpu_seconds = (
                {variant: median(run[what] for run in runs) for variant, runs in found.items()}
                for what in ("peak_gib", "seconds", "cpu_seconds")
            )
            gaps = _gaps(arguments, dtype, terms)
            table.add_row(
                dtype,
                TERMS[terms],
                *(f"{memory[variant]:.2f} GiB, {seconds[variant]:.1f} s" for variant in ("full", "chunks")),
                f"1/{memory['full'] / memory['chunks']:.1f}",
                f"{seconds['chunks'] / seconds['full']:.2f}×",
                f"{cpu_seconds['chunks'] / cpu_seconds['full']:.2f}×",
                *(f"{gaps[name]:.1e}" for name in ("logprobs", "hidden", "weight")),
            )
    console.print(table)
    console.print(
        f"V = {arguments.vocabulary}, T = {arguments.tokens}, H = {arguments.hidden}, temperature {TEMPERATURE}, "
        f"K = {K}, {DEVICE}, {torch.get_num_threads()} threads, chunks of {arguments.chunk_mib:g} MiB, "
        f"medians of {arguments.rounds}. CPU: processor time, all threads. Right of it: relative differences."
    )


def _in_process(arguments: argparse.Namespace, variant: str, dtype: str, terms: str) -> dict[str, float]:
    options = {
        "--vocabulary": arguments.vocabulary,
        "--tokens": arguments.tokens,
        "--hidden": arguments.hidden,
        "--chunk-mib": arguments.chunk_mib,
        "--dtypes": dtype,
        "--terms": terms,
        "--one": variant,
    }
    command = [sys.executable, __file__, *(str(part) for pair in options.items() for part in pair)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env={**os.environ, "TOKENIZERS_PARALLELISM": "0"}
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory beyond the inputs and time of one forward and backward pass."""
    small = _inputs(arguments, arguments.dtypes[0], tokens=8, vocabulary=512)
    _run(arguments.one, small, arguments.terms[0], arguments)  # threads and libraries are started
    inputs = _inputs(arguments, arguments.dtypes[0])
    before = _memory(reset=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    _run(arguments.one, inputs, arguments.terms[0], arguments)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"peak_gib": (_memory() - before) / 2**30, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _memory(*, reset: bool = False) -> int:
    """Peak bytes since the last reset; with `reset`, the bytes in use now."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS" if reset else "VmHWM"].split()[0]) * 1024


def _inputs(
    arguments: argparse.Namespace, dtype: str, *, tokens: int | None = None, vocabulary: int | None = None
) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens, vocabulary = tokens or arguments.tokens, vocabulary or arguments.vocabulary
    kind: dict[str, Any] = {"dtype": DTYPES[dtype], "device": DEVICE}
    weight = torch.empty(vocabulary, arguments.hidden, **kind).normal_(std=3.0 / arguments.hidden**0.5)
    return {
        "hidden": torch.randn(tokens, arguments.hidden, **kind).requires_grad_(),
        "weight": weight.requires_grad_(),
        "target_ids": torch.randint(vocabulary, (tokens,), device=DEVICE),
        "topk_ids": torch.rand(tokens, 512, device=DEVICE).topk(K).indices,
        "topk_logits": torch.randn(tokens, K, device=DEVICE),
        "gradients": torch.randn(3, tokens, device=DEVICE) / tokens,
    }


def _run(variant: str, inputs: dict[str, Any], terms: str, arguments: argparse.Namespace) -> torch.Tensor:
    """Forward and backward; the gradients are in `inputs`. Returns the logprobs."""
    results = (_full if variant == "full" else _chunks)(inputs, terms, arguments)
    loss = sum((values * gradient).sum() for values, gradient in zip(results, inputs["gradients"], strict=False))
    logprobs = results[0].detach()
    del results
    loss.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return logprobs


def _full(inputs: dict[str, Any], terms: str, _: argparse.Namespace) -> list[torch.Tensor]:
    logits = (inputs["hidden"] @ inputs["weight"].t()).float() / TEMPERATURE
    table = logits.log_softmax(-1)
    results = [table.gather(-1, inputs["target_ids"][:, None]).squeeze(-1)]
    if terms != "logprobs":
        results.append(-(table.exp() * table).sum(-1))
    if terms == "topk":
        del table
        results.append(topk_kl(logits[None], inputs["topk_ids"][None], inputs["topk_logits"][None], floor=FLOOR)[0])
    return results


def _chunks(inputs: dict[str, Any], terms: str, arguments: argparse.Namespace) -> list[torch.Tensor]:
    found = token_statistics(
        inputs["hidden"],
        OutputLayer(inputs["weight"], None, TEMPERATURE),
        inputs["target_ids"],
        with_entropy=terms != "logprobs",
        topk=TopKTeacher(inputs["topk_ids"], inputs["topk_logits"], FLOOR) if terms == "topk" else None,
        chunk_bytes=int(arguments.chunk_mib * 2**20),
    )
    return [values for values in found if values is not None]


def _gaps(arguments: argparse.Namespace, dtype: str, terms: str) -> dict[str, float]:
    """Relative difference of logprobs and gradients between the variants, on fewer tokens."""
    inputs = _inputs(arguments, dtype, tokens=min(256, arguments.tokens))
    found = []
    for variant in ("full", "chunks"):
        inputs["hidden"].grad = inputs["weight"].grad = None
        logprobs = _run(variant, inputs, terms, arguments)
        found.append({"logprobs": logprobs, "hidden": inputs["hidden"].grad, "weight": inputs["weight"].grad})
    full, chunks = found
    return {name: float((chunks[name] - full[name]).float().norm() / full[name].float().norm()) for name in full}


if __name__ == "__main__":
    main()
