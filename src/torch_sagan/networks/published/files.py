"""Read the file of a published network, and say what a file is that has none."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["describe", "read", "state_dict_of"]

SAFETENSORS = ".safetensors"
SAFE = "2.6"

# What files are: patterns, each of which matches all of one of their keys or more. The first entry counts. Names that
# several implementations share are described and not attributed.
KINDS: dict[tuple[str, ...], str] = {
    ("generator", "discriminator"): "a checkpoint of torch-sagan's trainer: its 'generator' and 'discriminator' are "
    "state dicts for load_state_dict",
    (r"(generator(_ema)?\.)?noise2feat\..*",): "mmgeneration's generator",
    (r"(discriminator\.)?from_rgb\.(conv_[12]|shortcut)\..*",): "mmgeneration's discriminator",
    (r"l1\.0\.module\..*", r"l1\.1\..*"): "the PyTorch reference's generator",
    (r"l1\.0\.module\..*",): "the PyTorch reference's discriminator",
    (r"(query|key|value)_conv\.(weight|bias)", "gamma"): "the PyTorch reference's attention, for SelfAttention2d(C)",
    (r"(theta|phi)\.(weight|u0)", r"o\.weight", "gamma"): "an attention layer as BigGAN-PyTorch's, for "
    "SelfAttention2d.official(C)",
    (
        r"shared\.weight",
        r"output_layer\.0\.gain",
    ): "BigGAN-PyTorch's BigGAN, whose blocks share an embedding of classes",
    (r"blocks\..*\.u0", r".*\.sv0"): "a network of BigGAN-PyTorch",
    (r"linear0\..*", r"conv2d5\..*"): "PyTorch-StudioGAN's generator",
    (r"linear1\..*", r"blocks\.0\.0\.conv2d1\..*"): "PyTorch-StudioGAN's discriminator",
    (r"(.*\.)?conv1x1_(theta|phi)\.weight(_orig)?",): "PyTorch-StudioGAN's attention, for SelfAttention2d.official(C)",
    (r"l1\.sn_sigma|l1\.weight", r"block2\.(c1|b1)\..*"): "a generator of mimicry, which upsamples bilinearly and not "
    "to the nearest pixel",
    (r"lin_code\.weight", r"conv\d\.embed\.weight"): "a generator of rosinality's sagan-pytorch, whose attention "
    "normalizes over queries and not over keys",
    (r"blocks\.\d+\.(conv|linear).*", r"to_(image|logit)\..*"): "a network of torch-sagan itself, for "
    "load_state_dict, or for load_generator if save_generator wrote it",
    (r"(query|key|value)\.(weight|parametrizations\.weight\.original)", "gamma"): "an attention layer of torch-sagan "
    "itself, for load_state_dict, or of another implementation with the same names, whose outputs may differ",
    (r".*_orig", r".*_[uv]"): "a model under PyTorch's older spectral norm, for convert_legacy_spectral_norm",
}
CONV1D = "an attention of one-dimensional convolutions, as fastai's: docs/migrating.md copies such weights"
UNKNOWN = "no weights that this function knows"


def describe(state: Mapping[str, object]) -> str:
    """What a state dict or a checkpoint seems to be."""
    entries = {str(key).removeprefix("module."): value for key, value in state.items()}
    queries = [value for key, value in entries.items() if re.fullmatch(r"(.*\.)?query\.weight(_orig)?", key)]
    if any(isinstance(value, Tensor) and value.ndim == 3 for value in queries):
        return CONV1D
    for patterns, kind in KINDS.items():
        if all(any(re.fullmatch(pattern, key) for key in entries) for pattern in patterns):
            return kind
    return UNKNOWN


def read(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """The entries of a file of PyTorch, read without running code from it, or of a safetensors file.

    Raises:
        FileNotFoundError: when there is no such file.
        ModuleNotFoundError: for a safetensors file where that package is not installed.
        ValueError: for a file that cannot be read so.
        RuntimeError: for a file of PyTorch, where the installed version would not keep it from running code.
    """
    path = Path(path)
    if path.suffix == SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: it cannot be read as safetensors ({error})") from None
    if torch.__version__ < SAFE:
        raise RuntimeError(
            f"torch {torch.__version__} can run code in a file even with weights_only=True (CVE-2025-32434): install "
            f"{SAFE} or newer, or give the state dict of a file that you trust"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        reason = f"it holds a {found[1]}" if found else "it is damaged, or holds more than weights"
        raise ValueError(
            f"{path}: it cannot be read with weights_only=True, because {reason}; the guide 'Published weights' says "
            "how to keep only the weights"
        ) from None
    except (EOFError, RuntimeError) as error:
        raise ValueError(f"{path}: it cannot be read as a file of PyTorch ({error})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a state dict or a checkpoint, got {type(content).__name__}")
    return content


def state_dict_of(content: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict in a checkpoint, or the state dict itself, without the prefix of DataParallel.

    Raises:
        ValueError: for anything but names and tensors.
    """
    inner = content.get("state_dict")
    state = inner if isinstance(inner, Mapping) else content
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if len(tensors) < len(state):
        raise ValueError(f"expected a state dict of names and tensors; this resembles {describe(state)}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors
