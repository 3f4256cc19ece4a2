"""Data as integer ids: texts with their tokenizers, prepared once and memory-mapped, and the copy-memory task."""

from deepeq.data.batches import SPLITS, Batches, SegmentStream, SequenceBatches, Split
from deepeq.data.config import PUBLISHED, DataConfig, corpus_title, known_vocab_size
from deepeq.data.copy_memory import CopyMemory, CopyMemoryConfig, copy_memory_baseline
from deepeq.data.corpora import Corpus, DataSource, load_corpus, prepare_corpus, unigram_bits
from deepeq.data.tokenizer import Tokenizer

__all__ = [
    "PUBLISHED",
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
    "Tokenizer",
    "copy_memory_baseline",
    "corpus_title",
    "known_vocab_size",
    "load_corpus",
    "prepare_corpus",
    "unigram_bits",
]
