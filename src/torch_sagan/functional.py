"""Pure functions: attention over positions, and the power iteration behind spectral normalization.

No modules and no state. Everything here works on plain tensors, so that the mathematics can be read and tested alone.
"""

from torch_sagan.attention.equation import attention, attention_map, l2_as_dot_product
from torch_sagan.attention.sdpa import scaled_dot_product_attention
from torch_sagan.spectral.iteration import power_iteration, spectral_normalize

__all__ = [
    "attention",
    "attention_map",
    "l2_as_dot_product",
    "power_iteration",
    "scaled_dot_product_attention",
    "spectral_normalize",
]
