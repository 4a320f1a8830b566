"""The promises of kdrl_core/verify/pool.py: deadline, memory, dead workers, order, cache, threads, nothing left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kdrl_core.errors import VerificationError
from kdrl_core.types import Verdict, VerdictKind
from kdrl_core.verify import Verifier, accuracy, pool, verify, verify_batch, workers
from kdrl_core.verify.screening import Outcome

CORRECT, WRONG = VerdictKind.CORRECT, VerdictKind.WRONG
TIMEOUT, ERROR = VerdictKind.TIMEOUT, VerdictKind.ERROR
REPO = Path(__file__).resolve().parents[3]
HALF = r"\frac{1}{2}"


def boxed(answer: str) -> str:
    return rf"<think>a</think>\boxed{{{answer}}}"


def kinds(verdicts: list[Verdict]) -> list[VerdictKind]:
    return [verdict.kind for verdict in verdicts]


def misbehave(answer: str, truth: str, is_text: bool, time_limit_s: float, memory_limit_mb: int) -> Outcome:
    """Stands in for `judge` in a worker: some answers name what is to go wrong, the others are judged."""
    if answer == "sleep":
        time.sleep(60)
    if answer == "exit":
        os._exit(3)
    if answer == "exit silently":
        os._exit(0)
    if answer == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer.startswith(("once", "twice")):  # as if something outside killed the worker, so many times
        kind, _, counter = answer.partition(" ")
        with Path(counter).open("a+") as file:
            file.write("x")
            if file.tell() <= (1 if kind == "once" else 2):
                os.kill(os.getpid(), signal.SIGKILL)
        answer = HALF
    if answer.startswith("hog"):
        accuracy.compare_answer = eat_and_admit if answer == "hog" else eat_and_deny
    return accuracy.judge(answer, truth, is_text, time_limit_s, memory_limit_mb)


def eat_and_admit(answer: str, ground_truth: str) -> Outcome:
    hoard = []
    while True:
        hoard.append(bytearray(2**24))


def eat_and_deny(answer: str, ground_truth: str) -> Outcome:
    """As sympy does now and then: swallow MemoryError and say "not equal"."""
    try:
        return eat_and_admit(answer, ground_truth)
    except MemoryError:
        return Outcome(WRONG, "not equal")


_FOREIGN: set[psutil.Process] = set()
"""Workers that tests of other modules have left in this process."""


@pytest.fixture(scope="module", autouse=True)
def foreign_workers() -> None:
    _FOREIGN.update(workers_of(psutil.Process()))


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    children = [child for child in process.children(recursive=True) if child not in _FOREIGN]
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def wait_until(condition: Callable[[], bool], limit_s: float = 15.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def shared() -> Iterator[Verifier]:
    """Two workers that no test kills; their memory of verdicts is everybody's."""
    with Verifier(workers=2) as verifier:
        verifier.verify(boxed(r"\frac{1}{97}"), "1/97")
        _FOREIGN.update(workers_of(psutil.Process()))
        yield verifier


def test_order_is_kept_and_progress_reported(shared: Verifier) -> None:
    items = [(boxed(rf"\frac{{{number}}}{{2}}"), f"{number / 2}") for number in range(1, 40)]
    items.insert(20, (boxed("7"), "8"))
    steps: list[tuple[int, int]] = []
    verdicts = shared.verify_batch(items, on_progress=lambda done, total: steps.append((done, total)))
    assert kinds(verdicts) == [CORRECT] * 20 + [WRONG] + [CORRECT] * 19
    assert [v.extracted for v in verdicts[:3]] == [r"\frac{1}{2}", r"\frac{2}{2}", r"\frac{3}{2}"]
    assert steps == [(done, 40) for done in range(1, 41)]


def test_a_tower_of_powers_times_out_and_the_rest_goes_on() -> None:
    # 9^{9^{9^{9}}} runs in C and holds the interpreter: no signal handler or thread of the worker could stop it.
    items = [
        (boxed("9^{9^{9^{9}}}"), "5"),
        (boxed(HALF), "0.5"),
        (boxed("10^{10^{10^{10}}}"), "5"),
        (boxed(r"\frac{2}{4}"), "0.5"),
    ]
    started = time.monotonic()
    with Verifier(workers=1, timeout_s=1.0) as verifier:
        verdicts = verifier.verify_batch(items)
        assert kinds(verifier.verify_batch([(boxed(r"\frac{3}{6}"), "0.5")])) == [CORRECT]
    assert kinds(verdicts) == [TIMEOUT, CORRECT, TIMEOUT, CORRECT]
    assert [v.reward for v in verdicts] == [0.0, 1.0, 0.0, 1.0]
    assert "1 s" in verdicts[0].reason
    assert time.monotonic() - started < 20


def test_a_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "judge", misbehave)
    monkeypatch.setattr(pool, "_WAITS", 1.0)
    monkeypatch.setattr(pool, "_WAIT_GRACE_S", 0.5)
    models = b"m" * 2**29  # a parent larger than the limit, as one with models in it: its peak is not the worker's
    with Verifier(workers=1, timeout_s=2.5, memory_limit_mb=512) as verifier:
        assert verifier.verify(boxed(HALF), "0.5").kind is CORRECT
        for number, (answer, kind, reason) in enumerate(
            [
                ("exit", ERROR, "exit code 3"),
                ("kill", ERROR, "exit code -9"),
                ("exit silently", TIMEOUT, "no result"),  # indistinguishable from one that never answers
                ("sleep", TIMEOUT, "no result"),
                ("hog", ERROR, "memory limit"),
                ("hog and deny", ERROR, "memory limit"),
            ],
            start=2,
        ):
            after = [(boxed(rf"\frac{{{n}}}{{{2 * n}}}"), "0.5") for n in (10 * number, 10 * number + 1)]
            verdicts = verifier.verify_batch([(boxed(answer), "5"), *after])
            assert kinds(verdicts) == [kind, CORRECT, CORRECT], answer
            assert reason in verdicts[0].reason
            assert (verdicts[0].reward, verdicts[0].extracted) == (0.0, answer)
    assert len(models) == 2**29


def test_workers_killed_while_idle_are_replaced() -> None:
    with Verifier(workers=2) as verifier:
        assert kinds(verifier.verify_batch([(boxed(HALF), "0.5")])) == [CORRECT]
        first = workers_of(psutil.Process())
        assert len(first) == 2
        for worker in first:
            worker.kill()
        items = [(boxed(rf"\frac{{{number}}}{{2}}"), f"{number / 2}") for number in range(3, 20)]
        assert kinds(verifier.verify_batch(items)) == [CORRECT] * len(items)


@pytest.mark.parametrize(("answer", "kind"), [("once", CORRECT), ("twice", ERROR)])
def test_what_dies_with_its_worker_is_judged_once_more_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, kind: VerdictKind
) -> None:
    monkeypatch.setattr(workers, "judge", misbehave)
    counter = tmp_path / "tries"
    with Verifier(workers=2) as verifier:
        verdicts = verifier.verify_batch([(boxed(f"{answer} {counter}"), "0.5"), (boxed("2/4"), "0.5")])
    assert kinds(verdicts) == [kind, CORRECT]
    assert len(counter.read_text()) == 2


def roots(count: int) -> list[tuple[str, str]]:
    return [(boxed(rf"\sqrt{{{2 * n * n}}}+{n}"), rf"{n}\sqrt{{2}}+{n}") for n in range(1, count + 1)]


@pytest.mark.slow
def test_three_workers_killed_from_outside_cost_no_verdict() -> None:
    """As the kernel does that runs out of memory."""
    killed = 0

    def kill_one(done: int, total: int) -> None:
        nonlocal killed
        if done >= 20 * (killed + 1) and killed < 3:
            killed += 1
            workers_of(psutil.Process())[0].kill()

    with Verifier(workers=2, timeout_s=5.0) as verifier:
        verdicts = verifier.verify_batch(roots(200), on_progress=kill_one)
    assert kinds(verdicts) == [CORRECT] * 200
    assert killed == 3


def test_a_clock_that_is_set_forward_costs_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.time

    def step(done: int, total: int) -> None:
        if done == 20:
            monkeypatch.setattr(time, "time", lambda: clock() + 3_600.0)

    with Verifier(workers=2, timeout_s=5.0) as verifier:
        verdicts = verifier.verify_batch(roots(60), on_progress=step)
    assert kinds(verdicts) == [CORRECT] * 60


def test_a_stopped_process_group_costs_no_verdict() -> None:
    """Ctrl-Z, a closed laptop or a scheduler: for longer than the limit, and than the wait behind it."""
    code = (
        "import sys\n"
        "from kdrl_core.verify import Verifier, pool\n"
        "pool._WAITS, pool._WAIT_GRACE_S = 1.0, 0.5\n"
        r"pair = lambda n: (rf'<think></think>\boxed{{\sqrt{{{2 * n * n}}}+{n}}}', rf'{n}\sqrt{{2}}+{n}')" + "\n"
        "items = [pair(n) for n in range(1, 500)]\n"
        "with Verifier(workers=2, timeout_s=1.5) as verifier:\n"
        "    tell = lambda done, total: print(done, flush=True)\n"
        "    kinds = [v.kind.value for v in verifier.verify_batch(items, on_progress=tell)]\n"
        "print(sorted(set(kinds)), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        while parent.stdout.readline().strip() != "30":
            assert parent.poll() is None
        os.killpg(parent.pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.killpg(parent.pid, signal.SIGCONT)
        lines = parent.stdout.read().splitlines()
    assert len(lines) > 300  # it was stopped in the midst
    assert lines[-1] == "['correct']"


def test_the_limit_is_of_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "judge", doze)
    with Verifier(workers=1, timeout_s=0.5) as verifier:
        assert kinds(verifier.verify_batch([(boxed(HALF), "0.5")])) == [CORRECT]


def doze(answer: str, truth: str, is_text: bool, cpu_limit_s: float, memory_limit_mb: int) -> Outcome:
    """As on a machine that is busy with something else."""
    accuracy.normalise = doze_and_normalise  # type: ignore[attr-defined]
    return accuracy.judge(answer, truth, is_text, cpu_limit_s, memory_limit_mb)


def doze_and_normalise(content: str) -> str:
    time.sleep(1.0)
    return content


def test_awake_time_does_not_count_what_a_stopped_process_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    awake = workers.AwakeTime(longest_s=0.5)
    seen = []
    for passes in (0.2, 0.4, 3_600.0, 0.1):
        now += passes
        seen.append(round(awake.look(), 6))
    assert seen == [0.2, 0.6, 1.1, 1.2]


def test_workers_that_cannot_start_give_errors_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "start_worker", refuse_to_start)
    with Verifier(workers=1, timeout_s=1.0) as verifier:
        (verdict,) = verifier.verify_batch([(boxed(HALF), "0.5")])
    assert verdict.kind is ERROR
    assert "could not be kept alive" in verdict.reason


def refuse_to_start(memory_limit_mb: int) -> None:
    os._exit(1)


def test_equal_pairs_are_computed_once(shared: Verifier) -> None:
    answer, before = r"\frac{13}{26}", shared.num_computed
    first = shared.verify_batch([(boxed(answer), "0.5")] * 50 + [(boxed(answer), "0.25")] * 50)
    assert shared.num_computed == before + 2
    again = shared.verify_batch([(rf"<think>b</think>So \boxed{{{answer}}}", "0.5")] * 3)
    assert shared.num_computed == before + 2
    assert kinds(first + again) == [CORRECT] * 50 + [WRONG] * 50 + [CORRECT] * 3


def test_the_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    with Verifier(workers=1, cache_size=2) as verifier:
        for answer in ("1/2", "2/4", "1/2", "3/6", "1/2"):
            verifier.verify(boxed(answer), "0.5")
        assert verifier.num_computed == 3
        verifier.verify(boxed("2/4"), "0.5")
        assert verifier.num_computed == 4


def test_timeouts_are_not_remembered() -> None:
    with Verifier(workers=1, timeout_s=0.5) as verifier:
        assert kinds(verifier.verify_batch([(boxed("9^{9^{9^{9}}}"), "5")] * 3)) == [TIMEOUT] * 3
        assert verifier.num_computed == 1
        assert kinds(verifier.verify_batch([(boxed("9^{9^{9^{9}}}"), "5")])) == [TIMEOUT]
        assert verifier.num_computed == 2


def test_plain_answers_need_no_worker() -> None:
    verifier = Verifier(workers=1)
    items = [(boxed("42"), "42"), (boxed("$ -7 $"), "-7"), (boxed("B"), "B"), (boxed("41"), "42"), ("none", "42")]
    verdicts = verifier.verify_batch(items)
    assert [v.reward for v in verdicts] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert verifier.num_computed == 0
    assert workers_of(psutil.Process()) == []
    verifier.close()


def test_works_from_several_threads_at_once(shared: Verifier) -> None:
    results: dict[int, list[VerdictKind]] = {}

    def work(number: int) -> None:
        items = [(boxed(rf"\frac{{{number}}}{{{k}}}"), f"{number}/{k}") for k in range(2, 8)]
        results[number] = kinds(shared.verify_batch(items))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(11, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: [CORRECT] * 6 for number in range(11, 15)}


def test_workers_outlive_the_thread_that_started_them() -> None:
    verifier = Verifier(workers=1)
    thread = threading.Thread(target=verifier.verify, args=(boxed(HALF), "0.5"))
    thread.start()
    thread.join()
    before = workers_of(psutil.Process())
    assert verifier.verify(boxed("2/4"), "0.5").kind is CORRECT
    assert workers_of(psutil.Process()) == before
    verifier.close()


def verify_in_child(queue: "multiprocessing.Queue[list[VerdictKind]]") -> None:
    queue.put(kinds(verify_batch([(boxed(HALF), "0.5"), (boxed("x"), "y")], workers=2, timeout_s=20)))


def test_works_in_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[list[VerdictKind]] = context.Queue()
    child = context.Process(target=verify_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [CORRECT, WRONG]
    child.join(20)
    assert child.exitcode == 0


def test_what_was_begun_ahead_is_not_begun_again(shared: Verifier) -> None:
    items = [(boxed(rf"\frac{{{number}}}{{2}}"), f"{number / 2}") for number in range(1, 30)]
    with Verifier(workers=2) as verifier:
        for start in range(0, 20, 5):
            verifier.verify_ahead(items[start : start + 5])
        verdicts = verifier.verify_batch(items)
        assert verifier.num_computed == len(items)
        assert wait_until(lambda: verifier.hidden_seconds() == 0.0)
    assert shared.verify_batch(items) == verdicts  # not begun ahead there
    assert kinds(verdicts) == [CORRECT] * len(items)


def test_verdicts_wait_while_something_else_is_done(shared: Verifier) -> None:
    items = [(boxed(rf"\frac{{{number}}}{{34}}"), f"{number / 34}") for number in range(1, 30)]
    shared.hidden_seconds()
    shared.verify_ahead(items)
    time.sleep(1.5)
    assert shared.hidden_seconds() > 0.0
    assert shared.hidden_seconds() == 0.0  # asked since
    started = time.monotonic()
    assert kinds(shared.verify_batch(items)) == [CORRECT] * len(items)
    assert time.monotonic() - started < 0.5


def test_a_hostile_item_begun_ahead_costs_its_limit_once() -> None:
    items = [(boxed("9^{9^{9^{9}}}"), "5"), (boxed(HALF), "0.5")]
    with Verifier(workers=1, timeout_s=1.0) as verifier:
        verifier.verify_ahead(items)
        assert kinds(verifier.verify_batch(items)) == [TIMEOUT, CORRECT]
        assert verifier.num_computed == 2


def test_what_was_begun_ahead_is_begun_again_if_its_workers_are_killed() -> None:
    items = [(boxed(rf"\frac{{{number}}}{{2}}"), f"{number / 2}") for number in range(1, 60)]
    with Verifier(workers=2) as verifier:
        assert kinds(verifier.verify_batch([(boxed(HALF), "0.5")])) == [CORRECT]
        verifier.verify_ahead(items)
        for worker in workers_of(psutil.Process()):
            worker.kill()
        verdicts = verifier.verify_batch(items)
    assert kinds(verdicts) == [CORRECT] * len(items)


def test_what_nobody_asks_for_is_let_go() -> None:
    """A rollout that fails after its first responses must not leave them behind for ever."""
    with Verifier(workers=2, cache_size=5) as verifier:
        for start in range(2, 62, 10):
            verifier.verify_ahead([(boxed(rf"\frac{{1}}{{{n}}}"), f"1/{n}") for n in range(start, start + 10)])
            assert wait_until(lambda: all(future.done() for future in verifier._ahead.values()))
            assert len(verifier._ahead) <= 20
        computed = verifier.num_computed
        verifier.verify_ahead([(boxed(r"\frac{1}{61}"), "1/61")] * 3)  # known, or begun
        assert verifier.num_computed == computed
    assert verifier._ahead == {}


def test_nothing_is_begun_ahead_by_a_closed_verifier() -> None:
    verifier = Verifier(workers=1)
    verifier.close()
    verifier.verify_ahead([(boxed(HALF), "0.5")])
    assert workers_of(psutil.Process()) == []


def test_closing_during_a_batch_ends_it_with_errors_and_leaves_no_process() -> None:
    verifier = Verifier(workers=2, timeout_s=60)
    verdicts: list[Verdict] = []
    items = [(boxed(f"9^{{9^{{9^{{{n}}}}}}}"), "5") for n in (9, 10, 11)]
    thread = threading.Thread(target=lambda: verdicts.extend(verifier.verify_batch(items)))
    thread.start()
    assert wait_until(lambda: len(workers_of(psutil.Process())) == 2)
    time.sleep(1.0)
    verifier.close()
    thread.join(15)
    assert not thread.is_alive()
    assert [(v.kind, "closed" in v.reason) for v in verdicts] == [(ERROR, True)] * 3
    assert workers_of(psutil.Process()) == []
    with pytest.raises(VerificationError, match="closed"):
        verifier.verify_batch([])
    verifier.close()  # twice is fine


@pytest.mark.parametrize(
    ("field", "value"), [("workers", 0), ("timeout_s", 0.0), ("timeout_s", float("nan")), ("memory_limit_mb", 16)]
)
def test_impossible_limits_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Verifier(**{field: value})  # type: ignore[arg-type]
    if field in ("workers", "timeout_s"):
        with pytest.raises(ValueError, match=field):
            verify_batch([(boxed("1"), "1")], **{"workers": 1, "timeout_s": 1.0, field: value})  # type: ignore[arg-type]


def test_an_empty_batch() -> None:
    assert verify_batch([], workers=2, timeout_s=1.0) == []


def test_one_call_uses_one_worker_that_stays() -> None:
    before = set(workers_of(psutil.Process()))
    assert verify(boxed(HALF), "0.5").kind is CORRECT
    assert verify(boxed("2/4"), "0.5").kind is CORRECT
    assert len(set(workers_of(psutil.Process())) - before) <= 1
    assert verify(r"a</think>\boxed{5}", "5", think_opened=True).reward == 1.0
    assert verify(r"\boxed{5}", "5", require_format=False).reward == 1.0


def run_python(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, *args], cwd=REPO, capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_importing_is_light() -> None:
    heavy = "{'torch', 'prefect', 'transformers', 'math_verify', 'sympy', 'numpy', 'pandas'}"
    done = run_python("-c", f"import sys, kdrl_core.verify; print(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_works_from_python_dash_c_and_exits_cleanly_without_close() -> None:
    code = (
        "from kdrl_core.verify import verify, Verifier\n"
        r"print(verify(r'<think></think>\boxed{\frac12}', '0.5').kind)" + "\n"
        "Verifier(workers=1).start()"
    )
    done = run_python("-c", code)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("correct", "", 0)


def test_works_from_a_script_without_a_main_guard_and_does_not_import_it_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "print('imported')\n"
        "from kdrl_core.verify import verify_batch\n"
        r"print(verify_batch([(r'<think></think>\boxed{\frac12}', '0.5')], workers=1, timeout_s=20)[0].kind)" + "\n"
    )
    done = run_python(str(script))
    assert (done.stdout.split(), done.returncode) == (["imported", "correct"], 0), done.stderr


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", HALF], ids=["busy", "idle"])
def test_no_worker_survives_the_killing_of_its_parent(answer: str) -> None:
    code = (
        "import threading, time\n"
        "from kdrl_core.verify import Verifier\n"
        "verifier = Verifier(workers=1, timeout_s=2)\n"
        rf"threading.Thread(target=verifier.verify, args=(r'<think></think>\boxed{{{answer}}}', '0.5')).start()" + "\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO) as parent:
        process = psutil.Process(parent.pid)
        assert wait_until(lambda: len(workers_of(process)) == 1)
        time.sleep(1.5)
        (worker,) = workers_of(process)
        parent.kill()
    assert wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
