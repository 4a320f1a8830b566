"""Rollouts by replicas: load shared, faults tried again, and never a response of weights that were not loaded."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replica import Replica, replica

from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.http_rollout import HTTPRolloutEngine
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.engines.sync import SyncReport, sync_weights
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.engines.weight_digest import folder_digest
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest

STUDENT = ASSETS / "miniature" / "student"
REQUESTS = [
    RolloutRequest(prompt_id=str(row), sample=0, prompt_token_ids=[2, 8 + row, 17, 9, 3], seed=2**63 + row)
    for row in range(12)
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of two steps."""
    paths = []
    for step in (1, 2):
        path = tmp_path_factory.mktemp("policies") / f"step-{step:06d}"
        model = load_model(STUDENT)
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(path)
        load_tokenizer(STUDENT).save_pretrained(path)
        paths.append(path)
    return paths


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    with replica(STUDENT) as one, replica(STUDENT) as other:
        yield [one, other]


@pytest.fixture
def engine(replicas: list[Replica]) -> Iterator[HTTPRolloutEngine]:
    made = make([server.url for server in replicas])
    yield made
    made.close()


def make(urls: list[str], **options: Any) -> HTTPRolloutEngine:
    served = {"timeout_s": 10.0, "retry_for_s": 5.0, "first_pause_s": 0.01, "concurrency": 4, **options}
    tokenizer = load_tokenizer(STUDENT)
    return HTTPRolloutEngine(
        ServedModel(urls=urls, **served),
        tokenizer,
        stop_ids=stop_token_ids(STUDENT, tokenizer),
        temperature=1.0,
        max_response_tokens=48,
        max_prompt_tokens=16,
    )


def are_of(rollouts: list[Rollout], policy: Path) -> bool:
    """Whether all responses were sampled from a policy."""
    scorer = TransformersScorer(load_model(policy), temperature=1.0, batch_tokens=2048)
    asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
    gaps = [np.abs(r.logprobs - s).max() for r, s in zip(rollouts, scorer.score(asked), strict=True)]
    return max(gaps) < 1e-4


def test_replicas_share_the_work_and_take_each_policy(
    engine: HTTPRolloutEngine, replicas: list[Replica], policies: list[Path]
) -> None:
    for policy in policies:
        engine.load_weights(policy)
        heard: list[Rollout] = []
        rollouts = engine.generate(REQUESTS, on_finished=heard.extend)
        assert [r.prompt_id for r in rollouts] == [r.prompt_id for r in REQUESTS]
        assert sorted(r.prompt_id for r in heard) == sorted(r.prompt_id for r in REQUESTS)
        assert are_of(rollouts, policy)
    assert [server.loads for server in replicas] == [[str(policy) for policy in policies]] * 2
    assert [server.num_tokens for server in replicas] == [27, 27]  # ids beyond are padding, not to be sampled
    assert min(server.num_sampled for server in replicas) > 3
    assert all(len(r.token_ids) <= 3 for r in engine.generate(REQUESTS, max_response_tokens=3))


def synced(engine: HTTPRolloutEngine, policy: Path) -> SyncReport:
    scorer = TransformersScorer(load_model(policy), temperature=1.0, batch_tokens=2048)
    return sync_weights(engine, policy, REQUESTS[:2], scorer.score, tolerance=1e-4)


def test_a_replica_that_keeps_its_weights_is_named(
    engine: HTTPRolloutEngine, replicas: list[Replica], policies: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    expected = folder_digest(policies[1], "float32")
    engine.load_weights(policies[0])
    replicas[1].ignored = 1
    report = synced(engine, policies[1])
    assert (report.rebuilt, report.digest) == (True, expected)
    assert f"replica {replicas[1].url} has float32:" in caplog.text
    assert f"replica {replicas[0].url} has float32:" not in caplog.text
    engine.load_weights(policies[0])
    replicas[1].ignored = 2
    with pytest.raises(EngineError, match=r"has other weights .* replica http.*Do replicas see the same files"):
        synced(engine, policies[1])


def test_a_replica_that_loads_other_weights_later_than_the_others_is_left_out(
    engine: HTTPRolloutEngine, replicas: list[Replica], policies: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """It was started anew in the middle of a step, and finds old files."""
    synced(engine, policies[0])
    whole = engine.generate(REQUESTS)
    replicas[1].ignored = 1
    replicas[1].faults.append("restart")
    caplog.clear()
    rollouts = engine.generate(REQUESTS)
    assert rollouts == whole
    assert are_of(rollouts, policies[0])
    assert replicas[1].ignored == 0


def test_a_server_that_samples_padding_is_named(engine: HTTPRolloutEngine, policies: list[Path]) -> None:
    engine.load_weights(policies[0])
    engine._num_tokens = 4
    with pytest.raises(EngineError, match=r"server http.* sampled the id \d+, but the tokenizer ends at 3; start"):
        engine.generate(REQUESTS)


@pytest.mark.parametrize("fault", ["503", "drop", "429"])
def test_a_fault_that_passes_costs_only_time(
    fault: str, engine: HTTPRolloutEngine, replicas: list[Replica], policies: list[Path]
) -> None:
    engine.load_weights(policies[0])
    whole = engine.generate(REQUESTS)
    replicas[0].faults.extend([fault] * 2)
    assert engine.generate(REQUESTS) == whole
    assert not replicas[0].faults


def test_a_replica_that_was_started_anew_is_noticed(
    engine: HTTPRolloutEngine, replicas: list[Replica], policies: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """It answers with its initial weights, and no request of it fails."""
    engine.load_weights(policies[0])
    whole = engine.generate(REQUESTS)
    replicas[1].faults.append("restart")
    rollouts = engine.generate(REQUESTS)
    assert not replicas[1].faults
    assert rollouts == whole
    assert are_of(rollouts, policies[0])
    assert "a replica that was started anew; sampled again" in caplog.text


def test_a_dead_replica_is_left_out_and_brought_back(policies: list[Path]) -> None:
    with replica(STUDENT) as one:
        with replica(STUDENT) as other:
            engine = make([one.url, other.url])
            engine.load_weights(policies[0])
            whole = engine.generate(REQUESTS)
        engine.load_weights(policies[1])  # one of them is gone
        assert are_of(engine.generate(REQUESTS), policies[1])
        engine.load_weights(policies[0])
        assert engine.generate(REQUESTS) == whole
        engine.close()
    with pytest.raises(EngineError, match=r"rollout server http://.* cannot be reached .*rollout\.server\.retry_for_s"):
        make([one.url], retry_for_s=0.3)


def test_replicas_that_are_always_started_anew_are_told(policies: list[Path]) -> None:
    with replica(STUDENT) as one:
        engine = make([one.url])
        engine.load_weights(policies[0])
        one.faults.extend(["restart"] * 100)
        with pytest.raises(EngineError, match="away or started anew 3 times while they sampled one step"):
            engine.generate(REQUESTS[:2])
        engine.close()


def test_a_server_that_cannot_be_told_to_load_is_named(policies: list[Path]) -> None:
    from faulty_server import faulty_server

    with faulty_server(ASSETS / "miniature" / "teacher") as plain:
        engine = make([plain.url], retry_for_s=0.5)
        with pytest.raises(EngineError, match=r"rollout server .* answered 404: .*kdrl serve starts servers that can"):
            engine.load_weights(policies[0])
        engine.close()


def test_a_probe_meets_every_replica(engine: HTTPRolloutEngine, replicas: list[Replica], policies: list[Path]) -> None:
    """Also one by one, when all are idle each time."""
    engine.load_weights(policies[0])
    for _ in range(3):
        before = [server.num_sampled for server in replicas]
        for request in REQUESTS[:2]:
            engine.generate([request])
        assert [server.num_sampled for server in replicas] == [number + 1 for number in before]


def test_replicas_that_share_their_gpus_sleep_between_phases(replicas: list[Replica], policies: list[Path]) -> None:
    engine = make([server.url for server in replicas], sleep=True)
    engine.load_weights(policies[0])
    first = engine.generate(REQUESTS)
    for _ in range(2):
        engine.sleep()
    assert [server.is_asleep for server in replicas] == [True, True]
    assert [r.token_ids for r in engine.generate(REQUESTS)] == [r.token_ids for r in first]
    assert [server.told.count("kdrl_wake") for server in replicas] == [1, 1]
    engine.sleep()
    engine.load_weights(policies[1])  # which wakes them
    assert are_of(engine.generate(REQUESTS), policies[1])
    assert [server.told.count("kdrl_wake") for server in replicas] == [1, 1]
    engine.close()


def test_replicas_that_share_their_gpus_are_left_asleep(replicas: list[Replica], policies: list[Path]) -> None:
    """By an evaluation, say, after which another model has their GPUs; one that is gone costs no time."""
    engine = make([server.url for server in replicas], sleep=True, retry_for_s=60.0)
    engine.load_weights(policies[0])
    replicas[0].close()
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 5
    assert replicas[1].is_asleep


def test_replicas_with_gpus_of_their_own_are_left_awake(engine: HTTPRolloutEngine, replicas: list[Replica]) -> None:
    engine.sleep()
    assert [server.told for server in replicas] == [[], []]


def test_a_replica_that_was_away_when_the_others_fell_asleep_is_used_again(policies: list[Path]) -> None:
    with replica(STUDENT) as one:
        other = replica(STUDENT)
        gone = other.__enter__()
        engine = make([one.url, gone.url], sleep=True)
        engine.load_weights(policies[0])
        other.__exit__(None, None, None)
        engine.sleep()
        assert one.is_asleep
        assert are_of(engine.generate(REQUESTS[:4]), policies[0])
        engine.close()


@pytest.mark.parametrize("what", ["load", "sleep"])
def test_replicas_are_told_at_once(replicas: list[Replica], policies: list[Path], what: str) -> None:
    """One after the other they would wait for each other in vain."""
    engine = make([server.url for server in replicas], sleep=True, retry_for_s=0.0)
    met = threading.Barrier(2, timeout=5.0)
    for server in replicas:
        server.met = met
    if what == "load":
        engine.load_weights(policies[0])
    else:
        engine.sleep()
    assert [server.told for server in replicas] == [[f"kdrl_{what}"]] * 2
    engine.close()  # at once as well
    assert [server.told[-1] for server in replicas] == ["kdrl_sleep"] * 2
