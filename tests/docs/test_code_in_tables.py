"""Code in the cells of tables may break where a reader would break it; the built site's test measures where it does."""

from __future__ import annotations

import pytest

pytest.importorskip("sphinx")
code_in_tables = pytest.importorskip("code_in_tables")


@pytest.mark.parametrize("name", [".half", ".official", "@eaDir", "__MACOSX", "_u"])
def test_what_a_name_begins_with_stays_with_it(name: str) -> None:
    assert code_in_tables.BREAK.split(name) == [name]


def test_it_breaks_behind_punctuation() -> None:
    pieces = ["torch.", "nn.", "utils.", "spectral_", "norm", "(", "dim=", "0)"]
    assert code_in_tables.BREAK.split("".join(pieces)) == pieces
    assert code_in_tables.BREAK.split("wReLU_…_is") == ["wReLU_…_", "is"]
