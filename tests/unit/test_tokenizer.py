"""A tokenizer is what its files say, and stays so through any number of checkpoints."""

import json
from pathlib import Path

import pytest

from kdrl_core.config import resolve_path
from kdrl_core.errors import ModelError
from kdrl_core.models.tokenizer import read_tokenizer

SOURCE = resolve_path("builtin:miniature/student")


def vocabulary(path: Path) -> dict[str, object]:
    values = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    return {name: values[name] for name in ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")}


def test_saved_again_and_again_it_is_the_same(tmp_path: Path) -> None:
    path = SOURCE
    for generation in ("first", "second"):
        tokenizer = read_tokenizer(path)
        assert len(tokenizer) == 27
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<|end|>", "<|pad|>", None)
        assert tokenizer.encode("3+5", add_special_tokens=False) == [10, 17, 12]
        assert tokenizer.encode("x", add_special_tokens=False) == [26]  # the tokenizer's own unknown token, "?"
        path = tmp_path / generation
        tokenizer.save_pretrained(path)
        # A checkpoint has a config.json beside it, from which transformers would guess another class.
        (path / "config.json").write_bytes((SOURCE / "config.json").read_bytes())
        assert vocabulary(path) == vocabulary(SOURCE)
        assert (path / "chat_template.jinja").read_bytes() == (SOURCE / "chat_template.jinja").read_bytes()


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"has no usable tokenizer .*; give a folder with tokenizer\.json"):
        read_tokenizer(tmp_path)
