"""Text to token ids and back, behind one small interface.

`SentencePieceTokenizer` is for models trained here; `HuggingFaceTokenizer` wraps a byte-level
BPE of the `tokenizers` library for pretrained ones. Both keep two promises that the rest of the
package builds on:

* `decode(encode(text)) == text` for every string of Unicode scalar values;
* no text encodes to a reserved token, however it spells one. Only a model that generates can
  therefore write an action (architecture.md, rules of the house).
"""

import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Float

_ESCAPE = "\u2581"  # SentencePiece's own spelling of a space
_FILE_NAME = "tokenizer.model"


class Tokenizer(Protocol):
    """What the package asks of a tokenizer.

    Attributes:
      vocab_size: number of ids V; equal to the width of the model's logits.
      pad_id: id of padding; never equal to `eos_id`.
      eos_id: id that ends a response.
      reserved: name -> id of the tokens that no text encodes to, without pad and eos.
      token_bytes: V byte strings; `b""` for reserved, pad, eos and unused ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def reserved(self) -> Mapping[str, int]: ...
    @property
    def token_bytes(self) -> tuple[bytes, ...]: ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without pad, eos or any reserved id. Empty text has no ids.

        Raises ValueError if `text` holds a lone surrogate, which has no UTF-8 form.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; reserved, pad and eos are dropped, broken UTF-8 becomes U+FFFD.

        Raises ValueError if an id lies outside 0..V-1.
        """
        ...

    def to_bytes(self) -> bytes:
        """Everything needed to rebuild the tokenizer with the class's `from_bytes`."""
        ...

    @property
    def information(self) -> Float[np.ndarray, " V"]:
        """How much each token tells, in nats: about -log of its share of the training text."""
        ...


_TIMES_A_NAT = 8


def weigh_by_rarity(tokenizer: Tokenizer, most: int) -> bytes:
    """How often each token is to count in a search: an octet of 1 to min(`most`, 255) for each id.

    Inverse frequency (Spärck Jones 1972), rounded to integers so that sums stay exact: 1 for the
    commonest token, and 8 more, or as many as `most` leaves room for, for every nat that another
    one tells beyond it. Frequencies are those of the text that the tokenizer was trained on, which
    it knows itself.
    """
    nats = tokenizer.information
    nats = nats - nats.min()
    room = min(most, 255) - 1
    scale = min(_TIMES_A_NAT, room / max(float(nats.max()), 1e-9))
    return (np.floor(scale * nats + 0.5) + 1).astype(np.uint8).tobytes()


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: found the lone surrogate {text[error.start]!r} at position {error.start}; "
            "allowed are Unicode scalar values. Clean the text before encoding it."
        ) from None


def _join_bytes(token_bytes: Sequence[bytes], ids: Iterable[int]) -> bytes:
    parts = []
    for token in ids:
        if not 0 <= token < len(token_bytes):
            raise ValueError(
                f"ids: found {token}; allowed are 0..{len(token_bytes) - 1}. Cut rows to their "
                "length before decoding, and check that they belong to this tokenizer."
            )
        parts.append(token_bytes[token])
    return b"".join(parts)


class SentencePieceTokenizer:
    """A unigram SentencePiece model whose encoding is lossless.

    A space belongs to the word that follows it. One space is put before every non-empty text
    and taken off again by `decode`, so that "Anna" has the same token at the start of a text as
    within one.
    """

    def __init__(self, model: bytes):
        """Reads a serialised model as `train` makes it.

        Raises ValueError if the model lacks pad, eos or byte pieces.
        """
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = self._processor.get_piece_size()
        self.vocab_size = size
        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self._byte_ids = _find_byte_pieces(self._processor)
        if self.pad_id < 0 or self.eos_id < 0 or len(self._byte_ids) != 256:
            raise ValueError(
                f"model: found pad_id {self.pad_id}, eos_id {self.eos_id} and "
                f"{len(self._byte_ids)} byte pieces; allowed are ids >= 0 and 256 byte pieces. "
                "Make the model with SentencePieceTokenizer.train."
            )
        pieces = [self._processor.id_to_piece(i) for i in range(size)]
        self.reserved: Mapping[str, int] = {
            piece: i
            for i, piece in enumerate(pieces)
            if self._processor.is_control(i) and i not in (self.pad_id, self.eos_id)
        }
        of_byte = {i: bytes([byte]) for byte, i in self._byte_ids.items()}
        self.token_bytes = tuple(
            b""
            if self._processor.is_control(i) or self._processor.is_unknown(i)
            else of_byte.get(i) or piece.replace(_ESCAPE, " ").encode()
            for i, piece in enumerate(pieces)
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        reserved: Sequence[str] = (),
        *,
        character_coverage: float = 1.0,
    ) -> Self:
        """Trains on `texts`; the result depends on nothing else, so runs are repeatable.

        Args:
          texts: the training texts, in any number of lines each.
          vocab_size: upper bound on V; fewer ids when the texts do not offer as many pieces.
          reserved: names of the tokens that only a model may produce.
          character_coverage: share of the characters that get a piece; the rest are spelled
            in bytes.

        Raises ValueError if `reserved` repeats a name or holds one that SentencePiece keeps for
        itself, if there is no text, or if `vocab_size` is too small for the characters.
        """
        taken = {"<pad>", "</s>", "<unk>", ""} | {f"<0x{byte:02X}>" for byte in range(256)}
        for i, name in enumerate(reserved):
            if name in taken or name in reserved[:i] or any(c.isspace() for c in name):
                raise ValueError(
                    f"reserved: found {name!r}; allowed are distinct names without white space "
                    "other than <pad>, </s>, <unk> and the byte pieces. Rename the tag."
                )
        sentences = _prepare_sentences(texts)
        if not sentences:
            raise ValueError("texts: found no text; at least one non-empty text is needed.")
        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=writer,
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                control_symbols=list(reserved),
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                byte_fallback=True,
                character_coverage=character_coverage,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                max_sentence_length=1 << 30,
                num_threads=1,  # a sum over threads would depend on their number
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(
                f"vocab_size: found {vocab_size}, with {len(reserved)} reserved names and 259 ids "
                f"for bytes, pad, eos and unknown. SentencePiece refused: {error}. "
                "Raise vocab_size or lower character_coverage."
            ) from error
        return cls(writer.getvalue())

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        _check_encodable(text)
        if not text:
            return []
        ids: list[int] = []
        for i, part in enumerate(f" {text}".split(_ESCAPE)):
            if i:  # its piece would come back as a space
                ids += self._spell(_ESCAPE)
            found = self._processor.encode(part)
            # SentencePiece has characters of its own besides the escape: never trust it blindly.
            exact = _join_bytes(self.token_bytes, found) == part.encode()
            ids += found if exact else self._spell(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; one leading space is taken off."""
        return _join_bytes(self.token_bytes, ids).decode(errors="replace").removeprefix(" ")

    def to_bytes(self) -> bytes:
        """The serialised SentencePiece model."""
        return self._model

    @property
    def information(self) -> Float[np.ndarray, " V"]:
        """The log-probabilities of the unigram model; what it has none for is as rare as any."""
        scores = [self._processor.get_score(i) for i in range(self.vocab_size)]
        nats = -np.array(scores, np.float64)
        # Bytes and reserved tokens come with 0.
        return np.where(nats > 0, nats, nats.max())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`."""
        return cls(data)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.model` into `directory`, which is made if needed."""
        path = pathlib.Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / _FILE_NAME).write_bytes(self._model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote. Raises FileNotFoundError if there is nothing to read."""
        return cls((pathlib.Path(directory) / _FILE_NAME).read_bytes())

    def _spell(self, text: str) -> list[int]:
        return [self._byte_ids[byte] for byte in text.encode()]


def _find_byte_pieces(processor: sentencepiece.SentencePieceProcessor) -> dict[int, int]:
    """byte -> id of its fallback piece."""
    found = {}
    for i in range(processor.get_piece_size()):
        if processor.is_byte(i):
            found[int(processor.id_to_piece(i)[3:-1], 16)] = i
    return found


def _prepare_sentences(texts: Iterable[str]) -> list[str]:
    """Lines with the leading space of `encode`, then every repeated word alone and with a stop.

    SentencePiece takes as candidates only what occurs in two different space-delimited strings:
    a word that never meets punctuation ("works"), or always the same ("rain."), would be cut to
    bits however frequent it is. The added lines give each such word its second string.
    """
    lines: list[str] = []
    counts: dict[str, int] = {}
    for text in texts:
        _check_encodable(text)
        for line in text.replace(_ESCAPE, " ").replace("\0", " ").splitlines():
            if line.strip():
                lines.append(f" {line}")
                for word in re.findall(r"(?<=\s)\w+", lines[-1]):
                    counts[word] = counts.get(word, 0) + 1
    repeated = [word for word, count in counts.items() if count > 1]
    return lines + [f" {word}{end}" for word in repeated for end in ("", ".")]


class HuggingFaceTokenizer:
    """A byte-level BPE of the `tokenizers` library.

    Text is encoded without the added tokens and without Unicode normalisation: ids equal those
    of the library for normalised text that spells no added token, and every text round-trips.
    Added tokens other than pad and eos become `reserved`. Truncation and padding, which a trainer
    may have left in a tokenizer.json, are ignored, and so is `add_prefix_space` by `encode`: what
    it encodes stands within a prompt.

    Attributes:
      chat_template: the Jinja text of the model's chat format, several by name, or None; see
        `chat.find_chat_template`.
      bos_token: name of the token that a chat template may begin with, or None.
      published: file name -> fields that were published with the model and are not ours. Nothing
        here reads them; they come with the tokenizer through checkpoints to whoever exports.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | str | os.PathLike[str],
        *,
        eos_token: str,
        pad_token: str,
        vocab_size: int | None = None,
        lossless: bool = True,
        chat_template: str | Mapping[str, str] | None = None,
        bos_token: str | None = None,
        published: Mapping[str, Any] | None = None,
    ):
        """Wraps `tokenizer`, an object or the path of a tokenizer.json.

        Args:
          tokenizer: must be byte-level (GPT-2, Qwen, Llama 3, SmolLM kinds).
          eos_token: name of the token that ends a response.
          pad_token: name of the token of padding, another one.
          vocab_size: rows of the model's embedding, where it has more than the tokenizer.
          lossless: insists on a piece for each of the 256 bytes. Some published vocabularies lack
            a few (SmolLM2's has none for U+0004): with False, `encode` drops what needs them.
          chat_template: of tokenizer_config.json.
          bos_token: of tokenizer_config.json.
          published: see above.

        Raises ValueError for an unknown or shared name, a model or a vocabulary that is not
        byte-level BPE, or a `vocab_size` below the tokenizer's own.
        """
        if not isinstance(tokenizer, tokenizers.Tokenizer):
            tokenizer = tokenizers.Tokenizer.from_file(os.fspath(tokenizer))
        check_kind(tokenizer)
        self._source = tokenizer.to_str()
        self._names = {"eos_token": eos_token, "pad_token": pad_token}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        for field, name in self._names.items():
            if name not in vocabulary:
                raise ValueError(
                    f"{field}: found {name!r}; allowed are tokens of the vocabulary. Take the "
                    "name from the model's tokenizer_config.json, or add the token first."
                )
        self.eos_id, self.pad_id = vocabulary[eos_token], vocabulary[pad_token]
        if self.eos_id == self.pad_id:
            raise ValueError(
                f"pad_token: found {pad_token!r}, which is also eos_token; allowed is another "
                "token, since a response must tell its end from padding. Choose an unused one."
            )
        least = max(vocabulary.values()) + 1
        self.vocab_size = least if vocab_size is None else vocab_size
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size: found {vocab_size}; allowed is {least} or more, the size of the "
                "tokenizer. Take the number of rows of the model's embedding."
            )
        added = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
        ends = {self.eos_id, self.pad_id}
        self.reserved: Mapping[str, int] = {n: i for n, i in added.items() if i not in ends}
        hidden = ends | set(added.values())
        alphabet = _byte_alphabet()
        spelled = [b""] * self.vocab_size
        for piece, i in vocabulary.items():
            if i not in hidden:
                if not alphabet.keys() >= set(piece):
                    raise ValueError(
                        f"tokenizer: found the piece {piece!r}; allowed are byte-level pieces. "
                        "Use a byte-level BPE, or SentencePieceTokenizer."
                    )
                spelled[i] = bytes(alphabet[character] for character in piece)
        if lossless and len({piece for piece in spelled if len(piece) == 1}) != 256:
            raise ValueError(
                "tokenizer: found a vocabulary without a piece for each of the 256 bytes. Train "
                "it with initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), or pass "
                "lossless=False."
            )
        self.token_bytes = tuple(spelled)
        self._lossless = lossless
        if tokenizer.truncation or tokenizer.padding:
            tokenizer = tokenizers.Tokenizer.from_str(self._source)  # the caller's stays as it is
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.chat_template, self.bos_token = chat_template, bos_token
        self.published: Mapping[str, Any] = published or {}
        self._encoder = _strip_added_tokens(self._source, set(added) | set(self._names.values()))

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        _check_encodable(text)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_control(self, text: str) -> list[int]:
        """The ids of a text of our own, in which the name of an added token is that token.

        For the parts of a prompt that its author wrote, such as a chat format: never for text of
        documents, users or models.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @property
    def eos_token(self) -> str:
        return self._names["eos_token"]

    @property
    def special_tokens(self) -> dict[str, str]:
        """The names that a chat template may write, as far as there are such tokens."""
        return self._names | ({"bos_token": self.bos_token} if self.bos_token else {})

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return _join_bytes(self.token_bytes, ids).decode(errors="replace")

    def to_bytes(self) -> bytes:
        """JSON of the tokenizer and of the constructor's other arguments."""
        fields: dict[str, Any] = {
            "tokenizer": self._source,
            "vocab_size": self.vocab_size,
            **self._names,
        }
        fields |= {} if self._lossless else {"lossless": False}
        fields |= {"chat_template": self.chat_template} if self.chat_template else {}
        fields |= {"bos_token": self.bos_token} if self.bos_token else {}
        fields |= {"published": self.published} if self.published else {}
        return json.dumps(fields).encode()

    @property
    def information(self) -> Float[np.ndarray, " V"]:
        """By the law of Zipf and Mandelbrot: a share falls with rank + 32.

        Merges were learned from the commonest on, in the order of their ids, and bytes, among them
        punctuation, come before them.
        """
        rank = np.maximum(np.arange(self.vocab_size, dtype=np.float64) - 256, 0.0)
        return np.log(rank + 32)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Inverse of `to_bytes`."""
        fields = json.loads(data)
        return cls(tokenizers.Tokenizer.from_str(fields.pop("tokenizer")), **fields)


def from_bytes(data: bytes) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """The tokenizer that `to_bytes` of either class wrote."""
    # A SentencePiece model is a protocol buffer, which cannot begin so.
    kind = HuggingFaceTokenizer if data[:1] == b"{" else SentencePieceTokenizer
    return kind.from_bytes(data)


def check_kind(tokenizer: tokenizers.Tokenizer) -> None:
    """Raises ValueError, naming the kind, for a tokenizer that is no BPE."""
    if not isinstance(tokenizer.model, tokenizers.models.BPE):
        raise ValueError(
            f"tokenizer: holds a {type(tokenizer.model).__name__} tokenizer; allowed is a "
            "byte-level BPE. Choose another model."
        )


def _byte_alphabet() -> dict[str, int]:
    """character -> byte of the GPT-2 alphabet: printable bytes stand for themselves, the others
    follow from U+0100 on."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    alphabet = {chr(byte): byte for byte in kept}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(moved)}


def _strip_added_tokens(source: str, names: set[str]) -> tokenizers.Tokenizer:
    """The tokenizer that plain text goes through: it does not know any of `names`."""
    parts: dict[str, Any] = json.loads(source)
    for field in ("normalizer", "post_processor", "truncation", "padding"):
        parts[field] = None
    parts["added_tokens"] = []
    pre = parts.get("pre_tokenizer") or {}
    for part in [pre, *pre.get("pretokenizers", [])]:
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
    model = parts["model"]
    model["vocab"] = {piece: i for piece, i in model["vocab"].items() if piece not in names}
    # A merge may be stored as "a b" or as ["a", "b"]; none may make or use a name.
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [[a, b] for a, b in pairs if not names & {a, b, a + b}]
    return tokenizers.Tokenizer.from_str(json.dumps(parts))
