"""Costs of a model from its config.json: parameters, bytes of KV cache and FLOPs per token. No weights are read.

H hidden size, L layers, A heads, K key-value heads, D head size, I intermediate size, V vocabulary, s context:

    parameters = V·H (twice if untied) + L·(attention + 3·H·I + 2·H) + H
    attention  = H·D·(2·A + 2·K) + biases
    KV cache   = 2·L·K·D·bytes, per token
    forward    = 2·(parameters in matmuls) + 2·L·A·D·s FLOPs per token, attention being causal
    update     = 3 forward passes, 4 with activation checkpointing, and the output layer once more (docs/memory.md)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.config import LoraConfig, ModelConfig, list_recipes, load_recipe, resolve_path
from kdrl_core.config.models import ALL_LINEAR
from kdrl_core.errors import ModelError

_KNOWN_TYPES = ("qwen2", "qwen3", "llama", "mistral")
_RUN = "run:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of the Llama kind: RMSNorm, gated MLP, grouped-query attention."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Output layer and embedding are one matrix."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output layer."""
    mlp_bias: bool = False
    qk_norm: bool = False
    max_context: int | None = None

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self._layer_parameters + self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, the largest tensor. The output layer has the same number."""
        return self.vocabulary * self.hidden

    @property
    def matmul_parameters(self) -> int:
        """Parameters in matrix products of each token: all without the embedding's look-up."""
        return self.layers * self._layer_parameters + self.embedding

    @property
    def _layer_parameters(self) -> int:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * query + 2 * key)
        biases = self.qkv_bias * (query + 2 * key) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_dim
        return attention + 3 * self.hidden * self.intermediate + biases + norms

    def kv_bytes_per_token(self, bytes_per_number: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_number

    def adapter_parameters(self, config: LoraConfig) -> int:
        """Numbers of A [rank, in] and B [out, rank] in all layers. Raises ModelError for a target that is no layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        ends = {
            "q_proj": self.hidden + query,
            "k_proj": self.hidden + key,
            "v_proj": self.hidden + key,
            **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self.hidden + self.intermediate),
            "o_proj": query + self.hidden,
        }
        targets = list(ends) if config.targets == [ALL_LINEAR] else [n.rpartition(".")[2] for n in config.targets]
        if unknown := [name for name in targets if name not in ends]:
            raise ModelError(
                f"student.lora.targets: a plan knows {', '.join(ends)}, and no {unknown[0]}; correct the name"
            )
        return config.rank * self.layers * sum(ends[name] for name in targets)

    def trained_parameters(self, config: LoraConfig | None) -> int:
        """Numbers that have a gradient and moments: of the adapter, or all."""
        return self.parameters if config is None else self.adapter_parameters(config)

    def forward_flops(self, tokens: float, *, context: float) -> float:
        """FLOPs of a forward pass over `tokens` in sequences of `context` tokens."""
        return tokens * (2 * self.matmul_parameters + 2 * self.layers * self.heads * self.head_dim * context)

    def update_flops(self, tokens: float, *, context: float, is_checkpointed: bool) -> float:
        """FLOPs of forward and backward pass over `tokens`, recomputation included."""
        passes = 4 if is_checkpointed else 3
        return passes * self.forward_flops(tokens, context=context) + tokens * 2 * self.embedding


_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "max_context")
_FIELDS = (*_SIZES, "tied", "qkv_bias")
_R1_1_5B = (1536, 28, 12, 2, 128, 8960, 151_936, 131_072, False, True)
_R1_7B = (3584, 28, 28, 4, 128, 18_944, 152_064, 131_072, False, True)

# From each model's config.json on the Hugging Face Hub, under these names. Skywork-OR1-Math-7B is trained from
# R1-Distill-Qwen-7B, DeepScaleR-1.5B from R1-Distill-Qwen-1.5B.
_PUBLISHED: dict[str, tuple[Any, ...]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": _R1_1_5B,
    "DeepScaleR-1.5B-Preview": _R1_1_5B,
    "DeepSeek-R1-Distill-Qwen-7B": _R1_7B,
    "Skywork-OR1-Math-7B": _R1_7B,
    "Qwen2.5-0.5B": (896, 24, 14, 2, 64, 4864, 151_936, 32_768, True, True),
    "Qwen2.5-1.5B": (1536, 28, 12, 2, 128, 8960, 151_936, 131_072, True, True),
    "Qwen2.5-3B": (2048, 36, 16, 2, 128, 11_008, 151_936, 32_768, True, True),
    "Qwen2.5-7B": _R1_7B,
    "SmolLM2-135M": (576, 30, 9, 3, 64, 1536, 49_152, 8192, True, False),
}
KNOWN_SHAPES: dict[str, ModelShape] = {
    name: ModelShape(name=name, **dict(zip(_FIELDS, values, strict=True))) for name, values in _PUBLISHED.items()
}


def shape_of(config: ModelConfig, *, role: str) -> ModelShape:
    """The shape of a recipe's model: from its directory if it exists, else of the published model with its name.

    `run:NAME` without a finished run is the student of the shipped recipe NAME: training does not change its shape.
    Raises ModelError if there is neither, or the directory has a model of another kind.
    """
    path = resolve_path(config.path)
    if config.gguf_file is None and (path / "config.json").is_file():
        return _read(path, config, role=role)
    if config.path.startswith(_RUN) and (name := config.path.removeprefix(_RUN)) in list_recipes():
        return shape_of(load_recipe(name).student, role=role)
    names = {Path(config.path).name, (config.gguf_file or "").partition("-Instruct")[0]}
    for shape in KNOWN_SHAPES.values():
        if shape.name in names:
            return shape
    raise ModelError(
        f"{role}.path={config.path}: {path} has no config.json, and kdrl knows no published model of that name; give a "
        f"model directory (its config.json suffices), or one of the known names: {', '.join(KNOWN_SHAPES)}"
    )


def shape_from_config(config: Any, *, name: str) -> ModelShape:
    """The shape in a transformers config. Raises ModelError if it is not of the Llama kind."""
    kind = getattr(config, "model_type", None)
    if kind not in _KNOWN_TYPES:
        raise ModelError(
            f"{name}: the memory of model_type {kind} is not known to kdrl; it plans {', '.join(_KNOWN_TYPES)}"
        )
    bias = bool(getattr(config, "attention_bias", False))
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qkv_bias=kind == "qwen2" or bias,
        output_bias=kind != "qwen2" and bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=kind == "qwen3",
        max_context=getattr(config, "max_position_embeddings", None),
    )


def _read(path: Path, config: ModelConfig, *, role: str) -> ModelShape:
    from transformers import AutoConfig  # takes a second, so only for a directory

    where = f"{role}.path={config.path}"
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        return shape_from_config(found, name=path.name)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    except Exception as error:  # each kind of broken file raises its own error
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{where}: {path / 'config.json'} cannot be read ({reason}); download it again") from error
