"""Addresses: the grammar, what is refused and how, and that text and fields are the same thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterserve.binds import Bind, parse_all
from clusterserve.checks import MAX_INT, SettingValueError
from clusterserve.errors import SettingsError

# Said to be ASCII, lest hypothesis goes through all of Unicode to find that it is.
names = st.from_regex(
    r"[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,20}[a-zA-Z0-9_])?", fullmatch=True, alphabet=st.characters(codec="ascii")
)
hosts = names | st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(str)
paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda p: p != "@"
)
prefixed_paths = st.tuples(st.sampled_from(["", "/", "//", "///", "@", "./"]), paths).map("".join)
binds = (
    st.builds(Bind, st.just("tcp"), host=hosts, port=st.integers(0, 65535))
    | st.builds(Bind, st.just("unix"), path=prefixed_paths)
    | st.builds(Bind, st.just("fd"), fd=st.integers(0, MAX_INT))
)


@given(binds)
def test_the_text_of_a_bind_parses_to_the_same_bind(bind: Bind) -> None:
    assert Bind.parse(str(bind)) == bind


@given(st.text() | st.text(alphabet="abc019:[]/@. %-").map(lambda text: text[:30]))
def test_any_text_is_a_bind_with_a_stable_text_or_is_refused_and_quoted(text: str) -> None:
    try:
        bind = Bind.parse(text)
    except SettingsError as error:
        bind, refusal = None, str(error)
    if bind is None:
        assert repr(text) in refusal
    else:
        assert Bind.parse(str(bind)) == bind


@pytest.mark.parametrize(
    ("text", "bind", "canonical"),
    [
        ("127.0.0.1:8000", Bind("tcp", host="127.0.0.1", port=8000), None),
        ("localhost:0", Bind("tcp", host="localhost", port=0), None),
        ("my_host-1.example:65535", Bind("tcp", host="my_host-1.example", port=65535), None),
        ("[::1]:80", Bind("tcp", host="::1", port=80), None),
        ("[::]:0", Bind("tcp", host="::", port=0), None),
        ("[fe80::1%eth0]:80", Bind("tcp", host="fe80::1%eth0", port=80), None),
        ("[::1]", Bind("tcp", host="::1", port=8000), "[::1]:8000"),
        (":80", Bind("tcp", host="0.0.0.0", port=80), "0.0.0.0:80"),
        ("example.org", Bind("tcp", host="example.org", port=8000), "example.org:8000"),
        ("tcp://10.0.0.1:81", Bind("tcp", host="10.0.0.1", port=81), "10.0.0.1:81"),
        ("unix:/run/x.sock", Bind("unix", path="/run/x.sock"), None),
        ("unix:relative.sock", Bind("unix", path="relative.sock"), None),
        ("unix:with space:and colon", Bind("unix", path="with space:and colon"), None),
        ("unix:@abstract", Bind("unix", path="@abstract"), None),
        ("unix:///run/x.sock", Bind("unix", path="/run/x.sock"), "unix:/run/x.sock"),
        ("fd://3", Bind("fd", fd=3), None),
        ("fd://0", Bind("fd", fd=0), None),
    ],
)
def test_the_grammar(text: str, bind: Bind, canonical: str | None) -> None:
    assert Bind.parse(text) == bind
    assert str(bind) == (canonical or text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not the name or the address of a host; write HOST:PORT"),
        (" ", "not the name"),
        ("localhost:", "the port must be a whole number from 0 to 65535"),
        ("localhost:x", "the port must be"),
        ("localhost:-1", "the port must be"),
        ("localhost:65536", "the port must be"),
        ("localhost:99999999999999999999", "the port must be"),
        ("localhost: 80", "the port must be"),
        ("localhost:٣", "the port must be"),
        (":", "the port must be"),
        ("8000", "a port alone is written ':8000'"),
        ("::1", "an IPv6 address goes in brackets"),
        ("::1:80", "an IPv6 address goes in brackets"),
        ("http://localhost:80", "an address is not a URL; write HOST:PORT"),
        ("http://localhost", "an address is not a URL"),
        ("localhost/path", "not the name"),
        ("user@host:80", "not the name"),
        ("a b:80", "not the name"),
        ("a\nb:80", "not the name"),
        ("[::1", "brackets hold an IPv6 address"),
        ("[::1]80", "brackets hold"),
        ("[localhost]:80", "brackets hold"),
        ("[]:80", "brackets hold"),
        ("[::1]:", "the port must be"),
        ("[::zz]:80", "not an IPv6 address"),
        ("unix:", "needs the path of a socket"),
        ("unix://", "needs the path"),
        ("unix:@", "needs the path"),
        ("unix:a\0b", "holds a NUL byte"),
        ("unix:\ud800", "cannot be written"),
        ("fd://", "the descriptor must be"),
        ("fd://x", "the descriptor must be"),
        ("fd://-1", "the descriptor must be"),
        (f"fd://{MAX_INT + 1}", "the descriptor must be"),
    ],
)
def test_what_is_no_address_is_quoted_whole_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(SettingValueError) as caught:
        Bind.parse(text)
    assert str(caught.value).startswith(f"bind={text!r}: {reason}")
    assert caught.value.exit_code == 2


def test_a_path_that_begins_with_two_slashes_survives_gunicorns_prefix() -> None:
    bind = Bind("unix", path="//run/x.sock")
    assert str(bind) == "unix:////run/x.sock"
    assert Bind.parse(str(bind)) == bind


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"kind": "tcp", "host": "", "port": 80}, "host"),
        ({"kind": "tcp", "host": "::zz", "port": 80}, "host"),
        ({"kind": "tcp", "host": "h", "port": 65536}, "port"),
        ({"kind": "tcp", "host": "h", "port": True}, "port"),
        ({"kind": "unix", "path": ""}, "uds"),
        ({"kind": "fd", "fd": -1}, "fd"),
        ({"kind": "tcp", "host": "h", "port": 80, "path": "/x"}, "bind"),
        ({"kind": "unix", "path": "/x", "port": 80}, "bind"),
        ({"kind": "fd", "fd": 3, "host": "h"}, "bind"),
    ],
)
def test_a_bind_that_is_not_well_formed_cannot_be_made(fields: dict[str, object], setting: str) -> None:
    with pytest.raises(SettingValueError) as caught:
        Bind(**fields)  # type: ignore[arg-type]
    assert caught.value.setting == setting


def test_several_addresses_come_in_their_order_as_texts_or_binds() -> None:
    one, two = Bind.parse(":1"), Bind.parse("unix:/x")
    assert parse_all(":1") == parse_all(one) == (one,)
    assert parse_all([":1", two]) == parse_all((one, "unix:/x")) == (one, two)


def test_port_0_may_be_asked_for_twice() -> None:
    assert len(parse_all(["127.0.0.1:0", "127.0.0.1:0"])) == 2


@pytest.mark.parametrize("value", [[], (), 8000, None, [8000], [None], ["a:1", "a:1"], ["fd://3", Bind("fd", fd=3)]])
def test_no_address_twice_the_same_and_other_types_are_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"^bind="):
        parse_all(value)
