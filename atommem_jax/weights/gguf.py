"""Reads GGUF, the one-file format of llama.cpp, as if it were a Hugging Face directory.

A file holds typed fields, then a list of tensors, then their data. Rows of a matrix are stored one
after another, each in blocks of 32 numbers with scales of their own, so that rows can be read and
decoded alone. `open_model` presents the tensors under the names of Hugging Face, and the fields as
those of a config.json.

Kinds that are read: F32, F16, BF16, Q4_0, Q4_1, Q8_0.
"""

import dataclasses
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import tokenizers

from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.weights.hf_config import PublishedError, wrap_tokenizer

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the data, where the field general.alignment does not say otherwise
_BLOCK = 32  # numbers in a block of every quantised kind here

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


# ---------------------------------------------------------------------------------------------
# Kinds of numbers


def _halves(raw: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of each block, as float32 [... blocks 1]."""
    return np.ascontiguousarray(raw[..., at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """32 numbers of four bits from 16 bytes: the low halves first, then the high ones."""
    return np.concatenate([raw & 0x0F, raw >> 4], axis=-1).astype(np.float32)


def _decode_q4_0(raw: np.ndarray) -> np.ndarray:
    return (_nibbles(raw[..., 2:]) - np.float32(8)) * _halves(raw, 0)


def _decode_q4_1(raw: np.ndarray) -> np.ndarray:
    return _nibbles(raw[..., 4:]) * _halves(raw, 0) + _halves(raw, 2)


def _decode_q8_0(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw[..., 2:]).view(np.int8).astype(np.float32) * _halves(raw, 0)


def _plain(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda raw: np.ascontiguousarray(raw).view(dtype)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How numbers are stored: `block` of them in `size` bytes, which `decode` reads.

    decode: uint8 [... blocks size] -> [... blocks block].
    """

    name: str
    block: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


_KINDS = {
    0: _Kind("F32", 1, 4, _plain("<f4")),
    1: _Kind("F16", 1, 2, _plain("<f2")),
    2: _Kind("Q4_0", _BLOCK, 18, _decode_q4_0),
    3: _Kind("Q4_1", _BLOCK, 20, _decode_q4_1),
    8: _Kind("Q8_0", _BLOCK, 34, _decode_q8_0),
    30: _Kind("BF16", 1, 2, _plain(ml_dtypes.bfloat16)),
}


# ---------------------------------------------------------------------------------------------
# The format


@dataclasses.dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]  # outermost dimension first, as in NumPy
    kind: _Kind
    start: int  # of its data, in bytes from the beginning of the file


class File:
    """Fields and tensors of a GGUF file.

    Attributes:
      path: of the file.
      fields: name -> value; arrays are lists.
      shapes: name of each tensor -> shape, outermost dimension first.

    Raises PublishedError for a file that is not GGUF, is truncated, or holds a kind of numbers that
    is not read here.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise PublishedError(f"{self.path}: no such file")
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            try:
                self.fields, self._entries = self._read_header(file)
            except (struct.error, UnicodeDecodeError) as error:
                raise PublishedError(
                    f"{self.path}: ends or breaks within its header, at byte {file.tell()} of "
                    f"{size}; copy the file again"
                ) from error
        for name, entry in self._entries.items():
            end = entry.start + math.prod(entry.shape) // entry.kind.block * entry.kind.size
            if end > size:
                raise PublishedError(
                    f"{self.path}: truncated: ends after {size} bytes, within {name}, which needs "
                    f"{end}; copy the file again"
                )
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Rows (along the outermost dimension) of a tensor, decoded; quantised ones to float32."""
        entry = self._entries[name]
        kind, inner = entry.kind, entry.shape[-1]
        size = math.prod(entry.shape) // kind.block * kind.size
        raw = np.memmap(self.path, np.uint8, "r", entry.start, (size,))
        shaped = raw.reshape(*entry.shape[:-1], inner // kind.block, kind.size)
        found = kind.decode(np.asarray(shaped[rows]))
        return found.reshape(*found.shape[:-2], -1)

    def _read_header(self, file: BinaryIO) -> tuple[dict[str, Any], dict[str, _Entry]]:
        magic = file.read(4)
        if magic != _MAGIC:
            raise PublishedError(
                f"{self.path}: begins with {magic!r}; a GGUF file begins with {_MAGIC!r}"
            )
        (version,) = _unpack(file, "I")
        if version not in _VERSIONS:
            raise PublishedError(
                f"{self.path}: version={version}: allowed are {', '.join(map(str, _VERSIONS))}; "
                "convert the file with a newer llama.cpp"
            )
        num_tensors, num_fields = _unpack(file, "QQ")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            name = _read_string(file)
            fields[name] = self._read_value(file, _unpack(file, "I")[0], name)
        listed = [self._read_entry(file) for _ in range(num_tensors)]
        alignment = int(fields.get("general.alignment", _ALIGNMENT))
        data = -(-file.tell() // alignment) * alignment
        return fields, {
            name: dataclasses.replace(entry, start=data + entry.start) for name, entry in listed
        }

    def _read_value(self, file: BinaryIO, kind: int, name: str) -> Any:
        if kind in _SCALARS:
            return _unpack(file, _SCALARS[kind])[0]
        if kind == _STRING:
            return _read_string(file)
        if kind != _ARRAY:
            raise PublishedError(
                f"{self.path}: field {name} is of type {kind}, which GGUF does not have"
            )
        inner, count = _unpack(file, "IQ")
        if inner in _SCALARS:
            return list(_unpack(file, f"{count}{_SCALARS[inner]}"))
        return [self._read_value(file, inner, name) for _ in range(count)]

    def _read_entry(self, file: BinaryIO) -> tuple[str, _Entry]:
        name = _read_string(file)
        (rank,) = _unpack(file, "I")
        shape = tuple(reversed(_unpack(file, f"{rank}Q")))
        kind, start = _unpack(file, "IQ")
        if kind not in _KINDS:
            allowed = ", ".join(k.name for k in _KINDS.values())
            raise PublishedError(
                f"{self.path}: {name} holds numbers of kind {kind}: allowed are {allowed}; take a "
                "file in one of these"
            )
        if shape[-1] % _KINDS[kind].block:
            raise PublishedError(
                f"{self.path}: {name} {list(shape)} is {_KINDS[kind].name}, whose blocks of "
                f"{_BLOCK} do not divide its rows; the file is damaged, copy it again"
            )
        return name, _Entry(shape, _KINDS[kind], start)


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    size = struct.calcsize(f"<{layout}")
    return struct.unpack(f"<{layout}", file.read(size))


def _read_string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    data = file.read(length)
    if len(data) != length:
        raise struct.error("string")
    return data.decode()


# ---------------------------------------------------------------------------------------------
# A model


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name of a tensor in GGUF -> name in Hugging Face, without number of the layer and '.weight'."""

_ROPE_FACTORS = "rope_freqs.weight"

_ADDED_TYPES = (3, 4)  # control tokens, and those that a user has defined


def _split_by(pattern: str) -> list[Any]:
    """Words by a pattern, then their bytes."""
    pre = tokenizers.pre_tokenizers
    return [
        pre.Split(tokenizers.Regex(pattern), behavior="isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: Mapping[str, Callable[[], list[Any]]] = {
    "qwen2": lambda: _split_by(_WORDS % ""),
    "llama-bpe": lambda: _split_by(_WORDS % "{1,3}"),
    "smollm": lambda: [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
}
"""What `tokenizer.ggml.pre` says -> how text is split before pairs are merged."""


class Model:
    """The weights of a model under the names of Hugging Face; see `pretrained.Weights`.

    Attributes:
      place: path of the file.
      shapes: name -> shape.
      config_fields: of the config.json that the model would have.
    """

    def __init__(self, file: File):
        self._file = file
        self.place = str(file.path)
        self._source = {_rename(name): name for name in file.shapes if name != _ROPE_FACTORS}
        self.shapes = {ours: file.shapes[name] for ours, name in self._source.items()}
        self.config_fields = _make_config(file)
        fields = self.config_fields
        # llama.cpp pairs channels (2i, 2i + 1) in its llama architecture, where Hugging Face pairs
        # (i, i + d/2).
        self._heads = (
            {
                "q_proj": fields["num_attention_heads"],
                "k_proj": fields["num_key_value_heads"],
            }
            if fields["architectures"] == ["LlamaForCausalLM"]
            else {}
        )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """See `pretrained.Weights.read`; quantised tensors come as float32."""
        rows: np.ndarray | slice = index[0]
        heads = self._heads.get(name.rpartition(".weight")[0].rpartition(".")[2])
        if heads:
            count = self.shapes[name][0]
            paired = np.arange(count).reshape(heads, count // heads // 2, 2)
            rows = paired.swapaxes(1, 2).reshape(-1)[index[0]]
        return self._file.read(self._source[name], rows)[(slice(None), *index[1:])]

    def read_tokenizer(
        self, vocab_size: int, *, reserved: Sequence[str] = (), pad_token: str | None = None
    ) -> HuggingFaceTokenizer:
        """The tokenizer in the file; arguments as in `published.read_tokenizer`.

        Raises PublishedError for a kind that is not known here, and as `wrap_tokenizer`.
        """
        fields = self._file.fields
        pieces = fields.get("tokenizer.ggml.tokens")
        kind, split = fields.get("tokenizer.ggml.model"), str(fields.get("tokenizer.ggml.pre"))
        if kind != "gpt2" or split not in _SPLITS or pieces is None:
            raise PublishedError(
                f"{self.place}: tokenizer.ggml.model={kind!r}, tokenizer.ggml.pre={split!r}: "
                f"allowed are 'gpt2' and one of {', '.join(_SPLITS)}; take the model's "
                "tokenizer.json"
            )
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        # Llama 3 takes a word that is a piece as it is, whether merges lead there or not.
        model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(_SPLITS[split]())
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        types = fields.get("tokenizer.ggml.token_type", [])
        added = [p for p, t in zip(pieces, types, strict=False) if t in _ADDED_TYPES]
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(p, special=True, normalized=False) for p in added]
        )

        def name_of(field: str) -> str | None:
            number = fields.get(f"tokenizer.ggml.{field}_token_id")
            return pieces[number] if number is not None and number < len(pieces) else None

        names = {
            "eos_token": name_of("eos"),
            "pad_token": name_of("padding") if pad_token is None else pad_token,
            "bos_token": name_of("bos"),
            "chat_template": fields.get("tokenizer.chat_template"),
        }
        return wrap_tokenizer(tokenizer, names, vocab_size, reserved=reserved, where=self.place)


def open_model(path: str | os.PathLike[str]) -> Model:
    """Reads the header of a file. Raises PublishedError for what is not a model that we have."""
    return Model(File(path))


def _rename(name: str) -> str:
    """The name in Hugging Face; unknown names stay as they are, and are refused with the model."""
    matched = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if not matched or matched[2] not in _NAMES:
        return name
    layer = f"model.layers.{matched[1]}." if matched[1] else ""
    return f"{layer}{_NAMES[matched[2]]}.weight"


def _make_config(file: File) -> dict[str, Any]:
    kind = file.fields.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise PublishedError(
            f"{file.path}: general.architecture={kind!r}: allowed are "
            f"{', '.join(_ARCHITECTURES)}; convert a model of these"
        )

    def get(name: str, default: Any = None) -> Any:
        value = file.fields.get(f"{kind}.{name}", default)
        if value is None:
            raise PublishedError(
                f"{file.path}: field {kind}.{name} is missing; convert the model again"
            )
        return value

    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        raise PublishedError(
            f"{file.path}: {kind}.rope.scaling.type={scaling!r}: allowed is 'none'; take the "
            "model's safetensors"
        )
    heads, width = get("attention.head_count"), get("embedding_length")
    head_width = get("attention.key_length", width // heads)
    theta = get("rope.freq_base", 10_000.0)
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": get("feed_forward_length"),
        "rms_norm_eps": _shorten(get("attention.layer_norm_rms_epsilon")),
        "vocab_size": file.shapes.get("token_embd.weight", (0,))[0],
        "rope_theta": theta,
        "rope_scaling": _make_scaling(file, theta, head_width),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "pad_token_id": file.fields.get("tokenizer.ggml.padding_token_id"),
    }


def _shorten(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 was meant, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _make_scaling(file: File, theta: float, head_width: int) -> Mapping[str, Any] | None:
    """`rope_scaling` from the divisors that llama.cpp stores instead, one a pair of channels."""
    if _ROPE_FACTORS not in file.shapes:
        return None
    stored = file.read(_ROPE_FACTORS).astype(np.float64)
    factor = float(stored.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * theta ** (-np.arange(0, head_width, 2) / head_width) / (2 * math.pi)
    kept = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    if not np.allclose(stored, 1 / (kept + (1 - kept) / factor), rtol=1e-3):
        raise PublishedError(
            f"{file.path}: {_ROPE_FACTORS} is not what Llama 3 has with 8,192 original positions; "
            "take the model's safetensors"
        )
    return scaling
