"""A Hugging Face Hub on loopback that stores what is pushed, for tests with the real huggingface_hub client."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.faults: dict[str, tuple[int, str | None]] = {}  # by repository or file: status (0 cuts the line) and code
        self.requests: list[str] = []
        self.downloads: list[str] = []
        self.failing: dict[str, int] = {}
        """The status with which requests of a path (a regular expression) fail."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def parse_request(self) -> bool:
        is_good = super().parse_request()
        for pattern, status in self.server.failing.items():
            if is_good and re.search(pattern, self.path):
                self.reply({"error": "out of order"}, status)
                self.close_connection = True
                return False
        return is_good

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        for name, (status, code) in self.server.faults.items():
            if name in path:
                if status == 0:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                return self.reply(b"", status, **({"X_Error_Code": code} if code else {}), Retry_After="20")
        if path == "/api/whoami-v2":
            return self.reply({"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            files = self.server.repos.get(match[1])
            if files is None:
                return self.reply({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": match[1], "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
            return self.reply({"branches": [branch], "converts": [], "tags": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?", path):
            files = self.server.repos.get(match[1], {})
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
            return self.reply(entries)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.server.repos.get(match[1])
            if files is None:
                return self.reply(b"", 404, X_Error_Code="RepoNotFound")
            body = files.get(match[2])
            if body is None:
                return self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            if self.command == "GET":
                self.server.downloads.append(match[2])
            etag = hashlib.sha256(body).hexdigest()
            return self.reply(body, X_Repo_Commit=COMMIT, ETag=f'"{etag}"')
        return self.reply({"error": f"unknown path {path}"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.split("/")[-1]] = body
        self.reply({})

    def do_POST(self) -> None:
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'tester'}/{request['name']}"
            self.server.repos.setdefault(name, {})
            return self.reply({"url": f"{self.server.endpoint}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/.+/preupload/.+", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.reply({"files": files})
        if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            files = self.server.repos[match[1]]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    self.server.commits.append({"repo": match[1], **value})
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            url = f"{self.server.endpoint}/{match[1]}/commit/{COMMIT}"
            return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
        return self.reply({"error": f"unknown path {path}"}, 404)


@contextmanager
def run_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
