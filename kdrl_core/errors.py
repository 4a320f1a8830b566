"""One exception base; each error is also the stdlib type that a caller would expect, and survives pickling.

A message says what was wrong, where, and what to do about it:
``problems.parquet row 41, field 'answer': empty; drop the row or set <stage>.data.on_error=drop``.
"""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """`text` with control characters as escapes, except tab and line break. So on a terminal or in a log it can neither
    overwrite other text nor reverse the reading order."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class KdrlError(Exception):
    """Base of every error that kdrl raises on purpose. Its text is meant for the user: one line, cause and remedy.

    The text may quote foreign models, data and files, and goes to terminals and logs.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


def told(error: BaseException) -> str:
    """An error in one line: kdrl's own as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, KdrlError) else f"{type(error).__name__}: {text}".removesuffix(": ")


class RecipeError(KdrlError, ValueError):
    """A recipe field is unknown, out of bounds, or contradicts another."""


class DataError(KdrlError, ValueError):
    """Problems, benchmarks or other input tables cannot be used as they are."""


class ModelError(KdrlError, ValueError):
    """A model or tokenizer directory is missing, incomplete, or does not fit the other model."""


class RunError(KdrlError, RuntimeError):
    """The run directory cannot be used: bad name, changed recipe, missing stage."""


class RunLockedError(RunError):
    """Another process works on the same run."""


class StoppedByAlarmError(RunError):
    """An alarm whose rule says `stop: true` has stopped a stage; nothing is lost."""


class Stopped(RunError):  # noqa: N818 (no error: the user asked for it)
    """Work ended early because somebody asked for it; what was in hand is published."""


class DamagedArtifactError(RunError):
    """A published file no longer has the bytes that its manifest recorded.

    Args:
        problem: what is wrong with which file.
        remedy: what to do about it. Callers that repair the damage themselves show only `problem`.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = visible(problem)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}; {visible(self.remedy)}"


class ForeignFileError(DamagedArtifactError):
    """A file or folder is whole but does not belong where it lies; only its owner may move or delete it."""


class StorageError(KdrlError, OSError):
    """The disk is full or the folder cannot be written."""


class SecretError(KdrlError, LookupError):
    """A key that a recipe names is not there. The message never holds a key."""


class EngineError(KdrlError, RuntimeError):
    """A rollout engine, scorer or trainer failed or produced unusable numbers."""


class VerificationError(KdrlError, RuntimeError):
    """Too many verdicts of a step are timeouts or errors."""
