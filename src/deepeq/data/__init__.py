"""Data as integer ids: texts with their vocabularies, prepared once and memory-mapped, and the copy-memory task."""

from deepeq.data.batches import SPLITS, Batches, SequenceBatches, Split
from deepeq.data.config import DataConfig, known_vocab_size
from deepeq.data.copy_memory import CopyMemory, CopyMemoryConfig, copy_memory_baseline
from deepeq.data.corpora import Corpus, DataSource, load_corpus, unigram_bits
from deepeq.data.segments import SegmentStream
from deepeq.data.vocabulary import Vocabulary

__all__ = [
    "SPLITS",
    "Batches",
    "CopyMemory",
    "CopyMemoryConfig",
    "Corpus",
    "DataConfig",
    "DataSource",
    "SegmentStream",
    "SequenceBatches",
    "Split",
    "Vocabulary",
    "copy_memory_baseline",
    "known_vocab_size",
    "load_corpus",
    "unigram_bits",
]
