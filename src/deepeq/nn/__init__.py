"""Network parts that know nothing of solvers."""

from deepeq.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, VocabularyConfig
from deepeq.nn.dropout import VariationalDropout, WeightDropout, regularize_weight, variational_mask
from deepeq.nn.relative_attention import (
    causal_mask,
    relative_attention,
    relative_shift,
    single_query_attention,
    sinusoidal_positions,
)

__all__ = [
    "AdaptiveEmbedding",
    "AdaptiveSoftmax",
    "VariationalDropout",
    "VocabularyConfig",
    "WeightDropout",
    "causal_mask",
    "regularize_weight",
    "relative_attention",
    "relative_shift",
    "single_query_attention",
    "sinusoidal_positions",
    "variational_mask",
]
