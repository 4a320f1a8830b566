"""r = Σ weight · value over the functions that apply to a response, and the verdict that goes with it.

`math` is the verifier itself, with its cache and its workers; the other functions have workers of their own. Without
functions in the recipe the reward is the verifier's alone, and nothing here runs.

A function that fails (raises, hangs, returns no number) counts as 0; the verdict is then `error` or `timeout`, as where
none applies. Otherwise it is `correct` if r > `reward.success_above`; else that of `math`, if it says more than wrong.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from kdrl_core.config.answers import RewardConfig, VerificationConfig
from kdrl_core.rewards.score import MAX_REASON_CHARS, Found, Scored
from kdrl_core.types import ThinkOpened, Verdict, VerdictKind
from kdrl_core.verify import VerdictOptions, Verifier
from kdrl_core.verify.screening import printable

MATH = "math"
_FAILED = (VerdictKind.TIMEOUT, VerdictKind.ERROR)
_NOT_RIGHT = (VerdictKind.MALFORMED, VerdictKind.NO_ANSWER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on one response, and what each function found."""

    verdict: Verdict
    values: dict[str, float | None]
    """By the function's name, not weighted; None where it does not apply or failed. Parts are `name.part`."""

    @property
    def named_values(self) -> list[dict[str, Any]]:
        """`values` as a row of the column `reward_values`."""
        return [{"name": name, "value": value} for name, value in self.values.items()]


def facts_of(
    *,
    problem_id: str,
    question: str,
    source: str,
    sample: int,
    length: int,
    finish_reason: str,
    think_opened: ThinkOpened,
) -> dict[str, Any]:
    """The argument `problem` of a function: what is known of the problem, and of the response beside its text."""
    return {
        "problem_id": problem_id,
        "question": question,
        "source": source,
        "sample": sample,
        "length": length,
        "finish_reason": finish_reason,
        "think_opened": think_opened,
    }


class Judge:
    """Judges responses by a recipe's functions; usable from any thread. `close` stops its workers.

    Args:
        verifier: judges `math`; its owner closes it.
        code: sha256 of each file or module that the run began with, as `expect_code` takes it.
        num_kept: so many of the last judgements are kept, except failures, and given again when the same responses come
            back. `verify` asks about responses that dynamic sampling has asked about before.
    """

    def __init__(
        self,
        reward: RewardConfig,
        limits: VerificationConfig,
        verifier: Verifier,
        code: Mapping[str, str] | None = None,
        *,
        num_kept: int = 0,
    ) -> None:
        self.reward = reward
        self._verifier = verifier
        self._num_kept, self._kept = num_kept, dict[bytes, Judgement]()
        functions = reward.functions
        self._math = next((index for index, each in enumerate(functions) if each.function == MATH), None)
        others = [index for index in range(len(functions)) if index != self._math]
        self._pool = None
        if others:
            from kdrl_core.rewards.pool import FunctionPool  # a run without functions does without its modules

            self._pool = FunctionPool(functions, others, limits, code or {})

    def check(self) -> None:
        """Load the functions now. Raises RecipeError as `FunctionPool.check` does."""
        if self._pool is not None:
            self._pool.check()

    def close(self) -> None:
        """Stop the workers of the functions."""
        if self._pool is not None:
            self._pool.close()

    def judge_batch(self, items: Sequence[Scored], **options: Unpack[VerdictOptions]) -> list[Judgement]:
        """Judge responses, in their order. `options` are those of `math`.

        Raises:
            VerificationError: the verifier is closed.
            RecipeError: a function cannot be loaded, or is not the code that the run began with.
        """
        if not self._num_kept:
            return self._judged(items, **options)
        keys = [hashlib.sha256(repr(item).encode("utf-8", "surrogatepass")).digest() for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self._kept}
        self._kept.update(zip(new, self._judged([*new.values()], **options), strict=True))
        found = [self._kept[key] for key in keys]
        lasting = {key: one for key, one in self._kept.items() if one.verdict.kind not in _FAILED}
        self._kept = dict([*lasting.items()][-self._num_kept :])
        return found

    def _judged(self, items: Sequence[Scored], **options: Unpack[VerdictOptions]) -> list[Judgement]:
        found = [dict[int, Found | None]() for _ in items] if self._pool is None else self._pool.score(items)
        if self._math is None:
            return [self._judgement(each, None) for each in found]
        verdicts = self._verifier.verify_batch([(item[0], item[1]) for item in items], **options)
        for each, verdict in zip(found, verdicts, strict=True):
            failed = verdict.kind if verdict.kind in _FAILED else None
            each[self._math] = Found(verdict.reward, verdict.reason, failed=failed)
        return [self._judgement(each, verdict) for each, verdict in zip(found, verdicts, strict=True)]

    def _judgement(self, found: Mapping[int, Found | None], math: Verdict | None) -> Judgement:
        total, applies, failed, extracted = 0.0, False, set[VerdictKind](), None
        values: dict[str, float | None] = {}
        told: list[str] = []
        for index, function in enumerate(self.reward.functions):
            label, one = function.label, found[index]
            if one is None:
                values[label] = None
                continue
            applies = True
            if one.failed is not None:
                failed.add(one.failed)
                values[label] = None
                told.append(f"{label} {one.failed.value}: {one.reason}")
                continue
            total += function.weight * one.value
            values[label] = one.value
            values.update({f"{label}.{name}": value for name, value in (one.parts or {}).items()})
            extracted = one.extracted if extracted is None else extracted
            parts = [f"{name} {value:.4g}" for name, value in (one.parts or {}).items()]
            more = ", ".join([*([one.reason] if one.reason else []), *parts])
            told.append(f"{label} {one.value:.4g}: {more}" if more else f"{label} {one.value:.4g}")
        kind = self._kind(total, applies, failed, math)
        verdict = Verdict(
            kind=kind,
            reward=total,
            format_reward=1.0 if math is None else math.format_reward,
            accuracy_reward=1.0 if kind is VerdictKind.CORRECT else 0.0,
            extracted=_first(None if math is None else math.extracted, extracted),
            reason=printable("; ".join(told) if told else "none of reward.functions applies to this problem"),
        )
        return Judgement(verdict=verdict, values=values)

    def _kind(self, total: float, applies: bool, failed: set[VerdictKind], math: Verdict | None) -> VerdictKind:
        if failed:
            return VerdictKind.TIMEOUT if VerdictKind.TIMEOUT in failed else VerdictKind.ERROR
        if not applies:
            return VerdictKind.ERROR
        if total > self.reward.success_above:
            return VerdictKind.CORRECT
        return math.kind if math is not None and math.kind in _NOT_RIGHT else VerdictKind.WRONG


def _first(given: str | None, other: str | None) -> str | None:
    found = given if given is not None else other
    return None if found is None else printable(found[:MAX_REASON_CHARS])
