"""One rank of two: gradients of a `LogprobModel` whose weights ZeRO-3 has partitioned, against the same model whole.

Run by test_parity_zero3.py under torch.distributed.run; exits with 0 only if every gradient agrees.
"""

import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from kdrl_core.logprobs.chunked import TokenStatistics
from kdrl_core.logprobs.model import LogprobModel, PaddedBatch, pad_sequences
from kdrl_core.miniature.models import MiniatureModel, build_model, build_tokenizer
from kdrl_core.types import ScoreRequest

TOLERANCE = 1e-5


def main(*, is_tied: bool) -> None:
    """Two steps: the first against the whole model, the second to see that partitions are gathered again."""
    deepspeed.init_distributed("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    spec = MiniatureModel(hidden_size=16, num_layers=1, tie_word_embeddings=is_tied, sft_steps=0, learning_rate=1.0)
    whole = build_model(spec, build_tokenizer(), seed=0)
    reference = LogprobModel(whole, temperature=0.7)
    losses = [loss_of(forward(reference, batch_of(other))) for other in range(world)]
    (torch.stack(losses).sum() / world).backward()

    model = build_model(spec, build_tokenizer(), seed=0)
    engine, *_ = deepspeed.initialize(
        model=LogprobModel(model, temperature=0.7),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    assert model.lm_head.weight.numel() == 0, "the output layer is not partitioned"
    for step in range(2):
        loss = loss_of(forward(engine, batch_of(rank)))
        engine.backward(loss)
        if step == 0:
            assert abs(float(loss.detach()) - float(losses[rank].detach())) < TOLERANCE * abs(
                float(losses[rank].detach())
            )
            for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
                gap = float((safe_get_full_grad(mine) - theirs.grad).norm() / theirs.grad.norm())
                assert gap < TOLERANCE, f"{name}: gradient is off by {gap}"
        engine.step()
        assert torch.isfinite(loss)


def batch_of(rank: int) -> PaddedBatch:
    """Two ragged sequences, others on every rank."""
    return pad_sequences(
        [
            ScoreRequest(prompt_token_ids=[2, 3, 4 + rank], token_ids=[5]),
            ScoreRequest(prompt_token_ids=[6], token_ids=[7, 8, 9 + rank]),
        ]
    )


def forward(model: torch.nn.Module, batch: PaddedBatch) -> TokenStatistics:
    """Logprobs, entropy and Top-K KL."""
    ids = torch.arange(4).expand(2, 3, 4)
    found: TokenStatistics = model(batch, ids, ids.float(), with_entropy=True, floor=-12.0)
    return found


def loss_of(statistics: TokenStatistics) -> torch.Tensor:
    """A loss with all three."""
    assert statistics.entropy is not None
    assert statistics.topk_kl is not None
    return statistics.logprobs.sum() + 0.3 * statistics.entropy.sum() + 0.1 * statistics.topk_kl.sum()


if __name__ == "__main__":
    main(is_tied=sys.argv[1] == "tied")
