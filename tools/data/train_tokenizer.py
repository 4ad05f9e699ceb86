"""Trains a SentencePiece tokenizer with ERNIE's special tokens on data files.

    python -m tools.data.train_tokenizer OUT_DIR --vocab-size 1500 data/train/*.jsonl

Conversations are rendered in the Thinking chat format first, so that the tokenizer learns what a
model will read. The same files in the same order give the same tokenizer.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ernie_train.core.errors import ErnieTrainError
from ernie_train.data import (
    Record,
    read_records,
    render_chat,
    shipped_template,
    train_tokenizer,
)


def texts_of(record: Record) -> Iterator[str]:
    """Yield the text of one row as a model reads it; both sides of a preference pair."""
    if record.text is not None:
        yield record.text
        return
    template = shipped_template("ernie_thinking")
    for end in (record.chosen or [], record.rejected or []):
        yield render_chat(template, [*record.messages, *end], record.tools)
        if record.kind != "preference":
            return


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl, .json, .txt or directories")
    parser.add_argument("--vocab-size", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        records = [r for path in options.files for r in read_records(path)[0]]
        texts = [text for record in records for text in texts_of(record)]
        tokenizer = train_tokenizer(texts, options.vocab_size, options.out_dir)
    except ErnieTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    characters = sum(map(len, texts))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(
        f"{options.out_dir}: {tokenizer.vocab_size} pieces from {len(records)} rows, "
        f"{characters / max(tokens, 1):.2f} characters a token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
