"""A model in GGUF, the one-file format of llama.cpp, as if it were a Hugging Face directory.

`open_model` presents the tensors under the names of Hugging Face, and the fields as those of a
config.json. A model that was split into several files is opened by any of them.
"""

import array
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.weights import hf_config
from atommem_jax.weights.gguf_file import File
from atommem_jax.weights.hf_config import PublishedError
from atommem_jax.weights.hf_tokenizer import wrap_tokenizer

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

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
"""Name of a tensor in GGUF -> name in Hugging Face, without number of the layer, weight or bias."""

_ROPE_FACTORS = "rope_freqs.weight"

_ADDED_TYPES = (3, 4)  # control tokens, and those that a user has defined
_EMPTY_TYPES = (2, 5)  # unknown and unused: '[PAD7]' and the like, which fill a vocabulary up


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
    """The weights of a model under the names of Hugging Face; see `huggingface.Weights`.

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
        """See `huggingface.Weights.read`; quantised tensors come as float32."""
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
        """The tokenizer in the file; arguments as in `hf_tokenizer.read_tokenizer`.

        Raises PublishedError for a kind that is not known here, and as `wrap_tokenizer`.
        """
        fields, split = self._file.fields, self._find_split()
        pieces = self._read_strings("tokenizer.ggml.tokens")

        def find(field: str) -> int | None:
            number = fields.get(f"tokenizer.ggml.{field}_token_id")
            known = isinstance(number, int) and 0 <= number < len(pieces)
            return number if known else None

        ids = {"eos_token": find("eos"), "pad_token": find("padding"), "bos_token": find("bos")}
        names: dict[str, Any] = {n: None if i is None else pieces[i] for n, i in ids.items()}
        if pad_token is not None:
            names["pad_token"] = pad_token
        vocabulary, added = self._find_ids(pieces, names.values(), reserved)
        merges: Any = [tuple(m.split(" ")) for m in self._read_strings("tokenizer.ggml.merges")]
        try:
            # Llama 3 takes a word that is a piece as it is, whether merges lead there or not.
            model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe")
        except Exception as error:  # the library raises nothing narrower
            raise PublishedError(
                f"{self.place}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error}); "
                "copy the file again, or take the model's tokenizer.json"
            ) from error
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(_SPLITS[split]())
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [tokenizers.AddedToken(p, special=True, normalized=False) for p in added]
        )
        names["chat_template"] = self._find_chat_template()
        return wrap_tokenizer(
            tokenizer,
            names,
            vocab_size,
            reserved=reserved,
            where=self.place,
            rest=self.list_rest(),
        )

    def list_rest(self) -> dict[str, dict[str, Any]]:
        """As `hf_config.list_rest`."""
        found = hf_config.drop_ours(self.config_fields)
        return {hf_config.CONFIG_FILE: found} if found else {}

    def _find_split(self) -> str:
        """How text is split, by the name that llama.cpp has for it.

        Raises PublishedError where the file does not say so, or has another kind of tokenizer.
        """
        for field, allowed in (
            ("tokenizer.ggml.model", ["gpt2"]),
            ("tokenizer.ggml.pre", list(_SPLITS)),
            ("tokenizer.ggml.tokens", None),
        ):
            found = self._file.fields.get(field)
            if found is None:
                raise PublishedError(
                    f"{self.place}: field {field} is missing, without which the tokenizer in the "
                    "file cannot be read; take the model's tokenizer.json (experiments/convert.py "
                    "--tokenizer), or a file that a newer llama.cpp made"
                )
            if allowed and found not in allowed:
                raise PublishedError(
                    f"{self.place}: {field}={_show(found)}: allowed is one of "
                    f"{', '.join(map(repr, allowed))}; take the model's tokenizer.json "
                    "(experiments/convert.py --tokenizer)"
                )
        return self._file.fields["tokenizer.ggml.pre"]

    def _find_chat_template(self) -> str | dict[str, str] | None:
        """The chat template; where there are several, all by name."""
        prefix = "tokenizer.chat_template"
        found = {
            name.removeprefix(prefix).removeprefix(".") or "default": text
            for name, text in self._file.fields.items()
            if (name == prefix or name.startswith(f"{prefix}.")) and isinstance(text, str)
        }
        return found["default"] if list(found) == ["default"] else found or None

    def _read_strings(self, field: str) -> list[str]:
        found = self._file.fields.get(field)
        if not isinstance(found, list) or not all(isinstance(piece, str) for piece in found):
            kind = "list" if isinstance(found, array.array) else type(found).__name__
            shown = "missing" if found is None else f"a {kind} of other things"
            raise PublishedError(
                f"{self.place}: field {field} is {shown}; it must be a list of strings: copy the "
                "file again, or take the model's tokenizer.json"
            )
        return found

    def _find_ids(
        self, pieces: Sequence[str], needed: Collection[str | None], reserved: Sequence[str]
    ) -> tuple[dict[str, int], list[str]]:
        """Piece -> id, and which pieces are added tokens.

        Pieces without text are left out, but for those `needed`. Their ids are free, and go to what
        of `reserved` is no piece yet, in order.
        """
        types = self._file.fields.get("tokenizer.ggml.token_type", [])
        if not isinstance(types, list | array.array) or len(types) not in (0, len(pieces)):
            raise PublishedError(
                f"{self.place}: field tokenizer.ggml.token_type is {_show(types)}; it must be a "
                f"list of {len(pieces)} numbers, as many as pieces: copy the file again"
            )
        types = types or [1] * len(pieces)
        empty = [t in _EMPTY_TYPES and p not in needed for p, t in zip(pieces, types, strict=True)]
        vocabulary = {piece: i for i, piece in enumerate(pieces) if not empty[i]}
        added = [p for p, t in zip(pieces, types, strict=True) if t in _ADDED_TYPES]
        free = [i for i, is_empty in enumerate(empty) if is_empty]
        fresh = [name for name in dict.fromkeys(reserved) if name not in vocabulary]
        placed = dict(zip(fresh, free, strict=False))
        return vocabulary | placed, added + list(placed)


def open_model(path: str | os.PathLike[str]) -> Model:
    """Reads the header of a file. Raises PublishedError for what is not a model that we have."""
    return Model(File(path))


def _rename(name: str) -> str:
    """The name in Hugging Face; unknown names stay as they are, and are refused with the model."""
    matched = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not matched or matched[2] not in _NAMES:
        return name
    layer = f"model.layers.{matched[1]}." if matched[1] else ""
    return f"{layer}{_NAMES[matched[2]]}.{matched[3]}"


def spell(name: str) -> str:
    """The name in GGUF of a tensor that Hugging Face calls `name`."""
    matched = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?([\w.]+)\.weight", name)
    theirs = {ours: theirs for theirs, ours in _NAMES.items()}
    if not matched or matched[2] not in theirs:
        return name
    layer = f"blk.{matched[1]}." if matched[1] else ""
    return f"{layer}{theirs[matched[2]]}.weight"


def _make_config(file: File) -> dict[str, Any]:
    kind = file.fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise PublishedError(
            f"{file.path}: general.architecture={_show(kind)}: allowed are "
            f"{', '.join(_ARCHITECTURES)}; convert a model of these"
        )

    def get(name: str, default: Any = None) -> Any:
        value = file.fields.get(f"{kind}.{name}", default)
        if value is None:
            raise PublishedError(
                f"{file.path}: field {kind}.{name} is missing; convert the model again"
            )
        return value

    def check(name: str, value: Any, wanted: str, types: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < math.inf:
            raise PublishedError(
                f"{file.path}: field {kind}.{name} is {_show(value)}; it must be {wanted}"
            )
        return value

    def count(name: str, default: int | None = None) -> int:
        return check(name, get(name, default), "a whole number above 0, for all layers", int)

    def number(name: str, default: float | None = None) -> float:
        return float(check(name, get(name, default), "a number above 0", int | float))

    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        raise PublishedError(
            f"{file.path}: {kind}.rope.scaling.type={_show(scaling)}: allowed is 'none'; take the "
            "model's safetensors"
        )
    heads, width = count("attention.head_count"), count("embedding_length")
    head_width = count("attention.key_length", max(width // heads, 1))
    theta = number("rope.freq_base", 10_000.0)
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "hidden_size": width,
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": count("feed_forward_length"),
        "rms_norm_eps": _shorten(number("attention.layer_norm_rms_epsilon")),
        "vocab_size": file.shapes.get("token_embd.weight", (0,))[0],
        "rope_theta": theta,
        "rope_scaling": _make_scaling(file, theta, head_width),
        "tie_word_embeddings": "output.weight" not in file.shapes,
        **_find_ids_and_length(file, kind),
    }


def _find_ids_and_length(file: File, kind: str) -> dict[str, Any]:
    """What a config.json says beside sizes, as far as the file says it."""
    found = {
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.fields.get("tokenizer.ggml.eos_token_id"),
        "max_position_embeddings": file.fields.get(f"{kind}.context_length"),
    }
    return {
        **{name: value for name, value in found.items() if type(value) is int},
        "pad_token_id": file.fields.get("tokenizer.ggml.padding_token_id"),
    }


def _show(value: Any) -> str:
    """A value that may be a list as long as a vocabulary."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shorten(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 was meant, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _make_scaling(file: File, theta: float, head_width: int) -> Mapping[str, Any] | None:
    """`rope_scaling` from the divisors that llama.cpp stores instead, one a pair of channels."""
    if _ROPE_FACTORS not in file.shapes:
        return None
    refused = PublishedError(
        f"{file.path}: {_ROPE_FACTORS} is not what Llama 3 has with 8,192 original positions; take "
        "the model's safetensors"
    )
    if file.shapes[_ROPE_FACTORS] != (head_width // 2,):
        raise refused
    stored = file.read(_ROPE_FACTORS).astype(np.float64)
    factor = float(stored.max())
    if not 0 < factor < math.inf:
        raise refused
    turns = 8192 * theta ** (-np.arange(0, head_width, 2) / head_width) / (2 * math.pi)
    kept = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    if not np.allclose(stored, 1 / (kept + (1 - kept) / factor), rtol=1e-3):
        raise refused
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
