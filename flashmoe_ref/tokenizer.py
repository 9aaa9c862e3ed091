"""Text to token ids and back, conversations to ids, and text while it is generated.

Byte-level BPE run by the `tokenizers` library; chat templates in chat_template.py.
**But:** no images; one sequence at a time.
*Taught in notebooks/04.*
"""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from .chat_template import (
    ChatTemplate,
    map_strings,
    prepare_message,
    unused_characters,
)
from .errors import TokenizerError
from .tokenizer_files import TokenizerFiles, read_tokenizer_files


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character (a space as "Ġ").

    Visible Latin-1 bytes stand for themselves, the others for U+0100 and up.
    Source: GPT-2's tokenizer; the same table in all byte-level vocabularies.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    shifted = {chr(256 + n): byte for n, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | shifted


BYTE_OF_CHARACTER = _byte_of_character()


class Tokenizer:
    """A checkpoint's tokenizer; make one with `Tokenizer.from_dir`.

    n_real_ids: ids 0..n_real_ids-1 mean something. The model's vocabulary may be
                padded beyond (Qwen3.5: 248,077 of 248,320); mask those logits.
    control:    {string: id} of the tokens that are matched before BPE, such as
                <|im_end|> or <tool_call>.
    stop_ids:   generation ends at any of these.
    sampling:   the checkpoint's own `SamplingDefaults`.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend = files.backend
        added = self._backend.get_added_tokens_decoder()
        self.control = {token.content: token_id for token_id, token in added.items()}
        # Not the number of tokens: a vocabulary may leave numbers out.
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        self.n_real_ids = 1 + max([*vocabulary.values(), *added], default=-1)
        self.stop_ids = files.stop_ids
        self.sampling = files.sampling
        self._folder = files.folder
        self._template = None
        if files.template is not None:
            self._template = ChatTemplate(
                files.template, files.folder, files.named_tokens
            )
        # id -> bytes, filled as ids come; control tokens are plain text
        self._bytes = {i: text.encode() for text, i in self.control.items()}

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> "Tokenizer":
        """Read the tokenizer of a model directory; only tokenizer.json must be there.

        Raises: TokenizerError naming the file, what is wrong and what to do.
        """
        return cls(read_tokenizer_files(Path(model_dir)))

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens such as <|im_end|> are recognised."""
        return self._backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which <|im_end|> is ten ordinary characters."""
        normal = _checked(text)
        if self._backend.normalizer is not None:
            normal = self._backend.normalizer.normalize_str(normal)
        # Some tokens are looked for before a text is normalized, others afterwards.
        if not any(map(self._control_pattern.search, (text, normal))):
            return self.encode(text)
        # The library always matches added tokens first, so run its later steps only.
        words = self._backend.pre_tokenizer.pre_tokenize_str(normal)
        return [token_id for word, _ in words for token_id in self._word_ids(word)]

    def _word_ids(self, word: str) -> list[int]:
        ids = [token.id for token in self._backend.model.tokenize(word)]
        if self._control_ids.isdisjoint(ids):
            return ids
        # The vocabulary has a control token among its words: take it by letters.
        return [t.id for letter in word for t in self._backend.model.tokenize(letter)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Bytes that are not UTF-8 become U+FFFD, one per bad part.

        Raises: TokenizerError for an id outside 0..n_real_ids-1.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, often not whole characters.

        Raises: TokenizerError for an id outside 0..n_real_ids-1.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up_bytes(token_id)
        return known

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text that the checkpoint's template makes of a conversation.

        For reading only: to run a model use `encode_chat`, as `encode` of this text
        would obey control tokens that a user typed.
        Raises: TokenizerError if there is no template, or it is invalid or refuses.
        """
        return self._chat_template.render(
            messages, tools, enable_thinking, add_generation_prompt
        )

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation in which only the template makes control tokens.

        Where a control string may begin in the messages and tools, its first character
        is replaced by a stand-in before the template runs. What reads as a control
        token afterwards is the template's own; then the stand-ins go back and all else
        is encoded as plain text.
        Raises: TokenizerError as `apply_chat_template`.
        """
        messages = [prepare_message(message) for message in messages]
        inputs = json.dumps([messages, tools], ensure_ascii=False, default=str)
        messages, tools = json.loads(inputs)  # what is no JSON is text from here on
        firsts = sorted({text[0] for text in self.control if text})
        hidden = unused_characters(inputs + self._chat_template.source, len(firsts))
        hide = dict(zip(firsts, hidden, strict=True))
        show = str.maketrans(dict(zip(hidden, firsts, strict=True)))

        def without_control(text: str) -> str:
            return self._control_start.sub(lambda found: hide[found[0]], text)

        prompt = self._chat_template.render(
            map_strings(messages, without_control),
            map_strings(tools, without_control),
            enable_thinking,
            add_generation_prompt,
        )
        ids: list[int] = []
        for piece in self._control_pattern.split(prompt):
            if piece in self.control:
                ids.append(self.control[piece])
            else:
                ids += self.encode_plain(piece.translate(show))
        return ids

    def _look_up_bytes(self, token_id: int) -> bytes:
        inside = 0 <= token_id < self.n_real_ids
        token = self._backend.id_to_token(int(token_id)) if inside else None
        if token is None:
            raise TokenizerError(
                f"token id {token_id} is not one of the {self.n_real_ids} in "
                f"{self._folder / 'tokenizer.json'}; mask the padded rows of the logits"
            )
        if not BYTE_OF_CHARACTER.keys() >= set(token):
            return token.encode()  # plain text among the byte-level tokens
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise TokenizerError(
                f"{self._folder}: no chat template (chat_template.jinja, or in "
                "tokenizer_config.json); use a plain prompt or a chat model"
            )
        return self._template

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        """Any control string, the longest where several begin."""
        return re.compile(f"({_any_of(self.control)})")

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def _control_start(self) -> re.Pattern[str]:
        """A character with which a control string may begin, whatever a template does.

        Templates join strings, cut them and take parts out of them; so every "<" counts
        where a control string begins with one. Not so letters and spaces, as roles and
        names must reach the template: of them those that begin a whole control string,
        or one that is cut off at the end of the text.
        """
        firsts = {text[0] for text in self.control if text}
        marks = {mark for mark in firsts if not mark.isalnum() and not mark.isspace()}
        others = [text for text in self.control if text and text[0] not in marks]
        beginnings = {text[:n] for text in others for n in range(1, len(text))}
        whole, cut_off = _any_of(others), _any_of(beginnings)
        return re.compile(
            rf"{_any_of(marks)}|(?=(?:{whole})|(?:{cut_off})\s*\Z).", re.DOTALL
        )


class StreamDecoder:
    """Turns ids into text one by one, holding back the bytes of half a character.

    All that was shown is always the beginning of `decode` of all ids, and after
    `flush` equals it. The work per token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" in the middle of one."""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is still held back, as U+FFFD. Then a new text may begin."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds a lone surrogate at character {error.start}, which UTF-8 "
            "cannot write; remove it"
        ) from None
    return text


def _any_of(strings: Iterable[str]) -> str:
    """A regular expression for any of the strings, longest first; none if empty."""
    longest_first = sorted(strings, key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, longest_first)) or "(?!)"
