"""LoRA (arXiv:2106.09685): its settings, and layers with pairs of matrices of low rank.

An adapted matrix W [in,out] acts as V = W + scale * A B with A [in,r] and B [r,out]; experts have a
pair each, stacked like their weights: A [E,in,r], B [E,r,out]. DoRA (arXiv:2402.09353) trains the
length of each column too: column j acts as m_j V_j / |V_j|, with magnitudes m [out], where |V_j|
takes no gradient. Pairs lie beside the model, not among its parameters: `parameters()` and
`state_dict()` stay those of the base.

Shapes: T tokens, R routed rows, H hidden size, V vocabulary, E experts, I expert width, r rank.
"""

from ernie_train.model.lora.config import (
    EMBEDDING,
    HEAD,
    MAGNITUDE,
    LoraConfig,
    magnitude_name,
    pair_names,
    pair_shapes,
)
from ernie_train.model.lora.layers import adapted_layer, merge_pair, merged_weight
from ernie_train.model.lora.pairs import Adapter, Pair, new_pair

__all__ = [
    "EMBEDDING",
    "HEAD",
    "MAGNITUDE",
    "Adapter",
    "LoraConfig",
    "Pair",
    "adapted_layer",
    "magnitude_name",
    "merge_pair",
    "merged_weight",
    "new_pair",
    "pair_names",
    "pair_shapes",
]
