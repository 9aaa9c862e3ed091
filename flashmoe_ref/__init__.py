"""Run a Mixture-of-Experts model whose experts stay on disk: the reference engine.

    from flashmoe_ref import load, generate, chat

    model = load("data/reduced")
    for piece in generate(model, "Once upon a time", max_tokens=100):
        print(piece, end="")
    print(model.report())

Everything else is imported from the module that teaches it, for example
`from flashmoe_ref.layers import route_topk`. Importing the package loads nothing heavy.

The same letters for the same axes everywhere:

    B  batch        D   model width   E  experts             F  expert width
    T  tokens       H   heads         K  experts per token   V  vocabulary
                    Dh  head width
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["chat", "generate", "load"]

_HOME = {"load": "engine", "generate": "generation", "chat": "generation"}


def __getattr__(name: str) -> object:
    """Import load, generate and chat when they are first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
