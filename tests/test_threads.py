"""One model, several threads: one computes, the others wait; a chat refuses two."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny, write_tokenizer

from flashmoe_ref import chat, load
from flashmoe_ref.errors import ConfigError, FlashMoeError, ReadError
from flashmoe_ref.generation import generate_ids

ROOT = Path(__file__).parents[1]
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("m"), vocab_size=272))


@pytest.fixture
def model(folder: Path):
    with load(folder, engine="numpy") as model:
        yield model


def in_threads(*functions: Callable[[], object]) -> list[object]:
    """What each returns or raises, all having run at the same time."""
    found: list[object] = [None] * len(functions)

    def call(number: int) -> None:
        try:
            found[number] = functions[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread waits for ever"
    return found


def let_others_in(model) -> None:
    """Give other threads their chance between every request and its use."""
    request = model.store.request

    def slow_request(layer, experts):
        ticket = request(layer, experts)
        time.sleep(0.0005)
        return ticket

    model.store.request = slow_request


# --- a model --------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["numpy", "mlx"])
@pytest.mark.parametrize("options", [{}, {"slots": 4}, {"budget": 12}], ids=str)
def test_threads_with_states_of_their_own_do_not_disturb_each_other(
    folder: Path, engine: str, options: dict
) -> None:
    with load(folder, engine=engine, **options) as model:
        want = model.logits(PROMPT), list(generate_ids(model, PROMPT, 12))
        let_others_in(model)
        found = in_threads(
            lambda: [model.logits(PROMPT) for _ in range(3)],
            lambda: [list(generate_ids(model, PROMPT, 12)) for _ in range(2)],
            lambda: [list(generate_ids(model, PROMPT[:9] + PROMPT, 12))],
            lambda: [list(generate_ids(model, PROMPT, 12)) for _ in range(2)],
        )
    for logits in found[0]:
        np.testing.assert_array_equal(logits, want[0])
    assert found[1] == found[3] == [want[1]] * 2
    assert isinstance(found[2], list), found[2]


CHILD = """
import sys, threading
import numpy as np
from flashmoe_ref import load
models = [load(sys.argv[1], engine="numpy") for _ in range(2)]
ids = [(7 * i) % 6000 for i in range(400)]
want, found = models[0].logits(ids), []
work = [lambda m=m: found.append(m.logits(ids)) for m in models for _ in range(2)]
threads = [threading.Thread(target=w) for w in work]
for t in threads: t.start()
for t in threads: t.join()
import numba
print(numba.threading_layer(), len(found), all(np.array_equal(f, want) for f in found))
"""


def test_two_models_in_two_threads_with_numba_s_plainest_pool() -> None:
    """macOS has no other; two threads inside it at once end the process."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT / "data" / "reduced")],
        env=environment | {"NUMBA_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["workqueue", "4", "True"], done.stderr[-600:]


def test_a_model_in_the_place_of_another_is_itself(tmp_path: Path) -> None:
    """MLX finds traced functions by their address, in a table of each thread.

    What two threads had traced stayed in the table of one of them when it was gone, and
    answered for the next function that came to lie there.
    """
    pytest.importorskip("mlx.core")
    for seed in range(3):
        folder = write_tiny(tmp_path / str(seed), vocab_size=272, seed=seed)
        write_tokenizer(folder)
        with load(folder, engine="numpy") as model:
            want = list(generate_ids(model, PROMPT, 6))
        with load(folder, engine="mlx") as model:
            here = list(generate_ids(model, PROMPT, 6))
            there = in_threads(lambda m=model: list(generate_ids(m, PROMPT, 6)))
        assert [here, *there] == [want, want], seed
        del model


def test_a_closed_model_says_so(folder: Path) -> None:
    model = load(folder, engine="numpy")
    state = model.new_state()
    model.prefill(PROMPT, state)
    model.close()
    model.close()
    for call in (
        lambda: model.logits(PROMPT),
        lambda: model.decode(1, state),
        model.new_state,
    ):
        with pytest.raises(ReadError, match="is closed: load it again"):
            call()


def test_closing_waits_for_the_call_under_way(model) -> None:
    """Files closed under a read would be other files' numbers a moment later."""
    want, inside = model.logits(PROMPT), threading.Event()
    request = model.store.request

    def slow_request(layer, experts):
        inside.set()
        time.sleep(0.002)
        return request(layer, experts)

    model.store.request = slow_request

    def close() -> None:
        inside.wait(60)
        model.close()

    found, _ = in_threads(lambda: model.logits(PROMPT), close)
    np.testing.assert_array_equal(found, want)


# --- a state --------------------------------------------------------------------------


def test_a_state_that_went_on_elsewhere_is_noticed(model) -> None:
    state = model.new_state()
    tokens = generate_ids(model, PROMPT, 9, state)
    next(tokens)
    model.decode(3, state)
    with pytest.raises(ConfigError, match="a state of its own"):
        list(tokens)


# --- a chat ---------------------------------------------------------------------------


def test_a_message_gives_up_the_answer_before_it(model) -> None:
    """The same message again is what a reader sends who did not like an answer."""
    for second in ("Tell me a story", "Tell me more"):
        want = "".join(chat(model).say(second, 30))
        session = chat(model)
        first = session.say("Tell me a story", 30)
        next(first)
        assert "".join(session.say(second, 30)) == want
        with pytest.raises(ConfigError, match="another message was sent"):
            next(first)
        assert [m["role"] for m in session.messages] == ["user", "assistant"]
        fresh = chat(model)
        "".join(fresh.say(second, 30))
        again, other = session.say("And then?", 30), fresh.say("And then?", 30)
        assert "".join(again) == "".join(other)  # nor has its state suffered


def test_an_answer_that_is_dropped_leaves_a_whole_state(model) -> None:
    want = "".join(chat(model).say("Hello", 30))
    session = chat(model)
    pieces = session.say("Hello", 30)
    next(pieces)
    pieces.close()
    assert "".join(session.say("Hello", 30)) == want


def test_a_chat_refuses_a_second_thread(model) -> None:
    want = "".join(chat(model).say("Hello", 30))
    session = chat(model)
    refused: list[object] = []
    decode = model.decode

    def decode_while_another_thread_asks(token, state):
        logits = decode(token, state)
        refused.extend(in_threads(lambda: "".join(session.say("Hello", 30))))
        return logits

    model.decode = decode_while_another_thread_asks
    assert "".join(session.say("Hello", 30)) == want
    assert refused
    for error in refused:
        assert isinstance(error, FlashMoeError), error
        assert "at work in another thread" in str(error)


def test_chats_in_threads_of_their_own(model) -> None:
    words = ["Hello", "Who are you?", "Tell me a story"]
    want = ["".join(chat(model).say(text, 20)) for text in words]
    let_others_in(model)
    assert (
        in_threads(
            *(lambda text=text: "".join(chat(model).say(text, 20)) for text in words)
        )
        == want
    )
