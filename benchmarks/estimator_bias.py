"""Is the estimator right? Expected value and gradient of every KL estimator, over all responses of a small world.

Nothing is sampled: student and teacher are autoregressive softmax models over a few tokens, the last of which ends a
response, and every response is enumerated with its probability, in float64. kdrl's own functions are compared with the
exact reverse KL and its exact gradients, which are differentiated from the definition:

- token: Σ_prefix π(prefix) ∇KL(π(·|prefix) ‖ π_T(·|prefix)), prefixes fixed as they were sampled; (27) uses this one;
- whole: ∇ Σ_o π(o) log(π(o) / π_T(o)), which also credits a token with the KL of what follows.

Columns: value and sd, expectation and standard deviation of the estimate over responses, as multiples of the exact KL;
error, ‖E[gradient] − exact‖ / ‖exact‖ by either; cosine of E[gradient] and the exact one by token; variance, the trace
of the gradient's covariance over responses. Estimates are summed over a response's tokens: a constant divisor
(`total_tokens`) would change the last column alone. Prints tables; asserts nothing.
"""

import argparse
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from kdrl_core.objectives import kdrl_loss, kl_estimate, topk_kl

_TEACHERS = {"close": 0.3, "far": 1.5}
"""Standard deviation of the teacher's logits from the student's."""
_COLUMNS = ("value", "sd", "error\ntoken", "error\nwhole", "cosine", "variance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Expected value and gradient of an estimator."""

    estimator: str
    value: float
    """E[estimate] / exact KL."""
    value_std: float
    """Standard deviation of the estimate over responses / exact KL."""
    token_error: float
    """‖E[gradient] − exact‖ / ‖exact‖, exact per token."""
    whole_error: float
    """The same against the gradient of the KL of whole responses."""
    cosine: float
    """Of E[gradient] and the exact gradient per token; nan where E[gradient] is 0."""
    variance: float
    """Trace of the gradient's covariance over responses."""


class World:
    """All responses of up to `length` tokens, the student's and the teacher's probabilities of them."""

    def __init__(self, vocabulary: int, length: int, distance: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(vocabulary + 1, vocabulary), (length, vocabulary)]  # by previous token (the last: none), by position
        noise = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.parameters = [student.clone().requires_grad_() for student, _ in noise]
        self.vocabulary, self.responses = vocabulary, list(_responses(vocabulary, length))
        width = max(map(len, self.responses))
        self.mask = torch.tensor([[t < len(response) for t in range(width)] for response in self.responses])
        self.tokens = torch.tensor([response + (0,) * (width - len(response)) for response in self.responses])
        self.student = self._log_softmax(self.parameters)
        self.teacher = self._log_softmax([student + distance * teacher for student, teacher in noise])
        self.logprobs, self.teacher_logprobs = self._of_tokens(self.student), self._of_tokens(self.teacher)
        self.probabilities = self.logprobs.sum(1).exp()

    def _log_softmax(self, parameters: list[Tensor]) -> Tensor:
        """[responses, T, V] at every token of every response."""
        by_previous, by_position = parameters
        previous = torch.cat([torch.full_like(self.tokens[:, :1], self.vocabulary), self.tokens[:, :-1]], 1)
        return (by_previous[previous] + by_position[: self.tokens.shape[1]]).log_softmax(-1)

    def _of_tokens(self, log_probabilities: Tensor) -> Tensor:
        return torch.where(self.mask, log_probabilities.gather(-1, self.tokens[..., None])[..., 0], 0.0)

    def gradient(self, scalar: Tensor) -> Tensor:
        """Gradient by the student's parameters, flattened."""
        gradients = torch.autograd.grad(scalar, self.parameters, retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The KL, its gradient per token, and its gradient over whole responses."""
        # π(o_<t) is the sum over the responses that begin with o_<t, so each response counts its own prefixes.
        kl = (self.student.exp() * (self.student - self.teacher)).sum(-1)
        per_token = (self.probabilities.detach() * torch.where(self.mask, kl, 0.0).sum(1)).sum()
        whole = (self.probabilities * (self.logprobs - self.teacher_logprobs).sum(1)).sum()
        return whole.detach(), self.gradient(per_token), self.gradient(whole)

    def row(self, estimator: str, losses: Tensor) -> Row:
        """Summary of `losses` [responses], one per response, with their gradients."""
        kl, token, whole = self.exact()
        weights = self.probabilities.detach()
        gradients = torch.stack([self.gradient(loss) for loss in losses])
        expected, mean = weights @ gradients, weights @ losses.detach()
        norm = expected.norm()
        return Row(
            estimator=estimator,
            value=(mean / kl).item(),
            value_std=((weights @ (losses.detach() - mean).square()).sqrt() / kl).item(),
            token_error=((expected - token).norm() / token.norm()).item(),
            whole_error=((expected - whole).norm() / whole.norm()).item(),
            cosine=(expected @ token / (norm * token.norm())).item() if norm > 1e-12 else float("nan"),
            variance=(weights @ (gradients - expected).square().sum(1)).item(),
        )

    def topk(self, k: int, floor: float) -> Tensor:
        """[responses, T] reverse KL to the teacher's k best tokens."""
        logits, ids = self.teacher.topk(k)
        return topk_kl(self.student, ids, logits, floor=floor, response_mask=self.mask)


def rows(world: World) -> list[Row]:
    """Every estimator. For comparison also k1 differentiated as a loss, which kdrl does not offer."""
    found = []
    for name in ("k1", "k2", "k3", "k3_k2grad"):
        found.append(world.row(f"{name}, per token", _losses(world, name)))
    found.append(world.row("k1 differentiated", (world.logprobs - world.teacher_logprobs).sum(1)))
    for name in ("k1", "k2", "k3"):
        sums = (world.logprobs.sum(1, keepdim=True), world.teacher_logprobs.sum(1, keepdim=True))
        found.append(world.row(f"{name} of the summed R", kl_estimate(*sums, name)[:, 0]))
    found.append(
        world.row(f"top-{world.vocabulary} (all)", _losses(world, "topk", world.topk(world.vocabulary, -10.0)))
    )
    for floor in (-10.0, -20.0, -100.0):
        k = world.vocabulary - 1
        found.append(world.row(f"top-{k}, floor {floor:.0f}", _losses(world, "topk", world.topk(k, floor))))
    return found


def own_length_errors(world: World) -> list[float]:
    """Relative error of k2's expected gradient under the mean over a batch's *own* tokens, for 1 and 2 responses.

    Exact is the gradient per token divided by the expected length. Lengths are random, so E[Σ / Σ|o|] ≠ E[Σ] / E[|o|].
    """
    weights, lengths = world.probabilities.detach(), world.mask.sum(1).double()
    exact = world.exact()[1] / (weights @ lengths)
    sums = torch.stack([world.gradient(loss) for loss in _losses(world, "k2")])
    single = weights @ (sums / lengths[:, None])
    pairs = (sums[:, None] + sums) / (lengths[:, None] + lengths)[..., None]
    double = torch.einsum("i,j,ijp->p", weights, weights, pairs)
    return [((mean - exact).norm() / exact.norm()).item() for mean in (single, double)]


def _losses(world: World, estimator: str, topk: Tensor | None = None) -> Tensor:
    """[responses] the distillation loss of each response alone, summed over its tokens, by `kdrl_loss`."""
    losses = []
    for row in torch.arange(len(world.responses)).split(1):
        loss, _ = kdrl_loss(
            world.logprobs[row],
            advantages=torch.zeros(1, dtype=torch.float64),
            teacher_logprobs=world.teacher_logprobs[row],
            response_mask=world.mask[row],
            rewards=None,
            group_size=None,
            beta=1.0,
            kl_estimator=estimator,
            topk=None if topk is None else topk[row],
            total_tokens=1,
        )
        losses.append(loss)
    return torch.stack(losses)


def _responses(vocabulary: int, length: int, prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every response: ends with the last token of the vocabulary, or is cut at `length`."""
    for token in range(vocabulary):
        response = (*prefix, token)
        if token == vocabulary - 1 or len(response) == length:
            yield response
        else:
            yield from _responses(vocabulary, length, response)


def _number(value: float) -> str:
    if value != value:
        return "–"
    return "0" if abs(value) < 1e-12 else f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=3, help="tokens, the end of the response included")
    parser.add_argument("--length", type=int, default=3, help="longest response in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the two models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for length in sorted({1, arguments.length}):
        for teacher, distance in _TEACHERS.items():
            world = World(arguments.vocabulary, length, distance, arguments.seed)
            kl = world.exact()[0].item()
            console.print(
                f"{len(world.responses)} responses of up to {length} token(s), {teacher} teacher: KL {kl:.4f}"
            )
            table = Table(Column("estimator", no_wrap=True), *(Column(name, justify="right") for name in _COLUMNS))
            for row in rows(world):
                table.add_row(row.estimator, *map(_number, astuple(row)[1:]))
            console.print(table)
            one, two = own_length_errors(world)
            console.print(f"k2 divided by the batch's own token count: error {one:.3f} (1 response), {two:.3f} (2)\n")


if __name__ == "__main__":
    main()
