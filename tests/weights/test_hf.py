"""Model directories: dtypes, refusals, memory, and transformers as the referee."""

import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import safetensors.numpy

from ernie_train.core.errors import ConfigError, StorageError, UserError, WeightsError
from ernie_train.io.safetensors import TensorFiles, array_entries, write_tensor_files
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.weights.hf import load_config, load_pretrained, load_weights, read_parameters
from ernie_train.weights.saving import save_pretrained
from tests.small_models import (
    SMALL,
    assert_same,
    fill,
    make_model,
    round_bfloat16,
    state,
    stored_by_hand,
)

Referee = Callable[..., Any]
REPOSITORY = Path(__file__).resolve().parents[2]

# ---- dtypes ------------------------------------------------------------------------------------


def test_bfloat16_file_keeps_router_in_float32(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    files = TensorFiles(tmp_path / "out")
    wide = {name for name, tensor in files.stored.items() if tensor.dtype == "F32"}
    assert wide == {
        f"model.layers.{i}.mlp.{name}"
        for i in (1, 2)
        for name in ("gate.weight", "moe_statics.e_score_correction_bias")
    }
    assert {t.dtype for n, t in files.stored.items() if n not in wide} == {"BF16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(state(load_pretrained(tmp_path / "out")), round_bfloat16(state(model)))


def test_loading_as_bfloat16(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "out")
    model = load_pretrained(tmp_path / "out", dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        router = name.endswith((".mlp.gate.weight", "e_score_correction_bias"))
        assert tensor.dtype == (paddle.float32 if router else paddle.bfloat16), name
    # Saved again it is the same as what was rounded on the way out.
    save_pretrained(model, tmp_path / "again")
    save_pretrained(load_pretrained(tmp_path / "out"), tmp_path / "direct", dtype="bfloat16")
    for name in ("model.safetensors", "config.json", "MANIFEST.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


def test_unknown_dtype(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        load_pretrained(tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        save_pretrained(make_model(), tmp_path / "other", dtype="int8")
    assert not (tmp_path / "other").exists()


def test_float16_file(tmp_path: Path) -> None:
    model = make_model()
    stored = stored_by_hand(model.config, state(model), "hf")
    halves = {name: np.ascontiguousarray(a).astype(np.float16) for name, a in stored.items()}
    safetensors.numpy.save_file(halves, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    loaded = state(load_pretrained(tmp_path))
    expected = state(model)["model.norm.weight"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(loaded["model.norm.weight"], expected)


# ---- misfits -----------------------------------------------------------------------------------


def write_stored(directory: Path, change: Callable[[dict[str, np.ndarray]], None], **keys: Any
                 ) -> None:  # fmt: skip
    model = make_model(**keys)
    stored = stored_by_hand(model.config, state(model), "hf")
    stored = {name: np.ascontiguousarray(a) for name, a in stored.items()}
    change(stored)
    directory.mkdir(exist_ok=True)
    write_tensor_files(directory, "model", array_entries(stored), "30KB")
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))


def test_every_misfit_is_listed_at_once(tmp_path: Path) -> None:
    def change(stored: dict[str, np.ndarray]) -> None:
        del stored["model.norm.weight"]
        del stored["model.layers.2.mlp.experts.3.up_proj.weight"]
        stored["model.layers.0.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
        stored["model.extra"] = np.zeros(2, np.float32)
        stored["model.layers.1.input_layernorm.weight"] = np.zeros(32, np.int32)

    write_stored(tmp_path, change)
    with pytest.raises(WeightsError) as caught:
        load_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "missing (2): model.layers.2.mlp.experts.3.up_proj.weight, model.norm.wei" in message
    assert "not of this model (1): model.extra" in message
    assert "model.layers.0.mlp.up_proj.weight [48, 31] instead of [48, 32]" in message
    assert "model.layers.1.input_layernorm.weight has dtype I32" in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write_stored(tmp_path, lambda s: s.update({f"x{i:03}": np.zeros(1) for i in range(50)}))
    with pytest.raises(WeightsError, match=r"\(50\): x000, .*x019, and 30 more$"):
        load_pretrained(tmp_path)


def test_expert_biases_are_not_dropped_in_silence(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.bias"
    write_stored(tmp_path, lambda s: s.update({name: np.ones(16, np.float32)}), use_bias=True)
    with pytest.raises(WeightsError, match=name):
        load_pretrained(tmp_path)


def test_prediction_blocks_are_carried_through(tmp_path: Path) -> None:
    extra = {
        "model.mtp_block.0.self_attn.q_proj.weight": np.ones((2, 3), np.float16),
        "model.mtp_emb_norm.0.weight": np.array([3], np.float32),
    }
    write_stored(tmp_path / "in", lambda s: s.update(extra))
    model = load_pretrained(tmp_path / "in")
    assert load_weights(model, tmp_path / "in") == ()
    assert model.carried.keys() == extra.keys()
    save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    stored = TensorFiles(tmp_path / "out")
    for name, array in extra.items():  # not rounded with the rest
        np.testing.assert_array_equal(stored[name], array)
        assert stored[name].dtype == array.dtype
    assert load_pretrained(tmp_path / "out").carried.keys() == extra.keys()


def test_unknown_keys_are_named_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_stored(tmp_path / "in", lambda s: None)
    file = tmp_path / "in/config.json"
    keys = {"novel_key": [1, 2], "num_nextn_predict_layers": 1, "fuse_rope": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(tmp_path / "in")
    assert caplog.text.count("novel_key") == 1
    assert "fuse_rope" not in caplog.text
    save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()).items() >= keys.items()


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "out")
    paddle.seed(5)
    expected = paddle.randn([3]).numpy()
    paddle.seed(5)
    load_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(paddle.randn([3]).numpy(), expected)
    fresh = paddle.nn.Linear(4, 4).weight.numpy()
    assert (fresh != 0).all()  # later layers are initialized as ever


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    def change(stored: dict[str, np.ndarray]) -> None:
        stored["model.layers.1.self_attn.k_proj.weight"][3, 4] = np.nan
        stored["model.layers.1.self_attn.k_proj.weight"][0, 0] = -np.inf

    write_stored(tmp_path, change)
    with pytest.raises(WeightsError, match=r"2 numbers of model\.layers\.1\.self_attn\.k_proj"):
        load_pretrained(tmp_path)


def test_tied_head_in_the_file(tmp_path: Path) -> None:
    def same(stored: dict[str, np.ndarray]) -> None:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()

    def differs(stored: dict[str, np.ndarray]) -> None:
        same(stored)
        stored["lm_head.weight"][0, 0] += 1

    write_stored(tmp_path, same)
    assert_same(state(load_pretrained(tmp_path)), state(make_model()))
    other = tmp_path / "other"
    other.mkdir()
    write_stored(other, differs)
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        load_pretrained(other)


def test_weights_of_another_size(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "out")
    with pytest.raises(WeightsError, match="wrong shape"):
        load_weights(make_model(hidden_size=64), tmp_path / "out")


def test_model_is_untouched_if_names_do_not_fit(tmp_path: Path) -> None:
    write_stored(tmp_path, lambda stored: stored.__delitem__("model.norm.weight"))
    model = make_model()
    fill(model, seed=5)
    before = state(model)
    with pytest.raises(WeightsError, match="missing"):
        load_weights(model, tmp_path)
    assert_same(state(model), before)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_pretrained(tmp_path / "absent")


def test_flipped_bit_in_what_we_wrote(tmp_path: Path) -> None:
    path = tmp_path / "out"
    save_pretrained(make_model(), path, max_shard_size="30KB")
    file = sorted(path.glob("model-*.safetensors"))[1]
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(WeightsError, match=f"{file.name}: content differs"):
        load_pretrained(path)
    (path / "MANIFEST.json").unlink()  # as the message says
    load_pretrained(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    save_pretrained(make_model(), path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_pretrained(path)


def test_reading_without_a_model(tmp_path: Path) -> None:
    model = make_model()
    save_pretrained(model, tmp_path / "out")
    assert_same(dict(read_parameters(tmp_path / "out")), state(model))


# ---- writing over something --------------------------------------------------------------------


def test_only_our_own_directories_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.mkdir()
    save_pretrained(make_model(), path, max_shard_size="20KB")  # empty: fine
    save_pretrained(make_model(moe_num_experts=0), path)  # ours: fine, and no stale shard stays
    assert [p.name for p in sorted(path.glob("*.safetensors*"))] == ["model.safetensors"]
    assert load_config(path).model_type == "ernie4_5"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by this program"):
        save_pretrained(make_model(), foreign)
    assert (foreign / "chapter.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        save_pretrained(make_model(), file)


class FakeTokenizer:
    vocab_size = 96
    stop_token_ids = [5, 2]

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "tokenizer_config.json").write_text("{}")


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    save_pretrained(make_model(), tmp_path / "out", tokenizer=FakeTokenizer())
    assert (tmp_path / "out/tokenizer_config.json").exists()
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [5, 2], "pad_token_id": 0}


def test_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"96 tokens.*vocab_size=90"):
        save_pretrained(make_model(vocab_size=90), tmp_path / "out", tokenizer=FakeTokenizer())
    assert not (tmp_path / "out").exists()


def test_failing_write_leaves_the_old_directory(tmp_path: Path) -> None:
    class Failing(FakeTokenizer):
        def save_pretrained(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    path = tmp_path / "out"
    model = make_model()
    save_pretrained(model, path)
    with pytest.raises(StorageError, match="disk is full"):
        save_pretrained(make_model(moe_num_experts=0), path, tokenizer=Failing())
    assert_same(state(load_pretrained(path)), state(model))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- memory ------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
    import ctypes, gc, resource, sys, threading, time
    from pathlib import Path
    from ernie_train.weights.hf import load_config, load_weights
    from ernie_train.weights.saving import save_pretrained
    from ernie_train.model import Ernie4_5_MoeForCausalLM
    from ernie_train.io.safetensors import TensorFiles

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def rise(function) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before, peak, stop = resident(), [0], threading.Event()
        def watch():
            while not stop.is_set():
                peak[0] = max(peak[0], resident())
                time.sleep(0.0005)
        thread = threading.Thread(target=watch)
        thread.start()
        function()
        stop.set()
        thread.join()
        return peak[0] - before

    source, target = map(Path, sys.argv[1:])
    model = Ernie4_5_MoeForCausalLM(load_config(source))
    print(rise(lambda: load_weights(model, source)))
    print(rise(lambda: save_pretrained(model, target, max_shard_size="16MB")))
    print(rise(lambda: dict(TensorFiles(source))))
"""


def test_peak_memory_is_model_plus_one_shard(tmp_path: Path) -> None:
    # 8 shards of about 16 MB; the model is in memory already when the peak starts counting.
    config = Ernie4_5_MoeConfig(
        **{**SMALL, "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024,
           "num_hidden_layers": 6, "moe_num_experts": 8, "moe_intermediate_size": 384}
    )  # fmt: skip
    model = Ernie4_5_MoeForCausalLM(config)
    save_pretrained(model, tmp_path / "in", max_shard_size="16MB")
    shards = [p.stat().st_size for p in (tmp_path / "in").glob("*.safetensors")]
    assert len(shards) >= 8
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEMORY_SCRIPT),
         str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY,
        # What is freed goes back at once, or freed memory that is used again would hide a rise.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    loading, saving, everything = (int(line) for line in done.stdout.split()[-3:])
    assert everything > 0.8 * sum(shards)  # the measure sees a second copy of the model
    assert loading < max(shards), f"{loading / 1e6:.1f} MB above the model"
    assert saving < max(shards), f"{saving / 1e6:.1f} MB above the model"
    print(f"{max(shards) / 1e6:.1f} MB shards; {loading / 1e6:.1f} and {saving / 1e6:.1f} MB more")
