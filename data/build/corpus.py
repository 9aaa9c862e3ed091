"""Reads the books and makes the word and phrase pools of the generator.

books.tsv lists the books by their Project Gutenberg number; the texts themselves are
not part of the repository. `--corpus` is a folder that holds one plain-text file a
book, named pgNNNNN_*.txt, without Gutenberg's header and footer (README.md).

Usage: python corpus.py --corpus DIR --out DIR     (writes pools.json)
"""

import argparse
import csv
import json
import random
import re
from collections import Counter
from pathlib import Path

from dialogues import SMALL_TALK
from values import HERE, is_held, load_lists

STORY = re.compile(
    r"(?:^|\n\n)((?:Once upon a time|There was once|Once there|There were once"
    r"|There lived|Long ago|Once, ).{150,}?)(?:\n\n)",
    re.DOTALL,
)


def read_books(corpus: Path) -> tuple[list[str], list[str]]:
    """Texts of the training books and of the held-out books, by number.

    Raises: FileNotFoundError naming the first book that is missing.
    """
    training, held = [], []
    with (HERE / "books.tsv").open(encoding="utf-8") as table:
        for row in csv.DictReader(table, delimiter="\t"):
            files = list(corpus.glob(f"pg{int(row['number']):05d}_*.txt"))
            if not files:
                raise FileNotFoundError(
                    f"{corpus}: no file pg{int(row['number']):05d}_*.txt "
                    f"({row['title']}); see README.md for where to get it"
                )
            text = files[0].read_text(encoding="utf-8")
            (held if row["held_out"] == "yes" else training).append(text)
    return training, held


def fixed_words() -> set[str]:
    """Words of the generator's own sentences; they cannot be held out."""
    text = "".join(p.read_text() for p in HERE.glob("*.toml"))
    text += (HERE / "dialogues.py").read_text() + (HERE / "values.py").read_text()
    text += " ".join(SMALL_TALK)
    return set(re.findall(r"[a-z]+", text.lower()))


def count_words(texts: list[str]) -> Counter:
    """How often each word in lower case occurs."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![A-Za-z'])[a-z]{3,12}(?![A-Za-z'])", text))
    return counts


def cut_phrase(text: str, rng: random.Random) -> str | None:
    """Three to nine words in a row, without punctuation, or None."""
    start = rng.randrange(len(text) - 400)
    words = []
    for word in text[start : start + 300].split()[1:]:
        if not re.fullmatch(r"[A-Za-z]+[.,;!?]?", word):
            break
        words.append(word.strip(".,;!?"))
        if not word[-1].isalpha():
            break
    words = words[: rng.randint(3, 9)]
    return " ".join([words[0].lower(), *words[1:]]) if len(words) >= 3 else None


def find_phrases(
    texts: list[str], count: int, held_words: set[str], want_held: bool
) -> list[str]:
    """Phrases with a held-out word in each, or in none."""
    rng, found = random.Random(1), set()
    while len(found) < count:
        phrase = cut_phrase(rng.choice(texts), rng)
        if phrase is None:
            continue
        has_held = not held_words.isdisjoint(phrase.lower().split())
        if has_held == want_held:
            found.add(phrase)
    return sorted(found)


def find_tales(texts: list[str]) -> list[str]:
    """Opening paragraphs of tales, at most 700 characters, ending with a sentence."""
    tales = []
    for text in texts:
        for match in STORY.finditer(text):
            tale = re.sub(r"\s+", " ", match.group(1))
            end = tale.rfind(". ", 0, 700)
            if end > 150:
                tales.append(tale[: end + 1])
    return tales


def build_pools(training: list[str], held: list[str]) -> dict:
    """Words, phrases, tales and closed lists for values.Values."""
    counts, fixed = count_words(training), fixed_words()
    words = sorted(w for w, n in counts.items() if n >= 3)
    # The 300 most common words stand in almost every phrase: holding one of them out
    # would leave no phrases.
    common = {w for w, _ in counts.most_common(300)}
    held_words = {w for w in words if is_held(w) and w not in fixed | common}
    lists = load_lists()
    split = {}
    for name in ("first", "city"):
        entries = lists.pop(name)
        split[name] = [w for w in entries if not is_held(w)]
        split[name + "_held"] = [w for w in entries if is_held(w)]
    return split | {
        "words": [w for w in words if w not in held_words],
        "words_held": sorted(held_words),
        "phrases": find_phrases(training, 60_000, held_words, want_held=False),
        "phrases_held": find_phrases(held, 3_000, held_words, want_held=True),
        "tales": find_tales(training),
        "lists": lists,
    }


def main() -> None:
    """Write pools.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pools = build_pools(*read_books(options.corpus))
    (options.out / "pools.json").write_text(json.dumps(pools))
    print({name: len(pool) for name, pool in pools.items()})


if __name__ == "__main__":
    main()
