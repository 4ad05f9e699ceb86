"""The texts with hidden facts: exact lengths, facts that can be found, one token a word."""

import json
import random
from pathlib import Path

import pytest

from ernie_train.data import Tokenizer, load_tokenizer, read_records
from tools.data import make_needles
from tools.data.make_needles import MIN_TOKENS, VALUES, NeedleText, make_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_needles.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(num_tokens: int, count: int = 50) -> list[NeedleText]:
    rng = random.Random(3)
    return [make_text(rng, num_tokens) for _ in range(count)]


@pytest.mark.parametrize("num_tokens", [MIN_TOKENS, 64, 65, 300])
def test_a_text_has_the_tokens_asked_for(tokenizer: Tokenizer, num_tokens: int) -> None:
    for made in texts(num_tokens):
        ids = tokenizer.encode(made.text)
        assert len(ids) == len(made.words) == num_tokens - 1  # eos makes it whole
        pieces = [word if word in ".,:" else f" {word}" for word in made.words]
        assert [tokenizer.decode([token]) for token in ids] == pieces


def test_every_category_is_stated_once_and_asked_once() -> None:
    for made in texts(200):
        assert sorted(needle.category for needle in made.needles) == sorted(VALUES)
        for needle in made.needles:
            answer = made.words[needle.stated_at]
            assert answer in VALUES[needle.category]
            assert made.words[needle.stated_at - 3 : needle.stated_at] == [
                "The",
                needle.category,
                "is",
            ]
            asked = made.words[needle.asked_at : needle.asked_at + 2]
            assert asked == [needle.category, answer]
            assert made.words.count(answer) == 2


def test_no_word_means_two_things() -> None:
    values = [word for words in VALUES.values() for word in words]
    filler = [word for words in make_needles.FILLER_WORDS.values() for word in words]
    assert len({*values, *filler, *VALUES}) == len(values) + len(filler) + len(VALUES)
    assert len({len(words) for words in VALUES.values()}) == 1  # chance is the same for all


def test_facts_stand_anywhere_in_the_text() -> None:
    """Depths are about uniform: each tenth of the place before the list has its share of them."""
    made = texts(512, 400)
    depths = [needle.stated_at / text.words.index("So") for text in made for needle in text.needles]
    for tenth in range(10):
        share = sum(tenth / 10 <= depth < (tenth + 1) / 10 for depth in depths) / len(depths)
        # 2400 draws, those of one text nearly independent: 0.1 has a deviation of 0.006.
        assert share == pytest.approx(0.1, abs=0.03)


def test_the_order_of_the_list_gives_no_hint() -> None:
    made = texts(MIN_TOKENS, 300)
    in_order = 0
    for text in made:
        stated = [needle.stated_at for needle in text.needles]
        in_order += stated == sorted(stated)
    assert in_order / len(made) < 0.02  # by chance 1 in 720


def test_a_text_too_short_for_its_facts_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MIN_TOKENS} are the least"):
        make_text(random.Random(0), MIN_TOKENS - 1)


def test_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_needles, "SIZES", {64: 20, 128: 5})
    for name in ("a", "b"):
        make_needles.main(["--out", str(tmp_path / name)])
    records, report = read_records(tmp_path / "a" / "train")
    assert (report.kept, report.bad.count) == (25, 0)
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    lengths = [len(tokenizer.encode(record.text or "")) for record in records]
    assert sorted(lengths) == [63] * 20 + [127] * 5
    for file in ("train/texts_64.jsonl", "train/texts_128.jsonl", "tokenizer/tokenizer.model"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    lines = (tmp_path / "a/train/texts_64.jsonl").read_text("utf-8").splitlines()
    assert len({json.loads(line)["text"] for line in lines}) == 20
