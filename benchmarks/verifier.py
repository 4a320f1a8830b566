"""How right, fast and safe the verifier is, compared with math-verify alone: `make bench-verify`.

1. Agreement with the labelled cases of tests/data/verifier, by source or kind, and every case where math-verify alone
   is right and kdrl is not.
2. Throughput on the 961 cases and on the hard ones (reports.jsonl, aside_public.jsonl): one process of math-verify
   against one and two workers of the verifier, taking turns. Each round starts anew, so the parsers are cold. The
   verifier's cache is off, so that nothing is computed less often.
3. Hostile answers mixed with as many ordinary ones: wall time and its bound, the workers' peak memory, processes left.
"""

import argparse
import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from kdrl_core.types import Verdict
from kdrl_core.verify import Verifier

CASES = Path(__file__).resolve().parents[1] / "tests/data/verifier"
FILES = ("cases.jsonl", "aside_public.jsonl", "aside_own.jsonl", "reports.jsonl", "kinds.jsonl", "unseen.jsonl")
HARD = ("reports.jsonl", "aside_public.jsonl")
Pair = tuple[str, str]

_ALONE = r"""
import json, logging, sys, time
from math_verify import parse, verify
logging.disable(logging.CRITICAL)
def judge(response, gold):
    try:
        is_marked = any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\["))
        return bool(verify(parse(gold if is_marked else "\\boxed{%s}" % gold), parse(response)))
    except Exception:
        return False
judge("\\boxed{\\frac{1}{2}}", "0.5")
for line in sys.stdin:
    pairs = json.loads(line)
    started = time.perf_counter()
    found = [judge(*pair) for pair in pairs]
    print(json.dumps([time.perf_counter() - started, found]), flush=True)
"""


def read_cases(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


def boxed(answer: str) -> str:
    if r"\boxed" in answer:
        return answer
    return rf"\boxed{{{answer}{' ' if answer.endswith(chr(92)) else ''}}}"


def pairs_of(cases: Sequence[dict[str, object]]) -> list[Pair]:
    return [
        (str(case["response"]), str(case["ground_truth"]))
        if "response" in case
        else (boxed(str(case["prediction"])), str(case["gold"]))
        for case in cases
    ]


class Alone:
    """math-verify as it is, in one process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def judge(self, pairs: Sequence[Pair]) -> tuple[float, list[bool]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(pairs) + "\n")
        self._process.stdin.flush()
        seconds, found = json.loads(self._process.stdout.readline())
        return seconds, found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def show_agreement(alone: Alone) -> None:
    worse: list[str] = []
    with Verifier(workers=2) as verifier:
        for name in FILES:
            cases = read_cases(name)
            _, before = alone.judge(pairs_of(cases))
            verdicts = verifier.verify_batch(pairs_of(cases), require_format=False)
            after = [verdict.reward == 1.0 for verdict in verdicts]
            groups = [str(case.get("kind") or case["source"]).split(":")[0].split("#")[0] for case in cases]
            print(f"\n{name:52} {'cases':>5}   math-verify alone      kdrl")
            for group in [*sorted(set(groups)), "all"]:
                rows = [i for i, own in enumerate(groups) if group in (own, "all")]
                shown = []
                for found in (before, after):
                    positives = sum(found[i] and not cases[i]["expected"] for i in rows)
                    negatives = sum(bool(cases[i]["expected"]) and not found[i] for i in rows)
                    share = 1 - (positives + negatives) / len(rows)
                    shown.append(f"{share:7.2%} +{positives:<2} -{negatives:<3}")
                print(f"{group:52} {len(rows):5}   {shown[0]}     {shown[1]}")
            for case, pair, verdict, was in zip(cases, pairs_of(cases), verdicts, before, strict=True):
                if was == case["expected"] != (verdict.reward == 1.0):
                    worse.append(f"{name}: {pair[0][-90:]!r} for {pair[1][:60]!r}: {verdict.reason}")
    print("(+ false positives, - false negatives)")
    print("\nmath-verify alone is right and kdrl is not:", *worse or ["nowhere"], sep="\n  ")


def show_throughput(rounds: int) -> None:
    for what, files in (("the 961 cases", ("cases.jsonl",)), ("hard cases", HARD)):
        pairs = [pair for name in files for pair in pairs_of(read_cases(name))]
        ratios: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            alone = Alone()
            single, _ = alone.judge(pairs)
            alone.close()
            shown = [f"math-verify {len(pairs) / single:5.0f}/s"]
            for workers, found in ratios.items():
                with Verifier(workers=workers, cache_size=1) as verifier:
                    verifier.verify_batch(pairs[: 2 * workers], require_format=False)  # the workers have started
                    started = time.perf_counter()
                    verifier.verify_batch(pairs, require_format=False)
                    seconds = time.perf_counter() - started
                found.append(single / seconds)
                shown.append(f"{workers} worker{'s' if workers > 1 else ''} {len(pairs) / seconds:5.0f}/s")
            print(f"{what}: {', '.join(shown)}")
        medians = ", ".join(f"{n} workers {sorted(found)[len(found) // 2]:.2f}x" for n, found in ratios.items())
        print(f"{what}: median of the ratios to math-verify: {medians}")


def hostile_answers(count: int, seed: int = 0) -> list[str]:
    """`count` distinct answers on which a reader hangs, runs out of memory or breaks."""
    rng = random.Random(seed)
    makers = [
        lambda n: f"9^{{9^{{9^{{{n}}}}}}}",
        lambda n: f"{n}!!!!!",
        lambda n: f"({10**6 + n})!",
        lambda n: "1" * (10**6 + n),
        lambda n: "{" * 10_000 + str(n) + "}" * 10_000,
        lambda n: f"5\x00{n}\ud800\x07",
        lambda n: r"\frac{1}{" * 60 + str(n) + "}" * 60,
        lambda n: r"\sqrt{" * 62 + str(n) + "}" * 62,
        lambda n: rf"\sum_{{k=1}}^{{10^{{{n % 9 + 9}}}}} k^{{{n}}}",
        lambda n: rf"2^{{10^{{{n % 5 + 9}}}}}-{n}",
        lambda n: rf"\begin{{pmatrix}}{' & '.join([f'x^{{{n}}}'] * 400)}\end{{pmatrix}}",
        lambda n: f"(x+{n})^{{{10**5}}}",
        lambda n: rf"\int_0^{{{n}}} e^{{x^x}}\sin(x^x) dx",
        lambda n: f"{n}," * 1900 + "1",
        lambda n: rf"\binom{{10^{{9}}}}{{{10**8 + n}}}",
        lambda n: "+".join([f"\\sqrt{{{n + k}}}" for k in range(250)]),
        lambda n: f"{n}" + r"\text{" * 600,
        lambda n: "$" * 2000 + str(n),
        lambda n: rf"x=x=x^{{x^{{x^{{{n}}}}}}}",
        lambda n: f"\\cos(\\cos(\\cos({n}^{{{n}^{{{n}}}}})))",
    ]
    return [
        makers[number % len(makers)](rng.randrange(2, 90) + 100 * (number // len(makers))) for number in range(count)
    ]


def is_worker(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())


def show_hostile(count: int, *, workers: int, timeout_s: float, memory_limit_mb: int) -> bool:
    """Returns whether every promise was kept."""
    rng = random.Random(1)
    hostile = [(boxed(answer), "42") for answer in hostile_answers(count)]
    ordinary: list[tuple[Pair, bool]] = []
    for number in range(count):
        top, bottom, is_right = rng.randrange(1, 10**6), rng.randrange(2, 10**6), number % 2 == 0
        truth = f"{top}/{bottom}" if is_right else f"{top + bottom}/{bottom}"
        ordinary.append(((rf"\boxed{{\frac{{{top}}}{{{bottom}}}}}", truth), is_right))
    order = list(range(2 * count))
    rng.shuffle(order)
    items = [hostile[i] if i < count else ordinary[i - count][0] for i in order]
    me = psutil.Process()
    peaks: Counter[int] = Counter()

    def watch(done: int, total: int) -> None:
        for child in me.children(recursive=True):
            try:
                peaks[child.pid] = max(peaks[child.pid], child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        if done % 100 == 0 or done == total:
            print(f"\r{done}/{total} after {time.perf_counter() - started:.0f} s", end="", file=sys.stderr)

    before = {child.pid for child in me.children(recursive=True)}
    started = time.perf_counter()
    with Verifier(workers=workers, timeout_s=timeout_s, memory_limit_mb=memory_limit_mb) as verifier:
        verdicts = verifier.verify_batch(items, require_format=False, on_progress=watch)
    seconds = time.perf_counter() - started
    print(file=sys.stderr)
    time.sleep(1.0)
    left = [child for child in me.children(recursive=True) if child.pid not in before and is_worker(child)]
    bound = count * timeout_s / workers + 30
    placed: list[tuple[int, Verdict]] = list(zip(order, verdicts, strict=True))
    right = sum((v.reward == 1.0) == ordinary[i - count][1] for i, v in placed if i >= count)
    kinds = Counter(v.kind.value for i, v in placed if i < count)
    rewarded = sum(v.reward for i, v in placed if i < count)
    peak = max(peaks.values(), default=0) / 2**20
    print(f"{count} hostile, {count} ordinary answers; {workers} workers ({memory_limit_mb} MiB, {timeout_s:g} s each)")
    print(f"  wall time            {seconds:8.0f} s   (bound {bound:.0f} s)")
    print(f"  verdicts             {len(verdicts):8}")
    print(f"  ordinary ones right  {right:8}   of {count}")
    print(f"  hostile ones         {dict(sorted(kinds.items()))}, rewarded {rewarded:g}")
    print(f"  peak of a worker     {peak:8.0f} MiB (sampled)")
    print(f"  workers left behind  {len(left):8}")
    return (
        seconds < bound
        and len(verdicts) == 2 * count
        and right == count
        and not rewarded
        and peak < memory_limit_mb
        and not left
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the verifier.")
    parser.add_argument("--only", choices=["agreement", "throughput", "hostile"])
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the throughput comparison")
    parser.add_argument("--hostile", type=int, default=1_000, help="hostile answers, with as many ordinary ones")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for an answer in the hostile run")
    parser.add_argument("--memory", type=int, default=1_024, help="MiB for a worker in the hostile run")
    options = parser.parse_args()
    if options.only in (None, "agreement"):
        alone = Alone()
        show_agreement(alone)
        alone.close()
    if options.only in (None, "throughput"):
        show_throughput(options.rounds)
    if options.only in (None, "hostile"):
        workers = min(2, multiprocessing.cpu_count())
        if not show_hostile(
            options.hostile, workers=workers, timeout_s=options.timeout, memory_limit_mb=options.memory
        ):
            sys.exit("a promise was not kept")


if __name__ == "__main__":
    main()
