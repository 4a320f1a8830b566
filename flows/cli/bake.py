"""`kdrl bake-teacher`: a copy of a teacher that servers score with at the student's temperature."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.shared import err, errors, out
from kdrl_core.errors import ModelError


def bake_teacher(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The teacher: a Hugging Face model directory.")],
    temperature: Annotated[
        float, typer.Option(min=0.01, max=10.0, help="The stage's sampling temperature, e.g. 0.6 (Table 3).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the copy is written.")],
) -> None:
    """Divide a teacher's output layer by the temperature, so that a server's logprobs are those of softmax(logits / T).

    Serve the copy (`vllm serve DIR --max-logprobs 32`) and set teacher.server.urls and teacher.server.temperature.
    """
    with errors():
        if output.exists():
            raise ModelError(f"--output {output} exists; give another folder")
        err.print(f"baking temperature {temperature:g} into a copy of {model} …")
        from kdrl_core.models.prepare import bake_temperature

        manifest = bake_temperature(model.absolute(), output.absolute(), temperature)
        out.say(f"{output}  {manifest.size / 2**20:,.1f} MiB")
