"""The commands in the code blocks of docs/*.md."""

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[list[list[str]]]:
    """The commands of each code block of a page, as words, without comments."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        lines = block.replace("\\\n", " ").splitlines()
        commands = [line for line in lines if line.startswith(("kdrl ", "vllm "))]
        found.append([shlex.split(line, comments=True) for line in commands])
    return found


def serving() -> list[tuple[str, list[list[str]]]]:
    """Page and commands of every block that starts servers."""
    pages = sorted(path.stem for path in DOCS.glob("*.md"))
    return [(page, block) for page in pages for block in blocks(page) if any(is_server(words) for words in block)]


def is_server(words: list[str]) -> bool:
    return words[:2] in (["kdrl", "serve"], ["vllm", "serve"])


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def settings(words: list[str]) -> list[str]:
    """What follows each `--set`."""
    return [words[at + 1] for at, word in enumerate(words) if word == "--set"]
