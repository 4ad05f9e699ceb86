"""Pack signed integers of 4 or 8 bits into int32 as compressed-tensors' `pack-quantized` does.

Value v of B bits is stored as v + 2^(B-1); value i of a row lies in word i // (32/B), from bit
B * (i mod (32/B)) on; the last word of a row is filled up with zeros
(vllm-project/compressed-tensors, compressors/pack_quantized/helpers.py).
"""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes [out,in] -> int32 words [out, ceil(in * bits / 32)]."""
    rows, columns = codes.shape
    per_word = 32 // bits
    words = np.zeros((rows, -(-columns // per_word)), np.uint32)
    unsigned = (codes.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint32)
    for place in range(per_word):
        part = unsigned[:, place::per_word]
        words[:, : part.shape[1]] |= part << np.uint32(bits * place)
    return words.view(np.int32)


def unpack(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unpack words [out, ...] -> codes [out, columns] int8: undo `pack`."""
    per_word = 32 // bits
    shifts = (bits * np.arange(per_word)).astype(np.uint32)
    unsigned = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    flat = unsigned.reshape(len(words), -1)[:, :columns].astype(np.int16)
    return (flat - 2 ** (bits - 1)).astype(np.int8)
