"""Tokens that are added to a vocabulary: rows of embedding and head, saved and loaded again."""

import json

import numpy as np
import paddle
import pytest

from ernie_train.core.errors import DataError
from ernie_train.data import load_tokenizer
from ernie_train.parallel import new_model
from ernie_train.weights import load_pretrained, save_pretrained
from tests.small_models import VARIANTS, make_config, make_model


@pytest.mark.parametrize("variant", ["moe", "untied", "bias"])
def test_new_rows_are_the_mean_of_the_others(variant, tmp_path):
    model = make_model(**VARIANTS[variant])
    model.eval()
    ids = paddle.to_tensor([[5, 9, 3]])
    before = model(ids).logits.numpy()
    model.grow_vocabulary(99)
    after = model(ids).logits.numpy()
    np.testing.assert_array_equal(after[..., :96], before)
    weight, bias = model.head()
    for grown in (model.model.embed_tokens.weight, weight, *([] if bias is None else [bias])):
        rows = grown.numpy()
        mean = np.repeat(rows[:96].astype(np.float64).mean(0)[None], 3, 0)
        np.testing.assert_allclose(rows[96:], mean, rtol=1e-5, atol=1e-6)
    assert model.config.vocab_size == 99 and all(not p.stop_gradient for p in model.parameters())
    save_pretrained(model, tmp_path / "out")
    np.testing.assert_array_equal(load_pretrained(tmp_path / "out")(ids).logits.numpy(), after)
    model.grow_vocabulary(50)
    assert model.config.vocab_size == 99


def test_a_bfloat16_model_grows_too():
    model = new_model(make_config(), "bfloat16")
    model.grow_vocabulary(99)
    assert model.model.embed_tokens.weight.shape == [99, 32]
    assert model.model.embed_tokens.weight.dtype == paddle.bfloat16


def test_added_tokens_are_one_id_and_saved(tmp_path):
    tokenizer = load_tokenizer("data/tokenizer", add=["<cite>", "</cite>"])
    size = load_tokenizer("data/tokenizer").vocab_size
    assert tokenizer.vocab_size == size + 2
    ids = tokenizer.encode("see <cite>this</cite>")
    assert ids.count(size) == ids.count(size + 1) == 1
    assert tokenizer.decode(ids) == "see <cite>this</cite>"
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("see <cite>this</cite>") == ids
    assert load_tokenizer(tmp_path, add=["<cite>"]).vocab_size == size + 2
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(DataError, match=r"only be added to a tokenizer\.json"):
        load_tokenizer(tmp_path, add=["<cite>"])
