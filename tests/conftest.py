"""Fixtures for all tests: tiny seeded checkpoints and a tokenizer. Tests have no network."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="llama-bidir-tests-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import make_model, make_tokenizer, tiny_config
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from llama_bidir import LlamaBidirectionalForSequenceClassification


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")


@pytest.fixture
def model() -> LlamaBidirectionalForSequenceClassification:
    return make_model()


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain `llama` checkpoint. Its tokenizer has no pad token, like those of published Llamas."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**tiny_config())).save_pretrained(path)
    make_tokenizer(eos_token="<|end|>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reranker_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `llama_bidirec` checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("reranker")
    make_model(seed=2, pooling="last", temperature=0.5).save_pretrained(path)
    make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(path)
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    """`load_rows` with an empty cache."""
    from llama_bidir.data import load_rows

    return partial(load_rows, cache_dir=tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder. Messages therefore hold short names."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class QuickstartOutput(NamedTuple):
    folder: Path
    printed: str


@pytest.fixture(scope="session")
def quickstart_output(tmp_path_factory: pytest.TempPathFactory) -> QuickstartOutput:
    """The folder and the output of `llama-bidir quickstart`, which runs once (about 90 seconds)."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    command = [sys.executable, "-m", "llama_bidir", "quickstart", "--output", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return QuickstartOutput(folder, result.stdout)
