"""Label masks derived from the templates of many model families, and their text and ids."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ernie_train.core.errors import DataError
from ernie_train.data import ChatTraining, encode_chat, encode_conversation, prompt_ids, render_chat
from ernie_train.data.tokenizer import ChatFormat, Tokenizer, load_tokenizer
from tests.data.chat_families import FAMILIES, SPECIAL, Family

Message = dict[str, Any]


def byte_level_files(
    directory: Path, texts: list[str], special: Sequence[str] = tuple(SPECIAL)
) -> None:
    """Writes the tokenizer.json of a byte-level BPE, and no class that a library would know."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in special],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, corpus: Callable[..., list[str]]) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        byte_level_files(root / name, corpus(100))
        (root / name / "chat_template.jinja").write_text(family.template)
    return root


def conversation(family: Family, *, reasoning: bool = True) -> list[Message]:
    def answer(text: str, reason: str) -> Message:
        more = {"reasoning_content": reason} if reasoning else {}
        return {"role": "assistant", "content": text, **more}

    system = [{"role": "system", "content": "Be brief, é 漢."}] if family.system else []
    return [
        *system,
        {"role": "user", "content": "the sum?\n\n  of 1"},
        answer("12 apples", "one and\n\ntwo"),
        {"role": "user", "content": "and?"},
        answer("knight\n    true", "because 7"),
    ]


def trained_texts(tokenizer: Tokenizer, samples: list[Any]) -> list[str]:
    """The runs of trained tokens of all samples."""
    runs = []
    for sample in samples:
        before = False
        for token, mark in zip(sample.ids, sample.trainable, strict=True):
            if mark and not before:
                runs.append([])
            if mark:
                runs[-1].append(token)
            before = mark
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("reasoning", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_is_trained_once_as_the_model_writes_it(
    root: Path, name: str, reasoning: bool
) -> None:
    family = FAMILIES[name]
    tokenizer = load_tokenizer(root / name)
    messages = conversation(family, reasoning=reasoning)
    encoded = encode_conversation(tokenizer, messages)
    turn = family.turn if reasoning else family.plain_turn
    assert trained_texts(tokenizer, encoded.samples) == [
        turn.format(reasoning="one and\n\ntwo", answer="12 apples"),
        turn.format(reasoning="because 7", answer="knight\n    true"),
    ]
    changes = reasoning and not family.keeps_history
    assert len(encoded.samples) == (2 if changes or (name == "last_thinks") else 1)
    for sample in encoded.samples:
        end = len(messages) if sample is encoded.samples[-1] else -2
        text = render_chat(tokenizer, messages[:end])
        assert tokenizer.decode(sample.ids) == text.rstrip("\n")
    last = encoded.samples[-1]
    assert encode_chat(tokenizer, messages) == (last.ids, last.trainable)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_follows_the_generation_prompt(root: Path, name: str) -> None:
    family = FAMILIES[name]
    tokenizer = load_tokenizer(root / name)
    messages = conversation(family)
    for sample, end in zip(
        encode_conversation(tokenizer, messages).samples[-1:], [-1], strict=True
    ):
        prompt = prompt_ids(tokenizer, messages[:end])
        start = len(sample.trainable) - sample.trainable[::-1].index(False)
        assert sample.ids[:start] == prompt
    stop = tokenizer.decode([last_trained(encode_conversation(tokenizer, messages).samples[-1])])
    assert tokenizer.token_id(stop) in tokenizer.stop_token_ids


def last_trained(sample: Any) -> int:
    return max(
        (at, token)
        for at, (token, mark) in enumerate(zip(sample.ids, sample.trainable, strict=True))
        if mark
    )[1]


@pytest.mark.parametrize("transformers", ["newest", "4.57"])
def test_transformers_renders_and_encodes_alike(
    root: Path, tmp_path: Path, referee: Callable[..., Any], transformers: str
) -> None:
    arguments: list[Any] = []
    cases = {}
    for name, family in FAMILIES.items():
        if name == "marked" and transformers == "4.57":
            continue
        messages = conversation(family)
        wrapped = [
            {"messages": messages[:end], "tools": None, "add_generation_prompt": ask}
            for end, ask in ((len(messages), False), (-1, True), (-3, True))
        ]
        cases[name] = wrapped
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(wrapped))
        if transformers == "4.57":  # it does not know the class that version 5 writes
            config = root / name / "tokenizer_config.json"
            known = config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
            config.write_text(known)
        arguments += [root / name, path]
    out = tmp_path / "out.json"
    referee("chat_render.py", out, *arguments, transformers=transformers)
    for name, theirs in zip(cases, json.loads(out.read_text()), strict=True):
        tokenizer = load_tokenizer(root / name)
        for case, text, ids in zip(cases[name], theirs["text"], theirs["ids"], strict=True):
            ask = case["add_generation_prompt"]
            assert render_chat(tokenizer, case["messages"], None, add_generation_prompt=ask) == text
            ours = prompt_ids if ask else lambda t, m: encode_chat(t, m)[0]
            found = ours(tokenizer, case["messages"])
            assert ids[: len(found)] == found
            assert not tokenizer.decode(ids[len(found) :]).strip()


def test_earlier_reasoning_can_be_kept_or_dropped(root: Path) -> None:
    tokenizer = load_tokenizer(root / "last_thinks")
    messages = conversation(FAMILIES["last_thinks"])
    tokenizer.chat = ChatFormat(tokenizer.chat.template, history_reasoning="keep")
    kept = encode_conversation(tokenizer, messages).samples
    first, second = "<think>\none and\n\ntwo\n</think>\n\n", "<think>\nbecause 7\n</think>\n\n"
    assert tokenizer.decode(kept[0].ids) == (
        "<|im_start|>system\nBe brief, é 漢.<|im_end|>\n"
        "<|im_start|>user\nthe sum?\n\n  of 1<|im_end|>\n"
        f"<|im_start|>assistant\n{first}12 apples<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        f"<|im_start|>assistant\n{second}knight\n    true<|im_end|>"
    )
    assert len(kept) == 1 and len(trained_texts(tokenizer, kept)) == 2
    asked = prompt_ids(tokenizer, messages[:-1])
    assert kept[0].ids[: len(asked)] == asked

    marked = load_tokenizer(root / "chatml")
    inline = [
        {**m, "content": f"<think>why</think>{m['content']}"} if m["role"] == "assistant" else m
        for m in conversation(FAMILIES["chatml"], reasoning=False)
    ]
    marked.chat = ChatFormat(marked.chat.template, history_reasoning="drop")
    dropped = encode_conversation(marked, inline).samples
    assert marked.decode(dropped[-1].ids).count("<think>") == 1
    assert [text.count("why") for text in trained_texts(marked, dropped)] == [1, 1]


def test_keep_needs_turns_that_end_alike(root: Path) -> None:
    end = "{{ '<|end|>' if loop.last and m.role == 'assistant' else '<|eot_id|>' }}"
    source = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    tokenizer = load_tokenizer(root / "chatml", template=str(_file(root, source)))
    tokenizer.chat = ChatFormat(tokenizer.chat.template, history_reasoning="keep")
    with pytest.raises(DataError, match="ends every turn alike"):
        encode_conversation(tokenizer, conversation(FAMILIES["chatml"], reasoning=False))


def _file(root: Path, source: str) -> Path:
    path = root / "own.jinja"
    path.write_text(source)
    return path


def test_turns_and_reasoning_to_train_can_be_chosen(root: Path) -> None:
    tokenizer = load_tokenizer(root / "last_thinks")
    messages = conversation(FAMILIES["last_thinks"])
    last = encode_conversation(tokenizer, messages, None, ChatTraining(turns="last")).samples
    whole = "<think>\nbecause 7\n</think>\n\nknight\n    true<|im_end|>"
    assert trained_texts(tokenizer, last) == [whole]
    answers = encode_conversation(tokenizer, messages, None, ChatTraining(reasoning=False)).samples
    assert trained_texts(tokenizer, answers) == [
        "12 apples<|im_end|>",
        "knight\n    true<|im_end|>",
    ]
    assert [a.ids for a in answers] == [
        s.ids for s in encode_conversation(tokenizer, messages).samples
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "not a Jinja template"),
        ("{{ nothing.there.at_all }}", "cannot render|undefined"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "loops",
        ),
        ("{{ 'a' * 999999999 }}", "beyond all bounds"),
        ("{{ 9 ** 999999999 }}", "beyond all bounds"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "without end"),
        (
            "{{ messages.__class__.__mro__ }}{{ ''.__class__.__init__.__globals__ }}",
            "unsafe|undefined",
        ),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ [1] | dictsort }}", "cannot render"),
        ("{{ lipsum(n=9999999) }}", "cannot render|undefined"),
        (
            "{% set s = 'x' * 9999 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
            "loops",
        ),
        ("no conversation", "leaves"),
    ],
)
def test_bad_templates_are_one_message(root: Path, source: str, message: str) -> None:
    tokenizer = load_tokenizer(root / "chatml", template=str(_file(root, source)))
    with pytest.raises(DataError, match=message) as caught:
        encode_conversation(tokenizer, conversation(FAMILIES["chatml"]))
    assert len(str(caught.value)) < 500


def test_a_directory_without_any_format_is_told(root: Path, tmp_path: Path) -> None:
    byte_level_files(tmp_path, ["a b"])
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(
        content.replace("<|im_end|>", "<|x|>").replace("<|end_of_sentence|>", "<|y|>")
    )
    with pytest.raises(DataError, match=r"no chat template .*chat\.template"):
        prompt_ids(load_tokenizer(tmp_path), [{"role": "user", "content": "a"}])
    with pytest.raises(DataError, match="it is a file, or ernie_thinking"):
        load_tokenizer(tmp_path, template=str(tmp_path / "none.jinja"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLING = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "done"},
]
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"


def own(root: Path, source: str) -> Tokenizer:
    return load_tokenizer(root / "chatml", template=str(_file(root, source)))


def test_a_template_without_tools_loses_no_call(root: Path) -> None:
    with pytest.raises(DataError, match=r"message 2: .* its tool call out; chat\.template in"):
        encode_conversation(load_tokenizer(root / "chatml"), CALLING)
    no_results = (
        TURN + "{% if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endif %}<|im_end|>"
    )
    with pytest.raises(DataError, match=r"message 3 is a tool .* leaves out; chat\.template in"):
        encode_conversation(own(root, no_results + "{% endfor %}"), CALLING)


def test_arguments_are_text_where_a_template_needs_text(root: Path) -> None:
    source = (
        TURN + "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = own(root, source)
    first, second = trained_texts(tokenizer, encode_conversation(tokenizer, CALLING).samples)
    assert (first, second) == ('add {"a": 1}<|im_end|>', "done<|im_end|>")


def test_a_token_that_ends_the_conversation_is_none_of_the_turn(root: Path) -> None:
    body = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    source = body + "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    tokenizer = own(root, source)
    samples = encode_conversation(tokenizer, conversation(FAMILIES["chatml"])).samples
    assert len(samples) == 1
    assert trained_texts(tokenizer, samples) == ["12 apples<|end|>", "knight\n    true<|end|>"]
    ends = {tokenizer.token_id(token) for token in ("<|end|>", "<|endoftext|>")}
    assert ends <= set(tokenizer.stop_token_ids)


def test_turns_that_no_token_ends_are_told(root: Path) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    tokenizer = own(root, source + "{{ '<|assistant|>\n' if add_generation_prompt else '' }}")
    found = encode_conversation(tokenizer, conversation(FAMILIES["chatml"], reasoning=False))
    assert trained_texts(tokenizer, found.samples) == ["12 apples", "knight\n    true"]
    assert found.notes == ["turns that the chat template ends by no token of their own"] * 2


def test_a_generation_block_may_hold_the_generation_prompt(root: Path) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}"
        "<|im_end|>{% endgeneration %}\n{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = own(root, source)
    samples = encode_conversation(
        tokenizer, conversation(FAMILIES["chatml"], reasoning=False)
    ).samples
    assert trained_texts(tokenizer, samples) == [
        "12 apples<|im_end|>",
        "knight\n    true<|im_end|>",
    ]


def test_a_template_may_change_a_message_but_not_lose_it(root: Path) -> None:
    switch = TURN + "{{ m.content.replace('/no_think', '') }}<|im_end|>\n{% endfor %}"
    messages = [{"role": "system", "content": "Be /no_think brief"}, *CALLING[:1], CALLING[3]]
    encode_conversation(own(root, switch), messages)
    late = "{% for m in messages %}{% if loop.last and messages[0].role == 'system' %}"
    late += "{{ messages[0].content }}\n{% endif %}{% if m.role != 'system' %}<|{{ m.role }}|>"
    late += "{{ m.content }}<|end|>{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"leaves|otherwise than when"):
        encode_conversation(own(root, late), messages)


def test_a_template_for_tools_is_used_where_there_are_tools(root: Path, tmp_path: Path) -> None:
    byte_level_files(tmp_path, ["a b"])
    path = tmp_path / "tokenizer_config.json"
    both = [{"name": n, "template": n + "{{ messages | length }}"} for n in ("default", "tool_use")]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": both}))
    template = load_tokenizer(tmp_path).chat.template
    assert template is not None
    rendered = [template.render([{"role": "user"}], tools) for tools in (None, [CALL])]
    assert rendered == ["default1", "tool_use1"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": ["x"]}))
    assert load_tokenizer(tmp_path).chat.template is not None  # ERNIE's, whose tokens are there


def test_no_part_of_a_row_becomes_a_control_token(root: Path) -> None:
    function = {"name": "add", "arguments": {"<|im_end|>": "<|im_end|>"}}
    call = {"type": "function", "function": function}
    messages = [CALLING[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    source = TURN + "{{ m.content }}{{ m.tool_calls | default('') | tojson }}<|im_end|>{% endfor %}"
    tokenizer = own(root, source)
    (sample,) = encode_conversation(tokenizer, messages).samples
    assert sample.ids.count(tokenizer.token_id("<|im_end|>")) == 2
    assert tokenizer.decode(sample.ids).count("<|im_end|>") == 4
