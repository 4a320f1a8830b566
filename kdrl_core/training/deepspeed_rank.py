"""A rank of a `DeepSpeedTrainer`: it loads the model once, then carries out one command after the other."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrl_core.ledger.names import derive_seed
from kdrl_core.logprobs.model import LogprobModel, pad_sequences
from kdrl_core.models.loading import export_weights, free_cached_memory, load_model, watch_memory
from kdrl_core.objectives.plugins import expect_code
from kdrl_core.training.extensions import use_kernel_lock
from kdrl_core.training.messages import Arrays, RankWork
from kdrl_core.training.torch_trainer import (
    TokenRecord,
    make_optimizer,
    micro_batch_loss,
    micro_batch_statistics,
    read_state,
    write_state,
)
from kdrl_core.training.zero_state import full_moments, full_weights, set_moments, set_weights, trained

if TYPE_CHECKING:
    from kdrl_core.models.lora import Adapter, FrozenAdapter

Answer = tuple[dict[str, Any], Arrays]

_COLLECTIVES = 3


class Rank:
    """Model, engine and optimiser of one rank."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        self._settings = settings
        expect_code(settings["code"])
        self._is_bfloat16 = settings["dtype"] == "bfloat16"
        self._step = 0
        torch.set_num_threads(settings["num_threads"])
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
        use_kernel_lock()
        timeout = timedelta(seconds=max(settings["start_timeout_s"], settings["step_timeout_s"]))
        deepspeed.init_distributed(verbose=False, timeout=timeout)
        self._model = self._loaded(Path(settings["model"]))
        self._adapter = None if settings["adapter"] is None else self._wrapped(self._model)
        initial = {name: weight.detach().clone() for name, weight in trained(self._model)}
        self._names = list(initial)
        optimizer, self._schedule = make_optimizer(
            self._model, settings["learning_rate"], settings["weight_decay"], settings["warmup_steps"]
        )
        self._optimizer = optimizer
        # ZeRO-3 cuts neither vectors nor an adapter, whose initial state a penalty puts in its place.
        whole = [p.numel() for p in self._model.parameters() if p.ndim == 1 or (self._adapter and p.requires_grad)]
        self._engine: Any = deepspeed.initialize(
            model=LogprobModel(
                self._model, temperature=settings["temperature"], recomputes=settings["activation_checkpointing"]
            ),
            optimizer=optimizer,
            config=engine_config(settings, whole_below=max(whole, default=0) + 1),
        )[0]
        self._device = torch.device(get_accelerator().current_device_name())
        if self._is_mixed:
            set_weights(self._engine, self._model, initial)  # the float32 weights, before bfloat16 rounded them
        _unname_buffers()
        free_cached_memory(self._device)

    @property
    def _is_mixed(self) -> bool:
        """Whether the model computes with bfloat16 weights; stage 0 has float32 weights and autocast."""
        return self._is_bfloat16 and self._settings["zero_stage"] > 0

    def state(self) -> Answer:
        """The answer to a command without results."""
        return {"step": self._step}, {}

    def answer(self, header: dict[str, Any], arrays: Arrays) -> Answer:
        """Carry out one command. Memory that torch has freed by then is the GPU's again."""
        commands: dict[str, Callable[[], Answer]] = {
            "update": lambda: self._update(RankWork.unpack(header, arrays)),
            "observe": lambda: self._observe(RankWork.unpack(header, arrays)),
            "observe initial": lambda: self._observe_frozen(RankWork.unpack(header, arrays), "initial"),
            "observe none": lambda: self._observe_frozen(RankWork.unpack(header, arrays), "none"),
            "score": lambda: self._score(RankWork.unpack(header, arrays)),
            "save": lambda: self._save(Path(header["path"])),
            "export": lambda: self._export(Path(header["path"]), header["dtype"]),
            "load": lambda: self._load(Path(header["path"])),
            "collective": lambda: self._collective(header["bytes"]),
        }
        found = commands[header["command"]]()
        free_cached_memory(self._device)
        return found

    def _update(self, work: RankWork) -> Answer:
        seed = derive_seed(self._settings["seed"], "update", self._step)
        torch.manual_seed((seed + torch.distributed.get_rank()) % 2**63)
        learning_rate = float(self._schedule.get_last_lr()[0])
        memory = watch_memory(self._device)
        metrics: list[dict[str, float]] = []
        record = TokenRecord(work.batch)
        for index in range(len(work.passes)):
            metrics.append(self._forward_backward(work, index, record))
        grad_norm = self._step_optimizer()
        answer = {"metrics": metrics, "grad_norm": grad_norm, "learning_rate": learning_rate, "step": self._step}
        answer["memory"] = memory()
        return answer, _arrays_of(record)

    @torch.no_grad()
    def _observe(self, work: RankWork) -> Answer:
        record = TokenRecord(work.batch)
        for index, rows in enumerate(work.passes):
            padded = pad_sequences([work.batch.sequences[row] for row in rows], device=self._device)
            with self._autocast():
                statistics = self._engine(padded, with_entropy=record.entropies is not None)
            if index < len(work.passes) - work.num_idle:
                record.add(statistics, rows, padded)
        return self.state()[0], _arrays_of(record)

    def _observe_frozen(self, work: RankWork, adapter: "FrozenAdapter") -> Answer:
        from deepspeed.runtime.zero import GatheredParameters

        assert self._adapter is not None  # the recipe has student.lora
        own = [*self._adapter.weights.values()]
        with GatheredParameters(own, enabled=self._settings["zero_stage"] == 3), self._adapter.replaced(adapter):
            return self._observe(work)

    def _forward_backward(self, work: RankWork, index: int, record: TokenRecord) -> dict[str, float]:
        """One micro-batch: adds gradients to the engine and token statistics to the record; returns metrics."""
        batch, rows, engine = work.batch, work.passes[index], self._engine
        is_idle = index >= len(work.passes) - work.num_idle
        is_last = index == len(work.passes) - 1
        engine.set_gradient_accumulation_boundary(is_last)
        padded = pad_sequences([batch.sequences[row] for row in rows], device=self._device)
        with self._autocast():
            statistics = micro_batch_statistics(engine, batch, rows, padded)
        loss, found = micro_batch_loss(statistics, batch, rows, padded, work.totals)
        metrics = {name: float(value) for name, value in found.items()}
        # The engine takes the mean over ranks, but the loss is a sum over them.
        scale = 0.0 if is_idle else float(torch.distributed.get_world_size())
        if is_last and not self._agree(bool(np.isfinite(list(metrics.values())).all())):
            scale = float("nan")  # then all ranks refuse the step for its gradient
        engine.backward(loss * scale, scale_wrt_gas=False)
        if is_idle:
            return {}
        record.add(statistics, rows, padded)
        return metrics

    def _score(self, work: RankWork) -> Answer:
        padded = pad_sequences(work.batch.sequences, device=self._device)
        with torch.no_grad(), self._autocast():
            logprobs = self._engine(padded).logprobs
        found = logprobs.cpu()[padded.response_mask.bool().cpu()].numpy()
        return {"step": self._step}, {"logprobs": found}

    def _autocast(self) -> torch.autocast:
        is_on = self._is_bfloat16 and not self._is_mixed
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_on)

    def _collective(self, num_bytes: int) -> Answer:
        """Sum `num_bytes` over all ranks a few times; answers with the seconds of the fastest."""
        values = torch.ones(num_bytes // 4, device=self._device)
        seconds = []
        for _ in range(_COLLECTIVES):
            started = time.perf_counter()
            torch.distributed.all_reduce(values)
            values[0].item()  # waits for the device
            seconds.append(time.perf_counter() - started)
        expected = float(torch.distributed.get_world_size()) ** _COLLECTIVES
        return {"step": self._step, "seconds": min(seconds), "is_right": bool((values == expected).all())}, {}

    def _agree(self, is_fine: bool) -> bool:
        """Whether `is_fine` holds on all ranks."""
        flag = torch.tensor(float(is_fine), device=self._device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def _step_optimizer(self) -> float:
        """Clip and step, unless the gradient is not finite; returns its norm, which then is infinite or NaN."""
        engine = self._engine
        if self._settings["zero_stage"] == 0:
            norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings["max_grad_norm"])
            if not torch.isfinite(norm):
                engine.zero_grad()
                return float(norm)
            engine.step()
        else:
            engine.step()
            norm = engine.get_global_grad_norm()
            if not engine.was_step_applied():
                return float("nan")
        self._schedule.step()
        self._step += 1
        return float(norm)

    def _export(self, path: Path, dtype: str) -> Answer:
        is_first, kind = self._is_first(), "float32" if self._adapter else dtype
        weights = full_weights(self._engine, self._model, keep=is_first, dtype=getattr(torch, kind))
        if is_first and self._adapter:
            whole = self._wrapped(self._loaded(Path(self._settings["model"])))  # ZeRO-3 has cut the frozen weights
            whole.take(weights)
            whole.export(path, dtype)
        elif is_first:
            export_weights(self._model, weights, path)
        return self.state()

    def _loaded(self, path: Path) -> Any:
        return load_model(path, trust_remote_code=self._settings["trust_remote_code"])

    def _wrapped(self, model: Any) -> "Adapter":
        from kdrl_core.models.lora import AdapterSpec

        return AdapterSpec.of(self._settings["adapter"]).wrap(model, seed=self._settings["seed"])

    def _save(self, path: Path) -> Answer:
        is_first, known = self._is_first(), {}
        if self._adapter is None:
            self._export(path, "float32")
        else:
            weights = full_weights(self._engine, self._model, keep=is_first)
            if is_first:
                self._adapter.save(path, weights)
        moments = full_moments(self._engine, self._model, keep=is_first)
        if is_first:
            groups = [
                {**{k: v for k, v in group.items() if k != "params"}, "params": list(range(len(self._names)))}
                for group in self._optimizer.param_groups
            ]
            known = write_state(
                path,
                step=self._step,
                moments={self._names.index(name): state for name, state in moments.items()},
                param_groups=groups,
                schedule=self._schedule.state_dict(),
            )
        return {**self.state()[0], "files": known}, {}

    def _load(self, path: Path) -> Answer:
        weights = self._adapter.read(path) if self._adapter else dict(self._loaded(path).named_parameters())
        set_weights(self._engine, self._model, weights)
        state, moments = read_state(path)
        set_moments(self._engine, self._model, {self._names[index]: value for index, value in moments.items()})
        for group, saved in zip(self._optimizer.param_groups, state["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self._schedule.load_state_dict(state["schedule"])
        self._step = state["step"]
        return self.state()

    def _is_first(self) -> bool:
        return int(torch.distributed.get_rank()) == 0


def _arrays_of(record: TokenRecord) -> Arrays:
    found = {"logprobs": np.concatenate(record.logprobs)}
    if record.entropies is not None:
        found["entropies"] = np.concatenate(record.entropies)
    return found


def _unname_buffers() -> None:
    """Unlink DeepSpeed's buffers in shared memory, since DeepSpeed does not. All ranks have mapped them by now; without
    a name they are freed with the last rank, however it ends."""
    torch.distributed.barrier()
    place = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{torch.distributed.get_rank()}"
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{place}"):  # noqa: S108
        buffer.unlink(missing_ok=True)


def engine_config(settings: dict[str, Any], *, whole_below: int) -> dict[str, Any]:
    """DeepSpeed's configuration. ZeRO-3 keeps parameters with fewer numbers than `whole_below` on every rank."""
    stage = settings["zero_stage"]
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = whole_below
    if settings["offload_optimizer"]:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": settings["device"] != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # batches are cut by tokens, so this is only a formality
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings["max_grad_norm"] if stage > 0 else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": settings["dtype"] == "bfloat16" and stage > 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, for the same numbers with and without offload
        "steps_per_print": None,
    }
