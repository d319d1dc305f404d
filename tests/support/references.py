"""Oracles: the computations of the library, written again as plainly as possible.

Nothing here imports ``torch_sagan``. Numbers are float64, attention is three nested loops, sigma is an SVD.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Shapes = Mapping[str, tuple[int, ...]]


# --- attention ---------------------------------------------------------------------------------------------------


def attention_by_loops(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, E, N) and map (B, N, M) of query (B, D, N), key (B, D, M), value (B, E, M)."""
    q, k, v = (t.detach().double().numpy() for t in (query, key, value))
    batch, _, n_queries = q.shape
    n_keys, n_values = k.shape[2], v.shape[1]
    out = np.zeros((batch, n_values, n_queries))
    weights = np.zeros((batch, n_queries, n_keys))
    for b in range(batch):
        for j in range(n_queries):
            logits = [sum(q[b, :, j] * k[b, :, i]) for i in range(n_keys)]
            top = max(logits)
            exps = [np.exp(logit - top) for logit in logits]
            for i in range(n_keys):
                weights[b, j, i] = exps[i] / sum(exps)
                out[b, :, j] += weights[b, j, i] * v[b, :, i]
    return torch.from_numpy(out), torch.from_numpy(weights)


def max_pool_by_loops(x: Tensor, size: int) -> Tensor:
    """Maxima of the whole tiles of (B, C, …), ``size`` long in every direction; what is left over is dropped."""
    out = torch.zeros(*x.shape[:2], *(length // size for length in x.shape[2:]), dtype=x.dtype)
    for position in itertools.product(*map(range, out.shape[2:])):
        tile = x[(..., *(slice(at * size, (at + 1) * size) for at in position))]
        out[(..., *position)] = tile.flatten(2).amax(dim=2)
    return out


def one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of (B, C, …), written as a sum over channels."""
    out = torch.einsum("oc,bc...->bo...", weight.detach().double().flatten(1), x.double())
    return out if bias is None else out + bias.detach().double().view(-1, *[1] * (x.ndim - 2))


def self_attention_by_loops(x: Tensor, weights: Mapping[str, Tensor], pool: int = 1) -> tuple[Tensor, Tensor]:
    """y (B, C, …) and the attention map (B, N, M) of the layer; ``weights`` has the layer's state-dict names."""

    def project(name: str, features: Tensor) -> Tensor:
        return one_by_one(features, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    x = x.detach().double()
    query = project("query", x)
    key, value = (max_pool_by_loops(project(name, x), pool) for name in ("key", "value"))
    attended, attention = attention_by_loops(query.flatten(2), key.flatten(2), value.flatten(2))
    out = attended.unflatten(2, x.shape[2:])
    if "out.weight" in weights:
        out = project("out", out)
    return weights["gamma"].detach().double() * out + x, attention


def l2_self_attention_by_loops(x: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same of the layer whose logits are negative squared distances, all from the features of one projection."""
    x = x.detach().double()
    features = one_by_one(x, weights["query.weight"], weights.get("query.bias"))
    value = one_by_one(features, weights["value.weight"], weights.get("value.bias")).flatten(2).numpy()
    g = features.flatten(2).numpy()
    batch, _, positions = g.shape
    attention = np.zeros((batch, positions, positions))
    attended = np.zeros((batch, value.shape[1], positions))
    for b in range(batch):
        for j in range(positions):
            distances = [sum((g[b, :, i] - g[b, :, j]) ** 2) for i in range(positions)]
            exps = [np.exp(-distance) for distance in distances]  # that to itself is 0, so the sum is at least 1
            for i in range(positions):
                attention[b, j, i] = exps[i] / sum(exps)
                attended[b, :, j] += attention[b, j, i] * value[b, :, i]
    out = torch.from_numpy(attended).unflatten(2, x.shape[2:])
    if "out.weight" in weights:
        out = one_by_one(out, weights["out.weight"], weights.get("out.bias"))
    return weights["gamma"].detach().double() * out + x, torch.from_numpy(attention)


# --- spectral norm -----------------------------------------------------------------------------------------------


def as_matrix(weight: Tensor, dim: int = 0) -> Tensor:
    """The weight as a matrix: dimension ``dim`` gives the rows, all others the columns."""
    return weight.detach().movedim(dim, 0).reshape(weight.shape[dim], -1)


def largest_singular_value(weight: Tensor, dim: int = 0) -> float:
    return float(np.linalg.svd(as_matrix(weight, dim).double().numpy(), compute_uv=False)[0])


def power_iteration_by_numpy(matrix: Tensor, u: Tensor, v: Tensor, n_iterations: int = 1) -> tuple[Tensor, Tensor]:
    """v = normalize(Wᵀu), u = normalize(Wv), repeated; ``v`` is there only to have the library's signature."""
    w, left = matrix.detach().double().numpy(), u.double().numpy()
    right = v.double().numpy()
    for _ in range(n_iterations):
        right = w.T @ left
        right = right / np.sqrt(np.sum(right**2))
        left = w @ right
        left = left / np.sqrt(np.sum(left**2))
    return torch.from_numpy(left), torch.from_numpy(right)


def spectral_gradient(grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, dim: int = 0) -> Tensor:
    """dL/dW from G = dL/d(W / sigma), for fixed u and v: (G - <G, W/sigma> u vᵀ) / sigma."""
    matrix, g = as_matrix(weight, dim), as_matrix(grad, dim)
    sigma = u @ matrix @ v
    out = (g - (g * matrix / sigma).sum() * torch.outer(u, v)) / sigma
    rest = [size for axis, size in enumerate(weight.shape) if axis != dim]
    return out.reshape(weight.shape[dim], *rest).movedim(0, dim)


# --- the PyTorch reference's networks and weights ------------------------------------------------------------------


def rand(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of one state-dict entry, a function of its name alone."""
    n = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.long)
    if last in ("gamma", "sigma"):
        n = np.full(shape, 0.5)
    elif last in ("weight_u", "weight_v"):
        n = n / np.sqrt(np.sum(n**2))
    elif last in ("running_var", "stored_var"):
        n = 1 + 0.1 * abs(n)
    elif last in ("running_mean", "stored_mean", "bias"):
        n = 0.1 * n
    elif len(shape) == 1:
        n = 1 + 0.1 * n
    else:
        n = 0.05 * n
    return torch.from_numpy(np.asarray(n))


def filled(shapes: Shapes) -> dict[str, Tensor]:
    return {name: fill(name, shape) for name, shape in shapes.items()}


def filled_with_settled_vectors(shapes: Shapes, prefix: str) -> dict[str, Tensor]:
    """Weights filled from prefix + name, each weight_u and weight_v after thirty power iterations on weight_orig."""
    weights = {name: fill(f"{prefix}{name}", shape) for name, shape in shapes.items()}
    for name in shapes:
        if name.endswith("weight_u"):
            v_name, matrix = f"{name[:-1]}v", as_matrix(weights[f"{name[:-1]}orig"])
            weights[name], weights[v_name] = power_iteration_by_numpy(matrix, weights[name], weights[v_name], 30)
    return weights


def stored_shapes(arrays: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    """A whole state dict in its order: names and shapes, each of them JSON, or arrays of such."""
    names, shapes = (json.loads(str(arrays[f"{prefix}/{what}"])) for what in ("names", "shapes"))
    return {name: tuple(shape) for name, shape in zip(names, shapes, strict=True)}


def attention_shapes(channels: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    inner = channels // 8
    return {
        f"{prefix}gamma": (1,),
        f"{prefix}query_conv.weight": (inner, channels, 1, 1),
        f"{prefix}query_conv.bias": (inner,),
        f"{prefix}key_conv.weight": (inner, channels, 1, 1),
        f"{prefix}key_conv.bias": (inner,),
        f"{prefix}value_conv.weight": (channels, channels, 1, 1),
        f"{prefix}value_conv.bias": (channels,),
    }


def official_attention_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    return {
        "gamma": (),
        "theta.weight": (channels // 8, channels, 1, 1),
        "phi.weight": (channels // 8, channels, 1, 1),
        "g.weight": (channels // 2, channels, 1, 1),
        "o.weight": (channels, channels // 2, 1, 1),
    }


def _normalized_shapes(prefix: str, weight: tuple[int, ...], bias: int) -> dict[str, tuple[int, ...]]:
    """A wrapped layer of the reference, which unfolds along dimension 0 whatever the layer is."""
    return {
        f"{prefix}.0.module.bias": (bias,),
        f"{prefix}.0.module.weight_bar": weight,
        f"{prefix}.0.module.weight_u": weight[:1],
        f"{prefix}.0.module.weight_v": (int(np.prod(weight[1:])),),
    }


def generator_shapes() -> dict[str, tuple[int, ...]]:
    """State dict of the reference's 64-pixel generator."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths = [128, 512, 256, 128, 64]
    for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        shapes |= _normalized_shapes(f"l{index}", (before, after, 4, 4), after)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"l{index}.1.{entry}"] = (after,)
        shapes[f"l{index}.1.num_batches_tracked"] = ()
    shapes |= {"last.0.weight": (64, 3, 4, 4), "last.0.bias": (3,)}
    return shapes | attention_shapes(128, "attn1.") | attention_shapes(64, "attn2.")


def discriminator_shapes() -> dict[str, tuple[int, ...]]:
    """State dict of the reference's 64-pixel discriminator."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths = [3, 64, 128, 256, 512]
    for index, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        shapes |= _normalized_shapes(f"l{index}", (after, before, 4, 4), after)
    shapes |= {"last.0.weight": (1, 512, 4, 4), "last.0.bias": (1,)}
    return shapes | attention_shapes(256, "attn1.") | attention_shapes(512, "attn2.")


def with_after(weights: Mapping[str, Tensor], arrays: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """``weights`` with every u and v as they were after the reference's forward pass."""
    prefix = f"{network}/after/"
    after = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if not after or not after.keys() <= weights.keys():
        raise ValueError(f"the stored u and v of the {network} do not match its state dict: {sorted(after)}")
    return {**weights, **after}


def assert_all_close(pairs: Iterable[tuple[str, Tensor, Tensor]], atol: float) -> None:
    """Every named pair is equal to ``atol``; the error names the pair."""
    for name, actual, expected in pairs:
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=atol, check_dtype=False, msg=lambda text, n=name: f"{n}: {text}"
        )
