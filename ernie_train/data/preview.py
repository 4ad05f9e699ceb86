"""Shows which tokens of a document are trained: `check` prints it in colour."""

from itertools import groupby

from rich.text import Text

from ernie_train.data.documents import EncodedDocument
from ernie_train.data.tokenizer import Tokenizer

TRAINED, UNTRAINED = "bold green", "dim"


def preview(tokenizer: Tokenizer, document: EncodedDocument, max_tokens: int = 400) -> Text:
    """A document's text: trained tokens green, the others dim, newlines marked with a sign."""
    text = Text()
    # The first token is nobody's label, whatever the mask says.
    trained = [False, *document.trainable[1:max_tokens].tolist()]
    tokens = zip(document.ids[:max_tokens].tolist(), trained, strict=True)
    for is_trained, run in groupby(tokens, key=lambda token: token[1]):
        shown = _visible(tokenizer.decode([token_id for token_id, _ in run]))
        text.append(shown, style=TRAINED if is_trained else UNTRAINED)
    if len(document.ids) > max_tokens:
        text.append(f" ... {len(document.ids) - max_tokens} more tokens", style="italic")
    return text


def _visible(text: str) -> str:
    # Data may hold terminal escapes; they are shown, not obeyed.
    shown = (
        c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(shown).replace("\n", "⏎\n")
