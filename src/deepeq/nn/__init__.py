"""Network parts that know nothing of solvers."""

from deepeq.nn.relative_attention import causal_mask, relative_attention, relative_shift, sinusoidal_positions

__all__ = ["causal_mask", "relative_attention", "relative_shift", "sinusoidal_positions"]
