"""The trainer in plain torch, one process: AdamW, gradient clipping, micro-batches by token budget.

Every micro-batch's loss is divided by the step's global token count before it is back-propagated, so that the gradient
does not depend on how the step is cut.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kdrl_core.errors import RunError
from kdrl_core.ledger import ConstantFiles, Listing, derive_seed
from kdrl_core.logprobs.model import LogprobModel, pad_sequences, token_budget_batches
from kdrl_core.models.loading import load_weights_into
from kdrl_core.training.losses import (
    TokenRecord,
    micro_batch_loss,
    micro_batch_statistics,
    refuse_not_finite,
    totals_of,
)
from kdrl_core.training.protocols import STATE_DIR, Float32s, OptimizerSettings, StepStats, UpdateBatch
from kdrl_core.types import ScoreRequest

_TENSORS = "optimizer.safetensors"
_STATE = "state.json"


class TorchTrainer:
    """`Trainer` over a transformers model in float32, trained in place. `tokenizer` is written beside exported weights.

    Args:
        autocast_dtype: run the forward pass in this dtype (bfloat16 on GPUs); None keeps float32.
        activation_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: OptimizerSettings,
        *,
        autocast_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        self._model = model.train()
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._logprobs = LogprobModel(model, temperature=settings.temperature)
        self._tokenizer_files = ConstantFiles(lambda folder: tokenizer.save_pretrained(folder))
        self._settings = settings
        self._autocast_dtype = autocast_dtype
        self._step = 0
        self._optimizer, self._schedule = make_optimizer(
            model, settings.learning_rate, settings.weight_decay, settings.warmup_steps
        )

    @property
    def step(self) -> int:
        return self._step

    def update(self, batch: UpdateBatch) -> StepStats:
        """Raises EngineError if loss or gradient norm is not finite; nothing was changed."""
        torch.manual_seed(derive_seed(self._settings.seed, "update", self._step) % 2**63)
        totals = totals_of(batch)
        metrics: defaultdict[str, float] = defaultdict(float)
        record = TokenRecord(batch)
        self._optimizer.zero_grad(set_to_none=True)
        lengths = [(len(s.prompt_token_ids), len(s.token_ids)) for s in batch.sequences]
        for rows in token_budget_batches(lengths, max_tokens=self._settings.micro_batch_tokens):
            padded = pad_sequences([batch.sequences[row] for row in rows], device=self._model.device)
            with torch.autocast(
                self._model.device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
            ):
                statistics = micro_batch_statistics(self._logprobs, batch, rows, padded)
            loss, micro_metrics = micro_batch_loss(statistics, batch, rows, padded, totals)
            loss.backward()
            for name, value in micro_metrics.items():
                metrics[name] += float(value)
            record.add(statistics, rows, padded)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm))
        refuse_not_finite(self._step, metrics, grad_norm)
        learning_rate = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._schedule.step()
        self._step += 1
        return StepStats(
            metrics={**metrics, "optim/grad_norm": grad_norm, "optim/learning_rate": learning_rate},
            logprobs=record.logprobs,
            entropies=record.entropies,
        )

    @torch.no_grad()
    def score(self, sequences: Sequence[ScoreRequest]) -> list[Float32s]:
        self._model.eval()
        padded = pad_sequences(sequences, device=self._model.device)
        with torch.autocast(
            self._model.device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
        ):
            logprobs = self._logprobs(padded).logprobs.cpu().numpy()
        self._model.train()
        return [row[: len(each.token_ids)] for row, each in zip(logprobs, sequences, strict=True)]

    def save(self, path: Path) -> Listing:
        """Tensors as safetensors, the rest as JSON: equal states are equal bytes, which pickle does not promise."""
        known = self.export_hf(path)
        optimizer = self._optimizer.state_dict()
        write_state(
            path,
            step=self._step,
            moments=optimizer["state"],
            param_groups=optimizer["param_groups"],
            schedule=self._schedule.state_dict(),
        )
        return known

    def load(self, path: Path) -> None:
        """Raises RunError if there is no trainer state."""
        require_state(path)
        load_weights_into(self._model, path)
        state, moments = read_state(path)
        self._optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        self._schedule.load_state_dict(state["schedule"])
        self._step = state["step"]

    def export_hf(self, path: Path) -> Listing:
        self._model.save_pretrained(path)
        return self._tokenizer_files.write(path)

    def close(self) -> None:
        """Nothing to end: the model goes with this object."""


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, warmup_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its linear warm-up, the same for every trainer. The first update already moves."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1))
    )


def write_state(
    path: Path,
    *,
    step: int,
    moments: Mapping[int, Mapping[str, torch.Tensor]],
    param_groups: list[dict[str, Any]],
    schedule: dict[str, Any],
) -> None:
    """Write trainer state into the checkpoint `path`, the same for every trainer.

    `moments` is Adam's state of each parameter, by its place among the model's parameters.
    """
    tensors = {f"{index}.{name}": value for index, state in moments.items() for name, value in state.items()}
    state = {"step": step, "param_groups": param_groups, "schedule": schedule}
    (path / STATE_DIR).mkdir()
    save_file(tensors, path / STATE_DIR / _TENSORS)
    (path / STATE_DIR / _STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")


def read_state(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]]]:
    """State and moments that `write_state` wrote."""
    moments: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in load_file(path / STATE_DIR / _TENSORS).items():
        index, _, name = key.partition(".")
        moments[int(index)][name] = value
    return json.loads((path / STATE_DIR / _STATE).read_text()), dict(moments)


def require_state(path: Path) -> None:
    """Raise RunError if `path` has no trainer state."""
    if not (path / STATE_DIR / _STATE).is_file():
        raise RunError(f"{path} has no {STATE_DIR}/{_STATE}: it is a model, not a checkpoint of this trainer")
