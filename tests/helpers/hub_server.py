"""A stand-in for the Hugging Face hub on this machine: its HTTP protocol, over folders."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests that downloads and uploads make; a repository is a folder."""

    repositories: dict = {}  # noqa: RUF012
    fetched: list = []  # noqa: RUF012
    objects: dict = {}  # noqa: RUF012
    created: list = []  # noqa: RUF012
    root = None  # where repositories are made; None: nobody may write
    token = "hf_right"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        kind, _, name = path.partition("/main")
        api, resolve = re.match("/api/models/(.+)/tree", kind), re.match("/(.+)/resolve", kind)
        root = self.repositories.get((api or resolve or [""] * 2)[1])
        if api and root:
            files = [p for p in root.rglob("*") if p.is_file()]
            listing = [
                {"type": "file", "path": str(p.relative_to(root)), "oid": "0" * 40,
                 "size": p.stat().st_size}
                for p in files
            ]  # fmt: skip
            self.send(200, json.dumps(listing).encode(), body)
        elif resolve and root and (root / name[1:]).is_file():
            if body:
                self.fetched.append(name[1:])
            self.send(200, (root / name[1:]).read_bytes(), body)
        else:
            self.send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        path = self.path.split("?")[0]
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            head = sent.decode().partition("---")[2]
            return self.reply({"errors": [], "warnings": []} if head else {"errors": ["no head"]})
        if self.root is None or self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(401, b"{}", True, **{"X-Error-Message": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}"
            self.created.append((name, asked.get("visibility")))
            self.repositories[name] = self.root / name
            self.repositories[name].mkdir(parents=True, exist_ok=True)
            return self.reply({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if re.match("/api/models/(.+)/preupload/", path):
            names = [file["path"] for file in json.loads(sent)["files"]]
            large = (".safetensors", ".pt")
            files = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(large) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for name in names
            ]
            return self.reply({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(sent)["objects"]
            href = lambda oid: f"http://{self.headers['Host']}/objects/{oid}"  # noqa: E731
            files = [o | {"actions": {"upload": {"href": href(o["oid"])}}} for o in asked]
            return self.reply({"transfer": "basic", "objects": files})
        if found := re.match("/api/models/(.+)/commit/", path):
            return self.commit(self.repositories[found[1]], sent)
        return self.send(404, b"{}", True)

    def do_PUT(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(sent).hexdigest() == oid
        self.objects[oid] = sent
        self.send(200, b"", True)

    def commit(self, root, sent):
        for line in map(json.loads, sent.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "file":
                content = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                content = self.objects[value["oid"]]
            else:
                continue
            (root / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            (root / value["path"]).write_bytes(content)
        url = f"http://{self.headers['Host']}/{root.parent.name}/{root.name}/commit/{COMMIT}"
        self.reply({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def reply(self, value):
        self.send(200, json.dumps(value).encode(), True)

    def send(self, code, data, body, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(cache, root=None, **repositories):
    """The environment in which the hub is a server on this machine; `root` takes uploads."""
    Hub.repositories, Hub.fetched, Hub.root = repositories, [], root
    Hub.objects, Hub.created = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    finally:
        server.shutdown()
        server.server_close()
