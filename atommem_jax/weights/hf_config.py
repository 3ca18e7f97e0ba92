"""What Hugging Face directories say of a model: config.json, and what else lies beside it.

`parse_config` turns the fields of a config.json into our `ModelConfig` and refuses, by name, every
field that would make the published model compute something that `model.transformer` does not.
What else was published (the context length, all ids that end a text, sampling settings) comes
along with the tokenizer, and goes back into what is exported; see `list_rest`.

Fields come as `transformers` 4 writes them (`rope_theta`, `rope_scaling`, `torch_dtype`) or as
version 5 does (`rope_parameters`, `dtype`).
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from atommem_jax import text_files
from atommem_jax.config import ROPE_TYPES
from atommem_jax.model.model_config import ModelConfig

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

ARCHITECTURES: Mapping[str, str] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2Model": "qwen2",
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

_YARN_KEYS: Mapping[str, str] = {"beta_slow": "rope_beta_slow", "beta_fast": "rope_beta_fast"}
"""The same of type yarn, for those that may be absent."""

# Field -> what it must say, if it is there. Anything else is a model that ours is not.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
}

# Fields of `_FIXED` that an architecture does not look at, whatever they say.
_UNREAD: Mapping[str, tuple[str, ...]] = {"qwen2": ("attention_bias", "mlp_bias")}

# What an architecture means where its config.json says nothing.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "num_key_value_heads": 32},
    "qwen3": {
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "llama": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
}

_LARGEST = 1e38  # about what a float32 holds

# Fields of a config.json that say nothing of what a model computes: as published, if they were.
_FREE = ("max_position_embeddings", "attention_dropout", "use_cache")


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
    kind = ARCHITECTURES[architecture]
    fields = {**_DEFAULTS[kind], **fields}
    for field, allowed in _FIXED.items():
        if field not in _UNREAD.get(kind, ()) and fields.get(field, allowed[0]) not in allowed:
            raise PublishedError(
                f"{where}: {field}={fields[field]!r}: allowed is {allowed[0]!r}; the decoder has "
                "nothing else, choose another model"
            )
    layer_types = fields.get("layer_types") or []
    others = [kind for kind in list_entries(layer_types) if kind != "full_attention"]
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
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        tie_embeddings=not has_head or _boolean(fields, "tie_word_embeddings", where),
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
    kind = find_kind(config)
    fields: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
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
    if kind != "qwen2":
        fields["attention_bias"] = False
    if kind == "llama":
        fields["mlp_bias"] = False
    fields["rope_scaling"] = _format_rope(config)
    return fields


def find_kind(config: ModelConfig) -> str:
    """The `model_type` of a model. Raises PublishedError for one that none of them computes."""
    if config.qk_norm and config.qkv_bias:
        raise PublishedError(
            "model.qk_norm=True and model.qkv_bias=True: no published architecture has both; only "
            "models that were trained with one of them can be exported"
        )
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def list_rest(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What a Hugging Face directory says of a model that `parse_config` has no use for.

    Returns: file name -> fields, of config.json (without those that an export writes so itself) and
      of generation_config.json; a file that is not there, or says nothing more, is left out.

    Raises PublishedError for a file that cannot be read.
    """
    folder = pathlib.Path(directory)
    found = {}
    if (folder / CONFIG_FILE).is_file():
        found[CONFIG_FILE] = drop_ours(read_json(folder / CONFIG_FILE))
    if (folder / GENERATION_FILE).is_file():
        found[GENERATION_FILE] = read_json(folder / GENERATION_FILE)
    return {name: fields for name, fields in found.items() if fields}


def drop_ours(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that an export would not write, or would write otherwise."""
    plain = format_config(parse_config(fields))
    # A file of code is not copied, so nothing may refer to it.
    ours = {*plain, "rope_parameters", "auto_map"} - {*_FREE}
    return {
        name: value
        for name, value in fields.items()
        if name not in ours and not (name in plain and plain[name] == value)
    }


def list_entries(value: Any) -> list[Any]:
    """A field that must be a list; anything else as its one entry, which then is refused."""
    return value if isinstance(value, list) else [value]


def _find_architecture(fields: Mapping[str, Any], where: str) -> str:
    found = list_entries(fields.get("architectures") or [])
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
    within = f"{where}: {name}"
    if scaling.get("partial_rotary_factor", 1.0) not in _FIXED["partial_rotary_factor"]:
        raise PublishedError(
            f"{within}.partial_rotary_factor={scaling['partial_rotary_factor']!r}: allowed is 1.0; "
            "the decoder has nothing else, choose another model"
        )
    theta = _number({**fields, **scaling}, "rope_theta", where)
    if theta <= 0:
        raise PublishedError(f"{where}: rope_theta is {theta!r}; it must be above 0")
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ROPE_TYPES:
        raise PublishedError(
            f"{within}.rope_type={kind!r}: allowed are {', '.join(('default', *ROPE_TYPES))}; "
            "choose another model, or set the field to null for texts within the original length"
        )
    read: dict[str, Any] = {"rope_type": kind, "rope_factor": _number(scaling, "factor", within)}
    if kind == "llama3":
        read |= {ours: _number(scaling, key, within) for key, ours in _ROPE_KEYS.items()}
    if kind == "yarn":
        read |= _parse_yarn(scaling, within)
    length = "original_max_position_embeddings"
    if kind == "yarn" and scaling.get(length) is None and fields.get(length) is None:
        scaling = {**scaling, length: _integer(fields, "max_position_embeddings", where)}
    if kind != "linear":
        read["rope_original_length"] = _integer({**fields, **scaling}, length, within)
    return {"rope_theta": theta, **read}


def _parse_yarn(scaling: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `transformers` reads of `rope_scaling` of type yarn, but for factor and length."""
    read: dict[str, Any] = {
        ours: _number(scaling, key, where) for key, ours in _YARN_KEYS.items() if scaling.get(key)
    }
    if scaling.get("truncate") is not None:
        read["rope_truncate"] = _boolean(scaling, "truncate", where)
    factor = scaling.get("attention_factor")
    if factor is not None:
        read["rope_attention_factor"] = _number(scaling, "attention_factor", where)
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):  # as DeepSeek says it
        stretch = math.log(max(_number(scaling, "factor", where), 1.0))
        above, below = (
            0.1 * _number(scaling, key, where) * stretch + 1.0
            for key in ("mscale", "mscale_all_dim")
        )
        read["rope_attention_factor"] = above / below
    return read


def _format_rope(config: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling`, as `_parse_rope` and `transformers` read it."""
    kind = config.rope_type
    if config.rope_factor == 1.0 and not (kind == "yarn" and config.rope_attention_factor):
        return None
    fields: dict[str, Any] = {"rope_type": kind, "factor": config.rope_factor}
    if kind == "llama3":
        fields |= {key: getattr(config, ours) for key, ours in _ROPE_KEYS.items()}
    if kind == "yarn":
        fields |= {key: getattr(config, ours) for key, ours in _YARN_KEYS.items()}
        fields["original_max_position_embeddings"] = config.rope_original_length
        if not config.rope_truncate:
            fields["truncate"] = False
        if config.rope_attention_factor:
            fields["attention_factor"] = config.rope_attention_factor
    return fields


def _number(fields: Mapping[str, Any], field: str, where: str) -> float:
    value = fields.get(field)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not abs(value) <= _LARGEST  # nor is NaN
    ):
        raise PublishedError(
            f"{where}: {field} is {value!r}; it must be a number, of at most {_LARGEST:g}"
        )
    return float(value)


def _boolean(fields: Mapping[str, Any], field: str, where: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise PublishedError(f"{where}: {field} is {value!r}; it must be true or false")
    return bool(value)


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
        text = read_text(path)
        found = json.loads(text)
        if text_files.may_hold_surrogates(text):
            json.dumps(found, ensure_ascii=False).encode()  # fails for a lone surrogate
    except PublishedError:
        raise
    except (ValueError, RecursionError) as error:
        raise PublishedError(f"{path}: is not JSON ({error}); copy the file again") from error
    if not isinstance(found, dict):
        raise PublishedError(f"{path}: holds {type(found).__name__}; it must hold an object")
    return found


def read_text(path: pathlib.Path) -> str:
    """A text file, without the mark that some editors begin it with. Raises PublishedError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise PublishedError(
            f"{path}: no such file; copy it from where the model was published"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path}: cannot be read ({error}); copy the file again") from error
