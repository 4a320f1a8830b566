"""rollouts.parquet ─▶ teacher-score ─▶ teacher.parquet, and in stage 1 reference.parquet for the penalty to it."""

import pyarrow as pa

from kdrl_core.boxes.make import Made, Product, box, make, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.ledger.graph import REFERENCE, TEACHER
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import from_matrices, score_requests

_COLUMNS = ["prompt_id", "sample", "prompt_token_ids", "token_ids"]


@box(TEACHER, phase="teacher-score", rollouts=_COLUMNS)
def teacher_score(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Score the responses of step `at` with the teacher, and for Top-K find its likeliest tokens."""
    scorer, requests, config = session.scorer("teacher"), score_requests(rollouts), session.config
    hidden_s = scorer.hidden_seconds() if isinstance(scorer, HTTPScorer) else 0.0
    ids = rollouts["prompt_id"], rollouts["sample"]
    if config.needs_topk:
        found = scorer.score_topk(requests, config.topk.k)
        logprobs = pa.array([score.logprobs for score in found], pa.list_(pa.float32()))
        topk = from_matrices([s.topk_ids for s in found]), from_matrices([s.topk_logprobs for s in found])
        table = pa.Table.from_arrays([*ids, logprobs, *topk], schema=schemas.TEACHER_TOPK)
    else:
        logprobs = pa.array(scorer.score(requests), pa.list_(pa.float32()))
        table = pa.Table.from_arrays([*ids, logprobs], schema=schemas.TEACHER)
    return Product(content=table, facts=timed(hidden_seconds=hidden_s))


@box(REFERENCE, phase="reference-score", rollouts=_COLUMNS)
def reference_score(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Score the responses of step `at` with the stage's initial policy."""
    logprobs = pa.array(session.scorer("reference").score(score_requests(rollouts)), pa.list_(pa.float32()))
    table = pa.Table.from_arrays([rollouts["prompt_id"], rollouts["sample"], logprobs], schema=schemas.REFERENCE)
    return Product(content=table, facts=timed(hidden_seconds=0.0))


def score_step(session: StageSession, step: int) -> list[Made]:
    """Score a step's responses with each frozen model that the objective needs; none for plain GRPO."""
    return [make(session, each, step) for each in (teacher_score, reference_score) if each.row.when(session.config)]
