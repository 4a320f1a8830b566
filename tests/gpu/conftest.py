"""Models, batches and trainers for a device. Tests run on a GPU and, where that means something, on a CPU as well."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.ranks import OPTIONS
from transformers import AutoModelForCausalLM, Qwen2Config

from kdrl_core.config import RuntimeConfig, TrainerConfig, resolve_path
from kdrl_core.models.loading import load_model, load_tokenizer
from kdrl_core.objectives import Objective
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.protocols import OptimizerSettings, UpdateBatch
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import ScoreRequest

ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU; on one: make test-gpu"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
"""For `pytest.mark.parametrize("device", …)`."""
SLOW_DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=ON_GPU)]
"""The same where a CPU takes long."""


def on_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test that says nothing on a CPU."""
    for mark in ON_GPU:
        test = mark(test)
    return test


def config_of(**changes: Any) -> Qwen2Config:
    """A small Qwen2 with grouped key-value heads."""
    values: dict[str, Any] = {
        "vocab_size": 800,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    return Qwen2Config(**{**values, **changes})


def model_of(config: Any, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same random weights for every device; their distributions are far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return model.to(device=device, dtype=dtype)


def batch_of(lengths: Sequence[tuple[int, int]], *, vocabulary: int = 20, **objective: Any) -> UpdateBatch:
    """Random responses of these prompt and response lengths, with advantages, a teacher and a KD mask."""
    rng = np.random.default_rng(0)
    sequences = [
        ScoreRequest(
            prompt_token_ids=rng.integers(2, vocabulary, prompt).tolist(),
            token_ids=rng.integers(2, vocabulary, response).tolist(),
        )
        for prompt, response in lengths
    ]
    return UpdateBatch(
        sequences=sequences,
        advantages=rng.normal(size=len(lengths)).astype(np.float32).tolist(),
        kd_weights=[float(row % 3 != 0) for row in range(len(lengths))],
        teacher_logprobs=[rng.normal(-2.0, 0.5, len(s.token_ids)).astype(np.float32) for s in sequences],
        objective=Objective(beta=0.05, group_size=2, **objective),
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(resolve_path("builtin:miniature/student"))


@pytest.fixture
def save_model(tokenizer: Any, tmp_path: Path) -> Callable[[Any], Path]:
    def save(config: Any) -> Path:
        path = tmp_path / "model"
        model_of(config, "cpu").save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


def plain(path: Path, tokenizer: Any, device: str, *, is_bfloat16: bool = False, **options: Any) -> TorchTrainer:
    """The trainer of one process over a model directory."""
    return TorchTrainer(
        load_model(path, device=device),
        tokenizer,
        OptimizerSettings(**{**OPTIONS, **options}),
        autocast_dtype=torch.bfloat16 if is_bfloat16 else None,
    )


@contextmanager
def _one_rank(path: Path, tokenizer: Any, folder: Path, device: str, *, dtype: str = "bfloat16", **options: Any) -> Any:
    trainer = DeepSpeedTrainer(
        path,
        tokenizer,
        OptimizerSettings(**{**OPTIONS, **options}),
        config=TrainerConfig(engine="deepspeed", ranks=1, zero_stage=2, start_timeout_s=300.0, step_timeout_s=120.0),
        folder=folder,
        runtime=RuntimeConfig(dtype=dtype, device=device),  # type: ignore[arg-type]
    )
    try:
        yield trainer
    finally:
        trainer.close()


def one_rank(*arguments: Any, **options: Any) -> AbstractContextManager[DeepSpeedTrainer]:
    """A DeepSpeed trainer of one rank, ZeRO-2; its process ends with the block."""
    return _one_rank(*arguments, **options)


def saved(trainer: Any, path: Path) -> Path:
    path.mkdir(parents=True)
    trainer.save(path)
    return path
