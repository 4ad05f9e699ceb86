"""Writes texts with facts to be found again, and a tokenizer for them: the data of long_context.

    python -m tools.data.make_needles --out runs/needles

A text hides one fact of each category among sentences that say nothing, and ends with a list of
all facts in another order:

    The lamp of the quiet farmer stands under the tower. The animal is fox. ... So: color red,
    animal fox, ...

The word after "animal" in the list cannot be known without the sentence far before it. All words
are single tokens of the tokenizer, so a text has exactly as many tokens as it was asked for, and
one token is a whole answer. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from ernie_train.core.errors import DataError
from ernie_train.data import Tokenizer, train_tokenizer

SEED = 20251123
# Tokens of a text, eos included, and how many texts there are of it.
SIZES = {64: 7200, 256: 400, 512: 200}

CATEGORIES = {
    "color": "red blue green pink gray black white brown amber lime teal navy rust violet",
    "animal": "fox cat dog cow hen pig bee owl ant bat elk ram seal wolf",
    "city": "Rome Oslo Lima Cairo Paris Delhi Tokyo Quito Milan Dakar Perth Kyoto Sofia Turin",
    "tool": "saw axe drill rake spade nail rope pump broom plane hammer chisel lever wrench",
    "fruit": "apple pear fig lemon mango grape peach melon cherry kiwi olive date guava banana",
    "number": "one two three four five six seven eight nine ten eleven twelve twenty forty",
}
VALUES = {category: words.split() for category, words in CATEGORIES.items()}
FILLER = {
    "noun": "lamp farmer tower river wall child teacher garden bridge door window boat king tree",
    "adjective": "quiet old small bright cold tall slow young gentle broken",
    "verb": "stands waits sleeps rests sits stays hides lives",
    "place": "under behind near above before beside",
}
FILLER_WORDS = {kind: words.split() for kind, words in FILLER.items()}
FACT_TOKENS = 5  # The animal is fox .
LIST_TOKENS = 2 + 3 * len(VALUES)  # So : color red , animal fox , ... and a full stop at the end
MIN_TOKENS = len(VALUES) * FACT_TOKENS + LIST_TOKENS + 1


@dataclass(frozen=True)
class Needle:
    """A fact of a text: the word at position `stated_at` is to be predicted at `asked_at`."""

    category: str
    stated_at: int
    asked_at: int  # position of the category's name in the list; the answer follows it


@dataclass(frozen=True)
class NeedleText:
    """A text word by word; a word is a token, with a space before it unless it is punctuation."""

    words: list[str]
    needles: list[Needle]

    @property
    def text(self) -> str:
        spaced = (word if word in ".,:" else f" {word}" for word in self.words)
        return "".join(spaced)


def make_text(rng: random.Random, num_tokens: int) -> NeedleText:
    """Return a text of `num_tokens` tokens with the eos that follows it.

    Raises ValueError below `MIN_TOKENS`.
    """
    filler = num_tokens - MIN_TOKENS
    if filler < 0:
        raise ValueError(f"{num_tokens} tokens do not hold the facts: {MIN_TOKENS} are the least")
    chosen = {category: rng.choice(words) for category, words in VALUES.items()}
    sentences = [["The", c, "is", value, "."] for c, value in chosen.items()]
    while filler:
        sentences.append(_sentence(rng)[-filler:])  # the last one may lack its beginning
        filler -= len(sentences[-1])
    rng.shuffle(sentences)
    words = [word for sentence in sentences for word in sentence]
    stated = {words[i + 1]: i + 3 for i in range(len(words) - 2) if words[i + 2] == "is"}
    words += ["So", ":"]
    needles = []
    for category in rng.sample(list(chosen), len(chosen)):
        needles.append(Needle(category, stated[category], len(words)))
        words += [category, chosen[category], ","]
    words[-1] = "."
    return NeedleText(words, needles)


def _sentence(rng: random.Random) -> list[str]:
    """Return words such as "The lamp of the quiet farmer stands under the tower."."""
    nouns = FILLER_WORDS["noun"]
    thing, owner, place = rng.choice(nouns), rng.choice(nouns), rng.choice(nouns)
    adjective, verb, where = (
        rng.choice(FILLER_WORDS[kind]) for kind in ("adjective", "verb", "place")
    )
    return ["The", thing, "of", "the", adjective, owner, verb, where, "the", place, "."]


def vocabulary() -> list[str]:
    """Return every word that a text can hold, sorted, without punctuation."""
    lists = [*VALUES.values(), *FILLER_WORDS.values()]
    grammar = {"The", "the", "of", "is", "So"}
    return sorted({*VALUES, *grammar, *(word for words in lists for word in words)})


def make_tokenizer(directory: Path) -> Tokenizer:
    """Train a tokenizer of the fewest pieces (by steps of 16) that has every word as one piece."""
    words = vocabulary()
    for vocab_size in range(16 * (len(words) // 16) + 512, 2048, 16):
        try:
            tokenizer = train_tokenizer([f" {word}.,:" for word in words], vocab_size, directory)
        except DataError as error:
            raise RuntimeError(f"no vocabulary holds every word: {error}") from error
        if all(len(tokenizer.encode(f" {word}")) == 1 for word in words):
            return tokenizer
    raise RuntimeError("no vocabulary of up to 2048 pieces holds every word")


def main(arguments: list[str] | None = None) -> None:
    """Write OUT/train/texts_<tokens>.jsonl and OUT/tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/needles"))
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    tokenizer = make_tokenizer(options.out / "tokenizer")
    print(f"{options.out / 'tokenizer'}: {tokenizer.vocab_size} pieces")
    (options.out / "train").mkdir(exist_ok=True)
    for num_tokens, count in SIZES.items():
        rng = random.Random(f"{options.seed}/train/{num_tokens}")
        texts = [make_text(rng, num_tokens).text for _ in range(count)]
        file = options.out / "train" / f"texts_{num_tokens}.jsonl"
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        print(f"{file}: {count} texts of {num_tokens} tokens, such as\n  {texts[0][:300]}")


if __name__ == "__main__":
    main()
