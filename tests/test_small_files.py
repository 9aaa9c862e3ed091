"""Small files: bounded, in one line; and what messages may quote."""

import pytest

from flashmoe_ref.errors import CheckpointError, ConfigError, ReadError
from flashmoe_ref.small_files import number, parse_json, parse_table, read_text


def test_text_is_read_without_its_mark(tmp_path):
    path = tmp_path / "t.txt"
    assert read_text(path, ConfigError) is None
    path.write_bytes("\ufeffé\n".encode())
    assert read_text(path, ConfigError) == "é\n"


def test_a_message_stays_one_line_that_can_be_read():
    for kind in (CheckpointError, ReadError):  # the second is an OSError, too
        message = str(kind(f"a.bin: {'x y' * 10_000}\n is wrong; fetch it again"))
        assert "\n" not in message and len(message) < 1000
        assert message.startswith("a.bin: ") and message.endswith("; fetch it again")
    assert str(ConfigError("k=0 is outside 1..4")) == "k=0 is outside 1..4"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        ('["\\ud83d"]', "surrogates not allowed"),
        ("9" * 5000, "4300 digits"),
        ("[" * 100_000, "recursion"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, complaint):
    with pytest.raises(ConfigError, match=rf"x\.json: not valid JSON .*{complaint}"):
        parse_json(text, "x.json", ConfigError)


def test_json_that_is_read():
    assert parse_json('["\\ud83d\\ude00", 1e3]', "x", ConfigError) == ["😀", 1000.0]


def test_tables():
    assert parse_table('a,b\n1,"x\ny"\n', "t", ConfigError) == [{"a": "1", "b": "x\ny"}]
    assert parse_table("", "t", ConfigError) == []
    for text in ("a,b\n1\n", "a,b\n1,2,3\n"):
        with pytest.raises(ConfigError, match="t: line 2 has not the 2 fields"):
            parse_table(text, "t", ConfigError)
    assert number({"a": "1.5"}, "a", ConfigError) == 1.5
    for row in ({"a": "x"}, {"a": "inf"}, {"a": ""}, {}):
        with pytest.raises(ConfigError, match=r"column a: .* is no number"):
            number(row, "a", ConfigError)
