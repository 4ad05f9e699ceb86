"""Referees: rounding and GPTQ written plainly in float64, and the compressed-tensors package."""

from __future__ import annotations

import itertools
import re

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_train.core.errors import ConfigError, UserError, WeightsError
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.weights.layout import is_mtp_name
from ernie_train.weights.quantize import (
    QuantizationScheme,
    choose_scheme,
    gptq,
    inverse_factor,
    quantize_model,
    round_to_nearest,
)
from ernie_train.weights.quantize.scheme import pack, unpack

SCHEMES = [QuantizationScheme(8), QuantizationScheme(4, 32), QuantizationScheme(4, 128)]
RNG = np.random.default_rng(3)


def new_model(**keys):
    paddle.seed(2)
    config = Ernie4_5_MoeConfig.preset(
        "tiny", **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
                   "num_hidden_layers": 2, "moe_intermediate_size": 32, "moe_num_experts": 4,
                   "initializer_range": 0.2, **keys},
    )  # fmt: skip
    return Ernie4_5_MoeForCausalLM(config)


def correlated(columns: int, count: int = 600) -> np.ndarray:
    """Inputs of which a third of the directions carry most."""
    basis = RNG.normal(size=(columns // 3, columns))
    return RNG.normal(size=(count, columns // 3)) @ basis + 0.1 * RNG.normal(size=(count, columns))


def plain_scales(weight: np.ndarray, scheme: QuantizationScheme) -> np.ndarray:
    grouped = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])
    scales = np.abs(grouped).max(-1) / ((2**scheme.bits - 1) / 2)
    return scales.astype(np.float32).astype(np.float64)


def plain_gptq(weight: np.ndarray, inputs: np.ndarray, scheme: QuantizationScheme) -> np.ndarray:
    """Algorithm 1 of the paper without blocks: after each column the inverse Hessian is updated."""
    rest = weight.astype(np.float64)
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse, result = np.linalg.inv(hessian), np.zeros_like(rest)
    scale = plain_scales(rest, scheme)[:, 0]
    for at in range(rest.shape[1]):
        if scheme.group_size and at % scheme.group_size == 0:
            scale = plain_scales(rest[:, at : at + scheme.group_size], scheme)[:, 0]
        low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        result[:, at] = np.clip(np.rint(rest[:, at] / scale), low, high) * scale
        error = (rest[:, at] - result[:, at]) / inverse[at, at]
        rest -= np.outer(error, inverse[at])
        inverse = inverse - np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    return result


@given(
    st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31)
)  # fmt: skip
def test_packing_is_undone_at_any_width(bits, rows, columns, seed):
    low = -(2 ** (bits - 1))
    codes = np.random.default_rng(seed).integers(low, -low, (rows, columns)).astype(np.int8)
    words = pack(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    np.testing.assert_array_equal(unpack(words, bits, columns), codes)


def test_rounding_packing_and_dequantizing_are_those_of_compressed_tensors(referee, tmp_path):
    given, ours = {}, {}
    for number, scheme in enumerate(SCHEMES):
        weight = RNG.normal(size=(24, 256)).astype(np.float32)
        weight[3] = 0  # a row without a scale
        tensor = round_to_nearest(weight, scheme, "BF16")
        codes = unpack(tensor.words, scheme.bits, 256)
        ours[str(number)] = (tensor, codes)
        given |= {f"{number}.weight": weight, f"{number}.codes": codes}
        given[f"{number}.scheme"] = np.array([scheme.bits, scheme.group_size or 0])
    np.savez(tmp_path / "in.npz", **given)
    referee("compressed_tensors_weights.py", tmp_path / "in.npz", tmp_path / "out.npz")
    theirs = np.load(tmp_path / "out.npz")
    for name, (tensor, codes) in ours.items():
        used = np.arange(24) != 3
        np.testing.assert_array_equal(theirs[f"{name}.scales"][used], tensor.scales[used])
        np.testing.assert_array_equal(theirs[f"{name}.codes"], codes)
        np.testing.assert_array_equal(theirs[f"{name}.packed"], tensor.words)
        np.testing.assert_array_equal(theirs[f"{name}.weight"][used], tensor.dequantize()[used])
        assert not tensor.dequantize()[3].any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(scheme):
    weight = RNG.normal(size=(16, 256)).astype(np.float32)
    found = round_to_nearest(weight, scheme, "F32")
    step = np.repeat(plain_scales(weight, scheme), scheme.group_size or 256, axis=1)
    off = np.abs(found.dequantize() - weight) / step
    # The largest positive number lies half a step above the largest code.
    assert off.max() <= 0.5 + 1e-5
    assert found.words.nbytes == weight.nbytes * scheme.bits // 32


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_gptq_is_that_of_the_paper_and_better_than_rounding(scheme):
    weight, inputs = RNG.normal(size=(12, 256)).astype(np.float32), correlated(256)
    hessian = inputs.T @ inputs
    found = gptq(weight, inverse_factor(hessian), scheme, "F32").dequantize()
    expected = plain_gptq(weight, inputs, scheme)
    # Sums in another order may tip a tie: then a code differs by one, which later ones make up for.
    assert (np.abs(found - expected) < 1e-5).mean() > 0.98
    nearest = round_to_nearest(weight, scheme, "F32").dequantize()
    errors = [np.sum(((w - weight) @ inputs.T) ** 2) for w in (found, expected, nearest)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert errors[0] < 0.5 * errors[2]


def test_gptq_on_independent_inputs_rounds_to_nearest():
    weight = RNG.normal(size=(8, 64)).astype(np.float32)
    for hessian in (np.eye(64) * 7, np.zeros((64, 64))):
        found = gptq(weight, inverse_factor(hessian), SCHEMES[1], "BF16")
        np.testing.assert_array_equal(
            found.words, round_to_nearest(weight, SCHEMES[1], "BF16").words
        )


def test_an_input_that_never_occurs_is_rounded_to_nearest():
    weight, inputs = RNG.normal(size=(8, 64)).astype(np.float32), correlated(64)
    inputs[:, 10] = 0
    found = gptq(weight, inverse_factor(inputs.T @ inputs), SCHEMES[0], "F32")
    nearest = round_to_nearest(weight, SCHEMES[0], "F32")
    np.testing.assert_array_equal(found.dequantize()[:, 10], nearest.dequantize()[:, 10])


@pytest.mark.parametrize("keys", [{}, {"moe_num_experts": 0}])
def test_gptq_sees_the_inputs_of_every_weight(keys):
    """Each weight is calibrated on what it multiplies: then logits are nearer than by rounding."""
    model, scheme = new_model(**keys), QuantizationScheme(4, 32)
    documents = [RNG.integers(0, 64, 50).tolist() for _ in range(12)]
    before = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    result = quantize_model(model, scheme, "F32", documents)
    after = {name: value.numpy() for name, value in model.state_dict().items()}
    assert (result.tokens, result.few_tokens) == (600, [])
    assert {name for name in before if "_proj" in name} == {
        name for name in before if (before[name] != after[name]).any()
    }
    nearest = new_model(**keys)
    quantize_model(nearest, scheme, "F32")
    ids = paddle.to_tensor([list(itertools.chain(*documents[:4]))])
    numbers = paddle.to_tensor([np.repeat(np.arange(1, 5), 50).tolist()])
    logits = [m(ids, document_ids=numbers).logits for m in (new_model(**keys), model, nearest)]
    calibrated, rounded = (float(((x - logits[0]) ** 2).mean()) for x in logits[1:])
    assert calibrated < rounded


def test_experts_that_few_tokens_reach_are_rounded_to_nearest_and_named():
    model, nearest = new_model(), new_model()
    scheme = QuantizationScheme(8)
    result = quantize_model(model, scheme, "BF16", [[1, 2, 3, 4]])
    assert len(result.few_tokens) == 1 * 4 * 3  # every expert of the one MoE layer
    rounded = quantize_model(nearest, scheme, "BF16")
    for name in result.few_tokens:
        assert ".mlp.experts." in name
        np.testing.assert_array_equal(rounded.tensors[name].words, result.tensors[name].words)
    assert rounded.few_tokens == []


def test_the_scheme_that_fits_the_model_is_chosen():
    shapes = {"a": (8, 256), "b": (8, 96)}
    assert choose_scheme("int4", {"a": (8, 256)}) == QuantizationScheme(4, 128)
    assert choose_scheme("int4", shapes) == QuantizationScheme(4, 32)
    assert choose_scheme("int8", shapes) == QuantizationScheme(8)
    with pytest.raises(UserError, match="groups of 64 do not divide the 96 inputs of b"):
        choose_scheme("int4", shapes, 64)
    with pytest.raises(ConfigError, match="group_size belongs to int4"):
        choose_scheme("int8", shapes, 64)


def test_the_entry_in_config_json_is_read_back_and_others_are_refused():
    for scheme in SCHEMES:
        assert QuantizationScheme.from_config(scheme.to_config(), "config.json") == scheme
    entry = SCHEMES[1].to_config()
    entry["config_groups"]["group_0"]["weights"]["symmetric"] = False
    for other in (entry, {"quant_method": "gptq", "bits": 4}, {}, None, {"config_groups": [1]}):
        with pytest.raises(ConfigError, match="pack-quantized"):
            QuantizationScheme.from_config(other, "config.json")


def test_earlier_exports_are_read_and_prediction_blocks_are_left_alone():
    config = SCHEMES[0].to_config()
    names = {"model.mtp_block.0.self_attn.q_proj": True, "mtp_linear_proj.0": True,
             "model.layers.0.self_attn.q_proj": False}  # fmt: skip
    patterns = [entry.removeprefix("re:") for entry in config["ignore"] if entry.startswith("re:")]
    for name, left in names.items():
        assert any(re.match(pattern, name) for pattern in patterns) == left == is_mtp_name(name)
    config["ignore"] = config["ignore"][:2]
    assert QuantizationScheme.from_config(config, "config.json") == SCHEMES[0]


@pytest.mark.parametrize("calibration", [(), [[1, 2, 3, 4] * 20]], ids=["rtn", "gptq"])
@pytest.mark.parametrize(
    ("value", "dtype", "why"),
    [(np.nan, "BF16", "NaN or infinite"), (np.inf, "F32", "NaN or infinite"),
     (1e7, "F16", r"7.84e\+04 is too large for float16")],
)  # fmt: skip
def test_a_weight_without_finite_scales_is_named(value, dtype, why, calibration):
    model = new_model()
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = model.state_dict()[name].numpy()
    weight[3, 4] = value
    model.state_dict()[name].set_value(weight)
    with pytest.raises(WeightsError, match=f"{name} cannot be quantized: .*{why}"):
        quantize_model(model, SCHEMES[0], dtype, calibration)


def test_inputs_that_are_not_finite_are_told_with_the_weight_that_reads_them():
    model = new_model()
    embedding = model.model.embed_tokens.weight
    embedding.set_value(np.full(embedding.shape, np.nan, np.float32))
    with pytest.raises(WeightsError, match=r"layers\.0\..* its inputs are NaN or infinite"):
        quantize_model(model, SCHEMES[0], "BF16", [[1, 2, 3, 4] * 20])


def test_scales_that_lose_digits_are_told(caplog):
    name = "model.layers.0.self_attn.o_proj.weight"
    for factor, dtype, told in ((0.0, "F16", False), (1e-5, "F16", True), (1e-5, "BF16", False)):
        model = new_model(moe_num_experts=0)
        weight = model.state_dict()[name]
        array = weight.numpy()
        array[:, 3] *= factor  # an output's row, as stored
        weight.set_value(array)
        caplog.clear()
        quantize_model(model, SCHEMES[0], dtype)
        assert (f"{name}: scales below the normal numbers of F16" in caplog.text) == told
