"""Documents streamed from a data set of the Hugging Face hub, if the package `datasets` is installed."""

import re
from collections.abc import Iterator

from headfuse.errors import TextError
from headfuse.text.documents import FIELD, Document

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")
SHUFFLE_BUFFER = 1_000


def hub_documents(source: str, *, seed: int) -> Iterator[Document]:
    """Documents of `name`, `name:config` or `name:config:split` (default `train`), shuffled by `seed`.

    The data set is streamed, so only what is read is downloaded. Raises TextError if the package is not
    installed, the data set cannot be opened, or it has no string column `text`.
    """
    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]  an optional package
    except ImportError as error:
        raise TextError(
            f"{source}: wanted 'builtin', an existing file or a hub data set, got no such file and no package "
            "'datasets'; check the path, or run: pip install datasets"
        ) from error
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)):
            if not isinstance(row.get(FIELD), str):
                raise TextError(f"{source}: wanted a string column {FIELD!r}, got {sorted(row)}; use another data set")
            yield Document(f"{source}:{number}", row[FIELD])
    except TextError:
        raise
    except Exception as error:  # the network and the hub raise types of several packages
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise TextError(
            f"{source}: wanted a data set of the hub, got {first}; check the id and the connection, or give a file"
        ) from error
