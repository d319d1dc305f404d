"""Load weights of other implementations into this library's modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn

from torch_sagan._checks import one_of
from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.blocks import FirstResidualDownBlock, LatentBlock
from torch_sagan.networks.discriminator import SAGANDiscriminator
from torch_sagan.networks.generator import SAGANGenerator

__all__ = ["load_reference_state_dict"]

# Our names -> theirs: parts of a name, replaced one after the other.
REFERENCE = {
    "to_image.": "last.0.",
    "to_logit.conv.": "last.0.",
    ".conv.": ".0.module.",
    ".norm.": ".1.",
    "query.": "query_conv.",
    "key.": "key_conv.",
    "value.": "value_conv.",
    "parametrizations.weight.original": "weight_bar",
    "parametrizations.weight.0._": "weight_",
}
BIGGAN = {
    "query.": "theta.",
    "key.": "phi.",
    "value.": "g.",
    "out.": "o.",
    "parametrizations.weight.original": "weight",
    "parametrizations.weight.0._u": "u0",
    "parametrizations.weight.0._v": "u0",  # which v follows from
}
MMGENERATION = {
    "noise2feat.linear.": "noise2feat.",
    "norm1.gamma": "norm_1.weight_embedding.weight",
    "norm1.beta": "norm_1.bias_embedding.weight",
    "norm2.gamma": "norm_2.weight_embedding.weight",
    "norm2.beta": "norm_2.bias_embedding.weight",
    "norm1.": "norm_1.",
    "norm2.": "norm_2.",
    "conv1.": "conv_1.conv.",
    "conv2.": "conv_2.conv.",
    "shortcut.": "shortcut.conv.",
    "query.": "theta.conv.",
    "key.": "phi.conv.",
    "value.": "g.conv.",
    "out.": "o.conv.",
    "to_image.0.": "to_rgb.bn.",
    "to_image.2.": "to_rgb.conv.",
    "parametrizations.weight.original": "weight_orig",
    "parametrizations.weight.0._": "weight_",
}

# What other files are: patterns, each of which matches all of one of their keys or more. The first entry counts.
# Names that several implementations share are described and not attributed.
KINDS: dict[tuple[str, ...], str] = {
    ("state_dict",): "a whole checkpoint: give its entry 'state_dict'",
    ("generator", "discriminator"): "a checkpoint of torch-sagan's trainer: its 'generator' and 'discriminator' are "
    "state dicts for load_state_dict",
    (r"(generator(_ema)?\.)?noise2feat\..*",): "mmgeneration's generator, for "
    "SAGANGenerator(..., architecture='resnet')",
    (r"(discriminator\.)?from_rgb\.(conv_[12]|shortcut)\..*",): "mmgeneration's discriminator, for "
    "SAGANDiscriminator(..., architecture='resnet')",
    (r"l1\.0\.module\..*", r"l1\.1\..*"): "the PyTorch reference's generator, for SAGANGenerator(64)",
    (r"l1\.0\.module\..*",): "the PyTorch reference's discriminator, for SAGANDiscriminator(64)",
    (r"(query|key|value)_conv\.(weight|bias)", "gamma"): "the PyTorch reference's attention, for SelfAttention2d(C)",
    (r"(theta|phi)\.(weight|u0)", r"o\.weight", "gamma"): "BigGAN-PyTorch's attention, for SelfAttention2d.official(C)",
    (r".*\.u0", r".*\.sv0"): "a whole network of BigGAN-PyTorch, whose attention alone can be loaded",
    (r"(.*\.)?conv1x1_(theta|phi)\.weight(_orig)?",): "PyTorch-StudioGAN's attention, alone or in a network, which "
    "cannot be loaded here",
    (r"blocks\.\d+\.(conv|linear).*", r"to_(image|logit)\..*"): "a network of torch-sagan itself, for load_state_dict",
    (r"(query|key|value)\.(weight|parametrizations\.weight\.original)", "gamma"): "an attention layer of torch-sagan "
    "itself, for load_state_dict, or of another implementation with the same names, whose outputs may differ",
    (r".*_orig", r".*_[uv]"): "a model under PyTorch's older spectral norm, for convert_legacy_spectral_norm",
}
CONV1D = "an attention of one-dimensional convolutions, as fastai's: docs/migrating.md copies such weights"
SHOWN = 5


def load_reference_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, channel_order: Literal["bgr", "rgb"] | None = None
) -> None:
    """Load weights of other implementations into ours, with the same outputs in evaluation.

    ========================================================  =========================================================
    model                                                     state dict
    ========================================================  =========================================================
    ``SAGANGenerator(128, ..., architecture="resnet")``       mmgeneration's ``SNGANGenerator``
    ``SAGANDiscriminator(128, ..., architecture="resnet")``   mmgeneration's ``ProjDiscriminator``
    ``SAGANGenerator(64, ...)``                               the PyTorch reference's generator
                                                              (heykeetae/Self-Attention-GAN)
    ``SAGANDiscriminator(64, ...)``                           the PyTorch reference's discriminator
    ``SelfAttention2d(C)``                                    the PyTorch reference's ``Self_Attn``
    ``SelfAttention2d.official(C)``                           BigGAN-PyTorch's ``Attention``:
                                                              ``theta, phi, g, o, gamma``
    ========================================================  =========================================================

    **mmgeneration** has its attention at 64 pixels, so build both networks with ``attention_resolutions=(64,)``. Of the
    three networks of a published file the generator is taken from ``generator_ema.``, its moving average, or else from
    ``generator.``, and the discriminator from ``discriminator.``; names without these prefixes are accepted as well.
    The :doc:`guide </pretrained>` has a table of all names.

    **The PyTorch reference** normalizes every weight along dimension 0, transposed convolutions too. Build its networks
    with ``spectral_norm=functools.partial(spectral_norm, dim=0)``.

    **BigGAN-PyTorch's** block may come with the buffers of its spectral norm (``theta.u0``, ``theta.sv0``, ...). Where
    our projections are spectrally normalized too (:func:`apply_spectral_norm`), u is taken from them and v follows from
    it; where they are not, the weights are divided by the sigma that u gives, so that the output is the same.

    A ``module.`` before every key (DataParallel) is dropped.

    Args:
        model: one of the models above. Nothing is loaded unless everything fits.
        state_dict: the other implementation's weights.
        channel_order: the order of the channels in the images of mmgeneration's networks. Its published files have
            ``"bgr"`` (blue, green, red), the default, which is turned into red, green, blue; ``"rgb"`` stays as it is.

    Raises:
        TypeError: for a model of another kind, or when ``state_dict`` is not a mapping.
        ValueError: when the state dict does not fit; the message says what it seems to be, and how many keys are
            missing, unexpected or of another shape, with the first five. Also for a ``channel_order`` with weights of
            another implementation.

    >>> import torch
    >>> from torch_sagan import SelfAttention2d, load_reference_state_dict
    >>> attention = SelfAttention2d(64)
    >>> weights = torch.load("attention.pt", weights_only=True)  # doctest: +SKIP
    >>> load_reference_state_dict(attention, weights)  # doctest: +SKIP
    """
    if not isinstance(model, SAGANGenerator | SAGANDiscriminator | SelfAttention2d):
        name = type(model).__name__
        raise TypeError(f"expected a SAGANGenerator, a SAGANDiscriminator or a SelfAttention2d, got {name}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected a state dict, got {type(state_dict).__name__}")
    if channel_order is not None:
        one_of(("bgr", "rgb"), channel_order=channel_order)
        if not _is_residual(model):
            raise ValueError("channel_order is for mmgeneration's networks, architecture='resnet'; leave it out here")
    kind = _kind(state_dict)
    if not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"expected a state dict of names and tensors; this resembles {kind}")

    state = dict(state_dict)
    if all(key.startswith("module.") for key in state):
        state = _below("module.", state)
    if _is_residual(model):
        state = _one_network(model, state)
        _check_attention_resolutions(model, state)
    names, targets = _names(model), model.state_dict()
    converted = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    if isinstance(model, SelfAttention2d) and not isinstance(model.out, nn.Identity):
        _resolve_biggan_buffers(model, state, converted)

    # load_state_dict would load what fits before it raises, and name our keys instead of those in the file.
    expected = dict.fromkeys(names.values())
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes: dict[str, str] = {}
    for ours, value in converted.items():
        if value.shape != targets[ours].shape and not value.numel() == targets[ours].numel() == 1:  # gamma
            shapes.setdefault(
                names[ours], f"{names[ours]} {tuple(value.shape)} instead of {tuple(targets[ours].shape)}"
            )
    if missing or unexpected or shapes:
        differences = {"missing": missing, "unexpected": unexpected, "of another shape": list(shapes.values())}
        raise ValueError(
            f"the state dict does not fit {type(model).__name__}: it resembles {kind}; {_summary(differences)}"
        )

    if _is_residual(model):
        _add_one_to_scales(converted)
        if channel_order != "rgb":
            _reverse_channels(model, converted)
    model.load_state_dict({ours: value.view_as(targets[ours]) for ours, value in converted.items()})


def _is_residual(model: nn.Module) -> TypeGuard[SAGANGenerator | SAGANDiscriminator]:
    networks, first_blocks = (SAGANGenerator, SAGANDiscriminator), (LatentBlock, FirstResidualDownBlock)
    return isinstance(model, networks) and isinstance(model.blocks[0], first_blocks)


def _kind(state_dict: Mapping[str, object]) -> str:
    entries = {key.removeprefix("module."): value for key, value in state_dict.items()}
    queries = [value for key, value in entries.items() if re.fullmatch(r"(.*\.)?query\.weight(_orig)?", key)]
    if any(isinstance(value, Tensor) and value.ndim == 3 for value in queries):
        return CONV1D
    for patterns, kind in KINDS.items():
        if all(any(re.fullmatch(pattern, key) for key in entries) for pattern in patterns):
            return kind
    return "no weights that this function knows"


def _summary(differences: Mapping[str, list[str]]) -> str:
    """How many keys differ, and the first of them."""
    count = sum(map(len, differences.values()))
    first = [(what, key) for what, keys in differences.items() for key in keys][:SHOWN]
    shown = [f"{what}: {', '.join(key for _, key in group)}" for what, group in groupby(first, itemgetter(0))]
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return f"{count} {'key differs' if count == 1 else 'keys differ'}, {'; '.join(shown)}{more}"


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries with this prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# Names.


def _names(model: SAGANGenerator | SAGANDiscriminator | SelfAttention2d) -> dict[str, str]:
    """Our key -> the other implementation's."""
    prefixes: dict[str, str] = {}
    if isinstance(model, SelfAttention2d):
        parts = REFERENCE if isinstance(model.out, nn.Identity) else BIGGAN
    elif _is_residual(model):
        parts, prefixes = MMGENERATION, _mmgeneration_prefixes(model)
    else:
        parts = REFERENCE
        prefixes = {f"blocks.{i}.": f"l{i + 1}." for i in range(len(model.blocks))}
        prefixes |= {f"attention.{size}.": f"attn{i + 1}." for i, size in enumerate(model.attention)}
    names = {}
    for ours in model.state_dict():
        prefix = next((prefix for prefix in prefixes if ours.startswith(prefix)), "")
        theirs = prefixes.get(prefix, "") + ours.removeprefix(prefix)
        for part, replacement in parts.items():
            theirs = theirs.replace(part, replacement)
        names[ours] = theirs
    return names


def _mmgeneration_prefixes(model: SAGANGenerator | SAGANDiscriminator) -> dict[str, str]:
    """Its ``conv_blocks`` count our blocks but the first, the attention behind any of them, and the head's block."""
    stack = []
    for i, size in enumerate(model.sizes):
        stack.append(f"blocks.{i}.")
        if str(size) in model.attention:
            stack.append(f"attention.{size}.")
    return {
        "to_logit.projection.linear.": "decision.",
        "to_logit.projection.embedding.": "proj_y.",
        stack[0]: _first_block(model),
        **{ours: f"conv_blocks.{i}." for i, ours in enumerate([*stack[1:], "to_logit."])},
    }


def _first_block(model: SAGANGenerator | SAGANDiscriminator) -> str:
    return "noise2feat." if isinstance(model, SAGANGenerator) else "from_rgb."


# mmgeneration's values.


def _one_network(model: SAGANGenerator | SAGANDiscriminator, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network that matches the model, of the three in a published file."""
    prefixes = ("generator_ema.", "generator.") if isinstance(model, SAGANGenerator) else ("discriminator.",)
    return next((below for prefix in prefixes if (below := _below(prefix, state))), state)


def _check_attention_resolutions(model: SAGANGenerator | SAGANDiscriminator, state: Mapping[str, Tensor]) -> None:
    """Attention elsewhere shifts the numbers of all later blocks, so it is reported before any key."""
    positions = sorted(int(match[1]) for key in state if (match := re.fullmatch(r"conv_blocks\.(\d+)\.gamma", key)))
    # Before attention at ``sizes[i]`` come i blocks, and the attention at earlier sizes.
    indices = [position - i for i, position in enumerate(positions)]
    same_kind = any(key.startswith(_first_block(model)) for key in state)
    if not same_kind or not indices or max(indices) >= len(model.sizes):
        return  # then the keys themselves are reported
    theirs, ours = [model.sizes[i] for i in indices], [int(size) for size in model.attention]
    if theirs != ours:
        raise ValueError(
            f"the state dict has attention at {theirs} pixels, this {type(model).__name__} at {ours}: build it with "
            f"attention_resolutions={tuple(theirs)}"
        )


def _add_one_to_scales(converted: dict[str, Tensor]) -> None:
    for key, value in converted.items():
        if key.endswith(("norm1.gamma", "norm2.gamma")):
            converted[key] = 1 + value


def _reverse_channels(model: SAGANGenerator | SAGANDiscriminator, converted: dict[str, Tensor]) -> None:
    """Blue, green, red into red, green, blue, where images leave the generator and enter the discriminator."""
    if isinstance(model, SAGANGenerator):
        rows = ("bias", "parametrizations.weight.original", "parametrizations.weight.0._u")
        converted |= {key: converted[key].flip(0) for key in (f"to_image.2.{row}" for row in rows)}
        return
    for layer in ("blocks.0.conv1", "blocks.0.shortcut"):
        weight, v = f"{layer}.parametrizations.weight.original", f"{layer}.parametrizations.weight.0._v"
        channels = converted[weight].shape[1]
        converted[weight] = converted[weight].flip(1)  # (out, channels, k, k)
        converted[v] = converted[v].unflatten(0, (channels, -1)).flip(0).flatten()  # (channels · k · k,)


# BigGAN-PyTorch's values.


def _resolve_biggan_buffers(layer: SelfAttention2d, state: dict[str, Tensor], converted: dict[str, Tensor]) -> None:
    """``theta.u0`` into u and v, or into the weight. Entries without a key of ours are removed from ``state``.

    Its u0 is (1, h). Its evaluation computes v = uW / |uW| and sigma = v Wᵀ u' with u' = vWᵀ / |vWᵀ|.
    """
    for ours, theirs in (("query", "theta"), ("key", "phi"), ("value", "g"), ("out", "o")):
        normalized = hasattr(getattr(layer, ours), "parametrizations")
        u, weight = state.get(f"{theirs}.u0"), state.get(f"{theirs}.weight")
        if normalized or u is not None:
            state.pop(f"{theirs}.sv0", None)  # the last sigma, which follows from u0
        if u is None or weight is None or weight.ndim != 4 or u.numel() != len(weight):
            continue  # what is missing, or of another shape, is reported by its own name
        matrix = weight.flatten(1)  # (h, w)
        v = nn.functional.normalize(matrix.mT @ u.flatten(), dim=0)  # (w,)
        image = matrix @ v  # (h,)
        if normalized:
            converted[f"{ours}.parametrizations.weight.0._u"] = nn.functional.normalize(image, dim=0)
            converted[f"{ours}.parametrizations.weight.0._v"] = v
        else:
            converted[f"{ours}.weight"] = weight / torch.linalg.vector_norm(image)
            del state[f"{theirs}.u0"]
