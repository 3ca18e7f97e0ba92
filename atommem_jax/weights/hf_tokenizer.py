"""The tokenizer's files of a Hugging Face directory, both ways.

A tokenizer.json says how text becomes ids, and tokenizer_config.json names the tokens with a
meaning, and the chat template. What they say beyond that comes back when a tokenizer is written.
"""

import json
import os
import pathlib
import string
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from atommem_jax.language.tokenizer import HuggingFaceTokenizer, check_kind
from atommem_jax.weights import hf_config
from atommem_jax.weights.hf_config import PublishedError

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_GENERIC_CLASS = "PreTrainedTokenizerFast"
_TOKEN_NAMES = ("eos_token", "pad_token", "bos_token")


def read_tokenizer(
    directory: str | os.PathLike[str],
    vocab_size: int,
    *,
    reserved: Sequence[str] = (),
    pad_token: str | None = None,
    rest: Mapping[str, Mapping[str, Any]] | None = None,
) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face directory.

    Args:
      directory: with tokenizer.json and tokenizer_config.json.
      vocab_size: of the model, which may be wider than the tokenizer.
      reserved: names of tokens that only a model may produce; those that there are not yet take
        the first ids that the tokenizer leaves free.
      pad_token: overrules tokenizer_config.json. Needed where that names none, or the eos token.
      rest: what else was published with the model; by default what `hf_config.list_rest` finds in
        the directory.

    Raises PublishedError for a file or field that is missing, and where the model has fewer ids
    than the tokenizer.
    """
    folder = pathlib.Path(directory)
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise PublishedError(f"{path}: no such file; copy it from where the model was published")
    fields = hf_config.read_json(folder / _CONFIG_FILE)
    names: dict[str, Any] = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if name in _TOKEN_NAMES
    }
    names["chat_template"] = _read_chat_template(folder, fields.pop("chat_template", None))
    if pad_token is not None:
        names["pad_token"] = pad_token
    # A field that is written back as it is: not the names, unless they say more than the name.
    kept = {
        name: value
        for name, value in fields.items()
        if (name, value) != ("tokenizer_class", _GENERIC_CLASS)
        and name != "auto_map"
        and (
            name not in _TOKEN_NAMES
            or (isinstance(value, Mapping) and value.get("content") == names[name])
        )
    }
    rest = hf_config.list_rest(folder) if rest is None else rest
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise PublishedError(f"{path}: is no tokenizer ({error}); copy it again") from error
    return wrap_tokenizer(
        tokenizer,
        names,
        vocab_size,
        reserved=reserved,
        where=str(path),
        rest={**rest, **({_CONFIG_FILE: kept} if kept else {})},
    )


def _read_chat_template(folder: pathlib.Path, field: Any) -> str | dict[str, str] | None:
    """The chat template of a model, or several by name.

    Older releases have it in tokenizer_config.json: text, or a list of objects with a name and a
    template. Newer ones have files, which count.

    field: of tokenizer_config.json.
    """
    files = {path.stem: path for path in sorted(folder.glob(_MORE_TEMPLATES))}
    if (folder / TEMPLATE_FILE).is_file():
        files["default"] = folder / TEMPLATE_FILE
    if files:
        found = {name: hf_config.read_text(path) for name, path in files.items()}
        return found["default"] if list(found) == ["default"] else found
    if field is None or isinstance(field, str):
        return field
    try:
        named = {entry["name"]: entry["template"] for entry in hf_config.list_entries(field)}
    except (TypeError, KeyError, IndexError):
        named = {"": None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise PublishedError(
            f"{folder / _CONFIG_FILE}: chat_template is {str(field)[:60]!r}; it must be "
            "text, or a list of objects with a name and a template: copy the file again"
        )
    return named or None


def wrap_tokenizer(
    tokenizer: tokenizers.Tokenizer,
    names: Mapping[str, Any],
    vocab_size: int,
    *,
    reserved: Sequence[str],
    where: str,
    rest: Mapping[str, Mapping[str, Any]],
) -> HuggingFaceTokenizer:
    """Adds what `reserved` lacks to a published tokenizer; see `read_tokenizer`.

    names: of `eos_token` and `pad_token`; `chat_template` and `bos_token`, where there are any.
    where: named in errors.
    rest: file name -> fields, as they were published.
    """
    for field in ("eos_token", "pad_token"):
        if not isinstance(names.get(field), str):
            raise PublishedError(
                f"{where}: {field} is {names.get(field)!r}; it must name a token"
                + ("; pass pad_token" if field == "pad_token" else "")
            )
    try:
        check_kind(tokenizer)
    except ValueError as error:
        raise PublishedError(f"{where}: {str(error).removeprefix('tokenizer: ')}") from error
    known = tokenizer.get_vocab(with_added_tokens=True)
    fresh = [name for name in dict.fromkeys(reserved) if name not in known]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in fresh]
    )
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if needed > vocab_size:
        raise PublishedError(
            f"{where}: has {needed} ids with {len(fresh)} reserved names added, and vocab_size of "
            f"the model is {vocab_size}; take the tokenizer that was published with the model, or "
            "widen the model (experiments/convert.py --vocab_size)"
        )
    try:
        wrapped = HuggingFaceTokenizer(
            tokenizer,
            eos_token=names["eos_token"],
            pad_token=names["pad_token"],
            vocab_size=vocab_size,
            lossless=False,  # it is as it was published
            chat_template=names.get("chat_template"),
            bos_token=_text(names.get("bos_token")),
            published=_join_ends(rest, known.get(names["eos_token"], -1)),
        )
    except ValueError as error:
        raise PublishedError(f"{where}: {error}") from error
    _check_keeps_text(wrapped, where)
    return wrapped


def _join_ends(rest: Mapping[str, Mapping[str, Any]], eos_id: int) -> dict[str, Mapping[str, Any]]:
    """`rest` with `eos_id` among the ids that end a text; without that field where it is the only.

    A model that is trained here ends with the tokenizer's eos token. Some were published with
    another one in config.json, at which a server would wait for ever.
    """
    joined: dict[str, Mapping[str, Any]] = dict(rest)
    for file in (hf_config.CONFIG_FILE, hf_config.GENERATION_FILE):
        ends = joined.get(file, {}).get("eos_token_id")
        if file == hf_config.CONFIG_FILE and ends in (None, eos_id):
            kept = {n: v for n, v in joined.get(file, {}).items() if n != "eos_token_id"}
            joined = {n: v for n, v in joined.items() if n != file} | ({file: kept} if kept else {})
        elif ends is not None and eos_id not in hf_config.list_entries(ends):
            joined[file] = {**joined[file], "eos_token_id": [eos_id, *hf_config.list_entries(ends)]}
    return joined


def _check_keeps_text(tokenizer: HuggingFaceTokenizer, where: str) -> None:
    """Raises PublishedError for a tokenizer that loses white space, or a letter.

    A letter is lost where it has no piece, or its piece is named as a token with a meaning.
    """
    probe = f"It Is 12.\n\n  So? {string.ascii_letters}{string.digits}{string.punctuation}"
    found = tokenizer.decode(tokenizer.encode(probe))
    if found != probe:
        raise PublishedError(
            f"{where}: the text {probe!r} comes back as {found!r}; allowed are tokenizers that "
            "give back what they were given, as those with a ByteLevel pre_tokenizer do. Choose "
            "another model"
        )


def write_tokenizer(directory: str | os.PathLike[str], tokenizer: HuggingFaceTokenizer) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `read_tokenizer` reads them."""
    folder = pathlib.Path(directory)
    stored = json.loads(tokenizer.to_bytes())
    (folder / TOKENIZER_FILE).write_text(stored.pop("tokenizer"), encoding="utf-8")
    fields = {"tokenizer_class": _GENERIC_CLASS}
    fields |= stored.get("published", {}).get(_CONFIG_FILE, {})
    fields |= {name: stored[name] for name in _TOKEN_NAMES if name in stored and name not in fields}
    template = stored.get("chat_template")
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    fields |= {"chat_template": template} if template else {}
    # Files of an earlier export would count more than what is written now.
    for stale in [folder / TEMPLATE_FILE, *folder.glob(_MORE_TEMPLATES)]:
        stale.unlink(missing_ok=True)
    (folder / _CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
