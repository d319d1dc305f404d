"""A generator in one file: read back in another process it draws bitwise the same, and whatever is wrong is said."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refused_calls import refusing
from torch_sagan import (
    SAGANGenerator,
    SelfAttention2d,
    insert_self_attention,
    load_generator,
    remove_spectral_norm,
    save_generator,
)


def shaken(**arguments: Any) -> SAGANGenerator:
    """A small generator in which nothing has its first value, and attention counts."""
    generator = SAGANGenerator(16, **({"base_channels": 4, "z_dim": 8} | arguments))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    labels = None if generator.num_classes is None else torch.arange(8) % generator.num_classes
    generator(torch.randn(8, 8, dtype=next(generator.parameters()).dtype), labels)  # running statistics, u and v
    return generator


@torch.no_grad()
def images(generator: SAGANGenerator) -> Tensor:
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(next(generator.parameters()).dtype)
    labels = None if generator.num_classes is None else torch.arange(4) % generator.num_classes
    return generator.eval()(z, labels)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "classes": {"num_classes": 3},
    "latent": {"num_classes": 3, "conditioning": "latent", "upsampling": "nearest", "image_channels": 1},
    "residual": {"num_classes": 3, "architecture": "resnet", "normalize_classes": True, "norm_eps": 1e-4},
    "widths": {"base_channels": None, "widths": (5, 3), "attention_resolutions": ()},
    "double": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "not normalized": {"spectral_norm": None},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_saved_and_loaded(case: str, tmp_path: Path) -> None:
    generator = shaken(**ARGUMENTS[case])
    modes = [module.training for module in generator.modules()]
    save_generator(tmp_path / "g.safetensors", generator)
    assert [module.training for module in generator.modules()] == modes
    loaded = load_generator(tmp_path / "g.safetensors")
    assert not loaded.training
    assert loaded.arguments == generator.arguments
    assert torch.equal(images(loaded), images(generator))
    for name, value in generator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["g.safetensors"]


def test_without_the_norm_that_it_was_trained_with(tmp_path: Path) -> None:
    generator = remove_spectral_norm(shaken(num_classes=3, architecture="resnet", normalize_classes=True))
    save_generator(tmp_path / "g.safetensors", generator)
    assert torch.equal(images(load_generator(tmp_path / "g.safetensors")), images(generator))


def test_saving_what_was_loaded_keeps_its_card(tmp_path: Path) -> None:
    generator = shaken(num_classes=2)
    save_generator(tmp_path / "a.safetensors", generator, classes={"cat": 3, "dog": 5}, card={"license": "CC0"})
    save_generator(tmp_path / "b.safetensors", load_generator(tmp_path / "a.safetensors"), card={"steps": 7})
    card = load_generator(tmp_path / "b.safetensors").card
    assert card["classes"] == {"cat": 3, "dog": 5}
    assert list(card["classes"]) == ["cat", "dog"]
    assert (card["license"], card["steps"]) == ("CC0", 7)


SAVE = """
import sys, torch
from torch_sagan import SAGANGenerator, save_generator
torch.manual_seed(1)
generator = SAGANGenerator(16, base_channels=4, num_classes=2)
generator(torch.randn(4, 128), torch.tensor([0, 1, 0, 1]))
save_generator(sys.argv[1], generator, classes=["cat", "dog"])
"""
DRAW = """
from torch_sagan import load_generator
generator = load_generator(sys.argv[1])
z = torch.randn(2, generator.z_dim, generator=torch.Generator().manual_seed(0))
labels = torch.tensor([generator.card["classes"].index("dog")] * 2)
torch.save(generator(z, labels).detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_between_processes_and_without_numpy(tmp_path: Path) -> None:
    """NumPy is not among what `pip install torch-sagan safetensors` installs."""
    no_numpy = "import sys; sys.modules['numpy'] = None\n"
    file = str(tmp_path / "g.safetensors")
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}  # of PyTorch, about its own missing NumPy
    command = [sys.executable, "-c", no_numpy + SAVE + DRAW, file, str(tmp_path / "images.pt")]
    subprocess.run(command, check=True, env=quiet)
    generator = load_generator(file)
    z = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(generator(z, torch.tensor([1, 1])), torch.load(tmp_path / "images.pt", weights_only=True))


# --- what cannot be described ----------------------------------------------------------------------------------------


def with_attention(layer: Callable[[int], nn.Module]) -> SAGANGenerator:
    return shaken(attention=layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_attention(SelfAttention2d.official), "Missing key|Unexpected key"),
        (lambda: with_attention(lambda c: SelfAttention2d(c, similarity="l2")), "differs"),
        (lambda: shaken(output_activation=nn.Sigmoid), "its images differ by"),
        (lambda: insert_self_attention(shaken(), after="blocks.0.conv"), "differs: Unexpected key"),
    ],
)
def test_a_network_that_its_arguments_do_not_describe(
    make: Callable[[], SAGANGenerator], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected a network that its arguments describe"):
        save_generator(tmp_path / "g.safetensors", make())
    assert list(tmp_path.iterdir()) == []


def test_one_that_a_function_builds(tmp_path: Path) -> None:
    """What the arguments do not describe, a function of the caller's can."""

    def build(**arguments: Any) -> SAGANGenerator:
        return SAGANGenerator(**arguments, output_activation=nn.Sigmoid)

    generator = shaken(output_activation=nn.Sigmoid)
    save_generator(tmp_path / "g.safetensors", generator, build=build)
    assert torch.equal(images(load_generator(tmp_path / "g.safetensors", build=build)), images(generator))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "g.pt"}, ValueError, r"g\.pt: expected a name that ends in \.safetensors"),
        ({"generator": nn.Linear(2, 2)}, TypeError, "expected a SAGANGenerator, got Linear"),
        ({"classes": ["a", "b"]}, ValueError, "expected 3 names, as many as the network's, got 2"),
        ({"classes": ["a", "b", "b"]}, ValueError, r"expected names that differ, got \['a', 'b', 'b'\]"),
        ({"classes": [1, 2, 3]}, TypeError, "expected names, got"),
        ({"classes": "abc"}, TypeError, "expected names, got 'abc'"),
        ({"card": {"score": float("nan")}}, TypeError, "the card has to be JSON"),
        ({"card": {"score": torch.zeros(1)}}, TypeError, "the card has to be JSON"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    given = {"path": "g.safetensors", "generator": shaken(num_classes=3)} | arguments
    with pytest.raises(error, match=message):
        save_generator(tmp_path / given.pop("path"), given.pop("generator"), **given)
    assert list(tmp_path.iterdir()) == []


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_generator(tmp_path / "g.safetensors", shaken())
    return tmp_path / "g.safetensors"


def with_metadata(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_every_damaged_byte_is_seen(saved: Path) -> None:
    """In the data, and wherever the file ends too early."""
    content = saved.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for place in (8 + length, (8 + length + len(content)) // 2, len(content) - 1):
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"g\.safetensors: damaged, its weights are not those"):
            load_generator(saved)
    for end in (0, 7, 20, 8 + length, len(content) - 1):
        saved.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"g\.safetensors: it cannot be read as safetensors"):
            load_generator(saved)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"generator": {"colour": 1}}, r"its card does not describe a generator: .*colour"),
        ({"generator": {"image_size": 16, "base_channels": 8}}, "the weights do not fit a generator of"),
        ({"generator": [1]}, "its card does not describe a generator"),
        ({}, "its card does not describe a generator: 'generator'"),
        ({"generator": {"image_size": 16, "base_channels": 4, "z_dim": 8}, "classes": ["a"]}, "expected 0 names"),
        ("[" * 100_000, "its card does not describe a generator"),
    ],
)
def test_a_card_of_another_network(saved: Path, card: Any, message: str) -> None:
    text = card if isinstance(card, str) else json.dumps(card)
    with_metadata(saved, lambda metadata: metadata.update(card=text))
    with pytest.raises(ValueError, match=message):
        load_generator(saved)


def test_a_file_without_a_card(saved: Path) -> None:
    with_metadata(saved, lambda metadata: metadata.pop("card") and None)
    with pytest.raises(ValueError, match="it has no card, so it is not from save_generator; load_published reads"):
        load_generator(saved)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"g\.safetensors"):
        load_generator(tmp_path / "g.safetensors")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_file(
    call: str, code: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(os, call, refusing(getattr(os, call), code, lambda *_: True))
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        save_generator(saved, shaken(num_classes=2))
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["g.safetensors"]


# EINVAL: older CIFS, WSL; ENOSYS and EOPNOTSUPP: FUSE; EBADF: folders on some network shares.
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
@pytest.mark.parametrize("of_folders_alone", [False, True])
def test_a_file_system_that_cannot_sync(
    code: int, of_folders_alone: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> bool:
        return not of_folders_alone or stat.S_ISDIR(os.fstat(descriptor).st_mode)

    monkeypatch.setattr(os, "fsync", refusing(os.fsync, code, refused))
    generator = shaken(num_classes=2)
    save_generator(saved, generator)
    assert torch.equal(images(load_generator(saved)), images(generator))


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be opened there")
def test_file_and_folder_are_forced_onto_the_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor)))
    save_generator(saved, shaken(num_classes=2))
    assert [entry.st_ino for entry in forced] == [saved.stat().st_ino, saved.parent.stat().st_ino]


def test_a_symbolic_link_stays_one(saved: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest.safetensors"
    link.symlink_to(saved)
    generator = shaken(num_classes=2)
    save_generator(link, generator)
    assert link.is_symlink()
    assert torch.equal(images(load_generator(saved)), images(generator))


def test_without_safetensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="safetensors"):
        load_generator(saved)


def test_written_as_the_package_writes_it(saved: Path) -> None:
    """Every byte."""
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(saved), saved.with_name("theirs.safetensors"), metadata)
    assert len(saved.read_bytes()) == len(saved.with_name("theirs.safetensors").read_bytes())
    assert load_generator(saved.with_name("theirs.safetensors")).arguments == load_generator(saved).arguments
