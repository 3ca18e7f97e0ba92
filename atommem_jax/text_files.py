"""Text and JSON of others, read as it comes: one tolerant reader for all of it.

Read are UTF-8 and UTF-16, with and without a byte order mark, in gzip or not, with line ends of any
system; records of JSON one a line or as a list, with blank lines between them. Lone surrogates,
which no text has, become U+FFFD, and `warn` says how many. What is no text is recognised by its
first bytes and refused with what to do about it; what cannot be decoded names file and byte.
"""

import contextlib
import gzip
import io
import json
import logging
import os
import pathlib
import re
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from atommem_jax.config import ConfigError, check, paths

_LOG = logging.getLogger("atommem_jax")
_LOG.setLevel(logging.WARNING)  # whatever the level of the program that we are part of

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_SAMPLE = 4096  # bytes by which UTF-16 without a mark is recognised

_MARKS = (  # the longer first: UTF-32 begins as UTF-16 does
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_SIGNATURES = (
    (b"%PDF-", "a PDF", "extract its text first, as with pdftotext FILE"),
    (b"{\\rtf", "rich text (RTF)", "save it as plain text, or convert it with pandoc --to=plain"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office file of before 2007",
     "save it as plain text, or as with libreoffice --convert-to txt:Text FILE"),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)", "read its text first, as with tesseract FILE -"),
    (b"\xff\xd8\xff", "a picture (JPEG)", "read its text first, as with tesseract FILE -"),
    (b"GIF8", "a picture (GIF)", "read its text first, as with tesseract FILE -"),
    (b"II*\x00", "a picture (TIFF)", "read its text first, as with tesseract FILE -"),
    (b"MM\x00*", "a picture (TIFF)", "read its text first, as with tesseract FILE -"),
    (b"%!PS", "PostScript", "extract its text first, as with ps2ascii FILE"),
    (b"AT&TFORM", "a DjVu document", "extract its text first, as with djvutxt FILE"),
    (b"BZh", "packed with bzip2", "unpack it first: bunzip2 --keep FILE"),
    (b"\xfd7zXZ\x00", "packed with xz", "unpack it first: unxz --keep FILE"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", "unpack it first: unzstd FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first: 7z x FILE"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first: unrar x FILE"),
    (b"PAR1", "a Parquet file",
     "write it as JSON lines first, as with pandas.read_parquet(NAME).to_json('data.jsonl', "
     "lines=True, orient='records')"),
    (b"ARROW1", "an Arrow file", "write it as JSON lines first"),
    (b"SQLite format 3\x00", "a database (SQLite)", "export its text first"),
    (b"\x93NUMPY", "a NumPy array", "pass the text itself"),
    (b"\x7fELF", "a program", "pass a text"),
)  # fmt: skip
_PACKAGES = (  # what a zip holds, what it then is, and what to do
    ("word/", "a Word document (.docx)", "save it as plain text, or: pandoc --to=plain FILE"),
    ("xl/", "a spreadsheet (.xlsx)", "save its sheets as CSV"),
    ("ppt/", "a presentation (.pptx)", "save it as plain text (an outline)"),
    ("META-INF/container.xml", "an e-book (EPUB)", "convert it first: pandoc --to=plain FILE"),
    ("content.xml", "an OpenDocument file", "save it as plain text, or: pandoc --to=plain FILE"),
)


_ICONV = "iconv --from-code={} --to-code=UTF-8 FILE"


def warn(message: str) -> None:
    """Tells the user on the standard error what was passed over, without ending anything."""
    _LOG.warning(message)


def read_text(path: str | os.PathLike[str], name: str | None = None) -> str:
    """The text of a file; line ends are those of the file.

    Args:
      path: of the file.
      name: what it is to the user, for errors: `--document=notes.txt`. By default the path.

    Raises ConfigError where there is no such file, or no text in it.
    """
    name = name or os.fspath(path)
    return decode(read_bytes(path, name), name)


def read_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    """What a file holds, unpacked where it is packed with gzip. As `read_text`."""
    file = paths.locate(path)
    with paths.reaching(path, name):
        check(not file.is_dir(), f"{name}: is a folder; pass a text file")
        try:
            data = file.read_bytes()
        except OSError as error:
            if paths.is_remote(path):
                raise
            why = f"{name}: {error.strerror}; pass the path of a text file"
            raise ConfigError(why) from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{name}: is packed with gzip, and damaged ({error}); copy it again from where it is "
            "whole"
        ) from error


def decode(data: bytes, name: str) -> str:
    """The text that bytes spell. Raises ConfigError where they are none; `name` as `read_text`."""
    mark, encoding = next(
        ((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "")
    )
    if not mark:
        _refuse_others(data, name)
        encoding = _guess_encoding(data)
    body = data[len(mark) :]
    try:
        text = body.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        raise ConfigError(_explain(name, data, len(mark) + error.start, encoding, error)) from None
    text = text.removesuffix("\x1a")  # with which DOS ends a file
    at = text.find("\0")
    check(
        at < 0,
        f"{name}: character {at} is NUL, which no text has; this is a file of another kind: pass "
        "one of text, in UTF-8 or UTF-16",
    )
    return _without_surrogates(text, name)


def _guess_encoding(data: bytes) -> str:
    """UTF-16 without a mark has a NUL beside every letter; all else is taken for UTF-8."""
    sample = data[:_SAMPLE]
    if len(data) % 2 == 0 and b"\0" in sample:
        even, odd = sample[::2], sample[1::2]
        if odd.count(0) > 0.3 * len(odd) and not even.count(0):
            return "utf-16-le"
        if even.count(0) > 0.3 * len(even) and not odd.count(0):
            return "utf-16-be"
    return "utf-8"


def _refuse_others(data: bytes, name: str) -> None:
    """Raises ConfigError for files of well-known kinds that are no text."""
    start = data[:64].lstrip()
    for signature, kind, advice in _SIGNATURES:
        check(
            not start.startswith(signature),
            f"{name}: is {kind}; allowed is text: {_spell(advice, name)}",
        )
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind, advice = _describe_zip(data)
        raise ConfigError(f"{name}: is {kind}; allowed is text: {_spell(advice, name)}")


def _spell(advice: str, name: str) -> str:
    """Advice with a command that can be pasted: it names the file itself."""
    path = name.partition("=")[2] or name
    return advice.replace("FILE", shlex.quote(path)).replace("NAME", repr(path))


def _describe_zip(data: bytes) -> tuple[str, str]:
    """(what an archive is, what to do)."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        names = []
    for part, kind, advice in _PACKAGES:
        if any(name.startswith(part) for name in names):
            return kind, advice
    return "a zip archive", "unpack it first: unzip FILE"


def _explain(name: str, data: bytes, at: int, encoding: str, error: UnicodeDecodeError) -> str:
    """Why bytes are not text, and which command makes them so, where one can."""
    found = f"{name}: byte {data[at]:#04x} at offset {at} is not {encoding.upper()}"
    found = f"{found} ({error.reason}); allowed is UTF-8 text"
    if encoding != "utf-8":
        return f"{found}: the file is cut short or damaged; copy it again"
    if _CONTROLS.search(data):
        return f"{found}, and this is a file of another kind: pass one of text"
    if re.search(rb"[\x80-\x9f]", data):
        try:
            data.decode("cp1252")
        except UnicodeDecodeError:
            return (
                f"{found}: convert it with iconv --to-code=UTF-8 --from-code=X, where X is the "
                f"encoding that it was written in ({_spell('file --mime-encoding FILE', name)} "
                "guesses)"
            )
        return f"{found}: convert it, as with {_spell(_ICONV.format('WINDOWS-1252'), name)}"
    return f"{found}: convert it, as with {_spell(_ICONV.format('LATIN1'), name)}"


def _without_surrogates(text: str, name: str) -> str:
    if not _SURROGATE.search(text):
        return text
    # Halves that belong together are one character, which two escapes or bytes have parted.
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    clean, count = _SURROGATE.subn("\N{REPLACEMENT CHARACTER}", joined)
    if count:
        warn(f"{name}: {count} halves of characters (lone surrogates) are read as U+FFFD")
    return clean


# ---------------------------------------------------------------------------------------------
# JSON


def read_records(path: str | os.PathLike[str], name: str | None = None) -> Iterator[Any]:
    """The records of a file of JSON: one a line, or a list of them, whichever it is.

    Raises ConfigError, naming file, line and column, where it is neither.
    """
    name = name or os.fspath(path)
    text = read_text(path, name)
    check(bool(text.strip()), f"{name}: is empty; {_RECORDS}")
    whole = _read_whole(text, name)
    records = _read_lines(text, name) if whole is None else whole
    # Most files have none, and looking into every text of a large one takes as long as reading it.
    return _clean_all(records, name) if may_hold_surrogates(text) else iter(records)


def may_hold_surrogates(text: str) -> bool:
    """Whether JSON, which can spell halves of characters as escapes, does so, in pairs or alone."""
    return _ESCAPED.search(text) is not None


_RECORDS = "allowed are records of JSON, a list or one a line"
_LINE = re.compile(r"([^\n]*+)\n?+")
_FIRST_LINE = re.compile(r"\s*+([^\n]*)")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")


def _read_whole(text: str, name: str) -> list[Any] | None:
    """The records of a list, or the one object that goes over several lines; None for lines."""
    first = _FIRST_LINE.match(text)[1]  # type: ignore[index]  # it matches any text
    if first[0] != "[" and first.strip() != "{":
        return None
    try:
        whole = parse_json(text)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            parse_json(first)
            return None  # lists, one a line
        raise _no_json(name, error, getattr(error, "lineno", 1)) from error
    return whole if isinstance(whole, list) else [whole]


def _read_lines(text: str, name: str) -> Iterator[Any]:
    # Not `splitlines`: a text in JSON may hold U+2028. Nor all at once: one copy of it is enough.
    for number, found in enumerate(_LINE.finditer(text), start=1):
        line = found[1].removesuffix("\r")
        if not line.strip():
            continue
        try:
            yield parse_json(line)
        except ValueError as error:
            raise _no_json(name, error, number) from error


def _no_json(name: str, error: ValueError, line: int) -> ConfigError:
    where, why = f"line {line}", str(error)
    if isinstance(error, json.JSONDecodeError):
        where, why = f"{where}, column {error.colno}", error.msg
    return ConfigError(f"{name}, {where}: is no JSON ({why}); {_RECORDS}")


def read_json(path: pathlib.Path, what: str, fits: Callable[[Any], bool]) -> Any:
    """The value in a file that only tells of something; None where it is torn or of another kind.

    A warning then names the file, and the line where it breaks.

    Args:
      path: of the file.
      what: it should hold, such as "summary of evaluate.py".
      fits: whether a value is such a thing.

    Raises ConfigError where a bucket cannot be reached or refuses: what it holds is then not known.
    """
    where = str(path)
    try:
        value = parse_json(path.read_bytes().decode("utf-8-sig"))
        if fits(value):
            return value
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
    except Exception as error:  # each client of a bucket raises its own
        trouble = paths.find_trouble(path, error)
        if trouble:
            why = f"{path}: cannot be read ({paths.describe(error)})"
            raise paths.make_error(trouble, path, why) from error
        if not isinstance(error, (OSError, ValueError)):
            raise
    warn(f"{where}: is no {what} and is left out")
    return None


def parse_json(text: str) -> Any:
    """The value of a text of JSON. Raises ValueError, whatever is wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _clean_all(records: Iterable[Any], name: str) -> Iterator[Any]:
    """The records without lone surrogates, which JSON can spell as escapes."""
    count = 0
    for record in records:
        clean, found = _clean(record)
        count += found
        yield clean
    if count:
        warn(f"{name}: {count} halves of characters (lone surrogates) are read as U+FFFD")


def _clean(value: Any) -> tuple[Any, int]:
    if isinstance(value, str):
        return _SURROGATE.subn("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        parts = [_clean(item) for item in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        names = [_clean(name) for name in value]
        parts = [_clean(item) for item in value.values()]
        clean = {name: part for (name, _), (part, _) in zip(names, parts, strict=True)}
        return clean, sum(count for _, count in [*names, *parts])
    return value, 0
