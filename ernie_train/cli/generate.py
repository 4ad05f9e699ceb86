"""The verb `generate`: complete a prompt while it is read, or a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ernie_train.cli.model import best_checkpoint, engine_at, open_model
from ernie_train.cli.turn_view import TokenText
from ernie_train.core.errors import DataError, Interrupted, UserError
from ernie_train.core.signals import StopFlag
from ernie_train.core.terminal import printable, progress_bar
from ernie_train.data import Columns, Record, Tokenizer, find_files, read_records
from ernie_train.eval.prompts import completion_text, encode_problems, encode_prompt, user_prompt
from ernie_train.generate.engine import Completion, generate
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.io.files import write_jsonl
from ernie_train.io.outputs import check_output_file

BATCH_SIZE, SERVER_BATCH_SIZE = 64, 512
BAD_ROWS = 0.01
ROW_KEYS = ("prompt", "completion", "finished", "tokens")  # of each row of the output


@dataclass(frozen=True)
class GenerateCommand:
    """Arguments of the verb `generate`; either `prompt` or `prompts` is given."""

    model: Path
    best: bool
    prompt: str | None
    prompts: Path | None
    columns: Columns | None
    max_bad_fraction: float | None  # of `prompts`; BAD_ROWS unless given
    system: str | None
    raw: bool
    sampling: SamplingConfig
    batch_size: int | None  # for `prompts`; BATCH_SIZE or SERVER_BATCH_SIZE unless given
    engine: str | None  # URL of a server that samples
    out: Path | None
    force: bool

    def run(self, progress: Console) -> None:
        """Print completions, as they are sampled, or write them to `out`.

        Raises `UserError` for prompts that leave no room, `Interrupted` on a signal.
        """
        if (self.prompt is None) == (self.prompts is None):
            raise UserError("give either --prompt TEXT or --prompts FILE")
        if self.system is not None and self.raw:
            raise UserError("--system has no place in --raw, which has no chat format")
        self._refuse_idle_options()
        if self.out is not None:
            prompts_read = find_files(self.prompts).files if self.prompts is not None else []
            inputs = [*prompts_read, self.model]
            check_output_file(self.out, ROW_KEYS, inputs=inputs, force=self.force)
        records = self._records()
        model, tokenizer = open_model(best_checkpoint(self.model) if self.best else self.model)
        prompts = self._encode(tokenizer, records, model.config.max_position_embeddings)
        with (
            StopFlag("stopping; nothing more is written") as stop,
            engine_at(self.engine, model, tokenizer, lambda: stop.requested) as engine,
        ):
            sample: Callable[..., list[Completion]] = partial(
                generate,
                model,
                **asdict(self.sampling),
                eos_token_id=tokenizer.stop_token_ids,
                stop_requested=lambda: stop.requested,
            )
            if engine is not None:
                sample = partial(
                    engine.sample, settings=self.sampling, stop_requested=lambda: stop.requested
                )
            if self.prompt is not None and self.out is None:
                _stream(sample, tokenizer, prompts)
                return
            rows = self._rows(sample, tokenizer, records, prompts)
            if self.out is None:
                for row in rows:
                    print(json.dumps(row), flush=True)  # ASCII alone: harmless, and JSON
                return
            with progress_bar(progress, "completions", len(prompts)) as update:
                _write(self.out, rows, len(prompts), update, progress)

    def _refuse_idle_options(self) -> None:
        sampling = self.sampling
        if self.prompts is None and self.columns is not None:
            raise UserError("--columns names keys of the rows of --prompts: leave it out")
        if self.prompts is None and self.max_bad_fraction is not None:
            raise UserError("--max-bad-fraction is that of --prompts: leave it out")
        if self.prompts is None and self.batch_size is not None:
            raise UserError("--batch-size is that of --prompts: leave it out")
        if self.prompts is None and self.engine is not None:
            raise UserError(
                "--engine answers --prompts FILE: a --prompt is shown while our own sampler writes"
            )
        if self.out is None and self.force:
            raise UserError("--force replaces what lies at --out: give that, or leave it out")
        if not sampling.temperature and (sampling.top_p < 1 or sampling.top_k):
            option = "--top-k" if sampling.top_k else "--top-p"
            raise UserError(f"{option} has no effect at --temperature 0, which is greedy")

    def _records(self) -> list[Record]:
        """Return what is asked, without answers that rows may hold."""
        if self.prompts is None:
            records = [Record("prompt", [{"role": "user", "content": self.prompt}])]
        else:
            most = BAD_ROWS if self.max_bad_fraction is None else self.max_bad_fraction
            records, read = read_records(
                self.prompts, max_bad_fraction=most, columns=self.columns, prompts=True
            )
            read.warn()
        if wrong := [record.source for record in records if not record.prompt_messages]:
            raise DataError(f"{wrong[0]}: the row asks nothing: it has no messages or prompt")
        if self.system is None:
            return records
        system = {"role": "system", "content": self.system}
        kept = [[m for m in record.messages if m["role"] != "system"] for record in records]
        return [
            replace(record, messages=[system, *messages])
            for record, messages in zip(records, kept, strict=True)
        ]

    def _encode(
        self, tokenizer: Tokenizer, records: Sequence[Record], positions: int
    ) -> list[list[int]]:
        """Return the ids of all prompts; raises `UserError` for those that leave no room."""
        if self.prompts is not None and not self.raw:
            return encode_problems(tokenizer, records, positions - self.sampling.max_new_tokens)
        found = []
        for record in records:
            asked = tokenizer.encode(user_prompt(record)) if self.raw else None
            ids = encode_prompt(tokenizer, record) if asked is None else asked
            self._check_room(ids, positions, record.source or "the prompt")
            found.append(ids)
        return found

    def _check_room(self, ids: Sequence[int], positions: int, where: str) -> None:
        if not ids:
            raise UserError(f"{where}: with --raw it must not be empty")
        most, given = positions - len(ids), self.sampling.max_new_tokens
        if given > most:
            raise UserError(
                f"{where} has {len(ids)} tokens and the model max_position_embeddings={positions}: "
                f"--max-new-tokens must be at most {max(0, most)}, got {given}"
            )

    def _rows(
        self,
        sample: Callable[..., list[Completion]],
        tokenizer: Tokenizer,
        records: Sequence[Record],
        prompts: Sequence[list[int]],
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each prompt, in order, batch after batch."""
        size = self.batch_size or (SERVER_BATCH_SIZE if self.engine else BATCH_SIZE)
        for start in range(0, len(prompts), size):
            batch = range(start, min(start + size, len(prompts)))
            found = sample([prompts[at] for at in batch], sequence_ids=batch)
            for at, completion in zip(batch, found, strict=True):
                record = records[at]
                named = {"id": record.fields["id"]} if "id" in record.fields else {}
                yield named | {
                    "prompt": user_prompt(record),
                    "completion": completion_text(tokenizer, completion),
                    "finished": completion.finished,
                    "tokens": len(completion.ids),
                }


def _stream(
    sample: Callable[..., list[Completion]], tokenizer: Tokenizer, prompts: Sequence[list[int]]
) -> None:
    """Print the one completion of one prompt as it is sampled."""
    text = TokenText(tokenizer)

    def show(_: int, token: int) -> None:
        if token not in tokenizer.stop_token_ids:
            print(printable(text.add(token)), end="", flush=True)

    sample(prompts, on_token=show)
    print(printable(text.end()))


def _write(
    out: Path,
    rows: Iterator[dict[str, Any]],
    total: int,
    update: Callable[[int], None],
    progress: Console,
) -> None:
    """Write rows; when something ends them, which is raised then, those that are finished."""
    written = 0
    ended: Exception | None = None

    def finished() -> Iterator[dict[str, Any]]:
        nonlocal written, ended
        try:
            for written, row in enumerate(rows, start=1):
                yield row
                update(written)
        except Exception as error:
            if not written:
                raise  # an earlier output stays
            ended = error

    write_jsonl(out, finished())
    if ended is None:
        return
    kept = f"{out} has the first {written} of {total} completions"
    if isinstance(ended, Interrupted):
        raise Interrupted(f"stopped; {kept}")
    progress.print(kept, markup=False, soft_wrap=True)
    raise ended
