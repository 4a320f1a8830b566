"""A program that samples and scores with replicas that it starts itself, kills one of each role, and then waits.

It prints a line of JSON with what it found, and ends only when it is killed.
"""

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from crash.tiny_run import open_tiny
from vllm_models import requests, tokenizer

from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.session import stage_session
from kdrl_core.engines.http_rollout import HTTPRolloutEngine
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.models.loading import load_model
from kdrl_core.types import Rollout, ScoreRequest

TEMPERATURE = 0.7


def main(folder: Path, student: Path, teacher: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kdrl").addHandler(handler)
    overrides = [
        f"student.path={student}",
        f"teacher={{path: {teacher}, engine: vllm}}",
        "stage1=null",
        f"stage2.temperature={TEMPERATURE}",
        "stage2.max_response_tokens=48",
        "stage2.kl_estimator=topk",
        "stage2.topk.k=5",
        "rollout.engine=vllm",
        "vllm={replicas: 2, kv_cache_gb: 0.1, max_num_seqs: 64}",
    ]
    run = open_tiny(folder, "own", overrides)
    filter_run(run)
    session = stage_session(run.paths.root, "stage2")
    found: dict[str, object] = {}

    def child(url: str) -> psutil.Process:
        """The server at a URL, below its guard."""
        port = url.removesuffix("/v1").rpartition(":")[2]
        return next(
            p for p in psutil.Process().children(recursive=True) if p.cmdline()[1:2] == ["-m"] and port in p.cmdline()
        )

    began = time.monotonic()
    sampler = session.sampler_at(0, requests()).engine
    found["start_s"] = time.monotonic() - began
    assert isinstance(sampler, HTTPRolloutEngine)
    assert sampler._pool._own is not None
    first = sampler.generate(requests())
    killed: list[psutil.Process] = []

    def kill(_: object) -> None:
        if not killed:
            killed.append(child(sampler._pool._own.urls[0]))  # type: ignore[union-attr]
            killed[0].kill()

    again = sampler.generate(requests(), on_finished=kill)
    found["same_responses"] = [r.token_ids for r in again] == [r.token_ids for r in first]
    found["rollout_gap"] = gap([r.logprobs for r in first], theirs_of(student, first))

    scorer = session.scorer("teacher")
    assert isinstance(scorer, HTTPScorer)
    group = scorer._pool._own
    assert group is not None
    found["is_stopped_while_others_work"] = sampler._pool._own._kept[0]._process.poll() is not None
    asked = as_requests(first)
    expected = theirs_of(teacher, first)
    found["score_gap"] = gap(scorer.score(asked), expected)
    best = scorer.score_topk(asked, 5)
    local = TransformersScorer(
        load_model(teacher), temperature=TEMPERATURE, batch_tokens=4096, num_tokens=len(tokenizer())
    ).score_topk(asked, 5)
    found["topk_gap"] = gap([b.topk_logprobs for b in best], [t.topk_logprobs for t in local])
    found["topk_same"] = float(np.mean([(b.topk_ids == t.topk_ids).mean() for b, t in zip(best, local, strict=True)]))

    ended = group._kept[1]._process
    (victim := child(group.urls[1])).kill()
    victim.wait()
    found["score_gap_without_one"] = gap(scorer.score(asked), expected)
    deadline = time.monotonic() + 300
    # It still counts as answering until its end is seen.
    while group._kept[1]._process is ended or not all(each.answers for each in group._kept):
        assert time.monotonic() < deadline, "the replica is not started again"
        time.sleep(0.1)
    server = scorer._pool.servers[1]  # started again, and never told a temperature
    found["score_gap_of_the_new_one"] = gap(
        [scorer._score_one(request, 0, server)[0] for request in asked[:8]], expected[:8]
    )
    found["said"] = said
    found["key_in_arguments"] = any(
        group.key in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)
    )
    found["logs"] = sorted(p.relative_to(run.paths.root).as_posix() for p in run.paths.scratch.rglob("replica-*.log"))
    found["urls"] = [*group.urls, *sampler._pool._own.urls]
    print(json.dumps(found), flush=True)
    time.sleep(600)


def as_requests(rollouts: list[Rollout]) -> list[ScoreRequest]:
    return [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]


def theirs_of(model: Path, rollouts: list[Rollout]) -> list[np.ndarray]:
    scorer = TransformersScorer(load_model(model), temperature=TEMPERATURE, batch_tokens=4096)
    return scorer.score(as_requests(rollouts))


def gap(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(np.asarray(o) - t).max()) for o, t in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
