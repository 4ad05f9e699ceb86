"""Convert text to token ids and back with SentencePiece, or with PaddleNLP's tokenizers."""

from ernie_train.data.tokenizer.base import Tokenizer
from ernie_train.data.tokenizer.hf_files import write_chat_template
from ernie_train.data.tokenizer.sentencepiece import (
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
    "write_chat_template",
]
