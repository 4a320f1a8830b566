"""Traps: a pickle that writes a file when it is loaded, and files that any pickle reader would fall for."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.config import resolve_path


class _Bait:
    """What its pickle does when it is loaded: make the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Exists once any of the traps has run."""
    return tmp_path / "executed"


@pytest.fixture
def bait(marker: Path) -> bytes:
    """A pickle that makes `marker` when it is loaded."""
    return pickle.dumps(_Bait(marker))


@pytest.fixture
def torch_bait(marker: Path, tmp_path: Path) -> bytes:
    """The same as torch writes it."""
    import torch

    torch.save({"lm_head.weight": _Bait(marker)}, tmp_path / "bait.pt")
    return (tmp_path / "bait.pt").read_bytes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the miniature's student that a test may spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in resolve_path("builtin:miniature/student").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def no_pickles(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Whoever opens a pickle from now on fails, even where weights_only would make it harmless."""
    import torch

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    def arm() -> None:
        monkeypatch.setattr(torch, "load", refuse)
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)

    return arm
