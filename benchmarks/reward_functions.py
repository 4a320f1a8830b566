"""What rewards as functions cost: `make bench-rewards`.

    python benchmarks/reward_functions.py                            # this checkout
    python benchmarks/reward_functions.py --before CHECKOUT          # and `math` beside that of another checkout

1. Microseconds a response of a function that does nothing, by the length of the responses: the whole way, with the
   workers started. The limit is 50.
2. `math` as a function beside the verifier alone, on the 961 cases, in turns; and the verifier of another checkout.
   Caches are off, so that every comparison is made. 1.00 is equally fast.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

from kdrl_core.config.answers import RewardConfig, VerificationConfig
from kdrl_core.rewards.judge import Judge, facts_of
from kdrl_core.verify import Verifier

ROOT = Path(__file__).resolve().parents[1]
LIMITS = VerificationConfig(workers=2)
NOTHING = "def nothing(response, answer, problem):\n    return 0.0\n"
_VERIFIER = """
import json, sys, time
from kdrl_core.verify import Verifier
pairs = json.load(open(sys.argv[1]))
with Verifier(workers=2, cache_size=0) as verifier:
    verifier.verify_batch(pairs[:8])
    for _ in sys.stdin:
        started = time.perf_counter()
        verifier.verify_batch(pairs, require_format=False)
        print(time.perf_counter() - started, flush=True)
"""


def facts(number: int) -> dict:
    return facts_of(
        problem_id=f"q-{number}", question="What is 2 + 2? " * 10, source="bench", sample=0, length=512,
        finish_reason="stop", think_opened=False,
    )  # fmt: skip


def show_nothing(rounds: int, num_responses: int) -> None:
    print(f"a function that does nothing, {num_responses:,} responses, 2 workers, median of {rounds}")
    with tempfile.TemporaryDirectory() as folder, closing(Verifier(workers=1)) as verifier:
        (file := Path(folder) / "mine.py").write_text(NOTHING)
        reward = RewardConfig.model_validate({"functions": [{"function": f"{file}:nothing"}]})
        with closing(Judge(reward, LIMITS, verifier)) as judge:
            for chars in (0, 2_000, 32_000):
                items = [("x" * chars, "4", facts(number)) for number in range(num_responses)]
                judge.judge_batch(items)
                took, cpu = [], []
                for _ in range(rounds):
                    started, busy = time.perf_counter(), time.process_time()
                    judge.judge_batch(items)
                    took.append((time.perf_counter() - started) / num_responses * 1e6)
                    cpu.append((time.process_time() - busy) / num_responses * 1e6)
                ratio = median(took) / 50
                print(
                    f"  {chars:6,} characters: {median(took):5.1f} µs a response (this process {median(cpu):4.1f}), "
                    f"{ratio:.2f} of the limit"
                )


class Other:
    """The verifier of a checkout, in a process of its own."""

    def __init__(self, checkout: Path, pairs: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _VERIFIER, str(pairs)],
            env={"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def judge(self) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def show_math(rounds: int, before: Path | None) -> None:
    import json

    from verifier import pairs_of, read_cases

    pairs = pairs_of(read_cases("cases.jsonl"))
    reward = RewardConfig.model_validate({"functions": [{"function": "math"}]})
    took: dict[str, list[float]] = {"math as a function": []}
    with tempfile.TemporaryDirectory() as folder, closing(Verifier(workers=2, cache_size=0)) as verifier:
        (file := Path(folder) / "pairs.json").write_text(json.dumps(pairs))
        others = {"the verifier alone": Other(ROOT, file)}
        if before is not None:
            others["the verifier before"] = Other(before, file)
        items = [(*pair, facts(number)) for number, pair in enumerate(pairs)]
        with closing(Judge(reward, LIMITS, verifier)) as judge:
            judge.judge_batch(items[:8])
            for _ in range(rounds):
                started = time.perf_counter()
                judge.judge_batch(items, require_format=False)
                took["math as a function"].append(time.perf_counter() - started)
                for name, other in others.items():
                    took.setdefault(name, []).append(other.judge())
        for other in others.values():
            other.close()
    alone = median(took["the verifier alone"])
    print(f"{len(pairs)} cases, median of {rounds}, relative to the verifier alone")
    for name, seconds in took.items():
        print(f"  {name:20} {median(seconds):6.2f} s   {median(seconds) / alone:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What rewards as functions cost.")
    parser.add_argument("--responses", type=int, default=1_024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="another checkout, whose verifier is timed as well")
    given = parser.parse_args()
    show_nothing(given.rounds, given.responses)
    show_math(given.rounds, given.before)


if __name__ == "__main__":
    main()
