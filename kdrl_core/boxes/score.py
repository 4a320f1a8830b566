"""rollouts.parquet ─▶ teacher-score ─▶ teacher.parquet, and in stage 1 reference.parquet for the penalty to it."""

import time

import pyarrow as pa

from kdrl_core.boxes.rollout import StepArtifact
from kdrl_core.boxes.session import StageSession
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.ledger import find_own, publish_file, required_sha256
from kdrl_core.ledger.progress import report_progress
from kdrl_core.tables.columns import from_matrices, score_requests
from kdrl_core.tables.schemas import REFERENCE, TEACHER, TEACHER_TOPK, read_table, write_table
from kdrl_core.types import ScoreRequest


def score_step(session: StageSession, step: int) -> list[StepArtifact]:
    """Score a step's responses with each frozen model that the objective needs; none for plain GRPO."""
    roles = []
    if session.config.scores_teacher:
        roles.append("teacher")
    if session.config.ref_beta > 0.0:
        roles.append("reference")
    return [_score(session, step, role) for role in roles]


def _score(session: StageSession, step: int, role: str) -> StepArtifact:
    started = time.perf_counter()
    run, stage = session.run, session.stage
    paths = run.paths
    path = paths.teacher(stage, step) if role == "teacher" else paths.reference(stage, step)
    source = paths.rollouts(stage, step)
    inputs = run.inputs(source)
    if find_own(run, path, inputs):
        return StepArtifact(path=path, reused=True, seconds=0.0)
    report_progress(run, stage=stage, step=step, phase=f"{role}-score")
    rollouts = read_table(source, ["prompt_id", "sample", "prompt_token_ids", "token_ids"])
    requests = score_requests(rollouts)
    scorer = session.scorer(role)
    hidden_s = scorer.hidden_seconds() if isinstance(scorer, HTTPScorer) else 0.0
    table = _table(session, role, rollouts["prompt_id"], rollouts["sample"], requests)
    seconds = time.perf_counter() - started
    publish_file(
        path,
        lambda file: write_table(table, file),
        inputs=inputs,
        metadata={"seconds": seconds, "hidden_seconds": hidden_s},
        expected=required_sha256(run, path),
    )
    return StepArtifact(path=path, reused=False, seconds=time.perf_counter() - started)


def _table(
    session: StageSession, role: str, prompt_id: pa.ChunkedArray, sample: pa.ChunkedArray, requests: list[ScoreRequest]
) -> pa.Table:
    scorer = session.scorer(role)
    if role == "teacher" and session.config.needs_topk:
        found = scorer.score_topk(requests, session.config.topk.k)
        logprobs = pa.array([score.logprobs for score in found], pa.list_(pa.float32()))
        topk = from_matrices([s.topk_ids for s in found]), from_matrices([s.topk_logprobs for s in found])
        return pa.Table.from_arrays([prompt_id, sample, logprobs, *topk], schema=TEACHER_TOPK)
    logprobs = pa.array(scorer.score(requests), pa.list_(pa.float32()))
    return pa.Table.from_arrays([prompt_id, sample, logprobs], schema=TEACHER if role == "teacher" else REFERENCE)
