"""Settings out of range or of the wrong kind are refused, with what is allowed."""

import re

import numpy as np
import pytest
from tally import count
from tiny import write_tiny, write_tokenizer

from flashmoe_ref import cli
from flashmoe_ref.bargain_widgets import side_by_side
from flashmoe_ref.doctor_widgets import doctor_explorer
from flashmoe_ref.engine import PREFILL_CHUNK, load
from flashmoe_ref.errors import ConfigError
from flashmoe_ref.generation import chat, generate, generate_ids
from flashmoe_ref.ranges import is_number, is_whole
from flashmoe_ref.sampling import Sampler, Sampling
from flashmoe_ref.widgets import Explorer, quantization_explorer, router_explorer

N_EXPERTS, K, N_LAYERS, V, LONGEST = 8, 3, 4, 300, 600
# never a number that a setting can have
KINDS = [True, False, "3", b"3", [3], np.array([3, 4]), 1j, object(), np.bool_(True)]
NAN = [np.nan, np.inf, -np.inf, np.float32("nan")]
NO_FLOATS = [*KINDS, *NAN, 10**400]
NO_INTS = [*KINDS, *NAN, 3.0, 2.5, np.float64(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a tokenizer; long enough for a prompt of two chunks."""
    sizes = {"vocab_size": V, "max_position_embeddings": LONGEST}
    return write_tokenizer(write_tiny(tmp_path_factory.mktemp("m"), **sizes))


@pytest.fixture(scope="module")
def model(folder):
    """Resident, so that it is quick."""
    with load(folder, engine="numpy", compiled=False, experts="resident") as model:
        yield model


def refuse(run, values, words):
    """Each value is a ConfigError of one line with these words."""
    for value in values:
        with pytest.raises(ConfigError, match=words) as caught:
            run(value)
        assert "\n" not in str(caught.value) or isinstance(value, np.ndarray)
        count("settings out of range or of another kind")


def test_what_a_number_is():
    assert all(is_whole(n, 3, 5) for n in (3, 5, np.int8(4), np.uint64(5)))
    assert not any(is_whole(n, 3, 5) for n in (2, 6, *NO_INTS))
    assert is_whole(10**400, 1)
    assert all(is_number(n) for n in (0, -1.5, np.float16(2), np.int64(3), 1e-320))
    assert not any(is_number(n) for n in NO_FLOATS)


LOAD = {  # setting: (more settings, values out of range, words of the error)
    "k": ({}, [0, -1, K + 1, 10**30], r"k=.* is outside 1\.\.3"),
    "slots": ({}, [0, K - 1, N_EXPERTS + 1], r"slots=.* is outside 3\.\.8"),
    "budget": ({}, [0, K - 1, 33, -5], r"budget=.* is outside 3\.\.32"),
    "threads": ({}, [0, -1, 1025, 10**30, None], r"threads=.* is outside 1\.\.1024"),
    "pin": ({"slots": 5, "profile": np.zeros((2, 4, 3))}, [-1, None], r"pin=.*number"),
    "mass": ({}, [0, -0.1, 1.1, 10**30], r"mass=.* is outside 0\.\.1"),
    "kept": ({}, [None, "all", 3], "kept=.* is not one of renormalized, as-routed"),
    "policy": ({"slots": 5}, [None, "mru", 3], "policy=.* is not one of lru"),
    "prefetch": (
        {"slots": 5},
        ["look-ahead:0", "look-ahead:9", "psychic", 3],
        r"in 1\.\.8|is not one of",
    ),
    "output_scale": ({}, [0, [1, 1, 1], [1, 1, 1, 0], [1, 1, 1, -1]], "each of the 4"),
    "engine": ({}, [None, "torch", 3], "engine=.* is not one of auto, numpy, mlx"),
    "experts": ({}, [None, "ram", 3], "experts=.* is not one of stream, packed"),
    "compiled": ({}, [None, 0, 1], "compiled=.* must be True or False"),
    "bypass_page_cache": ({}, [None, 0, 1], "must be True or False"),
    "guards": ({}, [None, 0, "off"], "must be True or False"),
    "verify_reads": ({}, [None, 0, "no"], "must be True or False"),
}


@pytest.mark.parametrize("name", LOAD)
def test_load_refuses(folder, name):
    more, values, words = LOAD[name]
    wrong = NO_FLOATS if name == "mass" else NO_INTS
    if words.endswith("True or False"):
        wrong = [value for value in wrong if not isinstance(value, bool | np.bool_)]
    plain = {"engine": "numpy", "compiled": False, **more}
    refuse(lambda v: load(folder, **plain | {name: v}).close(), values + wrong, words)


def test_numpys_numbers_are_as_good_as_pythons(folder):
    settings = {"k": np.int64(2), "slots": np.int32(4), "threads": np.uint8(2)}
    options = {"engine": "numpy", "compiled": False, "mass": np.float32(0.75)}
    with load(folder, **settings, **options) as model:
        model.logits(np.array([1, 2, 3], np.uint16))
        assert model.report().mode["k"] == 2


SAMPLING = {
    "temperature": (NO_FLOATS, [-0.1], "at least 0"),
    "top_k": (NO_INTS, [-1], "whole number of at least 0"),
    "top_p": (NO_FLOATS, [0, -0.1, 1.01], "above 0 and at most 1"),
    "min_p": (NO_FLOATS, [-0.1, 1.01], "between 0 and 1"),
    "repetition_penalty": (NO_FLOATS, [0, -1, 1e-4, 1e4], r"in 0\.001\.\.1000"),
    "presence_penalty": (NO_FLOATS, [], "a finite number"),
    "seed": (NO_INTS, [-1], "whole number of at least 0"),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_refuses(model, name):
    wrong, values, words = SAMPLING[name]
    words = f"{name}=.* must be .*{words}"
    refuse(lambda v: Sampling(**{name: v}), [None, *wrong, *values], words)
    with pytest.raises(ConfigError, match=words):  # at once, before the first token
        generate(model, "Hi", **{name: wrong[0]})


@pytest.mark.parametrize("temperature", [1e-320, 1e-300, 1e-3, 1e300])
@pytest.mark.parametrize("penalty", [1e-3, 1e3])
def test_the_ends_of_the_ranges_draw_real_tokens(temperature, penalty):
    settings = {"temperature": temperature, "repetition_penalty": penalty}
    sampler = Sampler(Sampling(**settings, presence_penalty=1e300), [0], 3)
    for scale in (1, 3e38):
        assert sampler.sample(np.array([1, -1, 0.5], np.float32) * scale) in (0, 1, 2)


def test_max_tokens_is_refused_at_once(model):
    words = "max_tokens=.* must be a whole number of at least 1, or None"
    wrong = [*NO_INTS, 0, -1]
    refuse(lambda v: generate(model, "Hi", v), wrong, words)
    session = chat(model)
    state = session._state
    refuse(lambda v: next(session.say("Hi", v)), wrong, words)
    assert session._state is state and state.n_tokens == 0  # nothing was processed


PROMPTS = {
    "empty": ([], "no token ids"),
    "no text": ("", "no token ids"),
    "bytes": (b"Once", "text or a list of token ids, not bytes"),
    "none": (None, "not NoneType"),
    "a number": (3, "not int"),
    "a set": ({1, 2}, "not set"),
    "truths": ([True, False], "list of integers"),
    "floats": ([1.0, 2.0], "list of integers"),
    "NaN": ([np.nan], "list of integers"),
    "words": (["a", "b"], "list of integers"),
    "nested": ([[1], [2]], "list of integers"),
    "ragged": ([[1, 2], [3]], "list of integers"),
    "huge": ([10**30], "list of integers"),
    "none inside": ([1, None], "list of integers"),
    "negative": ([5, -1], rf"token id -1 is outside 0\.\.{V - 1}"),
    "beyond": ([5, V], rf"token id {V} is outside 0\.\.{V - 1}"),
    "too long": ([1] * (LONGEST + 1), f"{LONGEST + 1:,} tokens"),
    "too long a text": ("a" * (LONGEST + 1), f"{LONGEST + 1:,} tokens"),
    "full": ([1] * LONGEST, f"fewer than {LONGEST:,}"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_refused_at_once(model, kind):
    prompt, words = PROMPTS[kind]
    with pytest.raises(ConfigError, match=words):
        generate(model, prompt, 1)
    count("prompts that a model cannot take")


@pytest.mark.parametrize("kind", PROMPTS)
def test_prefill_refuses_all_or_nothing(model, kind):
    """A bad id in the second chunk does not let the first one pass."""
    prompt, words = PROMPTS[kind]
    if kind in ("full", "bytes", "none", "a number", "a set"):
        return
    if isinstance(prompt, str):
        prompt = model.tokenizer.encode(prompt)
    state = model.new_state()
    with pytest.raises(ConfigError, match=words):
        model.prefill(prompt, state)
    assert state.n_tokens == 0
    with pytest.raises(ConfigError):
        generate_ids(model, prompt, 1, state)


@pytest.mark.parametrize("bad", [-1, V])
def test_no_chunk_is_processed_if_a_later_one_is_bad(model, bad):
    state = model.new_state()
    with pytest.raises(ConfigError, match=f"token id {bad} is outside"):
        model.prefill([1] * PREFILL_CHUNK + [bad], state)
    assert state.n_tokens == 0 and state.is_whole


@pytest.mark.parametrize("token", [*NO_INTS, -1, V, None, [1], 10**30])
def test_decode_refuses(model, token):
    with pytest.raises(ConfigError, match="token id"):
        model.decode(token, model.new_state())


# --- the command line -----------------------------------------------------------------

GENERATE = {
    "--k": (["0", "-1", "4", "2.5", "nan", "True", ""], r"1\.\.3|invalid int"),
    "--slots": (["0", "9", "2.0", "inf"], r"3\.\.8|invalid int"),
    "--budget": (["0", "33", "1e3"], r"3\.\.32|invalid int"),
    "--threads": (["0", "-3", "1025"], r"1\.\.1024"),
    "--pin": (["-1", "x"], "pin=-1|invalid int"),
    "--mass": (["0", "1.5", "nan", "inf", "-1", "x"], r"0\.\.1|invalid float"),
    "--kept": (["all"], "renormalized, as-routed"),
    "--max-tokens": (["0", "-1", "1.5", "nan"], "at least 1|invalid int"),
    "--temperature": (["-1", "nan", "inf", "1e999", "hot"], "at least 0|invalid float"),
    "--top-k": (["-1", "1.5"], "at least 0|invalid int"),
    "--top-p": (["0", "1.1", "nan", "-inf"], "above 0 and at most 1"),
    "--min-p": (["-1", "2", "nan"], "between 0 and 1"),
    "--repetition-penalty": (["0", "inf", "nan", "-1"], r"0\.001\.\.1000"),
    "--presence-penalty": (["nan", "inf"], "a finite number"),
    "--seed": (["-1", "0.5"], "at least 0|invalid int"),
}
OTHERS = {
    "rehearse": {
        "--k": (["0", "-1", "99"], r"1\.\.10"),
        "--tokens": (["0", "-1"], "give 1 to 100,000"),
        "--threads": (["0"], "give 1 to 1,024"),
    },
    "evaluate": {
        "--tokens": (["0", "1", "-5"], "give 2 or more"),
        "--prompts": (["0", "-5"], "give 1 or more"),
        "--sampled": (["-1"], "give 0 or more"),
    },
    "doctor": {"--k": (["0", "11"], r"1\.\.10"), "--memory": (["0GB", "nan"], "")},
    "info": {"--k": (["0", "4"], r"1\.\.3")},
}


def refused(capsys, argv, words):
    """The command ends with 2 and one line on standard error."""
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2, argv
    assert error.startswith("flashmoe: ") and error.count("\n") == 1, error
    assert re.search(words, error), (argv, error)
    count("settings out of range or of another kind")


@pytest.mark.parametrize("option", GENERATE)
def test_generate_and_chat_refuse(folder, capsys, option):
    values, words = GENERATE[option]
    base = ["generate", "Hi", "--model", str(folder), "--engine", "numpy"]
    for value in values:
        refused(capsys, [*base, "--no-compile", f"{option}={value}"], words)


@pytest.mark.parametrize(
    ("command", "option"), [(c, o) for c in OTHERS for o in OTHERS[c]]
)
def test_other_commands_refuse(folder, capsys, command, option):
    values, words = OTHERS[command][option]
    place = {
        "doctor": ["qwen3.5-397b-a17b", "--machine", "m3-max-48"],
        "rehearse": ["--disk-budget", "1GB"],
    }.get(command, [str(folder)])
    for value in values:
        refused(capsys, [command, *place, f"{option}={value}"], words)


# --- widgets --------------------------------------------------------------------------


def test_explorers_refuse_values_that_their_sliders_lack():
    w = np.zeros((2, 128), np.float32)
    for k in (0, 11, True, 4.0):
        with pytest.raises(ConfigError, match=r"k=.* is outside 1\.\.10"):
            doctor_explorer(k=k)
    with pytest.raises(ConfigError, match="bits=5 is not one of 2, 3, 4, 8"):
        doctor_explorer(bits=5)
    for name, value in (("bits", 7), ("group_size", 48), ("rule", "best")):
        with pytest.raises(ConfigError, match=f"{name}={value!r} is not one of"):
            quantization_explorer(w, **{name: value})


def test_a_slider_does_not_move_what_is_out_of_range(model):
    from flashmoe_ref.views import routing

    def run(k):
        return routing(model, [1, 2, 3], k)

    with pytest.raises(ConfigError, match=r"k=5 is outside 1\.\.3"):
        router_explorer(run, K, 5)


def test_an_error_while_a_widget_runs_is_shown_in_it():
    def run(name, prompt):
        raise ConfigError("<b>601</b> tokens exceed the maximum")

    widget = side_by_side(run, ["l", "r"], "hello")
    assert "&lt;b&gt;601&lt;/b&gt; tokens exceed" in widget.text.value
    assert widget.answers.value == ""
    explorer = Explorer({}, lambda: None, lambda: run("l", ""))
    assert "&lt;b&gt;601&lt;/b&gt; tokens exceed" in explorer.text.value
