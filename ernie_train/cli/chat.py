"""The verb `chat`: talk to a model, see it think, let it call tools, keep a transcript."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ernie_train.cli.model import best_checkpoint, open_model
from ernie_train.cli.score import read_rows
from ernie_train.cli.turn_view import STYLES, TAG, THINKING, TurnView
from ernie_train.core.errors import ErnieTrainError, Interrupted, UserError
from ernie_train.core.signals import StopFlag
from ernie_train.core.terminal import Terminal, message_text, printable
from ernie_train.data import Record, Tokenizer, prompt_ids, require_chat_template
from ernie_train.data.completion_format import parse_completion
from ernie_train.environments import (
    EnvironmentConfig,
    Episode,
    Toolbox,
    ToolEnvironment,
    open_toolbox,
)
from ernie_train.generate.engine import Completion, generate
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.io.files import write_jsonl
from ernie_train.io.outputs import check_output_file, lock_directory
from ernie_train.io.run_dir import ENVIRONMENT
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.run.finalize import EXPORT
from ernie_train.run.recipe import recorded_recipe

Message = dict[str, Any]

TRANSCRIPT_KEYS = ("messages", "model", "sampling")  # of each row; rows of `messages` train again
_NEXT: Message = {"role": "user", "content": "?"}
_HELP = """\
/system TEXT    begin anew under this system prompt; without TEXT under none
/clear          begin anew
/retry          drop the last answer and ask again
/thinking       show the reasoning of the last answer
/fold           fold reasoning into one line, or unfold it again
/save FILE      write the transcript to FILE from now on
/exit           end (as does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next one."""


@dataclass(frozen=True)
class ChatCommand:
    """Arguments of the verb `chat`. `environment` None: the tools of the run's recipe, if any."""

    model: Path
    best: bool
    system: str
    environment: EnvironmentConfig | None
    use_tools: bool
    sampling: SamplingConfig
    folded: bool
    transcript: Path | None
    force: bool

    def run(self, console: Console, read: Callable[[str], str]) -> None:
        """Answer the lines of `read`, a function such as `input`, until it raises `EOFError`.

        A file or a pipe as `console` gets what the model says alone, stderr the rest.
        """
        notes = console if console.is_terminal else Terminal(stderr=True)
        path = best_checkpoint(self.model) if self.best else self.model
        model, tokenizer = open_model(path)
        require_chat_template(tokenizer)
        environment = self.environment
        if environment is None and self.use_tools:
            environment = recipe_environment(self.model)
        with open_toolbox(environment, tokenizer, Path.cwd()) as toolbox:
            chat = Chat(model, tokenizer, toolbox, self.sampling, console, str(path), notes)
            chat.folded = self.folded
            if self.transcript is not None:
                chat.keep_transcript(self.transcript, force=self.force)
            chat.begin(self.system)
            names = ", ".join(tool["function"]["name"] for tool in chat.tools or ())
            notes.print(f"{path}; tools: {names or 'none'}; /help lists commands", style="dim")
            chat.run(read)


def recipe_environment(path: Path) -> EnvironmentConfig | None:
    """Return the tools of the last stage that has some in a run's recipe, else its evaluation's.

    `path` is the run, a stage of it, a checkpoint or the export; None for any other directory.
    """
    place = path.resolve()
    runs = (run for run in (place, *place.parents[:3]) if _is_in_run(place, run))
    recipe = next(filter(None, map(recorded_recipe, runs)), None)
    if recipe is None:
        return None
    sections = [recipe.evaluation, *recipe.stages]
    found = [getattr(section, "environment", None) for section in sections]
    return next(filter(None, reversed(found)), None)


def _is_in_run(place: Path, run: Path) -> bool:
    """Return whether `run` is a recorded run, not just a directory with a recipe, and holds it."""
    inside = place.relative_to(run).parts[:1]
    of_run = not inside or inside[0] == EXPORT or re.fullmatch(r"\d{2,}-.+", inside[0])
    return bool(of_run) and (run / ENVIRONMENT).is_file()


class Chat:
    """A conversation with a model: its history, its tools, and the transcript.

    Attributes:
        messages: the history, with which the next question is asked.
        tools: those that the model is shown, None without any.
        thinking: the reasoning of the last answer.
        folded: whether reasoning is shown as one line.
        transcript: where the conversations are written after each answer, None for nowhere.
        earlier: rows of this chat's conversations before the present one.
    """

    def __init__(
        self,
        model: Ernie4_5_MoeForCausalLM,
        tokenizer: Tokenizer,
        toolbox: Toolbox | None,
        sampling: SamplingConfig,
        console: Console,
        name: str,
        notes: Console | None = None,
    ) -> None:
        """`console` shows what the model says; `notes` the rest, by default the same."""
        self.model, self.tokenizer, self.toolbox = model, tokenizer, toolbox
        self.sampling, self.console, self.name = sampling, console, name
        self.notes = notes or console
        self.messages: list[Message] = []
        self.tools: list[dict[str, Any]] | None = None
        self.thinking = ""
        self.folded = False
        self.transcript: Path | None = None
        self.earlier: list[dict[str, Any]] = []
        self._written: dict[Path, list[dict[str, Any]]] = {}  # rows of this chat in its files
        self._replaces = False  # the transcript's file, when it is next written
        self._turns = 0  # of the assistant; the random numbers of each are its own
        self._stop = StopFlag()
        self._environment: ToolEnvironment | None = None

    def begin(self, system: str) -> None:
        """Begin a conversation; tools forget what they kept for the one before."""
        self.earlier += self._rows()
        self.messages = [{"role": "system", "content": system}] if system else []
        if self.toolbox is not None:
            question = Record("prompt", [_NEXT])
            self._environment = ToolEnvironment(self.toolbox, lambda: self._stop.requested)
            self._environment.reset(question)
            self.tools = self.toolbox.offer(question).tools

    def run(self, read: Callable[[str], str]) -> None:
        """Answer what `read` gives until it ends or asks to; raises `Interrupted` on SIGTERM."""
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                text = _read_text(read)
                if text.startswith("/"):
                    name, _, rest = text.partition(" ")
                    if name == "/exit":
                        return
                    self._command(name, rest.strip())
                elif text:
                    self.ask(text)

    def ask(self, question: str) -> None:
        """Answer a question in as many turns as the model's calls need, and save the transcript.

        What no later prompt could show, such as reasoning without an answer, is left out of the
        history. Raises `Interrupted` on SIGTERM.
        """
        history = [*self.messages, {"role": "user", "content": question}]
        self.thinking = ""
        with StopFlag() as self._stop:
            try:
                self._answer(history)
                prompt_ids(self.tokenizer, [*history, _NEXT], self.tools)
                self.messages = history
            except Interrupted:
                self._say("(stopped, and left out of the history)")
            except ErnieTrainError as error:
                self._say(f"left out of the history: {message_text(str(error))}", "red")
        self._save()
        if self._stop.signal_name == "SIGTERM":
            raise Interrupted("stopped on a signal")

    def _answer(self, history: list[Message]) -> None:
        """Append the turns that answer the last question, and the results of their calls."""
        prompt, episode = prompt_ids(self.tokenizer, history, self.tools), Episode()
        room = self.model.config.max_position_embeddings - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and the model's "
                f"max_position_embeddings leave none for an answer; /clear begins anew"
            )
        for _ in range(self.toolbox.config.max_turns if self.toolbox else 1):
            ids = [*prompt, *episode.completion_ids]
            episode.add_turn(self._sample(ids, room - len(episode.completion_ids)), self.tokenizer)
            history.append(self._message(episode.text))
            if self.toolbox is None or self._environment is None or not episode.finished:
                return
            result = self._environment.step(episode.text)
            for message, failed in zip(result.messages, result.failed, strict=True):
                style = "red" if failed else "green"
                self._say(f"{message['name']}: {message['content']}\n", style)
            history += result.messages
            if result.done:
                return
            found = self.toolbox.result_ids(result.messages)
            if not episode.add_results(result, found, most=room):
                break
        self._say("(no further turn: the limit of turns or of the model's length is reached)")

    def _sample(self, prompt: list[int], room: int) -> Completion:
        """Sample a turn and show it as it comes; a stop cuts it off."""
        stops, ids = self.tokenizer.stop_token_ids, []
        opens = require_chat_template(self.tokenizer).opens_thinking
        view = TurnView(self.console, self.tokenizer, opens_thinking=opens, folded=self.folded)

        def show(_: int, token: int) -> None:
            ids.append(token)
            if token not in stops:
                view.add(token)

        began, self._turns = time.perf_counter(), self._turns + 1
        most = min(self.sampling.max_new_tokens, room)
        try:
            (completion,) = generate(
                self.model,
                [prompt],
                **asdict(replace(self.sampling, max_new_tokens=most)),
                eos_token_id=stops,
                sequence_ids=[self._turns],
                on_token=show,
                stop_requested=lambda: self._stop.requested,
            )
        except Interrupted:
            completion = Completion(ids, [0.0] * len(ids))
        view.end()
        self.thinking = "\n\n".join(filter(None, (self.thinking, view.thinking)))
        seconds = time.perf_counter() - began
        cut = "" if completion.finished else ", cut off"
        self._say(f"({len(ids)} tokens, {len(ids) / seconds:.1f} a second{cut})")
        return completion

    def _message(self, text: str) -> Message:
        """Return a turn as the history and rows of data have it."""
        template = require_chat_template(self.tokenizer)
        parsed = parse_completion(
            text, thinking=template.opens_thinking, tagged=template.has_response_tags
        )
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in parsed.tool_calls
            if call.arguments is not None
        ]
        broken = [call.raw for call in parsed.tool_calls if call.arguments is None]
        content = parsed.response or "\n".join([*parsed.stray, *broken])
        content = TAG.sub("", content).strip()  # of a block that was cut off
        message: Message = {"role": "assistant", "content": content}
        if parsed.thinking:
            message["reasoning_content"] = parsed.thinking
        return message | ({"tool_calls": calls} if calls else {})

    def _command(self, name: str, rest: str) -> None:
        if name == "/system":
            self.begin(rest)
        elif name == "/clear":
            self.begin(next((m["content"] for m in self.messages if m["role"] == "system"), ""))
        elif name == "/retry":
            self._retry()
        elif name == "/thinking":
            self._say(self.thinking or "(no reasoning)", STYLES[THINKING])
        elif name == "/fold":
            self.folded = not self.folded
            self._say(f"reasoning is {'folded' if self.folded else 'shown'}")
        elif name == "/save" and rest:
            self._save_as(Path(rest))
        elif name == "/help":
            self._say(_HELP)
        else:
            self._say(f"{name}: no such command; /help lists them", "red")

    def _retry(self) -> None:
        asked = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            self._say("nothing was asked yet", "red")
            return
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        self.ask(question)

    def _save_as(self, path: Path) -> None:
        try:
            self.keep_transcript(path)
            self._save()
            self._say(f"{path}: written after each answer from now on")
        except ErnieTrainError as error:
            self._say(message_text(str(error)), "red")

    def keep_transcript(self, path: Path, *, force: bool = False) -> None:
        """Write to `path` from now on, behind the conversations that it holds.

        Raises `UserError` for a file of anything else, which `force` replaces.
        """
        check_output_file(path, TRANSCRIPT_KEYS, force=force)
        self.transcript, self._replaces = path, force

    def _save(self) -> None:
        """Write this chat's rows behind those that its file has from elsewhere, read anew."""
        if self.transcript is not None:
            with lock_directory(self.transcript.resolve().parent):  # other chats may save to it
                self._save_to(self.transcript)

    def _save_to(self, path: Path) -> None:
        others: list[dict[str, Any]] = []
        if path.is_file() and path.stat().st_size and not self._replaces:
            others = read_rows(path)
            for row in self._written.get(path.resolve(), ()):
                if row in others:
                    others.remove(row)
        rows = [*self.earlier, *self._rows()]
        write_jsonl(path, [*others, *rows])
        self._written[path.resolve()], self._replaces = json.loads(json.dumps(rows)), False

    def _rows(self) -> list[dict[str, Any]]:
        """Return the row of this conversation, once a question was answered."""
        if not any(message["role"] == "assistant" for message in self.messages):
            return []
        tools = {"tools": self.tools} if self.tools else {}
        row = {"messages": self.messages, "model": self.name, "sampling": asdict(self.sampling)}
        return [row | tools]

    def _say(self, text: str, style: str = "dim") -> None:
        self.notes.print(Text(printable(text), style=style), soft_wrap=True, highlight=False)


def _read_text(read: Callable[[str], str]) -> str:
    try:
        text = read("> ")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + read("  ")
    except UnicodeDecodeError:
        raise UserError("what to ask must be UTF-8 text") from None
    return text.strip()


def line_reader() -> Callable[[str], str]:
    """Return `input`, with a history and keys for editing in a terminal, else without a prompt."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    with suppress(ImportError):
        import readline  # noqa: F401 - its import is what it takes

    return input
