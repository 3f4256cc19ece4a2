"""The language model: embedding, network, softmax."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import deepeq
from deepeq.cell import prepare
from deepeq.models import (
    LanguageModel,
    LayerStack,
    ModelConfig,
    Recurrent,
    RecurrentConfig,
    TCNConfig,
    TiedNetwork,
    TransformerCell,
    TransformerConfig,
    TrellisConfig,
)
from deepeq.nn import VocabularyConfig

TRANSFORMER = TransformerConfig(d_model=16, num_heads=2, d_inner=32, memory_len=6)
TRELLIS = TrellisConfig(d_input=6, d_hidden=8, d_output=6, init_std=0.2)
CLUSTERS = VocabularyConfig(d_embed=8, cutoffs=(3, 6), div_val=2)

EXPLICIT = {
    "tied_transformer": ModelConfig(layer=TRANSFORMER, depth=4),
    "tied_trellis": ModelConfig(layer=TRELLIS, depth=4),
    "transformer_xl": ModelConfig(layer=TRANSFORMER, depth=3, tied=False),
    "tcn": ModelConfig(layer=TCNConfig(d_input=6, d_hidden=6, kernel_size=2), depth=2, tied=False),
    "lstm": ModelConfig(layer=RecurrentConfig(d_input=6, d_hidden=6, kind="lstm"), depth=1, tied=False),
    "gru": ModelConfig(layer=RecurrentConfig(d_input=6, d_hidden=6, kind="gru"), depth=2, tied=False),
}
EQUILIBRIA = {"transformer": ModelConfig(layer=TRANSFORMER), "trellis": ModelConfig(layer=TRELLIS)}


def tokens_of(batch_size: int, length: int) -> Tensor:
    return torch.randint(11, (batch_size, length))


def network_of(model: LanguageModel) -> TiedNetwork:
    assert isinstance(model.network, TiedNetwork)
    return model.network


def contractive_model(**values: object) -> LanguageModel:
    """A model in float64 whose plain iteration converges: the injected values outweigh the residual connection."""
    config = ModelConfig(layer=replace(TRANSFORMER, init_std=0.15), **values)  # pyright: ignore[reportArgumentType]
    model = LanguageModel(11, config)
    with torch.no_grad():
        model.embedding.tables[0] *= 5
        cell = network_of(model).cell
        assert isinstance(cell, TransformerCell)
        cell.output_projection.weight *= 8
    return model.double()


def exact(rtol: float) -> deepeq.Equilibrium:
    return deepeq.Equilibrium(solver=deepeq.Broyden(rtol=rtol, max_steps=100))


def test_how_to_solve_holds_for_one_call() -> None:
    model, tokens = LanguageModel(11, EQUILIBRIA["transformer"]), tokens_of(2, 5)
    before = model(tokens)
    stacked = model(tokens, how=deepeq.Stack(depth=3))
    assert stacked.solution.num_evals == 3
    assert not torch.allclose(stacked.logits, before.logits)
    after = model(tokens)
    assert after.solution.num_evals == before.solution.num_evals
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
    torch.testing.assert_close(model.predict(tokens, how=deepeq.Stack(depth=3)).logits, stacked.logits[:, -1:])


@pytest.mark.parametrize("name", ["transformer_xl", "tcn", "lstm"])
def test_network_without_a_tied_cell_refuses_what_it_would_ignore(name: str) -> None:
    model, tokens = LanguageModel(11, EXPLICIT[name]), tokens_of(2, 5)
    with pytest.raises(ValueError, match="how was given, but .* has no tied cell to solve for"):
        model(tokens, how=deepeq.Stack(depth=3))
    with pytest.raises(ValueError, match="penalty_generator was given, but .* has no tied cell"):
        model(tokens, penalty_generator=torch.Generator())


def test_stack_and_equilibrium_predict_the_same_in_the_limit() -> None:
    model, tokens = contractive_model(), tokens_of(2, 5)
    equilibrium, stack = (model(tokens, how=how).logits for how in (exact(1e-12), deepeq.Stack(depth=200)))
    torch.testing.assert_close(equilibrium, stack, rtol=1e-9, atol=1e-9)


def test_softmax_is_tied_to_the_embedding() -> None:
    model = LanguageModel(11, EQUILIBRIA["transformer"])
    sizes = [p.numel() for p in network_of(model).cell.parameters()]
    assert model.num_params_non_embedding == sum(sizes)
    assert model.num_params == sum(sizes) + 11 * 16 + 11
    output = model(tokens_of(2, 5))
    table = model.embedding.tables[0]
    expected = torch.log_softmax(output.solution.value @ table.T + model.softmax.bias, dim=-1)
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize("vocabulary", [VocabularyConfig(), CLUSTERS])
def test_losses_are_those_of_the_predicted_probabilities(vocabulary: VocabularyConfig) -> None:
    model = LanguageModel(11, replace(EQUILIBRIA["transformer"], vocabulary=vocabulary)).eval()
    tokens, targets = tokens_of(2, 7), tokens_of(2, 7)
    expected = -model(tokens).logits.gather(2, targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(model(tokens, None, targets).nll, expected)


@pytest.mark.parametrize("overwrite", [True, False])
def test_tied_parameters_stay_one_when_converted_copied_and_reloaded(overwrite: bool) -> None:
    model = LanguageModel(11, replace(EQUILIBRIA["transformer"], vocabulary=CLUSTERS))
    count = model.num_params
    optimizer = torch.optim.AdamW(model.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        twin = copy.deepcopy(model).to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    twin.load_state_dict(model.state_dict())
    assert twin.num_params == count
    table = twin.embedding.tables[1]
    tokens, targets = tokens_of(1, 4), tokens_of(1, 4)
    before = twin(tokens, None, targets).nll
    (gradient,) = torch.autograd.grad(before.sum(), [table])
    shift = torch.randn_like(table)
    with torch.no_grad():
        table += shift
    assert gradient.any()
    hidden = torch.randn(1, 4, 16, dtype=torch.float64)
    with_shift = twin.softmax.log_probs(hidden)
    with torch.no_grad():
        table -= shift
    assert not torch.allclose(with_shift, twin.softmax.log_probs(hidden))
    torch.testing.assert_close(twin.softmax.log_probs(hidden), model.double().softmax.log_probs(hidden))


def test_prediction_is_causal_across_segments() -> None:
    model, how, tokens = contractive_model(), exact(1e-11), tokens_of(2, 8)
    whole = model(tokens, how=how).logits
    first = model(tokens[:, :4], how=how)
    second = model(tokens[:, 4:], first.memory, how=how)
    halves = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(halves, whole, rtol=1e-7, atol=1e-7)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    torch.testing.assert_close(model(changed, how=how).logits[:, :5], whole[:, :5], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_networks_are_causal_and_carry_their_memory(name: str) -> None:
    model = LanguageModel(11, EXPLICIT[name]).double().eval()
    tokens = tokens_of(2, 9)
    whole = model(tokens).logits
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    torch.testing.assert_close(model(changed).logits[:, :5], whole[:, :5])
    first = model(tokens[:, :4])
    assert not any(part.requires_grad for part in torch.utils._pytree.tree_leaves(first.memory))
    second = model(tokens[:, 4:], first.memory)
    assert not torch.allclose(second.logits, model(tokens[:, 4:]).logits)
    if name in ("tcn", "lstm", "gru", "transformer_xl"):  # the others start each segment's stack from zero states
        torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), whole)


@pytest.mark.parametrize("config", [*EXPLICIT.values(), *EQUILIBRIA.values()], ids=[*EXPLICIT, *EQUILIBRIA])
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    model = LanguageModel(11, config)
    memory = model(tokens_of(2, 5)).memory
    model(tokens_of(2, 5), memory, tokens_of(2, 5)).nll.mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["tied_transformer", "tied_trellis", "transformer_xl"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(name: str) -> None:
    kept, gradients = [], []
    config = replace(EXPLICIT[name], depth=9)
    tokens, targets = tokens_of(2, 6), tokens_of(2, 6)
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(11, replace(config, checkpoint=checkpoint))
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(tokens, None, targets).nll.mean()
        kept.append(sum(sizes))
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.6 * kept[0]


def test_auxiliary_losses_are_those_of_earlier_layers() -> None:
    config = replace(EXPLICIT["tied_trellis"], depth=6, auxiliary_every=2)
    model = LanguageModel(11, config)
    tokens, targets = tokens_of(2, 5), tokens_of(2, 5)
    auxiliary = model(tokens, None, targets).auxiliary_nll
    expected = [model(tokens, None, targets, how=deepeq.Stack(depth=depth)).nll.mean() for depth in (2, 4)]
    torch.testing.assert_close(auxiliary, torch.stack(expected).mean())
    assert model.eval()(tokens, None, targets).auxiliary_nll is None


def test_memory_of_transformer_xl_is_what_each_layer_read() -> None:
    model = LanguageModel(11, EXPLICIT["transformer_xl"])
    assert isinstance(model.network, LayerStack)
    output = model(tokens_of(2, 4))
    assert len(output.memory) == 3
    x = model.embedding(tokens_of(2, 4))
    memory = model.network(x).memory
    torch.testing.assert_close(memory[0].z, x)
    cell = model.network.cells[0]
    torch.testing.assert_close(memory[1].z, cell(x, cell.inject(x)))


def test_memory_is_longer_in_evaluation_if_asked_to() -> None:
    model = LanguageModel(11, ModelConfig(layer=replace(TRANSFORMER, memory_len=2, eval_memory_len=5)))
    lengths = []
    for training in (True, False):
        model.train(training)
        memory = model(tokens_of(1, 4)).memory
        lengths.append(model(tokens_of(1, 4), memory).memory.z.shape[1])
    assert lengths == [2, 5]


def test_dropout_acts_in_training_alone() -> None:
    dropped = {"input_dropout": 0.3, "output_dropout": 0.3, "vocabulary": VocabularyConfig(embedding_dropout=0.3)}
    for name, value in dropped.items():
        model = contractive_model(**{name: value})
        tokens = tokens_of(2, 4)
        assert not torch.allclose(model(tokens).logits, model(tokens).logits), name
        model.eval()
        torch.testing.assert_close(model(tokens).logits, model(tokens).logits)


def test_jacobian_penalty_is_that_of_the_map_that_was_solved() -> None:
    model = contractive_model()
    tokens = tokens_of(2, 4)
    network = network_of(model)
    output = model(tokens, penalty_generator=torch.Generator().manual_seed(3))
    f, _ = prepare(network.cell, model.embedding(tokens))
    generator = torch.Generator().manual_seed(3)
    expected = deepeq.jacobian_penalty(f, output.solution.value, generator=generator)
    torch.testing.assert_close(output.jacobian_penalty, expected)
    assert model(tokens).jacobian_penalty is None
    pieces = deepeq.Pieces(equilibrium=deepeq.Equilibrium(), length=2)
    with pytest.raises(ValueError, match="the Jacobian penalty is of one map"):
        model(tokens, how=pieces, penalty_generator=torch.Generator().manual_seed(3))


def test_states_stay_wide_under_autocast_whatever_the_vocabulary() -> None:
    for vocabulary in (VocabularyConfig(), CLUSTERS):
        model = LanguageModel(11, replace(EQUILIBRIA["transformer"], vocabulary=vocabulary))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tokens_of(1, 4), None, tokens_of(1, 4))
        assert output.solution.value.dtype == output.memory.z.dtype == output.nll.dtype == torch.float32


def test_untrained_model_is_near_the_uniform_loss() -> None:
    model = LanguageModel(50, EQUILIBRIA["transformer"])
    tokens = torch.randint(50, (4, 16))
    assert abs(model(tokens, None, tokens.roll(1)).nll.mean().item() - math.log(50)) < 0.5


def test_recurrent_network_is_the_one_of_torch() -> None:
    model = LanguageModel(11, EXPLICIT["lstm"])
    assert isinstance(model.network, Recurrent)
    assert sum(isinstance(module, torch.nn.LSTM) for module in model.modules()) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": TCNConfig()}, "model.layer=TCNConfig is an explicit network"),
        ({"checkpoint": True}, "model.depth=0 is an equilibrium"),
        ({"layer": TRELLIS, "depth": 3, "tied": False}, "model.tied=False needs layer=TransformerConfig"),
        ({"depth": 3, "tied": False, "auxiliary_every": 1}, "model.auxiliary_every=1 needs tied=True"),
        ({"depth": -1}, "model.depth=-1 must be a whole number >= 0"),
        ({"depth": 1.5}, "model.depth=1.5 must be a whole number >= 0"),
        ({"depth": 4, "auxiliary_every": 4}, "model.auxiliary_every=4 must be < depth=4"),
        ({"input_dropout": 1.0}, r"model.input_dropout=1.0 must lie in \[0, 1\)"),
        ({"auxiliary_weight": 0.0}, "model.auxiliary_weight=0.0 must be > 0 and finite"),
    ],
)
def test_contradictions_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)
