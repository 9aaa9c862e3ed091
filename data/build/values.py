"""Values that the generated dialogues carry: names, words, numbers, dates.

Every value is drawn at random and stands in the user's text, so that the model has to
copy it. A value kind is a short string in tools.toml and records.toml ("city",
"int:1:90", "one:colour"). `Values.draw` returns the words for the text and the value
for the answer; the two differ only where the text says "twelve" for 12.

Words come from the whole vocabulary of the training books and, for a good part, from
random syllables in random casing: a model that sees only a few hundred names learns
those names, not copying.

But: no attempt at natural frequencies; "the owl ladder" is as likely as "red bread".
"""

import hashlib
import random
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ONSETS = (
    "b br c ch cl d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sc sh sk sl sm "
    "sn sp st str sw t th tr tw v w wh y z"
).split() + [""] * 6
VOWELS = "a a a e e e i i i o o o u u ai au ea ee ei ia ie io oa oo ou y".split()
CODAS = (
    "b ck d ff g l ll ld m mp n nd ng nk nt p r rd rk rn rt s sh ss st t th x z"
).split() + [""] * 12
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November "
    "December"
).split()
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve"
).split()
TITLE_FORMS = (
    "The A B|A of the B|A and the B|The A|A and B|A in B|A|The A of B"
).split("|")
TYPES = {"int": "integer", "bool": "boolean", "decimal": "number", "price": "number"}
TYPES |= {"items": "array", "names": "array"}


def is_held(word: str) -> bool:
    """True for the tenth of all words that training dialogues never use as values."""
    return hashlib.md5(word.lower().encode()).digest()[0] % 10 == 0


def load_lists() -> dict[str, list[str]]:
    """The closed lists of lists.toml; entries are separated by | or by spaces."""
    lists = {}
    for name, text in tomllib.loads((HERE / "lists.toml").read_text()).items():
        parts = text.strip().replace("\n", "|").split("|")
        lists[name] = text.split() if "|" not in text else parts
    return lists


def json_type(kind: str) -> str:
    """JSON schema type of a value kind."""
    return TYPES.get(kind.split(":")[0], "string")


def join(words: list[str]) -> str:
    """English enumeration: "a", "a and b", "a, b and c"."""
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + " and " + words[-1]


class Values:
    """Draws values; `unseen_share` of the words come from the held-out pools.

    `unseen` tells afterwards whether any word of a held-out pool was used.
    """

    def __init__(
        self, rng: random.Random, pools: dict, unseen_share: float = 0.0
    ) -> None:
        self.rng, self.pools, self.unseen_share = rng, pools, unseen_share
        self.unseen = False
        self.names = (pools["first"], pools["first_held"])
        self.cities = (pools["city"], pools["city_held"])
        self.words = (pools["words"], pools["words_held"])
        self.phrases = (pools["phrases"], pools["phrases_held"])

    # -- words ---------------------------------------------------------------
    def known_or_held(self, pair: tuple[list[str], list[str]]) -> str:
        """One entry of (training part, held-out part)."""
        if self.unseen_share and self.rng.random() < self.unseen_share:
            self.unseen = True
            return self.rng.choice(pair[1])
        return self.rng.choice(pair[0])

    def invented(self) -> str:
        """A word of one to four random syllables, lower case."""
        rng, syllables = self.rng, self.rng.choice([1, 2, 2, 2, 3, 3, 4])
        word = ""
        for _ in range(syllables):
            word += rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
        return word

    def plain(self) -> str:
        """A lower-case word: from the books, or invented."""
        if self.rng.random() < 0.3:
            return self.invented()
        return self.known_or_held(self.words)

    def name(self) -> str:
        """A capitalized word: a first name, a word of the books, or an invention."""
        x = self.rng.random()
        if x < 0.35:
            return self.known_or_held(self.names)
        return (self.invented() if x < 0.7 else self.plain()).capitalize()

    def cased(self, word: str) -> str:
        """Change the casing of one word in five."""
        x = self.rng.random()
        if x < 0.1:
            return word.capitalize()
        if x < 0.16:
            return word.upper()
        if x < 0.2:
            return "".join(self.rng.choice([c, c.upper()]) for c in word)
        return word

    # -- value kinds ---------------------------------------------------------
    def draw(self, kind: str) -> tuple[str, object]:
        """Words for the text and the value for the answer.

        Raises: AttributeError for an unknown kind.
        """
        name, _, rest = kind.partition(":")
        drawn = getattr(self, "draw_" + name)(*rest.split(":") if rest else ())
        return drawn if isinstance(drawn, tuple) else (drawn, drawn)

    def draw_bool(self) -> tuple[str, bool]:
        value = self.rng.random() < 0.5
        return str(value).lower(), value

    def draw_int(self, low: str, high: str) -> tuple[str, int]:
        number = self.rng.randint(int(low), int(high))
        if number <= 12 and self.rng.random() < 0.2:
            return NUMBER_WORDS[number], number
        return str(number), number

    def draw_decimal(self) -> tuple[str, float | int]:
        places = self.rng.choice([0, 1, 2])
        number = round(self.rng.uniform(0.5, 10 ** self.rng.randint(1, 3)), places)
        number = int(number) if places == 0 else number
        return str(number), number

    def draw_price(self) -> tuple[str, float]:
        price = self.rng.randint(10, 9999) / 100
        return str(price), price

    def draw_one(self, name: str) -> str:
        return self.rng.choice(self.pools["lists"][name])

    def draw_word(self) -> str:
        return self.cased(self.name())

    def draw_person(self) -> str:
        first = self.name()
        return first if self.rng.random() < 0.4 else f"{first} {self.name()}"

    def draw_city(self) -> str:
        x = self.rng.random()
        if x < 0.45:
            return self.known_or_held(self.cities)
        if x < 0.85:
            return self.name()
        prefix = self.rng.choice(["Port", "New", "Saint", "East", "North", "Upper"])
        return f"{prefix} {self.name()}"

    def draw_title(self) -> str:
        form = self.rng.choice(TITLE_FORMS)
        a, b = self.cased(self.name()), self.cased(self.name())
        return " ".join({"A": a, "B": b}.get(w, w) for w in form.split())

    def draw_phrase(self) -> str:
        x = self.rng.random()
        if x < 0.6:
            return self.known_or_held(self.phrases)
        words = [self.cased(self.plain()) for _ in range(self.rng.randint(2, 6))]
        return " ".join(words)

    def draw_item(self) -> str:
        if self.rng.random() < 0.5:
            return self.cased(self.plain())
        return f"{self.plain()} {self.plain()}"

    def draw_items(self) -> tuple[str, list[str]]:
        words = _distinct(self.draw_item, self.rng.choice([1, 2, 2, 3, 3, 4]))
        return join(words), words

    def draw_names(self) -> tuple[str, list[str]]:
        words = _distinct(self.name, self.rng.randint(1, 3))
        return join(words), words

    def draw_weekday(self) -> str:
        return self.rng.choice(DAYS)

    def draw_day(self) -> tuple[str, str]:
        x = self.rng.random()
        if x < 0.3:
            day = self.rng.choice(["today", "tomorrow", "tonight", "next week"])
            return day, day
        day = self.rng.choice(DAYS) if x < 0.6 else self._month_day()
        return "on " + day, day

    def draw_date(self) -> str:
        rng, x = self.rng, self.rng.random()
        if x < 0.4:
            return self._month_day()
        if x < 0.6:
            return rng.choice(DAYS)
        if x < 0.8:
            day, month = rng.randint(1, 28), rng.choice(MONTHS)
            return f"{day} {month} {rng.randint(1990, 2039)}"
        year, month = rng.randint(1990, 2039), rng.randint(1, 12)
        return f"{year}-{month:02d}-{rng.randint(1, 28):02d}"

    def _month_day(self) -> str:
        return f"{self.rng.choice(MONTHS)} {self.rng.randint(1, 28)}"

    def draw_time(self) -> str:
        rng, x = self.rng, self.rng.random()
        if x < 0.1:
            return rng.choice(["noon", "midnight", "sunset", "sunrise"])
        if x < 0.5:
            return self.draw_clock()
        half = rng.choice(["am", "pm"])
        if x < 0.7:
            return f"{rng.randint(1, 12)} {half}"
        return f"{rng.randint(1, 12)}:{rng.randint(0, 59):02d} {half}"

    def draw_clock(self) -> str:
        return f"{self.rng.randint(0, 23)}:{self.rng.randint(0, 59):02d}"

    def draw_sum(self) -> str:
        a, b, c = (str(self.rng.randint(1, 999)) for _ in range(3))
        p, q = self.rng.choice("+-*/"), self.rng.choice("+-*/")
        forms = [f"{a} {p} {b}", f"{a} {p} {b} {q} {c}", f"({a} {p} {b}) {q} {c}"]
        return self.rng.choice(forms)

    def draw_street(self) -> str:
        ending = self.rng.choice(["Street", "Lane", "Road", "Square"])
        return f"{self.rng.randint(1, 199)} {self.name()} {ending}"

    def draw_hall(self) -> str:
        return f"{self.name()} {self.rng.choice(['Hall', 'House', 'Tower'])}"

    def draw_shop(self) -> str:
        ending = self.rng.choice(["Market", "and Sons", "Shop", "Press", "Company"])
        return f"{self.name()} {ending}"

    def draw_dish(self) -> str:
        return f"{self.plain()} {self.draw_one('dish')}"

    def draw_phone(self) -> str:
        return "".join(self.rng.choice("0123456789") for _ in range(6))

    def draw_code(self) -> str:
        rng = self.rng
        letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
        return f"{letters}{rng.choice(['-', '', '_'])}{rng.randint(1, 9999)}"

    def draw_file(self) -> str:
        rng = self.rng
        ending = rng.choice("txt md json csv py log toml html".split())
        stem = self.cased(self.plain())
        if rng.random() < 0.4:
            stem += rng.choice("_-") + self.plain()
        folder = f"{self.plain()}/" if rng.random() < 0.4 else ""
        return f"{folder}{stem}.{ending}"


def _distinct(draw, count: int) -> list[str]:
    """`count` draws without repeats."""
    found: list[str] = []
    while len(found) < count:
        value = draw()
        if value not in found:
            found.append(value)
    return found
