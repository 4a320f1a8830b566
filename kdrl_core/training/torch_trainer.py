"""The trainer in plain torch, one process: AdamW, gradient clipping, micro-batches by token budget. Below it is
what all trainers share: the loss of one micro-batch from a step's plain records, the optimiser, and the state.

The step's global counts come first (`totals_of`). Every micro-batch's loss is divided by them before it is
back-propagated, so that losses, gradients and metrics of micro-batches add up to the whole step's, however it is cut.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from kdrl_core.config.paths import read_json
from kdrl_core.errors import EngineError, RunError
from kdrl_core.ledger import ConstantFiles, Listing, derive_seed, listing, write_hashed
from kdrl_core.logprobs.chunked import TokenStatistics
from kdrl_core.logprobs.model import LogprobModel, PaddedBatch, pad_sequences, pad_values, padded_batches
from kdrl_core.models.loading import free_cached_memory, watch_memory
from kdrl_core.models.prepare import FullWeights, companions, float32_file
from kdrl_core.objectives import Responses, Totals, joint_loss, sft_loss
from kdrl_core.objectives.kinds import AGGREGATIONS
from kdrl_core.training.protocols import STATE_DIR, Float32s, OptimizerSettings, StepStats, UpdateBatch
from kdrl_core.types import ScoreRequest

if TYPE_CHECKING:
    from kdrl_core.models.lora import Adapter, FrozenAdapter

_TENSORS = "optimizer.safetensors"
_STATE = "state.json"


class TorchTrainer:
    """`Trainer` over a transformers model in float32, trained in place. `tokenizer` is written beside exported weights.

    Args:
        adapter: of the model, trained alone; None: all weights are.
        autocast_dtype: run the forward pass in this dtype (bfloat16 on GPUs); None keeps float32.
        activation_checkpointing: recompute activations in the backward pass.
    """

    saves_aside = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: OptimizerSettings,
        *,
        adapter: "Adapter | None" = None,
        autocast_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        self._model, self._adapter = model, adapter
        self._weights = adapter or FullWeights(model)
        self._logprobs = LogprobModel(model, temperature=settings.temperature, recomputes=activation_checkpointing)
        self._companions = ConstantFiles(companions(model.name_or_path, tokenizer))
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
        """Raises EngineError if loss or gradient norm is not finite; nothing is changed then."""
        torch.manual_seed(derive_seed(self._settings.seed, "update", self._step) % 2**63)
        memory = watch_memory(self._model.device)
        totals = totals_of(batch)
        metrics: defaultdict[str, float] = defaultdict(float)
        record = TokenRecord(batch)
        self._optimizer.zero_grad(set_to_none=True)
        for rows, padded in self._micro_batches(batch):
            with self._autocast():
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
        optim = {"optim/grad_norm": grad_norm, "optim/learning_rate": learning_rate}
        measured = memory()
        if measured:  # on a GPU: the engines use it until the next update
            self._optimizer.zero_grad(set_to_none=True)
        free_cached_memory(self._model.device)
        return StepStats(
            metrics={**metrics, **optim, **measured},
            logprobs=record.logprobs,
            entropies=record.entropies,
        )

    @torch.no_grad()
    def observe(self, batch: UpdateBatch) -> StepStats:
        record = TokenRecord(batch)
        for rows, padded in self._micro_batches(batch):
            with self._autocast():
                statistics = self._logprobs(padded, with_entropy=record.entropies is not None)
            record.add(statistics, rows, padded)
        free_cached_memory(self._model.device)
        return StepStats(metrics={}, logprobs=record.logprobs, entropies=record.entropies)

    @torch.no_grad()
    def score(self, sequences: Sequence[ScoreRequest]) -> list[Float32s]:
        padded = pad_sequences(sequences, device=self._model.device)
        with self._autocast():
            logprobs = self._logprobs(padded).logprobs.cpu().numpy()
        free_cached_memory(self._model.device)
        return [row[: len(each.token_ids)] for row, each in zip(logprobs, sequences, strict=True)]

    def score_frozen(self, sequences: Sequence[ScoreRequest], adapter: "FrozenAdapter") -> list[Float32s]:
        assert self._adapter is not None  # the recipe has student.lora
        with self._adapter.replaced(adapter):
            return self.score(sequences)

    def save(self, path: Path) -> Listing:
        """Tensors as safetensors, the rest as JSON: equal states give equal bytes, which pickle does not guarantee."""
        self._weights.save(path)
        optimizer = self._optimizer.state_dict()
        known = write_state(
            path,
            step=self._step,
            moments=optimizer["state"],
            param_groups=optimizer["param_groups"],
            schedule=self._schedule.state_dict(),
        )
        return known if self._adapter else known | self._companions.write(path)

    def load(self, path: Path) -> None:
        """Raises RunError if there is no trainer state."""
        require_state(path)
        self._weights.load(path)
        state, moments = read_state(path)
        self._optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        self._schedule.load_state_dict(state["schedule"])
        self._step = state["step"]
        free_cached_memory(self._model.device)

    def export_hf(self, path: Path, dtype: str = "float32") -> Listing:
        self._weights.export(path, dtype)
        return self._companions.write(path)

    def close(self) -> None:
        """Does nothing: the model is freed with this object."""

    def _autocast(self) -> torch.autocast:
        dtype = self._autocast_dtype
        return torch.autocast(self._model.device.type, dtype=dtype, enabled=dtype is not None)

    def _micro_batches(self, batch: UpdateBatch) -> Iterator[tuple[list[int], PaddedBatch]]:
        return padded_batches(batch.sequences, max_tokens=self._settings.micro_batch_tokens, device=self._model.device)


# --- the loss of a micro-batch ----------------------------------------------------------------------------------------


def totals_of(batch: UpdateBatch) -> Totals:
    """Counts over all responses of an optimiser step that take part in its loss.

    Raises ValueError if groups are needed and the group size is missing or does not divide B.
    """
    lengths = np.array([len(sequence.token_ids) for sequence in batch.sequences])
    if batch.loss_mask is not None:
        lengths = np.where(batch.loss_mask, lengths, 0)
    objective, size = batch.objective, batch.objective.group_size
    group_tokens = num_groups = None
    if objective.variant.loss == "joint" and AGGREGATIONS[objective.aggregation].needs_groups:
        if size is None or len(lengths) % size:
            raise ValueError(f"group_size: expected a divisor of the {len(lengths)} responses, given {size}")
        group_tokens = lengths.reshape(-1, size).sum(1).repeat(size).tolist()
        num_groups = max(1.0, float((lengths.reshape(-1, size).sum(1) > 0).sum()))  # those with a response in the loss
    return Totals(
        tokens=max(int(lengths.sum()), 1),  # none where all responses are left out: the loss is 0 then
        responses=len(lengths),
        kd_tokens=int(lengths[np.asarray(batch.kd_weights) != 0].sum()),
        num_groups=num_groups,
        group_tokens=group_tokens,
    )


def micro_batch_statistics(
    model: Callable[..., TokenStatistics], batch: UpdateBatch, rows: Sequence[int], padded: PaddedBatch
) -> TokenStatistics:
    """The policy's statistics for the loss of the responses `rows` of a step: one forward pass of a `LogprobModel` (or
    its engine). `padded` has those responses as tensors, in order. Raises ValueError as `LogprobModel.forward`.
    """
    is_joint = batch.objective.variant.loss == "joint"
    if batch.topk_ids is None or not is_joint:
        return model(padded, with_entropy=is_joint)
    ids, logprobs = (pad_values(values, rows, padded) for values in (batch.topk_ids, batch.topk_logprobs))
    return model(padded, ids, logprobs, with_entropy=True, floor=batch.objective.topk_floor)


def micro_batch_loss(
    statistics: TokenStatistics, batch: UpdateBatch, rows: Sequence[int], padded: PaddedBatch, totals: Totals
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the responses `rows` of a step, to be back-propagated and summed over micro-batches; its metrics.

    Args:
        statistics: [b, T] of `micro_batch_statistics`, with gradient.
        padded: the responses `rows` as tensors, in order.
        totals: `totals_of(batch)`.

    Raises:
        ValueError: as `joint_loss` and `sft_loss`.
    """
    if batch.objective.variant.loss == "likelihood":
        how = batch.objective.aggregation
        loss = sft_loss(statistics.logprobs, padded.response_mask, aggregation=how, totals=totals)
        return loss, {"loss/total": loss.detach(), "loss/sft": loss.detach()}

    def of_rows(values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([values[row] for row in rows], device=statistics.logprobs.device)

    mask = padded.response_mask
    responses = Responses(
        logprobs=statistics.logprobs,
        response_mask=mask if batch.loss_mask is None else mask * of_rows(batch.loss_mask)[:, None],
        advantages=of_rows(batch.advantages),
        kd_weights=of_rows(batch.kd_weights),
        teacher_logprobs=pad_values(batch.teacher_logprobs, rows, padded),
        topk=statistics.topk_kl,
        old_logprobs=pad_values(batch.old_logprobs, rows, padded),
        rollout_logprobs=pad_values(batch.rollout_logprobs, rows, padded),
        ref_logprobs=pad_values(batch.ref_logprobs, rows, padded),
        entropy=statistics.entropy,
    )
    if totals.group_tokens is not None:
        totals = replace(totals, group_tokens=of_rows(cast("Sequence[int]", totals.group_tokens)))
    return joint_loss(responses, batch.objective, totals)


class TokenRecord:
    """Logprobs and entropies of all response tokens of a step, or of a rank's share of it."""

    def __init__(self, batch: UpdateBatch) -> None:
        empty = np.empty(0, np.float32)
        self.logprobs: list[Float32s] = [empty] * len(batch.sequences)
        """[T_i] per response."""
        has_entropies = batch.objective.variant.loss == "joint"
        self.entropies: list[Float32s] | None = [empty] * len(batch.sequences) if has_entropies else None
        """[T_i] per response, in nats; None for SFT."""

    def add(self, statistics: TokenStatistics, rows: Sequence[int], padded: PaddedBatch) -> None:
        """Keep the statistics of the responses `rows`, which `padded` has in this order."""
        mask = padded.response_mask.bool().cpu()
        _scatter(statistics.logprobs, mask, rows, self.logprobs)
        if self.entropies is not None:
            assert statistics.entropy is not None  # micro_batch_statistics
            _scatter(statistics.entropy, mask, rows, self.entropies)


def _scatter(values: torch.Tensor, mask: torch.Tensor, rows: Sequence[int], into: list[Float32s]) -> None:
    """Write each row of `values` [b, T], without padding, to its place."""
    found = values.detach().cpu()
    for index, row in enumerate(rows):
        into[row] = found[index][mask[index]].numpy()


def refuse_not_finite(step: int, metrics: Mapping[str, float], grad_norm: float) -> None:
    """Raise EngineError if a step's metrics or gradient norm are not finite; called before anything is changed."""
    if np.isfinite([grad_norm, *metrics.values()]).all():
        return
    own = [name for name, value in metrics.items() if name.startswith("term/") and not np.isfinite(value)]
    remedy = f"correct {' and '.join(own)}" if own else "training has diverged, lower learning_rate or beta"
    raise EngineError(
        f"optimiser step {step}: {', '.join(own) or 'loss ' + str(metrics.get('loss/total'))} or gradient norm "
        f"{grad_norm} is not finite; {remedy}"
    )


# --- optimiser and state ----------------------------------------------------------------------------------------------


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, warmup_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the weights that are not frozen and its linear warm-up, the same for every trainer. The first update
    has a learning rate above 0."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
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
) -> Listing:
    """Write trainer state into the checkpoint `path`, which holds the weights, the same for every trainer. Returns a
    listing of both.

    `moments` is Adam's state of each parameter, by its position among those that are trained.
    """
    known = listing(path, durable=True)
    tensors = {f"{index}.{name}": value for index, state in moments.items() for name, value in state.items()}
    state = {"step": step, "param_groups": param_groups, "schedule": schedule}
    (path / STATE_DIR).mkdir()
    known[f"{STATE_DIR}/{_TENSORS}"] = write_hashed(path / STATE_DIR / _TENSORS, float32_file(tensors))
    (path / STATE_DIR / _STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")
    return known


def read_state(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]]]:
    """State and moments that `write_state` wrote."""
    moments: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in load_file(path / STATE_DIR / _TENSORS).items():
        index, _, name = key.partition(".")
        moments[int(index)][name] = value
    return read_json(path / STATE_DIR / _STATE), dict(moments)


def require_state(path: Path) -> None:
    """Raise RunError if `path` has no trainer state."""
    if not (path / STATE_DIR / _STATE).is_file():
        raise RunError(f"{path} has no {STATE_DIR}/{_STATE}: it is a model, not a checkpoint of this trainer")
