"""Text as integer ids: vocabularies, corpora with their three splits, and streams of segments."""

from deepeq.data.corpora import Corpus, DataConfig, load_corpus, unigram_bits
from deepeq.data.segments import SegmentStream
from deepeq.data.vocabulary import Vocabulary

__all__ = ["Corpus", "DataConfig", "SegmentStream", "Vocabulary", "load_corpus", "unigram_bits"]
