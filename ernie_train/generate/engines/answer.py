"""A request to `/v1/completions` for one sequence, and the check of what comes back.

What an engine returns is learnt from, so an answer that differs from what was asked for in any way
is refused: the log-probabilities of a policy update must be those of its tokens.

Shapes: T completion tokens, P prompt tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import base64
import io
import math
import sys
import tokenize
from dataclasses import dataclass
from reprlib import repr as short_repr  # an answer may be of any length
from typing import Any

import numpy as np

from ernie_train.generate.engine import Completion
from ernie_train.generate.prompt_experts import expert_dtype
from ernie_train.generate.sampler import SamplingConfig

_ROUNDING = 1e-3  # log-probabilities in bfloat16 may come out a little above 0
_MAX_FLOAT = sys.float_info.max
# What numpy raises on a header that is none, beside `ValueError`.
_NO_HEADER = (TypeError, KeyError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)


class WrongAnswer(Exception):
    """Reports an answer that is not one to the request; the text says how."""


@dataclass(frozen=True)
class Request:
    """Asks for one sequence, and knows what its answer must be like.

    model: the name that the server must answer under; limit: the most tokens; stop_token_ids: what
    ends the completion; vocab_size: of the policy; experts: (L, K) of a policy with `num_experts`.
    """

    model: str
    prompt: list[int]
    settings: SamplingConfig
    limit: int
    seed: int
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    experts: tuple[int, int] | None = None
    num_experts: int = 0

    def body(self) -> dict[str, Any]:
        """Return the JSON body: the fields of OpenAI's API, vLLM's and FastDeploy's.

        Both servers ignore fields that they do not know. `temp_scaled_logprobs` is FastDeploy's
        request for log-probabilities at the sampling temperature; vLLM is told when it starts.
        """
        return {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.limit,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "top_k": self.settings.top_k or -1,
            "seed": self.seed,
            "n": 1,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(self.stop_token_ids),
            "repetition_penalty": 1.0,
            "min_p": 0.0,
            "skip_special_tokens": False,
            "temp_scaled_logprobs": self.settings.temperature not in (0, 1),
        }

    def read(self, answer: Any) -> Completion:
        """Return the completion in `answer`; raise `WrongAnswer` unless it is one of this request.

        The reason "stop" must come with a stop token as the last, "length" with `limit` tokens.
        """
        if not isinstance(answer, dict):
            raise WrongAnswer("no JSON object")
        if (model := answer.get("model")) != self.model:
            raise WrongAnswer(f"it is of the model {short_repr(model)}, not {self.model!r}")
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise WrongAnswer("it does not hold exactly one choice")
        choice = choices[0]
        if choice.get("prompt_token_ids") != self.prompt:
            raise WrongAnswer("prompt_token_ids are not the ids that were sent")
        ids = self._ids(choice)
        found = Completion(ids, self._logprobs(choice, len(ids)), self._is_finished(choice, ids))
        if (experts := self._experts(choice, len(ids))) is not None:
            found.prompt_expert_ids, found.expert_ids = experts
        return found

    def _ids(self, choice: dict[str, Any]) -> list[int]:
        # FastDeploy has the second name.
        ids = choice.get("token_ids") or choice.get("completion_token_ids")
        if not isinstance(ids, list) or not ids:
            raise WrongAnswer("no token ids: it must take return_token_ids")
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            odd = next(i for i in ids if type(i) is not int or not 0 <= i < self.vocab_size)
            raise WrongAnswer(f"{short_repr(odd)} is no id of the {self.vocab_size} tokens")
        if len(ids) > self.limit:
            raise WrongAnswer(f"{len(ids)} tokens, though at most {self.limit} were asked for")
        return ids

    def _logprobs(self, choice: dict[str, Any], count: int) -> list[float]:
        given = choice.get("logprobs")
        values = given.get("token_logprobs") if isinstance(given, dict) else None
        if not isinstance(values, list):
            raise WrongAnswer("no log-probabilities (FastDeploy: start it with --enable-logprob)")
        if len(values) != count:
            raise WrongAnswer(f"{len(values)} log-probabilities for {count} tokens")
        for value in values:
            # Not by isfinite, which fails on integers that no float can hold; NaN fails too.
            if type(value) not in (float, int) or not -_MAX_FLOAT <= value <= _ROUNDING:
                raise WrongAnswer(f"{short_repr(value)} is no log-probability")
        return [min(0.0, float(value)) for value in values]

    def _is_finished(self, choice: dict[str, Any], ids: list[int]) -> bool:
        reason, stopped = choice.get("finish_reason"), ids[-1] in self.stop_token_ids
        if early := [i for i in ids[:-1] if i in self.stop_token_ids]:
            raise WrongAnswer(f"it goes on after the stop token {early[0]}")
        if reason == "stop" and not stopped:
            raise WrongAnswer(f"finish_reason is stop, though {ids[-1]} is no stop token")
        if reason == "length" and len(ids) != self.limit:
            raise WrongAnswer(f"finish_reason is length after {len(ids)} of {self.limit} tokens")
        if reason not in ("stop", "length"):
            raise WrongAnswer(f"finish_reason is {short_repr(reason)}")
        return stopped

    def _experts(self, choice: dict[str, Any], count: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the experts [P-1,L,K] of the prompt and [T,L,K] of the completion, if they came.

        vLLM sends them as the bytes of a numpy file in base64.
        """
        given = choice.get("routed_experts")
        if given is None or self.experts is None:
            return None
        array = _read_integers(given, (len(self.prompt) + count - 1, *self.experts))
        wrong = array[(array < 0) | (array >= self.num_experts)]
        if wrong.size:
            raise WrongAnswer(
                f"routed_experts: expert {wrong[0]} is none of the {self.num_experts}"
            )
        # Two copies, as one may be dropped: equal prompts share theirs.
        before, dtype = len(self.prompt) - 1, expert_dtype(self.num_experts)
        return array[:before].astype(dtype), array[before:].astype(dtype)


def _read_integers(given: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array in a numpy file in base64; its header is compared before its data is read.

    Raises `WrongAnswer` where it is anything but integers of this shape.
    """
    try:
        data = base64.b64decode(given, validate=True)
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        found, is_fortran, dtype = read_header(stream)  # type: ignore[no-untyped-call]
    except (ValueError, *_NO_HEADER) as error:
        raise WrongAnswer(f"routed_experts cannot be read: {short_repr(str(error))}") from None
    if found != shape or dtype.kind not in "iu":
        raise WrongAnswer(
            f"routed_experts are {short_repr(str(dtype))} {short_repr(found)}, not integers {shape}"
        )
    size, expected = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
    if size != expected:
        raise WrongAnswer(f"routed_experts have {size} bytes instead of {expected}")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if is_fortran else "C")
