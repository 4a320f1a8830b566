"""The data of the pages, as JSON below /api. Each function runs in a worker thread, with its own cursor.

JSON has no infinities or NaN, and JavaScript rounds integers beyond 2⁵³ (seeds are uint64). These are sent as text.
"""

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse

from kdrl_core.errors import KdrlError
from kdrl_core.look.rollouts.filters import MOST
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore

EVERY_S = 2.0
"""Minimum seconds between two looks at the disk."""

_PATIENCE_S = 0.5
_SHARE = 0.1


class Live:
    """Follows a store; `revision` counts how often something was new.

    A look at thousands of steps takes a second. So a thread does it, and pages wait for the thread only a moment. Looks
    take at most a tenth of the time, however many pages ask. With `every_s=0` each call looks.
    """

    def __init__(self, store: RolloutStore, *, every_s: float = EVERY_S) -> None:
        self._store, self._every_s = store, every_s
        self._revision, self._next = 0, time.monotonic() + every_s
        self._error: KdrlError | None = None
        self._looking: threading.Thread | None = None
        self._lock = threading.Lock()

    def look(self) -> int:
        """Look for new steps if it is time to. Returns the revision; a slow look raises it only for the next call.
        Raises KdrlError if the runs could not be read any more."""
        with self._lock:
            if self._looking is None and time.monotonic() >= self._next:
                self._looking = threading.Thread(target=self._refresh, name="kdrl-ui-look", daemon=True)
                self._looking.start()
            looking = self._looking
        if looking is not None:
            looking.join(_PATIENCE_S)
        if self._error is not None:
            raise self._error
        return self._revision

    def _refresh(self) -> None:
        began, is_new, error = time.monotonic(), False, None
        try:
            is_new = self._store.refresh()
        except KdrlError as raised:
            error = raised
        finally:
            with self._lock:
                took = time.monotonic() - began
                self._revision += is_new
                self._error = error
                self._next = time.monotonic() + max(self._every_s, took / _SHARE if self._every_s else 0.0)
                self._looking = None


MAX_ROWS = 500
"""Rows of one page of the table."""

GROUP_CHARACTERS = 20_000
"""Characters of each response of a group; the sample view has all."""

_Whole = Annotated[int, Query(ge=0, le=MOST)]
_SMALL = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class _QueryFilter(RolloutFilter):
    """The filter that a URL's query gives, field by field; `verdict` may be repeated."""

    verdicts: Annotated[tuple[str, ...] | None, Query(alias="verdict")] = None


def api_of(store: RolloutStore, *, look_every_s: float = EVERY_S) -> APIRouter:
    """The routes over `store`. They look for new steps every `look_every_s` seconds at most."""
    api, live = APIRouter(prefix="/api"), Live(store, every_s=look_every_s)

    @api.get("/runs")
    def runs() -> JSONResponse:
        revision = live.look()
        return JSONResponse(
            {
                "revision": revision,
                "runs": [plain(run) for run in store.runs()],
                "damaged": [{"path": str(file.path), "problem": str(file.problem)} for file in store.damaged],
            }
        )

    @api.get("/steps")
    def steps(run: str | None = None, stage: str | None = None) -> JSONResponse:
        rows = store.steps(run=run, stage=stage)
        metrics = [row.get("metrics") or {} for row in rows]
        scalars = [{name: value for name, value in row.items() if name != "metrics"} for row in rows]
        return JSONResponse({"num_steps": len(rows), "columns": columns(scalars), "metrics": columns(metrics)})

    @api.get("/rollouts")
    def rollouts(
        where: Annotated[_QueryFilter, Depends()],
        sort: str = "step",
        descending: bool = False,
        limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 100,
        offset: _Whole = 0,
    ) -> JSONResponse:
        page = store.page(where, sort=sort, descending=descending, limit=limit, offset=offset)
        return JSONResponse({"total": page.total, "rows": [plain(row) for row in page.rows]})

    @api.get("/rollout")
    def rollout(run: str, stage: str, step: _Whole, prompt_id: str, sample: _Whole) -> JSONResponse:
        return JSONResponse(plain(store.record(run=run, stage=stage, step=step, prompt_id=prompt_id, sample=sample)))

    @api.get("/group")
    def group(run: str, stage: str, step: _Whole, prompt_id: str) -> JSONResponse:
        found = store.group(run=run, stage=stage, step=step, prompt_id=prompt_id)
        return JSONResponse({"responses": [_without_tokens(one) for one in found]})

    @api.get("/prompt")
    def prompt(run: str, prompt_id: str) -> JSONResponse:
        return JSONResponse({"steps": [plain(step) for step in store.prompt_history(run=run, prompt_id=prompt_id)]})

    return api


def _without_tokens(record: dict[str, Any]) -> dict[str, Any]:
    """A response without its per-token values; a very long text is cut."""
    kept = {name: plain(value) for name, value in record.items() if isinstance(value, _SMALL)}
    text = kept.get("response") or ""
    return kept | {"response": text[:GROUP_CHARACTERS], "is_cut": len(text) > GROUP_CHARACTERS}


_EXACT = 2**53


def plain(value: Any) -> Any:
    """`value` as dicts, lists, text, finite floats, exact integers, booleans and None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if -_EXACT <= value <= _EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [plain(each) for each in value]
    if hasattr(value, "item"):  # numpy's scalars
        return plain(value.item())
    return str(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as one list per column, with None where a row lacks it. This JSON is a third of the size of rows."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [plain(row.get(name)) for row in rows] for name in names}
