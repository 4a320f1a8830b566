"""A check, its result, and the recorder that runs checks one after the other and tells what each of them found."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from kdrl_core.errors import KdrlError, told
from kdrl_core.look.doctor.remedies import remedy_for

DEFAULT_LIMIT_S = 300.0
_TRACEBACK_PARTS = 6


class CheckStatus(StrEnum):
    """How a check ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What a check found."""

    check: str
    status: CheckStatus
    seconds: float
    """Its own seconds, without those of checks inside of it."""
    says: str
    figures: dict[str, Any] = field(default_factory=dict)
    """The numbers in `says`, and others for a bug report."""
    remedy: str | None = None
    """What to do about a failure; None if `says` tells it already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The result of a check that did not fail: a sentence, and its numbers."""

    says: str
    figures: dict[str, Any] = field(default_factory=dict)


class CheckFailed(Exception):  # noqa: N818 (never leaves the doctor)
    """A check failed."""

    def __init__(self, says: str, remedy: str | None = None, **figures: Any) -> None:
        super().__init__(says)
        self.remedy, self.figures = remedy, figures


class NotApplicable(Exception):  # noqa: N818 (never leaves the doctor)
    """A check has nothing to look at here; the text says why."""


Emit = Callable[[dict[str, Any]], None]
"""Takes `{"event": "begin", "check": …, "limit_s": …}`, or `{"event": "end"}` with the fields of a `CheckResult`."""


class Recorder:
    """Runs checks and emits an event when one begins and when it ends. A check may run others inside of it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._inner_s: list[float] = []
        """Seconds of finished inner checks, for each check under way."""
        self._failed: dict[str, BaseException] = {}
        self.results: list[CheckResult] = []

    def run(
        self,
        check: str,
        work: Callable[[], Observed],
        *,
        needs: Sequence[str] = (),
        limit_s: float = DEFAULT_LIMIT_S,
    ) -> bool:
        """Run a check; whether it is fine. It is skipped if a check that it needs failed or was skipped for that.

        The error of a check inside of another goes on to the outer one, since that cannot go on without it.
        """
        if (missing := next((name for name in needs if name in self._failed), None)) is not None:
            self._failed[check] = self._failed[missing]
            self._end(check, CheckStatus.SKIPPED, 0.0, f"needs: {missing}")
            return False
        self._emit({"event": "begin", "check": check, "limit_s": limit_s})
        started = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            finding = work()
            self._end(check, CheckStatus.OK, self._own_seconds(started), finding.says, figures=finding.figures)
            return True
        except NotApplicable as reason:
            self._end(check, CheckStatus.SKIPPED, self._own_seconds(started), str(reason))
            return True
        except Exception as error:
            inner = next((name for name, seen in self._failed.items() if _is_from(error, seen)), None)
            self._failed[check] = error
            seconds = self._own_seconds(started)
            if inner is not None:
                self._end(check, CheckStatus.SKIPPED, seconds, f"needs: {inner}")
            else:
                says, figures = _told(error)
                self._end(check, CheckStatus.FAILED, seconds, says, figures=figures, remedy=remedy_for(error))
            if self._inner_s:
                raise
            return False

    def _own_seconds(self, started: float) -> float:
        total = time.perf_counter() - started
        own = total - self._inner_s.pop()
        if self._inner_s:
            self._inner_s[-1] += total
        return own

    def _end(
        self,
        check: str,
        status: CheckStatus,
        seconds: float,
        says: str,
        *,
        figures: dict[str, Any] | None = None,
        remedy: str | None = None,
    ) -> None:
        result = CheckResult(
            check=check, status=status, seconds=round(seconds, 3), says=says, figures=figures or {}, remedy=remedy
        )
        self.results.append(result)
        self._emit({"event": "end", **asdict(result)})


def _told(error: Exception) -> tuple[str, dict[str, Any]]:
    """The first line of an error, and its figures; more lines, such as the end of a rank's log, are among these."""
    if isinstance(error, CheckFailed):
        return str(error), error.figures
    if not isinstance(error, KdrlError):
        return told(error), {"log": "".join(traceback.format_exception(error)[-_TRACEBACK_PARTS:]).strip()}
    says, _, log = str(error).partition("\n")
    return says, {"log": log} if log else {}


def _is_from(error: BaseException | None, earlier: BaseException) -> bool:
    """Whether an error is `earlier`, or was raised because of it."""
    while error is not None:
        if error is earlier:
            return True
        error = error.__cause__
    return False
