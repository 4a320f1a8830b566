"""What kdrl adds to a vLLM worker: weights from a checkpoint that are sure to be used, and which they are.

vLLM loads the class by name (`--worker-extension-cls kdrl_core.engines.vllm_extension.KdrlWorker`) and makes its
methods callable through `collective_rpc`. Answers are dicts, since the server turns anything else into text.
"""

import uuid
from typing import Any

_INCARNATION = uuid.uuid4().hex
"""Of this process: a worker that was started again has another, and its initial weights."""


class KdrlWorker:
    """Mixed into vLLM's worker class."""

    def kdrl_load(self, path: str) -> dict[str, str]:
        """Take the weights of the Hugging Face model directory `path`; returns `kdrl_state`."""
        worker: Any = self
        worker.reload_weights(weights_path=path)
        renew_output_layer(worker.model_runner.get_model())
        worker.kdrl_weights = path
        return self.kdrl_state()

    def kdrl_scale_prompt_logprobs(self, temperature: float) -> None:
        """Let `prompt_logprobs` be those of softmax(logits / temperature); sampling takes its own temperature."""
        worker: Any = self
        worker.model_runner.get_model().logits_processor.scale = 1.0 / temperature

    def kdrl_state(self) -> dict[str, str]:
        """`weights`, the directory that was loaded last (empty: those it was started with), and `incarnation`."""
        return {"weights": getattr(self, "kdrl_weights", ""), "incarnation": _INCARNATION}


def renew_output_layer(model: Any) -> None:
    """Pack the output layer anew: on a CPU vLLM computes with a packed copy, which reloading leaves as it was where
    the layer is tied to the input embeddings. Nothing elsewhere."""
    layer = getattr(model, "lm_head", None)
    if layer is None or not hasattr(layer, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
