"""What the pages ask for, as JSON below /api. Each function runs in a worker thread, with its own cursor."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse

from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.ui.live import EVERY_S, Live
from kdrl_core.look.ui.plain import columns, plain

MAX_ROWS = 500
"""Rows of one page of the table."""

GROUP_CHARACTERS = 20_000
"""Characters of each response of a group; the sample view has all."""

_MAX_OFFSET = 2**31 - 1
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
        offset: Annotated[int, Query(ge=0, le=_MAX_OFFSET)] = 0,
    ) -> JSONResponse:
        page = store.page(where, sort=sort, descending=descending, limit=limit, offset=offset)
        return JSONResponse({"total": page.total, "rows": [plain(row) for row in page.rows]})

    @api.get("/rollout")
    def rollout(run: str, stage: str, step: int, prompt_id: str, sample: int) -> JSONResponse:
        return JSONResponse(plain(store.record(run=run, stage=stage, step=step, prompt_id=prompt_id, sample=sample)))

    @api.get("/group")
    def group(run: str, stage: str, step: int, prompt_id: str) -> JSONResponse:
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
