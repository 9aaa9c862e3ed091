"""What a checkpoint says about text: tokenizer.json and the small files beside it.

Follows Hugging Face's file formats; stop ids are a union, as no single file has all.
**But:** byte-level BPE only (Qwen's kind); every other setting in the files is ignored.
*Taught in notebooks/04.*
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import TokenizerError
from .small_files import parse_json, read_text


@dataclass(frozen=True)
class SamplingDefaults:
    """What generation_config.json recommends; None where it says nothing."""

    do_sample: bool | None = None  # True in Qwen3.5's
    temperature: float | None = None  # 1.0
    top_k: int | None = None  # 20
    top_p: float | None = None  # 0.95
    min_p: float | None = None  # not in Qwen3.5's, nor the next two
    repetition_penalty: float | None = None
    presence_penalty: float | None = None


@dataclass(frozen=True)
class TokenizerFiles:
    """Everything that `read_tokenizer_files` found in a model directory."""

    folder: Path
    backend: Any  # a tokenizers.Tokenizer
    template: str | None = None  # Jinja2 source
    stop_ids: frozenset[int] = frozenset()
    sampling: SamplingDefaults = SamplingDefaults()
    named_tokens: dict[str, str] = field(default_factory=dict)  # {"eos_token": ...}


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read tokenizer.json, which must be there, and what else there is.

    Raises: TokenizerError naming the file, what is wrong and what to do.
    """
    backend = _load_backend(folder / "tokenizer.json")
    generation = _read_json(folder / "generation_config.json")
    named_tokens = _named_tokens(_read_json(folder / "tokenizer_config.json"))
    return TokenizerFiles(
        folder,
        backend,
        _read_template(folder),
        _stop_ids(folder, generation, named_tokens, backend),
        _sampling_defaults(folder / "generation_config.json", generation),
        named_tokens,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is no such file."""
    text = read_text(path, TokenizerError)
    value = {} if text is None else parse_json(text, path, TokenizerError)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: holds no JSON object; fetch the file again")
    return value


def _load_backend(path: Path) -> Any:
    import tokenizers

    text = read_text(path, TokenizerError)
    if text is None:
        raise TokenizerError(
            f"{path}: no such file; copy tokenizer.json from the original model"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # The library raises plain Exception for any fault, and for a panic of its Rust
        # code something that is none.
        is_panic = type(error).__name__ == "PanicException"
        if not is_panic and not isinstance(error, Exception):
            raise
        raise TokenizerError(
            f"{path}: the tokenizers library cannot read it "
            f"({' '.join(str(error).split())}); download it again"
        ) from error
    byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
    if not byte_level or backend.pre_tokenizer is None:
        raise TokenizerError(
            f"{path}: not byte-level BPE, the only kind supported; use a Qwen model"
        )
    backend.no_truncation()  # a file may ask for either, left over from training
    backend.no_padding()
    return backend


def _read_template(folder: Path) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's string or list of named ones."""
    text = read_text(folder / "chat_template.jinja", TokenizerError)
    if text is not None:
        return text
    path = folder / "tokenizer_config.json"
    template = _read_json(path).get("chat_template")
    if isinstance(template, list):
        named = {
            item.get("name"): item.get("template")
            for item in template
            if isinstance(item, dict) and isinstance(item.get("name"), str)
        }
        template = named.get("default", "")
    if template is None or (isinstance(template, str) and template):
        return template
    raise TokenizerError(
        f"{path}: chat_template is neither text nor a list with a 'default'; "
        "put the template into chat_template.jinja"
    )


def _named_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, which templates may use, as plain strings."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = tokenizer_config.get(name)
        if isinstance(token, dict):  # an added token written out in full
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _stop_ids(
    folder: Path, generation: dict[str, Any], named: dict[str, str], backend: Any
) -> frozenset[int]:
    """The union over all files: Qwen's config.json alone would miss <|im_end|>."""
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config")
    stop_ids = _eos_ids(folder / "generation_config.json", generation)
    stop_ids |= _eos_ids(folder / "config.json", config)
    if isinstance(text_config, dict):
        stop_ids |= _eos_ids(folder / "config.json", text_config)
    if "eos_token" in named:
        token_id = backend.token_to_id(named["eos_token"])
        if token_id is None:
            raise TokenizerError(
                f"{folder / 'tokenizer_config.json'}: eos_token {named['eos_token']!r} "
                "is not in tokenizer.json; take both files from one model"
            )
        stop_ids.add(token_id)
    return frozenset(stop_ids)


def _eos_ids(path: Path, values: dict[str, Any]) -> set[int]:
    found = values.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if all(type(token_id) is int for token_id in ids):  # bool is a kind of int
        return set(ids)
    raise TokenizerError(
        f"{path}: eos_token_id is {found!r}; it must be an id or a list of ids"
    )


def _sampling_defaults(path: Path, values: dict[str, Any]) -> SamplingDefaults:
    kinds = {"do_sample": (bool,), "top_k": (int,)}
    chosen = {}
    for name in (item.name for item in fields(SamplingDefaults)):
        value = values.get(name)
        wanted = kinds.get(name, (int, float))
        is_good = type(value) in wanted and math.isfinite(
            value
        )  # bool is a kind of int
        if value is not None and not is_good:
            kind = " or ".join(kind.__name__ for kind in wanted)
            raise TokenizerError(f"{path}: {name} is {value!r}; it must be {kind}")
        chosen[name] = value
    return SamplingDefaults(**chosen)
