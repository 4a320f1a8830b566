"""Models of many architectures, tiny and random: sampling, scoring and training give the same logprobs.

Caches that cannot be cut, caches of another kind, and none; padded vocabularies; every kind of dropout.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.conftest import dense_log_probabilities, largest_gap
from parity.ranks import OPTIONS, needs_deepspeed, ranks
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_models import SETTINGS, needs_vllm, small_model
from vllm_models import requests as vllm_requests

from kdrl_core.engines.transformers_engines import TransformersRolloutEngine, TransformersScorer
from kdrl_core.errors import EngineError, ModelError
from kdrl_core.logprobs.model import token_budget_batches
from kdrl_core.models.loading import load_model
from kdrl_core.objectives import Objective
from kdrl_core.training.protocols import OptimizerSettings, UpdateBatch
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest

ROWS = 40
"""Rows of the embeddings; the tokenizer has 27 tokens."""
COMMON: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
CACHED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "gemma2": {"sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **_LINEAR,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
}
"""Rows can be taken from their caches: attention, sliding windows, convolutions, recurrent states, two in one layer."""
UNCACHED: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 4},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8},
    "openai-gpt": _GPT,
    "minimax": {"head_dim": 8, "num_local_experts": 2},
}
"""A cache under another name, or inside the model, or of its own class, or none at all."""


def tiny(kind: str, **changes: Any) -> Any:
    """A random model whose distributions are far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **{**CACHED, **UNCACHED}.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model


REQUESTS = [
    RolloutRequest(
        prompt_id=str(row), sample=sample, prompt_token_ids=list(range(3, 5 + 3 * row)), seed=10 * row + sample
    )
    for row in range(3)
    for sample in range(3)
]


def engine_of(model: Any, tokenizer: Any, **options: Any) -> TransformersRolloutEngine:
    values: dict[str, Any] = {"stop_ids": [1, 5], "temperature": 0.7, "max_response_tokens": 12, "batch_size": 6}
    return TransformersRolloutEngine(model, tokenizer, **{**values, **options})


def trainer_of(model: Any, tokenizer: Any, **options: Any) -> TorchTrainer:
    return TorchTrainer(model, tokenizer, OptimizerSettings(**OPTIONS), **options)


def batch_of(rollouts: list[Rollout]) -> UpdateBatch:
    """Their own logprobs are those of teacher and reference."""
    sampled = [np.array(rollout.logprobs, np.float32) for rollout in rollouts]
    return UpdateBatch(
        sequences=[ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts],
        advantages=[0.5] * len(rollouts),
        kd_weights=[1.0] * len(rollouts),
        teacher_logprobs=sampled,
        ref_logprobs=sampled,
        objective=Objective(beta=0.05, ref_beta=0.01, group_size=3),
    )


def gap(logprobs: Sequence[Any], rollouts: list[Rollout]) -> float:
    """Largest difference from the engine's logprobs."""
    return largest_gap(logprobs, [torch.tensor(rollout.logprobs) for rollout in rollouts])


@pytest.mark.parametrize("kind", [*CACHED, *UNCACHED])
def test_engine_scorer_and_trainer_agree(kind: str, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(kind)
    rollouts = engine_of(model, tokenizer).generate(REQUESTS)
    assert ("every token is computed from the whole sequence, which is slower" in caplog.text) == (kind in UNCACHED)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 2  # rows left the batch
    assert max(max(rollout.token_ids) for rollout in rollouts) < len(tokenizer) < ROWS
    with torch.no_grad():
        tables = [dense_log_probabilities(model, rollout, 0.7) for rollout in rollouts]
    expected = [
        table.gather(1, torch.tensor(r.token_ids)[:, None])[:, 0] for table, r in zip(tables, rollouts, strict=True)
    ]
    sampled = [rollout.logprobs for rollout in rollouts]
    assert largest_gap(sampled, expected) < 1e-5
    alone = engine_of(model, tokenizer, batch_size=1).generate(REQUESTS)
    assert [list(r.token_ids) for r in alone] == [list(r.token_ids) for r in rollouts]
    batch = batch_of(rollouts)
    scores = TransformersScorer(model, temperature=0.7, batch_tokens=100).score(batch.sequences)
    assert largest_gap(scores, expected) < 1e-5
    stats = trainer_of(model, tokenizer).update(batch)
    assert largest_gap(stats.logprobs, expected) < 1e-5


@pytest.mark.parametrize("kind", ["rwkv", "bart"])
def test_a_model_that_padding_changes_is_refused_by_name(kind: str, tokenizer: Any) -> None:
    model = tiny(kind, **({"attention_hidden_size": 32} if kind == "rwkv" else {}))
    message = f"{type(model).__name__} gives other logits where a prompt is padded on the left"
    with pytest.raises(ModelError, match=message):
        engine_of(model, tokenizer)
    with pytest.raises(ModelError, match=message):
        trainer_of(model, tokenizer)
    with pytest.raises(ModelError, match=message):
        TransformersScorer(model, temperature=1.0, batch_tokens=100)


# --- dropout ----------------------------------------------------------------------------------------------------------

DROPOUT: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_dropout": 0.3},
    "gpt2": {},  # 0.1 in three places by default
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
}
"""Read by modules, by functions in attention, in layers and in the base model, and layers that are left out."""


@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_off_in_training_and_stays_in_the_config(
    kind: str, recomputes: bool, tokenizer: Any, tmp_path: Path
) -> None:
    options = {**(_GPT if kind == "gpt2" else {}), **DROPOUT[kind]}
    model = tiny(kind, **options)
    model.save_pretrained(tmp_path / "before")
    names = [name for name in model.config.to_dict() if "drop" in name and model.config.to_dict()[name]]
    assert names
    rollouts = engine_of(model, tokenizer).generate(REQUESTS)
    trainer = trainer_of(model, tokenizer, activation_checkpointing=recomputes)
    stats = trainer.update(batch_of(rollouts))
    assert stats.metrics["ref/kl"] < 1e-9  # policy and reference are the same
    assert gap(stats.logprobs, rollouts) < 1e-5
    (tmp_path / "after").mkdir()
    trainer.export_hf(tmp_path / "after")
    config = (tmp_path / "after" / "config.json").read_bytes()
    assert config == (tmp_path / "before" / "config.json").read_bytes()
    assert all(json.loads(config)[name] for name in names)
    reference = tiny(kind, **{**options, **dict.fromkeys(names, 0.0)})
    trainer_of(reference, tokenizer, activation_checkpointing=recomputes).update(batch_of(rollouts))
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpointing_recomputes_in_the_update_alone(tokenizer: Any) -> None:
    model = tiny("qwen2")
    passes: list[int] = []
    rollouts = engine_of(model, tokenizer).generate(REQUESTS)
    trainer = trainer_of(model, tokenizer, activation_checkpointing=True)
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = batch_of(rollouts)
    lengths = [(len(each.prompt_token_ids), len(each.token_ids)) for each in batch.sequences]
    num_batches = len(token_budget_batches(lengths, max_tokens=OPTIONS["micro_batch_tokens"]))
    trainer.score(batch.sequences)
    assert len(passes) == 1
    plain = trainer_of(tiny("qwen2"), tokenizer)
    stats = trainer.update(batch)
    assert len(passes) - 1 == 2 * num_batches
    assert stats.metrics == pytest.approx(plain.update(batch).metrics, rel=1e-5, abs=1e-8)


def test_a_model_that_cannot_recompute_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"OpenAIGPTLMHeadModel cannot recompute .* trainer\.activation_checkpointing"):
        trainer_of(tiny("openai-gpt"), tokenizer, activation_checkpointing=True)


def saved(model: Any, tokenizer: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


REFUSED = '{"eos_token_id": 1, "temperature": 0.6, "top_p": 0.9}\n'
"""As Llama 2 ships it: transformers reads it and refuses to write it."""


@pytest.mark.slow  # that of one process above shows the same in a second
@needs_deepspeed
def test_ranks_have_no_dropout_and_export_what_transformers_refuses_to_write(tokenizer: Any, tmp_path: Path) -> None:
    source = saved(tiny("qwen2", attention_dropout=0.3), tokenizer, tmp_path / "source")
    (source / "generation_config.json").write_text(REFUSED)
    rollouts = engine_of(load_model(source), tokenizer).generate(REQUESTS)
    with ranks(source, tokenizer, tmp_path / "ranks", ranks=1, zero_stage=3, activation_checkpointing=True) as trainer:
        stats = trainer.update(batch_of(rollouts))
        (tmp_path / "saved").mkdir()
        trainer.save(tmp_path / "saved")
    assert stats.metrics["ref/kl"] < 1e-9
    assert gap(stats.logprobs, rollouts) < 1e-5
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["attention_dropout"] == 0.3
    assert (tmp_path / "saved" / "generation_config.json").read_text() == REFUSED


# --- padding of the embedding -----------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_distribution_without_padding(tokenizer: Any) -> None:
    engine = engine_of(tiny("qwen2"), tokenizer, temperature=1.0)
    logits = torch.full((4000, ROWS), -1e4)
    logits[:, [3, 5, 26, 30]] = torch.tensor([0.1, 0.2, 0.1, 0.6]).log()
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs = engine._sample(logits, draws)
    assert (tokens.bincount(minlength=ROWS) / 4000)[[3, 5, 26]].tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)
    assert logprobs.exp().unique().tolist() == pytest.approx([0.1, 0.2])  # of the whole softmax
    logits[:, :27] = -1e4
    assert int(engine._sample(logits, draws)[0].max()) < 27  # nothing else has any weight


def test_greedy_takes_the_best_known_token(tokenizer: Any) -> None:
    model = tiny("qwen2", vocab_size=64)
    rollouts = engine_of(model, tokenizer, temperature=0.0).generate(REQUESTS)
    for rollout in rollouts:
        with torch.no_grad():
            table = dense_log_probabilities(model, rollout, 1.0)
        assert table[:, :27].argmax(-1).tolist() == list(rollout.token_ids)
        assert (table.argmax(-1) >= 27).any() or len(rollout.token_ids) < 4


def test_a_token_that_the_scorer_has_no_row_for_is_told() -> None:
    scorer = TransformersScorer(tiny("qwen2", vocab_size=27), temperature=1.0, batch_tokens=100)
    with pytest.raises(EngineError, match=r"request 1 has the token id 30, but the scoring model's embedding has 27"):
        scorer.score([ScoreRequest(prompt_token_ids=[2], token_ids=[t]) for t in (26, 30)])


@needs_vllm
@pytest.mark.slow
def test_vllm_samples_no_padding_and_its_logprobs_are_the_whole_softmaxes(tokenizer: Any, tmp_path: Path) -> None:
    from kdrl_core.engines.vllm_rollout import VLLMRolloutEngine

    paths = []
    for seed in (1, 2):
        model = load_model(small_model(tmp_path / f"small-{seed}", tokenizer, tied=True, seed=seed))
        torch.manual_seed(seed)
        model.resize_token_embeddings(64, mean_resizing=False)
        model.get_input_embeddings().weight.data[27:].normal_(0.0, 0.1)
        paths.append(saved(model, tokenizer, tmp_path / str(seed)))
    assert len(tokenizer) == 27
    options: dict[str, Any] = {"stop_ids": (1,), "max_response_tokens": 24}
    for temperature in (0.8, 0.0):
        engine = VLLMRolloutEngine(paths[0], tokenizer, SETTINGS, temperature=temperature, **options)
        try:
            for path in paths:
                engine.load_weights(path)
                rollouts = engine.generate(vllm_requests(2))
                assert max(max(rollout.token_ids) for rollout in rollouts) < 27
                asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
                model = load_model(path)
                theirs = TransformersScorer(model, temperature=temperature or 1.0, batch_tokens=4096)
                assert gap(theirs.score(asked), rollouts) < 1e-4
                with torch.no_grad():
                    tables = [dense_log_probabilities(model, rollout, 1.0).exp() for rollout in rollouts]
                assert torch.cat(tables)[:, 27:].sum(-1).mean() > 0.1  # padding is not unlikely
        finally:
            engine.close()
