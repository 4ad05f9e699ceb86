"""Render conversations with a tokenizer's own template: OUT.json, then DIRECTORY CASES.json pairs.

The completions under "parse" of a first case are parsed by the tokenizer's response_template.
A case is {"messages": [...], "tools": [...] or null, "add_generation_prompt": bool}.
"""

import json
import sys

from transformers import AutoTokenizer


def render(directory, cases_path):
    with open(cases_path, encoding="utf-8") as file:
        cases = json.load(file)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [
        tokenizer.apply_chat_template(
            case["messages"],
            tools=case["tools"],
            add_generation_prompt=case["add_generation_prompt"],
            tokenize=False,
        )
        for case in cases
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    parsed = []
    if getattr(tokenizer, "response_template", None):  # since transformers 5
        prompt = tokenizer.apply_chat_template(
            cases[0]["messages"][:1], add_generation_prompt=True, tokenize=False
        )
        parsed = [tokenizer.parse_response(c, prefix=prompt) for c in cases[0].get("parse", [])]
    return {"text": texts, "ids": ids, "parsed": parsed}


out_path, *pairs = sys.argv[1:]
with open(out_path, "w", encoding="utf-8") as file:
    json.dump([render(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)], file)
