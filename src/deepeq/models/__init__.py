"""Cells for sequences, the networks made of them, the language model around a network, and text from it."""

from deepeq.models.baselines import TCN, BlockMemory, Recurrent, RecurrentConfig, TCNConfig
from deepeq.models.cell import CellConfig, LayerConfig, SequenceCell
from deepeq.models.decoding import KeyValues, PositionKeys
from deepeq.models.generation import Decoding, Sampling, generate
from deepeq.models.language_model import LanguageModel, ModelConfig, ModelOutput
from deepeq.models.networks import LayerStack, NetworkOutput, TiedNetwork, join_memories
from deepeq.models.transformer import Memory, TransformerCell, TransformerConfig, TransformerInjection
from deepeq.models.trellisnet import TrellisCell, TrellisConfig, TrellisInjection, TrellisMemory

MEMORY_TYPES = (BlockMemory, Memory, TrellisMemory)
"""The named tuples that memories are made of, besides plain tuples."""

__all__ = [
    "MEMORY_TYPES",
    "TCN",
    "BlockMemory",
    "CellConfig",
    "Decoding",
    "KeyValues",
    "LanguageModel",
    "LayerConfig",
    "LayerStack",
    "Memory",
    "ModelConfig",
    "ModelOutput",
    "NetworkOutput",
    "PositionKeys",
    "Recurrent",
    "RecurrentConfig",
    "Sampling",
    "SequenceCell",
    "TCNConfig",
    "TiedNetwork",
    "TransformerCell",
    "TransformerConfig",
    "TransformerInjection",
    "TrellisCell",
    "TrellisConfig",
    "TrellisInjection",
    "TrellisMemory",
    "generate",
    "join_memories",
]
