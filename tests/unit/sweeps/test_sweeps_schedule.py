"""Which cell starts next, and how much work a sweep is."""

from kdrl_core.boxes.sharing import parts_of
from kdrl_core.look.sweeps.request import estimate, next_cell
from kdrl_core.look.sweeps.spec import Cell, expand, load_sweep, validate_sweep


def _cells(**fields: object) -> list[Cell]:
    spec = {"name": "s", "variants": {"a": {}, "b": {"stage2.objective": "grpo"}}, "seeds": 2, **fields}
    return expand(validate_sweep(spec, origin="s"))


def _keys(cell: Cell, *names: str) -> set[str]:
    return {part.key for part in parts_of(cell.recipe) if part.name in names}


def test_a_cell_waits_for_the_stage_that_another_is_making() -> None:
    cells = _cells()
    parts = {cell.run: parts_of(cell.recipe) for cell in cells}
    first, same_seed, other_seed, last = cells
    assert next_cell(cells, [], set(), parts) is first
    assert next_cell([same_seed, other_seed, last], [first], set(), parts) is other_seed
    assert next_cell([same_seed, last], [first, other_seed], set(), parts) is None
    assert next_cell([same_seed, last], [first, other_seed], _keys(first, "data"), parts) is None
    assert next_cell([same_seed, last], [first, other_seed], _keys(first, "data", "stage1"), parts) is same_seed


def test_a_cell_that_failed_keeps_nobody_waiting() -> None:
    _, same_seed, *_ = cells = _cells()
    assert next_cell([same_seed], [], set(), {cell.run: parts_of(cell.recipe) for cell in cells}) is same_seed


def test_estimate_counts_shared_steps_once() -> None:
    work = estimate(expand(load_sweep("table1").model_copy(update={"seeds": 3})))
    assert work.alone == 15 * (40 + 80)
    assert work.to_train == 3 * 40 + 15 * 80
    assert work.by_part["stage1"] == (15, 3)
    assert work.by_part["stage2"] == (15, 15)


def test_what_changes_a_part_and_what_does_not() -> None:
    fields: dict[str, tuple[object, set[str]]] = {
        "stage2.learning_rate": (
            0.3,
            {"data", "stage1", *(f"evaluation of {m}" for m in ("base", "stage1", "teacher"))},
        ),
        "stage2.data.max_problems": (300, {"evaluation of base", "evaluation of teacher"}),
        "stage1.steps": (3, {"data", "evaluation of base", "evaluation of teacher"}),
        "teacher.path": ("other", {"data", "stage1", "evaluation of base", "evaluation of stage1"}),
        "evaluation.temperature": (0.5, {"data"}),
        "trainer.activation_checkpointing": (True, {"data"}),
        "runtime.num_threads": (3, set()),
    }
    for field, (value, shared) in fields.items():
        cells = _cells(variants={"a": {}, "b": {field: value}}, seeds=1)
        plain, other = ({part.name: part.key for part in parts_of(cell.recipe)} for cell in cells)
        assert {name for name, key in plain.items() if other[name] == key} == shared, field


def test_samples_of_sft_are_shared_by_learning_rates() -> None:
    sft = {"stage2.objective": "sft"}
    fields = {"learning_rate": 0.1, "sft.keep": "reward", "sft.temperature": 0.6, "sft.aggregation": "token_mean"}
    other = {name: {**sft, f"stage2.{name}": value} for name, value in (fields | {"temperature": 0.5}).items()}
    cells = _cells(variants={"plain": sft, **other}, seeds=1)
    plain, *shared, temperature = ({part.name: part.key for part in parts_of(cell.recipe)} for cell in cells)
    assert {part["samples of stage2"] for part in shared} == {plain["samples of stage2"]}
    assert len({part["stage2"] for part in (plain, *shared)}) == 5
    assert temperature["samples of stage2"] != plain["samples of stage2"]
