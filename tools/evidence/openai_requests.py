"""Ask an OpenAI-compatible server; a script for an interpreter with the package `openai`.

Reads {"url", "model", "prompts": token ids, "chats": keyword arguments of chat completions,
"max_tokens"} as JSON from standard input; writes {"tokens": ids of each greedy completion,
"chats": messages as dictionaries, or {"error"}} as the last line of standard output.
"""

import json
import sys


def main() -> None:
    """Send the requests, one after another; see the module."""
    from openai import APIError, OpenAI  # type: ignore[import-not-found]

    asked = json.load(sys.stdin)
    client = OpenAI(base_url=asked["url"] + "/v1", api_key="none", timeout=600, max_retries=0)
    tokens, chats = [], []
    for prompt in asked["prompts"]:
        done = client.completions.create(
            model=asked["model"], prompt=prompt, max_tokens=asked["max_tokens"], temperature=0,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        tokens.append(done.choices[0].token_ids)
    for chat in asked["chats"]:
        try:
            done = client.chat.completions.create(
                model=asked["model"], temperature=0, max_tokens=asked["max_tokens"], **chat
            )
        except APIError as error:
            chats.append({"error": f"{type(error).__name__}: {error}"})
        else:
            chats.append(done.choices[0].message.model_dump(exclude_none=True))
    print(json.dumps({"tokens": tokens, "chats": chats}))


if __name__ == "__main__":
    main()
