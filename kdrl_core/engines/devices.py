"""The GPUs that this process may use."""

import os

from kdrl_core.errors import EngineError


def visible_devices(count: int, *, needed_for: str) -> list[str]:
    """The first `count` GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. `needed_for` says in the
    error what asks for them. Raises EngineError if there are fewer."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [each.strip() for each in named.split(",") if each.strip()] if named is not None else None
    if found is None:
        found = [str(number) for number in range(torch.cuda.device_count())]
    if len(found) < count:
        raise EngineError(f"{count} GPUs are needed ({needed_for}), {len(found)} are visible; ask for fewer")
    return found[:count]
