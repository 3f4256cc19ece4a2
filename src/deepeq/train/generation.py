"""Text from a model."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepeq.models import LanguageModel


def generate(
    model: LanguageModel,
    prompt: Tensor,
    *,
    num_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    segment_len: int = 64,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Sample tokens that continue a prompt `(N,)`, one at a time.

    Each token costs one solve at one position: what came before is in the memory, whose equilibria do not depend on
    what follows. The prompt is read in segments.

    Args:
        model: A model whose `core` is the one to sample with.
        prompt: Token ids, at least one.
        num_tokens: Number of tokens to sample.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample among the likeliest `top_k`; 0 for all.
        segment_len: Positions of the prompt that are solved together.
        generator: Source of randomness.

    Raises:
        ValueError: the prompt is empty, or an argument is out of range.
    """
    if prompt.numel() == 0:
        raise ValueError("the prompt is empty; give at least one token")
    if num_tokens < 0 or temperature < 0.0 or top_k < 0 or segment_len < 1:
        raise ValueError(
            f"num_tokens={num_tokens!r}, temperature={temperature!r} and top_k={top_k!r} must be >= 0, "
            f"and segment_len={segment_len!r} >= 1"
        )
    return _sample(model, prompt, num_tokens, temperature, top_k, segment_len, generator)


def _sample(
    model: LanguageModel,
    prompt: Tensor,
    num_tokens: int,
    temperature: float,
    top_k: int,
    segment_len: int,
    generator: torch.Generator | None,
) -> Iterator[int]:
    device, memory, logits = model.embedding.device, None, None
    with torch.no_grad():
        for segment in prompt.split(segment_len):
            logits, memory, _ = model(segment.unsqueeze(0).to(device), memory)
    for index in range(num_tokens):
        assert logits is not None
        token = _choose(logits[0, -1].float(), temperature, top_k, generator)
        yield token
        if index + 1 < num_tokens:
            with torch.no_grad():
                logits, memory, _ = model(torch.tensor([[token]], device=device), memory)


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = torch.softmax(logits / temperature, dim=0).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
