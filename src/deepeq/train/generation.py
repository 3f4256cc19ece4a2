"""Text from a model: one solve for each new position, for many texts side by side."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from deepeq.models import LanguageModel, join_memories
from deepeq.solution import Solution


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from a prediction.

    Raises:
        ValueError: a field is out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that have this probability together, at this temperature."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be >= 0 and finite; 0 takes the likeliest token")
        _check_count("top_k", self.top_k, least=0)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]; 1 samples among all tokens")

    def choose(self, log_probs: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """A token for each row of `(B, V)`, drawn by a generator of its own.

        Raises:
            FloatingPointError: a prediction is no number.
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
        """What each token is drawn with, for a temperature above 0, `(B, V)` in float64."""
        logits = log_probs.double()
        if 0 < self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        # Measured from the largest and in float64, so that a tiny temperature does not overflow.
        probabilities = torch.softmax((logits - logits.amax(dim=1, keepdim=True)) / self.temperature, dim=1)
        if self.top_p < 1.0:
            ordered, tokens = probabilities.sort(dim=1, descending=True)
            beyond = ordered.cumsum(dim=1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(beyond.gather(1, tokens.argsort(dim=1)), 0.0)
        return probabilities


class Decoding:
    """Texts side by side that grow by a token at a time, and what the model expects next.

    What came before is in the memory: a new token costs one solve at one position, whose equilibrium does not depend
    on what follows. A model without memory solves for the last `segment_len` tokens instead.

    Args:
        model: In the mode, and with the core, to decode with.
        tokens: The texts so far, `(B, N)`, at least one token each.
        segment_len: Positions of them that are solved together.
        memory_len: Positions to remember; None for as many as in evaluation, 0 for none.

    Raises:
        ValueError: the model cannot choose how many positions it remembers.
    """

    log_probs: Tensor  # (B, V)
    solution: Solution | None  # of the last solve, where equilibria are solved for

    def __init__(
        self, model: LanguageModel, tokens: Tensor, *, segment_len: int = 64, memory_len: int | None = None
    ) -> None:
        self._model, self._segment_len = model, segment_len
        self._memory = start_memory(model, len(tokens), memory_len)
        self._window = tokens.to(model.device)
        if memory_len != 0:
            for segment in self._window.split(segment_len, dim=1):
                self._memory = self._predict(segment)
        if self._memory is None:
            self._window = self._window[:, -segment_len:]
            self._predict(self._window)

    def advance(self, tokens: Sequence[int]) -> None:
        """Append a token to each text."""
        new = torch.tensor(tokens, device=self._window.device).unsqueeze(1)  # (B, 1)
        if self._memory is None:
            self._window = torch.cat([self._window, new], dim=1)[:, -self._segment_len :]
            self._predict(self._window)
        else:
            self._memory = self._predict(new)

    def _predict(self, tokens: Tensor) -> Any:
        output = self._model.predict(tokens, self._memory)
        assert output.logits is not None
        self.log_probs, self.solution = output.logits[:, -1], output.solution
        return output.memory

    @classmethod
    def join(cls, parts: Sequence["Decoding"]) -> "Decoding | None":
        """All texts of several in one, in their order; None where their memories have different lengths."""
        memory = join_memories([part._memory for part in parts])
        if memory is None:
            return None
        joined = copy.copy(parts[0])
        joined._memory, joined.solution = memory, None
        joined.log_probs = torch.cat([part.log_probs for part in parts])
        return joined


def start_memory(model: LanguageModel, batch_size: int, memory_len: int | None) -> Any:
    """The memory to read the first segment of texts with.

    Raises:
        ValueError: the model cannot choose how many positions it remembers.
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
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    segment_len: int = 64,
    memory_len: int | None = None,
    seed: int = 0,
) -> Iterator[list[int]]:
    """Sample tokens that continue each of the prompts `(N,)`: an item is the next token of each.

    A prompt's text does not depend on its batch mates, up to rounding: each is drawn with random numbers of its own.
    Prompts of equal length are read together. Until the iterator ends, normalized weights are computed only once, so
    that no model may be trained in between.

    Args:
        model: A model in the mode, and with the core, to sample with.
        prompts: Token ids, at least one each.
        num_tokens: Number of tokens to sample for each.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among so many of the likeliest tokens; 0 for all.
        top_p: Sample among the fewest likeliest tokens that have this probability together; 1 for all.
        segment_len: Positions of the prompts that are solved together; a model without memory sees so many.
        memory_len: Positions to remember; None for as many as in evaluation, 0 to solve for the last `segment_len`
            positions anew at each token.
        seed: Of the random numbers.

    Raises:
        ValueError: there is no prompt, one of them is empty or has an unknown id, or an argument is out of range.
        FloatingPointError: while sampling, a prediction is no number.
        ConvergenceError: while sampling, an equilibrium is not finite.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _check_count("num_tokens", num_tokens, least=0)
    _check_count("segment_len", segment_len, least=1)
    _check_count("seed", seed, least=0)
    _check_prompts(prompts, model.embedding.vocab_size)
    if memory_len is not None:
        _check_count("memory_len", memory_len, least=0)
        start_memory(model, 1, memory_len)
    return _generate(model, prompts, num_tokens, sampling, segment_len, memory_len, seed)


def _generate(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    num_tokens: int,
    sampling: Sampling,
    segment_len: int,
    memory_len: int | None,
    seed: int,
) -> Iterator[list[int]]:
    generators, tokens, groups = _generators(seed, len(prompts)), [0] * len(prompts), []
    with parametrize.cached():
        for position in range(num_tokens):
            # Inference mode must not reach the caller, who goes on between two tokens.
            with torch.inference_mode():
                if position == 0:
                    groups = _read(model, prompts, segment_len, memory_len)
                for decoding, members in groups:
                    if position:
                        decoding.advance([tokens[member] for member in members])
                    chosen = sampling.choose(decoding.log_probs, [generators[member] for member in members])
                    for member, token in zip(members, chosen, strict=True):
                        tokens[member] = token
            yield list(tokens)


def _read(
    model: LanguageModel, prompts: Sequence[Tensor], segment_len: int, memory_len: int | None
) -> list[tuple[Decoding, list[int]]]:
    """The prompts in as few groups as can be, each with the places of its members."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    groups = [
        (
            Decoding(
                model,
                torch.stack([prompts[place] for place in places]).long(),
                segment_len=segment_len,
                memory_len=memory_len,
            ),
            places,
        )
        for places in by_length.values()
    ]
    joined = Decoding.join([decoding for decoding, _ in groups])
    return groups if joined is None else [(joined, [place for _, places in groups for place in places])]


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """A generator for each text, the same ones whatever their number."""
    seeds = torch.Generator().manual_seed(seed)
    return [torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=seeds))) for _ in range(count)]


def _check_count(name: str, value: int, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{name}={value!r} must be a whole number >= {least}")


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
            raise ValueError(f"{which} has ids outside 0 .. {vocab_size - 1}, those that the model knows")
