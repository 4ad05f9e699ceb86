"""Continuous batching. Referees: a script of lengths, and sampling one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest

from ernie_train.generate import engine as generate_engine
from ernie_train.generate.engine import generate
from ernie_train.generate.paddle_decoder import PaddleDecoder
from ernie_train.model.numpy_decoder import NumpyDecoder
from tests.small_models import make_model

STOP, GO_ON, VOCABULARY = 1, 2, 8
SETTINGS = {"max_new_tokens": 30, "temperature": 1.0, "seed": 11, "eos_token_id": [5, 6, 7]}


class ScriptedCache:
    """What a lane holds: its prompt, and how many tokens followed."""

    def __init__(self, batch):
        self.prompt = np.zeros(batch, np.int64)
        self.lengths = np.zeros(batch, np.int64)

    def copy(self, sources, targets, lengths):
        self.prompt[targets], self.lengths[targets] = self.prompt[sources], lengths

    def rewind(self, sequences):
        self.lengths[sequences] -= 1

    def select(self, keep):
        self.prompt, self.lengths = self.prompt[keep], self.lengths[keep]


class Scripted:
    """A decoder that ends completion after completion of a prompt [p,n] after n tokens."""

    on_gpu = False

    def __init__(self, model):
        self.passes, self.prefills, self.prefilled, self.lanes = 0, 0, [], []

    def new_cache(self, batch, slots):
        self.most = slots
        return ScriptedCache(batch)

    def prefill(self, prompts, cache, sequences, recorded=None):
        self.prefills += 1
        self.prefilled += [tuple(prompt) for prompt in prompts]
        cache.prompt[sequences] = [prompt[1] for prompt in prompts]
        cache.lengths[sequences] = [len(prompt) for prompt in prompts]
        return self._logits(cache.prompt[sequences], np.ones(len(prompts)))

    def __call__(self, tokens, cache):
        assert cache.lengths.max() < self.most
        self.passes += 1
        self.lanes.append(len(tokens))
        cache.lengths += 1
        return self._logits(cache.prompt, cache.lengths - 1)

    def _logits(self, wanted, sampled):
        logits = np.full((len(wanted), VOCABULARY), -50.0, np.float32)
        logits[np.arange(len(wanted)), np.where(sampled >= wanted, STOP, GO_ON)] = 0
        return logits, []


@pytest.fixture
def scripted(monkeypatch):
    """Samples prompts [p,n], each of which ends after n tokens; returns decoder and completions."""
    made = []

    def sample(prompts, lanes, **settings):
        def decoder(model):
            made.append(Scripted(model))
            return made[-1]

        monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
        monkeypatch.setattr(generate_engine, "PaddleDecoder", decoder)
        settings = {"max_new_tokens": 2000, "eos_token_id": STOP, **settings}
        found = generate(make_model(), prompts, batch_size=lanes, **settings)
        return made[-1], found

    return sample


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("group", [1, 4])
def test_passes_are_those_of_full_lanes(scripted, seed, group):
    """Batch after batch, the longest of each would add up to about twice as many."""
    lanes, rng = 16, np.random.default_rng(seed)
    lengths = rng.geometric(1 / 150, 64 // group) + 1
    prompts = [[10 + i, int(n)] for i, n in enumerate(lengths) for _ in range(group)]
    decoder, found = scripted(prompts, lanes)
    assert [len(completion.ids) for completion in found] == [prompt[1] for prompt in prompts]
    assert all(completion.finished for completion in found)
    assert len(decoder.prefilled) == len(set(decoder.prefilled)) == 64 // group
    order = sorted(range(64), key=lambda i: (-len(prompts[i]), i))
    running = [sum(prompts[i][1] for i in order) / lanes, max(lengths)]
    # The last ones run beside lanes that are empty, for at most as long as the longest.
    passes = decoder.passes + decoder.prefills
    assert passes <= 1.15 * sum(running)
    waves = sum(max(prompts[i][1] for i in order[at : at + lanes]) for at in range(0, 64, lanes))
    if group == 1:
        assert passes < 0.8 * waves


def test_a_lane_whose_sequence_is_at_its_limit_fills_no_more_slots(scripted):
    """It idles beside one that began later; `Scripted` refuses tokens beyond what was asked for."""
    _, found = scripted([[10, 20], [11, 3], [12, 20]], 2, max_new_tokens=20)
    assert [len(completion.ids) for completion in found] == [20, 3, 20]


def test_passes_of_many_short_batches(scripted):
    """64 sequences over 16 lanes, all but four of them short: nobody waits for those."""
    lengths = [400 if i % 16 == 3 else 20 for i in range(64)]
    decoder, _ = scripted([[10 + i, n] for i, n in enumerate(lengths)], 16)
    # Batch after batch it would be 4 x 400. The last of the four starts when three short ones and
    # their like have ended.
    assert 400 + 3 * 20 <= decoder.passes + decoder.prefills < 500


@pytest.mark.parametrize("lanes", [1, 3, 8, 40])
def test_lanes_are_given_on_and_dropped_before_they_idle_for_long(scripted, lanes):
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 200, 40)
    decoder, _ = scripted([[50 + i, int(n)] for i, n in enumerate(lengths)], lanes)
    computed, needed = sum(decoder.lanes), int((lengths - 1).sum())
    # Between two events lanes idle for as long as one pass takes, and for less than one more.
    events = decoder.prefills + len(set(decoder.lanes))
    assert needed <= computed <= needed + 2 * lanes * events
    assert decoder.lanes == sorted(decoder.lanes, reverse=True)
    assert max(decoder.lanes, default=0) <= lanes


def test_completions_that_end_at_once_take_no_pass(scripted):
    prompts = [[10 + i // 2, 1] for i in range(20)]
    decoder, found = scripted(prompts, 4)
    assert decoder.passes == 0 and decoder.prefills == 5
    assert [completion.ids for completion in found] == [[STOP]] * 20
    decoder, found = scripted([[9, 1]] * 20, 4)
    assert decoder.prefills == 1
    decoder, found = scripted([[9, 50]] * 5, 2, limits=[3, 1, 2, 9, 4])
    assert [len(completion.ids) for completion in found] == [3, 1, 2, 9, 4]
    assert decoder.most == 2 + 9


def test_tokens_are_told_as_they_come_and_progress_as_sequences_end(scripted):
    told, done = [], []
    prompts = [[10 + i, n] for i, n in enumerate((5, 1, 3, 2, 9, 4))]
    _, found = scripted(
        prompts, 2, on_token=lambda i, token: told.append((i, token)), on_progress=done.append
    )
    for i, completion in enumerate(found):
        assert [token for at, token in told if at == i] == completion.ids
    assert done == sorted(set(done)) and done[-1] == 6 and len(done) > 2


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def groups():
    """36 sequences of 12 different prompts, groups of 1 to 6, in no order."""
    rng = np.random.default_rng(0)
    sizes = (3, 1, 4, 2, 6, 3, 3, 5, 1, 2, 5, 1)
    different = [rng.integers(8, 96, n).tolist() for n in (5, 9, 3, 30, 17, 9, 4, 12, 8, 1, 40, 40)]
    repeated = [p for p, size in zip(different, sizes, strict=True) for _ in range(size)]
    return [repeated[i] for i in rng.permutation(len(repeated))]


@pytest.mark.parametrize("own_forward", [False, True])
@pytest.mark.parametrize("lanes", [2, 5, 16])
def test_completions_are_those_of_one_sequence_at_a_time(
    model, groups, own_forward, lanes, monkeypatch
):
    """With the experts of every position, limits, and lanes that change hands many times."""
    if own_forward:
        monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    decoder, prefilled = PaddleDecoder if own_forward else NumpyDecoder, []
    prefill = decoder.prefill

    def noted(self, prompts, *others):
        prefilled.extend(tuple(prompt) for prompt in prompts)
        return prefill(self, prompts, *others)

    monkeypatch.setattr(decoder, "prefill", noted)
    limits = np.random.default_rng(1).integers(1, 31, len(groups)).tolist()
    settings = {**SETTINGS, "record_experts": True, "record_prompt_experts": True}
    found = generate(model, groups, batch_size=lanes, limits=limits, **settings)
    assert sorted(prefilled) == sorted(set(map(tuple, groups)))
    assert len({len(c.ids) for c in found}) > 10, "sequences must leave at different times"
    first = {}
    for i, (prompt, limit, completion) in enumerate(zip(groups, limits, found, strict=True)):
        own = {**settings, "sequence_ids": [i], "limits": [limit]}
        (alone,) = generate(model, [prompt], **own)
        assert (completion.ids, completion.finished) == (alone.ids, alone.finished)
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=2e-5)
        for name in ("expert_ids", "prompt_expert_ids"):
            ours, theirs = getattr(completion, name), getattr(alone, name)
            np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))
        shared = first.setdefault(tuple(prompt), completion.prompt_expert_ids)
        assert completion.prompt_expert_ids is shared
    assert generate(model, groups, batch_size=lanes, limits=limits, **settings) == found


def test_every_pass_is_announced(model, groups, monkeypatch):
    """Under expert parallelism other ranks join each of them, also those of prompts."""
    monkeypatch.setattr(generate_engine, "can_decode", lambda model: False)
    passes, announced = [], []
    forward = type(model.model).forward

    def counted(self, *arguments, **options):
        passes.append(1)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model.model), "forward", counted)
    generate(
        model, groups, batch_size=5, stop_requested=lambda: bool(announced.append(1)), **SETTINGS
    )
    assert len(passes) == len(announced) > 30
