"""
The image is built, trains the quickstart, serves it, and stops on SIGTERM. This takes minutes, root, buildah and a base
image (or debootstrap, which makes one of Debian's packages under the base's name):

    LLAMA_BIDIR_CONTAINER="--network host" python -m pytest -m slow tests/container

The variable holds further options of `buildah build`, such as volumes with the configuration of pip.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = os.environ.get("LLAMA_BIDIR_CONTAINER")
BUILDAH = ["buildah", "--storage-driver", "vfs"]
IMAGE = "localhost/llama-bidir-test"
PORT = 8231
LARGEST = 1.5e9

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OPTIONS is None or shutil.which("buildah") is None, reason="LLAMA_BIDIR_CONTAINER is not set"),
]


def buildah(*arguments, **options):
    result = subprocess.run([*BUILDAH, *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def make_base(name, folder):
    """Makes an image of Debian's packages, where no registry of images can be reached."""
    packages = "--include=python3,python3-venv,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", folder], check=True, capture_output=True)
    for part in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale"):
        shutil.rmtree(folder / part)
    container = buildah("from", "scratch")
    mounted = buildah("mount", container)
    subprocess.run(["cp", "-a", f"{folder}/.", mounted], check=True)
    buildah("umount", container)
    buildah("commit", "-q", container, name)
    buildah("rm", container)


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    (base,) = re.findall(r"^ARG BASE=(\S+)", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    if base not in buildah("images", "--format", "{{.Name}}:{{.Tag}}").replace("docker.io/library/", "").split():
        make_base(base, tmp_path_factory.mktemp("base") / "root")
    isolation = ["--isolation", "chroot", "--format", "docker"]
    buildah("build", *isolation, *shlex.split(OPTIONS), "-t", IMAGE, ROOT)
    made = buildah("from", IMAGE)
    yield made
    buildah("rm", made)


def run(container, folder, *command):
    arguments = [
        "run",
        "--isolation",
        "chroot",
        "--user",
        "reranker",
        "-v",
        f"{folder}:/data:rw",
        "--workingdir",
        "/data",
    ]
    return [*BUILDAH, *arguments, container, "--", *command]


def test_the_image_trains_and_serves(container, tmp_path):
    mounted = Path(buildah("mount", container))
    size = sum(path.lstat().st_size for path in mounted.rglob("*"))
    buildah("umount", container)
    assert 0 < size < LARGEST
    inspected = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    assert (inspected["User"], inspected["Entrypoint"]) == ("reranker", ["llama-bidir"])
    folder = tmp_path / "work"
    folder.mkdir()
    folder.chmod(0o777)
    trained = subprocess.run(run(container, folder, "llama-bidir", "quickstart"), capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert (folder / "quickstart-output" / "model" / "model.safetensors").stat().st_uid == 1000
    served = f"exec llama-bidir serve --port {PORT} --model quickstart-output/model"
    with subprocess.Popen(
        run(container, folder, "sh", "-c", f"echo $$ > pid; {served}"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == f"ready: http://127.0.0.1:{PORT}\n"
        body = json.dumps({"query": "Which pet?", "documents": ["A raven.", "A bassoon."]}).encode()
        answer = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/rerank", body).read())
        assert len(answer["results"]) == 2
        started = time.monotonic()
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - started < 10
