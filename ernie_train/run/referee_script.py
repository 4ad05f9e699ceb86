"""Load a model with `transformers` and write its logits; a script for another interpreter.

It imports nothing of this toolkit, so that its results are independent of it. Reads the JSON object
{"model", "sequences", "round_to", "out"} from standard input; writes the logits of sequence n to
the file n.npy in the directory "out", and {"reader"}, or {"unable"} with the reason, as the last
line of standard output.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Load the model and write its logits; see the module."""
    import numpy
    import torch
    import transformers

    request = json.load(sys.stdin)
    path, options, stored = Path(request["model"]), {}, "float32"
    config = json.loads((path / "config.json").read_text("utf-8")) if path.is_dir() else {}
    quantized = "quantization_config" in config
    needed = ("gguf", "accelerate") if path.is_file() else ("compressed_tensors",) * quantized
    for package in needed:
        if find_spec(package) is None:
            print(json.dumps({"unable": f"it lacks the package {package}"}))
            return
    if path.is_file():
        path, options = path.parent, {"gguf_file": path.name}
    elif quantized:
        # Weights are what they dequantize to in the dtype of their scales.
        stored = config["torch_dtype"]
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, stored), attn_implementation="eager", **options
    )
    model.float()
    model.eval()
    if request["round_to"]:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, request["round_to"])).float()
    with torch.no_grad():
        for number, sequence in enumerate(request["sequences"]):
            logits = model(torch.tensor([sequence])).logits[0].float().numpy()
            numpy.save(Path(request["out"]) / f"{number}.npy", logits)
    reader = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"reader": reader}))


if __name__ == "__main__":
    main()
