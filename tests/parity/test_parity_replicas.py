"""Real vLLM replicas: started by the documented `kdrl serve`, and by a run itself. Their logprobs are those of
transformers after every sync."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from crash.tiny_run import open_tiny, train
from documented import option, serving, settings
from vllm_models import needs_vllm, requests, small_model, tokenizer

from kdrl_core.config import ModelConfig, load_recipe
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.engines.http_rollout import HTTPRolloutEngine
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.evaluation.evaluate import evaluate_plan
from kdrl_core.evaluation.evaluation_plan import EvaluationOptions, plan_evaluation
from kdrl_core.models.loading import load_model, stop_token_ids
from kdrl_core.tables.files import load_metrics, read_table
from kdrl_core.types import ScoreRequest

pytestmark = [pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies with tied embeddings, which vLLM reloads wrongly by itself, and with sampling of their own, which it
    would take up by itself."""
    folder = tmp_path_factory.mktemp("models")
    found = [small_model(folder / str(seed), tokenizer(), tied=True, seed=seed) for seed in (1, 2)]
    for model in found:
        path = model / "generation_config.json"
        own = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**own, "do_sample": True, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.2}))
        config = json.loads((path := model / "config.json").read_text())
        path.write_text(json.dumps({**config, "max_position_embeddings": 131_072}))  # as R1-Distill's
    return found


def documented_command() -> tuple[list[str], list[str]]:
    """Words of `kdrl serve` in docs/engines.md, and of the run that uses it."""
    ((_, (serve, run)),) = [(page, block) for page, block in serving() if page == "engines"]
    return serve, run


@pytest.fixture(scope="module")
def urls(models: list[Path]) -> Iterator[list[str]]:
    port = free_ports(2)
    serve, _ = documented_command()
    words = [str(models[0]) if word == "DIR" else word for word in serve[1:]]
    options = ["--dtype", "float32", "--cpu", "--kv-cache-gb", "0.1", "--asleep", "--port", str(port)]
    program = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words, *options], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    urls = [f"http://127.0.0.1:{port + number}/v1" for number in range(int(option(serve, "--replicas")))]
    try:
        wait_for(urls)
        yield urls
        program.send_signal(signal.SIGINT)
        program.wait(timeout=30)
    finally:
        program.kill()
        program.wait()
    assert not any(_answers(url) for url in urls)


def test_the_documented_replicas_serve_every_phase_of_the_documented_run(urls: list[str], models: list[Path]) -> None:
    """At the real lengths of paper-1.5b: both stages, and evaluations at a context of 32,768 tokens."""
    _, run = documented_command()
    assert len(urls) == run[-1].count("http")
    listed = ",".join(f"'{url}'" for url in urls)
    recipe = load_recipe(option(run, "--recipe"), [*settings(run), f"rollout.server.urls=[{listed}]"])
    context = recipe.evaluation.max_context_tokens
    lengths = {(s.max_prompt_tokens, s.max_response_tokens) for s in map(recipe.stage, recipe.stages)}
    assert {*lengths, (96, context - 96)} == {(1024, 8192), (1024, 20480), (96, 32672)}
    for prompt, response in {*lengths, (96, context - 96)}:
        engine = rollout_engine(
            recipe,
            models[0],
            ModelConfig(path=str(models[0])),
            tokenizer(),
            temperature=0.6,
            max_prompt_tokens=prompt,
            max_response_tokens=response,
        )
        long = replace(requests()[0], prompt_token_ids=requests()[0].prompt_token_ids * prompt)
        fitting = replace(long, prompt_token_ids=long.prompt_token_ids[:prompt])
        (rollout,) = engine.generate([fitting], max_response_tokens=4)
        assert len(rollout.token_ids) == 4
        engine.close()


def free_ports(count: int) -> int:
    """The first of so many ports that nobody listens on."""
    while True:
        with ExitStack() as taken:
            first = taken.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + count):
                    taken.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return int(first)


def wait_for(urls: list[str]) -> None:
    deadline = time.monotonic() + 400
    for url in urls:
        while not _answers(url):
            assert time.monotonic() < deadline, "the replicas did not start"
            time.sleep(1)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", trust_env=False).is_success
    except httpx.TransportError:
        return False


def connect(urls: list[str], model: Path, *, retry_for_s: float = 60.0, sleep: bool = False) -> HTTPRolloutEngine:
    return HTTPRolloutEngine(
        ServedModel(urls=urls, timeout_s=60.0, retry_for_s=retry_for_s, sleep=sleep),
        tokenizer(),
        stop_ids=stop_token_ids(model, tokenizer()),
        temperature=0.8,
        max_response_tokens=48,
        max_prompt_tokens=40,
    )


def test_replicas_sample_from_the_policy_that_they_were_told_to_load(urls: list[str], models: list[Path]) -> None:
    engine = connect(urls, models[0])
    for model in (models[1], models[0]):
        engine.load_weights(model)
        rollouts = engine.generate(requests())
        asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
        theirs = TransformersScorer(load_model(model), temperature=0.8, batch_tokens=4096).score(asked)
        gap = max(np.abs(r.logprobs - t).max() for r, t in zip(rollouts, theirs, strict=True))
        print(f"replicas: largest logprob gap {gap:.1e}")
        assert gap < 1e-4
        assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in rollouts]
    engine.close()


def test_a_replica_is_evaluated_as_its_directory(urls: list[str], models: list[Path], tmp_path: Path) -> None:
    """Over chat completions, greedy; the endpoint's limit is shorter, since questions count with their bytes there."""
    engine = connect(urls, models[0])
    engine.load_weights(models[0])  # wakes them
    engine.close()
    recipe = load_recipe("miniature", ["evaluation.temperature=0"])
    texts = {}
    for model in (str(models[0]), urls[0]):
        (found,) = evaluate_plan(
            plan_evaluation(recipe, model, EvaluationOptions(benchmarks=["test"], samples=1, max_problems=12)), tmp_path
        )
        texts[model] = read_table(found.folder / "responses.parquet").to_pylist()
    for ours, theirs in zip(texts[urls[0]], texts[str(models[0])], strict=True):
        assert theirs["response"].startswith(ours["response"].removeprefix("<think>"))
        assert ours["length"] == min(theirs["length"], 96 - 64 - max(len(row["question"]) for row in texts[urls[0]]))


def test_replicas_sleep_and_wake_as_they_were(urls: list[str], models: list[Path]) -> None:
    engine = connect(urls, models[0], sleep=True)
    engine.load_weights(models[0])
    first = engine.generate(requests())
    before = resident_mib()
    engine.sleep()
    assert before - resident_mib() > 1  # of what was used of two caches, since these were started asleep
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in first]
    engine.close()


def resident_mib() -> float:
    """Of the processes that this one has started."""
    return sum(process.memory_info().rss for process in psutil.Process().children(recursive=True)) / 2**20


def test_a_replica_that_is_killed_is_started_anew_and_gets_the_weights(urls: list[str], models: list[Path]) -> None:
    engine = connect(urls, models[0], retry_for_s=120.0)
    engine.load_weights(models[1])
    first = engine.generate(requests())
    port = urls[1].removesuffix("/v1").rpartition(":")[2]
    (victim,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.cmdline()[-2:] == ["--port", port] and process.cmdline()[1] == "-m"  # not its guard
    ]
    family = victim.children(recursive=True)
    victim.kill()
    gone, _ = psutil.wait_procs(family, timeout=20)
    assert len(gone) == len(family) > 0  # else they would keep the GPU from the next one
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in first]
    wait_for([urls[1]])
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in first]
    engine.close()


@pytest.mark.usefixtures("fast_sessions")
def test_a_stage_is_trained_on_their_rollouts(urls: list[str], models: list[Path], tmp_path: Path) -> None:
    listed = ",".join(f"'{url}'" for url in urls)
    overrides = [
        f"student.path={models[0]}",
        "stage1=null",
        "stage2.steps=3",
        "rollout.engine=server",
        f"rollout.server.urls=[{listed}]",
    ]
    run = open_tiny(tmp_path, "r", overrides)
    train(run)
    for row in load_metrics(run, "stage2"):
        assert row["sync/gap_max"] < 1e-4
        assert row["engine/logprob_gap_max"] < 1e-4
    assert set(read_table(run.paths.rollouts("stage2", 2))["engine"].to_pylist()) == {"server"}


def test_a_run_starts_its_replicas_survives_their_deaths_and_leaves_none(models: list[Path], tmp_path: Path) -> None:
    """Two of the student and two of the teacher; one of each is killed, and at last the run itself."""
    script = Path(__file__).parents[1] / "replica_run.py"
    program = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), *map(str, models)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        found = json.loads(program.stdout.readline())
        print(json.dumps({name: value for name, value in found.items() if name != "said"}))
        family = psutil.Process(program.pid).children(recursive=True)
    finally:
        program.kill()
        program.wait()
    for name in ("rollout_gap", "score_gap", "topk_gap", "score_gap_without_one", "score_gap_of_the_new_one"):
        assert found[name] < 1e-4, name
    assert found["same_responses"]
    assert found["is_stopped_while_others_work"]
    assert found["topk_same"] > 0.99  # near ties may change places
    ended = [text for text in found["said"] if text.startswith("replica ")]
    assert len(ended) == 2
    assert all("ended with signal SIGKILL" in text for text in ended)
    assert not found["key_in_arguments"]
    assert {url.split(":")[1] for url in found["urls"]} == {"//127.0.0.1"}
    roles = ("student", "teacher")
    assert found["logs"] == [f".scratch/servers-stage2-{role}/replica-{n}.log" for role in roles for n in (1, 2)]
    gone, _ = psutil.wait_procs(family, timeout=20)
    assert len(gone) == len(family) >= 4 * 3  # a guard, a server and its engine each
