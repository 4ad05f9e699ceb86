"""Load an export with `transformers` and print its logits; a script for another interpreter.

It imports nothing of this toolkit, so that its results are independent of it. Reads the JSON object
{"directory", "prompts", "greedy_tokens"} from standard input; writes {"logits", "tokens", "reader"}
as the last line of standard output.
"""

import json
import sys


def main() -> None:
    """Load the directory and write logits and greedy tokens; see the module."""
    import torch
    import transformers

    request = json.load(sys.stdin)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        request["directory"], dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    logits, tokens = [], []
    with torch.no_grad():
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            logits.append(model(ids).logits[0].tolist())
            for _ in range(request["greedy_tokens"]):
                following = model(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, following.view(1, 1)], dim=1)
            tokens.append(ids[0, len(prompt) :].tolist())
    reader = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"logits": logits, "tokens": tokens, "reader": reader}))


if __name__ == "__main__":
    main()
