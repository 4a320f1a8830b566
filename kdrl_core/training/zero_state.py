"""Read and write weights and Adam moments of a DeepSpeed engine by parameter, whole and in float32.

ZeRO keeps them flattened, padded and cut across ranks, differently for every stage and number of ranks. By parameter
they are the same as in plain torch, so a checkpoint depends on neither. DeepSpeed's own format depends on both, is a
pickle, and is overwritten in place.

Every function here is called by all ranks at the same time. The optimiser is the Adam of torch that DeepSpeed wraps.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that the optimiser has: those that are not frozen."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def full_weights(
    engine: Any, model: torch.nn.Module, *, keep: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The float32 weights of `trained` by name, cast to `dtype`, on the CPU; empty without `keep`, so that only one
    rank needs the memory."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in trained(model):
        value = parameter if _is_plain(engine) else safe_get_full_fp32_param(parameter)
        if keep:
            weights[name] = value.detach().to(dtype).to("cpu", copy=True)
    return weights


@torch.no_grad()
def full_moments(engine: Any, model: torch.nn.Module, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Adam's state by parameter name, as torch has it; empty before the first update."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step = _step_count(engine)
    if step is None:
        return {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in trained(model):
        found: dict[str, Tensor] = {}
        for key in MOMENTS:
            if _is_plain(engine):
                value = engine.optimizer.state[parameter][key]
            else:
                value = safe_get_full_optimizer_state(parameter, key)
            if keep:
                found[key] = value.detach().to("cpu", torch.float32, copy=True)
        if keep:
            moments[name] = {"step": step.detach().to("cpu", copy=True), **found}
    return moments


@torch.no_grad()
def set_weights(engine: Any, model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set float32 weights, in the engine's own copy and in the model that computes."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in trained(model):
        value = weights[name]
        if _is_plain(engine):
            parameter.copy_(value)
        elif _is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, _own_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
    _refresh_model(engine)


@torch.no_grad()
def set_moments(engine: Any, model: torch.nn.Module, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Set Adam's state by parameter name; empty is the state before the first update."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not moments:
        for state in _adam(engine).state.values():  # in place: ZeRO has its own references to them
            for value in state.values():
                value.zero_()
        return
    step = next(iter(moments.values()))["step"]
    for flat in _flat_parameters(engine, model):
        state = _adam(engine).state[flat]
        state["step"] = step.clone()
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(flat)
    if not _is_plain(engine) and hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in trained(model):
        for key in MOMENTS:
            value = moments[name][key]
            if _is_plain(engine):
                _adam(engine).state[parameter][key].copy_(value)
            elif _is_partitioned(parameter):
                safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


def _is_plain(engine: Any) -> bool:
    """Stage 0 in float32: the model's parameters are what the optimiser updates."""
    return int(engine.zero_optimization_stage()) == 0


def _is_partitioned(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _adam(engine: Any) -> torch.optim.Optimizer:
    adam: torch.optim.Optimizer = engine.basic_optimizer
    return adam


def _flat_parameters(engine: Any, model: torch.nn.Module) -> Iterator[Tensor]:
    """What the optimiser updates on this rank: parameters, or the flat float32 pieces of ZeRO."""
    if _is_plain(engine):
        yield from (parameter for _, parameter in trained(model))
    elif hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        yield from engine.optimizer.fp32_partitioned_groups_flat
    else:
        yield from engine.optimizer.single_partition_of_fp32_groups


def _step_count(engine: Any) -> Tensor | None:
    """Number of updates in Adam's moments; None before the first."""
    state = next(iter(_adam(engine).state.values()), None)
    return state["step"] if state and state["step"] > 0 else None


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This rank's piece of a parameter that ZeRO-3 has cut, padded at the end."""
    size = parameter.ds_tensor.numel()
    part = torch.zeros(size, dtype=torch.float32, device=parameter.ds_tensor.device)
    start = torch.distributed.get_rank() * size
    own = value.flatten()[start : start + size]
    part[: len(own)] = own
    return part


def _refresh_model(engine: Any) -> None:
    """Copy the float32 weights into the model that computes, as DeepSpeed does after a step."""
    zero = engine.optimizer
    if _is_plain(engine):
        return
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for index in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
