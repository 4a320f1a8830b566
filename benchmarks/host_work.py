"""Seconds of one core that a step's host work takes at full size: no model, everything between the models.

    python benchmarks/host_work.py                       # 1,024 responses of 8,192 tokens in the mean, 8 ranks
    python benchmarks/host_work.py --responses 256 --ranks 2

A real run makes step 0 with its real boxes: requests, rollouts table, scores, verdicts, update, files, hashes, metrics.
Stand-ins answer at once in place of engine, scorers, verifier and ranks, so what remains is the work of the process
that drives the GPUs; they wait for it. Each function has its own CPU seconds, without those of other functions in the
table. Below the sum: what each rank does with its message, side by side with the others, and the decoding of responses
with Qwen's tokenizer, which goes on while others are sampled.
"""

import argparse
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from rollout_set import Stream

from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import Box, make
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.step import rollout, score_step, update_step, verify
from kdrl_core.config import load_recipe
from kdrl_core.ledger import create_run, run_lock
from kdrl_core.logprobs.model import pad_sequences
from kdrl_core.models.qwen_tokenizer import build_qwen_tokenizer
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.messages import RankWork, pack, unpack
from kdrl_core.training.rank_group import Reply
from kdrl_core.types import FinishReason, Rollout, Verdict, VerdictKind

_MAX_TOKENS = 20_480
_GROUP_SIZE = 16
_WATCHED = [
    ("requests", "boxes.step", "_requests"),
    ("repetition rate", "sampling.responses", "repetition_rate"),
    ("rollouts table, without repetition", "boxes.step", "rollouts_table"),
    ("score requests, from the table", "boxes.step", "score_requests"),
    ("teacher's and reference's tables", "boxes.step", "teacher_score"),
    ("teacher's and reference's tables", "boxes.step", "reference_score"),
    ("verdicts", "boxes.step", "verdicts_of"),
    ("logprobs, from the tables", "boxes.step", "ragged"),
    ("advantages", "boxes.step", "training_signals"),
    ("KL sums for update.parquet", "boxes.step", "_signals_of"),
    ("engine's gap", "boxes.step", "_gap"),
    ("response metrics", "boxes.step", "response_metrics"),
    ("update table", "boxes.step", "update_table"),
    ("dealing to ranks", "training.deepspeed_trainer", "batches_of"),
    ("dealing to ranks", "training.deepspeed_trainer", "deal_batches"),
    ("dealing to ranks", "training.deepspeed_trainer", "totals_of"),
    ("dealing to ranks", "training.deepspeed_trainer", "share_of"),
    ("packing for the ranks", "training.messages", "RankWork.pack"),
    ("gathering from the ranks", "training.deepspeed_trainer", "_gather"),
    ("Parquet, written", "boxes.make", "write_table"),
    ("Parquet, read", "boxes.make", "read_table"),
    ("hashes", "ledger.publish", "digest"),
    ("hashes", "ledger.manifest", "digest"),
    ("metrics, alarms", "boxes.stage", "append_metrics"),
    ("metrics, alarms", "boxes.stage", "step_facts"),
]
"""Row of the table, module of kdrl_core, and the name there."""
_REST, _STAND_INS = "everything else", "stand-ins"


class Watch:
    """CPU seconds of this process by label, each without what is measured inside of it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def __call__(self, label: str) -> Iterator[None]:
        started = time.process_time()
        self._inner.append(0.0)
        try:
            yield
        finally:
            taken = time.process_time() - started
            self.seconds[label] += taken - self._inner.pop()
            self._inner[-1] += taken

    def over(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self(label):
                return function(*arguments, **named)

        return call

    def put_on(self) -> None:
        """Measure the functions of `_WATCHED`; what this version of kdrl does not have is left out."""
        for label, module, path in _WATCHED:
            *owners, name = path.split(".")
            place: Any = import_module(f"kdrl_core.{module}")
            for owner in owners:
                place = getattr(place, owner)
            found = getattr(place, name, None)
            if isinstance(found, Box):
                object.__setattr__(found, "function", self.over(label, found.function))
            elif found is not None:
                setattr(place, name, self.over(label, found))


class Answers:
    """Responses of a step as an engine gives them, and what scorers, verifier and ranks say of them."""

    def __init__(self, num_responses: int, mean_tokens: int) -> None:
        rng = np.random.default_rng(0)
        stream = Stream(rng)
        lengths = np.clip(rng.lognormal(np.log(0.79 * mean_tokens), 0.7, num_responses), 16, _MAX_TOKENS).astype(int)
        starts = rng.integers(0, len(stream.ids) - _MAX_TOKENS, num_responses)
        spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        self.num_tokens = int(lengths.sum())
        self.ids = [stream.ids[span].tolist() for span in spans]
        self.engine = [array("f", stream.logprobs[span].tobytes()) for span in spans]
        self.own = [stream.logprobs[span] + stream.gap[span] for span in spans]
        self.teacher = [stream.logprobs[span] + stream.log_ratio[span] for span in spans]
        self.texts = list(stream.texts(starts, lengths))
        self.reasons = [FinishReason.LENGTH if one == _MAX_TOKENS else FinishReason.STOP for one in lengths]
        self.rewards = (rng.random(num_responses) < 0.5).astype(float).tolist()


class Session(StageSession):
    """A session whose engine, scorers, verifier and ranks answer at once."""

    def __init__(self, run: Any, answers: Answers, watch: Watch, ranks: int) -> None:
        super().__init__(run, "stage2")
        self._answers, self._watch = answers, watch
        self._ranks = StandInRanks(answers, watch)
        trainer: Any = DeepSpeedTrainer.__new__(DeepSpeedTrainer)
        trainer._config, trainer._ranks, trainer._step = SimpleNamespace(ranks=ranks, step_timeout_s=0), self._ranks, 0
        trainer._micro_batch_tokens = 22_528
        self._trainer = trainer

    def sampler_at(self, step: int, requests: Any) -> Any:
        return SimpleNamespace(engine=self, sync=None)

    def generate(self, requests: Sequence[Any], **_: Any) -> list[Rollout]:
        with self._watch(_STAND_INS):
            return [
                Rollout(
                    prompt_id=request.prompt_id,
                    sample=request.sample,
                    prompt_token_ids=request.prompt_token_ids,
                    token_ids=self._answers.ids[row],
                    logprobs=self._answers.engine[row],
                    text=self._answers.texts[row],
                    finish_reason=self._answers.reasons[row],
                )
                for row, request in enumerate(requests)
            ]

    def scorer(self, role: str) -> Any:
        return self

    def score(self, requests: Sequence[Any]) -> Any:
        assert len(requests) == len(self._answers.teacher)
        return self._answers.teacher

    @property
    def verifier(self) -> Any:
        return self

    def hidden_seconds(self) -> float:
        return 0.0

    def verify_batch(self, items: Sequence[Any], **_: Any) -> list[Verdict]:
        with self._watch(_STAND_INS):
            return [
                Verdict(
                    kind=VerdictKind.CORRECT if reward else VerdictKind.WRONG,
                    reward=reward,
                    format_reward=1.0,
                    accuracy_reward=reward,
                    extracted="7",
                    reason="it is",
                )
                for reward in self._answers.rewards
            ]


class StandInRanks:
    """Unpacks the work of every rank, and pads it; answers with the logprobs that are at hand."""

    def __init__(self, answers: Answers, watch: Watch) -> None:
        self._of = {(*ids[:64], len(ids)): values for ids, values in zip(answers.ids, answers.own, strict=True)}
        self._watch = watch

    def ask(self, messages: Sequence[bytes], **_: Any) -> list[Reply]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: bytes) -> Reply:
        with self._watch("rank"):
            work = RankWork.unpack(*unpack(message))
            for rows in work.passes:
                pad_sequences([work.batch.sequences[row] for row in rows])
        with self._watch(_STAND_INS):
            real = [row for rows in work.passes[: len(work.passes) - work.num_idle] for row in rows]
            ids = [work.batch.sequences[row].token_ids for row in real]
            values = np.concatenate([self._of[(*one[:64], len(one))] for one in ids])
            header = {"metrics": [{}], "grad_norm": 1.0, "learning_rate": 1e-6, "step": 1}
            header, arrays = unpack(pack(header, {"logprobs": values, "entropies": -values}))
        return Reply(header=header, arrays=arrays)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--responses", type=int, default=1_024, help=f"responses of the step, in groups of {_GROUP_SIZE}"
    )
    parser.add_argument(
        "--tokens", type=int, default=8_192, help=f"tokens of a response in the mean, {_MAX_TOKENS} at most"
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3, help="the least of these turns counts")
    asked = parser.parse_args()
    prompts = asked.responses // _GROUP_SIZE
    sizes = {
        "steps": 100,
        "prompts_per_step": prompts,
        "mini_batch_prompts": prompts,
        "group_size": _GROUP_SIZE,
        "ref_beta": 0.001,
        "evaluate_every": "null",
        "checkpoint.every": 100,
    }
    recipe = load_recipe("miniature", ["stage1=null", *(f"stage2.{name}={size}" for name, size in sizes.items())])
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    tokenizer = build_qwen_tokenizer("r1-distill")
    answers, watch, turns = Answers(prompts * _GROUP_SIZE, asked.tokens), Watch(), []
    watch.put_on()
    for _ in range(asked.turns):
        with tempfile.TemporaryDirectory(prefix="kdrl-host-work-") as folder:
            run = create_run("host-work", recipe, artifacts=Path(folder))
            with run_lock(run.paths.lock):
                filter_run(run)
                session = Session(run, answers, watch, asked.ranks)
                watch.seconds.clear()
                with watch(_REST):
                    make(session, rollout, 0)
                    score_step(session, 0)
                    make(session, verify, 0)
                    update_step(session, 0)
            files = {path.name: path.stat().st_size for path in run.paths.step("stage2", 0).glob("*.parquet")}
        with watch("decoding"):
            for token_ids in answers.ids:
                tokenizer.decode(token_ids, skip_special_tokens=True)
        turns.append(dict(watch.seconds))
    _print(turns, answers, ranks=asked.ranks, files=files)


def _print(turns: list[dict[str, float]], answers: Answers, *, ranks: int, files: dict[str, int]) -> None:
    labels = list(dict.fromkeys([*(label for label, *_ in _WATCHED), _REST]))
    least = {label: min(turn.get(label, 0.0) for turn in turns) for label in (*labels, "rank", "decoding")}
    total = min(sum(turn.get(label, 0.0) for label in labels) for turn in turns)
    table = Table("function", "CPU s", "share", "ns per token")

    def add(label: str, seconds: float, *, has_share: bool = True) -> None:
        share = f"{seconds / total:.0%}" if has_share else ""
        table.add_row(label, f"{seconds:.2f}", share, f"{1e9 * seconds / answers.num_tokens:,.0f}")

    for label in labels:
        add(label, least[label])
    table.add_section()
    add("all", total)
    table.add_section()
    add(f"one of {ranks} ranks: unpacking, padding", least["rank"] / ranks, has_share=False)
    add("decoding, while others are sampled", least["decoding"], has_share=False)
    console = Console()
    console.print(f"{len(answers.ids):,} responses, {answers.num_tokens:,} tokens")
    console.print(table)
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sorted(files.items()))
    console.print(f"least of {len(turns)} turns; files: {sizes}", highlight=False)


if __name__ == "__main__":
    main()
