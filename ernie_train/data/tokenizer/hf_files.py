"""Write the tokenizer files that `transformers` 4.57 and 5.x both load to the same ids.

`transformers` 4.57 returns wrong ids for a `tokenizer.model` alone, so `tokenizer.json` and
`tokenizer_config.json` are written too; both versions then agree with SentencePiece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (  # type: ignore[import-untyped]
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
)

from ernie_train.core import foreign_files
from ernie_train.core.errors import DataError, describe
from ernie_train.data.chat_template import (
    CONTROL_TOKENS,
    ERNIE_THINKING,
    RESPONSE_TEMPLATE,
    ChatTemplate,
    shipped_template,
)
from ernie_train.data.completion_format import SENTENCE_END, SENTENCE_START
from ernie_train.data.tokenizer.sentencepiece_proto import (
    PieceType,
    SentencePiece,
    SentencePieceModel,
)
from ernie_train.io.files import write_json, write_text

CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"  # instead, where there are tools
CONFIG_FILE = "tokenizer_config.json"
LONGEST_TOKEN = 1000  # the library takes more than the square of it: seconds for 10,000
SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE_FILE,
    TOOL_TEMPLATE_FILE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def write_huggingface_files(
    out_dir: Path,
    proto: SentencePieceModel,
    added: Mapping[str, int],
    control_tokens: Collection[str],
    roles: Mapping[str, str],
) -> None:
    """Write the files of a tokenizer, except `tokenizer.model` and the chat template.

    `added` are tokens beyond those of the proto, with their ids; `roles` are those of its tokens,
    role ("eos_token") -> text. Other settings of a tokenizer_config.json in `out_dir` are kept.

    Raises:
        DataError: the model is not BPE, or the added tokens leave a gap in the ids.
    """
    whole = {piece.text: i for i, piece in enumerate(proto.pieces) if _is_whole(piece)}
    whole.update(added)
    special = [text for text in whole if text in control_tokens]
    _write_tokenizer_json(out_dir / "tokenizer.json", proto, whole, special)
    named = {**_named_tokens(proto), **roles}
    config: dict[str, Any] = {
        **optional_json(out_dir / CONFIG_FILE),
        "tokenizer_class": "LlamaTokenizerFast",
        "legacy": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **named,
        "additional_special_tokens": [t for t in special if t not in named.values()],
        "added_tokens_decoder": {
            str(token_id): _added_token(text, text in special) for text, token_id in whole.items()
        },
    }
    config.pop("auto_map", None)  # it names code of another class
    write_json(out_dir / CONFIG_FILE, config)
    write_json(
        out_dir / "special_tokens_map.json",
        {**named, "additional_special_tokens": config["additional_special_tokens"]},
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """Hold what the JSON files beside a vocabulary say about its special tokens.

    special_tokens: role ("eos_token") -> text.
    content: tokenizer_config.json.
    added: text -> id by added_tokens.json.
    """

    directory: Path
    content: dict[str, Any]
    special_tokens: dict[str, str]
    added: dict[str, int]

    @classmethod
    def read(cls, directory: Path) -> TokenizerConfig:
        """Read the files of a directory, those that it has.

        Raises:
            DataError: a file is damaged.
        """
        content = optional_json(directory / CONFIG_FILE)
        named = {**optional_json(directory / "special_tokens_map.json"), **content}
        roles = {key: token_text(value) for key, value in named.items() if key.endswith("_token")}
        for role in SPECIAL_ROLES:
            if named.get(role) is not None and roles[role] is None:
                raise DataError(
                    f"{directory}: {role} must be a text, or an object with one as its content, in "
                    f"{CONFIG_FILE} or special_tokens_map.json, got {describe(named[role])}"
                )
        added = optional_json(directory / "added_tokens.json")
        if not all(type(token_id) is int and token_id >= 0 for token_id in added.values()):
            raise DataError(
                f"{directory / 'added_tokens.json'}: every id must be a whole number from 0 on"
            )
        texts = {role: text for role, text in roles.items() if text is not None}
        return cls(directory, content, texts, added)

    def added_tokens(self) -> dict[str, int]:
        """Return text -> id of the tokens that the files add to the vocabulary.

        Raises:
            DataError: added_tokens_decoder is not a table of ids and tokens, or a token is no word.
        """
        added = dict(self.added)
        decoder = self.content.get("added_tokens_decoder") or {}
        for token_id, entry in decoder.items() if isinstance(decoder, dict) else [("", None)]:
            text = token_text(entry)
            if text is None or not token_id.isdecimal():
                raise DataError(
                    f"{self.directory / CONFIG_FILE}: added_tokens_decoder must map ids to tokens"
                )
            added[text] = int(token_id)
        if (longest := max(map(len, added), default=0)) > LONGEST_TOKEN:
            raise DataError(f"{self.directory}: an added token has {longest} characters")
        return added

    def special_added(self) -> set[str]:
        """Return the texts that have a role or that added_tokens_decoder calls special."""
        decoder = self.content.get("added_tokens_decoder") or {}
        entries = decoder.values() if isinstance(decoder, dict) else ()
        marked = {token_text(e) for e in entries if isinstance(e, dict) and e.get("special")}
        return {*self.special_tokens.values(), *(text for text in marked if text)}

    def special_ids(self, token_id: Callable[[str], int | None]) -> tuple[int, int, int]:
        """Return the ids of bos, eos and pad; eos stands for the others where they are not named.

        Raises:
            DataError: no eos_token is named, or a named token is not in the vocabulary.
        """
        ids: dict[str, int] = {}
        for role in SPECIAL_ROLES:
            text = self.special_tokens.get(role)
            if text is None:
                continue
            found = token_id(text)
            if found is None and role != "pad_token":
                raise DataError(f"{self.directory}: the {role} {text!r} is not in the vocabulary")
            if found is not None:
                ids[role] = found
        if "eos_token" not in ids:
            raise DataError(
                f"{self.directory} names no eos_token, the token that ends a text; write it into "
                f"{CONFIG_FILE}"
            )
        eos = ids["eos_token"]
        return ids.get("bos_token", eos), eos, ids.get("pad_token", eos)


def read_chat_template(directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """Return a directory's own chat template, chat_template.jinja or tokenizer_config.json's.

    Raises:
        DataError: it is not text.
    """
    path, with_tools = directory / CHAT_TEMPLATE_FILE, directory / TOOL_TEMPLATE_FILE
    if path.is_file():
        tool_source = _template_text(with_tools) if with_tools.is_file() else None
        return ChatTemplate(_template_text(path), special_tokens, str(path), tool_source)
    path = directory / CONFIG_FILE
    source = optional_json(path).get("chat_template")
    tool_source = None
    if isinstance(source, list):  # several, by name
        named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
        source, tool_source = named.get("default"), named.get("tool_use")
    if source is None:
        return None
    if not isinstance(source, str) or not isinstance(tool_source, str | None):
        raise DataError(f"{path}: chat_template must be text, or a list with one named default")
    return ChatTemplate(source, special_tokens, f"chat_template of {path}", tool_source)


def _template_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error


def write_chat_template(out_dir: Path, template: ChatTemplate | None) -> None:
    """Write a chat template to both files in which libraries look for it.

    A directory that has the template already is left as it is. For ERNIE's Thinking format the
    `response_template` is written too, by which `transformers` 5 parses completions.
    """
    if template is None:
        return
    present, with_tools = read_chat_template(out_dir, {}), out_dir / TOOL_TEMPLATE_FILE
    wanted = (template.source, template.tool_source)
    if present is not None and (present.source, present.tool_source) == wanted:
        return
    write_text(out_dir / CHAT_TEMPLATE_FILE, template.source)
    with_tools.unlink(missing_ok=True)
    if template.tool_source is not None:
        with_tools.parent.mkdir(exist_ok=True)
        write_text(with_tools, template.tool_source)
    path = out_dir / CONFIG_FILE
    config = {**optional_json(path), "chat_template": template.source}
    config.pop("response_template", None)  # of another format
    if template.source == shipped_template(ERNIE_THINKING).source:
        config["response_template"] = RESPONSE_TEMPLATE
    write_json(path, config)


def special_tokens(proto: SentencePieceModel) -> list[str]:
    """Return the pieces that `skip_special_tokens` omits: unk, control pieces and turn tokens."""
    return [
        piece.text
        for piece in proto.pieces
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL) or piece.text in CONTROL_TOKENS
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object.

    Raises:
        DataError: it contains anything else.
    """
    try:
        return foreign_files.read_json(path)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON of a tokenizer: {error}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def optional_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object; {} if it does not exist."""
    return read_json(path) if path.exists() else {}


def token_text(entry: Any) -> str | None:
    """Return the text of a token in tokenizer_config.json, a string or a dict with "content"."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _is_whole(piece: SentencePiece) -> bool:
    return piece.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)


def _added_token(text: str, special: bool) -> dict[str, Any]:
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }


def _named_tokens(proto: SentencePieceModel) -> dict[str, str]:
    """Return role -> special token as in ERNIE: pad is unk, cls and sep are the plain chat's."""
    texts = {piece.text for piece in proto.pieces}
    unknown = next(p.text for p in proto.pieces if p.type is PieceType.UNKNOWN)
    named = {"unk_token": unknown, "pad_token": unknown}
    roles = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": SENTENCE_START,
        "sep_token": SENTENCE_END,
    }
    return named | {role: text for role, text in roles.items() if text in texts}


def _write_tokenizer_json(
    path: Path, proto: SentencePieceModel, whole: Mapping[str, int], special: list[str]
) -> None:
    if not proto.is_bpe:
        raise DataError(
            "tokenizer.model is not a BPE model, so no tokenizer.json can be made from it; "
            "put the tokenizer.json that belongs to it into the same directory"
        )
    vocabulary = {piece.text: token_id for token_id, piece in enumerate(proto.pieces)}
    normal = {p.text: i for i, p in enumerate(proto.pieces) if p.type is PieceType.NORMAL}
    unknown = next(p.text for p in proto.pieces if p.type is PieceType.UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=bpe_merges(normal, [piece.score for piece in proto.pieces]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(p.type is PieceType.BYTE for p in proto.pieces),
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for text, token_id in sorted(whole.items(), key=lambda item: item[1]):
        token = AddedToken(text, normalized=False, special=text in special)
        if text in special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(text) != token_id:
            raise DataError(
                f"the added token {text!r} has id {token_id}, but the ids before it leave a gap, "
                "which tokenizer.json cannot express; put your own tokenizer.json beside it"
            )
    write_text(path, tokenizer.to_str(pretty=True))


def bpe_merges(normal: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, in the order in which SentencePiece merges.

    normal: ids of the pieces that are text; scores: of all pieces, by id.
    """
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for text, token_id in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                merges.append((-scores[token_id], normal[left], normal[right], (left, right)))
    return [pair for *_, pair in sorted(merges)]
