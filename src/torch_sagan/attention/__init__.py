"""Self-attention: the layer, the equation, and the kernels that compute it without the attention matrix.

``layer`` calls ``equation``, which picks a kernel: ``tiles`` on the CPU, ``cuda`` on CUDA. ``second_derivative``
differentiates both twice.
"""
