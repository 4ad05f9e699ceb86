"""Gradients over ranks: in buckets during the backward pass, with the bits of those after it."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_train import parallel
from ernie_train.core import process_group
from ernie_train.core.process_group import Grid
from ernie_train.model.dtypes import dtype_name
from ernie_train.parallel import GradientReducer, gradients
from ernie_train.parallel.collectives import Work
from ernie_train.train.optimizer import OptimConfig, Optimizer
from tests.parallel.ranks import start_on_ranks
from tests.small_models import make_model


@pytest.mark.parametrize(("ranks", "grids"), [
    (2, ["1,2,0,0", "2,1,0,1", "1,2,2,1"]),
    (3, ["3,1,0,0"]),
    (4, ["2,2,0,1", "2,2,2,0"]),
])  # fmt: skip
def test_real_ranks_get_the_same_bits_during_the_pass_after_it_and_late(ranks, grids, tmp_path):
    start_on_ranks(ranks, "reductions.py", tmp_path, *grids, timeout_s=400)
    assert {path.name for path in tmp_path.iterdir()} == {f"{at}-{ranks}" for at in range(ranks)}


class Twins:
    """Collectives with a second rank that always has what this one has; sums arrive on `wait`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.waiting = self.most = 0

    def all_reduce(self, flat, *, experts, dst=None):
        self.sizes.append(int(flat.size))
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        total = paddle.full(flat.shape, float("nan"), flat.dtype)
        kept = flat.clone()

        class Task:
            def wait(task) -> None:
                self.waiting -= 1
                paddle.assign(kept * 2, output=total)

        return Work(total, Task(), flat)


@pytest.fixture
def twins(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    monkeypatch.setattr(gradients, "BUCKET_ELEMENTS", 2000)
    made = Twins()
    monkeypatch.setattr(gradients, "get_collectives", lambda: made)
    process_group.set_grid(Grid(data=2))
    yield made
    process_group._grid = Grid()


def run_backward(model, **terms):
    ids = paddle.to_tensor(np.random.default_rng(2).integers(1, 90, (2, 11)))
    ((model(ids).logits ** 2).mean() + sum(terms.values())).backward()


@pytest.mark.parametrize("tied", [True, False])
def test_sums_are_those_of_two_equal_ranks_and_few_buckets_are_on_their_way(twins, tied):
    one, two = (make_model(tie_word_embeddings=tied) for _ in range(2))
    reducing = GradientReducer(dict(two.named_parameters()))
    for _ in range(2):  # micro-batches
        run_backward(one)
    run_backward(two)
    reducing.begin_last_backward()
    run_backward(two)
    sent = len(twins.sizes)
    reducing.finish()
    assert sent > len(twins.sizes) / 2
    assert twins.waiting == 0
    assert twins.most == gradients.MAX_IN_FLIGHT
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        np.testing.assert_array_equal(b.grad.numpy(), 2 * a.grad.numpy(), err_msg=name)


@pytest.mark.parametrize(("dtype", "total"), [("float32", 1.0 + 2.0**-9), ("bfloat16", 1.0)])
@pytest.mark.parametrize("during", [True, False])
def test_gradients_of_bfloat16_travel_in_the_type_of_their_sums(twins, during, dtype, total):
    one = paddle.nn.initializer.Constant(1.0)
    first, last = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"
    named = {n: paddle.create_parameter([3], "bfloat16", None, None, False, one)
             for n in (first, last)}  # fmt: skip
    parallel.set_gradient_dtype(named.values(), dtype)
    reducing = GradientReducer(named)
    parts = [1.0, 2.0**-10, 2.0**-10]  # of micro-batches; in bfloat16 their sum is 1
    for number, part in enumerate(parts, 1):
        if during and number == len(parts):
            reducing.begin_last_backward()
        scale = paddle.full([3], part, "float32").astype("bfloat16")
        ((named[first] * scale) * named[last]).astype("float32").sum().backward()
    assert (len(twins.sizes) > 0) is during
    reducing.finish()
    for name, parameter in named.items():
        found = parallel.gradient(parameter)
        assert dtype_name(found) == dtype
        found = found.astype("float32").numpy()
        np.testing.assert_array_equal(found, np.full(3, 2 * total), err_msg=name)
        assert (parameter.grad is None) is (dtype == "float32")
    parallel.free_gradients(named.values())
    assert all(parallel.gradient(parameter) is None for parameter in named.values())


@pytest.mark.parametrize("during", [True, False])
def test_a_gradient_that_nobody_has_stays_absent(twins, during):
    model = make_model(tie_word_embeddings=False)
    reducing = GradientReducer(dict(model.named_parameters()))
    if during:
        reducing.begin_last_backward()
    model.model(paddle.to_tensor([[3, 4, 5]])).hidden.sum().backward()
    reducing.finish()
    absent = {name for name, p in model.named_parameters() if p.grad is None}
    assert absent == {"lm_head.weight"}


def test_without_a_last_pass_only_what_is_there_is_sent(twins):
    model = make_model()
    reducing = GradientReducer(dict(model.named_parameters()))
    norm = model.model.norm.weight
    (norm * 3.0).sum().backward()
    reducing.finish()
    assert norm.size in twins.sizes
    flags = sorted(size for size in twins.sizes if size != norm.size)
    assert sum(flags) == len(list(model.named_parameters()))
    np.testing.assert_array_equal(norm.grad.numpy(), np.full(norm.shape, 6.0, np.float32))


def test_a_gradient_that_grows_after_it_was_sent_is_an_error(twins):
    model = make_model()
    reducing = GradientReducer(dict(model.named_parameters()))
    reducing.begin_last_backward()
    run_backward(model)
    run_backward(model)
    with pytest.raises(RuntimeError, match=r"gradient of model\.\S+ grew after it had been sent"):
        reducing.finish()
    model.clear_gradients()
    reducing.begin_last_backward()  # and the next step is none the worse for it
    run_backward(model)
    reducing.finish()


def test_what_a_loss_reaches_past_the_layers_leaves_after_the_pass(twins):
    """A term on the routers' weights comes to them by a way of its own, however long."""
    model, other = make_model(), make_model()
    for m in (model, other):
        reducing = GradientReducer(dict(m.named_parameters())) if m is model else None
        if reducing:
            reducing.begin_last_backward()
        term = m.model.layers[2].mlp.gate.weight
        for _ in range(200):
            term = term * 1.01
        run_backward(m, term=(term * term).sum())
        if reducing:
            reducing.finish()
    a, b = (m.model.layers[2].mlp.gate.weight.grad.numpy() for m in (model, other))
    np.testing.assert_array_equal(a, 2 * b)


def test_gradients_are_not_sharded_where_state_is_not(twins):
    with pytest.raises(ValueError, match="optimizer state is not"):
        Optimizer(make_model(), OptimConfig(lr=1e-3), shards_gradients=True)


@pytest.mark.parametrize(("device", "sharding", "expected"), [
    ("gpu:0", True, True), ("gpu:0", False, False), ("cpu", True, False),
])  # fmt: skip
def test_the_device_chooses_whether_gradients_are_sharded(
    twins, monkeypatch, device, sharding, expected
):
    process_group.set_grid(Grid(data=2, sharding=sharding))
    model = make_model()
    monkeypatch.setattr(paddle, "get_device", lambda: device)
    monkeypatch.setattr(paddle.optimizer, "AdamW", lambda **settings: None)
    assert Optimizer(model, OptimConfig(lr=1e-3)).shards_gradients is expected
