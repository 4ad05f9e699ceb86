"""What checkpoints take of the disk, and of the processor's memory while they are saved."""

import pytest

from ernie_train.plan import PlanSettings
from ernie_train.plan.disk import checkpoint_bytes, run_bytes
from ernie_train.plan.layout import count_parameters, count_trained
from ernie_train.run.recipe import ExportConfig
from tests.plan.plans import BF16, CRITIC, RL, SFT, printed, recipe

ALL = 21_825_436_160 * (2 + 12)  # bfloat16 weights; float32 masters and two moments


def test_a_checkpoint_has_what_trains_and_its_state() -> None:
    of = recipe(SFT, RL | CRITIC, {**SFT, "name": "lora", "lora": {"rank": 32}})
    config = of.model.build()
    whole, with_critic, pairs = (checkpoint_bytes(config, BF16, stage) for stage in of.stages)
    assert whole == ALL
    assert with_critic == 2 * ALL + 14 * (2560 + 1)  # and a scalar head in place of the tied one
    part = count_trained(config, of.stages[2])
    assert part is not None
    assert pairs == 14 * part.trained.total < ALL / 20
    assert count_parameters(config).total == ALL / 14


def test_finished_stages_keep_weights_while_the_last_writes_one_more() -> None:
    one = {"every_steps": 10, "keep_last": 1}
    first, last = {**SFT, "checkpoint": one}, {**SFT, "name": "longer"}  # keep_last 2
    whole = {**first, "checkpoint": {**one, "keep_optimizer": True}}
    best = {**last, "name": "best", "checkpoint": {"best_metric": "validation_loss"}}
    best |= {"validation": [{"path": "x"}], "validate_every_steps": 200}
    weights = 2 / 14
    for stages, most in (
        ((first,), 2),
        ((first, last), weights + 3),
        ((whole, last), 1 + 3),
        ((best,), 4),
        ((best, first), 4),  # the first one's at its end, not its weights and two of the last
    ):
        of = recipe(*stages)
        assert run_bytes(of, of.model.build(), BF16) == pytest.approx(most * ALL, rel=1e-12)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_plan_tells_disk_and_memory(device: str) -> None:
    told = printed(
        recipe(SFT, preset="21b-a3b", device=device), PlanSettings(ranks=8, memory_gb=1e3)
    )
    width = {"gpu": 14, "cpu": 12}[device]  # a float32 weight is its own master
    size = 21.825_436_160 * width
    assert f"checkpoints: {size:.2f} GB each; those that are kept (checkpoint.keep_last)" in told
    assert f"take up to {3 * size:.2f} GB of disk" in told
    assert "earlier stages" not in told
    assert ("GB of optimizer state are in the memory of each rank's" in told) == (device == "gpu")


def test_plan_tells_the_memory_of_the_proof_of_an_export() -> None:
    lora = {**SFT, "lora": {"rank": 8}}
    bare = recipe(lora)
    of = bare.model_copy(update={"export": ExportConfig(dtype="bfloat16")})
    line = f"in up to {21.825_436_160 * 8:.2f} GB of its memory"
    alone, eight = (PlanSettings(ranks=n, memory_gb=1e3) for n in (1, 8))
    assert line in printed(of, alone)
    assert "proved in float32" not in printed(of, eight) + printed(bare, alone)


def test_plan_says_that_earlier_stages_keep_weights_alone() -> None:
    last = {**SFT, "name": "longer"}
    settings = PlanSettings(ranks=8, memory_gb=1e3)
    for keeps in (False, True):
        first = {**SFT, "checkpoint": {"keep_optimizer": keeps}}
        told = printed(recipe(first, last), settings)
        assert (", of earlier stages without optimizer state and one that is" in told) != keeps
        kept = 2 * ALL if keeps else 2 * ALL / 7
        assert f"take up to {(kept + 3 * ALL) / 1e9:.2f} GB of disk" in told
