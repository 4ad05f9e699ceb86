"""Serve exports with vLLM and `transformers serve`, and compare what they answer with our sampler.

    python -m tools.evidence.serving runs/tiny/export my-model ...

It prints a table as Markdown: greedy tokens beside ours, and a chat, with its reasoning where the
format has one, and a tool call through the `openai` client. Both servers come from the environment
that ERNIE_TRAIN_VLLM names (tools/vllm.sh).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_train.core.errors import ErnieTrainError, UserError
from ernie_train.core.processes import free_ports
from ernie_train.data import Tokenizer, load_tokenizer, prompt_ids, read_records
from ernie_train.generate.engine import generate
from ernie_train.run.proof import own_logits
from ernie_train.weights import load_pretrained

DATA = Path("data/test")
SERVERS = ("vLLM", "transformers serve")
EACH = 2  # prompts of each of its files
MAX_TOKENS = 64
START_S = 900.0
PARSERS = [
    "--reasoning-parser", "ernie45", "--tool-call-parser", "ernie45", "--enable-auto-tool-choice",
]  # fmt: skip
# Nothing is fetched or reported; the first request compiles no sampler.
_ENVIRON = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Completions of a server: ids of each greedy one, and messages of the chats."""

    tokens: list[list[int]]
    chats: list[dict[str, Any]]


def prompts_of(tokenizer: Tokenizer) -> list[list[int]]:
    """Return token ids of questions of every task of the held-out rows."""
    rows = [read_records(path)[0] for path in sorted(DATA.glob("*.jsonl"))]
    texts = [row.messages[0]["content"] for part in rows for row in part[:EACH]]
    if tokenizer.chat.template is None:
        return [tokenizer.encode(text) for text in texts]
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}], None) for text in texts]


def chats_of(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the chat requests by name; those with tools where the template shows them."""
    question = read_records(DATA / "math.jsonl")[0][0].messages[0]["content"]
    asked: dict[str, dict[str, Any]] = {
        "chat": {"messages": [{"role": "user", "content": question}]}
    }
    template = tokenizer.chat.template
    if template is not None and "tools" in template.source:
        row = next(record for record in read_records(DATA / "tools.jsonl")[0] if record.tools)
        asked["tool call"] = {"messages": row.messages[:1], "tools": row.tools}
    return asked


@contextmanager
def server(command: Sequence[str], health: str, log: Path) -> Iterator[None]:
    """Run a server within this context, from when it answers at the URL `health`."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **_ENVIRON},
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait(process, health, log)
            yield
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return
        time.sleep(1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if "Error: " in line]
    lines = [line for line in lines if "See root cause above" not in line] or lines
    raise UserError(f"the server did not start: {(lines or ['no message'])[-1].strip()}")


def ask(python: str, url: str, name: str, prompts: Any, chats: Any) -> Answers:
    """Send the requests through the `openai` client of another interpreter."""
    script = Path(__file__).with_name("openai_requests.py")
    request = {
        "url": url, "model": name, "prompts": prompts, "chats": list(chats),
        "max_tokens": MAX_TOKENS,
    }  # fmt: skip
    done = subprocess.run(
        [python, str(script)], input=json.dumps(request), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{url}: {done.stderr.strip().splitlines()[-1]}")
    return Answers(**json.loads(done.stdout.splitlines()[-1]))


def with_vllm(export: Path, python: str, dtype: str, log: Path) -> Answers:
    """Serve an export with vLLM and its ERNIE parsers, and ask it."""
    tokenizer = load_tokenizer(export)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model",
        "--dtype", dtype, "--enforce-eager", "--max-model-len", "1024",
    ]  # fmt: skip
    template = tokenizer.chat.template
    if template is not None and "<think>" in template.source:  # others have no such tokens
        command += PARSERS
    with server(command, f"{url}/health", log):
        return ask(python, url, "model", prompts_of(tokenizer), chats_of(tokenizer).values())


def with_transformers(export: Path, python: str, log: Path) -> Answers:
    """Serve an export with `transformers serve`, which returns no token ids, and ask it."""
    (port,) = free_ports(1)
    url, program = f"http://127.0.0.1:{port}", Path(python).with_name("transformers")
    command = [
        python, str(program), "serve", str(export), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip
    with server(command, f"{url}/health", log):
        return ask(python, url, str(export), [], chats_of(load_tokenizer(export)).values())


def compare_tokens(export: Path, found: list[list[int]]) -> str:
    """Return how greedy tokens differ from ours, and what our logits say where they first do."""
    model, tokenizer = load_pretrained(export), load_tokenizer(export)
    prompts = prompts_of(tokenizer)
    ours = generate(
        model, prompts, max_new_tokens=MAX_TOKENS, eos_token_id=tokenizer.stop_token_ids
    )
    gaps, same = [], 0
    for prompt, own, theirs in zip(prompts, (c.ids for c in ours), found, strict=True):
        differing = [at for at, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b]
        place = differing[0] if differing else min(len(own), len(theirs))
        same += place
        if differing:
            (logits,) = own_logits(model, [[*prompt, *own[:place]]])
            gaps.append(float(logits[-1, own[place]] - logits[-1, theirs[place]]))
        elif len(own) != len(theirs):
            gaps.append(float("inf"))  # one of them ended where the other went on
    if not gaps:
        return f"equal: {same} tokens of {len(prompts)} prompts"
    shown = ", ".join(f"{gap:.1e}" for gap in gaps)
    return f"{len(gaps)} of {len(prompts)} prompts differ, where our logits prefer ours by {shown}"


def outcome(message: dict[str, Any]) -> str:
    """Return what a chat's message has: reasoning, answer, tool call, or an error."""
    if "error" in message:
        return str(message["error"])
    parts = []
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        parts.append(f"reasoning {_short(reasoning)}")
    for call in message.get("tool_calls") or []:
        parts.append(f"calls {_short(call['function']['name'] + call['function']['arguments'])}")
    if (message.get("content") or "").strip():
        parts.append(f"answer {_short(message['content'])}")
    return "; ".join(parts) or "an empty message"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{line[:60]}{'...' if len(line) > 60 else ''}`"


def main() -> None:
    """Serve each export and print the tables; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exports", nargs="+", type=Path)
    parser.add_argument("--dtype", default="float32", help="what vLLM computes in")
    parser.add_argument("--server", choices=SERVERS, help="this one alone")
    options = parser.parse_args()
    home = os.environ.get("ERNIE_TRAIN_VLLM")
    if home is None:
        raise UserError('ERNIE_TRAIN_VLLM names no environment: eval "$(tools/vllm.sh)"')
    python = str(Path(home) / "bin" / "python")
    servers = [options.server] if options.server else list(SERVERS)
    print("| export | server | request | answer |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="ernie_train_serving_") as folder:
        for export, name in itertools.product(options.exports, servers):
            log = Path(folder) / f"{export.name}-{name.split()[0]}.log"
            for request, answer in rows_of(export, name, python, options.dtype, log):
                print(f"| {export.name} | {name} | {request} | {answer} |", flush=True)


def rows_of(
    export: Path, server_name: str, python: str, dtype: str, log: Path
) -> Iterator[tuple[str, str]]:
    """Yield (request, answer) of an export and a server; why it did not start, if it did not."""
    try:
        if server_name == "vLLM":
            found = with_vllm(export, python, dtype, log)
            yield "greedy tokens", compare_tokens(export, found.tokens)
        else:
            found = with_transformers(export, python, log)
    except UserError as error:
        yield "none", str(error).replace("|", "\\|")
        return
    names = chats_of(load_tokenizer(export))
    yield from zip(names, map(outcome, found.chats), strict=True)


if __name__ == "__main__":
    try:
        main()
    except ErnieTrainError as error:
        sys.exit(f"error: {error}")
