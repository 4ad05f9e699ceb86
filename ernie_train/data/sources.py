"""Load the data sources of a recipe as encoded documents, with a report on their rows."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ernie_train.core.errors import DataError
from ernie_train.data.cache import (
    DocumentStore,
    cache_bound,
    cache_directory,
    evict,
    exclusive,
    hold,
)
from ernie_train.data.chat import ChatTraining
from ernie_train.data.conversation import require_chat_template
from ernie_train.data.documents import Documents
from ernie_train.data.encoding import (
    DEFAULT_OVERLONG,
    DataSource,
    Encode,
    FormatName,
    Kind,
    RowSource,
    SourceEncoding,
    encoder,
    refit,
)
from ernie_train.data.files import find_files
from ernie_train.data.formats import Record
from ernie_train.data.loader import PackedLoader
from ernie_train.data.reader import ReadReport
from ernie_train.data.report import DataReport, SourceReport
from ernie_train.data.tokenizer import Tokenizer

__all__ = ["DataSource", "FormatName", "RowSource", "encode_records", "load_sources", "refit"]


def load_sources(
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    seq_len: int,
    base_dir: str | Path,
    training: ChatTraining | None = None,
    max_bad_fraction: float = 0.01,
    seed: int = 0,
) -> tuple[list[Documents], DataReport]:
    """Read, check and encode the sources of a stage.

    Args:
        sources: the entries of the stage's `data`.
        tokenizer: encodes the rows.
        kind: "sft" for conversations, trained on the assistant's turns; "pretrain" for texts, each
            followed by eos, or conversations, trained on every token.
        seq_len: the maximum length of a document, in tokens.
        base_dir: the directory that relative paths start from.
        training: the parts of conversations that are trained.
        max_bad_fraction: the share of bad rows of a source above which it is refused, 0..1.
        seed: of the shuffle that the report's `packing_fill` is computed for.

    Returns:
        The documents of each source, and the report.

    Raises:
        DataError: a source cannot be read or has too many bad rows, nothing is left to train on,
            or the tokenizer lacks a token of the chat format.
    """
    if seq_len < 2:
        raise DataError(f"seq_len {seq_len} leaves no token to predict; it must be at least 2")
    if kind == "sft":
        require_chat_template(tokenizer)
    training = training or ChatTraining()
    encode = encoder(tokenizer, kind, training)
    identity = {
        "tokenizer": tokenizer.fingerprint(),
        "chat": tokenizer.chat.fingerprint,
        "kind": kind,
        "training": asdict(training),
    }
    documents: list[Documents] = []
    reports: list[SourceReport] = []
    for source in sources:
        overlong = source.overlong or DEFAULT_OVERLONG[kind]
        fixed = source.model_copy(update={"overlong": overlong})
        encoded, report = _load(fixed, encode, identity, seq_len, Path(base_dir), max_bad_fraction)
        documents.append(encoded)
        reports.append(report)
    result = DataReport(reports, seq_len)
    if not any(len(part) for part in documents):
        raise DataError(_nothing_left(reports))
    weights = [source.weight for source in sources]
    loader = PackedLoader(documents, weights, seq_len, 1, seed=seed, epochs=1, pad_id=0)
    result.packing_fill = loader.packing_fill()
    return documents, result


def encode_records(
    records: Iterable[Record],
    read: ReadReport,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    seq_len: int,
    training: ChatTraining | None = None,
) -> tuple[Documents, DataReport]:
    """Encode records that were read before, with the counts in `read`; keep nothing on disk."""
    source = DataSource(path=read.path, overlong=DEFAULT_OVERLONG[kind])
    encode = encoder(tokenizer, kind, training or ChatTraining())
    work = SourceEncoding(Path(read.path), source, encode, seq_len)
    work.read = read
    for record in records:
        work.add(record)
    documents = work.builder.build()
    report = DataReport([work.report(documents)], seq_len)
    if len(documents):
        loader = PackedLoader([documents], [1.0], seq_len, 1, seed=0, epochs=1, pad_id=0)
        report.packing_fill = loader.packing_fill()
    return documents, report


def _load(
    source: DataSource,
    encode: Encode,
    identity: dict[str, Any],
    seq_len: int,
    base_dir: Path,
    max_bad_fraction: float,
) -> tuple[Documents, SourceReport]:
    """Return the documents of a source and the report on them, from the cache where they lie there.

    identity: what the encoded rows depend on, besides the files and the source's own settings.
    """
    path = base_dir / source.path
    files = find_files(path).files
    settings = source.model_dump(mode="json", exclude={"path", "weight", "without"})
    without = source.held_out(base_dir)
    if without is not None:
        settings["without"] = sorted(key.hex() for key in without[1])
    directory = cache_directory(files, {**identity, **settings, "seq_len": seq_len})
    work = SourceEncoding(path, source, encode, seq_len, without)
    if directory is None:
        work.run()
        documents = work.builder.build()
    else:
        bound = cache_bound()
        with exclusive(directory):
            hold(directory)
            store = DocumentStore(directory)
            work.restore(store)
            if is_new := not store.finished:
                work.run(store)
            documents = store.documents()
            work.lengths = store.lengths()
        if is_new:
            evict(directory.parent, bound)
    work.read.check(
        max_bad_fraction, "mend them, or let more be left out: max_bad_fraction of the stage"
    )
    return documents, work.report(documents)


def _nothing_left(reports: list[SourceReport]) -> str:
    lines = []
    for report in reports:
        reasons = [f"{count} {reason}" for reason, count in report.dropped.items()]
        reasons += [f"{report.bad.count} bad"] if report.bad.count else []
        lines.append(f"  {report.path}: {report.rows} rows; {', '.join(reasons) or 'none kept'}")
    return "the data leaves nothing to train on:\n" + "\n".join(lines)
