"""Scores conversations with an exported reward model, by transformers and torch alone.

    reward_scores.py EXPORT CONVERSATIONS OUT

CONVERSATIONS is a JSON list of token ids; OUT becomes a JSON list of scores.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel

directory, conversations, out = map(Path, sys.argv[1:])
body = AutoModel.from_pretrained(directory, dtype=torch.float32)
head = load_file(directory / "score" / "model.safetensors")["score.weight"].double()
scores = []
with torch.no_grad():
    for ids in json.loads(conversations.read_text()):
        hidden = body(torch.tensor([ids])).last_hidden_state[0, -1].double()
        scores.append(float(hidden @ head[0]))
out.write_text(json.dumps(scores))
