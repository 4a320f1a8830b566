"""The engines that a recipe asks for: one that samples responses, and scorers in this process."""

from pathlib import Path
from typing import Any

from kdrl_core.config import EngineName, LocalEngine, ModelConfig, Recipe
from kdrl_core.engines.protocols import RolloutEngine, TeacherScorer
from kdrl_core.engines.server_pool import served_model
from kdrl_core.models.gpu_share import USABLE, engine_share
from kdrl_core.models.loading import load_model, stop_token_ids


def rollout_engine(
    recipe: Recipe,
    model: Path,
    config: ModelConfig,
    tokenizer: Any,
    *,
    temperature: float,
    max_prompt_tokens: int,
    max_response_tokens: int,
    engine: EngineName | None = None,
) -> RolloutEngine:
    """The engine that samples from the model directory `model`. Replicas are told to load it.

    Args:
        temperature: of sampling; 0 is greedy.
        max_prompt_tokens, max_response_tokens: of the requests to come.
        engine: in place of the recipe's `rollout.engine`.

    Raises:
        EngineError, ModelError: the engine cannot be started or reached, or the model cannot be loaded.
    """
    engine = engine or recipe.rollout.engine
    common: dict[str, Any] = {"temperature": temperature, "max_response_tokens": max_response_tokens}
    if engine == "transformers":
        from kdrl_core.engines.transformers_engines import TransformersRolloutEngine

        loaded = _load(recipe, model, config)
        batch_size = recipe.runtime.rollout_batch_size
        stop_ids = stop_token_ids(loaded, tokenizer)
        return TransformersRolloutEngine(loaded, tokenizer, stop_ids=stop_ids, batch_size=batch_size, **common)
    stop_ids = stop_token_ids(model, tokenizer)
    if engine == "vllm":
        from kdrl_core.engines.vllm_rollout import VLLMRolloutEngine

        settings = _vllm_settings(recipe, config, max_model_len=max_prompt_tokens + max_response_tokens)
        return VLLMRolloutEngine(model, tokenizer, settings, stop_ids=stop_ids, **common)
    from kdrl_core.engines.http_rollout import HTTPRolloutEngine

    assert recipe.rollout.server is not None  # the recipe was validated
    served = served_model(recipe.rollout.server)
    pool = HTTPRolloutEngine(served, tokenizer, stop_ids=stop_ids, max_prompt_tokens=max_prompt_tokens, **common)
    try:
        pool.load_weights(model)
    except BaseException:
        pool.close()
        raise
    return pool


def local_scorer(
    recipe: Recipe,
    model: Path,
    config: ModelConfig,
    *,
    engine: LocalEngine,
    temperature: float,
    max_tokens: int,
    num_tokens: int,
    max_topk: int = 0,
) -> TeacherScorer:
    """The scorer of the frozen model directory `model`, in this process, at the student's temperature.

    Args:
        max_tokens: of the longest prompt and response together.
        num_tokens: ids from here on are padding of the embedding.
        max_topk: most tokens that `score_topk` will be asked for.

    Raises:
        EngineError, ModelError: as `rollout_engine`.
    """
    if engine == "vllm":
        from kdrl_core.engines.vllm_scorer import VLLMScorer

        settings = _vllm_settings(recipe, config, max_model_len=max_tokens, temperature=temperature)
        return VLLMScorer(model, settings, num_tokens=num_tokens, max_topk=max_topk)
    from kdrl_core.engines.transformers_engines import TransformersScorer

    return TransformersScorer(
        _load(recipe, model, config),
        temperature=temperature,
        batch_tokens=recipe.runtime.score_batch_tokens,
        num_tokens=num_tokens,
    )


def _vllm_settings(recipe: Recipe, config: ModelConfig, *, max_model_len: int, temperature: float = 1.0) -> Any:
    from kdrl_core.engines.vllm_engine import VLLMSettings

    runtime = recipe.runtime
    return VLLMSettings(
        max_model_len=max_model_len,
        temperature=temperature,
        dtype=runtime.dtype,
        device=runtime.device,
        num_threads=runtime.num_threads,
        trust_remote_code=config.trust_remote_code,
        own_process=runtime.device != "cpu",
        gpu_memory_utilization=engine_share(recipe) if runtime.device != "cpu" else USABLE,
        **recipe.vllm.model_dump(exclude={"replicas", "batch_invariant", "gpu_memory_utilization"}),
    )


def _load(recipe: Recipe, path: Path, config: ModelConfig) -> Any:
    dtype, device = recipe.runtime.dtype, recipe.runtime.device
    return load_model(path, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)
