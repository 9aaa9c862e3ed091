"""Every error that a user can cause, as one clear line each.

A message names the file or value, says what is wrong with it and what to do next.
The command line prints it after ``flashmoe:`` and exits with 2, without a traceback.
"""

SHOWN_START, SHOWN_END = 500, 200  # characters of a message that is too long


def one_line(text: str) -> str:
    """The text in one line; of a very long one the start and the end."""
    text = " ".join(text.split())
    if len(text) <= SHOWN_START + SHOWN_END:
        return text
    return f"{text[:SHOWN_START]} ... {text[-SHOWN_END:]}"


class FlashMoeError(Exception):
    """Base of all errors raised on purpose by this package.

    Its text stays one line that can be read, whatever value of a file it quotes.
    """

    def __str__(self) -> str:
        """One line, as `one_line` makes it."""
        return one_line(super().__str__())


class ConfigError(FlashMoeError, ValueError):
    """A config.json, preset or setting (K, slots, bits, ...) that cannot be used."""


class CheckpointError(FlashMoeError, ValueError):
    """A checkpoint file that is missing, damaged or not of a supported layout."""


class ReadError(FlashMoeError, OSError):
    """A read that failed or came back short while the model was running."""


class NumericError(FlashMoeError, ArithmeticError):
    """NaN or infinity in weights or logits: what follows from them would be noise."""


class RoutingError(NumericError):
    """A router's scores that are no numbers: they would pick experts at random."""


class TokenizerError(FlashMoeError, ValueError):
    """Tokenizer files, a chat template or a tool call that cannot be used."""


class PackError(FlashMoeError, OSError):
    """Packing, converting or verifying files could not go on."""


class TraceError(FlashMoeError, ValueError):
    """A trace file that cannot be used, or a trace that lacks what is asked of it."""


class FetchError(FlashMoeError, OSError):
    """A model that cannot be fetched: no network, no repository, no room, bad bytes."""


class ToolError(FlashMoeError, ValueError):
    """What a tool cannot do with its arguments, in words for the model that asked."""
