"""Responses of a shard that is not whole yet, a line each as they come: they took minutes or money, and outlive a kill.

A line is JSON and carries no hash: who reads it holds the folder's lock, and settings and seeds are in its name. A line
that was cut off by a kill is passed over, and its response asked for again.
"""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kdrl_core.evaluation.outcome import Response
from kdrl_core.ledger import storage_errors
from kdrl_core.types import FinishReason, RolloutRequest

_FIELDS = {"after_s", "call", *(field.name for field in fields(Response))}


class Journal:
    """The responses to some requests, as far as they are there.

    Args:
        path: of the file; made with the first response.
        requests: what is asked; other responses in the file are passed over.
    """

    def __init__(self, path: Path, requests: Sequence[RolloutRequest]) -> None:
        self._path = path
        self._began = time.time()
        self._requests = list(requests)
        wanted = {(request.prompt_id, request.sample): request.seed for request in requests}
        content = path.read_bytes() if path.is_file() else b""
        self._is_cut = bool(content) and not content.endswith(b"\n")
        self._found = {
            (one.prompt_id, one.sample): one
            for one in _read(content)
            if wanted.get((one.prompt_id, one.sample)) == one.seed
        }

    @property
    def missing(self) -> list[RolloutRequest]:
        """What has no response yet, in order."""
        return [request for request in self._requests if (request.prompt_id, request.sample) not in self._found]

    @property
    def responses(self) -> list[Response]:
        """Those there are, in the order of the requests."""
        keys = [(request.prompt_id, request.sample) for request in self._requests]
        return [self._found[key] for key in keys if key in self._found]

    def __len__(self) -> int:
        return len(self._found)

    def keep(self, responses: Iterable[Response]) -> None:
        """Note responses, and have them written. Raises StorageError."""
        new = [one for one in responses if (one.prompt_id, one.sample) not in self._found]
        self._found.update({(one.prompt_id, one.sample): one for one in new})
        with storage_errors(self._path), self._path.open("ab") as file:
            file.write(b"\n" if self._is_cut else b"")
            after = {"after_s": time.time() - self._began, "call": self._began}
            file.writelines(json.dumps({**asdict(one), **after}).encode() + b"\n" for one in new)
        self._is_cut = False


def seconds_of(path: Path) -> float:
    """How long the calls took, until the last response of each, whose responses a journal has."""
    took: dict[float, float] = {}
    for line in _lines(path.read_bytes() if path.is_file() else b""):
        took[line["call"]] = max(took.get(line["call"], 0.0), line["after_s"])
    return sum(took.values())


def _read(content: bytes) -> Iterable[Response]:
    names = [field.name for field in fields(Response)]
    for line in _lines(content):
        yield Response(**{**{name: line[name] for name in names}, "finish_reason": FinishReason(line["finish_reason"])})


def _lines(content: bytes) -> Iterable[dict[str, Any]]:
    """Those that are whole."""
    for line in content.splitlines():
        with suppress(ValueError, RecursionError):
            values = json.loads(line)
            if isinstance(values, dict) and values.keys() == _FIELDS:
                yield values
