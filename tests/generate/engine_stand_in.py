"""A stand-in for vLLM and FastDeploy: their paths and fields, over HTTP, in this process.

It samples with this toolkit's own model, read from the directory that it is told to load, or gives
made-up tokens where it has none. Tests replace the answer of a path to play a fault. The fields are
those that vLLM 0.32 was seen to send, and those in FastDeploy's source. As a script it plays
FastDeploy's command line: `python engine_stand_in.py --model DIRECTORY --port N ...`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

Answer = Callable[["StandIn", dict[str, Any]], Any]
BAD = object()  # an answer for which the connection is cut


class StandIn:
    """The server's state; `faults` maps a path to what answers in place of it."""

    def __init__(self, model: str = "policy", *, fastdeploy: bool = False) -> None:
        self.model, self.fastdeploy = model, fastdeploy
        self.faults: dict[str, Answer] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.counts: Counter[str] = Counter()
        self.calls: list[str] = []  # paths with their queries
        self.can_sleep, self.asleep = False, set[str]()  # what vLLM calls tags
        self.version, self.weights, self.policy = "default", "", None
        self.url = ""
        self._lock = threading.Lock()

    def load(self, directory: Path) -> None:
        from ernie_train.weights.hf import load_pretrained

        self.policy = load_pretrained(directory)
        files = sorted(directory.glob("*.safetensors"))
        self.weights = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        path, _, query = path.partition("?")
        with self._lock:
            self.counts[path] += 1
            self.requests.append((path, body))
            self.calls.append(f"{path}?{query}" if query else path)
        if path in self.faults:
            return self.faults[path](self, body)
        if path in ("/sleep", "/wake_up"):
            return self.turn(path, parse_qs(query))
        return self.usual(path, body)

    def turn(self, path: str, query: dict[str, list[str]]) -> Any:
        """Sleep at level 2, which keeps nothing, or take memory back for some tags."""
        if path == "/wake_up":
            self.asleep -= set(query["tags"])
            return {"status": "sleeping" if self.asleep else "awake"}
        if not self.can_sleep or query["level"] != ["2"]:
            return 500, {"error": "sleep mode is off"}
        self.asleep, self.policy, self.weights = {"weights", "kv_cache"}, None, "garbage"
        return {"status": "sleeping"}

    def usual(self, path: str, body: dict[str, Any]) -> Any:
        memory = {"/collective_rpc": {"weights"}, "/weight_checker": {"weights"},
                  "/v1/completions": {"weights", "kv_cache"}}  # fmt: skip
        if self.asleep & memory.get(path, set()):
            return 500, {"error": f"{path} while {self.asleep} sleep"}
        if path == "/health":
            return {}
        if path == "/v1/models":
            return {"data": [{"id": self.model}]}
        if path == "/v1/completions":
            return self.completion(body)
        if self.fastdeploy:
            return None
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return {"success": True}
        if path == "/weight_checker":
            return {"checksums": {"model.norm.weight": self.weights or "none"}}
        if path == "/collective_rpc":
            self.load(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        return {} if path in ("/pause", "/resume", "/reset_prefix_cache") else None

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, logprobs = self.sampled(body)
        stopped = ids[-1] in body["stop_token_ids"]
        choice = {
            "index": 0, "text": "", "prompt_token_ids": body["prompt"],
            "completion_token_ids" if self.fastdeploy else "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs, "tokens": [str(i) for i in ids]},
            "finish_reason": "stop" if stopped else "length",
        }  # fmt: skip
        return {"model": self.model, "choices": [choice]}

    def sampled(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        if self.policy is None:
            ids = [(body["seed"] + 7 * at) % 80 + 10 for at in range(body["max_tokens"])]
            return ids, [-0.5] * len(ids)
        from ernie_train.generate import generate

        with self._lock:  # a model is for one thread
            (found,) = generate(
                self.policy, [body["prompt"]], max_new_tokens=body["max_tokens"],
                temperature=body["temperature"], seed=body["seed"],
                eos_token_id=body["stop_token_ids"],
            )  # fmt: skip
        return found.ids, [float(x) for x in found.logprobs]


def _handler(state: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            self._respond(json.loads(self.rfile.read(length) or b"{}"))

        def _respond(self, body: dict[str, Any]) -> None:
            answer = state.answer(self.path, body)
            if answer is BAD:
                self.close_connection = True
                self.connection.close()
                return
            status, content, headers = 200, answer, {}
            if isinstance(answer, tuple):
                status, content, *more = answer
                headers = more[0] if more else {}
            elif answer is None:
                status, content = 404, {"detail": "Not Found"}
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            with contextlib.suppress(OSError):  # who asked may have given up
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None: ...

    return Handler


class _Server(ThreadingHTTPServer):
    request_queue_size = 1024  # of connections that open at once


@contextlib.contextmanager
def serving(state: StandIn, port: int = 0) -> Iterator[StandIn]:
    """Answer at `state.url` while the block runs."""
    server = _Server(("127.0.0.1", port), _handler(state))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve as FastDeploy would, until ended."""
    parser = argparse.ArgumentParser()
    for name in ("model", "port", "served-model-name"):
        parser.add_argument(f"--{name}", required=True)
    given, _ = parser.parse_known_args()
    state = StandIn(given.served_model_name, fastdeploy=True)
    state.load(Path(given.model))
    with serving(state, int(given.port)):
        threading.Event().wait()


if __name__ == "__main__":
    main()
