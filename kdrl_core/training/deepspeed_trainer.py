"""The trainer on DeepSpeed: N rank processes that are started once and get their commands step by step.

Each rank computes its share of the micro-batches. Every loss is divided by the global token count, so the gradient is
the same as in one process. Checkpoints have the format of `TorchTrainer`: each trainer can resume from the other's,
with any number of ranks and any ZeRO stage.

If a rank raises an error, dies, or exceeds the time limit, an EngineError is raised and all ranks end.
"""

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdrl_core.config import RuntimeConfig, TrainerConfig
from kdrl_core.errors import EngineError
from kdrl_core.ledger import ConstantFiles, Listing
from kdrl_core.logprobs.model import batches_of
from kdrl_core.models.prepare import companions
from kdrl_core.objectives.plugins import expected_code
from kdrl_core.training.messages import RankWork, pack, ragged, share_of
from kdrl_core.training.protocols import PER_TOKEN, Float32s, OptimizerSettings, StepStats, UpdateBatch
from kdrl_core.training.rank_group import RankGroup, Reply
from kdrl_core.training.torch_trainer import refuse_not_finite, require_state, totals_of
from kdrl_core.types import ScoreRequest

if TYPE_CHECKING:
    from kdrl_core.models.lora import AdapterSpec, FrozenAdapter


class DeepSpeedTrainer:
    """`Trainer` over a model directory. The ranks are processes of their own; each loads the model once.

    Args:
        tokenizer: written beside exported weights.
        settings: of the optimiser; `micro_batch_tokens` is per rank.
        folder: for the ranks' log and their key; made anew.
        adapter: of the model, trained alone; None: all weights are.
        runtime: device, torch threads of a rank, and `dtype`: `bfloat16` for bfloat16 weights beside float32 masters
            (stage 0: autocast), or `float32`.

    Raises:
        EngineError: the ranks cannot be started, or are not ready in time.
    """

    saves_aside = True

    def __init__(
        self,
        model: Path,
        tokenizer: Any,
        settings: OptimizerSettings,
        *,
        config: TrainerConfig,
        folder: Path,
        runtime: RuntimeConfig,
        trust_remote_code: bool = False,
        adapter: "AdapterSpec | None" = None,
    ) -> None:
        self._companions = ConstantFiles(companions(model, tokenizer))
        self._config = config
        self._micro_batch_tokens = settings.micro_batch_tokens
        self._step = 0
        self._has_adapter = adapter is not None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        told = {
            **asdict(settings),
            "model": str(model.resolve()),
            "dtype": runtime.dtype,
            "device": runtime.device,
            "num_threads": runtime.num_threads,
            "trust_remote_code": trust_remote_code,
            "adapter": None if adapter is None else adapter.told(),
            "code": expected_code(),
            "zero_stage": config.zero_stage,
            "activation_checkpointing": config.activation_checkpointing,
            "offload_optimizer": config.offload_optimizer,
            "start_timeout_s": config.start_timeout_s,
            "step_timeout_s": config.step_timeout_s,
        }
        self._ranks = RankGroup(
            folder,
            told,
            num_ranks=config.ranks,
            hostfile=config.hostfile,
            master_port=config.master_port,
            environment={"DS_ACCELERATOR": runtime.device, "OMP_NUM_THREADS": str(runtime.num_threads)},
            start_timeout_s=config.start_timeout_s,
        )

    @property
    def step(self) -> int:
        return self._step

    def update(self, batch: UpdateBatch) -> StepStats:
        """Raises EngineError if loss or gradient norm is not finite (nothing is changed), or if a rank failed."""
        replies, found = self._pass(batch, "update")
        metrics = _sum_metrics(replies)
        grad_norm = replies[0].header["grad_norm"]
        refuse_not_finite(self._step, metrics, grad_norm)
        self._step = replies[0].header["step"]
        optim = {"optim/grad_norm": grad_norm, "optim/learning_rate": replies[0].header["learning_rate"]}
        return replace(found, metrics={**metrics, **optim, **most_memory(replies)})

    def observe(self, batch: UpdateBatch) -> StepStats:
        bare: dict[str, Any] = dict.fromkeys(PER_TOKEN)  # what the loss alone reads is not sent
        return self._pass(replace(batch, **bare), "observe")[1]

    def _pass(self, batch: UpdateBatch, command: str) -> tuple[list[Reply], StepStats]:
        """Have the ranks go through a batch, each through its share. Returns their answers, and the statistics of all
        tokens, without metrics."""
        batches = batches_of(batch.sequences, max_tokens=self._micro_batch_tokens)
        dealt, num_idle = deal_batches(batches, ranks=self._config.ranks)
        totals = totals_of(batch)
        shares = [
            share_of(batch, passes, num_idle=idle, totals=totals) for passes, idle in zip(dealt, num_idle, strict=True)
        ]
        replies = self._ranks.ask(
            [share.pack({"command": command}) for share in shares],
            doing=f"{command} at step {self._step}",
            timeout_s=self._config.step_timeout_s,
        )
        found: dict[str, list[Float32s]] = {
            name: _gather(name, replies, shares, dealt, len(batch.sequences))
            for name in ("logprobs", "entropies")
            if name in replies[0].arrays
        }
        return replies, StepStats(metrics={}, logprobs=found["logprobs"], entropies=found.get("entropies"))

    def score(self, sequences: Sequence[ScoreRequest]) -> list[Float32s]:
        """Every rank scores all of the sequences."""
        zeros = [0.0] * len(sequences)
        batch = UpdateBatch(sequences=sequences, advantages=zeros, kd_weights=zeros)
        work = RankWork(batch=batch, passes=[range(len(sequences))], num_idle=0, totals=totals_of(batch))
        replies = self._ranks.ask(
            [work.pack({"command": "score"})] * self._config.ranks,
            doing=f"scoring at step {self._step}",
            timeout_s=self._config.step_timeout_s,
        )
        lengths = np.array([len(each.token_ids) for each in sequences], np.int64)
        return list(ragged(replies[0].arrays["logprobs"], lengths))

    def score_frozen(self, sequences: Sequence[ScoreRequest], adapter: "FrozenAdapter") -> list[Float32s]:
        zeros = [0.0] * len(sequences)
        batch = UpdateBatch(sequences=sequences, advantages=zeros, kd_weights=zeros)
        return list(self._pass(batch, f"observe {adapter}")[1].logprobs)

    def save(self, path: Path) -> Listing:
        files: Listing = self._command("save", path)["files"]
        return files if self._has_adapter else files | self._companions.write(path)

    def load(self, path: Path) -> None:
        """Raises RunError if there is no trainer state."""
        require_state(path)
        self._step = self._command("load", path)["step"]

    def export_hf(self, path: Path, dtype: str = "float32") -> Listing:
        self._command("export", path, dtype=dtype)
        return self._companions.write(path)

    def collective_s(self, num_bytes: int, *, timeout_s: float) -> float:
        """Seconds of the slowest rank to add up `num_bytes` over all ranks. Raises EngineError if a sum is wrong."""
        message = pack({"command": "collective", "bytes": num_bytes})
        replies = self._ranks.ask([message] * self._config.ranks, doing="a collective", timeout_s=timeout_s)
        if not all(reply.header["is_right"] for reply in replies):
            raise EngineError("a collective of the ranks gave a wrong sum; test the links between these GPUs")
        return max(float(reply.header["seconds"]) for reply in replies)

    def close(self) -> None:
        self._ranks.close()

    def _command(self, command: str, path: Path, **more: str) -> dict[str, Any]:
        """Have all ranks carry out a command; returns the first one's answer."""
        message = pack({"command": command, "path": str(path.resolve()), **more})
        replies = self._ranks.ask(
            [message] * self._config.ranks, doing=f"{command} {path}", timeout_s=self._config.step_timeout_s
        )
        steps = {reply.header["step"] for reply in replies}
        if len(steps) > 1:
            raise EngineError(f"{command} {path}: the ranks are at different steps {sorted(steps)}; resume the run")
        return replies[0].header


def deal_batches(batches: Sequence[Sequence[int]], *, ranks: int) -> tuple[list[list[list[int]]], list[int]]:
    """Deal micro-batches to ranks: each gets the same number of passes, as sharded training needs.

    Neighbours in `batches` have similar lengths and run at the same time. If the number of batches is not a multiple of
    the ranks, those with most rows are halved. If there are too few rows, ranks repeat a row as an idle pass.

    Returns:
        the passes of every rank, and how many of its last passes are idle.
    """
    parts = [list(rows) for rows in batches]
    while len(parts) % ranks:
        longest = max(range(len(parts)), key=lambda index: (len(parts[index]), index))
        if len(parts[longest]) == 1:
            break
        rows = parts[longest]
        parts[longest : longest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    missing = -len(parts) % ranks
    dealt = [parts[rank::ranks] for rank in range(ranks)]
    idle = [int(rank >= ranks - missing) for rank in range(ranks)]
    for rank in range(ranks):
        dealt[rank] += [parts[0]] * idle[rank]
    return dealt, idle


def _sum_metrics(replies: list[Reply]) -> dict[str, float]:
    """Metrics of the step: the micro-batches' metrics, added in the same order as in one process."""
    metrics: defaultdict[str, float] = defaultdict(float)
    for micro_batches in zip(*(reply.header["metrics"] for reply in replies), strict=True):
        for micro_batch in micro_batches:
            for name, value in micro_batch.items():
                metrics[name] += value
    return dict(metrics)


def most_memory(replies: list[Reply]) -> dict[str, float]:
    """`watch_memory` of the rank that needed most, by metric; empty on CPUs."""
    return {name: max(reply.header["memory"][name] for reply in replies) for name in replies[0].header["memory"]}


def _gather(
    name: str, replies: list[Reply], shares: list[RankWork], dealt: list[list[list[int]]], num_rows: int
) -> list[Float32s]:
    """The ranks' values `name` of every response, in the order of the batch."""
    gathered: list[Float32s] = [np.empty(0, np.float32)] * num_rows
    for reply, share, passes in zip(replies, shares, dealt, strict=True):
        real = passes[: len(passes) - share.num_idle]
        rows = [row for part in real for row in part]
        lengths = np.array([len(share.batch.sequences[index].token_ids) for index in range(len(rows))], np.int64)
        for row, values in zip(rows, ragged(reply.arrays[name], lengths), strict=True):
            gathered[row] = values
    return gathered
