"""The commands and the Python in the code blocks of docs/*.md."""

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def section(page: str, title: str) -> str:
    """The text of a page below a heading, up to the next one of this level."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def python(page: str, title: str) -> str:
    """The Python below a heading."""
    (found,) = re.findall(r"^```python\n(.*?)^```", section(page, title), re.M | re.S)
    return str(found)


def blocks(page: str, title: str | None = None) -> list[list[list[str]]]:
    """The commands of each code block of a page, or below one of its headings, as words, without comments."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8") if title is None else section(page, title)
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
