"""The offline text: English, the same every time, in two parts that share nothing."""

import pytest

from headfuse.errors import TextError
from headfuse.text import builtin
from headfuse.text.builtin import builtin_documents, part_of, prose_paragraphs


def paragraphs(part: str) -> list[str]:
    return [p for document in builtin_documents(part) for p in document.text.strip().split("\n\n")]


def test_both_parts_are_large_and_share_no_paragraph():
    calibration, evaluation = paragraphs("calibration"), paragraphs("evaluation")
    assert sum(map(len, calibration)) > 500_000
    assert sum(map(len, evaluation)) > 50_000
    assert not set(calibration) & set(evaluation)


def test_documents_are_sorted_unique_and_in_the_part_of_their_name():
    for part in ("calibration", "evaluation"):
        names = [document.name for document in builtin_documents(part)]
        assert len(set(names)) == len(names)
        assert all(part_of(name) == part for name in names)


def test_no_doctest_is_left():
    assert not [p for p in paragraphs("calibration") if ">>>" in p or "\n" in p]


def test_prose_keeps_paragraphs_and_drops_code_tables_and_lists():
    docstring = """Return the number of words that the given text has in it.

    The words may be separated by any white space, as
    this paragraph over two lines is::

        count = len(text.split())

        and this code would otherwise look like ordinary prose to the filter here.

    >>> this paragraph has an example in it, and so it is not prose at all.

    a | b | c | d | e | f | g | h | i | j.

    Too short to keep.

    What follows the code block is kept again because it is not indented.
    """
    assert list(prose_paragraphs(docstring)) == [
        "Return the number of words that the given text has in it.",
        "The words may be separated by any white space, as this paragraph over two lines is:",
        "What follows the code block is kept again because it is not indented.",
    ]


def test_a_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    cached = builtin._all_documents
    monkeypatch.setattr(builtin, "_all_documents", cached.__wrapped__)
    with pytest.raises(TextError, match="wanted the standard library's sources"):
        builtin_documents("calibration")
