"""Records the traces of this folder: what the reduced model's router picks, and when.

Three kinds of text, each at K = 10 (as trained) and K = 4, token by token:
    stories  an opening sentence, then what the model makes of it (temperature 0.8)
    tools    requests with tool schemas; calls as the model makes them (greedy)
    chat     small talk, stories, JSON, copying, tools in turn (temperature 0.7)
Prompts come from the generator in data/build; its words from the model's vocabulary,
its phrases and tales from stories that the model tells. Nothing else is needed.

But: picks only. Times and reads are a matter of the machine; record them where you are
(`flashmoe generate --trace FILE`).

Usage: python data/traces/record.py [--tokens 10000] [--k 10 4] [--out data/traces]
"""

import argparse
import hashlib
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REDUCED = ROOT / "data" / "reduced"
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "build")]

from corpus import cut_phrase  # noqa: E402
from dialogues import make  # noqa: E402
from tqdm import tqdm  # noqa: E402
from values import is_held, load_lists  # noqa: E402

from flashmoe_ref import load  # noqa: E402
from flashmoe_ref.engine import Model  # noqa: E402
from flashmoe_ref.sampling import Sampler, Sampling  # noqa: E402
from flashmoe_ref.trace import record  # noqa: E402

SEED = 0
LONGEST = 512  # tokens of a text, as in training
STORY_TOKENS = 400
N_TALES = 12  # that the model tells for the pools
KS = (10, 4)
OPENINGS = ("Once upon a time there was", "There was once", "Long ago there lived")
WHO = "king queen farmer miller tailor fox bear mouse giant sailor shepherd".split()
WHERE = ("by the sea", "in a wood", "on a hill", "in a great city", "beside a mill")
WHICH = ("had three sons", "could not sleep", "had lost a ring", "was very poor")
TOOL_SHARES = {"tool": 60, "tools": 15, "reply": 25}  # percent
CHAT_SHARES = {"chat": 45, "json": 20, "dialogue": 25, "copy": 10}


class Text(NamedTuple):
    """What a text begins with, and how it goes on."""

    kind: str
    prompt: list[int]
    n_most: int  # tokens that may follow
    temperature: float


def story_prompt(model: Model, rng: random.Random) -> Text:
    """The beginning of a tale."""
    who = f"{rng.choice(WHO)} {rng.choice(WHERE)}, who {rng.choice(WHICH)}"
    ids = model.tokenizer.encode(f"{rng.choice(OPENINGS)} a {who}.")
    return Text("story", ids, STORY_TOKENS - len(ids), 0.8)


def dialogue_prompt(
    model: Model, rng: random.Random, pools: dict, kind: str, temperature: float
) -> Text | None:
    """A dialogue up to where its last answer begins; None if it is too long."""
    dialogue = make(rng, pools, kind=kind)
    messages = dialogue.messages
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    ids = model.tokenizer.encode_chat(messages[:last], dialogue.tools or None)
    if len(ids) > LONGEST - 100:
        return None
    return Text(dialogue.kind, ids, LONGEST - len(ids), temperature)


def follow(model: Model, text: Text, seed: int, n_left: int) -> list[int]:
    """Feed a prompt token by token, then what the model answers. All ids fed."""
    settings = Sampling(temperature=text.temperature, seed=seed)
    sampler = Sampler(settings, text.prompt, model.tokenizer.n_real_ids)
    state, fed = model.new_state(), []
    coming = list(text.prompt)
    while coming and len(fed) < n_left:
        fed.append(coming.pop(0))
        logits = model.decode(fed[-1], state)
        if not coming and len(fed) < len(text.prompt) + text.n_most:
            token = sampler.sample(logits)
            coming = [] if token in model.tokenizer.stop_ids else [token]
    return fed


def make_pools(model: Model) -> dict:
    """What data/build/corpus.py takes from books, from the model itself."""
    rng = random.Random(SEED)
    words = [model.tokenizer.decode([i]) for i in range(model.tokenizer.n_real_ids)]
    words = sorted(w[1:] for w in words if re.fullmatch(" [a-z]{3,12}", w))
    tales, phrases = [], set()
    for seed in range(N_TALES):
        text = story_prompt(model, rng)
        story = model.tokenizer.decode(follow(model, text, seed, LONGEST))
        end = story.rfind(". ", 0, 700)
        tales.append(story[: end + 1] if end > 150 else story)
        found = (cut_phrase(story, rng) for _ in range(100) if len(story) > 500)
        phrases.update(phrase for phrase in found if phrase)
    lists = load_lists()
    return {
        "first": [w for w in lists.pop("first") if not is_held(w)],
        "city": [w for w in lists.pop("city") if not is_held(w)],
        "words": words,
        "phrases": sorted(phrases) or ["the old house"],
        "tales": tales,
        "lists": lists,
        **{f"{name}_held": [] for name in ("first", "city", "words", "phrases")},
    }


def kinds_of_text(model: Model, pools: dict) -> dict[str, Callable]:
    """Name of the trace -> a function of a generator that draws a text, or None."""

    def dialogues(shares: dict[str, int], temperature: float) -> Callable:
        def draw(rng: random.Random) -> Text | None:
            kind = rng.choices(list(shares), list(shares.values()))[0]
            return dialogue_prompt(model, rng, pools, kind, temperature)

        return draw

    return {
        "stories": lambda rng: story_prompt(model, rng),
        "tools": dialogues(TOOL_SHARES, 0.0),
        "chat": dialogues(CHAT_SHARES, 0.7),
    }


def record_texts(model: Model, name: str, draw: Callable, n_tokens: int):
    """Record texts of one kind until there are n_tokens."""
    rng, texts = random.Random(f"{SEED} {name}"), []
    bar = tqdm(total=n_tokens, desc=f"{name} K={model.config.num_experts_per_tok}")
    with bar, record(model, times=False, seed=SEED) as trace:
        n_left = n_tokens
        while n_left:
            text = draw(rng)
            if text is None:
                continue
            fed = follow(model, text, len(texts), n_left)
            texts.append([text.kind, min(len(text.prompt), len(fed)), len(fed)])
            n_left -= len(fed)
            bar.update(len(fed))
    trace.hits = trace.weights = None  # all resident; twice the size of the picks
    trace.about |= {"texts": texts, "model_sha256": digest(model.path)}
    return trace


def digest(folder: Path) -> str:
    """SHA-256 of all shards of a model, in the order of their names."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def main() -> None:
    """Record every kind of text at every K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000, help="of each trace")
    parser.add_argument("--k", type=int, nargs="+", default=KS, help="experts a token")
    parser.add_argument("--model", type=Path, default=REDUCED)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    with load(options.model, engine="numpy", experts="resident") as model:
        pools = make_pools(model)  # once, for the same prompts at every K
    for k in options.k:
        with load(options.model, engine="numpy", experts="resident", k=k) as model:
            for name, draw in kinds_of_text(model, pools).items():
                trace = record_texts(model, name, draw, options.tokens)
                file = options.out / f"{name}_k{k}.npz"
                trace.save(file)
                n_texts, size = len(trace.about["texts"]), file.stat().st_size
                print(f"{file.name}: {n_texts} texts, {size:,} bytes")


if __name__ == "__main__":
    main()
