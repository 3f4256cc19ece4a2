"""Network parts that know nothing of solvers."""

from deepeq.nn.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, VocabularyConfig
from deepeq.nn.cells import AttentionCell, ConvCell, DenseCell
from deepeq.nn.dropout import VariationalDropout, WeightDropout, regularize_weight, variational_mask
from deepeq.nn.held_weights import HeldWeights, OncePerSolve, hold_weights
from deepeq.nn.normalization import infinity_norm, spectral_norm, weight_norm
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
    "AttentionCell",
    "ConvCell",
    "DenseCell",
    "HeldWeights",
    "OncePerSolve",
    "VariationalDropout",
    "VocabularyConfig",
    "WeightDropout",
    "causal_mask",
    "hold_weights",
    "infinity_norm",
    "regularize_weight",
    "relative_attention",
    "relative_shift",
    "single_query_attention",
    "sinusoidal_positions",
    "spectral_norm",
    "variational_mask",
    "weight_norm",
]
