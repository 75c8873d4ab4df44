"""gunicorn's atoms, one by one, and what is no template."""

from __future__ import annotations

import pytest

from clusterserve.core.atoms import Template, Who, harmless
from clusterserve.core.exchange import Exchange, request_id
from clusterserve.core.glance import glance

WHO = Who(3, 2, 4711)
TIME = "[10/Oct/2000:13:55:36 -0700]"


def exchange(**changes: object) -> Exchange:
    scope = {
        "type": "http", "method": "POST", "http_version": "1.1", "scheme": "https", "path": "/api/a b",
        "query_string": b"x=1&y=2", "root_path": "/api", "client": ("192.0.2.7", 5000), "server": ("198.51.100.1", 443),
        "headers": [
            (b"host", b"example.org"), (b"referer", b"http://r/"), (b"user-agent", b'say "hi"'), (b"x-twice", b"1"),
            (b"x-twice", b"2"), (b"authorization", b"Basic YWRtaW46c2VjcmV0"), (b"content-length", b"12"),
        ],
        **changes,
    }  # fmt: skip
    found = Exchange(scope, "the-id", 0.0015, 100.0)
    found.status, found.sent, found.service_time = 201, 1234, 2.045678
    found.headers = [(b"Content-Type", b"text/plain"), (b"x-\xe9", b"caf\xe9")]
    return found


@pytest.mark.parametrize(
    ("atom", "text"),
    [
        ("%(h)s", "192.0.2.7"),
        ("%(l)s", "-"),
        ("%(u)s", "admin"),
        ("%(t)s", TIME),
        ("%(r)s", "POST /api/a%20b?x=1&y=2 HTTP/1.1"),
        ("%(m)s", "POST"),
        ("%(U)s", "/api/a b"),
        ("%(q)s", "x=1&y=2"),
        ("%(H)s", "HTTP/1.1"),
        ("%(s)s", "201"),
        ("%(b)s", "1234"),
        ("%(B)s", "1234"),
        ("%(B)8d", "    1234"),
        ("%(f)s", "http://r/"),
        ("%(a)s", 'say \\"hi\\"'),
        ("%(T)s", "2"),
        ("%(D)s", "2045678"),
        ("%(M)s", "2045"),
        ("%(L)s", "2.045678"),
        ("%(p)s", "<4711>"),
        ("%({Host}i)s", "example.org"),
        ("%({X-TWICE}i)s", "1, 2"),
        ("%({none}i)s", "-"),
        ("%({content-type}o)s", "text/plain"),
        ("%({x-é}o)s", "café"),
        ("%({none}o)s", "-"),
        ("%({REQUEST_METHOD}e)s", "POST"),
        ("%({PATH_INFO}e)s", "/a b"),
        ("%({SCRIPT_NAME}e)s", "/api"),
        ("%({RAW_URI}e)s", "/api/a%20b?x=1&y=2"),
        ("%({QUERY_STRING}e)s", "x=1&y=2"),
        ("%({SERVER_PROTOCOL}e)s", "HTTP/1.1"),
        ("%({SERVER_NAME}e)s", "198.51.100.1"),
        ("%({server_port}e)s", "443"),
        ("%({REMOTE_ADDR}e)s", "192.0.2.7"),
        ("%({REMOTE_PORT}e)s", "5000"),
        ("%({CONTENT_LENGTH}e)s", "12"),
        ("%({CONTENT_TYPE}e)s", "-"),
        ("%({HTTP_X_TWICE}e)s", "1, 2"),
        ("%({wsgi.url_scheme}e)s", "https"),
        ("%({clusterserve.worker}e)s %({clusterserve.slot}e)s", "3 2"),
        ("%({clusterserve.request_id}e)s", "the-id"),
        ("%({clusterserve.queue_time}e)s", "0.001500"),
        ("%({clusterserve.service_time}e)s", "2.045678"),
        ("%({clusterserve.close_code}e)s", "-"),
        ("%({none}e)s", "-"),
        ("%({none}x)s", "-"),
        ("%(z)s %()s", "- -"),
        ("100 %% of %(s)s", "100 % of 201"),
        ("nothing at all", "nothing at all"),
    ],
)
def test_an_atom(atom: str, text: str) -> None:
    assert Template(atom, WHO).filled(exchange(), TIME) == text


def test_what_is_not_there() -> None:
    found = exchange(client=None, server=None, headers=[(b"authorization", b"Basic ???")], query_string=b"")
    found.sent, found.queue_time = 0, None
    template = Template("%(h)s %(u)s %(b)s %(B)s %(f)s %(a)s %({server_name}e)s %({clusterserve.queue_time}e)s", WHO)
    assert template.filled(found, TIME) == "- - - 0 - - - -"


@pytest.mark.parametrize("credentials", [b"Basic YWR", b"Basic /w==", b"Basic \xff", b"Bearer YWRtaW46", b"Basic", b""])
def test_credentials_that_are_none(credentials: bytes) -> None:
    assert Template("%(u)s", WHO).filled(exchange(headers=[(b"authorization", credentials)]), TIME) == "-"


def test_of_what_nobody_has_read() -> None:
    """Only who has asked is known; a template that wants numbers gets some."""
    found = Exchange({**glance(b""), "client": ("192.0.2.7", 5000)}, "", None, 100.0)
    found.status, found.service_time = 502, None
    atoms = "%(h)s %(r)s %(m)s %(U)s %({RAW_URI}e)s %({PATH_INFO}e)s %({REQUEST_METHOD}e)s %(s)s %(D)d %(T)d %(L)s"
    named = "%({clusterserve.request_id}e)s %({clusterserve.service_time}e)s"
    filled = Template(f"{atoms} {named}", WHO).filled(found, TIME)
    assert filled == "192.0.2.7 - - - - - - 502 0 0 0.000000 - -"


@pytest.mark.parametrize("text", ["%(h", "%(h)", "%(h)q", "%s", "100%", "% d", "%(h)d", "%(z)d"])
def test_what_is_no_template(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(it cannot be filled in: |a % that is none of an atom's)"):
        Template(text, WHO)


@pytest.mark.parametrize(("text", "shown"), [("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"), ('"', '\\"'), ("é", "é")])
def test_what_a_client_chose_stays_in_its_line(text: str, shown: str) -> None:
    assert harmless(text) == shown


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b"0af7651916cd43dd8448eb211c80319c", "0af7651916cd43dd8448eb211c80319c"),
        (b"Root=1-67891233-abcdef012345678912345678", "Root=1-67891233-abcdef012345678912345678"),
        (b"x" * 128, "x" * 128),
        (b"x" * 129, ""),
        (b"", ""),
        (b"two words", ""),
        (b"new\nline", ""),
        (b'quo"te', ""),
        (b"caf\xe9", ""),
        (b"-option", ""),
    ],
)
def test_what_a_request_may_be_called(value: bytes, name: str) -> None:
    assert request_id([(b"host", b"x"), (b"x-request-id", value)]) == name
    assert request_id([(b"host", b"x")]) == ""
