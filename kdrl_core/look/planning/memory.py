"""Bytes on one GPU, by component and phase.

A layer keeps this for its backward pass, per token (H hidden, A·D query, K·D key width, I intermediate, b bytes of the
dtype), in `transformers` with torch's fused attention:

    two RMSNorms   24·H float32; 16·H bfloat16 weights; 26·H float32 weights under bfloat16 autocast (casts included)
    attention      b·2·(A·D + K·D) + 4·A   (rotated q and k, v, output, log-sum); rows with a mask, as short ones on a
                   CPU, keep k and v per head, b·4·A·D, and b·s bytes of mask per token of a row padded to s
    MLP            b·4·I

With activation checkpointing, a layer keeps only its input, and only one layer at a time holds the rest. Logprobs are
computed from hidden states in chunks (docs/memory.md), so no term has tokens × vocabulary.

Optimiser: AdamW, two float32 moments per parameter. float32 weights (torch, ZeRO-0) are their own master copy; bfloat16
weights (ZeRO-2, 3) have a float32 master copy. Gradients are accumulated in float32. ZeRO-2 cuts optimiser and
gradients over the ranks, ZeRO-3 weights as well. Of an adapter, A and B alone have gradients and moments.
"""

from dataclasses import dataclass, replace
from typing import Literal

from kdrl_core.config import LoraConfig
from kdrl_core.look.planning.shapes import ModelShape
from kdrl_core.models.gpu_share import state_bytes

Precision = Literal["float32", "bfloat16", "autocast"]
Components = dict[str, float]

CHUNK_BYTES = 128 * 2**20
"""One chunk of logits on a GPU; three are in memory at a time (kdrl_core.logprobs.chunked)."""
_MIN_COLUMNS = 256
_BUCKET = 500_000_000
"""Numbers in a bucket of gradients or gathered weights, DeepSpeed's default."""
_LIVE_PARAMETERS = 1_000_000_000
"""Parameters gathered at a time under ZeRO-3, DeepSpeed's default."""
_PREFILL_TOKENS = 8_192
"""Tokens of one forward pass of a serving engine, about vLLM's default."""
_NORM_BYTES: dict[Precision, int] = {"float32": 24, "bfloat16": 16, "autocast": 26}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """How the student is trained."""

    precision: Precision
    zero_stage: int = 0
    ranks: int = 1
    is_checkpointed: bool = False
    """Activation checkpointing."""
    offloads_optimizer: bool = False
    """Optimiser states in the host's memory."""
    lora: LoraConfig | None = None
    """The adapter that alone is trained; None: all weights are."""
    is_masked: bool = False
    """Several rows of a micro-batch have a mask, as short ones on a CPU (kdrl_core.logprobs.model)."""

    @property
    def activation_bytes(self) -> int:
        """Bytes of a number in attention and MLP."""
        return 4 if self.precision == "float32" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight in the forward pass, and of a number between layers."""
        return 2 if self.precision == "bfloat16" else 4


def trainer_states(shape: ModelShape, settings: TrainerSettings) -> Components:
    """Weights and optimiser, which stay from step to step."""
    weights, optimizer = state_bytes(
        shape.parameters,
        weight_bytes=settings.weight_bytes,
        has_masters=settings.precision == "bfloat16",
        zero_stage=settings.zero_stage,
        ranks=settings.ranks,
        trained=None if settings.lora is None else shape.adapter_parameters(settings.lora),
    )
    on_gpu = {"trainer weights": weights}
    if not settings.offloads_optimizer:
        on_gpu["optimizer"] = optimizer
    return on_gpu


def optimizer_bytes(shape: ModelShape, settings: TrainerSettings) -> float:
    """Optimiser states of one rank, on the GPU or in the host's memory."""
    return trainer_states(shape, replace(settings, offloads_optimizer=False))["optimizer"]


def gradient_bytes(shape: ModelShape, settings: TrainerSettings) -> float:
    """Accumulated gradients, float32."""
    return 4 * shape.trained_parameters(settings.lora) / (settings.ranks if settings.zero_stage >= 2 else 1)


def layer_activation_bytes(shape: ModelShape, settings: TrainerSettings, *, is_padded: bool) -> float:
    """Bytes that one layer keeps per token for its backward pass, without the mask."""
    width = settings.activation_bytes
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = width * (4 * query if is_padded else 2 * query + 2 * key) + 4 * shape.heads
    norms = _NORM_BYTES[settings.precision] * shape.hidden + 2 * 4
    return norms + attention + width * 4 * shape.intermediate


def kept_bytes(shape: ModelShape, settings: TrainerSettings, *, rows: int, width: int) -> float:
    """Bytes of activations kept until the backward pass, for `rows` sequences padded to `width`."""
    tokens = rows * width
    ends = tokens * (8 + 3 * settings.weight_bytes) * shape.hidden  # embedding and last norm
    if settings.is_checkpointed:
        return ends + shape.layers * tokens * settings.weight_bytes * shape.hidden
    casts = 2 * shape.matmul_parameters if settings.precision == "autocast" else 0
    return ends + shape.layers * _layer_bytes(shape, settings, rows=rows, width=width) + casts


def working_bytes(shape: ModelShape, settings: TrainerSettings, *, rows: int, width: int) -> float:
    """Working memory of the backward pass: of the output layer or of one layer, whichever is larger."""
    tokens = rows * width
    layer: float = tokens * (3 * settings.activation_bytes * shape.intermediate + 8 * shape.hidden)
    if settings.is_checkpointed:
        layer += _layer_bytes(shape, settings, rows=rows, width=width)
    return max(layer, logprob_bytes(shape, tokens=tokens, width=settings.weight_bytes, has_gradient=True))


def _layer_bytes(shape: ModelShape, settings: TrainerSettings, *, rows: int, width: int) -> float:
    """Bytes that one layer keeps, with a mask if there is one."""
    is_padded = settings.is_masked and rows > 1
    mask = width * settings.activation_bytes if is_padded else 0
    return rows * width * (layer_activation_bytes(shape, settings, is_padded=is_padded) + mask)


def worst_micro_batch(
    shape: ModelShape, settings: TrainerSettings, *, micro_batch_tokens: int, longest: int
) -> tuple[float, float]:
    """Kept and working bytes of the largest micro-batch: one longest sequence, or several padded ones."""
    most = max(1, micro_batch_tokens // longest)
    sizes = [(1, longest)]
    sizes += [(rows, min(longest, micro_batch_tokens // rows)) for rows in {2, most, most + 1} if rows > 1]
    found = [
        (
            kept_bytes(shape, settings, rows=rows, width=width),
            working_bytes(shape, settings, rows=rows, width=width),
        )
        for rows, width in sizes
    ]
    return max(found, key=sum)


def logprob_bytes(shape: ModelShape, *, tokens: int, width: int, has_gradient: bool) -> float:
    """Memory of chunked logprobs beyond hidden states and gradients: chunks of logits, and per-token values."""
    chunks = 3 * min(max(CHUNK_BYTES, 4 * _MIN_COLUMNS * tokens), 4 * tokens * shape.vocabulary)
    per_token = (4 + 2 * width) * shape.hidden if has_gradient else width * shape.hidden
    return chunks + tokens * (per_token + 64)


def update_components(
    shape: ModelShape, settings: TrainerSettings, *, micro_batch_tokens: int, longest: int
) -> Components:
    """Forward and backward pass: states, gradients, activations, working memory, buffers."""
    buffers = 0.0
    if settings.ranks > 1:
        bucket = min(_BUCKET, shape.parameters) * settings.weight_bytes
        buffers = {0: bucket, 2: 2 * bucket}.get(
            settings.zero_stage, 2 * bucket + min(_LIVE_PARAMETERS, shape.parameters) * settings.weight_bytes
        )
    kept, working = worst_micro_batch(shape, settings, micro_batch_tokens=micro_batch_tokens, longest=longest)
    return {
        **trainer_states(shape, settings),
        "gradients": gradient_bytes(shape, settings),
        **_in_flight(shape, settings),
        "activations": kept,
        "working memory": working,
        **({"buffers": buffers} if buffers else {}),
    }


def _in_flight(shape: ModelShape, settings: TrainerSettings) -> Components:
    """A micro-batch has its own gradient of the embedding, and of an untied output layer; an adapter has neither."""
    if settings.lora is not None:
        return {}
    return {"gradients in flight": settings.weight_bytes * shape.embedding * (1 if shape.tied else 2)}


def optimizer_step_components(shape: ModelShape, settings: TrainerSettings) -> Components:
    """AdamW's step: states, gradients and one temporary number per parameter of the rank."""
    cut = settings.ranks if settings.zero_stage >= 2 else 1
    temporary = 0 if settings.offloads_optimizer else 4 * shape.trained_parameters(settings.lora) / cut
    return {
        **trainer_states(shape, settings),
        "gradients": gradient_bytes(shape, settings),
        "step temporaries": temporary,
    }


def engine_weights(shape: ModelShape, *, width: int, tensor_parallel: int) -> float:
    """Weights of an engine on one of its GPUs."""
    return width * shape.parameters / tensor_parallel


def kv_bytes(shape: ModelShape, *, width: int, tensor_parallel: int) -> float:
    """KV cache per token on one of an engine's GPUs. A GPU has at least one key-value head."""
    return shape.kv_bytes_per_token(width) * max(1 / tensor_parallel, 1 / shape.kv_heads)


def decode_workspace(shape: ModelShape, *, sequences: int, width: int, tensor_parallel: int) -> float:
    """Three copies of a decoding step's float32 logits, and one prefill pass."""
    prefill = _PREFILL_TOKENS * width * (4 * shape.hidden + 3 * shape.intermediate / tensor_parallel)
    return 3 * 4 * sequences * shape.vocabulary + prefill


def score_workspace(shape: ModelShape, *, tokens: int, width: int, tensor_parallel: int, is_chunked: bool) -> float:
    """A forward pass that gives logprobs of `tokens` prompt tokens. `is_chunked` (in process): in chunks of the
    vocabulary; otherwise float32 logits and logprobs of all `tokens` are in memory."""
    hidden = tokens * width * (4 * shape.hidden + 3 * shape.intermediate / tensor_parallel)
    if is_chunked:
        return hidden + logprob_bytes(shape, tokens=tokens, width=width, has_gradient=False)
    return hidden + 2 * 4 * tokens * shape.vocabulary
