"""Responses of an unfinished shard, one line each as they come. They cost minutes or money, so they survive a kill.

    0123456789abcdef {"prompt_id": …, "sample": …, "text": …, …}

The first word is a checksum of the settings and of the rest of the line. A line that fails it, or does not parse, is
skipped with a warning, and its response is asked for again. So is a line of an earlier version, without checksum.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdrl_core.config.paths import read_small
from kdrl_core.ledger import storage_errors
from kdrl_core.sampling.responses import Response
from kdrl_core.types import FinishReason, RolloutRequest

_MAX_LISTED = 8
_MOST_BYTES = 2**33
"""Most bytes of a journal: a shard of 1,024 responses of 32K tokens has 1 GB."""
_logger = logging.getLogger("kdrl")


class Journal:
    """The responses to some requests that have come so far. The file is made with the first response.

    `settings`, as text or a hash, are all that the responses depend on beside their seeds. Responses to other requests
    in the file are skipped; lines of other settings count as damaged.
    """

    def __init__(self, path: Path, requests: Sequence[RolloutRequest], *, settings: str) -> None:
        self._path, self._settings = path, settings
        self._began = time.time()
        self._requests = {(request.prompt_id, request.sample): request for request in requests}
        self._found: dict[tuple[str, int], Response] = {}
        self._took: dict[float, float] = {}
        content = b""
        with suppress(FileNotFoundError):
            content = read_small(path, most_bytes=_MOST_BYTES)
        self._is_cut = bool(content) and not content.endswith(b"\n")
        self._read(content)

    @property
    def missing(self) -> list[RolloutRequest]:
        """Requests without a response yet, in order."""
        return [request for key, request in self._requests.items() if key not in self._found]

    @property
    def responses(self) -> list[Response]:
        """The responses so far, in the order of the requests."""
        return [self._found[key] for key in self._requests if key in self._found]

    @property
    def seconds(self) -> float:
        """Time of earlier calls, each up to its last response in the file."""
        return sum(self._took.values())

    def __len__(self) -> int:
        return len(self._found)

    def keep(self, responses: Iterable[Response]) -> None:
        """Note responses, and write those that are new or differ from what is there. Raises StorageError."""
        new = {(one.prompt_id, one.sample): one for one in responses}
        new = {key: one for key, one in new.items() if self._found.get(key) != one}
        if not new:
            return
        self._found.update(new)
        after_s = time.time() - self._began
        values = [{**asdict(one), "call": self._began, "after_s": after_s} for one in new.values()]
        payloads = [json.dumps(each).encode() for each in values]
        lines = [self._checksum(payload) + b" " + payload + b"\n" for payload in payloads]
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                was_cut, self._is_cut = self._is_cut, True
                file.write((b"\n" if was_cut else b"") + b"".join(lines))
            self._is_cut = False

    def _read(self, content: bytes) -> None:
        damaged = []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                values = self._values(line)
                call, after_s = values.pop("call"), values.pop("after_s")
                values["finish_reason"] = FinishReason(values["finish_reason"])
                response = Response(**values)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                damaged.append(number)
                continue
            self._took[call] = max(self._took.get(call, 0.0), after_s)
            request = self._requests.get((response.prompt_id, response.sample))
            if request is not None and request.seed == response.seed:
                self._found[response.prompt_id, response.sample] = response
        if damaged:
            listed = ", ".join(map(str, damaged[:_MAX_LISTED])) + (", …" if len(damaged) > _MAX_LISTED else "")
            _logger.warning(
                "%s: line %s: damaged, cut off or of other settings (%d in all); what is missing is asked for again",
                self._path,
                listed,
                len(damaged),
            )

    def _values(self, line: bytes) -> dict[str, Any]:
        checksum, _, payload = line.partition(b" ")
        if checksum != self._checksum(payload):
            raise ValueError("not the checksum of the line")
        values: dict[str, Any] = json.loads(payload)
        return values

    def _checksum(self, payload: bytes) -> bytes:
        return hashlib.sha256(self._settings.encode() + b"\n" + payload).hexdigest()[:16].encode()
