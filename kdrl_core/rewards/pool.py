"""Functions on many responses, in worker processes that can be killed.

What the verifier promises of comparisons (:mod:`kdrl_core.verify.pool`) holds for functions: limits of CPU time and
memory for each call, the order of the items, one more look if the machine may be at fault. Responses go to the workers
in batches. If a worker dies, or a function of lists fails as a whole, each response of its batch is looked at alone,
with one function at a time, so that the finding names the function that did it.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kdrl_core.config.answers import CallsConfig, RewardConfig, RewardFunction, VerificationConfig
from kdrl_core.errors import RecipeError
from kdrl_core.objectives.plugins import parse_reference
from kdrl_core.rewards.builtin import python_tests, try_built_in
from kdrl_core.rewards.calls import JOB_S, LONGEST_WAIT_S, Left, score_calls
from kdrl_core.rewards.code_runs import longest_wait_s
from kdrl_core.rewards.loading import Term, line_of
from kdrl_core.rewards.score import Found, Scored
from kdrl_core.rewards.worker import load_functions, loaded_or_fault, score_batch, score_list, start_reward_worker
from kdrl_core.types import VerdictKind
from kdrl_core.verify.pool import work_off
from kdrl_core.verify.screening import Outcome
from kdrl_core.verify.workers import Call, JobResult, Workers

_MAX_BATCH = 64
_SUSPECTS_AT_ONCE = 4
_NOT_JUDGED = "not judged, since more than verification.max_failed_share have failed already"

_DONE = Outcome(VerdictKind.CORRECT, "")


@dataclass(frozen=True, slots=True)
class _Group:
    """Terms that are called together, and how responses go to the workers."""

    indices: tuple[int, ...]
    task: Callable[..., Any]
    size: int
    """Responses of a batch, at most."""
    num_at_once: int
    budget: "_Budget | None" = None
    """Of an `async def`."""
    waits_s: float = 0.0
    """Seconds that a call may wait for a process of its own."""

    def longest_s(self) -> float:
        """Seconds that a worker may be idle without being given up."""
        return self.waits_s if self.budget is None else self.budget.longest_s()


@dataclass(slots=True, eq=False)
class _Budget:
    """Of one term in one call of `FunctionPool.score`."""

    calls: CallsConfig
    since: float | None = None
    made: int = 0

    def left(self) -> Left:
        """What is left of it now. The clock starts with the first question."""
        self.since = time.monotonic() if self.since is None else self.since
        most, until = self.calls.max_calls, self.calls.max_seconds
        return Left(
            None if most is None else most - self.made,
            None if until is None else until - (time.monotonic() - self.since),
        )

    def longest_s(self) -> float:
        """Seconds that a worker may be busy without being given up."""
        return JOB_S + (self.calls.retries + 1) * (self.calls.timeout_s + LONGEST_WAIT_S + 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Responses for a worker."""

    group: _Group
    places: tuple[int, ...]
    items: tuple[Scored, ...]
    indices: tuple[int, ...]
    """Terms of the reward."""


class RewardWorkers(Workers):
    """Workers that call functions. A job is a `_Batch`, or the terms to load."""

    what = "the function"

    def __init__(
        self, functions: Sequence[RewardFunction], limits: VerificationConfig, code: Mapping[str, str]
    ) -> None:
        super().__init__(limits.workers, limits.timeout_s, limits.memory_limit_mb)
        self._terms = [_term(function) for function in functions]
        self._code = dict(code)

    def _start(self) -> Call:
        return start_reward_worker, (self._memory_limit_mb, self._terms, self._code)

    def _task(self, job: Any) -> Call:
        if not isinstance(job, _Batch):
            return load_functions, (job,)
        args, budget = (job.items, job.indices, self.timeout_s), job.group.budget
        if budget is None:
            return job.group.task, args
        return score_calls, (*args, budget.calls.model_dump(), budget.left())

    def _read(self, returned: Any) -> JobResult:
        return JobResult(_DONE, is_certain=True, found=(returned,))


def _term(function: RewardFunction) -> Term:
    calls = None if function.calls is None else function.calls.model_dump()
    return Term(function.function, function.label, function.arguments, function.batch_size, calls)


def check_functions(reward: RewardConfig, limits: VerificationConfig) -> None:
    """Load the functions of a reward, those of users in a worker, and try kdrl's own once with the recipe's arguments.
    Raises RecipeError as `FunctionPool.check` does."""
    for index, function in enumerate(reward.functions):
        if function.is_own or function.function == "math":  # it has no arguments, and would load math-verify here
            continue
        if isinstance(fault := loaded_or_fault(index, _term(function)), str):
            raise RecipeError(fault)
        try:
            try_built_in(function.function, function.arguments)
        except Exception as error:
            where = f"field 'reward.functions.{index}.arguments': {function.function}"
            raise RecipeError(f"{where}: {' '.join(str(error).split())}") from error
    if own := [index for index, function in enumerate(reward.functions) if function.is_own]:
        pool = FunctionPool(reward.functions, own, limits.model_copy(update={"workers": 1}), {})
        with closing(pool):
            pool.check()


class FunctionPool:
    """Calls some terms of a reward on batches of responses. Its workers start with the first batch."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        indices: Sequence[int],
        limits: VerificationConfig,
        code: Mapping[str, str],
    ) -> None:
        self._functions = functions
        self._indices = tuple(indices)
        self._limits = limits
        self._workers = RewardWorkers(functions, limits, code)

    def close(self) -> None:
        """Stop the workers now."""
        self._workers.close()

    def check(self) -> None:
        """Load the functions in a worker. Raises RecipeError if one cannot be used: missing, no function, another
        signature, code that raises, hangs or is not what the run began with."""
        told: list[str | None] = []
        room = f" (verification.memory_limit_mb={self._limits.memory_limit_mb})"

        def finish(_: Any, result: JobResult) -> None:
            told.append(result.found[0] if result.found is not None else f"its import: {result.outcome.reason}{room}")

        for index in self._indices:
            work_off(self._workers, [(index,)], {}, num_at_once=1, finish=finish)
            if (fault := told.pop()) is not None:
                where = f"field 'reward.functions.{index}': {self._functions[index].function}: "
                where = "" if fault.startswith("field ") else where
                raise RecipeError(f"{where}{fault}")

    def score(self, items: Sequence[Scored]) -> list[dict[int, Found | None]]:
        """What each term found on each response: by the term's index, in the order of the items.

        Raises RecipeError if a function cannot be loaded any more.
        """
        found: list[dict[int, Found | None]] = [{} for _ in items]
        suspects: list[_Batch] = []
        for group in self._groups(len(items)):
            rest, size = list(range(len(items))), group.size
            while rest:
                batches = [
                    _Batch(group, tuple(part), tuple(items[place] for place in part), group.indices)
                    for part in (rest[start : start + size] for start in range(0, len(rest), size))
                ]
                done, rest = self._work(batches, found, suspects)
                size = max(1, min(size, done // len(batches)))
        self._look_again(suspects, found)
        return found

    def _groups(self, num_items: int) -> list[_Group]:
        """Plain functions are called together; one of lists, or an `async def`, by itself."""
        several = 2 * self._limits.workers
        plain, groups = list[int](), list[_Group]()
        for index in self._indices:
            function = self._functions[index]
            if function.batch_size is not None:
                groups.append(_Group((index,), score_list, function.batch_size, several))
            elif function.calls is not None:
                budget = _Budget(function.calls)
                groups.append(_Group((index,), score_calls, max(_MAX_BATCH, 8 * function.calls.at_once), 1, budget))
            else:
                plain.append(index)
        size = max(1, min(_MAX_BATCH, -(-num_items // several)))
        waits_s = max((self._waits_s(index) for index in plain), default=0.0)
        return [*([_Group(tuple(plain), score_batch, size, several, waits_s=waits_s)] if plain else []), *groups]

    def _waits_s(self, index: int) -> float:
        function = self._functions[index]
        if function.function != "python_tests":
            return 0.0
        default = inspect.signature(python_tests).parameters["cpu_s"].default
        return longest_wait_s(float(str(function.arguments.get("cpu_s", default))))  # checked before the run

    def _work(
        self, batches: Sequence[_Batch], found: list[dict[int, Found | None]], suspects: list[_Batch]
    ) -> tuple[int, list[int]]:
        """Have workers do batches of one group. Fills `found`, and `suspects` with responses to be looked at alone.

        Returns the number of responses that were done, and the places of those that are left over.
        """
        done, rest, faults = 0, list[int](), list[str]()
        group = batches[0].group

        def finish(batch: _Batch, result: JobResult) -> None:
            nonlocal done
            fault, rows = _read_rows(batch, result)
            if fault is not None:
                faults.append(fault)
                return
            if not rows:
                suspects.extend(
                    _Batch(group, (place,), (item,), (index,))
                    for place, item in zip(batch.places, batch.items, strict=True)
                    for index in batch.indices
                )
                return
            for place, row in zip(batch.places, rows, strict=False):
                found[place].update(zip(batch.indices, row, strict=True))
            done += len(rows)
            rest.extend(batch.places[len(rows) :])

        extra_s = group.longest_s()
        work_off(self._workers, batches, {}, num_at_once=group.num_at_once, finish=finish, extra_s=extra_s)
        if faults:
            raise RecipeError(faults[0])
        return done, sorted(rest)

    def _look_again(self, suspects: list[_Batch], found: list[dict[int, Found | None]]) -> None:
        """Call one function on one response at a time. What ends a worker now is the finding."""
        most = self._limits.max_failed_share * len(found)
        failed: set[int] = set()

        def finish(batch: _Batch, result: JobResult) -> None:
            (place,), (index,), (item,) = batch.places, batch.indices, batch.items
            fault, rows = _read_rows(batch, result)
            if rows:
                one = rows[0][0]
            else:
                kind = VerdictKind.ERROR if fault is not None else result.outcome.kind
                one = self._failure(index, item, fault or result.outcome.reason, kind)
            found[place][index] = one
            if one is not None and one.failed is not None:
                failed.add(place)

        for start in range(0, len(suspects), _SUSPECTS_AT_ONCE):
            part = suspects[start : start + _SUSPECTS_AT_ONCE]
            if len(failed) <= most:
                extra_s = max(each.group.longest_s() for each in part)
                work_off(self._workers, part, {}, num_at_once=1, finish=finish, extra_s=extra_s)
                continue
            for batch in part:
                (place,), (index,), (item,) = batch.places, batch.indices, batch.items
                found[place][index] = self._failure(index, item, _NOT_JUDGED, VerdictKind.ERROR)

    def _failure(self, index: int, item: Scored, reason: str, kind: VerdictKind) -> Found:
        problem, function = item[2], self._functions[index].function
        line = line_of(parse_reference(function)) if self._functions[index].is_own else None
        where = f"{function}, line {line}" if line else function
        who = f"{where}, problem {problem.get('problem_id')}, sample {problem.get('sample')}"
        return Found(0.0, f"{who}: {reason}", failed=kind)


def _read_rows(batch: _Batch, result: JobResult) -> tuple[str | None, list[list[Found | None]]]:
    """What is wrong with the function, or None; and the rows that a worker did, none if it died. Counts tries."""
    budget = batch.group.budget
    if result.found is None:
        if budget is not None:
            budget.made += len(batch.items)  # at least so many, perhaps
        return None, []
    fault, rows, *made = result.found[0]
    if budget is not None:
        budget.made += made[0] if made else len(batch.items)
    return fault, rows
