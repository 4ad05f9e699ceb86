"""Convert text to token ids and back, by `tokenizers`, SentencePiece or PaddleNLP."""

from ernie_train.data.chat_template import common_start
from ernie_train.data.tokenizer.base import MARK, ChatFormat, Tokenizer, unmark
from ernie_train.data.tokenizer.hf_files import bpe_merges
from ernie_train.data.tokenizer.loading import load_tokenizer
from ernie_train.data.tokenizer.markers import forgeable_turns
from ernie_train.data.tokenizer.sentencepiece import SentencePieceTokenizer, train_tokenizer

__all__ = [
    "MARK",
    "ChatFormat",
    "SentencePieceTokenizer",
    "Tokenizer",
    "bpe_merges",
    "common_start",
    "forgeable_turns",
    "load_tokenizer",
    "train_tokenizer",
    "unmark",
]
