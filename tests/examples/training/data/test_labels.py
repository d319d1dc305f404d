"""Classes from folders and from CelebA's attributes, and what --labels accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from training.data.labels import (
    check_classes,
    find_attributes,
    from_attributes,
    from_folders,
    parse_labels,
    read_attributes,
)

TABLE = """3
Bald Male Smiling
000001.jpg -1  1  1
000002.jpg -1 -1  1
000003.jpg  1  1 -1
"""
CSV = "image_id,Bald,Male,Smiling\n000001.jpg,-1,1,1\n000002.jpg,-1,-1,1\n000003.jpg,1,1,-1\n"


def test_the_first_folder_is_the_class() -> None:
    labels = from_folders(["dog/1.png", "cat/a/b/2.png", "stray.png", "dog/3.png"])
    assert labels.classes == ("cat", "dog")
    assert labels.numbers.tolist() == [1, 0, -1, 1]
    assert labels.counts() == {"cat": 1, "dog": 2}
    assert labels.only([3, 1]).numbers.tolist() == [1, 0]


def test_folders_that_all_share_are_passed_over() -> None:
    labels = from_folders(["all/train/dog/1.png", "all/train/cat/2.png"])
    assert (labels.classes, labels.numbers.tolist()) == (("cat", "dog"), [1, 0])
    assert from_folders(["all/1.png", "all/2.png"]).classes == ("all",)


def test_attributes_combine(tmp_path: Path) -> None:
    file = tmp_path / "list_attr_celeba.txt"
    file.write_text(TABLE)
    table = read_attributes(file, ["Smiling", "Male"])
    labels = from_attributes(["x/000003.jpg", "000001.jpg", "000002.jpg", "new.jpg"], table, ["Smiling", "Male"])
    assert labels.classes == ("not-Smiling+not-Male", "not-Smiling+Male", "Smiling+not-Male", "Smiling+Male")
    assert labels.numbers.tolist() == [1, 3, 2, -1]
    with pytest.raises(ValueError, match=r"no image has the class not-Smiling\+not-Male$"):
        check_classes(labels, "--classes attributes:Smiling,Male")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("3\n", "4\n", 1), "states 4 images and has 3"),
        (TABLE.replace("-1 -1  1", "-1 -1"), "line 4: expected a file's name and 3 times 1 or -1"),
        (TABLE.replace("-1 -1  1", "-1 -1 0"), "line 4"),
        (TABLE.replace("Smiling", "Grinning"), "no attribute Smiling; it has Bald, Male, Grinning"),
        (TABLE.replace("000002", "000001"), "line 4: 000001.jpg is listed twice"),
        (TABLE.replace("000002", "\n000002"), "line 4: expected a file's name"),
        (CSV.replace("-1,-1,1", "-1,-1,0"), "line 3: expected a file's name and 3 times 1 or -1"),
        (CSV.replace("Smiling", "Grinning"), "no attribute Smiling; it has Bald, Male, Grinning"),
        ("", "expected CelebA's attributes"),
        ("000001.jpg 3\n000002.jpg 4\n", "expected CelebA's attributes"),
    ],
)
def test_files_of_another_form(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "attributes.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_attributes(file, ["Smiling"])


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        TABLE.replace("\n", "\r\n"),
        CSV.replace("\n", "\r\n"),
        "\ufeff" + TABLE,
        "\ufeff" + CSV,
        TABLE + "\n\n",
        CSV + "\n",
    ],
    ids=[
        "Kaggle's",
        "CRLF",
        "Kaggle's, CRLF",
        "byte order mark",
        "Kaggle's, byte order mark",
        "blank lines",
        "Kaggle's, blank line",
    ],
)
def test_tables_that_went_through_other_programs(text: str, tmp_path: Path) -> None:
    (tmp_path / "original").write_text(TABLE)
    (tmp_path / "other").write_bytes(text.encode())
    expected = {"000001.jpg": (True, False), "000002.jpg": (True, False), "000003.jpg": (False, True)}
    for name in ("original", "other"):
        assert read_attributes(tmp_path / name, ["Smiling", "Bald"]) == expected


def test_a_row_is_that_of_the_same_image_in_another_format(tmp_path: Path) -> None:
    table = {"000001.jpg": (True,), "b.jpg": (False,), "b.png": (True,)}
    labels = from_attributes(["x/000001.png", "b.jpg", "b.png", "b.webp"], table, ["Male"])
    assert labels.numbers.tolist() == [1, 0, 1, 1]


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    file = tmp_path / "attributes.txt"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_attributes(file, ["Smiling"])


def test_the_table_is_found_where_it_is_downloaded(tmp_path: Path) -> None:
    images = tmp_path / "img_align_celeba.zip"
    with pytest.raises(ValueError, match="give its path with --attributes"):
        find_attributes(images)
    (tmp_path / "Anno").mkdir()
    (tmp_path / "Anno" / "list_attr_celeba.txt").write_text(TABLE)
    assert find_attributes(images) == tmp_path / "Anno" / "list_attr_celeba.txt"
    (tmp_path / "list_attr_celeba.txt").write_text(TABLE)
    assert find_attributes(images) == tmp_path / "list_attr_celeba.txt"


@pytest.mark.parametrize("paths", [["a.png"], ["only/a.png", "only/b.png"]])
def test_one_class_is_too_few(paths: list[str]) -> None:
    with pytest.raises(ValueError, match="two classes or more"):
        check_classes(from_folders(paths), "--classes own")


def test_labels_by_name_and_by_number() -> None:
    classes = ["cat", "3", "Dog"]
    assert parse_labels("dog, CAT,0,3", classes, 3) == [2, 0, 0, 1]
    assert parse_labels("999", [], 1000) == [999]
    for wrong in ("horse", "5", "", "-1", "9" * 5000):
        with pytest.raises(ValueError, match=r"expected classes \(cat, 3, Dog; or numbers from 0 to 2\), got"):
            parse_labels(wrong, classes, 3)


ODD = ["cat", "Cat", "DOG", "3", "Doe, John", "a", "b", "a,b", '5" disk', '"quoted"', " padded "]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Cat,cat", [1, 0]),  # exactly those, although they differ in case alone
        ("dog,3,0", [2, 3, 0]),  # in another case; a name before a number; a number
        ("Doe, John", [4]),
        ('"Doe, John",cat, "a,b"', [4, 0, 7]),
        ("a, b,7", [5, 6, 7]),
        ('5" disk', [8]),
        ('"""quoted"""', [9]),
        ("9,10", [9, 10]),
        (" padded ", [10]),
    ],
)
def test_any_class_can_be_named(text: str, numbers: list[int]) -> None:
    assert parse_labels(text, ODD, len(ODD)) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CAT", "'CAT' could be cat or Cat"),
        ("a,b", "2 classes, or one of this name: give numbers, or quote the name as in a CSV file"),
        ('"Doe, John', "unexpected end of data"),
    ],
)
def test_what_could_be_two_classes_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_labels(text, ODD, len(ODD))


def test_an_error_lists_some_of_many_classes() -> None:
    with pytest.raises(ValueError, match=r"\(n0, n1, .*, n19, …; or numbers from 0 to 999\), got 'x'$") as error:
        parse_labels("x", [f"n{i}" for i in range(1000)], 1000)
    assert len(str(error.value)) < 250
