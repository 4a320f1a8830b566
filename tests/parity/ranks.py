"""DeepSpeed trainers beside the plain one, and batches with every term of the loss."""

import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from kdrl_core.config import RuntimeConfig, TrainerConfig
from kdrl_core.models.loading import load_model
from kdrl_core.models.lora import AdapterSpec
from kdrl_core.objectives import Objective, Responses
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.protocols import STATE_DIR, OptimizerSettings, StepStats, Trainer, UpdateBatch
from kdrl_core.training.rank_group import WORKER
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import ScoreRequest

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed: pip install -e .[deepspeed]"
)

OPTIONS: dict[str, Any] = {
    "temperature": 0.7,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "micro_batch_tokens": 90,
    "seed": 3,
}
VOCABULARY = 20


def make_batch(
    seed: int, *, num_groups: int = 4, group_size: int = 3, unknown_token_in: int | None = None
) -> UpdateBatch:
    """Ragged random responses with advantages, a KD mask, a teacher, a reference policy and the entropy bonus.

    One of them may hold a token that no model has.
    """
    rng = np.random.default_rng(seed)
    count = num_groups * group_size
    sequences = [
        ScoreRequest(
            prompt_token_ids=rng.integers(2, VOCABULARY, rng.integers(2, 12)).tolist(),
            token_ids=rng.integers(2, VOCABULARY, rng.integers(1, 25)).tolist(),
        )
        for _ in range(count)
    ]
    if unknown_token_in is not None:
        sequence = sequences[unknown_token_in]
        sequences[unknown_token_in] = replace(sequence, token_ids=[10**6, *sequence.token_ids[1:]])
    return UpdateBatch(
        sequences=sequences,
        advantages=rng.normal(size=count).astype(np.float32).tolist(),
        kd_weights=[float(row % 3 != 0) for row in range(count)],
        teacher_logprobs=[rng.normal(-2.0, 0.5, len(s.token_ids)).astype(np.float32) for s in sequences],
        ref_logprobs=[rng.normal(-2.0, 0.5, len(s.token_ids)).astype(np.float32) for s in sequences],
        objective=Objective(beta=0.05, ref_beta=0.01, entropy_coef=0.01, group_size=group_size),
    )


def with_topk(batch: UpdateBatch, k: int = 3) -> UpdateBatch:
    """The same with the Top-K loss, the mean group by group and importance weights."""
    rng = np.random.default_rng(k)
    lengths = [len(s.token_ids) for s in batch.sequences]
    ids = [np.stack([rng.permutation(VOCABULARY)[:k] for _ in range(n)]).astype(np.int32) for n in lengths]
    logprobs = [np.log(rng.dirichlet(np.ones(k + 1), n)[:, :k]).astype(np.float32) for n in lengths]
    return replace(
        with_objective(batch, kl_estimator="topk", topk_floor=-12.0, aggregation="group_mean", tis_cap=2.0),
        topk_ids=ids,
        topk_logprobs=logprobs,
        rollout_logprobs=batch.ref_logprobs,
    )


def square(responses: Responses) -> torch.Tensor:
    """A term of one's own, `parity.ranks:square`."""
    return responses.logprobs.square()


def with_objective(batch: UpdateBatch, **changes: Any) -> UpdateBatch:
    """The same batch with other values of its objective."""
    return replace(batch, objective=replace(batch.objective, **changes))


def plain_trainer(model: Path, tokenizer: Any, **options: Any) -> TorchTrainer:
    return TorchTrainer(load_model(model), tokenizer, OptimizerSettings(**{**OPTIONS, **options}))


@contextmanager
def ranks(
    model: Path,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: str = "float32",
    adapter: AdapterSpec | None = None,
    **config: Any,
) -> Iterator[DeepSpeedTrainer]:
    """A trainer whose ranks end with the block; none may be left of them."""
    values = {"ranks": 2, "zero_stage": 2, "start_timeout_s": 300.0, "step_timeout_s": 60.0, **config}
    trainer = DeepSpeedTrainer(
        model,
        tokenizer,
        OptimizerSettings(**OPTIONS),
        config=TrainerConfig(engine="deepspeed", **values),
        folder=folder,
        runtime=RuntimeConfig(dtype=dtype),  # type: ignore[arg-type]
        adapter=adapter,
    )
    try:
        yield trainer
    finally:
        trainer.close()
        deadline = time.monotonic() + (10.0 if config.get("hostfile") else 0.0)  # other hosts hear of it
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes_of(folder) == []


def processes_of(folder: Path) -> list[psutil.Process]:
    """Guard, launcher and ranks of a group."""
    return [p for p in _processes() if any(str(folder) in part for part in p.info["cmdline"] or ())]


def rank_processes(folder: Path) -> list[psutil.Process]:
    """The ranks alone."""
    found = [p for p in processes_of(folder) if p.info["cmdline"][-2:-1] == [WORKER]]
    return [p for p in found if "deepspeed.launcher.launch" not in p.info["cmdline"]]


def _processes() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]


def assert_rounded(exported: Path, saved: Path) -> None:
    """An export in bfloat16 has the bits that an engine makes of the float32 weights, and says so."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported, saved))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(torch.bfloat16)) for name in theirs)
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    assert not (exported / STATE_DIR).exists()
    assert (exported / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()


def train(trainer: Trainer, batches: Sequence[UpdateBatch]) -> list[StepStats]:
    return [trainer.update(batch) for batch in batches]


def gaps(actual: Sequence[StepStats], expected: Sequence[StepStats]) -> dict[str, float]:
    """Largest differences over all steps, relative to values beyond 1: loss, gradient norm, any metric, logprobs,
    entropies (of none on both sides, 0)."""
    assert all(a.metrics.keys() == e.metrics.keys() for a, e in zip(actual, expected, strict=True))
    largest: defaultdict[str, float] = defaultdict(float)
    for ours, theirs in zip(actual, expected, strict=True):
        for name, value in theirs.metrics.items():
            largest[name] = max(largest[name], abs(ours.metrics[name] - value) / max(1.0, abs(value)))
    return {
        "loss": largest["loss/total"],
        "grad_norm": largest["optim/grad_norm"],
        "metrics": max(largest.values()),
        "logprobs": max(_gap(a.logprobs, e.logprobs) for a, e in zip(actual, expected, strict=True)),
        "entropies": max(_gap(a.entropies, e.entropies) for a, e in zip(actual, expected, strict=True)),
    }


def _gap(actual: Sequence[Any] | None, expected: Sequence[Any] | None) -> float:
    assert (actual is None) == (expected is None)
    return max(
        (
            float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))))
            for ours, theirs in zip(actual or [], expected or [], strict=True)
        ),
        default=0.0,
    )
