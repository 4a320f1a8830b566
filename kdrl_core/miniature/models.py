"""Tokenizer and models of the miniature worlds: Qwen2 architecture, from scratch, trained by SFT on worked chains."""

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kdrl_core.miniature.world import LENGTHS, OPERATORS, sample_questions, solve, solve_result_first

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 128
Example = tuple[str, str]
"""A question and its worked response."""
_WAYS_SEED = 99
"""Seed of the choice between two ways to work a training chain. The chains have a seed of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Size of a miniature model."""

    hidden_size: int
    num_layers: int
    tie_word_embeddings: bool
    num_heads: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniatureModel(Architecture):
    """Architecture and training of one miniature model.

    `label_smoothing` keeps the teacher uncertain: with a perfectly confident one, R² of a few tokens dominates k2.
    """

    sft_steps: int
    learning_rate: float
    batch_size: int = 64
    label_smoothing: float = 0.0
    result_first_share: float = 0.0
    """Share of the training chains that are worked result first. Such a model knows two ways; the others know one."""


def build_tokenizer(units: Sequence[str] = (), *, context: int = CONTEXT) -> Any:
    """A character tokenizer in which the tags of a response, `\\boxed{` and each of `units` are single tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END, USER, ASSISTANT]
    tags = ["<think>", "</think>", "\\boxed{"]
    characters = [*"0123456789", *OPERATORS, "=", ",", "}", "(", ")", " ", "?"]
    vocabulary = {token: index for index, token in enumerate([*special, *tags, *characters, *units])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))  # noqa: S106 (a token of text)
    tokenizer.pre_tokenizer = Split(Regex("|".join([*map(re.escape, units), "."])), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_model(spec: Architecture, tokenizer: Any, *, seed: int) -> Any:
    """A freshly initialised model of `spec`; its weights depend on `seed` alone."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=4 * spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=spec.tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        use_sliding_window=False,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def train_model(
    model: Any,
    tokenizer: Any,
    batches: Iterable[Sequence[Example]],
    *,
    learning_rate: float,
    num_steps: int,
    label_smoothing: float = 0.0,
    beta2: float = 0.999,
    warmup_steps: int = 20,
) -> Any:
    """SFT on `num_steps` batches of questions with worked responses: cross-entropy on response tokens, linear decay.
    Trains `model` in place and returns it, in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, beta2), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup_steps) * (1.0 - step / num_steps)
    )
    model.train()
    for examples in itertools.islice(batches, num_steps):
        ids, labels = _sft_batch(tokenizer, examples)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=label_smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def chain_batches(spec: MiniatureModel, *, seed: int, exclude: set[str]) -> Iterator[list[Example]]:
    """Endless batches of freshly drawn chains (none of `exclude`) with their worked responses."""
    rng, ways = random.Random(seed), random.Random(_WAYS_SEED)
    while True:
        questions = sample_questions(rng, spec.batch_size, LENGTHS, exclude=exclude)
        yield [
            (q, solve_result_first(q) if ways.random() < spec.result_first_share else solve(q)[0]) for q in questions
        ]


def save_model(model: Any, tokenizer: Any, path: Path) -> None:
    """Write an ordinary Hugging Face model directory."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _sft_batch(tokenizer: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = []
    for question, worked in examples:
        prompt = tokenizer.encode(f"{USER}{question}{ASSISTANT}", add_special_tokens=False)
        response = tokenizer.encode(worked + END, add_special_tokens=False)
        rows.append((prompt, response))
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, response) in enumerate(rows):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[row, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return ids, labels
