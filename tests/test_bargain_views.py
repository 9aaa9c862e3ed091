"""The frontier is what nothing beats, and what a model wrote is never markup."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmoe_ref import bargain_views as views
from flashmoe_ref import load, plots
from flashmoe_ref.bargain_views import Continuation, Point, frontier
from flashmoe_ref.bargain_widgets import frontier_explorer, side_by_side
from flashmoe_ref.evaluate import continuations
from flashmoe_ref.settings import Setting

REDUCED = Path(__file__).parents[1] / "data" / "reduced"


@pytest.fixture(autouse=True)
def drawn_without_a_screen() -> Iterator[None]:
    plots.plt.switch_backend("agg")
    yield
    plots.plt.close("all")


def row(setting: Setting, n_bytes: float, cost: float, json: float = 0.5) -> dict:
    shown = {"k_used": setting.k or 10, "bytes_per_token": n_bytes}
    shown |= {"cost_nats": cost, "json_right": json}
    return setting.as_row() | {name: str(value) for name, value in shown.items()}


ROWS = [
    row(Setting(), 2.0e6, 0.0, 1.0),
    row(Setting(k=4), 0.8e6, 0.4, 0.7),
    row(Setting(k=4, kept="scaled"), 0.8e6, 0.1, 0.9),
    row(Setting(k=4, kept="as-routed"), 0.8e6, 0.2, 0.8),
    row(Setting(mass=0.7), 1.2e6, 0.2, 0.9),
    row(Setting(k=10, bits=2, rule="minmax"), 1.0e6, 0.05, 0.95),
    row(Setting(k=10, bits=3), 1.5e6, 0.01, 0.95),
]


# --- the frontier ---------------------------------------------------------------------


def test_frontier_by_hand() -> None:
    found = views.points(ROWS, "cost_nats")
    names = [point.name for point in frontier(found, True)]
    assert names == ["K=4, scaled", "K=10, 2 bits minmax", "K=10, 3 bits mlx", "K=10"]
    percent = views.points(ROWS, "json_right")
    assert [p.quality for p in frontier(percent, False)] == [90, 95, 100]


def test_families() -> None:
    families = [point.family for point in views.points(ROWS, "cost_nats")]
    assert set(families) == set(views.FAMILIES)
    assert families[0] == families[1] == "K at 4 bits"


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1), st.booleans()
)
def test_nothing_beats_the_frontier_and_it_beats_all_else(pairs, less) -> None:
    found = [Point(str(i), "", x, y) for i, (x, y) in enumerate(pairs)]
    sign = 1 if less else -1
    best = frontier(found, less)

    def beats(a: Point, b: Point) -> bool:
        no_worse = a.bytes_per_token <= b.bytes_per_token
        no_worse &= sign * a.quality <= sign * b.quality
        return no_worse and (a.bytes_per_token, a.quality) != (
            b.bytes_per_token,
            b.quality,
        )

    assert not any(beats(a, b) for a in found for b in best)
    for point in set(found) - set(best):
        assert any(
            other.bytes_per_token <= point.bytes_per_token
            and sign * other.quality <= sign * point.quality
            for other in best
        )


def test_words_about_a_point() -> None:
    found = views.points(ROWS, "cost_nats")
    said = views.say_point(found, "K=4", "cost_nats")
    assert "0.80 MB a token" in said and "beaten by K=4, scaled" in said
    assert "on the frontier" in views.say_point(found, "K=10", "cost_nats")


def test_figure_shows_every_point_once() -> None:
    found = views.points(ROWS, "json_right")
    ax = views.draw_frontier(found, "json_right", "K=4")
    drawn = [line for line in ax.lines if not line.get_label().startswith("_")]
    at = sorted((x, y) for line in drawn for x, y in line.get_xydata().tolist())
    assert at == sorted((p.bytes_per_token / 1e6, p.quality) for p in found)
    assert "K=4" in ax.get_title(loc="left")


def test_frontier_explorer_follows_its_controls() -> None:
    explorer = frontier_explorer(ROWS)
    assert "K=10: 2.00 MB" in explorer.text.value
    explorer.controls["setting"].value = "K=4"
    explorer.controls["measure"].value = "json_right"
    found = views.points(ROWS, "json_right")
    assert explorer.text.value == views.say_point(found, "K=4", "json_right")
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")


# --- wrong answers --------------------------------------------------------------------


def test_gallery_shows_where_it_went_wrong() -> None:
    record = {
        "setting": "K=2",
        "id": "json-1",
        "stage": "parses",
        "reason": "'a' is 1, not 2",
        "text": '{"a":\n1}',
        "position": 6,
        "chosen_token": "1",
        "p_chosen": 0.75,
        "wanted_token": "",
        "p_wanted": 0.25,
    }
    head, place, why = views.gallery_lines(record)
    assert head == "K=2 · json-1 · passed: parses"
    assert place == """  {"a":⏎▶'1}'"""
    assert why.endswith("wrote '1' (75%), wanted the end (25%)")
    record |= {"position": None, "chosen_token": None, "p_chosen": None}
    assert "▶''" in views.gallery_lines(record)[1]


# --- side by side ---------------------------------------------------------------------

LEFT = Continuation("a<b", [1, 2, 3], ["x", "<i>", "\n"], 2e6, 100.0)
RIGHT = Continuation("c", [1, 9], ["x", "&"], 1e6, 200.0)


def test_html_is_escaped_and_the_first_difference_marked() -> None:
    html = views.html_side_by_side(LEFT, RIGHT)
    assert "a&lt;b" in html and "a<b" not in html
    assert "<mark><b>&lt;i&gt;</b></mark>" in html
    assert "<mark><b>&amp;</b></mark>" in html
    assert html.count("<mark>") == 2 and "<i>" not in html
    assert "<mark>" not in views.html_side_by_side(LEFT, LEFT)


def test_words_about_two_texts() -> None:
    said = views.say_side_by_side(LEFT, RIGHT)
    assert said == "a<b and c part at token 1: '<i>' or '&'; 2.00 and 1.00 MB a token"
    assert views.say_side_by_side(LEFT, LEFT).endswith("the same 3 tokens")
    shorter = Continuation("d", [1], ["x"], 1e6, 1.0)
    assert "'<i>' or 'the end'" in views.say_side_by_side(LEFT, shorter)


def test_a_continuation_is_the_model_s_and_so_are_its_bytes() -> None:
    with load(REDUCED, engine="numpy", experts="resident", k=4) as model:
        prompt = model.tokenizer.encode("Once upon a time")
        found = views.continue_prompt(model, "K=4", prompt, 12)
        assert [found.tokens] == continuations(model, [prompt], 12)
        assert "".join(found.pieces) == model.tokenizer.decode(found.tokens)
        assert found.bytes_per_token == 4 * 8 * 27_648


def test_side_by_side_follows_its_controls() -> None:
    asked = []

    def run(name: str, prompt: str) -> Continuation:
        asked.append((name, prompt))
        return {"l": LEFT, "r": RIGHT}[name]

    widget = side_by_side(run, ["l", "r"], "hello")
    assert "part at token 1" in widget.text.value
    assert "&lt;b and c" in widget.text.value
    widget.controls["right"].value = "l"
    assert widget.text.value.endswith("the same 3 tokens")
    widget.controls["right"].value = "r"
    assert asked == [("l", "hello"), ("r", "hello")]  # each pair once
    widget.controls["prompt"].value = ""
    assert asked[-1] == ("r", " ")
    assert "<i>" not in widget.answers.value
