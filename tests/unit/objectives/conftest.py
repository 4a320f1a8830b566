"""One torch thread, since two cores are shared with everything else; the batch that most tests start from."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from objectives_support import make_batch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch() -> dict[str, Any]:
    """Arguments of `kdrl_loss`, the test's own."""
    return make_batch()
