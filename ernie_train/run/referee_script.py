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
    path, options = Path(request["model"]), {}
    if path.is_file():
        for package in ("gguf", "accelerate"):
            if find_spec(package) is None:
                print(json.dumps({"unable": f"it lacks the package {package}"}))
                return
        path, options = path.parent, {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    )
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
