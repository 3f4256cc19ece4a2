"""Cells and the models around them."""

from deepeq.models.language_model import LanguageModel, ModelOutput, nll
from deepeq.models.transformer import Memory, TransformerCell, TransformerConfig, TransformerInjection

__all__ = [
    "LanguageModel",
    "Memory",
    "ModelOutput",
    "TransformerCell",
    "TransformerConfig",
    "TransformerInjection",
    "nll",
]
