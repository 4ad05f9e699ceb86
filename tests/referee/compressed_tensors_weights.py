"""Quantize and pack weights with compressed-tensors: IN.npz OUT.npz.

IN holds, for each case, `NAME.weight` [out,in], `NAME.scheme` [bits, group size or 0] and the codes
`NAME.codes` to pack. OUT has the package's scales, codes, packed words of the given codes, and what
these dequantize to, with scales in bfloat16.
"""

import sys

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams

given, found = dict(np.load(sys.argv[1])), {}
for name in sorted(key.removesuffix(".weight") for key in given if key.endswith(".weight")):
    weight = torch.from_numpy(given[f"{name}.weight"])
    bits, size = (int(number) for number in given[f"{name}.scheme"])
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, symmetric=True, **strategy)
    grouped = weight.reshape(len(weight), -1, size or weight.shape[1])
    scales, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    scales = scales.to(torch.bfloat16).float()
    codes = quantize(weight, scales, zero, args, dtype=torch.int8)
    packed = pack_to_int32(torch.from_numpy(given[f"{name}.codes"]), bits)
    state = {
        "weight_packed": packed,
        "weight_scale": scales.to(torch.bfloat16),
        "weight_shape": torch.tensor(weight.shape),
    }
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    dequantized = compressor.decompress(state, scheme)["weight"].float()
    for key, value in (("scales", scales), ("codes", codes), ("packed", packed)):
        found[f"{name}.{key}"] = value.numpy()
    found[f"{name}.weight"] = dequantized.numpy()
np.savez(sys.argv[2], **found)
