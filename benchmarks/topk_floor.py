"""How large the gradient of Top-K (A.3) is, by its floor and by K: the table of docs/method.md.

One step of the miniature for each pair, from the shipped student (no stage 1): 32 problems, 8 responses each, β = 0.2
as in the sweeps. The responses are the same in all of them. Printed is the norm of the gradient before it is clipped;
k2 is for comparison. Takes a minute on one core.
"""

import tempfile
from pathlib import Path

from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.step import rollout, score_step, update_step, verify
from kdrl_core.config import load_recipe
from kdrl_core.ledger import create_run, run_lock

KS = (1, 4, 20)
FLOORS = (-5.0, -10.0, -20.0, -100.0, -1000.0)


def grad_norm(*fields: str) -> float:
    """‖gradient‖ of the first step of the miniature's stage 2 with these fields of the stage."""
    sizes = ("steps=1", "evaluate_every=null", "beta={init: 0.2}", "max_grad_norm=1e9")
    recipe = load_recipe("miniature", ["stage1=null", *(f"stage2.{field}" for field in (*sizes, *fields))])
    with tempfile.TemporaryDirectory() as folder:
        run = create_run("r", recipe, artifacts=Path(folder))
        with run_lock(run.paths.lock):
            filter_run(run)
            session = stage_session(run.paths.root, "stage2")
            make(session, rollout, 0)
            score_step(session, 0)
            make(session, verify, 0)
            found = update_step(session, 0).metrics["optim/grad_norm"]
            close_sessions()
    return float(found)


def topk_norm(k: int, floor: float) -> float:
    return grad_norm("kl_estimator=topk", f"topk.k={k}", f"topk.floor={floor}")


def main() -> None:
    print(f"k2: {grad_norm():.2f}")
    print("| K of 27 | " + " | ".join(f"floor {floor:g}".replace("-", "−") for floor in FLOORS) + " |")
    for k in KS:
        print(f"| {k} | " + " | ".join(f"{topk_norm(k, floor):.3g}" for floor in FLOORS) + " |", flush=True)


if __name__ == "__main__":
    main()
