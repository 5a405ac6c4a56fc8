"""From names to folders: a stand-in on this machine for the Hugging Face hub, aliases, cache."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sizes import TINY

from gpt_oss_jax.checkpoint import hub, load, resolve, synthetic

ROOT = Path(__file__).parents[1]
REVISION = "f" * 40


class StandIn(http.server.BaseHTTPRequestHandler):
    """The two parts of the hub's API that a download uses: what there is, and the files."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_GET(self, body=True):
        type(self).asked.append(self.path)
        path = self.path.partition("?")[0]
        listing = f"/api/models/openai/gpt-oss-20b/revision/{REVISION}"
        content, headers = None, {}
        if path in ("/api/models/openai/gpt-oss-20b/revision/main", listing):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps(
                {"id": "openai/gpt-oss-20b", "sha": REVISION, "siblings": siblings}
            ).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith("/api/models/openai/gpt-oss-20b/tree/"):
            content = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in self.files.items()
                ]
            ).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith(f"/openai/gpt-oss-20b/resolve/{REVISION}/"):
            content = self.files.get(path.split(REVISION + "/")[1])
            if content is not None:
                headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": REVISION}
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *args):
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder as the hub's repository is: three variants, two of which nobody asked for."""
    root = synthetic.write(TINY, tmp_path_factory.mktemp("hub") / "release")
    (root / "tokenizer.json").write_text("a tokenizer")
    synthetic.write(TINY, root / "original", "original")
    (root / "metal").mkdir()
    (root / "metal" / "model.bin").write_bytes(b"not for us")
    return root


@pytest.fixture
def endpoint(release):
    StandIn.files = {
        str(x.relative_to(release)): x.read_bytes() for x in release.rglob("*") if x.is_file()
    }
    StandIn.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def _resolve_elsewhere(name, cwd, **environment) -> tuple[str, str]:
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    code = "import sys; from gpt_oss_jax.checkpoint import resolve; print(resolve(sys.argv[1]))"
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = clean | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip(), done.stderr


def test_one_variant_is_downloaded_and_loads(endpoint, release, tmp_path):
    pytest.importorskip("huggingface_hub")
    home = str(tmp_path / "home")
    folder, said = _resolve_elsewhere("gpt-oss:20b", tmp_path, HF_ENDPOINT=endpoint, HF_HOME=home)
    assert folder, said
    assert folder == f"{home}/hub/models--openai--gpt-oss-20b/snapshots/{REVISION}"
    root = [x.name for x in release.iterdir() if x.is_file()]
    assert sorted(os.listdir(folder)) == sorted(root)
    assert not any("/original/" in path or "/metal/" in path for path in StandIn.asked)
    # No bar where stderr is no terminal.
    assert "%|" not in said and "it/s" not in said

    assert load(folder).config == TINY
    # The repository's folder in the cache means its current snapshot.
    assert resolve(Path(folder).parents[1]) == folder

    # Again, with the hub out of reach: what was downloaded is enough.
    before = len(StandIn.asked)
    again, said = _resolve_elsewhere(
        "openai/gpt-oss-20b", tmp_path, HF_ENDPOINT=endpoint, HF_HOME=home, HF_HUB_OFFLINE="1"
    )
    assert again == folder and len(StandIn.asked) == before, said


def test_a_failed_download_says_what_to_do(endpoint, tmp_path):
    pytest.importorskip("huggingface_hub")
    home = str(tmp_path / "home")
    for name, url in (("openai/gpt-oss-7b", endpoint), ("20b", "http://127.0.0.1:9")):
        folder, said = _resolve_elsewhere(name, tmp_path, HF_ENDPOINT=url, HF_HOME=home)
        assert not folder
        *_, last = [x for x in said.splitlines() if "Error" in x and not x.startswith(" ")]
        assert last.startswith("ValueError: openai/gpt-oss-"), said
        assert "could not be downloaded" in said
        assert "--exclude 'original/*' --exclude 'metal/*' --local-dir DIR" in said


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'pip install "gpt-oss-jax\[hub\]"'):
        resolve("120b")


@pytest.mark.parametrize("name", ["20b", "120b", "gpt-oss:20b", "gpt-oss:120b"])
def test_aliases(monkeypatch, name):
    asked = []
    monkeypatch.setattr(hub, "_download", lambda name, download: asked.append(name) or "there")
    assert resolve(name) == "there"
    assert asked == ["openai/gpt-oss-" + name.removeprefix("gpt-oss:")]


def test_only_what_is_a_repository_reaches_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_download", lambda name, download: pytest.fail(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for slip in ("weights/gpt-oss", "./nowhere", "/no/where/at/all", "nonsense", "a/b/c", ""):
        with pytest.raises(ValueError, match=f"'{slip}' is not there"):
            load(slip)


def test_original_alone_is_found_under_its_root(release, tmp_path):
    """`hf download --include "original/*" --local-dir DIR` leaves DIR/original."""
    shutil.copytree(release / "original", tmp_path / "gpt-oss-20b" / "original")
    assert resolve(tmp_path / "gpt-oss-20b") == str(tmp_path / "gpt-oss-20b" / "original")
    assert resolve(release) == str(release)
    assert resolve(release / "original") == str(release / "original")


def test_urls_and_tiny_pass_through(monkeypatch, tmp_path):
    assert resolve("gs://bucket/gpt-oss-20b") == "gs://bucket/gpt-oss-20b"
    monkeypatch.setattr(hub.tiny, "unpack", lambda: tmp_path / "unpacked")
    assert resolve("tiny") == str(tmp_path / "unpacked")
