"""Addresses, against a server on loopback that does everything wrong."""

import base64
import json
import multiprocessing
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import data.media.fetch
from data.dataset import load_samples
from data.loader import load_prompt
from data.media.fetch import check_address, fetch
from data.sample import BadMedia, InputError, Media, shown
from tests.conftest import OPTIONS

BODY = bytes(range(256)) * 400


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        seen = self.server.seen
        path = self.path.split("?")[0]
        seen.append((path, self.headers.get("Authorization")))
        times = sum(asked == path for asked, _ in seen)
        if path == "/slow.mp4":
            time.sleep(0.7)
        if path == "/404.mp4" or path == "/500.mp4" or (path == "/twice_500.mp4" and times < 3):
            self.send_error(404 if path == "/404.mp4" else 500)
        elif path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.server.targets[path[4:]])
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            announced = {name: len(body) for name, body in self.server.files.items()}
            announced |= {
                "/more.mp4": len(BODY) + 7,
                "/broken.mp4": len(BODY) + 7,
                "/huge.mp4": 10**12,
                "/empty.mp4": 0,
            }
            self.send_response(200)
            if path != "/endless.mp4":
                self.send_header("Content-Length", str(announced.get(path, len(BODY))))
            self.send_header("Connection", "close")
            self.end_headers()
            if path == "/drip.mp4":
                for byte in BODY[:100]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            elif path == "/endless.mp4":
                for _ in range(100):
                    self.wfile.write(BODY)
            elif path in self.server.files:
                self.wfile.write(self.server.files[path])
            elif path != "/empty.mp4" and not (path == "/breaks_once.mp4" and times < 2):
                self.wfile.write(BODY)
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(data.media.fetch, "PAUSES", (0.01, 0.01))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.files, server.daemon_threads = [], {}, True
    server.handle_error = lambda *_: None  # a client that hangs up, as it should
    server.at = f"http://127.0.0.1:{server.server_port}"
    server.targets = {"a.mp4": f"{server.at}/a.mp4", "file.mp4": "file:///etc/passwd", "ftp.mp4": "ftp://127.0.0.1/a"}
    server.targets["loop.mp4"] = f"{server.at}/to/loop.mp4"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(server, path, cache) -> bytes:
    with open(fetch(f"{server.at}{path}", str(cache)), "rb") as file:
        return file.read()


def test_a_file_is_fetched_once_and_keeps_its_ending(server, tmp_path):
    for _ in range(2):
        assert get(server, "/a.mp4", tmp_path / "cache") == BODY
    assert len(server.seen) == 1
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.name.endswith("-a.mp4")
    get(server, "/a.mp4?version=2", tmp_path / "cache")
    assert len(server.seen) == 2 and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("path", ["/slow.mp4", "/twice_500.mp4", "/breaks_once.mp4", "/to/a.mp4"])
def test_what_works_in_the_end_is_fetched(server, tmp_path, path):
    assert get(server, path, tmp_path) == BODY


@pytest.mark.parametrize(
    ("path", "words", "times"),
    [
        ("/404.mp4", "the server answers 404", 1),
        ("/500.mp4", "the server answers 500", 3),
        ("/broken.mp4", "the connection broke after 102,400 of 102,407 bytes", 3),
        ("/huge.mp4", "has more than 1,000,000 bytes", 1),
        ("/endless.mp4", "has more than 1,000,000 bytes", 1),
        ("/empty.mp4", "is an empty file", 1),
        ("/to/file.mp4", "the server answers 302", 1),
        ("/to/ftp.mp4", "only http and https addresses are fetched", 1),
        ("/to/loop.mp4", "the server answers 302", 5),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(server, tmp_path, monkeypatch, path, words, times):
    monkeypatch.setattr(data.media.fetch, "MAX_BYTES", 10**6)
    with pytest.raises(BadMedia) as caught:
        get(server, path, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.seen) == times or path == "/to/loop.mp4"
    assert not [entry for entry in tmp_path.iterdir() if not entry.name.endswith(".lock")]


def test_a_server_that_sends_a_byte_at_a_time_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(data.media.fetch, "SECONDS_IN_ALL", 0.3)
    monkeypatch.setattr(data.media.fetch, "PAUSES", ())
    began = time.monotonic()
    with pytest.raises(BadMedia, match=r"not complete after 0\.3 seconds"):
        get(server, "/drip.mp4", tmp_path)
    monkeypatch.setattr(data.media.fetch, "SECONDS_WITHOUT_DATA", 0.2)
    with pytest.raises(BadMedia, match="timed out"):
        get(server, "/slow.mp4", tmp_path)
    assert time.monotonic() - began < 10


def test_no_server_is_one_line(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(BadMedia, match="cannot be fetched: .*refused"):
        get(server, "/a.mp4", tmp_path)


def test_credentials_are_sent_to_their_host_and_shown_to_nobody(server, tmp_path):
    address = server.at.replace("://", "://me:se%40cret@")
    fetch(f"{address}/a.mp4?token=hidden", str(tmp_path))
    assert base64.b64decode(server.seen[0][1].removeprefix("Basic ")) == b"me:se@cret"
    fetch(f"{address}/to/a.mp4", str(tmp_path))
    assert server.seen[-1] == ("/a.mp4", None)  # where the redirect leads, they are not sent
    with pytest.raises(BadMedia) as caught:
        fetch(f"{address}/404.mp4?token=hidden", str(tmp_path))
    assert str(caught.value) == f"'{server.at}/404.mp4' cannot be fetched: the server answers 404"
    assert shown("https://a:b@host/x?y#z") == "https://host/x" and shown("https://host/a@b") == "https://host/a@b"
    assert not any("hidden" in entry.name or "cret" in entry.name for entry in tmp_path.iterdir())


@pytest.mark.parametrize("address", ["ftp://h/a", "file:///a", "s3://b/a", "http://", "http:///a", "http://h/a b"])
def test_other_addresses_are_refused(address):
    with pytest.raises(BadMedia):
        check_address(address)
    with pytest.raises(BadMedia):
        check_address("http://[::1/a")


def fetch_slowly(address: str, cache: str) -> None:
    fetch(address, cache)


def test_processes_do_not_fetch_the_same_file_twice(server, tmp_path):
    context = multiprocessing.get_context("forkserver")
    arguments = (f"{server.at}/slow.mp4", str(tmp_path))
    processes = [context.Process(target=fetch_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(server.seen) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="--media_cache .* cannot be written"):
        get(server, "/a.mp4", tmp_path / "file")


def test_a_sample_of_addresses_is_that_of_their_files(server, tmp_path, tiny):
    names = ["1_0.mp4", "1_1.mp4"]
    server.files = {f"/{name}": (tiny.folder / "videos" / name).read_bytes() for name in names}
    turns = [{"from": "human", "value": "EF?"}, {"from": "gpt", "value": "55%"}]
    address = server.at.replace("://", "://me:secret@")
    entry = {"id": "s", "video": [f"{address}/{name}?token=x" for name in names], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    (sample,) = load_samples([str(tmp_path / "data.json")])
    options = OPTIONS._replace(media_cache=str(tmp_path / "cache"))
    ours = load_prompt(sample, tiny.tokenizer, 2, options)
    local = replace(sample, media=tuple(Media("video", str(tiny.folder / "videos" / name)) for name in names))
    assert torch.equal(ours.patches, load_prompt(local, tiny.tokenizer, 2, OPTIONS).patches)
    assert [media.name for media in sample.media] == names
    del server.files["/1_0.mp4"]
    gone = replace(sample, media=(Media("video", f"{address}/404.mp4?token=x"),))
    with pytest.raises(BadMedia, match="404.mp4' cannot be fetched: the server answers 404") as caught:
        load_prompt(gone, tiny.tokenizer, 2, options)
    assert "secret" not in str(caught.value) and "token" not in str(caught.value)
    entry["video"] = "ftp://me:secret@host/a.mp4?token=x"
    (tmp_path / "data.json").write_text(json.dumps([entry]))
    with pytest.raises(InputError, match=r"sample 's': 'ftp://host/a.mp4' is refused: only http and https") as caught:
        load_samples([str(tmp_path / "data.json")])
