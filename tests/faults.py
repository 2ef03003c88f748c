"""
Faults by real means while a checkpoint is saved: kill -9, a full disk, a read-only file system.

    python -m tests.faults [--kills 200] [--only cross_encoder merge ...]

Each save path writes checkpoint B over checkpoint A. Afterwards the folder must hold all files of A or all files of B,
byte for byte, and always those of a person. The full disk and the read-only file system are a small tmpfs, which root
can mount. The script prints counts, and exits with status 1 after a wrong outcome.
"""

import argparse
import errno
import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, os.fspath(Path(__file__).parent))

import torch
from helpers import ROWS, arguments, make_model, make_tokenizer
from transformers.utils.logging import disable_progress_bar

from llama_bidir import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.files_llama_bidir import INTERRUPTED_SAVE
from llama_bidir.training import merge_adapter

MB = 2**20
PERSONAL = {"notes.txt": "mine", "checkpoint-3/model.safetensors": "mine"}

Save = Callable[[Path], None]


def make_paths(sources: Path) -> dict[str, tuple[Save, Save]]:
    """Returns how each save path writes checkpoint A and checkpoint B into a folder."""
    a, b = (CrossEncoder(make_model(seed=seed, hidden_size=64), make_tokenizer(eos_token="<|end|>")) for seed in (1, 2))
    import peft

    for reranker, name in ((a, "a"), (b, "b")):
        reranker.save_pretrained(sources / name)
        base = CrossEncoder(sources / name, device="cpu").model
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"])
        CrossEncoder(peft.get_peft_model(base, lora), reranker.tokenizer).save_pretrained(sources / f"adapter-{name}")
    adapters = [CrossEncoder(sources / f"adapter-{name}", device="cpu") for name in "ab"]

    def in_place(folder: Path) -> None:
        os.chdir(folder)  # so that the folder must stay in its place
        try:
            b.save_pretrained(folder)
        finally:
            os.chdir("/")

    def trained(reranker: CrossEncoder, folder: Path) -> None:
        training = arguments(CrossEncoderTrainingArguments, folder)
        trainer = CrossEncoderTrainer(reranker.model, training, ROWS, processing_class=reranker.tokenizer, group_size=2)
        trainer.save_model()

    paths: dict[str, tuple[Save, Save]] = {
        "cross_encoder": (a.save_pretrained, b.save_pretrained),
        "shards over one file": (a.save_pretrained, lambda folder: b.save_pretrained(folder, max_shard_size="60KB")),
        "adapter over a whole model": (a.save_pretrained, adapters[1].save_pretrained),
        "whole model over an adapter": (adapters[0].save_pretrained, b.save_pretrained),
        "in place": (a.save_pretrained, in_place),
        "trainer": (lambda folder: trained(a, folder), lambda folder: trained(b, folder)),
        "merge": (
            lambda folder: merge_adapter(sources / "adapter-a", folder, overwrite=True),
            lambda folder: merge_adapter(sources / "adapter-b", folder, overwrite=True),
        ),
    }
    for format in ("hub", "vllm", "sentence-transformers"):
        paths[f"export {format}"] = tuple(  # type: ignore[assignment]
            lambda folder, name=name, format=format: export_reranker(
                sources / name, folder, format=format, overwrite=True
            )
            for name in "ab"
        )
    return paths


def read(folder: Path) -> dict[str, str]:
    """The checksum of each file in a folder."""
    return {
        os.fspath(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def prepare(save: Save, folder: Path) -> dict[str, str]:
    """Makes a folder with files of a person and one checkpoint, and returns its content."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in PERSONAL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "config.json").write_text("{}")  # export and merge replace a checkpoint only
    save(folder)
    return read(folder)


def kill_while_saving(save: Save, folder: Path, delay: float) -> None:
    """Saves in a child process, which is killed after some seconds."""
    child = os.fork()
    if child == 0:
        try:
            save(folder)
        finally:
            os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def try_kills(first: Save, second: Save, home: Path, kills: int, generator: random.Random) -> Counter[str]:
    """Kills saves at random moments and returns how often the folder held which checkpoint."""
    folder, template = home / "out", home / "template"
    new = prepare(second, folder)
    old = prepare(first, folder)
    shutil.copytree(folder, template)
    started = time.monotonic()
    second(folder)
    longest = 1.2 * (time.monotonic() - started)
    outcomes: Counter[str] = Counter()
    for _ in range(kills):
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        kill_while_saving(second, folder, generator.uniform(0, longest))
        content = {name: value for name, value in read(folder).items() if not name.startswith(".saving-")}
        if content in (old, new):
            outcomes["old" if content == old else "new"] += 1
        elif (folder / INTERRUPTED_SAVE).is_dir() and not (folder / "config.json").exists():
            outcomes["says interrupted"] += 1
        else:
            outcomes["WRONG"] += 1
        second(folder)
        if read(folder) != new or sorted(os.listdir(home)) != ["out", "template"]:
            different = {name for name, _ in read(folder).items() ^ new.items()} | {*os.listdir(home)} - {
                "out",
                "template",
            }
            outcomes[f"WRONG after the next save: {sorted(different)}"] += 1
    return outcomes


@contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A tmpfs of some megabytes. Raises PermissionError where this process may not mount one."""
    place = Path(tempfile.mkdtemp(prefix="faults-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", os.fspath(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        place.rmdir()
        raise PermissionError("only root can mount a tmpfs")
    try:
        yield place
    finally:
        os.chdir("/")
        subprocess.run(["umount", os.fspath(place)], check=True)
        place.rmdir()


def try_full_disk(first: Save, second: Save, steps: int) -> Counter[str]:
    """Saves on a disk with less and less room, then on a read-only one, and returns the outcomes."""
    outcomes: Counter[str] = Counter()
    with small_disk(8) as disk:
        folder, filler = disk / "out", disk / "filler"
        old = prepare(first, folder)
        probe = disk / "probe"
        new = prepare(second, probe)
        needed = sum(path.stat().st_size for path in probe.rglob("*") if path.is_file()) + 64 * 1024
        shutil.rmtree(probe)
        for step in range(steps + 1):
            filler.unlink(missing_ok=True)
            room = os.statvfs(disk).f_bavail * 4096 - needed * step // steps
            filler.write_bytes(b"\0" * max(room, 0))
            outcomes[outcome(second, folder, old, new, errno.ENOSPC)] += 1
            if sorted(os.listdir(disk)) != ["filler", "out"]:
                outcomes["LEFT SOMETHING"] += 1
            if read(folder) != old:
                filler.unlink(missing_ok=True)
                prepare(first, folder)
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", os.fspath(disk)], check=True)
        outcomes["read-only: " + outcome(second, folder, old, new, errno.EROFS)] += 1
    return outcomes


def outcome(save: Save, folder: Path, old: dict[str, str], new: dict[str, str], number: int) -> str:
    """Saves, and says what came of it."""
    try:
        save(folder)
    except OSError as error:
        if error.errno != number or os.fspath(folder) not in str(error) or "unchanged" not in str(error):
            return f"WRONG ERROR {error!r}"
        return "refused, old" if read(folder) == old else "WRONG CONTENT"
    except Exception as error:
        return f"WRONG ERROR {error!r}"
    content = {name: value for name, value in read(folder).items() if name != "README.md"}
    return "saved" if content.keys() == new.keys() - {"README.md"} else "WRONG CONTENT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="per save path")
    parser.add_argument("--steps", type=int, default=12, help="sizes of the full disk per save path")
    parser.add_argument("--only", nargs="*", help="names of save paths")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()  # a child that is killed while it draws one keeps the lock of tqdm
    logging.getLogger("llama_bidir").setLevel(logging.ERROR)
    generator = random.Random(options.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        paths = make_paths(Path(place, "sources"))
        for name, (first, second) in paths.items():
            if options.only and name not in options.only:
                continue
            home = Path(place, name.replace(" ", "-"))
            home.mkdir()
            killed = try_kills(first, second, home, options.kills, generator)
            try:
                full = try_full_disk(first, second, options.steps)
            except PermissionError as error:
                full = Counter({f"skipped: {error}": 1})
            sys.stdout.write(f"{name:28} kill -9: {dict(killed)}  full disk: {dict(full)}\n")
            sys.stdout.flush()
            wrong += sum(
                count
                for each in (killed, full)
                for what, count in each.items()
                if any(word in what for word in ("WRONG", "LEFT"))
            )
            if name != "in place":
                wrong += killed["says interrupted"]
    sys.stdout.write(f"{wrong} wrong outcomes\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
