"""kdrl's methods of a vLLM worker: load a checkpoint and make vLLM use it, say which one is loaded, sleep.

vLLM loads the class by name (`--worker-extension-cls kdrl_core.engines.vllm_extension.KdrlWorker`) and calls its
methods through `collective_rpc`. They return dicts, since the server turns anything else into text.
"""

import ctypes
import logging
import mmap
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdrl_core.engines.weight_digest import folder_digest, model_digest

_logger = logging.getLogger("kdrl")

_INCARNATION = uuid.uuid4().hex
"""Identity of this process. A restarted worker has another identity, and its initial weights."""


class KdrlWorker:
    """Mixed into vLLM's worker class."""

    def kdrl_load(self, path: str, num_tokens: int | None = None) -> dict[str, str]:
        """Wake up and load the weights of the Hugging Face model directory `path`; with `num_tokens` also
        `kdrl_sample_below`. Returns `kdrl_state`."""
        worker: Any = self
        self.kdrl_wake()
        is_comparable = self._kdrl_is_comparable()  # looks at the weights of the start
        worker.kdrl_digest = ""
        worker.reload_weights(weights_path=path)
        renew_output_layer(worker.model_runner.get_model())
        if num_tokens is not None:
            self.kdrl_sample_below(num_tokens)
        worker.kdrl_weights = path
        worker.kdrl_digest = self._kdrl_computed() if is_comparable else ""
        return self.kdrl_state()

    def kdrl_look(self) -> dict[str, str]:
        """Wake up and compute the digest of the weights anew. Returns `kdrl_state`."""
        worker: Any = self
        self.kdrl_wake()
        worker.kdrl_digest = self._kdrl_computed() if self._kdrl_is_comparable() else ""
        return self.kdrl_state()

    def _kdrl_is_comparable(self) -> bool:
        """Whether a digest of this model can be compared with that of a folder: after vLLM's own start they were equal.
        They are not for weights that vLLM changes or leaves out as it loads them, or that it was not given as a
        folder of safetensors."""
        worker: Any = self
        if not hasattr(self, "kdrl_is_comparable"):
            config = worker.vllm_config.model_config
            try:
                of_folder = folder_digest(Path(config.model), str(config.dtype).removeprefix("torch."))
                worker.kdrl_is_comparable = self._kdrl_computed() == of_folder
            except Exception as error:
                _logger.warning("no digest of %s can be computed: %s", config.model, error)
                worker.kdrl_is_comparable = False
        return bool(worker.kdrl_is_comparable)

    def _kdrl_computed(self) -> str:
        worker: Any = self
        config = worker.vllm_config
        return model_digest(
            worker.model_runner.get_model(),
            config.model_config.dtype,
            rank=worker.rank % config.parallel_config.tensor_parallel_size,
            num_ranks=config.parallel_config.tensor_parallel_size,
        )

    def kdrl_sample_below(self, num_tokens: int) -> None:
        """Sample no id from `num_tokens` on: padding of the embedding, which the tokenizer does not have."""
        worker: Any = self
        sample_below(worker.model_runner.sampler, num_tokens)

    def kdrl_scale_prompt_logprobs(self, temperature: float) -> None:
        """Make `prompt_logprobs` use softmax(logits / temperature). Sampling has its own temperature. A model's
        own scale of its logits stays (Granite, Cohere)."""
        worker: Any = self
        processor = worker.model_runner.get_model().logits_processor
        if not hasattr(processor, "kdrl_scale"):
            processor.kdrl_scale = processor.scale
        processor.scale = processor.kdrl_scale / temperature

    def kdrl_sleep(self) -> dict[str, str]:
        """Free memory until `kdrl_wake`. On a GPU it frees the key-value cache and moves the weights to the host's
        memory; on a CPU it frees the cache alone. No request may be in flight. Returns `kdrl_state`."""
        worker: Any = self
        if not getattr(self, "kdrl_is_asleep", False):
            if worker.vllm_config.model_config.enable_sleep_mode:
                worker.sleep(level=1)
            else:
                release_pages(worker.model_runner.kv_caches)
            worker.kdrl_is_asleep = True
        return self.kdrl_state()

    def kdrl_wake(self) -> dict[str, str]:
        """Undo `kdrl_sleep`. Returns `kdrl_state`."""
        worker: Any = self
        if getattr(self, "kdrl_is_asleep", False):
            if worker.vllm_config.model_config.enable_sleep_mode:
                worker.wake_up()
            worker.kdrl_is_asleep = False
        return self.kdrl_state()

    def kdrl_state(self) -> dict[str, str]:
        """`weights`, the directory that was loaded last (empty: the initial weights), `incarnation`, and `digest` of
        the loaded weights (`weight_digest`; empty if it was not computed, or cannot be compared with a folder's)."""
        return {
            "weights": getattr(self, "kdrl_weights", ""),
            "incarnation": _INCARNATION,
            "digest": getattr(self, "kdrl_digest", ""),
        }


def sample_below(sampler: Any, num_tokens: int) -> None:
    """Have a sampler of vLLM draw ids below `num_tokens` alone. Logprobs stay those of the whole softmax, as the
    trainer's; vLLM's own limits on tokens would change them.

    vLLM has two samplers; which one runs depends on the device and on its settings.
    """
    sampler.kdrl_num_tokens = num_tokens
    if hasattr(sampler, "kdrl_is_limited"):
        return
    sampler.kdrl_is_limited = True

    def without_padding(logits: Any) -> Any:
        if sampler.kdrl_num_tokens >= logits.shape[-1]:
            return logits
        masked = logits.clone()
        masked[:, sampler.kdrl_num_tokens :] = float("-inf")
        return masked

    if hasattr(sampler, "_sample_random"):  # model runner V2: logits are divided by T here, and greedy is a case of it
        draw = sampler._sample_random

        def sample(logits: Any, *rest: Any) -> tuple[Any, Any]:
            return draw(without_padding(logits), *rest)[0], logits

        sampler._sample_random = sample
        return
    random, greedy = sampler.topk_topp_sampler.forward, sampler.greedy_sample

    def sample_random(logits: Any, *rest: Any) -> tuple[Any, Any]:
        masked = without_padding(logits)
        tokens, logprobs = random(masked, *rest)
        return tokens, logprobs if masked is logits else sampler.compute_logprobs(logits)

    sampler.topk_topp_sampler.forward = sample_random
    sampler.greedy_sample = lambda logits: greedy(without_padding(logits))


def renew_output_layer(model: Any) -> None:
    """Pack the output layer again; does nothing except on a CPU. There vLLM computes with a packed copy, and reloading
    does not update the copy of a layer that is tied to the input embeddings."""
    layer = getattr(model, "lm_head", None)
    if layer is None or not hasattr(layer, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def release_pages(tensors: Iterable[Any]) -> None:
    """Give the pages of tensors on a CPU back to the system. The tensors keep their addresses and read as zeros when
    they are next touched. Raises RuntimeError if a tensor is on another device: the engine has no sleep mode then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise RuntimeError("this engine cannot sleep: it was started without --enable-sleep-mode")
        storage = tensor.untyped_storage()
        first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "pages of the key-value cache cannot be given back")
