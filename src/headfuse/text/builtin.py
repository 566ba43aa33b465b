"""The offline text: English prose from the docstrings and the manual pages of the running Python.

The sources of the standard library are parsed, never imported. A document is one module (the prose of all its
docstrings) or one topic of `pydoc_data`; code, doctests, tables and repeated paragraphs are dropped, lines are
rejoined. The text is the same on every machine with the same Python release.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path
from typing import Literal

from headfuse.errors import TextError
from headfuse.text.documents import Document

Part = Literal["calibration", "evaluation"]

EVALUATION_SHARE = 0.2
# Not the library (its tests, what others installed), or hardly any prose for their size.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "encodings"}
MIN_WORDS = 8
MIN_PROSE_SHARE = 0.9


def builtin_documents(part: Part) -> list[Document]:
    """The documents of one part, sorted by name; the parts share no document and no paragraph.

    Raises TextError if this Python comes without the sources of its library.
    """
    found = [document for document in _all_documents() if part_of(document.name) == part]
    if not found:
        raise TextError(
            f"wanted the standard library's sources under {_library()}, got no docstrings there; give a text file"
        )
    return found


def part_of(name: str) -> Part:
    """Which part a document belongs to: a hash of its name, so the same on every machine."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return "evaluation" if digest < EVALUATION_SHARE * 2**32 else "calibration"


def prose_paragraphs(docstring: str) -> Iterator[str]:
    """The English paragraphs of a docstring, one line each; code blocks, doctests, tables and lists are left out."""
    code_indent: int | None = None  # of the line that ended in "::"
    for block in re.split(r"\n\s*\n", cleandoc(docstring)):
        lines = block.split("\n")
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip()) if block.strip() else 0
        if code_indent is not None and indent > code_indent:
            continue
        code_indent = indent if block.rstrip().endswith("::") else None
        paragraph = re.sub(r"::$", ":", " ".join(block.split()))
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    if ">>>" in paragraph or not paragraph[:1].isalpha() or paragraph[-1] not in ".:!?)":
        return False
    words = [word for word in paragraph.split() if word.strip("().,;:'\"*`").isalpha()]
    share = sum(char.isalpha() or char in " .,;'" for char in paragraph) / len(paragraph)
    return len(words) >= MIN_WORDS and share >= MIN_PROSE_SHARE


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=1)
def _all_documents() -> tuple[Document, ...]:
    seen: set[str] = set()
    documents = []
    for name, docstrings in _named_docstrings():
        paragraphs = []
        for paragraph in (p for docstring in docstrings for p in prose_paragraphs(docstring)):
            if paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        if paragraphs:
            documents.append(Document(name, "\n\n".join(paragraphs) + "\n"))
    return tuple(documents)


def _named_docstrings() -> Iterator[tuple[str, list[str]]]:
    root = _library()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        tree = _parse(path)
        if relative.as_posix() == "pydoc_data/topics.py":
            yield from ((f"topic {name}", [text]) for name, text in sorted(_string_items(tree)))
        else:
            yield relative.with_suffix("").as_posix(), list(_docstrings(tree))


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are the library's business
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and samples of broken code
            return ast.Module(body=[], type_ignores=[])


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module, its classes and their functions; functions inside functions are passed over."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield text
    if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
        for child in (*node.body, *getattr(node, "orelse", ()), *getattr(node, "handlers", ())):
            yield from _docstrings(child)


def _string_items(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The string pairs of every dictionary literal: the manual pages are one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value), str(value.value)
