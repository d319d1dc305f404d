"""How far an input can move what a model computes from it: Lipschitz constants that follow the data through a pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from torch_sagan.attention.layer import SelfAttention
from torch_sagan.spectral.convolution_bounds import ROUNDING, Convolution, Padding, norm_of_matrix
from torch_sagan.spectral.layer_map import spatial_dims

__all__ = ["DataFlow", "LinearCall"]

# Operators that move no two points apart: their constant is 1.
NONEXPANSIVE = {
    "abs", "alias", "clamp", "clamp_min", "clone", "constant_pad_nd", "cos", "detach", "hardtanh", "neg",
    "permute", "relu", "select", "sin", "slice", "split", "split_with_sizes", "squeeze", "t", "tanh", "transpose",
    "unbind", "unsqueeze", "view", "_reshape_alias", "_to_copy", "_unsafe_view",
}  # fmt: skip
# The largest slope of an activation, rounded up.
SLOPES = {"sigmoid": 0.25, "gelu": 1.13, "silu": 1.1}
PADS = {"constant_pad_nd": "constant"} | {
    f"{kind}_pad{dims}d": mode
    for kind, mode in (("reflection", "reflect"), ("replication", "replicate"))
    for dims in (1, 2, 3)
}


class LinearCall(NamedTuple):
    """One linear map of a pass."""

    path: str
    layer: str
    input_shape: tuple[int, ...]
    map: Convolution | Tensor  # or a matrix
    upper: float


class _Running(NamedTuple):
    """A module whose forward pass runs."""

    path: str
    module: nn.Module
    inputs: tuple[Any, ...]
    constants: list[float]  # of the inputs
    reasons: dict[str, None]  # that were there
    reads_values: bool  # that were read by then


class DataFlow(TorchDispatchMode):
    """Sees every operator of a pass, and keeps for each tensor a Lipschitz constant as a function of the inputs.

    A tensor that does not depend on them has 0, one without a bound infinity. Parameters, buffers and what is computed
    from them alone are constants. A tensor that comes from nowhere, as from NumPy, has no bound.
    """

    def __init__(self, model: nn.Module, dense_up_to: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model: nn.Module = model
        self.dense_up_to: int = dense_up_to
        self.calls: list[LinearCall] = []
        self.reasons: dict[str, None] = {}
        self.reads_values: bool = False
        self.running: list[_Running] = []
        # Tensors by identity, kept alive so that no other gets their place.
        self.known: dict[int, tuple[Tensor, float]] = {}
        self.padded: dict[int, tuple[Tensor, Padding]] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> DataFlow:
        for path, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True, prepend=True))
            self.handles.append(module.register_forward_hook(self._leave))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def bound(self, output: object) -> float:
        """The constant of what the model returned."""
        found = [self.constant(tensor) for tensor in _tensors(output)]
        return math.inf if self.reads_values else math.hypot(*found)

    # ------------------------------------------------------------------------------------------------------- modules

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self.model:
                self._begin(list(_tensors([args, kwargs])))
            constants = [self.constant(tensor) for tensor in _tensors(args)]
            self.running.append(_Running(path, module, args, constants, dict(self.reasons), self.reads_values))

        return enter

    def _begin(self, inputs: list[Tensor]) -> None:
        for tensor in _own_tensors(self.model):
            self.known[id(tensor)] = tensor, 0.0
        # Beside an image, a class is a constant; but integers alone are what a model is a function of.
        integers = 0.0 if any(tensor.is_floating_point() for tensor in inputs) else math.inf
        for tensor in inputs:
            self.known[id(tensor)] = tensor, 1.0 if tensor.is_floating_point() else integers

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        running = self.running.pop()
        if isinstance(module, SelfAttention) and running.constants and 0 < running.constants[0] < math.inf:
            self.reasons, self.reads_values = running.reasons, running.reads_values
            factor = self._of_attention(module, running)
            for tensor in _tensors(output):
                self.known[id(tensor)] = tensor, factor * running.constants[0] if factor else math.inf

    def _of_attention(self, layer: SelfAttention, running: _Running) -> float | None:
        """K of the layer, or None with a reason."""
        gamma = abs(float(layer.gamma.detach().double()))
        if gamma == 0:
            return 1.0
        if layer.similarity != "l2":
            self._because(running.path, 'attention by dot products has no Lipschitz constant; that of "l2" has')
            return None
        norms = 1.0
        for name in ("query", "value", "out"):
            if isinstance(getattr(layer, name), nn.Identity):
                continue
            path = f"{running.path}.{name}".lstrip(".")
            calls = [call for call in self.calls if call.path == path]
            if len(calls) != 1:
                self._because(path, f"a projection that is no single linear map ({len(calls)} were called)")
                return None
            norms *= calls[0].upper
        return 1 + gamma * norms * l2_attention_constant(math.prod(running.inputs[0].shape[2:]))

    # ----------------------------------------------------------------------------------------------------- operators

    def constant(self, value: object) -> float:
        """Of a tensor; of anything else it is 0."""
        if not isinstance(value, Tensor):
            return 0.0
        if id(value) not in self.known:
            self._because(self._path(), "a tensor whose origin is not known")
            self.known[id(value)] = value, math.inf
        return self.known[id(value)][1]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.running:  # before the pass and after it
            return operator(*args, **kwargs)
        operands = list(_tensors([args, kwargs]))
        constants = [self.constant(operand) for operand in operands]
        result = operator(*args, **kwargs)
        outputs = list(_tensors(result))
        schema = operator._schema
        name, mutable = schema.name.split("::")[1], schema.is_mutable
        if not any(constants):
            bound: float | None = 0.0
        elif math.inf in constants and name not in ("convolution", "mm", "addmm"):
            bound = math.inf
            if any(c and not operand.is_floating_point() for c, operand in zip(constants, operands, strict=True)):
                self._because(self._path(), "integers that depend on the input")
        else:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            known = name.endswith("_") or not mutable
            bound = self._bound(name.removesuffix("_") if mutable else name, given, outputs) if known else None
            if bound is None:
                self._because(self._path(), f"{schema.name.replace('::', '.')} has no known bound")
        if any(constants) and not outputs:
            self.reads_values = True
            self._because(self._path(), "the pass depends on a value, so other inputs may take another way")
        bound = math.inf if bound is None else bound
        if mutable and any(constants):
            self._change_aliases(operands[0], bound)
        for output in outputs:
            self.known[id(output)] = output, bound if output.is_floating_point() or not bound else math.inf
        return result

    def _change_aliases(self, changed: Tensor, bound: float) -> None:
        """What shares memory with a tensor that was written to may now consist of old and new values."""
        place = changed.untyped_storage()._cdata
        for key, (tensor, before) in self.known.items():
            if tensor.untyped_storage()._cdata == place:
                self.known[key] = tensor, math.hypot(before, bound)

    def _bound(self, name: str, given: dict[str, Any], outputs: list[Tensor]) -> float | None:
        """The constant of an operator's results, or None."""
        x: Any = given.get("self", given.get("input"))
        size = outputs[0].numel() if outputs else 0

        def of(value: object) -> float:
            """The constant, with the copies that broadcasting makes."""
            copies = size / value.numel() if isinstance(value, Tensor) and value.numel() else 1.0
            return self.constant(value) * math.sqrt(max(copies, 1.0))

        if name in PADS:
            self.padded[id(outputs[0])] = x, Padding(PADS[name], tuple(given.get("pad") or given["padding"]))
        if name in NONEXPANSIVE and not (name == "view" and "dtype" in given):
            return self.constant(x)
        if name in SLOPES:
            return SLOPES[name] * self.constant(x)
        match name:
            case "convolution":
                return self._convolution(given)
            case "addmm":
                return self._product(given["mat1"], given["mat2"], scale=abs(given.get("alpha", 1))) + of(x)
            case "mm":
                return self._product(x, given["mat2"])
            case "leaky_relu":
                return max(1.0, abs(given.get("negative_slope", 0.01))) * self.constant(x)
            case "add" | "sub":
                return of(x) + abs(given.get("alpha", 1)) * of(given["other"])
            case "mul":
                return _product_of(x, given["other"], of)
            case "addcmul":
                product = _product_of(given["tensor1"], given["tensor2"], of)
                return None if product is None else of(x) + abs(given.get("value", 1)) * product
            case "div" if self.constant(given["other"]) == 0 and "rounding_mode" not in given:
                other = given["other"]
                least = float(other.abs().min()) if isinstance(other, Tensor) else abs(other)
                return of(x) / least if least else None
            case "expand" | "copy":
                return of(given.get("src", x))
            case "cat" | "stack":
                return math.hypot(*map(self.constant, given["tensors"]))
            case "sum" | "mean":
                count = x.numel() / size  # of values that become one
                return self.constant(x) * (math.sqrt(count) if name == "sum" else 1 / math.sqrt(count))
            case "native_batch_norm" | "cudnn_batch_norm" | "_native_batch_norm_legit_no_training":
                return None if given.get("training") else self.constant(x) * _batch_norm(given)
            case "avg_pool1d" | "avg_pool2d" | "avg_pool3d":
                factor = _average_pooling(given, x.ndim - 2)
                return None if factor is None else factor * self.constant(x)
            case "max_pool1d" | "max_pool2d_with_indices" | "max_pool3d_with_indices":
                return self.constant(x) * _max_pooling(given)
            case "upsample_nearest1d" | "upsample_nearest2d" | "upsample_nearest3d":
                copies = [-(-m // n) for n, m in zip(x.shape[2:], outputs[0].shape[2:], strict=True)]
                return self.constant(x) * math.sqrt(math.prod(copies))
        return None

    # -------------------------------------------------------------------------------------------------- linear layers

    def _convolution(self, given: dict[str, Any]) -> float | None:
        x, weight = given["input"], given["weight"]
        if self.constant(weight) or self.constant(given.get("bias")):
            return None
        x, before = self._before(x, given)
        fields = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        settings: Any = {name: tuple(v) if isinstance(v := given[name], list | tuple) else v for name in fields}
        convolution = Convolution(_in_float64(weight, self._path()), tuple(x.shape[1:]), **settings, before=before)
        return self._record(x, convolution, convolution.upper(self.dense_up_to))

    def _before(self, x: Tensor, given: dict[str, Any]) -> tuple[Tensor, Padding | None]:
        """The feature map that was padded for this convolution, and how; or x itself."""
        unpadded = not any(given["padding"])
        if id(x) in self.padded:
            source, padding = self.padded[id(x)]
            spatial = len(padding.amounts) <= 2 * (x.ndim - 2) and min(padding.amounts) >= 0
            if spatial and (unpadded or padding.mode == "constant"):
                return source, padding
        _, module, inputs, *_ = self.running[-1]
        if unpadded and spatial_dims(module) and getattr(module, "padding_mode", "") == "circular":
            # PyTorch pads by copies of parts.
            padding = Padding("circular", tuple(module._reversed_padding_repeated_twice))  # type: ignore[arg-type]
            (source,) = inputs
            if source.ndim == x.ndim and nn.functional.pad(source, padding.amounts, "circular").equal(x):
                return source, padding
        return x, None

    def _product(self, x: Tensor, matrix: Tensor, *, scale: float = 1.0) -> float:
        """Of x (B, n) and a constant matrix (n, m)."""
        if self.constant(matrix):
            self._because(self._path(), "a product of two tensors that both depend on the input")
            return math.inf
        exact = _in_float64(matrix, self._path())
        return self._record(x, exact, scale * norm_of_matrix(exact) * (1 + ROUNDING))

    def _record(self, x: Tensor, linear: Convolution | Tensor, upper: float) -> float:
        """The constant of the image of x."""
        running = self.running[-1]
        layer = _class_of(running.module).__name__
        self.calls.append(LinearCall(running.path, layer, tuple(x.shape[1:]), linear, upper))
        return self.constant(x) * upper if upper else 0.0

    def _path(self) -> str:
        return self.running[-1].path if self.running else ""

    def _because(self, path: str, reason: str) -> None:
        self.reasons[f"{path}: {reason}" if path else reason] = None


def l2_attention_constant(positions: int) -> float:
    """√N (4 c + 1) with c exp(c + 1) = N - 1, for N positions."""
    low, high = 0.0, math.log(positions) + 1  # of an increasing function
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * math.exp(middle + 1) > positions - 1 else (middle, high)
    return math.sqrt(positions) * (4 * high + 1)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Without the class that PyTorch gives to a parametrized module."""
    kind = type(module)
    return kind.__mro__[1] if parametrize.is_parametrized(module) else kind


def _own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    for module in model.modules():
        yield from _tensors([module._parameters, module._buffers, vars(module)])


def _in_float64(weight: Tensor, path: str) -> Tensor:
    if weight.is_complex():
        raise TypeError(f"{path}: expected real weights, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError(f"{path}: a weight holds infinities or NaN")
    # Some devices have no float64.
    return weight.detach().to("cuda" if weight.is_cuda else "cpu").to(torch.float64, copy=True)


def _product_of(first: Any, second: Any, of: Any) -> float | None:
    """The constant of a product of which one factor is constant."""
    if of(first) and of(second):
        return None
    constant, other = (first, second) if not of(first) else (second, first)
    largest = float(constant.abs().max()) if isinstance(constant, Tensor) else abs(constant)
    return largest * float(of(other))


def _batch_norm(given: dict[str, Any]) -> float:
    scale = 1 / (given["running_var"].double() + given.get("eps", given.get("epsilon"))).sqrt()
    return float((scale if given["weight"] is None else scale * given["weight"].double()).abs().max())


def _average_pooling(given: dict[str, Any], dims: int) -> float | None:
    """By the largest sums of rows, 1, and of columns: the root of their product is no less than the norm."""
    if given.get("ceil_mode") or given.get("divisor_override"):
        return None
    if any(given.get("padding", [0])) and not given.get("count_include_pad", True):
        return None
    kernel = _for_each(given["kernel_size"], dims)
    stride = _for_each(given.get("stride") or kernel, dims)
    return math.sqrt(math.prod(-(-k // s) / k for k, s in zip(kernel, stride, strict=True)))


def _max_pooling(given: dict[str, Any]) -> float:
    """The root of the number of windows that a value is in."""
    kernel = list(given["kernel_size"])
    stride = given.get("stride") or kernel
    kernel, stride = (_for_each(sizes, max(len(kernel), len(stride))) for sizes in (kernel, stride))
    dilated = any(d != 1 for d in given.get("dilation", [1]))
    return math.sqrt(math.prod(k if dilated else -(-k // s) for k, s in zip(kernel, stride, strict=True)))


def _for_each(sizes: Any, dims: int) -> list[int]:
    return list(sizes) * dims if len(sizes) == 1 else list(sizes)
