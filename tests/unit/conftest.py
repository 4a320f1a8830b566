"""A machine with GPUs, as far as `nvidia-smi` and CUDA_VISIBLE_DEVICES tell."""

import os
from pathlib import Path
from typing import Any

import pytest
from fake_smi import A100S, MIGS


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts an `nvidia-smi` on PATH that prints what it is given, and sets CUDA_VISIBLE_DEVICES."""

    def put(query: str = A100S, *, names: str | None = None, listing: str = MIGS, status: int = 0) -> None:
        (tmp_path / "query").write_text(query)
        (tmp_path / "listing").write_text(listing)
        tool = tmp_path / "nvidia-smi"
        tool.write_text(
            f'#!/bin/sh\ncase "$1" in -L) cat {tmp_path}/listing;; *) cat {tmp_path}/query;; esac\nexit {status}\n'
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        if names is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)

    return put
