"""The share of a GPU that a vLLM engine may take beside a trainer that keeps its state there:

    share = 0.9 − (weights and moments of a rank + models that stay) / memory, in hundredths

A tenth is for CUDA's contexts, collectives, graphs and fragmentation. vLLM takes its whole share when it wakes, so it
must not be more than what is free then. `kdrl plan` uses the same sizes.
"""

from math import floor, prod

from kdrl_core.config import LoraConfig, ModelConfig, Recipe, resolve_path
from kdrl_core.errors import EngineError
from kdrl_core.models.devices import gpus
from kdrl_core.models.weights import stored_weights

USABLE = 0.9
"""Share of a GPU's memory that a run may use."""


def state_bytes(
    parameters: float,
    *,
    weight_bytes: int,
    has_masters: bool,
    zero_stage: int,
    ranks: int,
    trained: float | None = None,
) -> tuple[float, float]:
    """Bytes of weights and of optimiser that a rank keeps from step to step: AdamW has two float32 moments.

    Args:
        weight_bytes: of a weight in the forward pass.
        has_masters: whether there is a float32 copy of each trained weight beside it.
        trained: numbers of an adapter, which is trained in place of the parameters and lies beside them.
    """
    cut = ranks if zero_stage >= 2 else 1
    weights = weight_bytes * (parameters + (trained or 0.0)) / (ranks if zero_stage == 3 else 1)
    return weights, (12 if has_masters else 8) * (parameters if trained is None else trained) / cut


def engine_share(recipe: Recipe, *, gpu_memory: float | None = None) -> float:
    """`vllm.gpu_memory_utilization`, or what it is if the recipe leaves it open.

    Args:
        gpu_memory: bytes; None: of the smallest GPU that this process may use.

    Raises EngineError if nothing is left for an engine, or the size of the GPUs is not known."""
    if (given := recipe.vllm.gpu_memory_utilization) is not None:
        return given
    found = [gpu.memory for gpu in gpus()] if gpu_memory is None else [gpu_memory]
    if not all(found or [0]):
        raise EngineError(
            "the memory of the GPUs is not known, since nvidia-smi is not there or does not say; set "
            "vllm.gpu_memory_utilization (kdrl plan --gpu-memory SIZE says to what)"
        )
    beside = _beside(recipe)
    share = floor(100 * (USABLE - beside / min(found)) + 1e-9) / 100
    if share <= 0:
        raise EngineError(
            f"a trainer's rank and the models that stay take {beside / 1e9:.1f} GB of a GPU with "
            f"{min(found) / 1e9:.1f} GB, which leaves nothing for vLLM; kdrl plan says what helps"
        )
    return share


def _beside(recipe: Recipe) -> float:
    """Bytes on a GPU where an engine wakes: a rank's state, and models of `transformers`, which never sleep."""
    trainer, is_half = recipe.trainer, recipe.runtime.dtype == "bfloat16"
    student = _parameters(recipe.student)
    zero_stage = trainer.zero_stage if trainer.engine == "deepspeed" else 0
    lora = recipe.student.lora
    # torch's frozen base has bfloat16 weights, its adapter float32 ones
    has_masters = is_half and (zero_stage > 0 or (lora is not None and trainer.engine == "torch"))
    trained = None if lora is None else _adapter(recipe.student, lora)
    weights, optimizer = state_bytes(
        student,
        weight_bytes=2 if has_masters else 4,
        has_masters=has_masters,
        zero_stage=zero_stage,
        ranks=trainer.ranks,
        trained=trained,
    )
    width, stays = 2 if is_half else 4, 0.0
    if recipe.rollout.engine == "transformers":
        stays += width * student
    has_reference = any(recipe.stage(name).ref_beta > 0 for name in recipe.stages)
    if recipe.rollout.engine != "vllm" and has_reference and not recipe.trainer_scores("reference"):
        stays += width * student  # the initial policy
    teacher = recipe.teacher
    is_loaded = teacher is not None and teacher.server is None and teacher.engine == "transformers"
    if teacher is not None and is_loaded and not recipe.trainer_scores("teacher"):
        stays += width * _parameters(teacher)
    if trainer.engine == "torch" or recipe.rollout.engine == "transformers":
        gradients = student if trained is None else trained
        stays += 4 * gradients / (trainer.ranks if zero_stage >= 2 else 1)  # gradients, freed as the next update begins
    return weights + stays + (0.0 if trainer.offload_optimizer else optimizer)


def _parameters(model: ModelConfig) -> float:
    """Parameters of a model directory, from the headers of its weights; of a GGUF file at most, from its size."""
    path = resolve_path(model.path)
    if model.gguf_file is not None:
        return 2.0 * (path / model.gguf_file).stat().st_size  # at least 4 bits each
    return float(sum(prod(weight.shape) for weight in stored_weights(path).values()))


def _adapter(model: ModelConfig, lora: LoraConfig) -> float:
    """Numbers of an adapter; of a GGUF file 0, since they are few beside its weights."""
    from kdrl_core.models.lora import adapter_size

    if model.gguf_file is not None:
        return 0.0
    stored = stored_weights(resolve_path(model.path))
    return float(adapter_size({name: weight.shape for name, weight in stored.items()}, lora))
