# SPDX-License-Identifier: Apache-2.0
"""What nobody gets from the web page, whatever is sent to it."""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.sample import outputs
from launch.web import limits
from launch.web.tasks import WAITING
from tests.page_server import (
    Server,
    outcome,
    picture,
    served,
    told,
    wish,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra `web`"),
]
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
FILE = "/gradio_api/file="


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("page") / "results") as running:
        yield running


def raw(server: Server, path: str, **headers: str) -> tuple[int, str, bytes]:
    """Status, address to go on to, and answer for an address that is sent as it is."""
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("GET", path, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.getheader("location", ""), body


def results(client: httpx.Client) -> str:
    """What a page that is opened shows of earlier results."""
    config = client.get("/config").json()
    gallery = [p["id"] for p in config["components"] if p["type"] == "gallery"]
    load = next(
        event
        for event in config["dependencies"]
        if not event["inputs"] and gallery[0] in event["outputs"]
    )
    sent = {"data": [], "fn_index": load["id"], "session_hash": "results"}
    answer = client.post("/gradio_api/run/predict", json=sent)
    assert answer.status_code == 200
    return answer.text


def upload(client: httpx.Client, name: str, content: bytes) -> str:
    (path,) = client.post(UPLOAD, files={"files": (name, content)}).json()
    return path


def test_no_file_but_what_the_page_shows_is_served(server: Server, tmp_path: Path):
    secret = server.folder / "secret.json"
    secret.write_text("root: {}")
    with server.client() as client:
        uploaded = upload(client, "first.png", b"root:")
    here = uploaded.rpartition("/")[0]
    up = "/.." * here.count("/")
    paths = ["/etc/passwd", str(secret), str(picture(tmp_path / "first.png"))]
    paths += [f"{here}{up}/etc/passwd", f"{uploaded}/../{up}{secret}", here, "/%00"]
    paths += [path.replace("../", "%2e%2e%2f") for path in paths[3:5]]
    paths += [path.replace("../", "%252e%252e%252f") for path in paths[3:5]]
    for path in paths:
        status, _, body = raw(server, f"{FILE}{path}")
        assert status == 403 and b"root:" not in body, path
    for path in ("pyproject.toml", "../etc/passwd", "~/.bashrc", "%2e%2e%2fREADME.md"):
        assert raw(server, f"{FILE}{path}")[0] == 404
    for path in ("/static/%2e%2e%2froutes.py", "/assets/../../../routes.py"):
        assert raw(server, path)[0] in (403, 404)


def test_links_in_the_results_lead_nowhere(server: Server, tmp_path: Path):
    with server.client() as client:
        assert not told(outcome(client, wish(client, prompt="a red ring moves up")))
        made = next(server.folder.glob("*_a_red_ring_*.mp4"))
        secret = shutil.copy(made, tmp_path / "secret.mp4")
        inside, beside = server.folder / "inside.mp4", server.folder / "beside.mp4"
        inside.symlink_to(secret)
        beside.write_bytes(made.read_bytes())
        outputs.beside(beside).symlink_to(outputs.beside(made))
        (server.folder / "gone.mp4").symlink_to(tmp_path / "gone.mp4")
        (server.folder / "self.mp4").symlink_to(server.folder / "self.mp4")
        (server.folder / "empty.mp4").write_bytes(b"")
        (server.folder / "folder.mp4").mkdir()
        assert results(client).count("a red ring moves up") == 1
    for path in (inside, beside, made):
        assert raw(server, f"{FILE}{path}")[0] == 403


@pytest.mark.parametrize(
    "name", ["a.svg", "a.html", "a.xhtml", "a.js", "a.pdf", "a", "a.png.html"]
)
def test_what_a_browser_could_run_is_never_shown(server: Server, name: str):
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    inline = {"Content-Type": "text/html", "Content-Disposition": "inline"}
    with server.client() as client:
        path = upload(client, name, script)
        for sent in ({}, {"Range": "bytes=0-50"}, {"Range": "bytes=0-50"} | inline):
            answer = client.get(f"{FILE}{path}", headers=sent | {"Cookie": "a=secret"})
            assert answer.is_success and "secret" not in str(answer.headers)
            kinds = answer.headers.get_list("content-type")
            assert kinds == ["application/octet-stream"]
            (use,) = answer.headers.get_list("content-disposition")
            assert use.startswith("attachment")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-security-policy"] == "sandbox"


@pytest.mark.parametrize(
    "part", ["0-1-2", "5-2", "99-", "-5", "9999-", "0-0,3-4", "x", "9" * 30 + "-"]
)
def test_odd_ranges_are_answered(server: Server, part: str):
    with server.client() as client:
        path = upload(client, "a.png", b"0123456789")
    assert raw(server, f"{FILE}{path}", Range=f"bytes={part}")[0] in (200, 206, 416)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=https://example.org/x.png",
        "/gradio_api/proxy=//example.org/x.png",
        "/gradio_api/proxy=https:%2f%2fexample.org",
        f"{FILE}https://example.org/x.png",
        f"{FILE}HTTPS:%2f%2fexample.org/x.png",
        f"{FILE}file:///etc/passwd",
        f"{FILE}%20http://127.0.0.1:22/",
        f"{FILE}//example.org/x.png",
        "/gradio_api/file/https://example.org/x.png",
        "/gradio_api/file//etc/passwd",
        "////example.org",
        "////example.org/%2e%2e",
        "//example.org/config/",
        "/%2f%2fexample.org/",
        "/%5cexample.org/..",
        "/logout",
        "/login",
        "/config/",
        "/monitoring",
        "/monitoring/summary",
        "/gradio_api/info",
        "/gradio_api/runs",
        "/gradio_api/vibe-code",
        "/gradio_api/deep_link?session_hash=results",
        "/gradio_api/custom_component/x/server/component/index.js",
        f"/assets/{'a' * 3000}",
        f"/static/{'a/' * 100}a",
        "/static/%00",
        f"/gradio_api/heartbeat/{'a' * 3000}",
    ],
)
def test_the_page_fetches_nothing_and_leads_nowhere(server: Server, path: str):
    for headers in ({}, {"X_Forwarded_Host": "example.org"}):
        status, location, body = raw(server, path, **headers)
        assert status in (403, 404) and not location and len(body) < 300


def test_other_sites_do_not_use_the_page_of_a_visitor(server: Server):
    """They may send files and texts without asking, and are told nothing."""
    picture = {"files": ("first.png", b"\x89PNG")}
    foreign = ["https://example.org", "null", "http://127.0.0.1:9", "http://localhost"]
    foreign += [server.url + ".example.org", "", "x"]
    with server.client() as client:
        sent = json.dumps(wish(client, prompt="a red circle moves left"))
        for origin in foreign:
            named = {"Origin": origin}
            text = named | {"Content-Type": "text/plain"}
            answers = [
                client.post(UPLOAD, files=picture, headers=named),
                client.post(JOIN, content=sent, headers=text),
                client.post("/gradio_api/run/predict", content=sent, headers=text),
                client.get("/config", headers=named),
            ]
            assert [answer.status_code for answer in answers] == [403] * 4
            asked = named | {"Access-Control-Request-Method": "POST"}
            allowed = "access-control-allow-origin"
            if "127.0.0.1" not in origin and "localhost" not in origin:
                assert allowed not in client.options(JOIN, headers=asked).headers
        own = {"Origin": server.url}
        answer = client.post(UPLOAD, files=picture, headers=own)
        assert answer.status_code == 200
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert client.get("/", headers={"Host": "example.org"}).status_code == 400


def test_large_requests_and_back_doors_are_refused(server: Server):
    with server.client() as client:

        def status(path: str, **sent: Any) -> int:
            return client.post(path, **sent).status_code

        assert status(JOIN, content=b" " * (limits.MESSAGE + 1)) == 413
        assert status(UPLOAD, files={"files": bytes(limits.UPLOAD + 1)}) == 413
        assert status(UPLOAD, content=iter([b"x"] * 9)) == 411
        sent = wish(client, prompt="x")
        assert status("/gradio_api/run/predict", json=sent) == 404
        for name in ("component_server", "process_recording", "call/make", "api/make"):
            assert status(f"/gradio_api/{name}", json=sent) == 404
        sent = wish(client, image={"path": "https://example.org/first.png"})
        assert status(JOIN, json=sent) == 403


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/data"])
def test_long_addresses_are_refused(server: Server, path: str):
    """Gradio fails with a traceback where one does not fit in an URL of its own."""
    assert raw(server, f"{path}?{'a' * 60_000}")[0] == 414


def test_slow_senders_delay_nobody(server: Server):
    host = server.url.removeprefix("http://").split(":")
    address = host[0], int(host[1])
    slow = [socket.create_connection(address) for _ in range(60)]
    for number, each in enumerate(slow):
        head = f"POST {(UPLOAD, JOIN)[number % 2]} HTTP/1.1\r\nHost: {host[0]}\r\n"
        kind = "Content-Type: multipart/form-data; boundary=x\r\n"
        end = f"{kind}Content-Length: 99999\r\n\r\nx" if number % 3 else ""
        each.sendall((head + end).encode())
    with server.client() as client:
        start = time.monotonic()
        assert client.get("/").status_code == 200
        assert "a.png" in upload(client, "a.png", b"\x89PNG")
        assert time.monotonic() - start < 20
    for each in slow:
        each.close()


def test_100_visitors_at_once_are_all_answered(server: Server):
    def visit(number: int) -> str:
        with server.client() as client:
            assert client.get("/").status_code == 200
            sent = wish(client, prompt="a green star moves up", seed=number)
            return told(outcome(client, sent))

    with ThreadPoolExecutor(100) as visitors:
        words = list(visitors.map(visit, range(100)))
    made, late = words.count(""), f"{WAITING} videos wait already; try again later"
    assert made > WAITING and {*words} <= {
        "",
        f'<p class="refusal" role="alert">{late}</p>',
    }
    assert len(list(server.folder.glob("*_a_green_star_moves_up_*.mp4"))) == made
