"""What the tables of served and of quantized exports say."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie_train.data import load_tokenizer
from ernie_train.generate.engine import generate
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.run.proof import Trace
from ernie_train.weights import save_pretrained
from tests.workspace import REPOSITORY
from tools.evidence import quantized, serving


@pytest.fixture(scope="module")
def an_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that vLLM can run on CPUs: heads of 32 numbers."""
    paddle.seed(1)
    config = Ernie4_5_MoeConfig.preset("tiny", num_hidden_layers=2, moe_num_experts=4)
    tokenizer = load_tokenizer(REPOSITORY / "data/tokenizer")
    path = tmp_path_factory.mktemp("serving") / "export"
    save_pretrained(Ernie4_5_MoeForCausalLM(config), path, tokenizer, dtype="float32")
    return path


def test_tokens_are_compared_with_ours_and_a_difference_has_its_gap(an_export, monkeypatch):
    monkeypatch.setattr(serving, "EACH", 1)
    monkeypatch.setattr(serving, "MAX_TOKENS", 5)
    monkeypatch.chdir(REPOSITORY)
    tokenizer = load_tokenizer(an_export)
    prompts = serving.prompts_of(tokenizer)
    assert len(prompts) == 5  # one of each domain
    model = serving.load_pretrained(an_export)
    stop = tokenizer.stop_token_ids
    ours = [c.ids for c in generate(model, prompts, max_new_tokens=5, eos_token_id=stop)]
    total = sum(map(len, ours))
    assert serving.compare_tokens(an_export, ours) == f"equal: {total} tokens of 5 prompts"
    other = [[*ours[0][:2], (ours[0][2] + 1) % 1000, *ours[0][3:]], *ours[1:]]
    said = serving.compare_tokens(an_export, other)
    assert said.startswith("1 of 5 prompts differ, where our logits prefer ours by ")
    assert 0 < float(said.split()[-1]) < 100
    shorter = [*ours[:-1], ours[-1][:-1]]
    assert serving.compare_tokens(an_export, shorter).endswith("by inf")


def test_messages_are_told_by_their_parts():
    call = {"function": {"name": "weather", "arguments": '{"place": "Lima"}'}}
    message = {"reasoning": "a\n|b", "content": "\n", "tool_calls": [call]}
    assert serving.outcome(message) == 'reasoning `a \\|b`; calls `weather{"place": "Lima"}`'
    assert serving.outcome({"error": "BadRequestError: no"}) == "BadRequestError: no"
    assert serving.outcome({"content": "x" * 70}) == f"answer `{'x' * 60}...`"
    assert serving.outcome({"content": None}) == "an empty message"


def test_what_quantization_loses_is_measured():
    logits = np.log(np.array([[0.5, 0.25, 0.25]], np.float32)) + 3
    other = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    expected = Trace([1], [[0]], [logits])
    assert quantized.kl(expected, [logits]) == pytest.approx(0, abs=1e-6)
    assert quantized.kl(expected, [other]) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    same = quantized.change([1, 0, 1, 0], [1, 0, 1, 0])
    assert same.value == 0
    assert same.low < 0 < same.high
    lost = quantized.change([1.0] * 50 + [0.0] * 50, [1.0] * 40 + [0.0] * 60)
    assert lost.value == pytest.approx(-0.1)
    assert lost.low < -0.1 < lost.high < 0


@pytest.mark.slow
def test_vllm_serves_an_export_with_our_tokens(an_export, tmp_path, monkeypatch):
    home = os.environ.get("ERNIE_TRAIN_VLLM")
    if home is None:
        pytest.skip("ERNIE_TRAIN_VLLM names no environment with vLLM: tools/vllm.sh makes one")
    monkeypatch.chdir(REPOSITORY)
    python = str(Path(home) / "bin" / "python")
    found = serving.with_vllm(an_export, python, "float32", tmp_path / "server.log")
    assert serving.compare_tokens(an_export, found.tokens).startswith("equal: ")
    assert len(found.chats) == 2
    assert not any("error" in message for message in found.chats)
