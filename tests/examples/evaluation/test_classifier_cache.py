"""The classifier's file: bit by bit what was trained, for these images alone, and never half of one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from barred_images import barred, same, short_training
from evaluation import classifier, classifier_cache
from evaluation.classifier import Classifier, train
from evaluation.classifier_cache import open_classifier
from refused_calls import refuse_fsync
from training.data.sources import ArrayDataset


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with short_training(steps=4, batch=16):
        yield


def data(seed: int = 0) -> ArrayDataset:
    return barred((20, 20), seed)


@pytest.fixture(scope="module")
def fresh() -> Classifier:
    return train(data())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all trainings."""
    seeds: list[int] = []

    def counted(images: ArrayDataset, held_out: ArrayDataset | None = None, *, seed: int = 0) -> Classifier:
        seeds.append(seed)
        return train(images, held_out, seed=seed)

    monkeypatch.setattr(classifier_cache, "train", counted)
    return seeds


def test_it_is_trained_once_and_read_bit_by_bit(fresh: Classifier, trained: list[int], tmp_path: Path) -> None:
    first = open_classifier(data(), cache=tmp_path / "a" / "cache")
    second = open_classifier(data(), cache=tmp_path / "a" / "cache")
    assert trained == [0]
    assert same(first, fresh)
    assert same(second, fresh)
    images = torch.from_numpy(data(5).images)
    for one, other in zip(fresh(images), second(images), strict=True):
        assert torch.equal(one, other)
    assert [path.suffix for path in (tmp_path / "a" / "cache").iterdir()] == [".pt"]  # nothing else stays
    open_classifier(data())
    open_classifier(data())
    assert trained == [0, 0, 0]  # without a folder nothing is kept


def test_other_images_have_another_file(trained: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_classifier(data(), cache=tmp_path)
    mirrored, relabeled = data(), data()
    mirrored.flip = True
    assert relabeled.labels is not None
    relabeled.labels = relabeled.labels._replace(numbers=1 - relabeled.labels.numbers)
    larger = ArrayDataset(data().images.repeat(2, 2).repeat(2, 3), data().labels, flip=False)
    for count, (images, held_out) in enumerate(
        [(data(1), None), (data(), data(1)), (data(), data(2)), (mirrored, None), (relabeled, None), (larger, None)],
        start=2,
    ):
        open_classifier(images, held_out, cache=tmp_path)
        assert len(trained) == len(list(tmp_path.iterdir())) == count
    monkeypatch.setattr(classifier, "VERSION", classifier.VERSION + 1)
    open_classifier(data(), cache=tmp_path)
    open_classifier(data(), cache=tmp_path, seed=1)
    assert len(trained) == len(list(tmp_path.iterdir())) == 9


@pytest.mark.parametrize("damage", ["cut off", "one bit", "empty", "foreign", "another's", "no weights"])
def test_a_damaged_or_foreign_file_is_trained_again(
    damage: str, fresh: Classifier, trained: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_classifier(data(), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "one bit":
        middle = len(whole) // 2  # in the weights, which are most of it
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        content = torch.load(path, weights_only=True)
        if damage == "another's":
            content["about"]["seed"] = 1
        else:
            del content["network"]["to_logits.weight"]
        torch.save(content, path)
    assert same(open_classifier(data(), cache=tmp_path), fresh)
    assert f"damaged, trained again: {path}" in capsys.readouterr().err
    assert same(open_classifier(data(), cache=tmp_path), fresh)
    assert len(trained) == 2


KILLED = """
import os, sys
sys.path[:0] = [{examples!r}, {support!r}]
from pathlib import Path
from barred_images import barred
from evaluation import classifier
from evaluation.classifier_cache import open_classifier
classifier.STEPS, classifier.BATCH = 4, 16
os.{call} = lambda *_: os.kill(os.getpid(), 9)
open_classifier(barred((20, 20)), cache=Path({cache!r}))
"""


@pytest.mark.parametrize("call", [pytest.param("fsync", marks=pytest.mark.exhaustive), "replace"])
def test_a_kill_leaves_no_half_of_a_file(call: str, fresh: Classifier, trained: list[int], tmp_path: Path) -> None:
    """Before the bytes are on the disk, and before they have their name."""
    here = Path(__file__)
    code = KILLED.format(
        examples=str(here.parents[3] / "examples"), support=str(here.parents[2] / "support"), call=call,
        cache=str(tmp_path),
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == -9, ended.stderr.decode()
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    assert same(open_classifier(data(), cache=tmp_path), fresh)
    assert same(open_classifier(data(), cache=tmp_path), fresh)
    assert trained == [0]


def test_an_interrupted_training_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        open_classifier(data(), cache=tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("broken", ["folder", "disk"])
def test_a_file_that_cannot_be_written_ends_nothing(
    broken: str, fresh: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    if broken == "folder":
        cache.write_text("a file")
    else:
        cache.mkdir()

        def full(*_: object) -> None:
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "fsync", full)
    assert same(open_classifier(data(), cache=cache), fresh)
    said = capsys.readouterr().err
    assert "the classifier is not kept, cannot write" in said
    assert broken == "folder" or not list(cache.iterdir())


def test_a_file_system_without_fsync(
    fresh: Classifier,
    trained: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_fsync(monkeypatch, errno.EINVAL)
    for _ in range(2):
        assert same(open_classifier(data(), cache=tmp_path), fresh)
    assert trained == [0]
    assert f"the file system of {tmp_path} cannot force files onto the disk" in capsys.readouterr().err


def test_lack_of_memory_is_no_damage(trained: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    open_classifier(data(), cache=tmp_path)
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(MemoryError):
        open_classifier(data(), cache=tmp_path)
    assert trained == [0]
