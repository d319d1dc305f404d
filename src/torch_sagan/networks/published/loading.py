"""Load weights of other implementations, into a network that is built for them, or into one that is there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, TypeVar, overload

from torch import Tensor, nn

from torch_sagan._checks import one_of
from torch_sagan.attention.layer import SelfAttention2d
from torch_sagan.networks.blocks import FirstResidualDownBlock, LatentBlock, ResidualHead
from torch_sagan.networks.discriminator import SAGANDiscriminator
from torch_sagan.networks.generator import SAGANGenerator
from torch_sagan.networks.published import attention, mmgeneration
from torch_sagan.networks.published.biggan import BIGGAN
from torch_sagan.networks.published.dialect import Dialect, Kind, Network
from torch_sagan.networks.published.files import describe, read, state_dict_of
from torch_sagan.networks.published.mmgeneration import MMGENERATION
from torch_sagan.networks.published.reference import REFERENCE
from torch_sagan.networks.published.studiogan import STUDIOGAN, STUDIOGAN_2021

__all__ = ["load_published", "load_reference_state_dict"]

Model = SAGANGenerator | SAGANDiscriminator | SelfAttention2d
M = TypeVar("M", bound=Model)

DIALECTS: tuple[Dialect, ...] = (REFERENCE, MMGENERATION, STUDIOGAN_2021, STUDIOGAN, BIGGAN)
# The names that files of mmgeneration have where its ReLU works in place, and where images are red, green, blue.
IN_PLACE, CONVERTED = "wReLUinplace", "convert-studio"
SHOWN = 5


@overload
def load_published(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    network: Literal["generator"] = "generator",
    averaged: bool = True,
    channel_order: Literal["bgr", "rgb"] | None = None,
    norm_eps: float | None = None,
) -> SAGANGenerator: ...


@overload
def load_published(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    network: Literal["discriminator"],
    channel_order: Literal["bgr", "rgb"] | None = None,
    shortcut_after_relu: bool | None = None,
) -> SAGANDiscriminator: ...


@overload
def load_published(
    source: str | os.PathLike[str] | Mapping[str, object],
    into: M,
    *,
    averaged: bool = True,
    channel_order: Literal["bgr", "rgb"] | None = None,
) -> M: ...


def load_published(
    source: str | os.PathLike[str] | Mapping[str, object],
    into: Model | None = None,
    *,
    network: Kind | None = None,
    averaged: bool = True,
    channel_order: Literal["bgr", "rgb"] | None = None,
    norm_eps: float | None = None,
    shortcut_after_relu: bool | None = None,
) -> Model:
    """Load a published SAGAN or SNGAN of another framework: the network that its weights need, in evaluation mode.

    ==========================================  =====================================================================
    framework                                   what loads
    ==========================================  =====================================================================
    mmgeneration                                generators and discriminators of its SAGAN and SNGAN-projection files
    PyTorch-StudioGAN                           those of SAGAN and SNGAN, at 32, 64 and 128 pixels
    BigGAN-PyTorch                              those that its ``launch_SAGAN`` scripts train; its attention layer
    heykeetae/Self-Attention-GAN                generator, discriminator, attention layer
    ==========================================  =====================================================================

    With the same outputs in evaluation; the :doc:`guide </pretrained>` lists the files, and what was tested. Generators
    take z and labels, and return images in red, green, blue from -1 to 1, whatever the framework's order is.
    ``generator.card`` says what the file was.

    A file does not tell everything. What batch norms add to the variance is taken from the framework's configurations.
    For mmgeneration the file's name tells whether its ReLU works in place (``wReLUinplace``), and whether it was
    converted from PyTorch-StudioGAN, in red, green, blue (``convert-studio-rgb``). Where a state dict is given, or the
    file has another name, say it with the arguments.

    Args:
        source: a path, which is read with ``weights_only=True`` or as safetensors; or a state dict; or a checkpoint
            that has one under ``"state_dict"``. A ``module.`` before every key (DataParallel) is dropped.
        into: a network, or a :class:`SelfAttention2d`, to fill instead of building one. Its mode stays as it is, and
            nothing is loaded unless everything fits. ``SelfAttention2d(C)`` takes the weights of the PyTorch
            reference's layer, ``SelfAttention2d.official(C)`` those of the other three, with or without the vectors of
            their spectral norm: where our projections are plain, weights are divided by sigma. Build networks for the
            PyTorch reference with ``spectral_norm=functools.partial(spectral_norm, dim=0)``.
        network: ``"generator"``, the default, or ``"discriminator"``.
        averaged: of mmgeneration's files that have two generators, take the moving average.
        channel_order: the order in mmgeneration's images, ``"bgr"`` or ``"rgb"``.
        norm_eps: what the generator's batch norms add to the variance.
        shortcut_after_relu: whether the discriminator's ReLU works in place (see :class:`SAGANDiscriminator`).

    Returns:
        the network that was built, in evaluation mode, or ``into``.

    Raises:
        TypeError: for a source or a model of another kind.
        ValueError: when the file cannot be read, or its weights do not fit; the message says what they seem to be, and
            how many keys are missing, unexpected or of another shape, with the first five. Also for arguments that the
            weights have no use for.
        FileNotFoundError: when there is no such file.
        RuntimeError: for a path, with a PyTorch before 2.6, which a file can make run code all the same.
        ModuleNotFoundError: for a ``.safetensors`` file where that package is not installed.

    >>> import torch
    >>> from torch_sagan import load_published
    >>> generator = load_published("sagan.pth")  # doctest: +SKIP
    >>> images = generator(torch.randn(4, 128), torch.tensor([207] * 4))  # doctest: +SKIP
    """
    _check_arguments(into, network, channel_order, norm_eps, shortcut_after_relu)
    file = Path(source).name if isinstance(source, str | os.PathLike) else ""
    if not isinstance(source, str | os.PathLike | Mapping):
        raise TypeError(f"expected a path or a state dict, got {type(source).__name__}")
    state = state_dict_of(source if isinstance(source, Mapping) else read(source))
    if isinstance(into, SelfAttention2d):
        names = attention.names(into, state)
        values = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
        if not isinstance(into.out, nn.Identity):
            attention.resolve_buffers(into, state, values)
        _fill(into, state, names, values)
        return into

    kind: Kind = network or ("discriminator" if isinstance(into, SAGANDiscriminator) else "generator")
    state, prefix = _one_network(kind, state, averaged=averaged)
    dialect = next((dialect for dialect in DIALECTS if dialect.kind(state) == kind), None)
    if channel_order is not None and dialect not in (MMGENERATION, None):
        raise ValueError(f"channel_order is for mmgeneration's networks; this resembles {describe(state)}")
    model: Network
    if into is not None:
        dialect = _dialect_of(into, dialect, kind, state, file)
        model = into
    else:
        if dialect is None:
            raise ValueError(f"expected a published {kind}; this resembles {describe(state)}")
        model = _built(dialect, kind, state, file, norm_eps, shortcut_after_relu)

    names = dialect.names(model)
    values = dialect.values(state, names)
    if dialect is MMGENERATION and (channel_order or ("rgb" if CONVERTED in file else "bgr")) == "bgr":
        values = mmgeneration.reverse_channels(model, values)
    _fill(model, state, names, values, dialect.optional)
    if into is None:
        model.eval()
    if isinstance(model, SAGANGenerator):
        model.card = {
            "source": file or dialect.framework,
            "framework": dialect.framework,
            "num_classes": model.num_classes,
            "averaged": prefix == "generator_ema.",
            "channel_order": "rgb",
            "image_range": [-1, 1],
        }
    return model


def load_reference_state_dict(
    model: Model, state_dict: Mapping[str, object], *, channel_order: Literal["bgr", "rgb"] | None = None
) -> None:
    """The former name of ``load_published(state_dict, model)``, which it calls with a DeprecationWarning."""
    message = "load_reference_state_dict(model, state_dict) is deprecated; write load_published(state_dict, model)"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"expected a state dict, got {type(state_dict).__name__}")
    load_published(state_dict, model, channel_order=channel_order)


def _check_arguments(
    into: Model | None,
    network: Kind | None,
    channel_order: str | None,
    norm_eps: float | None,
    shortcut_after_relu: bool | None,
) -> None:
    if not isinstance(into, SAGANGenerator | SAGANDiscriminator | SelfAttention2d | None):
        name = type(into).__name__
        raise TypeError(f"expected a SAGANGenerator, a SAGANDiscriminator or a SelfAttention2d, got {name}")
    if network is not None:
        one_of(("generator", "discriminator"), network=network)
    if channel_order is not None:
        one_of(("bgr", "rgb"), channel_order=channel_order)
        if isinstance(into, SelfAttention2d) or (into is not None and not _is_residual(into)):
            raise ValueError("channel_order is for mmgeneration's networks, architecture='resnet'; leave it out here")
    of_built = {"network": network, "norm_eps": norm_eps, "shortcut_after_relu": shortcut_after_relu}
    given = [name for name, value in of_built.items() if value is not None]
    if into is not None and given:
        raise ValueError(f"{' and '.join(given)} are for a network that is built, and this one is there already")
    if network == "discriminator" and norm_eps is not None:
        raise ValueError("norm_eps is for generators: discriminators have no batch norm")
    if network != "discriminator" and shortcut_after_relu is not None:
        raise ValueError("shortcut_after_relu is for discriminators; in generators a ReLU in place is as any other")


def _is_residual(model: Network) -> bool:
    return isinstance(model.blocks[0], LatentBlock | FirstResidualDownBlock)


def _one_network(kind: Kind, state: dict[str, Tensor], *, averaged: bool) -> tuple[dict[str, Tensor], str]:
    """The entries of one network of a file that has several, and the prefix that they had."""
    prefixes: tuple[str, ...] = ("discriminator.",)
    if kind == "generator":
        prefixes = ("generator_ema.", "generator.") if averaged else ("generator.",)
    for prefix in prefixes:
        below = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if below:
            return below, prefix
    if not averaged:
        raise ValueError("averaged=False is for files that have two generators, which this one has not")
    return state, ""


def _built(
    dialect: Dialect, kind: Kind, state: dict[str, Tensor], file: str, eps: float | None, in_place: bool | None
) -> Network:
    """The network that the weights need, on their device and of their type."""
    try:
        arguments = dialect.arguments(kind, state)
    except KeyError as error:
        raise ValueError(f"this resembles {describe(state)}, but {error.args[0]} is missing") from None
    some = next(value for value in state.values() if value.is_floating_point())
    arguments |= {"device": some.device, "dtype": some.dtype}
    if kind == "generator":
        return SAGANGenerator(**arguments, norm_eps=dialect.eps(arguments) if eps is None else eps)
    if arguments.get("architecture") == "resnet":
        arguments["shortcut_after_relu"] = _works_in_place(dialect, file) if in_place is None else in_place
    elif in_place is not None:
        raise ValueError(f"shortcut_after_relu is for residual networks; this resembles {describe(state)}")
    return SAGANDiscriminator(**arguments)


def _works_in_place(dialect: Dialect, file: str) -> bool:
    """Whether the discriminator's ReLU does, as far as the framework and the file's name tell."""
    return dialect.shortcut_after_relu or (dialect is MMGENERATION and (IN_PLACE in file or CONVERTED in file))


def _dialect_of(into: Network, dialect: Dialect | None, kind: Kind, state: dict[str, Tensor], file: str) -> Dialect:
    """The dialect of a state dict for a network that is there, or one whose names an error can tell.

    Raises:
        ValueError: where the network differs from the one that the weights need in what no key tells, or moves all
            keys.
    """
    residual = _is_residual(into)
    if dialect is None or (dialect is REFERENCE) == residual:
        return MMGENERATION if residual else REFERENCE
    try:
        needed = dialect.arguments(kind, state)
    except KeyError:
        return dialect  # then the keys themselves are reported
    name, theirs, ours = type(into).__name__, needed["attention_resolutions"], [int(size) for size in into.attention]
    if residual and theirs != ours:
        raise ValueError(
            f"the state dict has attention at {theirs} pixels, this {name} at {ours}: build it with "
            f"attention_resolutions={tuple(theirs)}"
        )
    head = into.to_logit if isinstance(into, SAGANDiscriminator) else None
    if isinstance(into, SAGANGenerator) and residual:
        eps = dialect.eps(needed)
        if into.arguments["norm_eps"] != eps:
            raise ValueError(
                f"batch norms of {dialect.framework} add {eps} to the variance, those of this {name} "
                f"{into.arguments['norm_eps']}: build it with norm_eps={eps}"
            )
    elif isinstance(head, ResidualHead) and _works_in_place(dialect, file) and not head.shortcut_after_relu:
        whose = f"{dialect.framework}'s discriminators" if dialect.shortcut_after_relu else file
        raise ValueError(f"the ReLU of {whose} works in place: build this {name} with shortcut_after_relu=True")
    return dialect


def _fill(
    model: Model,
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    values: Mapping[str, Tensor],
    optional: tuple[str, ...] = (),
) -> None:
    """Load the values, which are under our keys, if all of them are there, all keys are used and all shapes fit.

    load_state_dict would load what fits before it raises, and name our keys instead of those in the file.
    """
    targets = model.state_dict()
    needed = dict.fromkeys(theirs for ours, theirs in names.items() if not ours.endswith(optional or ("\0",)))
    known = set(names.values())
    missing = [key for key in needed if key not in state]
    unexpected = [key for key in state if key not in known and not _is_last_sigma(key, state)]
    shapes: dict[str, str] = {}
    for ours, value in values.items():
        if value.shape != targets[ours].shape and not value.numel() == targets[ours].numel() == 1:  # gamma
            shapes.setdefault(
                names[ours], f"{names[ours]} {tuple(value.shape)} instead of {tuple(targets[ours].shape)}"
            )
    if missing or unexpected or shapes:
        differences = {"missing": missing, "unexpected": unexpected, "of another shape": list(shapes.values())}
        raise ValueError(
            f"the state dict does not fit {type(model).__name__}: it resembles {describe(state)}; "
            f"{_summary(differences)}"
        )
    model.load_state_dict(targets | {ours: value.view_as(targets[ours]) for ours, value in values.items()})


def _summary(differences: Mapping[str, list[str]]) -> str:
    """How many keys differ, and the first of them."""
    count = sum(map(len, differences.values()))
    first = [(what, key) for what, keys in differences.items() for key in keys][:SHOWN]
    shown = [f"{what}: {', '.join(key for _, key in group)}" for what, group in groupby(first, itemgetter(0))]
    more = f" and {count - SHOWN} more" if count > SHOWN else ""
    return f"{count} {'key differs' if count == 1 else 'keys differ'}, {'; '.join(shown)}{more}"


def _is_last_sigma(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a key is BigGAN-PyTorch's note of the last sigma, which follows from its vector."""
    return key.endswith(".sv0") and f"{key.removesuffix('sv0')}u0" in state
