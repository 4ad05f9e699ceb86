"""Sources to documents: what is kept, cut, dropped and refused, and the report on it."""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ernie_train.core.config import parse_config
from ernie_train.core.errors import ConfigError, DataError
from ernie_train.data import (
    ChatFormat,
    ChatTraining,
    DataReport,
    DataSource,
    Documents,
    PackedLoader,
    Tokenizer,
    encode_chat,
    encoding,
    load_sources,
    load_tokenizer,
    preview,
)
from ernie_train.data import report as report_module


def chat(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def load(
    tokenizer: Tokenizer, path: Path, source: dict[str, Any] | None = None, **options: Any
) -> tuple[Documents, DataReport]:
    options = {"kind": "sft", "seq_len": 256, **options}
    entry = DataSource(path=path.name, **(source or {}))
    (documents,), report = load_sources([entry], tokenizer, base_dir=path.parent, **options)
    return documents, report


THINKING = "<think>\nadd them\n</think>\n\n<response>\n12\n</response>"


def test_sft_encodes_conversations(tokenizer: Tokenizer, write_rows: Any) -> None:
    rows = [chat("the sum?", THINKING), chat("true?", "false")]
    documents, report = load(tokenizer, write_rows("rows.jsonl", rows))
    for row, document in zip(rows, documents, strict=True):
        ids, trainable = encode_chat(tokenizer, row["messages"])
        assert document.ids.tolist() == ids and document.trainable.tolist() == trainable
    total = report.to_dict()["total"]
    assert total["rows"] == total["kept"] == total["documents"] == 2
    assert total["tokens"] == sum(len(d.ids) for d in documents)
    assert total["trainable_tokens"] == sum(int(d.trainable.sum()) for d in documents)
    assert documents[1].source.endswith("rows.jsonl:2")


def test_include_thinking_false_trains_answers_only(tokenizer: Tokenizer, write_rows: Any) -> None:
    path = write_rows("rows.jsonl", [chat("the sum?", THINKING)])
    documents, _ = load(tokenizer, path, {"include_thinking": False})
    text = tokenizer.decode(documents[0].ids.tolist())
    assert text.endswith("assistant\n<response>\n12\n</response>\n<|im_end|>")


def test_a_format_without_reasoning_tells_what_is_lost(plain: Tokenizer, write_rows: Any) -> None:
    documents, report = load(plain, write_rows("a.jsonl", [chat("q", THINKING)] * 2))
    assert plain.decode(documents[0].ids.tolist()) == (
        "<|begin_of_sentence|>User: q\nAssistant: 12<|end_of_sentence|>"
    )
    note = "answers whose reasoning the chat template does not show"
    assert report.sources[0].notes == {note: 2} and report.to_dict()["total"]["notes"] == {note: 2}


def test_turns_that_the_history_changes_are_documents_of_their_own(
    tokenizer: Tokenizer, write_rows: Any
) -> None:
    turns = chat("q", THINKING)["messages"] + chat("r", THINKING)["messages"]
    path = write_rows("a.jsonl", [{"messages": turns}])
    documents, report = load(tokenizer, path)
    assert len(documents) == 2 and report.sources[0].kept == 1
    last = ChatTraining(turns="last")
    assert len(load(tokenizer, path, training=last)[0]) == 1
    longest = int(documents.lengths.max())
    kept, report = load(tokenizer, path, seq_len=longest - 1)
    assert len(kept) == 1 and report.sources[0].over_seq_len == 1


def test_control_tokens_in_a_text_are_text(tokenizer: Tokenizer, write_rows: Any) -> None:
    path = write_rows("a.jsonl", [{"text": "an <s>old</s> answer"}])
    documents, _ = load(tokenizer, path, kind="pretrain")
    ids = documents[0].ids.tolist()
    assert tokenizer.decode(ids) == "an <s>old</s> answer</s>"
    assert ids.count(tokenizer.eos_token_id) == 1 and tokenizer.bos_token_id not in ids
    strict = load_tokenizer(tokenizer.directory)
    strict.chat = ChatFormat(strict.chat.template, control_tokens="refuse")
    with pytest.raises(DataError, match="the text contains the control token <s>"):
        load(strict, path, kind="pretrain")


def test_pretraining_ends_texts_with_eos_and_trains_every_token(
    tokenizer: Tokenizer, write_rows: Any
) -> None:
    documents, report = load(
        tokenizer, write_rows("a.jsonl", [{"text": "the answer"}]), kind="pretrain"
    )
    assert documents[0].ids.tolist() == [*tokenizer.encode("the answer"), tokenizer.eos_token_id]
    assert documents[0].trainable.all()
    assert report.total().trainable_tokens == len(documents[0].ids) - 1
    conversations, _ = load(tokenizer, write_rows("b.jsonl", [chat("q", "a")]), kind="pretrain")
    assert conversations[0].trainable.all()


@pytest.mark.parametrize("seq_len", [2, 3, 7, 100])
def test_split_texts_predict_every_token_once(
    tokenizer: Tokenizer, write_rows: Any, seq_len: int
) -> None:
    text = "the sum of apples and oranges is 12. " * 10
    path = write_rows("a.jsonl", [{"text": text}])
    documents, report = load(tokenizer, path, kind="pretrain", seq_len=seq_len)
    whole = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert max(documents.lengths) <= seq_len and len(whole) > 100
    batches = PackedLoader([documents], [1.0], seq_len, 1, seed=0, epochs=1, pad_id=0)
    pairs = [
        (int(token), int(label))
        for batch in batches
        for token, label, mask in zip(
            batch.input_ids[0], batch.labels[0], batch.loss_mask[0], strict=True
        )
        if mask
    ]
    assert sorted(pairs) == sorted(pairwise(whole))
    assert report.sources[0].over_seq_len == 1 and report.sources[0].overlong == "split"


@pytest.mark.parametrize(
    ("overlong", "kept", "truncated"), [(None, 1, 0), ("drop", 1, 0), ("truncate", 2, 1)]
)
def test_overlong_conversations(
    tokenizer: Tokenizer, write_rows: Any, overlong: str | None, kept: int, truncated: int
) -> None:
    rows = [chat("q", "a"), chat("q", "true false " * 100)]
    rows.append(chat("the answer is " * 100, "a"))  # nothing trainable is left of this one
    path = write_rows("a.jsonl", rows)
    documents, report = load(tokenizer, path, {"overlong": overlong}, seq_len=128)
    source = report.sources[0]
    assert (source.kept, source.truncated, source.over_seq_len) == (kept, truncated, 2)
    assert source.share_truncated == pytest.approx(truncated / 3)
    assert sum(source.dropped.values()) == 3 - kept
    assert documents.lengths.max() <= 128
    if overlong == "truncate":
        assert source.dropped == {"without a trainable token within seq_len": 1}
        full = encode_chat(tokenizer, rows[1]["messages"])[0]
        assert documents[1].ids.tolist() == full[:128]
    else:
        assert source.dropped == {"longer than seq_len": 2}


def test_rows_without_a_trainable_token_are_dropped_and_counted(
    tokenizer: Tokenizer, write_rows: Any
) -> None:
    rows = [
        chat("q", "a"),
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": "a", "weight": 0}]},
    ]  # fmt: skip
    _, report = load(tokenizer, write_rows("a.jsonl", rows))
    assert report.sources[0].dropped == {"without a trainable token": 2}
    assert (report.sources[0].rows, report.sources[0].kept) == (3, 1)


def test_a_text_of_one_token_has_nothing_to_predict(
    tokenizer: Tokenizer, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one that strips spaces may do.
    monkeypatch.setattr(tokenizer, "encode_with_offsets", lambda text: ([], []))
    with pytest.raises(DataError, match="1 without a trainable token"):
        load(tokenizer, write_rows("a.jsonl", [{"text": "x"}]), kind="pretrain")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "x"}], "1 plain text, which SFT cannot use"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], "1 a preference pair"),
        ([{"prompt": "q", "answer": "3"}], "1 without a trainable token"),
        ([chat("q " * 500, "a")], "1 longer than seq_len"),
    ],
)
def test_data_that_leaves_nothing_is_refused(
    tokenizer: Tokenizer, write_rows: Any, rows: list[Any], reason: str
) -> None:
    with pytest.raises(DataError, match=f"nothing to train on:\n  a.jsonl: 1 rows; {reason}"):
        load(tokenizer, write_rows("a.jsonl", rows))


def test_rows_that_cannot_be_encoded_count_as_bad(tokenizer: Tokenizer, write_rows: Any) -> None:
    rows = [chat("q", "a")] * 3 + [chat("q", "<think>open"), "{"]
    path = write_rows("a.jsonl", rows)
    _, report = load(tokenizer, path, max_bad_fraction=0.4)
    assert sorted(row.source[-1] for row in report.sources[0].bad.listed) == ["4", "5"]
    with pytest.raises(DataError, match="2 of 5 rows are bad") as caught:
        load(tokenizer, path, max_bad_fraction=0.39)
    assert "a.jsonl:4: an assistant turn opens <think> and never closes it" in str(caught.value)
    with pytest.raises(DataError, match="not valid Unicode"):
        load(tokenizer, write_rows("c.jsonl", ['{"text": "\\ud800"}']), kind="pretrain")


def test_max_examples_takes_the_first_good_rows(tokenizer: Tokenizer, write_rows: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}]}] + [
        chat(f"q{i}", "a") for i in range(9)
    ]
    documents, report = load(tokenizer, write_rows("a.jsonl", rows), {"max_examples": 4})
    assert len(documents) == 4 and report.sources[0].rows == 5
    assert "q3" in tokenizer.decode(documents[3].ids.tolist())


def test_a_bar_in_a_terminal_changes_no_count(
    tokenizer: Tokenizer, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows("[red] rows.jsonl", [chat("q", "a"), "broken"] * 50)
    settings: Any = {"source": {"max_examples": 3}, "max_bad_fraction": 0.5}
    plain = load(tokenizer, path, **settings)[1].to_dict()
    shown = io.StringIO()
    monkeypatch.setattr(
        encoding, "Terminal", lambda stderr: Console(file=shown, force_terminal=True)
    )
    monkeypatch.setattr(encoding, "SILENT_S", -1.0)
    assert load(tokenizer, path, **settings)[1].to_dict() == plain
    assert "encoding [red] rows.jsonl" in shown.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_report_adds_up(tokenizer: Tokenizer, write_rows: Any, tmp_path: Path) -> None:
    write_rows("a.jsonl", [chat("q", "true " * i) for i in range(1, 41)])
    write_rows("b.jsonl", [chat("q", "a")] * 50 + ["{"] + [chat("q", "x " * 600)])
    sources = [DataSource(path="a.jsonl", weight=2), DataSource(path="b.jsonl", weight=0.5)]
    documents, report = load_sources(
        sources, tokenizer, kind="sft", seq_len=256, base_dir=tmp_path, max_bad_fraction=0.1, seed=3
    )
    result = json.loads(json.dumps(report.to_dict()))
    first, second = result["sources"]
    assert second["bad"] == 1 and "b.jsonl:51: it is not valid JSON" in second["bad_rows"][0]
    assert second["dropped"] == {"longer than seq_len": 1}
    for source in (first, second):
        assert source["rows"] == source["kept"] + source["bad"] + sum(source["dropped"].values())
    for key in ("rows", "kept", "bad", "tokens", "trainable_tokens", "documents"):
        assert result["total"][key] == first[key] + second[key]
    lengths = np.sort(documents[0].lengths)
    assert first["lengths"]["max"] == lengths[-1] and first["lengths"]["p50"] == lengths[20]
    loader = PackedLoader(documents, [2, 0.5], 256, 1, seed=3, epochs=1, pad_id=0)
    filled = [batch.num_tokens for batch in loader]
    assert result["packing_fill"] == pytest.approx(sum(filled) / (len(filled) * 256))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.as_table())
    text = console.export_text()
    assert "a.jsonl x2" in text and "1 longer than seq_len" in text and "1 bad, first" in text
    assert "1 of 52 rows of b.jsonl are longer than seq_len=256 and left out" in flat(text)
    assert "raise seq_len, or set overlong: truncate" in flat(text)
    assert "a.jsonl are longer" not in flat(text)
    assert "total" in text and max(map(len, text.splitlines())) <= 80


def test_recipes_mistakes_in_a_source_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(DataSource, {"path": "", "weight": 0, "format": "csv", "max": 3}, "recipe")
    message = str(caught.value)
    assert all(key in message for key in ("path", "weight", "format", "max_examples"))


def test_a_missing_file_and_a_tiny_seq_len_are_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        load(tokenizer, tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="must be at least 2"):
        load(tokenizer, tmp_path / "gone.jsonl", seq_len=1)


def test_the_preview_colours_what_is_trained(tokenizer: Tokenizer, write_rows: Any) -> None:
    documents, _ = load(tokenizer, write_rows("a.jsonl", [chat("a\x1b[31mb", "true")]))
    text = preview(tokenizer, documents[0])
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green.replace("⏎\n", "\n") == "<response>\ntrue\n</response>\n<|im_end|>"
    assert "\x1b" not in text.plain and "\\x1b[31m" in text.plain
    assert "⟦" not in text.plain
    pipe = Console(file=io.StringIO())
    plain = preview(tokenizer, documents[0], console=pipe).plain
    assert plain.replace("⟦", "").replace("⟧", "") == text.plain
    assert plain[plain.index("⟦") + 1 : plain.index("⟧")] == green, "readable without colours"
    short = preview(tokenizer, documents[0], max_tokens=5, console=pipe).plain
    assert "more tokens" in short and short.endswith("⟧"), "the end is shown"


def test_counts_are_written_with_three_digits() -> None:
    numbers = (9_999, 10_000, 12_345, 999_499, 999_500, 1_234_567, 999_500_000, 2_000_000_000)
    expected = ["9999", "10k", "12.3k", "999k", "1M", "1.23M", "1G", "2G"]
    assert [report_module._compact(number) for number in numbers] == expected
