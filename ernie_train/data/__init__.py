"""Turn rows of data files into packed batches: formats, chat, tokenizer, mixing and packing."""

from ernie_train.data.chat import (
    CHAT_TEMPLATE,
    PLAIN_CHAT_TEMPLATE,
    drop_thinking,
    encode_chat,
    prompt_ids,
    render_chat,
    require_chat_tokens,
)
from ernie_train.data.documents import DocumentBuilder, Documents, EncodedDocument
from ernie_train.data.files import find_files
from ernie_train.data.formats import Column, Columns, MappedRows, parse_columns
from ernie_train.data.loader import Batch, ConsecutiveLoaders, PackedLoader
from ernie_train.data.packing import pack_documents
from ernie_train.data.reader import BadRow, ReadReport, Record, iter_records, read_records
from ernie_train.data.report import DataReport, SourceReport, preview
from ernie_train.data.sources import DataSource, encode_records, load_sources, refit
from ernie_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "PLAIN_CHAT_TEMPLATE",
    "BadRow",
    "Batch",
    "Column",
    "Columns",
    "ConsecutiveLoaders",
    "DataReport",
    "DataSource",
    "DocumentBuilder",
    "Documents",
    "EncodedDocument",
    "MappedRows",
    "PackedLoader",
    "ReadReport",
    "Record",
    "SourceReport",
    "Tokenizer",
    "drop_thinking",
    "encode_chat",
    "encode_records",
    "find_files",
    "iter_records",
    "load_sources",
    "load_tokenizer",
    "pack_documents",
    "parse_columns",
    "preview",
    "prompt_ids",
    "read_records",
    "refit",
    "render_chat",
    "require_chat_tokens",
    "train_tokenizer",
]
