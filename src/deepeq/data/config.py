"""Which data is read, and in which units."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from deepeq.data.copy_memory import NUM_SYMBOLS, CopyMemoryConfig
from deepeq.data.published import PUBLISHED, PublishedName
from deepeq.data.vocabulary import Level

CorpusName = Literal["pydoc", "penn_treebank", "wikitext2", "wikitext103", "folder", "copy_memory"]

_IN_FOLDER = ("folder", *get_args(PublishedName))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is read and in which units, or which task is generated.

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other; all of a
            configuration's mistakes are named together.
    """

    corpus: CorpusName = "pydoc"
    """The text: `pydoc` is the language reference in every CPython; `penn_treebank`, `wikitext2`, `wikitext103` and,
    for a text of your own in three splits, `folder` lie in `folder`; `copy_memory` is generated."""
    files: tuple[str, ...] | str = ()
    """Paths of the user's own UTF-8 text files, joined in this order by newlines; they replace `corpus`."""
    folder: str | None = None
    """Path of the folder of train.txt, valid.txt and test.txt, or of a prepared corpus; None means the folder ptb,
    wikitext-2 or wikitext-103 inside the one that the environment variable DEEPEQ_DATA names."""
    level: Level = "character"
    """The unit of a token; the published corpora hold words, so it must be `word` there."""
    cache: str | None = None
    """Path of the folder for prepared text; None means the one that the environment variable DEEPEQ_CACHE names, or
    else ~/.cache/deepeq."""
    copy_memory: CopyMemoryConfig = field(default_factory=CopyMemoryConfig)
    """Size and seed of the task `copy_memory`."""

    def __post_init__(self) -> None:
        """Check the fields, one by one and together."""
        if isinstance(self.files, str):  # one file, as on a command line
            object.__setattr__(self, "files", (self.files,))
        problems = self._type_problems() + self._conflicts()
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def _type_problems(self) -> list[str]:
        problems = []
        for name, value, allowed in (
            ("corpus", self.corpus, get_args(CorpusName)),
            ("level", self.level, get_args(Level)),
        ):
            if value not in allowed:
                problems.append(f"data.{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        if not isinstance(self.files, tuple) or not all(isinstance(f, str) and f for f in self.files):
            problems.append(f"data.files must be a tuple of paths as strings, got {self.files!r}")
        for name, value in (("folder", self.folder), ("cache", self.cache)):
            if value is not None and not (isinstance(value, str) and value):
                problems.append(f"data.{name} must be a path as a string, or None, got {value!r}")
        if not isinstance(self.copy_memory, CopyMemoryConfig):
            problems.append(f"data.copy_memory must be a CopyMemoryConfig, got {self.copy_memory!r}")
        return problems

    def _conflicts(self) -> list[str]:
        problems = []
        if self.corpus in PUBLISHED and not self.files and self.level == "character":
            problems.append(
                f"data.level must be 'word' for the corpus {self.corpus!r}, which is words, got 'character'"
            )
        if self.corpus == "folder" and not self.files and self.folder is None:
            problems.append("data.folder must name the folder of the text for the corpus 'folder', got None")
        if self.corpus in ("pydoc", "copy_memory") and self.folder is not None:
            corpora = ", ".join(map(repr, _IN_FOLDER))
            problems.append(
                f"data.folder is read only for the corpora {corpora}, got {self.folder!r} with {self.corpus!r}: "
                "set data.corpus to one of them or leave data.folder out"
            )
        if self.is_copy_memory and self.level == "word":
            problems.append("data.level must be left out for the corpus 'copy_memory', which is symbols, got 'word'")
        if not self.is_copy_memory and self.copy_memory != CopyMemoryConfig():
            problems.append(
                f"data.copy_memory is read only for the corpus 'copy_memory', got {self.copy_memory!r}: "
                "set data.corpus to 'copy_memory' or leave data.copy_memory out"
            )
        return problems

    @property
    def is_copy_memory(self) -> bool:
        """Whether the data is the generated task, not a text."""
        return self.corpus == "copy_memory" and not self.files


def known_vocab_size(config: DataConfig) -> int | None:
    """Return the number of types that is known without reading any file, or None."""
    if config.files:
        return None
    if config.corpus == "copy_memory":
        return NUM_SYMBOLS
    return PUBLISHED[config.corpus].vocab_size if config.corpus in PUBLISHED else None
