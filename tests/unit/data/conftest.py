"""A valid recipe from plain values, and a small real tokenizer with a chat template, both built in code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.config import Recipe
from kdrl_core.config.load import validate_recipe

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
LABELS = ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-32B")
PAPER_RULES = {"drop_passes_at_least": 15, "drop_all_failed": True, "max_unsolved_share": 0.1}


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """`make_recipe(data rules…)`: one GRPO stage; keyword `values` overrides the recipe's own fields."""

    def make(
        *, max_prompt_tokens: int = 1024, values: dict[str, Any] | None = None, stage: str = "stage1", **data: Any
    ) -> Recipe:
        config = {
            "objective": "grpo",
            "data": {"files": ["problems.jsonl"], **data},
            "steps": 1,
            "prompts_per_step": 2,
            "mini_batch_prompts": 2,
            "group_size": 2,
            "learning_rate": 1e-6,
            "temperature": 0.6,
            "max_prompt_tokens": max_prompt_tokens,
            "max_response_tokens": 8,
            "entropy_coef": 0.0,
        }
        recipe = {
            "name": "test",
            "student": {"path": "no-such-model"},
            "evaluation": {"benchmarks": [{"name": "b", "file": "b.jsonl"}]},
            stage: config,
        }
        return validate_recipe(recipe | (values or {}), origin="test")

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer (one token a byte) with special tokens that would be added if one let it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<bos>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.add_special_tokens(specials)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")
    tokenizer.chat_template = CHAT_TEMPLATE
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


class WordTokenizer:
    """A stand-in with one token a word, for tests in which only counts matter."""

    chat_template = "yes"

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [list(range(len(one.split()))) for one in text]}

    def apply_chat_template(self, conversation: list[list[dict[str, str]]], **options: Any) -> list[str]:
        assert options == {"chat_template": None, "add_generation_prompt": True, "tokenize": False}
        return [turns[0]["content"] for turns in conversation]


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer()
