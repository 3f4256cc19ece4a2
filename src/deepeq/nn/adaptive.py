"""Embedding and softmax for large vocabularies, in clusters of words by frequency.

Adaptive input representations (Baevski & Auli 2019, ICLR, section 3) and the adaptive softmax (Grave et al. 2017, ICML,
section 4), tied as in Transformer-XL (Dai et al. 2019, ACL). Words are numbered by falling frequency.

Letters: B batch, T positions, N = B T rows, D channels of the network, V words, C clusters; cluster `i` has `V_i` words
and `E_i` channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, log_softmax
from torch.utils.checkpoint import checkpoint

from deepeq.nn.dropout import variational_mask


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """Hyper-parameters of the two ends of a language model.

    Raises:
        ValueError: a field is out of range, or `div_val` is given without `cutoffs`.
    """

    d_embed: int | None = None
    """Channels of the most frequent words' embeddings; None for those of the network."""
    cutoffs: tuple[int, ...] = ()
    """Smallest id of each cluster of rarer words, rising, such as `(20000, 40000)`; `()` for one full softmax."""
    div_val: int = 1
    """Cluster `i` embeds in `d_embed // div_val**i` channels."""
    tie_weights: bool = True
    """The softmax uses the tables of the embedding."""
    tie_projections: bool = True
    """The softmax uses the projections of the embedding; with `div_val > 1`, all but that of the first cluster."""
    scale: bool = True
    """Embeddings are multiplied by the square root of the network's channels."""
    embedding_dropout: float = 0.0
    """Fraction of words whose embedding is dropped in a training step, in `[0, 1)` (Merity et al. 2018, sec. 4.3)."""
    init_std: float = 0.05
    """Standard deviation of the initial tables and projections; 0.05 in Bai et al. 2019, NeurIPS, section 5."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} must be >= 1"
            for name, value in (("d_embed", self.d_embed), ("div_val", self.div_val))
            if value is not None and value < 1
        ]
        if list(self.cutoffs) != sorted(set(self.cutoffs)) or any(cutoff < 1 for cutoff in self.cutoffs):
            problems.append(f"cutoffs={self.cutoffs!r} must rise, from 1 or more")
        if self.div_val > 1 and not self.cutoffs:
            problems.append(
                f"div_val={self.div_val!r} needs cutoffs: without them there is one cluster, so set it to 1"
            )
        if not 0.0 <= self.embedding_dropout < 1.0:
            problems.append(f"embedding_dropout={self.embedding_dropout!r} must be in [0, 1)")
        if not self.init_std > 0.0:
            problems.append(f"init_std={self.init_std!r} must be > 0")
        if problems:
            raise ValueError("; ".join(problems))


class _RowsByCluster(NamedTuple):
    """Rows sorted by the cluster of their word."""

    cluster: Tensor  # (N,) of each row, in the order of the rows
    order: Tensor  # (N,) rows, first those of the first cluster
    sizes: list[int]  # rows of each cluster


def _rows_by_cluster(ids: Tensor, cutoffs: Sequence[int]) -> _RowsByCluster:
    cluster = torch.zeros_like(ids)
    for cutoff in cutoffs:
        cluster += ids >= cutoff
    # The only wait for the device: shapes depend on how many words each cluster has.
    sizes = cluster.bincount(minlength=len(cutoffs) + 1).tolist()
    return _RowsByCluster(cluster, cluster.argsort(stable=True), sizes)


def _normal_parameters(shapes: Sequence[tuple[int, int]]) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])


def _shapes(vocab_size: int, d_model: int, config: VocabularyConfig) -> tuple[list, list]:
    """Shapes of the tables and projections between words and `d_model` channels."""
    cutoffs, div_val = config.cutoffs, config.div_val
    d_embed = config.d_embed or d_model
    if vocab_size < 1 or d_model < 1:
        raise ValueError(f"vocab_size={vocab_size!r} and d_model={d_model!r} must be >= 1")
    if cutoffs and cutoffs[-1] >= vocab_size:
        raise ValueError(
            f"cutoffs={cutoffs!r} must be below vocab_size={vocab_size!r}: leave out those beyond it, the last cluster"
            " ends with the vocabulary"
        )
    if d_embed < div_val ** len(cutoffs):
        raise ValueError(
            f"d_embed={d_embed!r} must be at least div_val={div_val!r} to the power of {len(cutoffs)}, the number of"
            " cutoffs: lower div_val, or give fewer cutoffs"
        )
    if div_val == 1:
        return [(vocab_size, d_embed)], [(d_model, d_embed)] if d_embed != d_model else []
    bounds = (0, *cutoffs, vocab_size)
    widths = [d_embed // div_val**i for i in range(len(cutoffs) + 1)]
    tables = [(stop - start, width) for (start, stop), width in zip(pairwise(bounds), widths, strict=True)]
    return tables, [(d_model, width) for width in widths]


class AdaptiveEmbedding(nn.Module):
    """Embeddings `(B, T, D)` of words `(B, T)`: `sqrt(D) P_i E_i[word]` for a word of cluster `i`.

    With `div_val == 1` there is one table `(V, d_embed)`, and a projection only if `d_embed` is not `d_model`; with
    `div_val > 1` each cluster has a table `(V_i, E_i)` and a projection `(D, E_i)`. Every parameter gets a gradient at
    each step, zeros for a cluster that does not occur, as data-parallel training wants it.

    Args:
        vocab_size: `V`.
        d_model: `D`, the channels that the network takes.
        config: Clusters and their sizes.

    Raises:
        ValueError: a cutoff lies beyond the vocabulary, or `div_val` leaves a cluster without channels.
    """

    def __init__(self, vocab_size: int, d_model: int, config: VocabularyConfig) -> None:
        super().__init__()
        table_shapes, projection_shapes = _shapes(vocab_size, d_model, config)
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.config = config
        self.tables = _normal_parameters(table_shapes)
        self.projections = _normal_parameters(projection_shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw tables and projections from `N(0, init_std^2)`."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.config.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        ids = tokens.flatten()  # (N,)
        if len(self.tables) == 1:
            x = self._embed_block(ids, 0)
        else:
            rows = _rows_by_cluster(ids, self.config.cutoffs)
            firsts = (0, *self.config.cutoffs)
            blocks = ids[rows.order].split(rows.sizes)
            x = torch.cat([self._embed_block(block - firsts[i], i) for i, block in enumerate(blocks)])
            x = torch.empty_like(x).index_copy(0, rows.order, x)
        if self.training and self.config.embedding_dropout > 0.0:
            x = x * variational_mask((self.vocab_size, 1), self.config.embedding_dropout, like=x)[ids]
        if self.config.scale:
            x = x * self.d_model**0.5
        return x.unflatten(0, tokens.shape)  # (B, T, D)

    def _embed_block(self, ids: Tensor, i: int) -> Tensor:
        x = embedding(ids, self.tables[i])
        return linear(x, self.projections[i]) if len(self.projections) else x

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, d_model={self.d_model}"


class _Cluster(NamedTuple):
    """Weights of one softmax."""

    projection: Tensor | None  # (D, E_i)
    weight: Tensor  # (V_i, E_i); in the head, a row more for each further cluster
    bias: Tensor


def _logits(hidden: Tensor, projection: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    if projection is not None:
        hidden = hidden @ projection
    logits = linear(hidden, weight, bias)
    # A sum over the vocabulary in sixteen bits is no sum.
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nll(hidden: Tensor, targets: Tensor, projection: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    return cross_entropy(_logits(hidden, projection, weight, bias), targets, reduction="none")


class AdaptiveSoftmax(nn.Module):
    """Distribution over the words: `p(w) = p(cluster of w) p(w | cluster)`, losses in nats.

    The head is one softmax over the words of the first cluster and one entry for each further cluster; a further
    cluster has a softmax of its own. Without cutoffs this is a full softmax. Tied parameters are those of `embedding`
    itself: one `Parameter`, one entry in a state dict, one state in an optimizer.

    Logits are computed in chunks of rows. When a call needs more than `max_logits` of them, a backward pass computes
    those of each chunk again, so that no more are alive at any time, however many rows there are. Every parameter gets
    a gradient at each step, zeros for a cluster that does not occur. Arithmetic on logits is float32 or wider.

    Args:
        vocab_size: `V`.
        d_model: `D`, the channels that the network gives.
        config: That of `embedding`.
        embedding: Where tied parameters come from. It is read, not owned: the model has to register it as well.
        max_logits: Most logits in a chunk; one row is never split.

    Raises:
        ValueError: `embedding` has other words or clusters, or widths with which it cannot be tied.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        config: VocabularyConfig,
        embedding: AdaptiveEmbedding,
        *,
        max_logits: int = 2**24,
    ) -> None:
        super().__init__()
        table_shapes, projection_shapes = _shapes(vocab_size, d_model, config)
        if max_logits < 1:
            raise ValueError(f"max_logits={max_logits!r} must be >= 1")
        if (vocab_size, config) != (embedding.vocab_size, embedding.config):
            raise ValueError("the softmax needs the vocab_size and the config of its embedding: pass the same to both")
        num_own = len(projection_shapes)
        if config.tie_weights:
            _check_same("tie_weights", table_shapes, embedding.tables)
        if config.tie_projections:
            num_own = int(config.div_val > 1)  # the first cluster's projection is never shared
            _check_same("tie_projections", projection_shapes, embedding.projections)
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.config = config
        self.max_logits = max_logits
        # In a tuple, the embedding is not a submodule: a state dict would name its parameters twice, and safetensors
        # refuses shared memory. The module and not its parameters, because conversions may replace those.
        self._embedding = (embedding,)
        self.tables = _normal_parameters([] if config.tie_weights else table_shapes)
        self.projections = _normal_parameters(projection_shapes[:num_own])
        self.bias = nn.Parameter(torch.empty(vocab_size))
        num_further = len(config.cutoffs)
        self.cluster_weight = nn.Parameter(torch.empty(num_further, table_shapes[0][1])) if num_further else None
        self.cluster_bias = nn.Parameter(torch.empty(num_further)) if num_further else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters that are not the embedding's from `N(0, init_std^2)`; biases are zero."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`nll`."""
        return self.nll(hidden, targets)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods `-log p(target)` in nats, `(B, T)`, each where its target is.

        Args:
            hidden: Output of the network, `(B, T, D)`.
            targets: Ids of words, `(B, T)`.

        Raises:
            ValueError: a target has no hidden state, or a hidden state no target.
        """
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(f"hidden, {tuple(hidden.shape)}, must be {tuple(targets.shape)} and channels, as targets")
        rows, ids = hidden.flatten(0, -2), targets.flatten()  # (N, D), (N,)
        head, *tails = self._clusters()
        if not tails:
            return self._chunked_nll([(rows, ids, head)])[0].view_as(targets)
        cutoffs = self.config.cutoffs
        cluster, order, sizes = _rows_by_cluster(ids, cutoffs)
        entries = torch.where(cluster == 0, ids, cutoffs[0] - 1 + cluster)
        order = order[sizes[0] :]
        tail_rows, tail_ids = (part.index_select(0, order).split(sizes[1:]) for part in (rows, ids))
        tasks = [
            (block, words - first, tail)
            for block, words, first, tail in zip(tail_rows, tail_ids, cutoffs, tails, strict=True)
        ]
        nll, *within = self._chunked_nll([(rows, entries, head), *tasks])
        return nll.index_add(0, order, torch.cat(within)).view_as(targets)  # (B, T)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of all words, `(B, T, V)`."""
        head, *tails = (log_softmax(_logits(hidden, *cluster), dim=-1) for cluster in self._clusters())
        if not tails:
            return head
        words, further = head.split([self.config.cutoffs[0], len(tails)], dim=-1)
        return torch.cat([words, *(further[..., i, None] + tail for i, tail in enumerate(tails))], dim=-1)

    def _clusters(self) -> list[_Cluster]:
        """Weights of the head and of the further clusters, the embedding's where they are tied."""
        (shared,) = self._embedding
        # Where some are shared and some not, the first ones are not.
        tables = [*self.tables, *list(shared.tables)[len(self.tables) :]]
        projections = [*self.projections, *list(shared.projections)[len(self.projections) :]] or [None]
        bounds = (0, *self.config.cutoffs, self.vocab_size)
        sizes = [stop - start for start, stop in pairwise(bounds)]
        if len(tables) < len(sizes):
            tables, projections = list(tables[0].split(sizes)), projections * len(sizes)
        biases = list(self.bias.split(sizes))
        if self.cluster_weight is not None and self.cluster_bias is not None:
            tables[0] = torch.cat([tables[0], self.cluster_weight])  # (V_0 + C - 1, E_0)
            biases[0] = torch.cat([biases[0], self.cluster_bias])  # (V_0 + C - 1,)
        return [_Cluster(*parts) for parts in zip(projections, tables, biases, strict=True)]

    def _chunked_nll(self, tasks: list[tuple[Tensor, Tensor, _Cluster]]) -> list[Tensor]:
        """`_nll` of each task's rows, targets and cluster; at most `max_logits` logits stay for a backward pass."""
        num_logits = sum(targets.numel() * cluster.bias.numel() for _, targets, cluster in tasks)
        recompute = torch.is_grad_enabled() and num_logits > self.max_logits
        losses = []
        for rows, targets, cluster in tasks:
            num_rows = max(1, self.max_logits // cluster.bias.numel())
            chunks = zip(rows.split(num_rows), targets.split(num_rows), strict=True)
            if recompute:  # it draws no random numbers
                parts = [
                    checkpoint(_nll, *chunk, *cluster, use_reentrant=False, preserve_rng_state=False)
                    for chunk in chunks
                ]
            else:
                parts = [_nll(*chunk, *cluster) for chunk in chunks]
            losses.append(torch.cat(parts))
        return losses

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, d_model={self.d_model}, max_logits={self.max_logits}"


def _check_same(field: str, needed: list[tuple[int, int]], shared: nn.ParameterList) -> None:
    shapes = [tuple(parameter.shape) for parameter in shared]
    if needed != shapes:
        raise ValueError(
            f"{field}=True needs the shapes {needed!r}, and the embedding has {shapes!r}: give embedding and softmax"
            f" the same d_model, or set {field}=False"
        )
