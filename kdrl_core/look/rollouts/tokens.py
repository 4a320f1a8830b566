"""The text of each token of a response, by the tokenizer of the run's own models."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from kdrl_core.config.paths import resolve_path
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import RunPaths

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TokenReader:
    """Texts of tokens, if a model of the run is still there. Never runs code from a model folder."""

    def __init__(self, root: Path, stage: str) -> None:
        self._candidates = list(_tokenizer_files(root, stage))
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def texts(self, token_ids: Sequence[int] | None) -> list[str] | None:
        """One text per token; joined, they are the decoded response with its special tokens. If several tokens make up
        a character, the last of them has it and the others are empty. None without a tokenizer."""
        tokenizer = self._load()
        if tokenizer is None or token_ids is None:
            return None
        ids, texts, shown, start = list(token_ids), [], "", 0
        for end in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            if text.endswith(_BROKEN) and end < len(ids):
                texts.append("")
                continue
            texts.append(text[len(shown) :])
            # Decode from the last token on: some tokenizers drop a space at the start.
            start = end - 1
            shown = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        return texts

    def _load(self) -> Any:
        with self._lock:
            while self._tokenizer is None and self._candidates:
                from tokenizers import Tokenizer  # only where a response is shown in full

                with suppress(Exception):  # each damage of a tokenizer fails in its own way, some in a bare Exception
                    self._tokenizer = Tokenizer.from_file(str(self._candidates[0]))
                self._candidates.pop(0)
            return self._tokenizer


def _tokenizer_files(root: Path, stage: str) -> Iterator[Path]:
    """tokenizer.json files that the stage may have used, most likely first."""
    paths = RunPaths(root)
    folders = [*sorted((root / "checkpoints" / stage).glob("step-*"), reverse=True), paths.student]
    with suppress(OSError, ValueError, yaml.YAMLError, KdrlError, KeyError, TypeError, RecursionError):
        folders.append(resolve_path(yaml.safe_load(paths.recipe.read_text())["student"]["path"]))
    folders += sorted((root / "checkpoints").glob("*/step-*"))
    yield from (file for folder in folders if (file := folder / "tokenizer.json").is_file())
