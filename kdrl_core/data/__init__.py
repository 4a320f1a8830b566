"""Problems: read from files, filtered by the paper's rules, rendered as prompts.

Torch and transformers are not imported before a tokenizer is loaded."""

from kdrl_core.data.filter import filter_problems
from kdrl_core.data.filter_report import FilterReport, RuleCount
from kdrl_core.data.prompts import ChatTokenizer, load_tokenizer, render_prompts, think_opened
from kdrl_core.data.read import find_files, read_problems
from kdrl_core.data.reading import Reading, malformed_rows
from kdrl_core.data.schema import POOL_SCHEMA, PROBLEM_SCHEMA, SKYWORK_SCHEMA
from kdrl_core.data.stream import filter_files

__all__ = [
    "POOL_SCHEMA", "PROBLEM_SCHEMA", "SKYWORK_SCHEMA", "ChatTokenizer", "FilterReport", "Reading", "RuleCount",
    "filter_files", "filter_problems", "find_files", "load_tokenizer", "malformed_rows", "read_problems",
    "render_prompts", "think_opened",
]  # fmt: skip
