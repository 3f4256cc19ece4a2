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

    Each token costs one solve at one position: what came before is in the memory, as far as `memory_len` reaches, and
    its equilibria do not depend on what follows. The prompt is read in segments. A model without memory solves for its
    last `segment_len` tokens instead.

    Args:
        model: A model in the mode, and with the core, to sample with.
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
    device, memory = model.device, None
    *earlier, tokens = prompt.unsqueeze(0).to(device).split(segment_len, dim=1)  # (1, T) each
    for segment in earlier:
        with torch.no_grad():
            memory = model(segment, memory).memory
    for _ in range(num_tokens):
        with torch.no_grad():
            output = model(tokens, memory)
        memory = output.memory
        token = _choose(output.logits[0, -1], temperature, top_k, generator)
        yield token
        new = torch.tensor([[token]], device=device)
        tokens = new if memory is not None else torch.cat([tokens, new], dim=1)[:, -segment_len:]


def _choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None) -> int:
    logits = logits.double()
    if temperature == 0.0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # Measured from the largest and in float64, so that a tiny temperature does not overflow.
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
