"""Text from a model: one solve per new position, for many texts side by side."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from deepeq.checks import check_count
from deepeq.deq import How
from deepeq.models.language_model import LanguageModel
from deepeq.models.networks import join_memories
from deepeq.solution import Solution


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from a prediction.

    Raises:
        ValueError: A field is out of range.
    """

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Number of likeliest tokens to sample among; 0 for all."""
    top_p: float = 1.0
    """Probability, at this temperature, that the fewest likeliest tokens to sample among must have together."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be >= 0 and finite; 0 takes the likeliest token")
        check_count("top_k", self.top_k, least=0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]; 1 samples among all tokens")

    def choose(self, log_probs: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """Return one token for each row of `(B, V)`, drawn with the generator of that row.

        Raises:
            FloatingPointError: A prediction is not a number.
        """
        if bool(log_probs.isnan().any()):
            raise FloatingPointError("the model predicts nan; its parameters are damaged")
        if self.temperature == 0.0:
            return log_probs.argmax(dim=1).tolist()
        probabilities = self.probabilities(log_probs).cpu()
        return [
            int(torch.multinomial(row, 1, generator=generator))
            for row, generator in zip(probabilities, generators, strict=True)
        ]

    def probabilities(self, log_probs: Tensor) -> Tensor:
        """Return the probability of each token, for a temperature above 0, `(B, V)` in float64."""
        logits = log_probs.double()
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        # Relative to the largest and in float64, so that a tiny temperature does not overflow.
        probabilities = torch.softmax((logits - logits.amax(dim=1, keepdim=True)) / self.temperature, dim=1)
        if self.top_p < 1.0:
            ordered, tokens = probabilities.sort(dim=1, descending=True)
            beyond = ordered.cumsum(dim=1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(beyond.gather(1, tokens.argsort(dim=1)), 0.0)
        return probabilities


class Decoding:
    """Texts side by side that grow by one token at a time, and the prediction of their next tokens.

    The memory holds the earlier positions, so a new token costs one solve at one position. A model without memory
    solves for the last `segment_len` tokens instead.

    Args:
        model: The model, in the mode to decode in.
        tokens: The texts so far, `(B, N)`, at least one token each.
        how: How the cell is solved; None for the model's own way.
        segment_len: Number of positions of the texts that are solved together.
        memory_len: Number of positions to remember; None for as many as in evaluation, 0 for none.

    Attributes:
        log_probs: Prediction of the next token, `(B, V)`.
        solution: The last solve; None for a network without a tied cell.

    Raises:
        ValueError: The model cannot choose how many positions it remembers.
    """

    log_probs: Tensor
    solution: Solution | None

    def __init__(
        self,
        model: LanguageModel,
        tokens: Tensor,
        *,
        how: How | None = None,
        segment_len: int = 64,
        memory_len: int | None = None,
    ) -> None:
        self._model, self._how, self._segment_len = model, how, segment_len
        self._memory = start_memory(model, len(tokens), memory_len)
        self._tokens = tokens.to(model.device)
        if memory_len != 0:
            for segment in self._tokens.split(segment_len, dim=1):
                self._memory = self._predict(segment)
        if self._memory is None:
            self._tokens = self._tokens[:, -segment_len:]
            self._predict(self._tokens)

    def advance(self, tokens: Sequence[int]) -> None:
        """Append one token to each text."""
        new = torch.tensor(tokens, device=self._tokens.device).unsqueeze(1)  # (B, 1)
        if self._memory is None:
            self._tokens = torch.cat([self._tokens, new], dim=1)[:, -self._segment_len :]
            self._predict(self._tokens)
        else:
            self._memory = self._predict(new)

    def _predict(self, tokens: Tensor) -> Any:
        output = self._model.predict(tokens, self._memory, how=self._how)
        assert output.logits is not None
        self.log_probs, self.solution = output.logits[:, -1], output.solution
        return output.memory

    @classmethod
    def join(cls, parts: Sequence["Decoding"]) -> "Decoding | None":
        """Return the texts of several decodings as one, in their order; None where their memories differ in length."""
        memory = join_memories([part._memory for part in parts])
        if memory is None:
            return None
        joined = copy.copy(parts[0])
        joined._memory, joined.solution = memory, None
        joined.log_probs = torch.cat([part.log_probs for part in parts])
        return joined


def start_memory(model: LanguageModel, batch_size: int, memory_len: int | None) -> Any:
    """Return the memory to read the first segment of texts with.

    Args:
        model: The model.
        batch_size: Number of texts.
        memory_len: Number of positions to remember; None for as many as in evaluation, 0 for none.

    Raises:
        ValueError: The model cannot choose how many positions it remembers.
    """
    memory = None if memory_len == 0 else model.start_memory(batch_size, length=memory_len)
    if memory_len and memory is None:
        raise ValueError(
            f"memory_len={memory_len!r} must be left out, or 0, for this model: only a Transformer that is an "
            "equilibrium or a tied stack, with window > 1, chooses how many positions it remembers"
        )
    return memory


def generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    *,
    how: How | None = None,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    segment_len: int = 64,
    memory_len: int | None = None,
    seed: int = 0,
) -> Iterator[list[int]]:
    """Sample tokens that continue each prompt, and yield the next token of every prompt.

    The text of a prompt does not depend on its batch mates, up to rounding, because each prompt has its own random
    numbers. Prompts of equal length are read together. Normalized weights are computed once until the iterator ends, so
    no model may be trained in between.

    Args:
        model: The model, in the mode to sample in.
        prompts: Token ids `(N,)` of each prompt, at least one.
        how: How the cell is solved; None for the model's own way.
        num_tokens: Number of tokens to sample for each prompt.
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_k: Number of likeliest tokens to sample among; 0 for all.
        top_p: Probability that the fewest likeliest tokens to sample among must have together; 1 for all tokens.
        segment_len: Number of positions of the prompts that are solved together. A model without memory sees that many.
        memory_len: Number of positions to remember; None for as many as in evaluation, 0 to solve for the last
            `segment_len` positions again at each token.
        seed: Seed of the random numbers.

    Raises:
        ValueError: There is no prompt, a prompt is empty or has an unknown id, or an argument is out of range.
        FloatingPointError: While sampling, a prediction is not a number.
        ConvergenceError: While sampling, an equilibrium is not finite.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_count("num_tokens", num_tokens, least=0)
    check_count("segment_len", segment_len, least=1)
    check_count("seed", seed, least=0)
    if seed >= 2**63:
        raise ValueError(f"seed={seed!r} must be < 2^63")
    _check_prompts(prompts, model.embedding.vocab_size)
    if memory_len is not None:
        check_count("memory_len", memory_len, least=0)
        start_memory(model, 1, memory_len)  # only for its error, before the iterator is returned
    settings = {"how": how, "segment_len": segment_len, "memory_len": memory_len}
    return _generate(model, prompts, num_tokens, sampling, seed, settings)


def _generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    settings: dict[str, Any],
) -> Iterator[list[int]]:
    generators, tokens, groups = _generators(seed, len(prompts)), [0] * len(prompts), []
    with parametrize.cached():
        for position in range(num_tokens):
            # Inference mode must not reach the caller, whose code runs between two tokens.
            with torch.inference_mode():
                if position == 0:
                    groups = _read(model, prompts, settings)
                for decoding, members in groups:
                    if position:
                        decoding.advance([tokens[member] for member in members])
                    chosen = sampling.choose(decoding.log_probs, [generators[member] for member in members])
                    for member, token in zip(members, chosen, strict=True):
                        tokens[member] = token
            yield list(tokens)


def _read(
    model: LanguageModel, prompts: Sequence[Tensor], settings: dict[str, Any]
) -> list[tuple[Decoding, list[int]]]:
    """Return the prompts in as few groups as possible, each with the places of its members."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    groups = [
        (Decoding(model, torch.stack([prompts[place] for place in places]).long(), **settings), places)
        for places in by_length.values()
    ]
    joined = Decoding.join([decoding for decoding, _ in groups])
    return groups if joined is None else [(joined, [place for _, places in groups for place in places])]


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """Return a generator for each text; the first ones do not depend on the number of texts."""
    seeds = torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeds))) for _ in range(count)]


def _check_prompts(prompts: Sequence[Tensor], vocab_size: int) -> None:
    if len(prompts) == 0:
        raise ValueError("there is no prompt; give at least one")
    for number, prompt in enumerate(prompts, start=1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number} of {len(prompts)}"
        if prompt.ndim != 1 or prompt.is_floating_point():
            raise ValueError(f"{which} must be ids (N,), got {prompt.dtype} of shape {tuple(prompt.shape)}")
        if len(prompt) == 0:
            raise ValueError(f"{which} is empty; give at least one token")
        if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocab_size:
            raise ValueError(f"{which} has ids outside 0 .. {vocab_size - 1}, which are the ids that the model knows")
