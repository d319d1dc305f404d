"""``torch.compile`` gives the outputs, gradients and buffers of eager mode, in few graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from subjects import SUBJECTS, assert_close, buffers, build, gradients, inputs, score

# Parts of torch that its compiler, exporters and forward mode use themselves, and that it has deprecated.
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit")
functions_are_deprecated = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def assert_compiled_equals_eager(
    subject: str,
    training: bool,
    compiler: Callable[[nn.Module], nn.Module],
    sizes: list[tuple[int, int]],
    dtype: torch.dtype = torch.float64,
    **tolerances: float,
) -> None:
    """In outputs, gradients and buffers, for steps of two passes before one backward."""
    eager = build(subject, dtype).train(training)
    plain = copy.deepcopy(eager)
    compiled = compiler(plain)
    for step in sizes:
        batches = [inputs(subject, size, dtype) for size in step]
        expected, actual = ([module(*batch) for batch in batches] for module in (eager, compiled))
        assert_close(actual, expected, **tolerances)
        losses = (sum(score(y).sum() for y in outputs) for outputs in (expected, actual))
        expected, actual = (gradients(module, loss) for module, loss in zip((eager, plain), losses, strict=True))
        assert_close(actual, expected, **tolerances)
        assert_close(buffers(plain), buffers(eager), **tolerances)


@jit_is_deprecated
@functions_are_deprecated
@pytest.mark.parametrize(
    ("subject", "training"),
    [
        pytest.param(*case, marks=[] if case == ("spectral norm", True) else [pytest.mark.slow, pytest.mark.exhaustive])
        for case in [
            *((name, True) for name in SUBJECTS if name != "residual discriminator with classes"),
            *((name, False) for name in ("attention", "spectral norm", "generator")),
        ]
    ],
)
def test_compile(subject: str, training: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        compiled: Callable[..., object] = torch._dynamo.lookup_backend("aot_eager")(graph, examples)
        return compiled

    def compiler(module: nn.Module) -> nn.Module:
        return torch.compile(module, fullgraph=True, backend=backend)

    assert_compiled_equals_eager(subject, training, compiler, [(2, 3), (5, 2)])
    assert len(graphs) <= 2  # one for the first batch size, one for all others


@pytest.mark.slow
@pytest.mark.exhaustive  # the C++ compiler takes many seconds
@jit_is_deprecated
@functions_are_deprecated
@pytest.mark.parametrize(
    "subject",
    ["official attention", "attention in a sequence", "attention in a volume", "spectral norm", "discriminator"],
)
def test_compile_with_inductor(subject: str) -> None:
    torch._dynamo.reset()
    # In float32, since torch 2.5 writes C++ for softmax's backward in float64 that no compiler takes.
    compiler = partial(torch.compile, fullgraph=True)
    assert_compiled_equals_eager(subject, True, compiler, [(2, 2)], torch.float32, rtol=1e-4, atol=1e-5)
