"""A process with torch and transformers that waits for scripts: `waiting_referee.py ADDRESS`."""

import sys
from pathlib import Path

import torch  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoTokenizer,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5ForCausalLM,
)

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from waiting import serve

serve(sys.argv[1])
