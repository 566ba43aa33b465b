"""Documents read from text files: `.txt`, `.jsonl` (field `text`) and `.parquet` (column `text`)."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headfuse.errors import TextError

FIELD = "text"
# A .txt file is cut here, at paragraph borders, so that a sample can come from all over it.
SECTION_CHARS = 16_384


@dataclass(frozen=True)
class Document:
    """A piece of text that is tokenised on its own."""

    name: str
    text: str


def read_documents(path: Path) -> list[Document]:
    """The documents of a text file in file order, empty ones left out.

    Raises TextError for a file that is unreadable, empty, not UTF-8 or without the field or column `text`.
    """
    reader = READERS[path.suffix.lower()]
    try:
        documents = [document for document in reader(path) if document.text.strip()]
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: wanted UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}; "
                        "convert the file to UTF-8") from error  # fmt: skip
    except OSError as error:
        raise TextError(f"{path}: wanted a readable file, got {error.strerror or error}; check the path") from error
    if not documents:
        raise TextError(f"{path}: wanted some text, got none; give a file that has text")
    return documents


def _read_txt(path: Path) -> Iterator[Document]:
    section: list[str] = []
    size = count = 0
    for paragraph in re.split(r"(?<=\n)\n+(?=\S)", path.read_text(encoding="utf-8-sig")):
        if section and size + len(paragraph) > SECTION_CHARS:
            yield Document(f"{path.name}#{count}", "\n".join(section))
            section, size, count = [], 0, count + 1
        section.append(paragraph)
        size += len(paragraph)
    yield Document(f"{path.name}#{count}", "\n".join(section))


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(
                    f"{path}:{number}: wanted a JSON object a line, got {error.msg}; repair the line"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(FIELD), str):
                got = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise TextError(f"{path}:{number}: wanted a string field {FIELD!r}, got {got}; rename the field")
            yield Document(f"{path.name}:{number}", row[FIELD])


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise TextError(
            f"{path}: wanted pyarrow to read Parquet, got no such package; run: pip install 'headfuse[parquet]'"
        ) from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        first = str(error).splitlines()[0]
        raise TextError(f"{path}: wanted a Parquet file, got {first}; write the file again") from error
    with file:
        if FIELD not in file.schema_arrow.names:
            raise TextError(f"{path}: wanted a column {FIELD!r}, got {file.schema_arrow.names}; rename the column")
        number = 0
        for batch in file.iter_batches(columns=[FIELD]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str | None):
                    raise TextError(
                        f"{path}: wanted strings in column {FIELD!r}, got {batch.schema.field(0).type}; convert it"
                    )
                yield Document(f"{path.name}:{number}", text or "")
                number += 1


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
