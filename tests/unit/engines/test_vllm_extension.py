"""What kdrl's vLLM worker does to memory, and to the temperature of scores."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from kdrl_core.engines.vllm_extension import KdrlWorker, release_pages


def test_pages_of_tensors_are_given_back_at_the_same_addresses() -> None:
    cache = torch.ones(64, 2**20)  # 256 MiB
    part, small = cache[1:3], torch.ones(4)
    place, before = cache.data_ptr(), psutil.Process().memory_info().rss
    release_pages([cache, part, small])
    assert before - psutil.Process().memory_info().rss > 240 * 2**20
    assert cache.data_ptr() == place
    assert float(cache[1:-1].abs().sum()) == 0.0
    assert small.tolist() == [1.0] * 4  # it has no page of its own
    cache[1] = 2.0
    assert float(cache[1].mean()) == 2.0


def test_an_engine_without_sleep_mode_is_told_so() -> None:
    with pytest.raises(RuntimeError, match="started without --enable-sleep-mode"):
        release_pages([torch.empty(4, device="meta")])


def test_a_temperature_leaves_a_model_its_own_scale_of_logits() -> None:
    """As Granite's and Cohere's have; the temperature is set anew, not on top of the last one."""
    worker, processor = KdrlWorker(), SimpleNamespace(scale=0.0625)
    worker.model_runner = SimpleNamespace(  # type: ignore[attr-defined]
        get_model=lambda: SimpleNamespace(logits_processor=processor)
    )
    for temperature in (0.5, 2.0, 1.0):
        worker.kdrl_scale_prompt_logprobs(temperature)
        assert processor.scale == 0.0625 / temperature
