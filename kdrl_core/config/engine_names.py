"""The engines that a recipe can name."""

from typing import Literal

LocalEngine = Literal["transformers", "vllm"]
"""What samples or scores in this process."""

EngineName = Literal[LocalEngine, "server"]
"""What samples: in this process, or replicas of vLLM."""
