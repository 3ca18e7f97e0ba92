"""Text and JSON of others: what is read, and what is refused with advice that works."""

import gzip
import io
import json
import random
import re
import zipfile

import pytest

from atommem_jax import text_files
from atommem_jax.config import ConfigError

TEXT = "Torsal works in Ossat.\nÄhn, 東京 🎉\n"


def write(tmp_path, data: bytes):
    file = tmp_path / "file"
    file.write_bytes(data)
    return file


def make_zip(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return data.getvalue()


def name_data(value: object) -> str | None:
    """The name of a parameter: archives hold the time, and every worker must name them alike."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        gzip.compress(TEXT.encode()),
        gzip.compress(TEXT.encode("utf-16")),
        TEXT.encode() + b"\x1a",
    ],
    ids=name_data,
)
def test_the_same_text_comes_of_every_encoding(tmp_path, data):
    assert text_files.read_text(write(tmp_path, data)) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_known_without_a_mark(tmp_path, encoding):
    text = "Torsal works in Ossat, and later in Lümm.\r\n" * 3
    assert text_files.read_text(write(tmp_path, text.encode(encoding))) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_zip("word/document.xml"), r"is a Word document \(.docx\); .*pandoc --to=plain"),
        (make_zip("xl/workbook.xml"), r"is a spreadsheet .*as CSV"),
        (make_zip("mimetype", "META-INF/container.xml"), r"is an e-book .*pandoc"),
        (make_zip("a.txt"), "is a zip archive; .*unzip"),
        (make_zip("a.txt")[:20], "is a zip archive; .*unzip"),
        (b"%PDF-1.7\n", "is a PDF; .*pdftotext"),
        (b"\n%PDF-1.7\nall of it ASCII", "is a PDF; .*pdftotext"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"is a picture \(PNG\)"),
        (b"{\\rtf1\\ansi plain}", "is rich text"),
        (b"PAR1\x15\x04", "is a Parquet file; .*to_json"),
        (b"BZh91AY", "is packed with bzip2; .*bunzip2"),
        (gzip.compress(TEXT.encode())[:-9], "is packed with gzip, and damaged .*copy it again"),
        (b"one\0two three", "character 3 is NUL, which no text has"),
        (b"\0" * 40, "character 0 is NUL"),
        (bytes(range(1, 256)), "byte 0x80 at offset 127 is not UTF-8.*file of another kind"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3 is not UTF-8.*--from-code=LATIN1"),
        (b"\x93caf\xe9\x94", "byte 0x93 at offset 0 is not UTF-8.*--from-code=WINDOWS-1252"),
        (b"\x81\x8d caf", "byte 0x81 at offset 0 .*file --mime-encoding"),
        (b"\xff\xfea\0b", "byte 0x62 at offset 4 is not UTF-16-LE.*cut short"),
    ],
    ids=name_data,
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(tmp_path, data, message):
    file = write(tmp_path, data)
    with pytest.raises(ConfigError, match=f"^--document=notes: {message}"):
        text_files.read_text(file, "--document=notes")


def test_advice_names_the_file_as_a_shell_takes_it(tmp_path):
    file = tmp_path / "my report.docx"
    file.write_bytes(make_zip("word/document.xml"))
    with pytest.raises(ConfigError, match=f"pandoc --to=plain '{re.escape(str(file))}'$"):
        text_files.read_text(file, f"--document={file}")
    file.write_bytes(b"PAR1\x15\x04")
    with pytest.raises(
        ConfigError, match=rf"read_parquet\({re.escape(repr(str(file)))}\)\.to_json"
    ):
        text_files.read_text(file, f"--document={file}")
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ConfigError, match=f"LATIN1 --to-code=UTF-8 '{re.escape(str(file))}'$"):
        text_files.read_text(file, f"--document={file}")


def test_advice_for_another_encoding_leads_to_the_text(tmp_path):
    """What the advised iconv makes of the file is read, and is what was written."""
    for encoding, named in (("latin-1", "LATIN1"), ("cp1252", "WINDOWS-1252")):
        text = "Ein “schöner” Tag" if encoding == "cp1252" else "Ein schöner Tag"
        file = write(tmp_path, text.encode(encoding))
        with pytest.raises(ConfigError, match=named):
            text_files.read_text(file)
        assert text_files.read_text(write(tmp_path, file.read_bytes().decode(named).encode())) == (
            text
        )


def test_lone_surrogates_are_replaced_and_counted(tmp_path, caplog):
    assert text_files.read_text(write(tmp_path, b"a\xed\xa0\x80b\xed\xb0\x81")) == "a\ufffdb\ufffd"
    assert "file: 2 halves of characters (lone surrogates) are read as U+FFFD" in caplog.text
    caplog.clear()
    lines = b'{"a": "\\ud83d", "\\udc00": ["\\ud83c\\udf89"]}\n'
    assert list(text_files.read_records(write(tmp_path, lines))) == [
        {"a": "\ufffd", "\ufffd": ["🎉"]}
    ]
    assert "file: 2 halves" in caplog.text


RECORDS = [{"id": 1, "text": "a\u2028b\x85c"}, {"id": 2, "text": "東京"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES + "\n \n",
        "\n" + LINES.replace("\n", "\n\n"),
        LINES.replace("\n", "\r\n"),
        LINES.rstrip(),
        "\ufeff" + LINES,
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\n " + json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n\n",
    ],
)
def test_records_come_of_lines_and_of_lists_alike(tmp_path, text):
    assert list(text_files.read_records(write(tmp_path, text.encode()))) == RECORDS
    packed = write(tmp_path, gzip.compress(text.encode()))
    assert list(text_files.read_records(packed)) == RECORDS


def test_lists_one_a_line_and_one_object_of_many_lines_are_records_too(tmp_path):
    assert list(text_files.read_records(write(tmp_path, b"[1]\n[2]\n"))) == [[1], [2]]
    assert list(text_files.read_records(write(tmp_path, b'{\n "a": 1\n}\n'))) == [{"a": 1}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; allowed are records of JSON, a list or one a line"),
        (LINES + "\n<html>", r", line 4, column 1: is no JSON \(Expecting value\)"),
        (
            '{"a": 1}\r\n{"b": 2\r\n{"c": 3}',
            r", line 2, column 8: is no JSON \(Expecting ',' delim",
        ),
        ('[\n {"a": 1},\n {"b" 2}\n]', r", line 3, column 7: is no JSON \(Expecting ':' delim"),
        ("[" * 200_000, "is no JSON"),
        ('{"a": ' + "9" * 5000 + "}", r", line 1: is no JSON \(Exceeds the limit"),
    ],
)
def test_broken_json_is_named_by_line_and_column(tmp_path, text, message):
    file = write(tmp_path, text.encode())
    with pytest.raises(ConfigError) as caught:
        list(text_files.read_records(file))
    assert str(caught.value).startswith(str(file))
    with pytest.raises(ConfigError, match=message):
        list(text_files.read_records(file))


def decode_or_explain(data: bytes) -> tuple[str, str]:
    """(the text, '') or ('', why there is none)."""
    try:
        return text_files.decode(data, "x"), ""
    except ConfigError as error:
        return "", str(error)


def test_whatever_the_bytes_are_nothing_but_a_sentence_comes():
    """Ten thousand mutations of what is read: a text, or a ConfigError."""
    rng = random.Random(0)
    seeds = [
        TEXT.encode(), TEXT.encode("utf-16"), LINES.encode(), json.dumps(RECORDS).encode(),
        make_zip("word/document.xml"), b"%PDF-1.7\n", TEXT.encode("cp1252", "replace"),
    ]  # fmt: skip
    read = refused = 0
    for _ in range(10_000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        text, message = decode_or_explain(bytes(data))
        read, refused = read + (not message), refused + bool(message)
        assert not message or message.startswith("x: ")
        text.encode()  # holds no half of a character
        assert "\0" not in text
    assert read > 1000
    assert refused > 1000
