"""Downloads from a real server on this machine: whole and bounded, or not at all."""

import threading
from collections.abc import Iterator
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import util.data.fetch
from util.data.fetch import download
from util.errors import BadInput
from util.train.checkpoint import local_file

BODY = b"weights" * 1000


class Handler(BaseHTTPRequestHandler):
    """Answers as the last part of the path asks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        kind = self.path.rpartition("/")[2]
        self.close_connection = True
        self.send_response(302 if kind.startswith("to-") else 200)
        if kind.startswith("to-"):
            here = f"//127.0.0.1:{self.server.server_address[1]}/whole"
            self.send_header("Location", f"{kind.removeprefix('to-')}:{here}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if "chunked" in kind:
            self.send_header("Transfer-Encoding", "chunked")
        elif kind != "endless":
            self.send_header("Content-Length", str(len(BODY) * (2 if kind == "short" else 1)))
        self.end_headers()
        if "chunked" not in kind:
            self.wfile.write(BODY)
            return
        for at in range(0, len(BODY), 1000):
            self.wfile.write(b"%x\r\n%b\r\n" % (1000, BODY[at : at + 1000]))
            if kind == "chunked-cut" and at:
                return
        self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["whole", "chunked"])
def test_a_whole_body_arrives(server, tmp_path, kind):
    download(server + kind, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY


@pytest.mark.parametrize(
    "kind, message",
    [
        ("short", "only 7000 of 14000 bytes came"),
        ("chunked-cut", "IncompleteRead"),
        ("endless", "does not say how long"),
        ("to-http", r"redirects to http://127\.0\.0\.1.*no https address"),
        ("to-file", "Redirection to url"),
    ],
)
def test_what_may_not_be_whole_or_leaves_https_is_refused(
    server, tmp_path, monkeypatch, kind, message
):
    with pytest.raises((OSError, HTTPException), match=message):
        download(server + kind, tmp_path / "x")
    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))
    fetch = download
    monkeypatch.setattr("util.train.checkpoint.download", lambda _, to: fetch(server + kind, to))
    with pytest.raises(BadInput, match=r"cannot fetch https://example\.org/w\.pth"):
        local_file("https://example.org/w.pth")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("kind", ["whole", "chunked"])
def test_a_body_over_the_bound_is_refused(server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(util.data.fetch, "MOST_BYTES", len(BODY))
    download(server + kind, tmp_path / "x")
    monkeypatch.setattr(util.data.fetch, "MOST_BYTES", len(BODY) - 1)
    with pytest.raises(OSError, match=r"6,999"):
        download(server + kind, tmp_path / "y")


@pytest.mark.parametrize("address", ["https://[bad/w.pth", "https://a:b/w.pth", "https:///w.pth"])
def test_an_odd_address_is_bad_input(address, tmp_path, monkeypatch):
    monkeypatch.setenv("MMAE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BadInput, match=r"cannot fetch https:"):
        local_file(address)
