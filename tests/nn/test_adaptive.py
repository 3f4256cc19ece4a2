"""Embedding and softmax for large vocabularies against probabilities written word by word."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepeq.nn import AdaptiveEmbedding, AdaptiveSoftmax, VocabularyConfig

V, D = 23, 8
CONFIGS = {
    "full": VocabularyConfig(),
    "full, narrow": VocabularyConfig(d_embed=5),
    "clusters, equal": VocabularyConfig(cutoffs=(6, 11)),
    "clusters, equal, narrow": VocabularyConfig(cutoffs=(6, 11), d_embed=5, tie_projections=False),
    "clusters": VocabularyConfig(cutoffs=(6, 11, 20), div_val=2),
    "clusters, wide": VocabularyConfig(cutoffs=(1, 22), div_val=3, d_embed=10),
    "clusters, untied": VocabularyConfig(cutoffs=(6, 11), div_val=2, tie_weights=False, tie_projections=False),
    "clusters, tables tied": VocabularyConfig(cutoffs=(6, 11), div_val=2, tie_projections=False),
    "clusters, projections tied": VocabularyConfig(cutoffs=(6, 11), div_val=2, tie_weights=False),
}
CLUSTERS = CONFIGS["clusters"]


class Ends(nn.Module):
    """Both ends of a model, with nothing between them."""

    def __init__(self, config: VocabularyConfig, *, vocab_size: int = V, d_model: int = D, **keywords: int) -> None:
        super().__init__()
        self.embedding = AdaptiveEmbedding(vocab_size, d_model, config)
        self.softmax = AdaptiveSoftmax(vocab_size, d_model, config, self.embedding, **keywords)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.softmax(self.embedding(tokens), targets)


def make_ends(config: VocabularyConfig, **keywords: int) -> Ends:
    ends = Ends(config, **keywords).double()
    for parameter in ends.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ends


@pytest.fixture(params=CONFIGS.values(), ids=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> VocabularyConfig:
    return request.param


def all_words() -> Tensor:
    """Every word once, clusters mixed, `(1, V)`."""
    return torch.randperm(V)[None]


def place(word: int, config: VocabularyConfig) -> tuple[int, int]:
    """Cluster of a word, and its number there."""
    cluster = sum(word >= cutoff for cutoff in config.cutoffs)
    return cluster, word - (0, *config.cutoffs)[cluster]


def table_row(tables: nn.ParameterList, word: int, config: VocabularyConfig) -> Tensor:
    cluster, number = place(word, config)
    return tables[0][word] if config.div_val == 1 else tables[cluster][number]


def probability(softmax: AdaptiveSoftmax, embedding: AdaptiveEmbedding, h: Tensor, word: int) -> Tensor:
    """Of one word for one hidden state `(D,)`: a softmax over the head, times one over the word's cluster."""
    config = softmax.config
    tables = embedding.tables if config.tie_weights else softmax.tables
    bounds = (0, *config.cutoffs, softmax.vocab_size)

    def project(cluster: int) -> Tensor:
        if len(embedding.projections) == 0:
            return h
        i = 0 if config.div_val == 1 else cluster
        own = not config.tie_projections or (config.div_val > 1 and i == 0)
        return (softmax.projections if own else embedding.projections)[i].T @ h

    def weight(word: int, cluster: int) -> Tensor:
        return (project(cluster) @ table_row(tables, word, config) + softmax.bias[word]).exp()

    head = [weight(w, 0) for w in range(bounds[1])]
    for i in range(len(config.cutoffs)):
        assert softmax.cluster_weight is not None
        assert softmax.cluster_bias is not None
        head.append((project(0) @ softmax.cluster_weight[i] + softmax.cluster_bias[i]).exp())
    cluster, number = place(word, config)
    if cluster == 0:
        return head[word] / sum(head)
    tail = [weight(w, cluster) for w in range(bounds[cluster], bounds[cluster + 1])]
    return head[bounds[1] + cluster - 1] / sum(head) * tail[number] / sum(tail)


def test_embedding_is_the_scaled_projected_row_of_the_word(config: VocabularyConfig) -> None:
    embedding = make_ends(config).embedding
    tokens = all_words().expand(2, V)
    x = embedding(tokens)
    assert x.shape == (2, V, D)
    for position, word in enumerate(tokens[0].tolist()):
        expected = table_row(embedding.tables, word, config)
        if len(embedding.projections):
            expected = embedding.projections[place(word, config)[0] if config.div_val > 1 else 0] @ expected
        torch.testing.assert_close(x[:, position], (expected * D**0.5).expand(2, D))


def test_embeddings_are_scaled_on_request() -> None:
    ends = make_ends(CLUSTERS)
    plain = AdaptiveEmbedding(V, D, VocabularyConfig(cutoffs=CLUSTERS.cutoffs, div_val=2, scale=False)).double()
    plain.load_state_dict(ends.embedding.state_dict())
    tokens = all_words()
    torch.testing.assert_close(plain(tokens) * D**0.5, ends.embedding(tokens))


def test_losses_are_those_of_the_loop_in_the_order_of_the_targets(config: VocabularyConfig) -> None:
    ends = make_ends(config)
    hidden, targets = torch.randn(2, V, D, dtype=torch.float64), torch.stack([all_words()[0], all_words()[0]])
    losses = ends.softmax.nll(hidden, targets)
    assert losses.shape == (2, V)
    torch.testing.assert_close(ends.softmax(hidden, targets), losses, rtol=0.0, atol=0.0)
    for b in range(2):
        for t in range(V):
            expected = probability(ends.softmax, ends.embedding, hidden[b, t], int(targets[b, t]))
            torch.testing.assert_close(losses[b, t], -expected.log())


def test_probabilities_of_all_words_sum_to_one_and_agree_with_the_losses(config: VocabularyConfig) -> None:
    softmax = make_ends(config).softmax
    hidden, targets = torch.randn(2, V, D, dtype=torch.float64), all_words().expand(2, V)
    log_probs = softmax.log_probs(hidden)
    assert log_probs.shape == (2, V, V)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, V, dtype=torch.float64))
    torch.testing.assert_close(-log_probs.gather(-1, targets[..., None])[..., 0], softmax.nll(hidden, targets))


def test_without_cutoffs_it_is_cross_entropy() -> None:
    ends = make_ends(VocabularyConfig())
    hidden, targets = torch.randn(3, 5, D, dtype=torch.float64), torch.randint(V, (3, 5))
    logits = hidden @ ends.embedding.tables[0].T + ends.softmax.bias
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(ends.softmax.nll(hidden, targets), expected)


@pytest.mark.parametrize("words", [[[0, 1, 2]], [[21, 22, 21]], [[0, 22, 1]]])
def test_clusters_that_do_not_occur_get_zero_gradients(config: VocabularyConfig, words: list[list[int]]) -> None:
    ends = make_ends(config, max_logits=7)
    tokens = torch.tensor(words)
    ends(tokens, tokens).sum().backward()
    for name, parameter in ends.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if config.div_val > 1 and not config.tie_weights:
        absent = {0, 1, 2} - {place(word, config)[0] for word in words[0]}
        for tables in (ends.embedding.tables, ends.softmax.tables):
            assert all((tables[i].grad == 0).all() for i in absent if i > 0)


@pytest.mark.parametrize("max_logits", [1, 40, 2**24])
def test_gradients_match_finite_differences(config: VocabularyConfig, max_logits: int) -> None:
    ends = make_ends(config, max_logits=max_logits)
    tokens, targets = torch.tensor([[0, 22, 12, 7]]), torch.tensor([[8, 3, 21, 15]])

    def f(*_: Tensor) -> Tensor:  # gradcheck changes the parameters in place
        return ends(tokens, targets)

    assert torch.autograd.gradcheck(f, tuple(ends.parameters()), fast_mode=True)


@pytest.mark.parametrize("max_logits", [1, 30, 100])
def test_chunks_change_neither_losses_nor_gradients(config: VocabularyConfig, max_logits: int) -> None:
    whole = make_ends(config)
    chunked = Ends(config, max_logits=max_logits).double()
    chunked.load_state_dict(whole.state_dict())
    tokens, targets = torch.randint(V, (2, 3, 13)).unbind()
    weight = torch.randn(3, 13, dtype=torch.float64)
    results = []
    for ends in (whole, chunked):
        losses = ends(tokens, targets)
        gradients = torch.autograd.grad((losses * weight).sum(), list(ends.parameters()))
        results.append([losses, *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(chunked(tokens, targets), results[0][0])


class LiveNumbers(TorchDispatchMode):
    """Counts the numbers alive in matrices as wide as logits are; `D` rows are a transposed table and no logits."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = widths
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.ndim != 2:
                continue
            if tensor.shape[0] != D and tensor.shape[1] in self.widths:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.alive[reference.cdata] = reference, tensor.numel()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(numel for _, numel in self.alive.values()))
        return out


@pytest.mark.parametrize("cutoffs", [(), (97, 300)])
def test_memory_for_logits_does_not_grow_with_the_rows(cutoffs: tuple[int, ...]) -> None:
    config = VocabularyConfig(cutoffs=cutoffs, div_val=2 if cutoffs else 1)
    max_logits = 5_000
    peaks = []
    for max_logits_used, num_rows in ((max_logits, 100), (max_logits, 400), (2**24, 400)):
        ends = Ends(config, vocab_size=1009, max_logits=max_logits_used)
        hidden, targets = torch.randn(1, num_rows, D, requires_grad=True), torch.randint(1009, (1, num_rows))
        with LiveNumbers(1009, 99, 203, 709) as live:
            ends.softmax.nll(hidden, targets).sum().backward()
        peaks.append(live.peak)
    # Logits, their log-softmax, and the gradients of both.
    assert max_logits / 2 < peaks[0] <= peaks[1] <= 4 * max_logits
    assert peaks[2] > 10 * peaks[1]


def test_evaluation_is_chunked_too() -> None:
    ends = Ends(VocabularyConfig(), vocab_size=1009, max_logits=5_000)
    with torch.no_grad(), LiveNumbers(1009) as live:
        ends.softmax.nll(torch.randn(1, 400, D), torch.randint(1009, (1, 400)))
    assert live.peak <= 2 * 5_000


def test_losses_are_float32_under_autocast() -> None:
    ends = Ends(CLUSTERS)
    tokens = all_words()
    expected = ends(tokens, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = ends(tokens, tokens)
        log_probs = ends.softmax.log_probs(ends.embedding(tokens))
    assert losses.dtype == log_probs.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(1, V), rtol=1e-5, atol=0.0)


def test_sixteen_bit_models_give_float32_losses() -> None:
    ends = Ends(CLUSTERS).bfloat16()
    losses = ends(all_words(), all_words())
    assert losses.dtype == torch.float32
    losses.sum().backward()


@contextmanager
def overwriting_conversions() -> Iterator[None]:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def assert_tied(ends: Ends) -> None:
    """The distribution follows the embedding's own tables, and no parameter is listed twice."""
    hidden = torch.randn(1, 2, D, dtype=ends.softmax.bias.dtype)
    parameters = list(ends.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters) == len(ends.state_dict())
    for shared in (ends.embedding.tables[-1], ends.embedding.projections[-1]):
        before = ends.softmax.log_probs(hidden)
        with torch.no_grad():
            shared.mul_(2.0)
        assert not torch.allclose(ends.softmax.log_probs(hidden), before)


def test_tied_parameters_stay_tied() -> None:
    ends = Ends(CLUSTERS)
    assert_tied(ends)
    clone = copy.deepcopy(ends)
    assert_tied(clone)
    ends.load_state_dict(clone.state_dict())
    hidden = torch.randn(1, 2, D)
    torch.testing.assert_close(ends.softmax.log_probs(hidden), clone.softmax.log_probs(hidden))
    assert_tied(ends)
    assert_tied(ends.to(torch.float64))
    with overwriting_conversions():
        assert_tied(ends.to(torch.float32))
    assert_tied(Ends(CLUSTERS).to("meta").to_empty(device="cpu").apply(reset))


def reset(module: nn.Module) -> None:
    if isinstance(module, AdaptiveEmbedding | AdaptiveSoftmax):
        module.reset_parameters()


def test_a_copy_is_not_tied_to_the_original() -> None:
    ends = Ends(CLUSTERS)
    clone = copy.deepcopy(ends)
    hidden = torch.randn(1, 2, D)
    before = clone.softmax.log_probs(hidden)
    with torch.no_grad():
        for parameter in ends.parameters():
            parameter.add_(1.0)
    assert torch.equal(clone.softmax.log_probs(hidden), before)


def test_gradients_of_both_ends_add_up_in_tied_tables() -> None:
    tied = make_ends(VocabularyConfig())
    untied = Ends(VocabularyConfig(tie_weights=False)).double()
    (table,) = tied.embedding.tables
    with torch.no_grad():
        untied.embedding.tables[0].copy_(table)
        untied.softmax.tables[0].copy_(table)
        untied.softmax.bias.copy_(tied.softmax.bias)
    for ends in (tied, untied):
        ends(torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])).sum().backward()
    (first,), (second,) = untied.embedding.tables, untied.softmax.tables
    assert table.grad is not None
    torch.testing.assert_close(table.grad, first.grad + second.grad)


@pytest.mark.parametrize(
    ("config", "embedding", "own"),
    [
        # WikiText-103 in Transformer-XL's sizes: tables 25 057 350, projections 649 600, words' biases 267 735.
        (
            VocabularyConfig(cutoffs=(20000, 40000, 200000), div_val=4),
            20000 * 700 + 20000 * 175 + 160000 * 43 + 67735 * 10 + 700 * (700 + 175 + 43 + 10),
            267735 + 3 * 700 + 3 + 700 * 700,
        ),
        (VocabularyConfig(cutoffs=(20000,)), 267735 * 700, 267735 + 700 + 1),
        (VocabularyConfig(d_embed=64), 267735 * 64 + 700 * 64, 267735),
        (VocabularyConfig(d_embed=64, tie_projections=False), 267735 * 64 + 700 * 64, 267735 + 700 * 64),
        (VocabularyConfig(tie_weights=False), 267735 * 700, 267735 + 267735 * 700),
        (
            VocabularyConfig(cutoffs=(20000,), div_val=2, tie_projections=False),
            20000 * 700 + 247735 * 350 + 700 * 1050,
            267735 + 700 + 1 + 700 * 1050,
        ),
    ],
)
def test_parameters_are_as_many_as_by_arithmetic(config: VocabularyConfig, embedding: int, own: int) -> None:
    with torch.device("meta"):
        ends = Ends(config, vocab_size=267735, d_model=700)
    assert all(parameter.is_meta for parameter in ends.parameters())
    assert sum(parameter.numel() for parameter in ends.embedding.parameters()) == embedding
    assert sum(parameter.numel() for parameter in ends.softmax.parameters()) == own
    assert sum(parameter.numel() for parameter in ends.parameters()) == embedding + own


def test_parameters_start_as_configured() -> None:
    config = VocabularyConfig(cutoffs=(500,), div_val=2, init_std=0.3, tie_weights=False, tie_projections=False)
    ends = Ends(config, vocab_size=1000, d_model=256)
    for name, parameter in ends.named_parameters():
        if "bias" in name:
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=0.15), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=0.06), name


def test_embedding_dropout_drops_words_in_training_alone() -> None:
    config = VocabularyConfig(cutoffs=(6, 11), div_val=2, embedding_dropout=0.4)
    embedding = AdaptiveEmbedding(V, D, config).double()
    tokens = torch.arange(V).repeat(3, 2)
    kept = embedding.eval()(tokens)
    shares = []
    for _ in range(100):
        ratio = embedding.train()(tokens) / kept
        by_word = ratio.view(3, 2, V, D)
        torch.testing.assert_close(ratio, by_word[:1, :1, :, :1].expand(by_word.shape).reshape(ratio.shape))
        assert all(value == 0.0 or math.isclose(value, 1 / 0.6) for value in ratio.unique().tolist())
        shares.append((ratio == 0).double().mean().item())
    assert len(set(shares)) > 1
    assert sum(shares) / 100 == pytest.approx(0.4, abs=4 * (0.24 / 2300) ** 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_embed": 0}, "d_embed=0 must be >= 1"),
        ({"div_val": 0, "init_std": 0.0}, "div_val=0 must be >= 1; init_std=0.0 must be > 0"),
        ({"div_val": 2}, "div_val=2 needs cutoffs"),
        ({"cutoffs": (5, 5)}, r"cutoffs=\(5, 5\) must rise"),
        ({"cutoffs": (7, 5)}, r"cutoffs=\(7, 5\) must rise"),
        ({"cutoffs": (0, 5)}, r"cutoffs=\(0, 5\) must rise, from 1 or more"),
        ({"embedding_dropout": 1.0}, r"embedding_dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_fields_out_of_range_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabularyConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cutoffs": (6, V)}, r"cutoffs=\(6, 23\) must be below vocab_size=23: leave out"),
        ({"cutoffs": (6, 11), "div_val": 4}, "d_embed=8 must be at least div_val=4 to the power of 2"),
    ],
)
def test_clusters_that_cannot_be_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveEmbedding(V, D, VocabularyConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"tie_weights=True needs the shapes \[\(23, 4\)\], and the embedding has \[\(23, 8\)\]"),
        ({"d_embed": 8}, r"tie_projections=True needs the shapes \[\(4, 8\)\], and the embedding has \[\]"),
    ],
)
def test_ends_that_cannot_be_tied_are_named(fields: dict, message: str) -> None:
    config = VocabularyConfig(**fields)
    with pytest.raises(ValueError, match=message):
        AdaptiveSoftmax(V, 4, config, AdaptiveEmbedding(V, D, config))


def test_ends_of_different_widths_work_where_they_are_not_tied() -> None:
    for config in (VocabularyConfig(tie_weights=False), VocabularyConfig(d_embed=8, tie_projections=False)):
        softmax = AdaptiveSoftmax(V, 4, config, AdaptiveEmbedding(V, D, config))
        assert softmax.log_probs(torch.randn(2, 3, 4)).shape == (2, 3, V)


def test_mistakes_with_the_softmax_are_named() -> None:
    ends = Ends(CLUSTERS)
    for vocab_size, config in ((V + 1, CLUSTERS), (V, VocabularyConfig())):
        with pytest.raises(ValueError, match="needs the vocab_size and the config of its embedding"):
            AdaptiveSoftmax(vocab_size, D, config, ends.embedding)
    with pytest.raises(ValueError, match="max_logits=0 must be >= 1"):
        Ends(CLUSTERS, max_logits=0)
    with pytest.raises(ValueError, match=r"hidden, \(2, 3, 8\), must be \(3, 2\) and channels"):
        ends.softmax.nll(torch.randn(2, 3, D), torch.zeros(3, 2, dtype=torch.long))


def test_words_outside_the_vocabulary_are_errors(config: VocabularyConfig) -> None:
    ends = Ends(config)
    for word in (-1, V):
        tokens = torch.tensor([[0, word]])
        with pytest.raises(IndexError):
            ends.embedding(tokens)
        with pytest.raises(IndexError):
            ends.softmax(torch.randn(1, 2, D), tokens)
