"""A small dense model that writes plain words and ends its turns, with a chat format to match."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ernie_train.data import load_tokenizer, train_tokenizer
from ernie_train.weights import save_pretrained
from tests.small_models import make_model

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = 0.4  # of the head's bias; about one token in eight ends the turn


def save_writer(directory: Path, texts: list[str], pieces: int = 350) -> Path:
    """Write model and tokenizer, which has the words of `texts`; return the model's directory.

    The first hidden feature is the same for all tokens and far above the others, so that the head's
    first column is a bias: against bytes and markup, whose text no row could hold.
    """
    train_tokenizer(texts, pieces, directory / "words")
    (directory / "words" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load_tokenizer(directory / "words")
    sizes = {"vocab_size": 384, "max_position_embeddings": 1024, "tie_word_embeddings": False}
    model = make_model(moe_num_experts=0, **sizes)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    table, columns = embedding.numpy(), head.numpy()
    table[:, 0] = 8.0
    end = tokenizer.encode_marked("<|im_end|>")[0][-1]
    bias = np.full(384, -2.0, np.float32)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        if text.strip() and text.isascii() and "<" not in text:
            bias[token] = 0.0
    bias[end] = ENDS
    if columns.shape[0] == 384:
        columns[:, 0] = bias
    else:
        columns[0] = bias
    embedding.set_value(table)
    head.set_value(columns)
    save_pretrained(model, directory / "given", tokenizer)
    return directory / "given"
