"""An engine that is a server: the main rank talks to it, and all ranks get the completions."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ernie_train.core import consensus, devices, process_group
from ernie_train.core.errors import EngineError, FailedElsewhere, Interrupted, StorageError
from ernie_train.data import Tokenizer
from ernie_train.generate.engine import Completion, check_request, moe_shape
from ernie_train.generate.engines.answer import Request
from ernie_train.generate.engines.config import EngineConfig
from ernie_train.generate.engines.protocol import require_loaded
from ernie_train.generate.engines.servers import Server, Weights
from ernie_train.generate.sampler import SamplingConfig
from ernie_train.generate.sharded import generate_sharded, share_prompt_experts
from ernie_train.io.files import read_manifest, remove_directory
from ernie_train.losses import logprob_gap
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.model.dtypes import dtype_name
from ernie_train.weights.saving import save_pretrained

# So many that a token or two, which a router near a tie sends elsewhere, move the mean little.
_PROBES, _PROBE_PROMPT, _PROBE_TOKENS = 16, 8, 16


@dataclass(frozen=True)
class _Loaded:
    """Holds what the server samples with."""

    model: Ernie4_5_MoeForCausalLM
    version: int
    weights: Weights


@dataclass
class ServedEngine:
    """Samples with vLLM or FastDeploy; each version of the weights reaches it as a directory.

    Not bit-exact: what a server batches together, and so the last bits of its logits, depends on
    when requests arrive. Rollouts that are dumped replay to the bit.
    """

    config: EngineConfig
    server: Server
    tokenizer: Tokenizer
    directory: Path | None  # of this run's weights alone; None: the server keeps its own
    largest_gap: float  # `logprob_gap`, as in the learner's check
    _run: str = field(default_factory=lambda: secrets.token_hex(4), init=False)
    _loaded: _Loaded | None = field(default=None, init=False, repr=False)

    def load_weights(self, model: Ernie4_5_MoeForCausalLM, version: int) -> None:
        """Write `model` as a directory of its own and have the server sample with it."""
        if self._loaded is not None and version == self._loaded.version:
            return
        self._loaded = None
        dtype = self.config.dtype or dtype_name(model.model.embed_tokens.weight)
        directory = None
        if self.directory is not None:
            directory = self.directory / f"version_{version:06d}"
            self._write(model, directory, dtype)

        vocab_size = model.config.vocab_size
        expected = generate_sharded(
            model,
            _probes(vocab_size),
            max_new_tokens=_PROBE_TOKENS,
            eos_token_id=self.tokenizer.stop_token_ids,
            stop_requested=self.server.stop_requested,
        )
        if self.config.sleep:
            devices.release_cached_memory()
            process_group.barrier()  # the server takes memory on the GPUs of all ranks

        def load() -> Weights:
            # The name is of this start alone: a server may hold what another start called so.
            name, digest = f"{self._run}-{version}", _digest(directory) if directory else ""
            weights = Weights(name, directory or Path(), digest, dtype)
            self.server.load(weights)
            gap = self._gap(expected, vocab_size)
            if not gap <= self.largest_gap and self.server.restart(weights):
                gap = self._gap(expected, vocab_size)
            if not gap <= self.largest_gap:
                raise EngineError(self._complaint(gap, directory))
            self._remove_versions(but=directory)
            return weights

        self._loaded = _Loaded(model, version, consensus.run_on_main(load))

    def _complaint(self, gap: float, directory: Path | None) -> str:
        url, most = self.server.endpoint.url, f"{self.largest_gap:g}"
        if directory is None:
            return (
                f"the engine at {url} serves another model, or computes in a narrower dtype: its "
                f"log-probabilities differ from the model's by {gap:.2g} on average, more than "
                f"{most}"
            )
        return (
            f"the engine at {url} was given {directory}, but its log-probabilities differ from the "
            f"model's by {gap:.2g} on average, more than {most}, of rollout.max_logprob_mismatch: "
            "it computes with other weights, or in a narrower dtype"
        )

    def _write(self, model: Ernie4_5_MoeForCausalLM, directory: Path, dtype: str) -> None:
        """Write the weights; a full disk is an `EngineError` on all ranks, which can save then."""
        with consensus.fail_together(), suppress(FailedElsewhere):
            try:
                save_pretrained(model, directory, self.tokenizer, dtype=dtype)
            except StorageError as error:
                raise EngineError(f"the engine cannot be given weights: {error}") from error

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingConfig,
        *,
        sequence_ids: Sequence[int] | None = None,
        limits: Sequence[int] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> list[Completion]:
        """Return the server's completions, each checked, all of the weights that were loaded."""
        max_tokens = check_request(prompts, settings, limits).tolist()
        loaded = require_loaded(self._loaded)
        if not prompts:
            return []
        numbers = range(len(prompts)) if sequence_ids is None else sequence_ids
        config, experts = loaded.model.config, moe_shape(loaded.model)
        stops = tuple(self.tokenizer.stop_token_ids)

        def ask() -> list[Completion]:
            requests = [
                Request(
                    self.server.model, list(prompt), settings, limit,
                    _seed_of(settings.seed, number), stops,
                    config.vocab_size, experts, config.moe_num_experts,
                )
                for prompt, number, limit in zip(prompts, numbers, max_tokens, strict=True)
            ]  # fmt: skip
            self.server.require_version(loaded.weights)
            found = self.server.endpoint.complete(
                requests, timeout_s=self.config.timeout_s, stop_requested=stop_requested
            )
            self.server.require_version(loaded.weights)
            share_prompt_experts(prompts, found)
            return found

        found = consensus.run_on_main(ask)
        if process_group.any_rank(stop_requested()):
            raise Interrupted("stopped on a signal while generating")
        return found

    def sleep(self) -> None:
        """Have the server give its GPU memory back until the next `load_weights`, if it is set."""
        if not self.config.sleep or self._loaded is None:
            return
        self._loaded = None
        consensus.run_on_main(self.server.sleep)

    def close(self) -> None:
        """End the server, if it was started here, and delete the weights that it was given."""
        if process_group.is_main():
            self.server.close()
            self._remove_versions()
            if self.directory is not None:
                with suppress(OSError):  # there is more in the stage's own, such as the log
                    self.directory.rmdir()

    def _gap(self, expected: Sequence[Completion], vocab_size: int) -> float:
        """Return the `logprob_gap` of greedy log-probabilities from the expected ones.

        After the first token that differs the contexts do too; at it, the two best are compared.
        """
        greedy, stops = SamplingConfig(_PROBE_TOKENS), tuple(self.tokenizer.stop_token_ids)
        found = self.server.endpoint.complete(
            [
                Request(self.server.model, prompt, greedy, _PROBE_TOKENS, 0, stops, vocab_size)
                for prompt in _probes(vocab_size)
            ],
            timeout_s=self.config.start_timeout_s,
            stop_requested=self.server.stop_requested,
        )
        gaps: list[float] = []
        for ours, theirs in zip(expected, found, strict=True):
            same = [a == b for a, b in zip(ours.ids, theirs.ids, strict=False)]
            count = same.index(False) + 1 if False in same else len(same)
            pairs = zip(ours.logprobs[:count], theirs.logprobs[:count], strict=True)
            gaps += [a - b for a, b in pairs]
        return logprob_gap(np.array(gaps))

    def _remove_versions(self, but: Path | None = None) -> None:
        """Delete the weights on the disk, those too that this run left when it was killed."""
        for directory in self.directory.glob("version_*") if self.directory else ():
            if directory != but:
                remove_directory(directory)


def _probes(vocab_size: int) -> list[list[int]]:
    """Return prompts of random tokens, on which any change of the weights shows."""
    random = np.random.default_rng(0)
    return random.integers(0, vocab_size, (_PROBES, _PROBE_PROMPT)).tolist()


def _digest(directory: Path) -> str:
    """Return a hash of the tensors of a directory: their files' hashes are in its manifest."""
    files = read_manifest(directory)["files"]
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def _seed_of(seed: int, sequence_id: int) -> int:
    """Return a seed of 31 bits, which every server takes, for a sequence."""
    text = hashlib.sha256(f"{seed}/{sequence_id}".encode()).digest()
    return int.from_bytes(text[:4], "big") >> 1
