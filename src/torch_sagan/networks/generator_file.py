"""Share a generator: one safetensors file, with a card in its metadata that builds the network again.

The metadata has the card as JSON, and the SHA-256 of the data, so that damage is seen. The card's entry ``generator``
holds the arguments of the network, ``classes`` the names of its classes; the rest is information.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_sagan._modes import evaluation_mode
from torch_sagan.networks.generator import SAGANGenerator

__all__ = ["load_generator", "save_generator"]

SUFFIX = ".safetensors"
CARD, SHA256 = "card", "sha256"  # entries of the metadata
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}

# Bitwise equal on a CPU. A GPU may sum in another order from one call to the next.
TOLERANCE = 1e-2


def save_generator(
    path: str | os.PathLike[str],
    generator: SAGANGenerator,
    *,
    classes: Sequence[str] | Mapping[str, int] | None = None,
    card: Mapping[str, Any] | None = None,
    build: Callable[..., SAGANGenerator] = SAGANGenerator,
) -> None:
    """Write a generator to one safetensors file, from which :func:`load_generator` builds it again.

    The file has weights, sizes and names of classes, and runs no code when it is read. It is written completely or not
    at all. Before that, the network is built from its description and has to give the same images in evaluation. Needs
    the package ``safetensors``.

    Args:
        path: the name of the file, which ends in ``.safetensors``. Another file of that name is replaced.
        generator: the network, in any mode, with its spectral norm or without.
        classes: the names of the classes in the order of their numbers, or a mapping from names to how many images of
            each there were. Default: those of ``generator.card``.
        card: further entries, which JSON can hold. Entries of ``generator.card`` are kept unless they are given anew.
            An entry ``generator`` replaces the arguments that the network remembers.
        build: what makes the network from those arguments. Give the same to :func:`load_generator`.

    Raises:
        TypeError: for anything but a :class:`SAGANGenerator`, or a card that JSON cannot hold.
        ValueError: for another ending, classes that are not as many as the network's, or the same name twice, and for a
            network that its arguments do not describe: one with an attention layer or a last activation of your own,
            or one that was changed since.

    >>> from torch_sagan import SAGANGenerator, load_generator, save_generator
    >>> generator = SAGANGenerator(28, num_classes=2, image_channels=1)
    >>> save_generator(  # doctest: +SKIP
    ...     "animals.safetensors", generator, classes=["cat", "dog"]
    ... )
    >>> load_generator("animals.safetensors").card["classes"]  # doctest: +SKIP
    ['cat', 'dog']
    """
    path = Path(path)
    if not isinstance(generator, SAGANGenerator):
        raise TypeError(f"expected a SAGANGenerator, got {type(generator).__name__}")
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: expected a name that ends in {SUFFIX}")
    entries = {**generator.card, **(card or {})}
    entries.setdefault("generator", _arguments(generator))
    if isinstance(classes, str):
        raise TypeError(f"classes: expected names, got {classes!r}")
    if classes is not None:
        entries["classes"] = dict(classes) if isinstance(classes, Mapping) else list(classes)
    _check_classes(entries.get("classes") or [], generator.num_classes)
    _check_description(generator, entries["generator"], build)
    try:
        # Without NaN, which is no JSON, and in ASCII: a class may have the name of a folder that is not UTF-8.
        text = json.dumps(entries, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the card has to be JSON: {error}") from None
    _replace(path, _serialized(generator.state_dict(), text))


def load_generator(
    path: str | os.PathLike[str], *, build: Callable[..., SAGANGenerator] = SAGANGenerator
) -> SAGANGenerator:
    """The generator in a file of :func:`save_generator`, on the CPU, in evaluation mode.

    Needs the package ``safetensors``, and runs no code from the file.

    Args:
        path: the file.
        build: what makes the network from the arguments in the card.

    Returns:
        The network. In ``generator.card`` are ``classes``, the names of the classes in the order of their numbers, and
        whatever else was saved. z is (B, ``generator.z_dim``), usually standard normal; labels, (B,), are needed if
        ``generator.num_classes`` is not None; images are from -1 to 1.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is damaged, has no card, or whose weights do not fit its card.
        ModuleNotFoundError: where ``safetensors`` is not installed.

    >>> import torch
    >>> from torch_sagan import load_generator
    >>> generator = load_generator("faces.safetensors")  # doctest: +SKIP
    >>> images = generator(torch.randn(16, generator.z_dim))  # doctest: +SKIP
    """
    path = Path(path)
    weights, metadata, intact = _deserialized(path, path.read_bytes())
    if CARD not in metadata:
        raise ValueError(f"{path}: it has no card, so it is not from save_generator; load_published reads other files")
    if not intact:
        raise ValueError(f"{path}: damaged, its weights are not those that were written")
    try:
        card = json.loads(metadata[CARD])
        arguments = card["generator"]
        names = card.get("classes") or []
        generator = build(**arguments)
        _check_classes(names, generator.num_classes)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its card does not describe a generator: {error}") from None
    generator.to(next(value.dtype for value in weights.values() if value.is_floating_point()))
    try:
        generator.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{path}: the weights do not fit a generator of {arguments}") from None
    generator.card = card
    return generator.eval()


def _arguments(generator: SAGANGenerator) -> dict[str, Any]:
    normalized = any(".parametrizations." in name for name in generator.state_dict())
    return generator.arguments | ({} if normalized else {"spectral_norm": None})


def _check_classes(classes: Any, num_classes: int | None) -> None:
    if not isinstance(classes, Mapping | list) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes: expected names, got {classes!r}")
    if len(classes) not in (0, num_classes or 0):
        raise ValueError(f"classes: expected {num_classes or 0} names, as many as the network's, got {len(classes)}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes: expected names that differ, got {list(classes)}")


@torch.no_grad()
def _check_description(
    generator: SAGANGenerator, arguments: Mapping[str, Any], build: Callable[..., SAGANGenerator]
) -> None:
    """Raise unless these arguments and the weights alone give the generator's images."""
    expected = "a network that its arguments describe, without attention or activations of your own"
    some = next(generator.parameters())
    copy = build(**arguments).to(some.device, some.dtype)
    try:
        copy.load_state_dict(generator.state_dict())
    except RuntimeError as error:
        first = str(error).split("\n")[1:2] or [str(error)]
        raise ValueError(f"expected {expected}; built from {dict(arguments)} it differs: {first[0].strip()}") from None
    z = torch.ones(2, generator.z_dim, device=some.device, dtype=some.dtype) * torch.tensor([[-1.0], [0.5]]).to(some)
    labels = None if generator.num_classes is None else torch.zeros(2, dtype=torch.long, device=some.device)
    with evaluation_mode(generator), evaluation_mode(copy):
        difference = (generator(z, labels) - copy(z, labels)).abs().max()
    if not difference <= TOLERANCE:  # NaN neither
        raise ValueError(f"expected {expected}; built from {dict(arguments)} its images differ by {difference:.2g}")


def _serialized(state: Mapping[str, Tensor], card: str) -> bytes:
    """A safetensors file: the length of its header in 8 bytes, the header as JSON, the data.

    Written here, because the package's own functions for PyTorch need NumPy, which nothing else here does.
    """
    # As that package orders them: the widest types first, so that all data are aligned, and by name.
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header: dict[str, Any] = {}
    data = bytearray()
    for name in names:
        tensor = state[name].detach().cpu().contiguous()
        start = len(data)
        data += ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, len(data)]}
        header[name] = entry
    metadata = {CARD: card, SHA256: hashlib.sha256(data).hexdigest()}
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _deserialized(path: Path, content: bytes) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """The tensors and the metadata of a safetensors file, and whether the data are those that the metadata tell."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        weights = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: it cannot be read as safetensors ({error})") from None
    metadata = json.loads(content[8 : _header_length(content)]).get("__metadata__", {})
    return weights, metadata, hashlib.sha256(_data(content)).hexdigest() == metadata.get(SHA256)


def _header_length(content: bytes) -> int:
    """The bytes before the data: a length of 8 bytes, and so many bytes of JSON."""
    return 8 + int.from_bytes(content[:8], "little")


def _data(content: bytes) -> bytes:
    return content[_header_length(content) :]


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is complete or as it was, whenever the process or the machine stops. A symbolic link stays one:
    the file that it points to is replaced."""
    target = Path(os.path.realpath(path))
    new = target.with_name(f"{target.name}.new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            _force_to_disk(file.fileno())
        os.replace(new, target)
        if os.name == "posix":  # on other systems folders cannot be opened
            _force_folder_to_disk(target.parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def _force_folder_to_disk(folder: Path) -> None:
    """The folder holds the name of the file."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written but not listed
        return
    try:
        _force_to_disk(descriptor)
    finally:
        os.close(descriptor)


def _force_to_disk(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Else it is a file system that cannot, as older CIFS and FUSE, and has written it all the same.
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
