"""The engines that a recipe asks for: one that samples responses, and scorers of models that are here.

With `vllm.replicas` above 1, `vllm` is that many servers, which are started here and end with the engine.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any

from kdrl_core.config import EngineName, LocalEngine, ModelConfig, Recipe
from kdrl_core.engines.protocols import RolloutEngine, TeacherScorer
from kdrl_core.engines.server_client import ServedModel, served_model
from kdrl_core.engines.server_pool import START_S
from kdrl_core.models.gpu_share import USABLE, engine_share
from kdrl_core.models.loading import load_model, read_config, stop_token_ids

_REPLICA_S = 7_200.0
"""Limit of a request to a replica of our own: it may generate a response of tens of thousands of tokens."""
_SCORES_EACH = 32
_SPARE_TOPK = 4
_logger = logging.getLogger("kdrl")


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
    logs: Path | None = None,
) -> RolloutEngine:
    """The engine that samples from the model directory `model`. Replicas are told to load it.

    Args:
        temperature: of sampling; 0 is greedy.
        max_prompt_tokens, max_response_tokens: of the requests to come.
        engine: in place of the recipe's `rollout.engine`.
        logs: folder for the logs of servers that are started here; None: a temporary one.

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
        settings = _vllm_settings(recipe, config, max_model_len=max_prompt_tokens + max_response_tokens)
        if recipe.vllm.replicas == 1:
            from kdrl_core.engines.vllm_rollout import VLLMRolloutEngine

            return VLLMRolloutEngine(model, tokenizer, settings, stop_ids=stop_ids, **common)
        served = _started(recipe, model, settings, logs, requests_each=settings.max_num_seqs)
    else:
        assert recipe.rollout.server is not None  # the recipe was validated
        served = served_model(recipe.rollout.server)
    from kdrl_core.engines.http_rollout import HTTPRolloutEngine

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
    logs: Path | None = None,
) -> TeacherScorer:
    """The scorer of the frozen model directory `model`, at the student's temperature.

    Args:
        max_tokens: of the longest prompt and response together.
        num_tokens: ids from here on are padding of the embedding.
        max_topk: most tokens that `score_topk` will be asked for.
        logs: as for `rollout_engine`.

    Raises:
        EngineError, ModelError: as `rollout_engine`.
    """
    if engine == "vllm" and recipe.vllm.replicas > 1:
        from kdrl_core.engines.http_scorer import HTTPScorer

        padding = max(0, int(read_config(model)["vocab_size"]) - num_tokens)
        most = max_topk + max(padding, _SPARE_TOPK) if max_topk else 0
        settings = _vllm_settings(recipe, config, max_model_len=max_tokens + 1, samples=False, max_logprobs=most)
        served = _started(recipe, model, settings, logs, requests_each=min(settings.max_num_seqs, _SCORES_EACH))
        limits = {"num_tokens": num_tokens, "max_tokens": max_tokens, "num_padding": padding}
        return HTTPScorer(served, temperature=temperature, **limits)
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


def _started(recipe: Recipe, model: Path, settings: Any, logs: Path | None, *, requests_each: int) -> ServedModel:
    """Servers of a model that answer, and sleep if the recipe's engines do. Whoever uses them ends them.

    Args:
        requests_each: requests in flight for each server.
    """
    from kdrl_core.engines.server_command import replicas_of
    from kdrl_core.engines.server_processes import ReplicaGroup, free_ports, new_key
    from kdrl_core.models.devices import visible_devices

    count, key, devices = recipe.vllm.replicas, new_key(), None
    if settings.device != "cpu":
        needed_for = "vllm.replicas × vllm.tensor_parallel"
        devices = visible_devices(count * settings.tensor_parallel, needed_for=needed_for)
    if logs is None:
        logs = Path(tempfile.mkdtemp(prefix="kdrl-servers-"))
    logs.mkdir(parents=True, exist_ok=True)
    replicas = replicas_of(
        model,
        settings,
        ports=free_ports(count),
        devices=devices,
        key=key,
        logs=logs,
    )
    _logger.info("starting %d replicas of %s; their logs are in %s", count, model.name, logs)
    group = ReplicaGroup(replicas, say=_logger.warning, key=key, asleep=settings.sleep, starts=1)
    group.wait_until_ready(START_S)
    return ServedModel(
        urls=group.urls,
        api_key=key,
        timeout_s=_REPLICA_S,
        concurrency=count * requests_each,
        sleep=settings.sleep,
        own=group,
    )


def _vllm_settings(recipe: Recipe, config: ModelConfig, *, max_model_len: int, **options: Any) -> Any:
    from kdrl_core.engines.vllm_engine import VLLMSettings

    runtime = recipe.runtime
    return VLLMSettings(
        max_model_len=max_model_len,
        dtype=runtime.dtype,
        device=runtime.device,
        num_threads=runtime.num_threads,
        trust_remote_code=config.trust_remote_code,
        own_process=runtime.device != "cpu",
        gpu_memory_utilization=engine_share(recipe) if runtime.device != "cpu" else USABLE,
        **recipe.vllm.model_dump(exclude={"replicas", "gpu_memory_utilization"}),
        **options,
    )


def _load(recipe: Recipe, path: Path, config: ModelConfig) -> Any:
    dtype, device = recipe.runtime.dtype, recipe.runtime.device
    return load_model(path, dtype=dtype, device=device, trust_remote_code=config.trust_remote_code)
