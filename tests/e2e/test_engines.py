"""A stage on vLLM and two DeepSpeed ranks, stopped and resumed, beside the same stage on transformers and torch."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from crash.tiny_run import open_tiny, train
from vllm_models import needs_vllm

from kdrl_core.boxes.completion import require_trained
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.session import close_sessions
from kdrl_core.ledger import Run, manifest_of, open_run
from kdrl_core.tables.files import load_metrics, read_table

pytestmark = [
    needs_vllm,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.usefixtures("fast_sessions"),
]
ENGINES = [
    "student.path=builtin:miniature/student-vllm",
    "stage1=null",
    "stage2.steps=3",
    "rollout.engine=vllm",
    "vllm.kv_cache_gb=0.1",
    "trainer.engine=deepspeed",
    "trainer.ranks=2",
]


@pytest.mark.slow
def test_a_stage_on_the_engines_of_a_gpu_node_is_synced_resumed_and_evaluated(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ENGINES)
    train(run, until=("stage2", 1))
    first = manifest_of(run.paths.rollouts("stage2", 0)).created_at
    train(open_run("r", artifacts=tmp_path))
    require_trained(run, "stage2")
    assert manifest_of(run.paths.rollouts("stage2", 0)).created_at == first

    rows = load_metrics(run, "stage2")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["sync/gap_mean"] < 1e-4
        assert row["sync/rebuilt"] == 0.0
        assert row["engine/logprob_gap_max"] < 1e-4  # over every sampled token: still strictly on-policy
        assert row["sync/seconds"] > 0.0
    assert set(read_table(run.paths.rollouts("stage2", 2))["engine"].to_pylist()) == {"vllm"}

    results = evaluate_model(run, "stage2")["benchmarks"]
    assert 0.0 < results["test"]["accuracy"] < 1.0
    close_sessions()


def test_engines_that_share_a_device_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and teacher by vLLM, and the update: whatever works, the other engines sleep."""
    from kdrl_core.engines.vllm_engine import VLLMEngine
    from kdrl_core.training.torch_trainer import TorchTrainer

    engines: list[VLLMEngine] = []
    awake: list[tuple[str, int]] = []
    start, run_engine, update = VLLMEngine.__init__, VLLMEngine.run, TorchTrainer.update

    def watched_start(self: VLLMEngine, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        engines.append(self)

    def watched_run(self: VLLMEngine, *args: Any) -> None:
        run_engine(self, *args)
        awake.append(("engine", sum(not each._is_asleep for each in engines)))

    def watched_update(self: TorchTrainer, batch: Any) -> Any:
        awake.append(("update", sum(not each._is_asleep for each in engines)))
        return update(self, batch)

    monkeypatch.setattr(VLLMEngine, "__init__", watched_start)
    monkeypatch.setattr(VLLMEngine, "run", watched_run)
    monkeypatch.setattr(TorchTrainer, "update", watched_update)
    teacher = ["teacher.path=builtin:miniature/student-vllm", "teacher.engine=vllm", "stage2.steps=2"]
    train(open_tiny(tmp_path, "r", [*ENGINES[:2], *ENGINES[3:5], *teacher]))
    assert len(engines) == 2
    assert set(awake) == {("engine", 1), ("update", 0)}


@pytest.mark.slow
def test_the_first_step_is_that_of_transformers_and_torch(tmp_path: Path) -> None:
    """The same prompts and rules; other random numbers draw the responses."""
    runs: list[Run] = []
    for name, engine in (("ours", ENGINES), ("plain", [*ENGINES[:3]])):
        run = open_tiny(tmp_path / name, "r", engine)
        train(run, until=("stage2", 1))
        runs.append(run)
    ours, plain = (read_table(run.paths.rollouts("stage2", 0)) for run in runs)
    for column in ("prompt_id", "sample", "prompt_token_ids", "ground_truth", "seed"):
        assert ours[column].equals(plain[column])
    close_sessions()
