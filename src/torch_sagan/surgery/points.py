"""Where attention can be inserted into a model, and what it would cost there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.flop_counter import FlopCounterMode

from torch_sagan.attention import cuda, tiles
from torch_sagan.attention.equation import SMALL_MATRIX
from torch_sagan.attention.layer import SelfAttention
from torch_sagan.surgery.example_pass import ExampleInput, outputs_of_a_pass
from torch_sagan.surgery.feature_maps import FeatureMap, check_certain, feature_maps
from torch_sagan.surgery.insert import check_insertable, check_target

__all__ = ["InsertionPoint", "InsertionPoints", "insertion_points"]


class InsertionPoint(NamedTuple):
    """A module after which attention can be inserted, and the costs of a layer there.

    Attributes:
        path: the module's dotted path, for :func:`insert_self_attention`.
        type: the name of its class.
        channels: C of the feature map that it returns.
        size: that of the feature map, (L,), (H, W) or (D, H, W); the largest, if its calls return several.
        calls: how often it runs in one pass.
        operations: floating-point operations of the layer's forward passes; a multiplication and its addition
            count as two, as in :class:`torch.utils.flop_counter.FlopCounterMode`.
        memory: the most bytes that a training step needs for the layer, with this library's attention.
        plain_memory: the same with the plain attention equation, which materializes the attention matrix.
    """

    path: str
    type: str
    channels: int
    size: tuple[int, ...]
    calls: int
    operations: int
    memory: int
    plain_memory: int


class InsertionPoints(list[InsertionPoint]):
    """A list of :class:`InsertionPoint`, in the order of execution. ``str`` makes a table of it.

    Attributes:
        operations: floating-point operations of the model's own forward pass.
        memory: bytes that the model's own forward pass keeps for the backward pass, without the parameters.
        refused: for each other module that ran, why it is not an insertion point.
    """

    def __init__(
        self, points: Iterable[InsertionPoint], operations: int, memory: int, refused: Iterable[str] = ()
    ) -> None:
        super().__init__(points)
        self.operations = operations
        self.memory = memory
        self.refused: list[str] = list(refused)

    def __str__(self) -> str:
        if not self:
            shown, more = self.refused[:5], len(self.refused) - 5
            return "\n  ".join(["no insertion points", *shown, *([f"and {more} more"] if more > 0 else [])])
        rows = [("path", "module", "channels", "size", "calls", "operations", "", "memory, here", "memory, plain")]
        for point in self:
            share = f"+{point.operations / self.operations:.0%}" if self.operations else ""
            size = "x".join(map(str, point.size))
            where = (point.path, point.type, str(point.channels), size, str(point.calls))
            rows.append(
                (*where, _operations(point.operations), share, _bytes(point.memory), _bytes(point.plain_memory))
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}" for i, (cell, width) in enumerate(cells))
            for cells in (zip(row, widths, strict=True) for row in rows)
        ]
        model = f"{_operations(self.operations)} operations, keeps {_bytes(self.memory)} for its backward pass"
        return "\n".join([*lines, f"the model itself: {model}"])


def insertion_points(model: nn.Module, example_input: ExampleInput) -> InsertionPoints:
    r"""Every module after which :func:`insert_self_attention` can put attention, with the costs of a layer there.

    These are the modules that return a feature map, always of the same dimension and with the same number of channels:
    (B, C, H, W), (B, C, D, H, W), or (B, C, L) where that function is certain of it. Modules inside an attention layer
    or a parametrization are left out. The example is passed through the model once, in evaluation mode, and leaves
    modes, buffers, hooks and the random states of PyTorch, NumPy and Python as they were. Costs are proportional to the
    batch of the example, so give it the size that you train with.

    For B maps with N positions, C channels of the value and D = C // 8 of query and key, a layer takes

    .. math::
        2 B N C (2 D + C) + 2 B N^2 (D + C)

    operations in a forward pass, and about twice as many in a backward pass. Memory is the most that the forward and
    the backward pass of the layer need beyond its input and the gradient of its output, as PyTorch's allocator counts
    it; a process can take a third more, because the C library's allocator keeps some. The memory given here is

    - what is kept for the backward pass: query, key, value, the result of the attention and the layer's output. The
      plain equation also keeps one attention matrix (B, N, N).
    - what the backward pass makes. In the plain equation these are three attention matrices. In this library they are
      the gradients, the factors of the logits and, on the CPU, tiles and copies for each thread.

    Args:
        model: any module that :func:`insert_self_attention` takes.
        example_input: what the model can be called with: a tensor, a tuple of arguments or a mapping of keyword
            arguments.

    Returns:
        The insertion points, in the order in which the modules first return. Print them for a table, or if there are
        none, for what the modules return instead.

    Raises:
        ValueError: for a model that is compiled or wrapped for parallel training.
        TypeError: when ``example_input`` is neither a tensor nor a tuple nor a mapping.

    >>> import torch
    >>> from torch import nn
    >>> from torch_sagan import insert_self_attention, insertion_points
    >>> model = nn.Sequential(
    ...     nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1)
    ... )
    >>> x = torch.randn(16, 3, 64, 64)
    >>> points = insertion_points(model, x)
    >>> [(point.path, point.channels, point.size) for point in points]
    [('0', 32, (32, 32)), ('1', 32, (32, 32)), ('2', 64, (16, 16))]
    >>> model = insert_self_attention(model, points[1].path, example_input=x)
    """
    check_insertable(model)
    modules = _candidates(model)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.enable_grad(),
        FlopCounterMode(display=False) as counter,
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outputs = outputs_of_a_pass(model, modules, example_input)

    points, refused = [], []
    for path, returned in outputs.items():
        try:
            maps = feature_maps(path, returned)
            for map in maps:
                check_certain(path, map)
            points.append(_insertion_point(path, type(modules[path]).__name__, maps))
        except ValueError as error:
            refused.append(str(error))
    return InsertionPoints(points, counter.get_total_flops(), sum(kept.values()), refused)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules after which a layer may be inserted, as far as is known before they return something."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, SelfAttention):
            inside |= set(module.modules()) - {module}
        if isinstance(module, ParametrizationList):  # where a tensor (B, C, H, W) is a weight
            inside |= set(module.modules())
    candidates = {}
    for path, module in model.named_modules():
        if path and module not in inside:
            with suppress(ValueError):
                check_target(path, module)
                candidates[path] = module
    return candidates


def _insertion_point(path: str, kind: str, maps: list[FeatureMap]) -> InsertionPoint:
    channels = maps[0].channels
    costs = [
        _costs(map.shape[0], channels, map.size.numel(), map.dtype.itemsize, map.device.type == "cpu") for map in maps
    ]
    largest = max(maps, key=lambda map: map.size.numel())
    return InsertionPoint(
        path,
        kind,
        channels,
        tuple(largest.size),
        len(maps),
        sum(cost.operations for cost in costs),
        # Every call keeps what its backward pass needs; the backward passes run one after the other.
        sum(cost.kept for cost in costs) + max(cost.backward for cost in costs),
        sum(cost.plain_kept for cost in costs) + max(cost.plain_backward for cost in costs),
    )


class _Costs(NamedTuple):
    """Of one call of a layer: operations, and bytes kept for the backward pass and added in it."""

    operations: int
    kept: int
    backward: int
    plain_kept: int
    plain_backward: int


def _costs(batch: int, channels: int, positions: int, itemsize: int, on_cpu: bool) -> _Costs:
    b, c, n = batch, channels, positions
    d = max(1, c // 8)
    operations = 2 * b * n * c * (2 * d + c) + 2 * b * n * n * (d + c)
    features = itemsize * b * n * (2 * d + 3 * c)  # query, key; value, attention's result, the layer's output
    matrix = itemsize * b * n * n
    # The softmax's backward makes its gradient contiguous: gradient of the weights, its copy, gradient of the logits.
    plain = features + matrix, 3 * matrix
    if on_cpu and b * n * n <= SMALL_MATRIX["cpu"]:
        return _Costs(operations, *plain, *plain)
    backward = (tiles if on_cpu else cuda).backward_bytes(b, d, c, n, n, itemsize)
    return _Costs(operations, features, backward, *plain)


def _operations(count: int) -> str:
    return _readable(count, 1000, ("", "k", "M", "G", "T", "P"))


def _bytes(count: int) -> str:
    return _readable(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _readable(value: float, step: int, units: tuple[str, ...]) -> str:
    scale = min(len(units) - 1, int(math.log(value, step)) if value >= 1 else 0)
    value /= step**scale
    return f"{value:.{0 if value >= 10 else 1}f} {units[scale]}".rstrip()
