"""An adapter against LoRA written out by hand, against peft, and in both trainers: the base never moves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.ranks import OPTIONS, assert_rounded, gaps, make_batch, needs_deepspeed, ranks, train
from safetensors.torch import load_file

from kdrl_core.config import LoraConfig
from kdrl_core.engines.sync import sync_weights
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine, TransformersScorer
from kdrl_core.engines.weight_digest import folder_digest, model_digest
from kdrl_core.errors import EngineError, ModelError
from kdrl_core.miniature.models import MiniatureModel, build_model, build_tokenizer
from kdrl_core.models.loading import load_model
from kdrl_core.models.lora import AdapterSpec, adapter_size
from kdrl_core.training.protocols import OptimizerSettings
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import RolloutRequest

pytest.importorskip("peft", reason="needs the extra lora: pip install -e .[lora]")

TOKENS = torch.tensor([[2, 8, 17, 9, 3, 4]])
BATCHES = [make_batch(seed) for seed in range(4)]
OF_ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
OF_STATE = {"trainer/optimizer.safetensors", "trainer/state.json"}


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers, tied."""
    path = tmp_path_factory.mktemp("base")
    spec = MiniatureModel(hidden_size=48, num_layers=2, tie_word_embeddings=True, sft_steps=0, learning_rate=1.0)
    build_model(spec, build_tokenizer(), seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def spec_of(base: Path, *, initial: Path | None = None, **fields: Any) -> AdapterSpec:
    return AdapterSpec(config=LoraConfig(**{"rank": 4, "alpha": 8.0, **fields}), base=base, initial=initial)


def trainer_of(base: Path, tokenizer: Any, *, dtype: str = "float32", **options: Any) -> tuple[TorchTrainer, Any]:
    """A trainer of a fresh adapter, and its model."""
    model = load_model(base, dtype=dtype)
    adapter = spec_of(base, **options).wrap(model, seed=3)
    cast = torch.bfloat16 if dtype == "bfloat16" else None
    return TorchTrainer(model, tokenizer, OptimizerSettings(**OPTIONS), adapter=adapter, autocast_dtype=cast), model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def written(do: Any, path: Path, *more: str) -> Path:
    path.mkdir()
    do(path, *more)
    return path


def test_forward_and_gradients_are_those_of_the_formula(base: Path) -> None:
    """W' = W + s·B·A with s = alpha / rank = 8 / 4 = 2, so by the chain rule dL/dB = s·G·Aᵀ and dL/dA = s·Bᵀ·G, where
    G = dL/dW' is the gradient of a model that has W' itself."""
    wrapped, whole = load_model(base), load_model(base)
    layers = [each.self_attn.q_proj for each in whole.model.layers]
    adapter = spec_of(base, targets=["q_proj"]).wrap(wrapped, seed=0)
    assert torch.equal(logits(wrapped), logits(whole))  # B is 0 at first
    assert [weight.shape for weight in adapter.weights.values()] == [(4, 48), (48, 4)] * 2
    pairs = list(zip(*[iter(adapter.weights.values())] * 2, strict=True))
    generator = torch.Generator().manual_seed(1)
    for layer, (a, b) in zip(layers, pairs, strict=True):
        with torch.no_grad():
            b.copy_(torch.randn(b.shape, generator=generator))
            layer.weight += 2.0 * (b @ a)
    assert float((logits(wrapped) - logits(load_model(base))).abs().max()) > 0.01
    torch.testing.assert_close(logits(wrapped), logits(whole), rtol=1e-4, atol=1e-4)

    for model in (wrapped, whole):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for layer, (a, b) in zip(layers, pairs, strict=True):
        gradient = layer.weight.grad
        torch.testing.assert_close(b.grad, 2.0 * gradient @ a.T, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.grad, 2.0 * b.T @ gradient, rtol=1e-3, atol=1e-5)
        assert float(a.grad.abs().max()) > 1e-4
    assert all(weight.grad is None for name, weight in wrapped.named_parameters() if name not in adapter.weights)


def test_only_the_adapter_is_trained_and_goes_on_bit_by_bit(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer, model = trainer_of(base, tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(trainer, BATCHES[:2])
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert len(moved) == 2 * 7 * 2  # A and B of seven linear layers, in two layers
    shapes = {name: weight.shape for name, weight in load_model(base).named_parameters()}
    assert adapter_size(shapes, LoraConfig(rank=4)) == sum(before[name].numel() for name in moved)

    saved = written(trainer.save, tmp_path / "saved")
    assert contents(saved).keys() == OF_ADAPTER | OF_STATE
    whole = written(trainer.export_hf, tmp_path / "whole")
    first = train(trainer, BATCHES[2:])
    ended = contents(written(trainer.save, tmp_path / "ended"))

    again, _ = trainer_of(base, tokenizer)
    again.load(saved)
    assert again.step == 2
    assert contents(written(again.export_hf, tmp_path / "again")) == contents(whole)
    assert [stats.metrics for stats in train(again, BATCHES[2:])] == [stats.metrics for stats in first]
    assert contents(written(again.save, tmp_path / "ended again")) == ended

    other, _ = trainer_of(base, tokenizer, rank=2)
    with pytest.raises(ModelError, match=r"does not fit student\.lora: it has other layers, or another rank"):
        other.load(saved)
    (saved / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        again.load(saved)


def test_the_export_is_merged_and_the_adapter_is_one_of_peft(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    trainer, model = trainer_of(base, tokenizer)
    train(trainer, BATCHES)
    exported = written(trainer.export_hf, tmp_path / "exported")
    torch.testing.assert_close(logits(load_model(exported)), logits(model), rtol=1e-5, atol=1e-5)
    assert float((logits(load_model(base)) - logits(model)).abs().max()) > 0.01
    assert load_file(exported / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    assert_rounded(written(trainer.export_hf, tmp_path / "half", "bfloat16"), exported)

    saved = written(trainer.save, tmp_path / "saved")
    assert torch.equal(logits(PeftModel.from_pretrained(load_model(base), saved / "adapter")), logits(model))
    told = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["r"], told["lora_alpha"]) == (str(base.resolve()), 4, 8.0)


def test_the_trainer_still_has_the_policy_that_it_began_with(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The base for a new adapter, and the adapter of the stage before for one that is trained further; and the base."""
    trainer, _ = trainer_of(base, tokenizer)
    sequences = BATCHES[0].sequences
    scorer = TransformersScorer(load_model(base), temperature=OPTIONS["temperature"], batch_tokens=10**6)
    expected = scorer.score(sequences)
    train(trainer, BATCHES[:2])
    now = trainer.score(sequences)
    begun = trainer.score_frozen(sequences, "initial")
    assert all((ours == theirs).all() for ours, theirs in zip(begun, expected, strict=True))
    assert any((ours != theirs).any() for ours, theirs in zip(now, expected, strict=True))
    assert all((a == b).all() for a, b in zip(trainer.score(sequences), now, strict=True))  # nothing was left behind

    further, _ = trainer_of(base, tokenizer, initial=written(trainer.save, tmp_path / "stage1"))
    assert further.step == 0
    train(further, BATCHES[2:])
    begun, untouched = further.score_frozen(sequences, "initial"), further.score_frozen(sequences, "none")
    assert all((ours == theirs).all() for ours, theirs in zip(begun, now, strict=True))
    assert all((ours == theirs).all() for ours, theirs in zip(untouched, expected, strict=True))


def test_a_bfloat16_base_has_a_float32_adapter(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer, model = trainer_of(base, tokenizer, dtype="bfloat16")
    plain, _ = trainer_of(base, tokenizer)
    found = gaps(train(trainer, BATCHES[:2]), train(plain, BATCHES[:2]))
    assert found["loss"] < 0.05
    kinds = {(".lora_" in name, weight.dtype) for name, weight in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    exported = written(trainer.export_hf, tmp_path / "exported")
    assert {weight.dtype for weight in load_file(exported / "model.safetensors").values()} == {torch.float32}


class Engine(TransformersRolloutEngine):
    """Has a copy of the weights; without `loads` it stays at the base, as one that knows nothing of the adapter."""

    def __init__(self, base: Path, tokenizer: Any, *, loads: bool) -> None:
        super().__init__(
            load_model(base), tokenizer, stop_ids=[1], temperature=0.7, max_response_tokens=64, batch_size=8
        )
        self._loads = loads

    def digests(self) -> dict[str, str]:
        return {"the engine": model_digest(self._model, torch.float32)}

    def load_weights(self, checkpoint_dir: Path) -> None:
        if self._loads:
            super().load_weights(checkpoint_dir)

    rebuild = load_weights


def test_a_sync_finds_an_engine_without_the_adapter(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer, _ = trainer_of(base, tokenizer)
    train(trainer, BATCHES[:1])
    exported = written(trainer.export_hf, tmp_path / "exported")
    probe = [RolloutRequest(prompt_id="p", sample=i, prompt_token_ids=[2, 8, 17], seed=i) for i in range(4)]
    report = sync_weights(Engine(base, tokenizer, loads=True), exported, probe, trainer.score, tolerance=1e-3)
    assert report.digest == folder_digest(exported, "float32")
    assert report.gap_max < 1e-4
    with pytest.raises(EngineError, match="the engine has other weights than those that were exported"):
        sync_weights(Engine(base, tokenizer, loads=False), exported, probe, trainer.score, tolerance=1e-3)


def test_a_seed_gives_an_adapter_whatever_was_drawn_before(base: Path) -> None:
    def begun(seed: int) -> list[torch.Tensor]:
        return [weight.detach() for weight in spec_of(base).wrap(load_model(base), seed=seed).weights.values()]

    ours = begun(0)
    state = torch.random.get_rng_state()
    torch.rand(7)
    moved = torch.random.get_rng_state()
    assert all(map(torch.equal, ours, begun(0)))
    assert torch.equal(torch.random.get_rng_state(), moved)
    assert not torch.equal(moved, state)
    assert not all(map(torch.equal, ours, begun(1)))


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_prj"], r"no linear layer 'q_prj' below its output layer, did you mean 'q_proj'\?; give some of down_proj"),
        (["lm_head"], r"no linear layer 'lm_head'"),
        (["q_proj", "embed_tokens"], r"no linear layer 'embed_tokens'"),
    ],
)
def test_a_target_that_is_no_layer_is_named(base: Path, targets: list[str], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        spec_of(base, targets=targets).wrap(load_model(base), seed=0)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"zero_stage": 0},
        {"zero_stage": 2},
        {"zero_stage": 2, "ranks": 1},
        {"zero_stage": 3},
        {"zero_stage": 3, "activation_checkpointing": True, "offload_optimizer": True},
    ],
)
def test_ranks_train_the_adapter_as_one_process(
    config: dict[str, Any], base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The same steps, files of the same kind, and each goes on from the other's."""
    plain, _ = trainer_of(base, tokenizer)
    expected = train(plain, BATCHES[:2])
    plain_saved = written(plain.save, tmp_path / "plain")
    expected += train(plain, BATCHES[2:])
    with ranks(base, tokenizer, tmp_path / "a", adapter=spec_of(base), **config) as trainer:
        untouched = written(trainer.save, tmp_path / "untouched")
        assert contents(untouched) == contents(written(trainer_of(base, tokenizer)[0].save, tmp_path / "fresh"))
        actual = train(trainer, BATCHES[:2])
        sequences = BATCHES[0].sequences
        now, begun = trainer.score(sequences), trainer.score_frozen(sequences, "initial")
        for adapter in ("initial", "none"):
            frozen = zip(trainer.score_frozen(sequences, adapter), plain.score_frozen(sequences, adapter), strict=True)
            for ours, theirs in frozen:
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert any(np.abs(ours - theirs).max() > 1e-3 for ours, theirs in zip(begun, now, strict=True))
        saved = written(trainer.save, tmp_path / "saved")
        assert contents(saved).keys() == contents(plain_saved).keys()
        exported = written(trainer.export_hf, tmp_path / "exported")
        assert_rounded(written(trainer.export_hf, tmp_path / "half", "bfloat16"), exported)
        actual += train(trainer, BATCHES[2:])
        assert max(gaps(actual, expected).values()) < 1e-5
        ended = contents(written(trainer.save, tmp_path / "ended"))
        trainer.load(saved)
        assert [s.metrics for s in train(trainer, BATCHES[2:])] == [s.metrics for s in actual[2:]]
        assert contents(written(trainer.save, tmp_path / "again")) == ended
        trainer.load(plain_saved)
        assert max(gaps(train(trainer, BATCHES[2:]), expected[2:]).values()) < 1e-5
    again, _ = trainer_of(base, tokenizer)
    again.load(saved)
    assert contents(written(again.export_hf, tmp_path / "merged here")) == contents(exported)
    assert max(gaps(train(again, BATCHES[2:]), expected[2:]).values()) < 1e-5


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_ranks_in_bfloat16_keep_a_float32_adapter(zero_stage: int, base: Path, tokenizer: Any, tmp_path: Path) -> None:
    plain, _ = trainer_of(base, tokenizer)
    expected = train(plain, BATCHES[:2])
    further = spec_of(base, initial=written(plain.save, tmp_path / "plain"))
    with ranks(
        base, tokenizer, tmp_path / "a", dtype="bfloat16", zero_stage=zero_stage, adapter=spec_of(base)
    ) as trainer:
        assert gaps(train(trainer, BATCHES[:2]), expected)["loss"] < 0.05
        saved = written(trainer.save, tmp_path / "saved")
        stats = train(trainer, BATCHES[2:])
        trainer.load(saved)
        assert [each.metrics for each in train(trainer, BATCHES[2:])] == [each.metrics for each in stats]
    with ranks(base, tokenizer, tmp_path / "b", dtype="bfloat16", zero_stage=zero_stage, adapter=further) as trainer:
        begun = written(trainer.save, tmp_path / "begun")
        name = "adapter/adapter_model.safetensors"
        assert (begun / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
