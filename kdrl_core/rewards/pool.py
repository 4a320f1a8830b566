"""Functions on many responses, in worker processes that can be killed.

What the verifier promises of comparisons (:mod:`kdrl_core.verify.pool`) holds for functions: limits of CPU time and
memory for each call, the order of the items, one more look if the machine may be at fault. Responses go to the workers
in batches. If a worker dies, each response of its batch is looked at alone, with one function at a time, so that the
finding names the function that did it.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kdrl_core.config.answers import RewardConfig, VerificationConfig
from kdrl_core.config.rewards import RewardFunction
from kdrl_core.errors import RecipeError
from kdrl_core.objectives.plugins import parse_reference
from kdrl_core.rewards.loading import line_of
from kdrl_core.rewards.score import Found, Scored
from kdrl_core.rewards.worker import load_functions, loaded_or_fault, score_batch, start_reward_worker
from kdrl_core.types import VerdictKind
from kdrl_core.verify.pool import work_off
from kdrl_core.verify.screening import Outcome
from kdrl_core.verify.workers import Call, JobResult, Workers

_MAX_BATCH = 64
_SUSPECTS_AT_ONCE = 4
_NOT_JUDGED = "not judged, since more than verification.max_failed_share have failed already"

_DONE = Outcome(VerdictKind.CORRECT, "")


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Responses for a worker."""

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
        self._plain = [function.model_dump() for function in functions]
        self._code = dict(code)

    def _start(self) -> Call:
        return start_reward_worker, (self._memory_limit_mb, self._plain, self._code)

    def _task(self, job: Any) -> Call:
        if isinstance(job, _Batch):
            return score_batch, (job.items, job.indices, self.timeout_s)
        return load_functions, (job,)

    def _read(self, returned: Any) -> JobResult:
        return JobResult(_DONE, is_certain=True, found=(returned,))


def check_functions(reward: RewardConfig, limits: VerificationConfig) -> None:
    """Load the functions of a reward, those of users in a worker. Raises RecipeError as `FunctionPool.check` does."""
    for index, function in enumerate(reward.functions):
        if not function.is_own and isinstance(fault := loaded_or_fault(index, function), str):
            raise RecipeError(fault)
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

        def finish(_: Any, result: JobResult) -> None:
            told.append(result.found[0] if result.found is not None else f"its import: {result.outcome.reason}")

        for index in self._indices:
            work_off(self._workers, [(index,)], {}, num_at_once=1, finish=finish)
            if (fault := told.pop()) is not None:
                where = "" if fault.startswith("field ") else f"field 'reward.functions.{index}': "
                raise RecipeError(f"{where}{fault}")

    def score(self, items: Sequence[Scored]) -> list[dict[int, Found | None]]:
        """What each term found on each response: by the term's index, in the order of the items.

        Raises RecipeError if a function cannot be loaded any more.
        """
        found: list[dict[int, Found | None]] = [{} for _ in items]
        suspects: list[_Batch] = []
        rest = list(range(len(items)))
        size = max(1, min(_MAX_BATCH, -(-len(rest) // (2 * self._limits.workers))))
        while rest:
            batches = [
                _Batch(tuple(part), tuple(items[place] for place in part), self._indices)
                for part in (rest[start : start + size] for start in range(0, len(rest), size))
            ]
            done, rest = self._work(batches, found, suspects)
            size = max(1, min(size, done // len(batches)))
        self._look_again(suspects, found)
        return found

    def _work(
        self, batches: Sequence[_Batch], found: list[dict[int, Found | None]], suspects: list[_Batch]
    ) -> tuple[int, list[int]]:
        """Have workers do batches. Fills `found`, and `suspects` with the responses of workers that died.

        Returns the number of responses that were done, and the places of those that are left over.
        """
        done, rest, faults = 0, list[int](), list[str]()

        def finish(batch: _Batch, result: JobResult) -> None:
            nonlocal done
            if result.found is None:
                suspects.extend(
                    _Batch((place,), (item,), (index,))
                    for place, item in zip(batch.places, batch.items, strict=True)
                    for index in batch.indices
                )
                return
            fault, rows = result.found[0]
            if fault is not None:
                faults.append(fault)
                return
            for place, row in zip(batch.places, rows, strict=False):
                found[place].update(zip(batch.indices, row, strict=True))
            done += len(rows)
            rest.extend(batch.places[len(rows) :])

        work_off(self._workers, batches, {}, num_at_once=2 * self._limits.workers, finish=finish)
        if faults:
            raise RecipeError(faults[0])
        return done, sorted(rest)

    def _look_again(self, suspects: list[_Batch], found: list[dict[int, Found | None]]) -> None:
        """Call one function on one response at a time. What ends a worker now is the finding."""
        most = self._limits.max_failed_share * len(found)
        failed: set[int] = set()

        def finish(batch: _Batch, result: JobResult) -> None:
            (place,), (index,), (item,) = batch.places, batch.indices, batch.items
            if result.found is not None and result.found[0][0] is None:
                found[place][index] = result.found[0][1][0][0]
                return
            failed.add(place)
            kind = result.outcome.kind if result.found is None else VerdictKind.ERROR
            reason = result.outcome.reason if result.found is None else result.found[0][0]
            found[place][index] = self._failure(index, item, reason, kind)

        for start in range(0, len(suspects), _SUSPECTS_AT_ONCE):
            part = suspects[start : start + _SUSPECTS_AT_ONCE]
            if len(failed) <= most:
                work_off(self._workers, part, {}, num_at_once=1, finish=finish)
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
