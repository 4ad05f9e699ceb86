"""The check of an engine's answer: each way in which it can differ from what was asked for."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pytest

from ernie_train.generate import SamplingConfig
from ernie_train.generate.engines.answer import Request, WrongAnswer

STOP = 2


def request(**changes: Any) -> Request:
    values = {
        "model": "policy", "prompt": [5, 6, 7], "settings": SamplingConfig(4, 0.7),
        "limit": 4, "seed": 9, "stop_token_ids": (STOP, 3), "vocab_size": 100,
    }  # fmt: skip
    return Request(**{**values, **changes})


def answer(ids: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    ids = [10, 11, STOP] if ids is None else ids
    choice = {
        "prompt_token_ids": [5, 6, 7], "token_ids": ids,
        "logprobs": {"token_logprobs": [-0.5] * len(ids)},
        "finish_reason": "stop" if ids[-1] == STOP else "length", **changes,
    }  # fmt: skip
    return {"model": "policy", "choices": [choice]}


def test_a_right_answer_becomes_a_completion() -> None:
    found = request().read(answer())
    assert found.ids == [10, 11, STOP] and found.logprobs == [-0.5] * 3 and found.finished
    assert found.expert_ids is None
    cut = request().read(answer([10, 11, 12, 13]))
    assert cut.ids == [10, 11, 12, 13] and not cut.finished
    # FastDeploy names the ids otherwise, and calls a stop at the last possible token "length".
    other = answer([10, 11, 12, STOP], finish_reason="length")
    other["choices"][0]["completion_token_ids"] = other["choices"][0].pop("token_ids")
    assert request().read(other).finished


def npy(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def test_experts_are_those_of_the_positions_that_predict() -> None:
    """vLLM sends one row for each position but the last: 3 + 3 - 1."""
    sent = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 2, 2)
    policy = request(experts=(2, 2), num_experts=20)
    found = policy.read(answer(routed_experts=npy(sent)))
    np.testing.assert_array_equal(found.prompt_expert_ids, sent[:2])
    np.testing.assert_array_equal(found.expert_ids, sent[2:])
    assert found.expert_ids is not None and found.expert_ids.dtype == np.uint8
    assert found.expert_ids.base is None, "a view would keep the prompt's experts"
    many = request(experts=(2, 2), num_experts=257).read(answer(routed_experts=npy(sent)))
    assert many.expert_ids is not None and many.expert_ids.dtype == np.int16
    other = policy.read(answer(routed_experts=npy(np.asfortranarray(sent.astype(">i4")))))
    np.testing.assert_array_equal(other.expert_ids, sent[2:])
    assert request().read(answer(routed_experts=npy(sent))).expert_ids is None


def test_no_bytes_of_experts_are_more_than_a_wrong_answer() -> None:
    """A numpy file with bytes changed, cut or added is read or refused; nothing else comes."""
    random, right = np.random.default_rng(0), base64.b64decode(npy(BYTES))
    policy, refused = request(experts=(2, 2), num_experts=20), 0
    for _ in range(400):
        sent = bytearray(right[: random.integers(1, len(right) + 1)])
        for at in random.integers(0, min(len(sent), 80), 2):
            sent[at] = random.integers(0, 256)
        try:
            policy.read(answer(routed_experts=base64.b64encode(sent).decode()))
        except WrongAnswer:
            refused += 1
    assert refused > 200


def npy_of(header: str, data: bytes = b"") -> str:
    """Return a numpy file, version 1.0, with any header."""
    size = len(header.encode()).to_bytes(2, "little")
    return base64.b64encode(b"\x93NUMPY\x01\x00" + size + header.encode() + data).decode()


def npz(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.savez(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


HUGE = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"
RIGHT = "{'descr': '|u1', 'fortran_order': False, 'shape': (5, 2, 2), }"
BYTES = np.zeros((5, 2, 2), np.uint8)


def without(name: str) -> dict[str, Any]:
    found = answer()
    del found["choices"][0][name]
    return found


def logprobs(*values: Any) -> dict[str, Any]:
    return answer(logprobs={"token_logprobs": list(values)})


WRONG: dict[str, tuple[Any, str]] = {
    "no object": (["x"], "no JSON object"),
    "another model": ({**answer(), "model": "base"}, "of the model 'base', not 'policy'"),
    "no choice": ({"model": "policy"}, "exactly one choice"),
    "two choices": ({"model": "policy", "choices": answer()["choices"] * 2}, "exactly one choice"),
    "a choice of text": ({"model": "policy", "choices": ["hi"]}, "exactly one choice"),
    "another prompt": (answer(prompt_token_ids=[5, 6]), "not the ids that were sent"),
    "a prompt tokenized again": (without("prompt_token_ids"), "not the ids that were sent"),
    "no ids": (without("token_ids"), "no token ids"),
    "empty": (answer(token_ids=[]), "no token ids"),
    "ids as text": (answer(token_ids="10 11"), "no token ids"),
    "an id beyond the vocabulary": (answer([10, 100, STOP]), "100 is no id of the 100 tokens"),
    "an id below 0": (answer([10, -1, STOP]), "-1 is no id"),
    "an id as text": (answer(token_ids=[10, "11", STOP]), "'11' is no id"),
    "an id with a fraction": (answer(token_ids=[10, 11.0, STOP]), "11.0 is no id"),
    "true for an id": (answer(token_ids=[10, True, STOP]), "True is no id"),
    "too long": (answer([10] * 5), "5 tokens, though at most 4"),
    "no log-probabilities": (without("logprobs"), "no log-probabilities"),
    "null for them": (answer(logprobs=None), "no log-probabilities"),
    "too few": (logprobs(-0.5, -0.5), "2 log-probabilities for 3 tokens"),
    "too many": (logprobs(*[-0.5] * 4), "4 log-probabilities for 3 tokens"),
    "NaN": (logprobs(-0.5, math.nan, -0.5), "nan is no log-probability"),
    "minus infinity": (logprobs(-0.5, -math.inf, -0.5), "-inf is no log-probability"),
    "above 0": (logprobs(-0.5, 0.5, -0.5), "0.5 is no log-probability"),
    "a number without end": (logprobs(-0.5, -(10**400), -0.5), "is no log-probability"),
    "one missing": (logprobs(-0.5, None, -0.5), "None is no log-probability"),
    "as text": (logprobs(-0.5, "-0.5", -0.5), "'-0.5' is no log-probability"),
    "goes on after a stop": (answer([10, STOP, 11, 12]), "goes on after the stop token 2"),
    "stops without a stop": (answer([10, 11], finish_reason="stop"), "11 is no stop token"),
    "too short": (answer([10, 11]), "length after 2 of 4 tokens"),
    "aborted": (answer(finish_reason="abort"), "finish_reason is 'abort'"),
    "a reason without end": (answer(finish_reason="x" * 9999), "finish_reason is 'xxx"),
    "no reason": (without("finish_reason"), "finish_reason is None"),
    "experts of another length": (
        answer(routed_experts=npy(np.zeros((4, 2, 2), np.uint8))), "not integers (5, 2, 2)"
    ),
    "experts of another model": (
        answer(routed_experts=npy(np.zeros((5, 3, 2), np.uint8))), "not integers (5, 2, 2)"
    ),
    "experts with fractions": (
        answer(routed_experts=npy(np.zeros((5, 2, 2)))), "not integers (5, 2, 2)"
    ),
    "experts that are no array": (answer(routed_experts="%%%"), "routed_experts cannot be read"),
    "experts as a list": (answer(routed_experts=[1, 2]), "routed_experts cannot be read"),
    "pickled experts": (
        answer(routed_experts=npy(np.array([{}], object))), "not integers (5, 2, 2)"
    ),
    "an archive of experts": (answer(routed_experts=npz(BYTES)), "routed_experts cannot be read"),
    "more experts than memory": (answer(routed_experts=npy_of(HUGE)), "not integers (5, 2, 2)"),
    "experts that are cut": (
        answer(routed_experts=npy_of(RIGHT, b"1" * 19)), "19 bytes instead of 20"
    ),
    "experts and more": (answer(routed_experts=npy_of(RIGHT, b"1" * 21)), "21 bytes instead of 20"),
    "a header without end": (
        answer(routed_experts=npy_of("(" * 9000)), "routed_experts cannot be read"
    ),
    "a header of text": (answer(routed_experts=npy_of("{'a")), "routed_experts cannot be read"),
    "experts as text beyond ASCII": (answer(routed_experts="é"), "routed_experts cannot be read"),
    "an expert beyond the last": (
        answer(routed_experts=npy(BYTES + np.uint8(8))), "expert 8 is none of the 8"
    ),
    "an expert that would wrap": (
        answer(routed_experts=npy(np.full((5, 2, 2), 65536 + 3))), "expert 65539 is none of the 8"
    ),
    "an expert below 0": (
        answer(routed_experts=npy(np.full((5, 2, 2), -1))), "expert -1 is none of the 8"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_to_something_else_is_refused(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(WrongAnswer) as refused:
        request(experts=(2, 2), num_experts=8).read(given)
    assert message in str(refused.value) and len(str(refused.value)) < 200


def test_a_request_asks_for_all_that_is_checked() -> None:
    body = request(limit=3).body()
    assert body["prompt"] == [5, 6, 7] and body["max_tokens"] == 3 and body["temperature"] == 0.7
    assert body["return_token_ids"] is True and body["logprobs"] == 0 and body["seed"] == 9
    assert body["stop_token_ids"] == [STOP, 3] and body["top_k"] == -1
