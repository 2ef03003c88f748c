"""
The code blocks of the README and of the pages: commands parse, recipes load, and scripts run.

tests/cli/test_quickstart.py and tests/test_frameworks.py run the scripts of the pages in ELSEWHERE.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from helpers import HIVE_WORDS, ROWS, arguments, lines, make_model, make_tokenizer, read_lines_of, write

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("bm25s")

from datasets import Dataset

import llama_bidir
from llama_bidir import CrossEncoder, CrossEncoderTrainingArguments
from llama_bidir.cli import VERBS, main
from llama_bidir.data import parse_row
from llama_bidir.evaluation import evaluate_run, write_corpus, write_qrels, write_queries, write_run
from llama_bidir.training.recipes import load_recipe
from llama_bidir.training.reranking import load_rerank_sets

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
ELSEWHERE = {"README.md": 4, "scoring.md": 6, "training.md": 1, "frameworks.md": 7}
CORPUS = {f"d{number}": f"The {word} is here, and nowhere else." for number, word in enumerate(HIVE_WORDS)}
QUERIES = {f"q{number}": f"where is the {word}?" for number, word in enumerate(HIVE_WORDS)}
QRELS = {f"q{number}": {f"d{number}": 1} for number in range(len(HIVE_WORDS))}
RUN = {key: {doc: -float(place) for place, doc in enumerate(CORPUS)} for key in QUERIES}
QUESTION, PASSAGES = "how do bees find their way?", ["By the sun.", "The hive."]


def write_beir(path: Path) -> None:
    (path / "qrels").mkdir(parents=True)
    write_corpus(path / "corpus.jsonl", CORPUS)
    write_queries(path / "queries.jsonl", QUERIES)
    write_qrels(path / "qrels" / "test.tsv", QRELS)
    write_run(path / "run.bm25.trec", RUN, "listed")


class Block(NamedTuple):
    page: str
    number: int
    code: str


def read_blocks(language: str, *pages: str) -> list[Block]:
    fence = re.compile(rf"^ *```{language}\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
    found = [(page, enumerate(fence.findall(PAGES[page]))) for page in pages or PAGES]
    return [Block(page, number, textwrap.dedent(code)) for page, blocks in found for number, code in blocks]


def each_block(blocks):
    return pytest.mark.parametrize("block", blocks, ids=lambda block: f"{block.page}-{block.number}")


def test_every_block_has_a_language_that_is_tested():
    for page, text in PAGES.items():
        languages = re.findall(r"^ *```(.*)$", text, flags=re.MULTILINE)[::2]
        assert {*languages} <= {"bash", "python", "yaml", "json", "text"}, page
        assert len(languages) == sum(len(read_blocks(language, page)) for language in {*languages}), page


def split_commands(text: str) -> list[list[str]]:
    """Returns the words of each command of a shell script, without comments and variables before a command."""
    commands, command = [], ""
    for line in text.replace("\\\n", " ").splitlines():
        command += line + "\n"
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quoted text continues in the next line
            continue
        command = ""
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        assert not {"&&", "||", "|", ";"} & {*words}, f"write one command per line: {line}"
        commands += [words] if words else []
    assert not command, f"a quote is not closed: {command}"
    return commands


# The commands of the container are in a table.
SCRIPTS = [block[::2] for block in read_blocks("bash")]
SCRIPTS += [(page, "\n".join(re.findall(r"`([^`\n]*docker [^`\n]+)`", text))) for page, text in PAGES.items()]
COMMANDS = [(page, words) for page, script in SCRIPTS for words in split_commands(script)]
# What the dots stand for in `llama-bidir rerank --engine ray ...`.
DOTS = {"rerank": ["--model", "m", "--corpus", "corpus.jsonl", "--queries", "queries.jsonl", "--output", "out.trec"]}


class ParsedError(Exception):
    """The parser of a module has accepted the options."""


def declared(file: str, pattern: str) -> list[str]:
    return re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses a command as it would be parsed, and ends before its work."""
    match words:
        case ["llama-bidir", verb, *rest]:
            assert verb in VERBS
            monkeypatch.setattr(VERBS[verb], "run", lambda arguments: None)
            assert main([verb, *(part for word in rest for part in (DOTS[verb] if word == "..." else [word]))]) == 0
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            launch = get_args_parser().parse_args(rest)
            assert (launch.module, launch.training_script) == (True, "llama_bidir")
            check_command(["llama-bidir", *launch.training_script_args], monkeypatch)
        case ["python", "-m", module, *rest]:
            parse_args = argparse.ArgumentParser.parse_args

            def stop(parser):
                parse_args(parser)
                raise ParsedError

            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
            monkeypatch.setattr(sys, "argv", [module, *rest])
            with pytest.raises(ParsedError):
                runpy.run_module(module, run_name="__main__")
        case ["docker", "run", *rest]:
            [image] = {"llama-bidir", "llama-bidir-server"} & {*rest}
            entrypoint = dict(pairwise(rest)).get("--entrypoint", "llama-bidir")
            given = rest[rest.index(image) + 1 :] or json.loads(declared("Dockerfile", r"^CMD (\[.*\])")[-1])
            check_command([entrypoint, *given], monkeypatch)
        case ["docker", "build", *rest]:
            known = {"--build-arg": r"^ARG (\w+)=", "--target": r"^FROM .* AS (\w+)$"}
            for option, value in pairwise(rest):
                assert option not in known or value.split("=")[0] in declared("Dockerfile", known[option])
        case ["pip", "install", *rest]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            extras = re.findall(r"(?:^|\s)(?:llama-bidir|\.)\[([\w,]+)\]", " ".join(rest))
            assert {*",".join(extras).split(",")} <= {*project["optional-dependencies"], ""}
            assert all((ROOT / value).is_file() for option, value in pairwise(rest) if option == "-r")
        case ["make", target]:
            assert target in declared("Makefile", r"^(\w+):")
        case ["curl", _, "-H", _, "-d", body]:
            json.loads(body)
        case ["docker", "compose", "up"] | [".ci/run"] | ["python", "score.py"] | ["vllm", "serve", *_]:
            pass  # none has an option of this repository
        case _:
            raise AssertionError(f"unknown command: {shlex.join(words)}")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_parses(page, words, monkeypatch):
    check_command(words, monkeypatch)


WRONG = r"""
llama-bidir bake cake
llama-bidir merge --adapter a
llama-bidir serve --model m --dtype int4
llama-bidir train recipe.yaml --lora.rank 3
llama-bidir rerank --engine rays ...
torchrun --nproc-per-node 8 -m llama_bidir rerank ... --run bm25.trec   # lacks the lone --
python -m benchmarks.bake
python -m benchmarks.loaded --checkpoint m \
    --model 7b
docker run --rm llama-bidir bake
docker build --target oven .
pip install "llama-bidir[train,oven]"
make cake
curl localhost -H x -d '{"query": }'
A=1 wget localhost
"""


@pytest.mark.parametrize("words", split_commands(WRONG), ids=" ".join)
def test_a_wrong_command_is_found(words, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, ImportError, ValueError)):
        check_command(words, monkeypatch)


@each_block(read_blocks("yaml"))
def test_every_recipe_loads(block, folder):
    values = yaml.safe_load(block.code)
    whole = {} if "model" in values else yaml.safe_load(read_blocks("yaml", block.page)[0].code)  # for a part of one
    whole |= {name: {**whole.get(name, {}), **part} for name, part in values.items()}
    recipe = load_recipe(write(folder / "recipe.yaml", yaml.safe_dump(whole)))._asdict()
    for name, part in values.items():
        if "fsdp" in part:  # a run of one process leaves FSDP out
            from accelerate import FullyShardedDataParallelPlugin

            parsed = arguments(CrossEncoderTrainingArguments, "out", **part)
            assert FullyShardedDataParallelPlugin(**parsed.fsdp_plugin_args).fsdp_version == 2
            assert parsed.fsdp_config["state_dict_type"] == "FULL_STATE_DICT"
        else:
            assert {key: recipe[name][key] if name == "lora" else getattr(recipe[name], key) for key in part} == part
        for entry in part.get("eval_rerank", []):
            write_beir(Path(entry["path"]))
            [loaded] = load_rerank_sets([entry])
            assert (loaded.name, loaded.depth) == (entry["name"], entry["depth"])


def test_every_json_block_is_a_row_or_settings_of_deepspeed():
    row, settings = (json.loads(block.code) for block in read_blocks("json"))
    parsed = parse_row(row, "README.md")
    assert (row["query"], row["pos_doc"], row["neg_doc"]) == parsed[:3]
    assert settings["zero_optimization"]["stage"] == 3


TESTED: set[tuple[str, int]] = set()


def runs(page: str, *numbers: int):
    """Parametrizes a test with Python blocks of a page, and notes that they are run."""
    TESTED.update((page, number) for number in numbers)
    return each_block([block for block in read_blocks("python", page) if block.number in numbers])


def test_every_script_is_run():
    elsewhere = {(page, number) for page, count in ELSEWHERE.items() for number in range(count)}
    assert {block[:2] for block in read_blocks("python")} == TESTED | elsewhere


def run(block: Block, *replacements: tuple[str, str], **names: object) -> dict:
    """Runs a block with variables, and returns all variables."""
    code = block.code
    for old, new in replacements:
        assert old in code
        code = code.replace(old, new)
    names["__name__"] = "page"
    exec(compile(code, f"{block.page}, Python block {block.number}", "exec"), names)
    return names


def save_reranker(path: Path) -> CrossEncoder:
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    reranker = CrossEncoder(make_model(temperature=0.5, rerank_max_length=64), tokenizer)
    reranker.save_pretrained(path)
    return reranker


@pytest.fixture
def reranker(folder):
    """The reranker that the scripts name."""
    return save_reranker(folder / "my-reranker")


def rerank(reranker, run):
    pairs = {key: [(QUERIES[key], CORPUS[doc]) for doc in docs] for key, docs in run.items()}
    return {key: dict(zip(run[key], reranker.predict(pairs[key]).tolist(), strict=True)) for key in run}


@runs("evaluation.md", 0)
def test_evaluate_a_reranker(block, reranker, capsys):
    write_beir(Path("path/to/beir-folder"))
    run(block)
    before, after = (evaluate_run(QRELS, each, "nDCG@10 RR@10") for each in (RUN, rerank(reranker, RUN)))
    printed = [float(number) for number in re.findall(r": (\d\.\d+)", capsys.readouterr().out)]
    assert printed == pytest.approx([*before.values(), *after.values()])
    assert before != after


@runs("evaluation.md", 1)
def test_evaluate_with_mteb(block, reranker, monkeypatch):
    pytest.importorskip("Stemmer")
    mteb = pytest.importorskip("mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    def load_data(task, **kwargs):  # in place of the download
        corpus = Dataset.from_list([{"id": key, "title": "", "text": CORPUS[key]} for key in CORPUS])
        queries = Dataset.from_list([{"id": key, "text": QUERIES[key]} for key in QUERIES])
        split = {"corpus": corpus, "queries": queries, "relevant_docs": QRELS, "top_ranked": None}
        task.dataset, task.data_loaded = {"default": {"train": split}}, True

    results, evaluate = [], mteb.evaluate
    monkeypatch.setattr(AbsTaskRetrieval, "load_data", load_data)
    monkeypatch.setattr(mteb, "evaluate", lambda *given, **kw: results.append(evaluate(*given, cache=None, **kw)))
    run(block)
    found = json.loads(next(Path("bm25").rglob("*.json")).read_text())["default"]["train"]
    expected = evaluate_run(QRELS, rerank(reranker, found), "nDCG@10")["nDCG@10"]
    assert results[-1].task_results[0].scores["train"][0]["ndcg_at_10"] == pytest.approx(expected, abs=1e-5)


@runs("migration.md", 0, 1)
def test_training_there_and_here(block, base_checkpoint, folder, no_plot):
    theirs = pytest.importorskip("sentence_transformers.cross_encoder")
    shutil.copytree(base_checkpoint, "base")
    # By "yes" and "no", sentence-transformers scores a base model.
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>", bos_token="yes", unk_token="no")
    tokenizer.save_pretrained("base")
    rows = [{"query": row["query"], "docs": row["pos_doc"] + row["neg_doc"][:2], "labels": [1, 0, 0]} for row in ROWS]
    package = (theirs, llama_bidir)[block.number]
    names = run(
        block,
        ("meta-llama/Llama-3.2-1B", "base"),
        CrossEncoder=package.CrossEncoder,
        CrossEncoderTrainer=package.CrossEncoderTrainer,
        LlamaBidirectionalForSequenceClassification=llama_bidir.LlamaBidirectionalForSequenceClassification,
        LambdaLoss=theirs.losses.LambdaLoss,
        args=arguments(package.CrossEncoderTrainingArguments, "out", max_steps=1),
        train_dataset=Dataset.from_list(rows),
        evaluator=None,
        tokenizer=tokenizer,
    )
    before = [weights.clone() for weights in names["model"].parameters()]
    names["trainer"].train()
    assert any(not old.equal(new) for old, new in zip(before, names["model"].parameters(), strict=True))


@runs("mining.md", 0)
def test_mining_from_a_dense_retriever(block, folder):
    pytest.importorskip("sentence_transformers")
    make_model().model.save_pretrained("dense")
    make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained("dense")
    write_corpus(folder / "corpus.jsonl", CORPUS)
    write(folder / "rows.jsonl", lines(*({"query_id": key, "query": text} for key, text in QUERIES.items())))
    names = run(block, ("sentence-transformers/all-MiniLM-L6-v2", "dense"))
    found = read_lines_of(folder / "run.dense.trec")
    assert found.keys() == QUERIES.keys()
    cosines = names["model"].similarity(names["queries"], names["passages"])
    for row, ranked in zip(cosines, found.values(), strict=True):
        assert {doc: score for doc, _, score, _ in ranked} == pytest.approx(
            dict(zip(CORPUS, row.tolist(), strict=True))
        )


@runs("mining.md", 1)
def test_mining_in_python(block, reranker, capsys):
    # This reranker has random weights, so the margin lets all candidates pass.
    run(block, ("quickstart-output/model", "my-reranker"), ("absolute_margin=0.5", "absolute_margin=-50"))
    ranking = reranker.rank(
        "where do bees live?", ["Wasps live in nests.", "Paris is in France."], return_documents=True
    )
    assert capsys.readouterr().out == f"{[item['text'] for item in ranking]} 1\n"


@pytest.mark.slow
@runs("reranking.md", 0)
def test_ray_scores(block, reranker, request):
    request.addfinalizer(pytest.importorskip("ray").shutdown)
    write(Path("pairs.jsonl"), lines(*({"query": QUESTION, "passage": text} for text in CORPUS.values())))
    names = run(block, ("size=8", "size=1"), ("num_gpus=1", "num_cpus=1"), ("bfloat16", "float32"))
    scores = {row["passage"]: row["score"] for row in names["scored"].take_all()}
    expected = reranker.predict([(QUESTION, text) for text in CORPUS.values()])
    assert [scores[text] for text in CORPUS.values()] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.slow
@runs("serving.md", 0, 1)
def test_exports_load(block, reranker):
    pytest.importorskip(("sentence_transformers", "onnxruntime")[block.number])
    [folder] = re.findall(r"my-reranker-\w+", block.code)
    [command] = [words for page, words in COMMANDS if page == "serving.md" and "export" in words and folder in words]
    assert main(command[1:]) == 0
    pairs = [(QUESTION, text) for text in PASSAGES]
    scores = run(block)["reranker"].predict(pairs)
    assert scores.tolist() == pytest.approx(reranker.predict(pairs).tolist(), rel=1e-4)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server, and its reranker."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("served")
    reranker = save_reranker(folder / "my-reranker")
    [command] = [words[1:] for page, words in COMMANDS if (page, *words[:2]) == ("server.md", "llama-bidir", "serve")]
    command = [sys.executable, "-m", "llama_bidir", *command, "--port=0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process.stdout.readline().removeprefix("ready: http://").strip(), reranker
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("page", "count"), [("server.md", 1), ("serving.md", 2)])
def test_requests_of_curl(page, count, served):
    """The request to vLLM gets the same answer from this server."""
    [words] = [words for name, words in COMMANDS if (name, words[0]) == (page, "curl")]
    command = ["curl", "--silent", *(word.replace("localhost:8000", served[0]) for word in words[1:])]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["results"]
    sent = json.loads(words[-1])
    ranking = served[1].rank(sent["query"], sent["documents"], top_k=count)
    assert [each["index"] for each in found] == [item["corpus_id"] for item in ranking]
    assert [each["relevance_score"] for each in found] == pytest.approx([item["score"] for item in ranking], rel=1e-5)


# By number of the block: what it needs, and the passages and scores of its answer.
CLIENTS = (
    ("cohere", "[(PASSAGES[each.index], each.relevance_score) for each in answer.results]"),
    ("litellm", "[(PASSAGES[each['index']], each['relevance_score']) for each in answer.results]"),
    ("langchain_cohere", "[(each.page_content, each.metadata['relevance_score']) for each in best]"),
    ("llama_index.postprocessor.cohere_rerank", "[(each.node.text, each.score) for each in best]"),
)


@pytest.mark.slow
@runs("server.md", *range(len(CLIENTS)))
def test_clients_of_the_server(block, served, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    module, answer = CLIENTS[block.number]
    pytest.importorskip(module)
    found = eval(answer, run(block, ("localhost:8000", served[0]), PASSAGES=PASSAGES))
    ranking = served[1].rank(QUESTION, PASSAGES, top_k=len(found), return_documents=True)
    assert [text for text, _ in found] == [item["text"] for item in ranking]
    assert [score for _, score in found] == pytest.approx([item["score"] for item in ranking], rel=1e-5)
