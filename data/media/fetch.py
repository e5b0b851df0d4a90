"""Files at http(s) addresses: fetched once into a folder that all ranks, workers and runs share.

An entry is written whole or not at all: it gets its name when the last byte is there. Whoever fetches it holds a lock,
so that others wait for it and do not fetch it again. Credentials (user:password@, and all behind "?") reach no message.
"""

import base64
import fcntl
import hashlib
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError

from data.sample import BadMedia, named, shown, writing

DEFAULT_CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "multi-video-grpo")
MAX_BYTES = 4 * 2**30
SECONDS_WITHOUT_DATA, SECONDS_IN_ALL = 30.0, 1800.0
PAUSES = (1.0, 4.0, 15.0)  # seconds before each further try
CHUNK = 2**20


def check_address(address: str) -> None:
    """Raise BadMedia for an address that is never fetched."""
    with named(repr(shown(address))):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme.lower() not in ("http", "https"):
            raise ValueError("is refused: only http and https addresses are fetched")
        if not parts.hostname or parts.port == 0 or not address.isprintable() or " " in address:
            raise ValueError("is not an address: write https://host/path, with %20 for a space")


def fetch(address: str, cache: str = DEFAULT_CACHE) -> str:
    """Return the path of the file at an address, which is fetched unless it is in the cache.

    Raises BadMedia, and InputError if the cache cannot be written.
    """
    check_address(address)
    ending = re.sub(r"[^A-Za-z0-9._-]", "_", shown(address).rsplit("/", 1)[-1])[-60:]
    path = Path(cache, f"{hashlib.sha256(address.encode()).hexdigest()[:32]}-{ending}")
    if path.exists():
        return str(path)
    with writing("media_cache", cache):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # another process may just have fetched it
                fetch_into(path, address)
            Path(lock.name).unlink(missing_ok=True)
    return str(path)


def fetch_into(path: Path, address: str) -> None:
    """Fetch an address, with further tries where they may help, and give the whole file its name. Raises BadMedia."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    for pause in (*PAUSES, None):
        try:
            download(address, unfinished)
            os.replace(unfinished, path)
            return
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code}"
            may_help = error.code >= 500 or error.code in (408, 425, 429)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, EOFError, SSLError) as error:
            reason, may_help = f"{getattr(error, 'reason', None) or error or type(error).__name__}", True
        finally:
            unfinished.unlink(missing_ok=True)
        if pause is None or not may_help:
            raise BadMedia(f"{shown(address)!r} cannot be fetched: {' '.join(reason.split())}")
        time.sleep(pause)


class OnlyHttp(urllib.request.HTTPRedirectHandler):
    """Follow redirects to other http(s) addresses only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # the names are urllib's
        check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(address: str, path: Path) -> None:
    """Write what an address holds to a file; raise BadMedia where another try cannot help, else urllib's errors."""
    parts = urllib.parse.urlsplit(address)
    plain = parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], fragment="").geturl()
    request = urllib.request.Request(plain, headers={"User-Agent": "multi-video-grpo"})
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        # Not sent on to where a redirect leads.
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    deadline = time.monotonic() + SECONDS_IN_ALL
    opener = urllib.request.build_opener(OnlyHttp)
    with opener.open(request, timeout=SECONDS_WITHOUT_DATA) as response, open(path, "wb") as file:
        announced = int(response.headers.get("Content-Length") or -1)
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            if max(announced, file.tell()) > MAX_BYTES:
                raise BadMedia(f"{shown(address)!r} has more than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {SECONDS_IN_ALL:g} seconds")
        if announced >= 0 and file.tell() != announced:
            raise EOFError(f"the connection broke after {file.tell():,} of {announced:,} bytes")
        if file.tell() == 0:
            raise BadMedia(f"{shown(address)!r} is an empty file")
        file.flush()
        os.fsync(file.fileno())
