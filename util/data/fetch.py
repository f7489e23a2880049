"""Files from https addresses: whole, of a bounded size, and never by way of plain http."""

import shutil
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

# Weights of the largest ViT that anyone publishes, with its optimiser, are about 22 GB.
MOST_BYTES = 32 * 2**30
SILENCE = 60  # seconds without a byte
BLOCK = 1 << 20


class _HttpsAlone(HTTPRedirectHandler):
    """Follows redirects to https addresses, where nobody on the way can change a file."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not newurl.lower().startswith("https://"):
            raise URLError(f"it redirects to {newurl}, which is no https address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


urlopen = build_opener(_HttpsAlone).open


def download(address: str, to: Path) -> None:
    """Fetch a file of an https address.

    Raises:
        OSError, HTTPException: it could not be fetched whole, it is larger than `MOST_BYTES` or
            than the disk has room for, or the server does not say where it ends.
    """
    with urlopen(address, timeout=SILENCE) as response, to.open("wb") as file:
        expected = read_length(response)
        room = min(MOST_BYTES, shutil.disk_usage(to.parent).free)
        if expected is not None and expected > room:
            raise OSError(f"it holds {expected:,} bytes, and at most {room:,} are taken")
        while block := response.read(BLOCK):
            file.write(block)
            if file.tell() > room:
                raise OSError(f"it holds more than {room:,} bytes, which is the most taken")
        size = file.tell()
    # http.client reads a body that ends too early in silence.
    if expected is not None and size != expected:
        raise OSError(f"only {size} of {expected} bytes came")


def read_length(response: HTTPResponse) -> int | None:
    """Bytes that the server announces; None: it marks the end otherwise (in chunks).

    Raises:
        HTTPException: it says neither, and an end too early would look like the end.
    """
    headers = response.info()
    length = headers.get("Content-Length")
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        return None  # http.client raises where a chunk is missing
    if length is None or not length.strip().isascii() or not length.strip().isdigit():
        raise HTTPException(f"the server does not say how long the file is ({length!r})")
    return int(length)
