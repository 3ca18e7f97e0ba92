"""What Hugging Face directories say beside weights: config.json and the tokenizer's files.

`parse_config` turns the fields of a config.json into our `ModelConfig` and refuses, by name, every
field that would make the published model compute something that `model.transformer` does not.
Fields come as `transformers` 4 writes them (`rope_theta`, `rope_scaling`, `torch_dtype`) or as
version 5 does (`rope_parameters`, `dtype`).
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from atommem_jax.language.tokenizer import HuggingFaceTokenizer
from atommem_jax.model.model_config import ModelConfig

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_CHAT_TEMPLATE_FILE = "chat_template.jinja"

ARCHITECTURES: Mapping[str, str] = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3Model": "qwen3",
    "LlamaForCausalLM": "llama",
    "LlamaModel": "llama",
}
"""`architectures` of a config.json that can be read -> `model_type`."""

_ROPE_KEYS: Mapping[str, str] = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_length",
}
"""Field of `rope_scaling` of type llama3 -> field of `ModelConfig`."""

# Field -> what it must say, if it is there. Anything else is a model that ours is not.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "quantization_config": (None,),
}


class PublishedError(ValueError):
    """What was published cannot be read. The message names the file and the field or tensor."""


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face directory. Raises PublishedError as `parse_config`."""
    path = pathlib.Path(directory) / CONFIG_FILE
    return parse_config(read_json(path), where=str(path))


def parse_config(fields: Mapping[str, Any], *, where: str = CONFIG_FILE) -> ModelConfig:
    """The `ModelConfig` that the fields of a config.json describe.

    A bare trunk (`Qwen3Model`) has no head of its own: its config says that embeddings are tied.

    Args:
      fields: of the config.json.
      where: named in errors.

    Raises PublishedError for an unknown architecture, for a field that is missing or of the wrong
    type, and for one that describes a model which `model.transformer` does not compute.
    """
    architecture = _find_architecture(fields, where)
    for field, allowed in _FIXED.items():
        if fields.get(field, allowed[0]) not in allowed:
            raise PublishedError(
                f"{where}: {field}={fields[field]!r}: allowed is {allowed[0]!r}; the decoder has "
                "nothing else, choose another model"
            )
    layer_types = fields.get("layer_types") or []
    others = [kind for kind in _listed(layer_types) if kind != "full_attention"]
    if others:
        raise PublishedError(
            f"{where}: layer_types holds {others[0]!r}: allowed is 'full_attention'; choose a "
            "model without windows"
        )
    width = _integer(fields, "hidden_size", where)
    num_heads = _integer(fields, "num_attention_heads", where)
    has_head = architecture.endswith("ForCausalLM")
    config = ModelConfig(
        vocab_size=_integer(fields, "vocab_size", where),
        width=width,
        num_layers=_integer(fields, "num_hidden_layers", where),
        num_heads=num_heads,
        num_kv_heads=_integer(fields, "num_key_value_heads", where, num_heads),
        head_width=_integer(fields, "head_dim", where, width // max(num_heads, 1)),
        mlp_width=_integer(fields, "intermediate_size", where),
        qk_norm=ARCHITECTURES[architecture] == "qwen3",
        tie_embeddings=not has_head or bool(fields.get("tie_word_embeddings", False)),
        norm_epsilon=_number(fields, "rms_norm_eps", where),
        pad_id=_integer(fields, "pad_token_id", where, 0),
        **_parse_rope(fields, where),
    )
    try:
        config.validate()
    except ValueError as error:
        raise PublishedError(f"{where}: {error}") from error
    return config


def format_config(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The fields of a config.json that `transformers` 4 and 5 read as this model.

    Raises PublishedError, naming the field, for a model that no published architecture computes.
    """
    for field, plain in (("token_shift", 0), ("num_features", 0), ("rope_fraction", 1.0)):
        if getattr(config, field) != plain:
            raise PublishedError(
                f"model.{field}={getattr(config, field)}: no published architecture has it, "
                f"allowed is {plain}; only models that were trained without it can be exported"
            )
    kind = "qwen3" if config.qk_norm else "llama"
    fields: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": kind,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": int(config.rope_original_length * config.rope_factor),
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pad_token_id": config.pad_id,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if kind == "llama":
        fields["mlp_bias"] = False
    if config.rope_factor != 1.0:
        scaling = {key: getattr(config, ours) for key, ours in _ROPE_KEYS.items()}
        fields["rope_scaling"] = {"rope_type": "llama3", **scaling}
    return fields


def read_tokenizer(
    directory: str | os.PathLike[str],
    vocab_size: int,
    *,
    reserved: Sequence[str] = (),
    pad_token: str | None = None,
) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
      directory: with tokenizer.json and tokenizer_config.json.
      vocab_size: of the model, which may be wider than the tokenizer.
      reserved: names of tokens that only a model may produce; those that there are not yet take
        the first ids that the tokenizer leaves free.
      pad_token: overrules tokenizer_config.json. Needed where that names none, or the eos token.

    Raises PublishedError for a file or field that is missing, and where the model has fewer ids
    than the tokenizer.
    """
    folder = pathlib.Path(directory)
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise PublishedError(f"{path}: no such file; copy it from where the model was published")
    names = read_json(folder / _TOKENIZER_CONFIG_FILE)
    if (folder / _CHAT_TEMPLATE_FILE).is_file():  # newer releases keep it apart
        names["chat_template"] = (folder / _CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    names = {n: v.get("content") if isinstance(v, Mapping) else v for n, v in names.items()}
    if pad_token is not None:
        names["pad_token"] = pad_token
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise PublishedError(f"{path}: is no tokenizer ({error}); copy it again") from error
    return wrap_tokenizer(tokenizer, names, vocab_size, reserved=reserved, where=str(path))


def wrap_tokenizer(
    tokenizer: tokenizers.Tokenizer,
    names: Mapping[str, Any],
    vocab_size: int,
    *,
    reserved: Sequence[str],
    where: str,
) -> HuggingFaceTokenizer:
    """Adds what `reserved` lacks to a published tokenizer; see `read_tokenizer`.

    names: of `eos_token` and `pad_token`; `chat_template` and `bos_token`, where there are any.
    where: named in errors.
    """
    for field in ("eos_token", "pad_token"):
        if not isinstance(names.get(field), str):
            raise PublishedError(
                f"{where}: {field} is {names.get(field)!r}; it must name a token"
                + ("; pass pad_token" if field == "pad_token" else "")
            )
    if not isinstance(tokenizer.model, tokenizers.models.BPE):
        raise PublishedError(
            f"{where}: holds a {type(tokenizer.model).__name__} tokenizer; allowed is a byte-level "
            "BPE, choose another model"
        )
    known = tokenizer.get_vocab(with_added_tokens=True)
    fresh = [name for name in dict.fromkeys(reserved) if name not in known]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in fresh]
    )
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if needed > vocab_size:
        raise PublishedError(
            f"{where}: has {needed} ids with {len(fresh)} reserved names added, and vocab_size of "
            f"the model is {vocab_size}; take the tokenizer that was published with the model, or "
            "widen the model (experiments/convert.py --vocab_size)"
        )
    try:
        return HuggingFaceTokenizer(
            tokenizer,
            eos_token=names["eos_token"],
            pad_token=names["pad_token"],
            vocab_size=vocab_size,
            lossless=False,  # it is as it was published
            chat_template=_text(names.get("chat_template")),
            bos_token=_text(names.get("bos_token")),
        )
    except ValueError as error:
        raise PublishedError(f"{where}: {error}") from error


def write_tokenizer(directory: str | os.PathLike[str], tokenizer: HuggingFaceTokenizer) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `read_tokenizer` reads them."""
    folder = pathlib.Path(directory)
    stored = json.loads(tokenizer.to_bytes())
    (folder / TOKENIZER_FILE).write_text(stored.pop("tokenizer"), encoding="utf-8")
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": stored["eos_token"],
        "pad_token": stored["pad_token"],
    }
    fields |= {name: stored[name] for name in ("chat_template", "bos_token") if name in stored}
    (folder / _TOKENIZER_CONFIG_FILE).write_text(
        json.dumps(fields, indent=2) + "\n", encoding="utf-8"
    )


def _text(value: Any) -> str | None:
    """None for what is no text: some models publish several templates, by name."""
    return value if isinstance(value, str) else None


def _listed(value: Any) -> list[Any]:
    """A field that must be a list; anything else as its one entry, which then is refused."""
    return value if isinstance(value, list) else [value]


def _find_architecture(fields: Mapping[str, Any], where: str) -> str:
    found = _listed(fields.get("architectures") or [])
    if len(found) != 1 or not isinstance(found[0], str) or found[0] not in ARCHITECTURES:
        raise PublishedError(
            f"{where}: architectures={found!r}: allowed is one of {', '.join(ARCHITECTURES)}; "
            "convert a model of these"
        )
    kind = ARCHITECTURES[found[0]]
    if fields.get("model_type", kind) != kind:
        raise PublishedError(
            f"{where}: model_type={fields['model_type']!r} does not belong to "
            f"architectures={found!r}, which needs {kind!r}; the file is of two models"
        )
    return found[0]


def _parse_rope(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments of `ModelConfig` about rotary positions."""
    newer = fields.get("rope_parameters")
    name = "rope_scaling" if newer is None else "rope_parameters"
    scaling = fields.get(name) or {}
    if not isinstance(scaling, Mapping):
        raise PublishedError(f"{where}: {name} is {scaling!r}; it must be an object or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = _number({**fields, **scaling}, "rope_theta", where)
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise PublishedError(
            f"{where}: {name}.rope_type={kind!r}: allowed are 'default' and 'llama3'; choose "
            "another model, or set the field to null for texts within the original length"
        )
    read = {ours: _number(scaling, key, f"{where}: {name}") for key, ours in _ROPE_KEYS.items()}
    read["rope_original_length"] = int(read["rope_original_length"])
    return {"rope_theta": theta, **read}


def _number(fields: Mapping[str, Any], field: str, where: str) -> float:
    value = fields.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PublishedError(f"{where}: {field} is {value!r}; it must be a number")
    return float(value)


def _integer(fields: Mapping[str, Any], field: str, where: str, default: int | None = None) -> int:
    value = fields.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 31:
        raise PublishedError(
            f"{where}: {field} is {value!r}; it must be a whole number, of at most 31 bits"
        )
    return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises PublishedError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PublishedError(
            f"{path}: no such file; copy it from where the model was published"
        ) from error
    except ValueError as error:
        raise PublishedError(f"{path}: is not JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise PublishedError(f"{path}: holds {type(found).__name__}; it must hold an object")
    return found
