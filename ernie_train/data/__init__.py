"""Turn rows of data files into packed batches: formats, chat, tokenizer, mixing and packing."""

from ernie_train.data.chat import (
    ChatTraining,
    drop_thinking,
    encode_chat,
    encode_conversation,
    mark_markup,
    prompt_ids,
    render_chat,
    tool_result_ids,
)
from ernie_train.data.chat_template import SHIPPED_TEMPLATES, ChatTemplate, shipped_template
from ernie_train.data.conversation import require_chat_template
from ernie_train.data.documents import DocumentBuilder, Documents, EncodedDocument
from ernie_train.data.files import find_files
from ernie_train.data.formats import Column, Columns, MappedRows, parse_columns
from ernie_train.data.loader import Batch, ConsecutiveLoaders, PackedLoader
from ernie_train.data.packing import pack_documents
from ernie_train.data.reader import ReadReport, Record, iter_records, read_records
from ernie_train.data.report import DataReport, SourceReport, preview
from ernie_train.data.sources import DataSource, RowSource, encode_records, load_sources, refit
from ernie_train.data.tokenizer import (
    ChatFormat,
    Tokenizer,
    forgeable_turns,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "SHIPPED_TEMPLATES",
    "Batch",
    "ChatFormat",
    "ChatTemplate",
    "ChatTraining",
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
    "RowSource",
    "SourceReport",
    "Tokenizer",
    "drop_thinking",
    "encode_chat",
    "encode_conversation",
    "encode_records",
    "find_files",
    "forgeable_turns",
    "iter_records",
    "load_sources",
    "load_tokenizer",
    "mark_markup",
    "pack_documents",
    "parse_columns",
    "preview",
    "prompt_ids",
    "read_records",
    "refit",
    "render_chat",
    "require_chat_template",
    "shipped_template",
    "tool_result_ids",
    "train_tokenizer",
]
