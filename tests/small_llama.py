"""Random Llama models as other programs write them: Hugging Face directories and GGUF files."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 96,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "rope_scaling": None, "torch_dtype": "float32",
}  # fmt: skip
GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


# A byte-level tokenizer as a GGUF file holds it.
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "Ġ", "Ċ", "Ġa", "12", "ab"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": ["Ġ a", "1 2", "a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights by Hugging Face's names; norms lie around one."""
    random = np.random.default_rng(seed)
    hidden, width = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.input_layernorm.weight": (hidden,),
                   f"{at}.post_attention_layernorm.weight": (hidden,),
                   f"{at}.self_attn.q_proj.weight": (q, hidden),
                   f"{at}.self_attn.k_proj.weight": (kv, hidden),
                   f"{at}.self_attn.v_proj.weight": (kv, hidden),
                   f"{at}.self_attn.o_proj.weight": (hidden, q),
                   f"{at}.mlp.gate_proj.weight": (width, hidden),
                   f"{at}.mlp.up_proj.weight": (width, hidden),
                   f"{at}.mlp.down_proj.weight": (hidden, width)}  # fmt: skip
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {
        name: random.normal(1.0 if len(shape) == 1 else 0.0, 0.15, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_directory(path: Path, dtype: str = "float32", **keys: Any) -> dict[str, np.ndarray]:
    """Write a Hugging Face directory and return its tensors; a key that is ... is left out."""
    config = {k: v for k, v in {**CONFIG, **keys}.items() if v is not ...}
    arrays = {k: v.astype(dtype) for k, v in tensors({**CONFIG, **config}).items()}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return arrays


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows of q or k by the definition: row i + j D/2 of a head becomes row 2i + j."""
    out, dim = np.empty_like(rows), rows.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            for j in (0, 1):
                out[head * dim + 2 * i + j] = rows[head * dim + i + j * dim // 2]
    return out


def expected(arrays: dict[str, np.ndarray], config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """Return what an import must hold."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    return {
        name: interleave(array, heads[part]) if (part := name.split(".")[-2]) in heads else array
        for name, array in arrays.items()
    }


def write_gguf(
    path: Path, kind: str = "F32", metadata: dict[str, Any] | None = None, **keys: Any
) -> dict[str, np.ndarray]:
    """Write a GGUF file as llama.cpp's converter does and return what it holds, by HF's names.

    `kind` names the type of the matrices. `metadata` adds keys; one that is None is left out.
    """
    config = {**CONFIG, **keys}
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        **(metadata or {}),
    }
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    held = {}
    for name, array in expected(tensors(config), config).items():
        parts = name.split(".")
        short = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm",
                 "lm_head.weight": "output"}.get(name)  # fmt: skip
        short = short or f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:-1])]}"
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{short}.weight", array)
            held[name] = array
            continue
        data = gguf.quants.quantize(array, quantization)
        writer.add_tensor(f"{short}.weight", data, raw_dtype=quantization)
        held[name] = gguf.quants.dequantize(data, quantization).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def pieces(directory: Path, text: str) -> list[str]:
    """Return the tokens of a text by the tokenizer in a directory."""
    tokens: list[str] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).tokens
    return tokens
