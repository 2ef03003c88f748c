"""Hostile and broken checkpoints: each is refused with one error that names the file and the field, or loads whole."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from broken import (
    LFS_POINTER,
    MARK,
    TOO_DEEP,
    armed,
    code,
    config,
    cut,
    linked,
    pickled,
    put,
    rope,
    shards,
    tokenizer_config,
    without,
)
from helpers import PAIRS, write_collection
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.cli import main

POINTER = r"' is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
DEEP = r"' is nested too deep to be read: get the file again"
KERNEL = "kernels-community/flash-attn2"
REFUSED = "is refused in a checkpoint, because transformers may fetch the code of an attention and run it: pass "

# What is wrong, how it is made, and the pattern of the message. Every message also holds the name of the folder.
CONFIGURATIONS = [
    ("a kernel of the Hub", config(attn_implementation=KERNEL), f"attn_implementation '{KERNEL}' {REFUSED}"),
    ("the same, private", config(_attn_implementation=KERNEL), f"_attn_implementation '{KERNEL}' {REFUSED}"),
    ("a revision of a kernel", config(attn_implementation="a/b@c:d"), f"'a/b@c:d' {REFUSED}"),
    ("a paged kernel", config(attn_implementation="paged|a/b"), f"'paged|a/b' {REFUSED}"),
    ("a mapping of kernels", config(attn_implementation={"": "a/b"}), f"{{'': 'a/b'}} {REFUSED}"),
    ("a number as attention", config(attn_implementation=5), f"attn_implementation 5 {REFUSED}"),
    ("a kernel of experts", config(experts_implementation="a/b"), f"experts_implementation 'a/b' {REFUSED}"),
    ("fused layers", config(fusion_config={"x": True}), "fusion_config is refused in a checkpoint"),
    ("layers of their own", config(per_layer_config={"0": {"hidden_size": 3}}), "per_layer_config is refused"),
    ("other weights", config(transformers_weights="../x.safetensors"), "transformers_weights is refused"),
    ("pickled weights by name", config(transformers_weights="adapter_model.bin"), "transformers_weights is refused"),
    ("a method as a field", config(to_dict="x"), "to_dict is not a field of a configuration"),
    ("a method that checks", config(validate="x"), "validate is not a field of a configuration"),
    ("the fields of the object", config(__dict__={}), "__dict__ is not a field of a configuration"),
    ("an unknown rope_type", rope(rope_type="foo"), "rope_parameters: rope_type must be one of default, linear, "),
    ("the older name", config(rope_scaling={"type": "foo"}), "rope_scaling cannot be used: .* rope_type must be one"),
    ("half a llama3", rope(rope_type="llama3", factor=8.0), "rope_type 'llama3' needs low_freq_factor"),
    ("a factor of 0", rope(rope_type="linear", factor=0), "rope_type 'linear' needs factor to be above 0, got 0"),
    ("a factor in words", rope(rope_type="linear", factor="two"), "needs factor to be above 0, got 'two'"),
    ("no base", rope(rope_theta=None), "needs rope_theta to be above 0, got None"),
    ("a list of rope", config(rope_parameters=[1]), r"rope_parameters must be a mapping with a rope_type, got \[1\]"),
    ("an unknown activation", config(hidden_act="foo"), "hidden_act must name an activation .* got 'foo'"),
    ("an activation in numbers", config(hidden_act=5), "hidden_act must name an activation .* got 5"),
    ("an unknown dtype", config(dtype="foo"), "dtype must be 'float32', 'bfloat16', 'float16' or None, got 'foo'"),
    ("a function as dtype", config(dtype="load"), "dtype must be .* got 'load'"),
    ("an integer dtype", config(dtype="int8"), "dtype must be .* got 'int8'"),
    ("a dtype of 8 bits", config(dtype="float8_e4m3fn"), "dtype must be .* got 'float8_e4m3fn'"),
    ("auto", config(dtype="auto"), "dtype must be .* got 'auto'"),
    ("a size in words", config(hidden_size="x"), "hidden_size.* got "),
    ("no size", config(hidden_size=None), "hidden_size.* got None"),
    ("a broken size", config(num_hidden_layers=1.5), "num_hidden_layers.* got "),
    ("labels in words", config(id2label={"x": "y"}), "id2label cannot be used: ValueError: invalid literal"),
    ("labels in a list", config(id2label=["x"]), "id2label"),
    ("a pad token beyond", config(pad_token_id=10**6), r"pad_token_id must be below vocab_size \(320\), got 1000000"),
    ("an unknown layer", config(layer_types=["foo"]), "layer_types"),
    ("quantized by a list", config(quantization_config=[1]), r"quantization_config must be a mapping, got \[1\]"),
    ("deep but readable", config(x=[[[]]] * 2 + [eval("[" * 60 + "]" * 60)]), "is nested deeper than 50 levels"),
]
FILES = [
    ("a list", put("config.json", "[]"), r"config\.json' must hold a JSON object, got list"),
    ("a list of something", put("config.json", "[1]"), r"config\.json' must hold a JSON object, got list"),
    ("a number", put("config.json", "5"), r"config\.json' must hold a JSON object, got int"),
    ("null", put("config.json", "null"), r"config\.json' must hold a JSON object, got NoneType"),
    ("empty", put("config.json", ""), r"config\.json' is not a JSON file in UTF-8: Expecting value"),
    ("no UTF-8", put("config.json", b"\xff\xfe{}"), r"config\.json' is not a JSON file in UTF-8: 'utf-8' codec"),
    ("a pointer", put("config.json", LFS_POINTER), rf"config\.json{POINTER}"),
    ("nested", put("config.json", TOO_DEEP), rf"config\.json{DEEP}"),
    ("names of files", config(configuration_files=5), r"config\.json cannot be used: TypeError"),
    ("weights: a pointer", put("model.safetensors", LFS_POINTER), rf"model\.safetensors{POINTER}"),
    (
        "weights: cut",
        cut("model.safetensors", 100),
        r"model\.safetensors' is not a whole safetensors file: .*incomplete",
    ),
    ("weights: empty", put("model.safetensors", b""), r"model\.safetensors' is not a whole .*header too small"),
    ("weights: noise", put("model.safetensors", b"x" * 99), r"model\.safetensors' is not a whole .*header too large"),
    ("weights: none", without("model.safetensors"), "model.safetensors"),
    (
        "index: above",
        shards("../outside/a.safetensors"),
        "names a file outside of its folder.*'../outside/a.safetensors'",
    ),
    (
        "index: absolute",
        shards("{outside}/a.safetensors"),
        "names a file outside of its folder.*outside/a.safetensors'",
    ),
    ("index: down and up", shards("x/../../outside/a.safetensors"), "names a file outside of its folder"),
    (
        "index: a pickle",
        shards("a.bin"),
        r"model\.safetensors\.index\.json' must name \.safetensors files, got 'a\.bin'",
    ),
    ("pickled", pickled, r"holds its weights as a pickle \(pytorch_model\.bin\).*pass use_safetensors=False"),
    (
        "pickled shards",
        shards("a.bin", "pytorch_model.bin.index.json"),
        r"as a pickle \(pytorch_model\.bin\.index\.json\)",
    ),
    ("armed", armed("pytorch_model.bin"), r"holds its weights as a pickle \(pytorch_model\.bin\)"),
]
NO_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILES += [
    ("index: nested", without(NO_WEIGHTS, then=put(INDEX, TOO_DEEP)), rf"{INDEX}{DEEP}"),
    ("index: a list", without(NO_WEIGHTS, then=put(INDEX, "[]")), f"{INDEX}' must hold a JSON object, got list"),
    ("index: a pointer", without(NO_WEIGHTS, then=put(INDEX, LFS_POINTER)), f"{INDEX}{POINTER}"),
    ("index: half", without(NO_WEIGHTS, then=put(INDEX, '{"weight_map": {}}')), "must hold the objects weight_map and"),
    (
        "index: numbers",
        without(NO_WEIGHTS, then=put(INDEX, '{"metadata": {}, "weight_map": {"a": 5}}')),
        "must name .safetensors files, got 5",
    ),
    (
        "index: nothing there",
        without(NO_WEIGHTS, then=put(INDEX, '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')),
        r"b\.safetensors",
    ),
]
TOKENIZERS = [
    ("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer .*: pass one, such as "),
    ("settings alone", without("tokenizer.json"), "holds no tokenizer "),
    (
        "a Llama's settings alone",
        without("tokenizer.json", then=tokenizer_config(tokenizer_class="LlamaTokenizer")),
        "holds no tokenizer ",
    ),
    ("a pointer", put("tokenizer.json", LFS_POINTER), rf"tokenizer\.json{POINTER}"),
    ("nested", put("tokenizer.json", TOO_DEEP), rf"tokenizer\.json{DEEP}"),
    ("a list", put("tokenizer.json", "[]"), r"tokenizer\.json' must hold a JSON object, got list"),
    ("nothing", put("tokenizer.json", "{}"), "the tokenizer of .* cannot be read: .* Correct tokenizer.json or "),
    ("empty", put("tokenizer.json", ""), r"tokenizer\.json' is not a JSON file in UTF-8"),
    ("no UTF-8", put("tokenizer.json", b"\xff"), r"tokenizer\.json' is not a JSON file in UTF-8"),
    ("settings: a pointer", put("tokenizer_config.json", LFS_POINTER), rf"tokenizer_config\.json{POINTER}"),
    ("settings: nested", put("tokenizer_config.json", TOO_DEEP), rf"tokenizer_config\.json{DEEP}"),
    (
        "settings: a list",
        put("tokenizer_config.json", "[]"),
        r"tokenizer_config\.json' must hold a JSON object, got list",
    ),
    (
        "settings: no UTF-8",
        put("tokenizer_config.json", b"\xff"),
        r"tokenizer_config\.json' is not a JSON file in UTF-8",
    ),
    ("added: a pointer", put("added_tokens.json", LFS_POINTER), rf"added_tokens\.json{POINTER}"),
    ("special: nested", put("special_tokens_map.json", TOO_DEEP), rf"special_tokens_map\.json{DEEP}"),
    ("a class in numbers", tokenizer_config(tokenizer_class=5), "the tokenizer of .* cannot be read: AttributeError"),
    (
        "a class of another kind",
        tokenizer_config(tokenizer_class="BertTokenizer"),
        "the tokenizer of .* cannot be read",
    ),
    ("a side", tokenizer_config(padding_side="x"), "the tokenizer of .* cannot be read: ValueError: Padding side"),
    ("a token in numbers", tokenizer_config(pad_token=5), "the tokenizer of .* cannot be read: TypeError"),
    ("a length in words", tokenizer_config(model_max_length="x"), "the tokenizer of .* cannot be read: TypeError"),
    (
        "code alone",
        without("tokenizer.json", then=code({"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")),
        "holds no tokenizer ",
    ),
    (
        "code and a vocabulary",
        without(
            "tokenizer.json",
            then=lambda folder: [
                put("vocab.txt", "a\nb\n")(folder),
                code({"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")(folder),
            ],
        ),
        r"consists of code \(auto_map .*\), which is not run, and there is no tokenizer\.json",
    ),
    ("modules: nested", put("modules.json", TOO_DEEP), rf"modules\.json{DEEP}"),
    ("modules: no list", put("modules.json", "{}"), r"modules\.json' must hold a JSON array, got dict"),
    (
        "modules: numbers",
        put("modules.json", "[5]"),
        r"modules\.json' must list modules with a type and a path .* got 5",
    ),
    (
        "modules: above",
        put("modules.json", '[{"path": "../outside", "type": "Dense"}]'),
        r"modules\.json' must list modules with a type and a path in its folder, got .*outside",
    ),
]
ADAPTERS = [
    ("nested", put("adapter_config.json", TOO_DEEP), rf"adapter_config\.json{DEEP}"),
    ("a list", put("adapter_config.json", "[]"), r"adapter_config\.json' must hold a JSON object, got list"),
    ("a pointer", put("adapter_config.json", LFS_POINTER), rf"adapter_config\.json{POINTER}"),
    ("nothing", put("adapter_config.json", "{}"), "peft_type must be one of .*, got None"),
    ("an unknown type", put("adapter_config.json", '{"peft_type": "FOO"}'), "peft_type must be one of .*, got 'FOO'"),
    ("no base", put("adapter_config.json", '{"peft_type": "LORA"}'), "is an adapter that does not name its base model"),
    (
        "a base that is gone",
        lambda folder: [
            put("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "/no/such/base"}')(folder),
            (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
        ],
        "is an adapter, and the folder '/no/such/base' of its base model does not exist here",
    ),
    (
        "a module to import",
        put(
            "adapter_config.json",
            '{"peft_type": "LORA", "base_model_name_or_path": "x", "megatron_config": {}}',
        ),
        "megatron_config imports the module megatron_core, which is refused",
    ),
    (
        "armed",
        lambda folder: [
            put("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x"}')(folder),
            armed("adapter_model.bin")(folder),
        ],
        r"holds its weights as a pickle \(adapter_model\.bin\)",
    ),
    (
        "cut weights",
        lambda folder: [
            put("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x"}')(folder),
            put("adapter_model.safetensors", b"x" * 99)(folder),
        ],
        r"adapter_model\.safetensors' is not a whole safetensors file",
    ),
]
# Read by transformers before the configuration class is known.
BEFORE_OUR_CLASSES = {"a list", "a list of something", "a number", "null", "empty", "no UTF-8", "a pointer", "nested"}
BEFORE_OUR_CLASSES |= {"names of files"}


def ids(cases):
    return [name for name, _, _ in cases]


@pytest.fixture
def broken(reranker_checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(reranker_checkpoint, folder)
    yield folder
    assert not (tmp_path / MARK).exists(), "code of the checkpoint ran"


def refusal(folder, pattern, load):
    with pytest.raises((ValueError, OSError), match=pattern) as error_info:
        load()
    message = str(error_info.value)
    assert str(folder) in message or "/no/such/base" in message
    return error_info.value


@pytest.mark.parametrize(("_", "spoil", "pattern"), CONFIGURATIONS, ids=ids(CONFIGURATIONS))
def test_a_field_of_the_configuration_is_named(_, spoil, pattern, broken):
    spoil(broken)
    for load in (
        CrossEncoder,
        LlamaBidirectionalConfig.from_pretrained,
        LlamaBidirectionalForSequenceClassification.from_pretrained,
        AutoConfig.from_pretrained,
        AutoModel.from_pretrained,
        AutoModelForSequenceClassification.from_pretrained,
    ):
        error = refusal(broken, pattern, lambda load=load: load(broken))
        assert isinstance(error, ValueError)
        assert "config.json" in str(error)


@pytest.mark.parametrize(("name", "spoil", "pattern"), FILES, ids=ids(FILES))
def test_a_file_of_the_model_is_named(name, spoil, pattern, broken):
    spoil(broken)
    loaders = [CrossEncoder, LlamaBidirectionalForSequenceClassification.from_pretrained]
    if name not in BEFORE_OUR_CLASSES:
        loaders += [AutoModel.from_pretrained, AutoModelForSequenceClassification.from_pretrained]
    for load in loaders:
        refusal(broken, pattern, lambda load=load: load(broken))


@pytest.mark.parametrize(("_", "spoil", "pattern"), TOKENIZERS, ids=ids(TOKENIZERS))
def test_a_file_of_the_tokenizer_or_a_module_is_named(_, spoil, pattern, broken):
    spoil(broken)
    refusal(broken, pattern, lambda: CrossEncoder(broken))


@pytest.mark.parametrize(("_", "spoil", "pattern"), ADAPTERS, ids=ids(ADAPTERS))
def test_a_file_of_an_adapter_is_named(_, spoil, pattern, broken):
    pytest.importorskip("peft")
    spoil(broken)
    refusal(broken, pattern, lambda: CrossEncoder(broken))


def test_an_adapter_does_not_name_itself_as_its_base(broken):
    pytest.importorskip("peft")
    put("adapter_config.json", f'{{"peft_type": "LORA", "base_model_name_or_path": "{broken}"}}')(broken)
    refusal(broken, "base_model_name_or_path names the adapter itself", lambda: CrossEncoder(broken))


@pytest.mark.parametrize(
    "spoil",
    [
        linked,
        shards("a.safetensors"),
        shards("inside/a.safetensors"),
        config(attn_implementation="flash_attention_2"),
        config(_attn_implementation_internal=KERNEL),
        config(architectures=["x"], name_or_path=5),
        put("generation_config.json", TOO_DEEP),
        put("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        tokenizer_config(tokenizer_class="os.system"),
        code({"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X"),
        code({"AutoTokenizer": [None, "tokenization_x.X"]}, tokenizer_class="X"),
        code(["tokenization_x.X", None]),
        code("tokenization_x.X"),
    ],
)
def test_what_does_no_harm_loads_with_the_same_scores(spoil, broken, reranker_checkpoint):
    spoil(broken)
    expected = CrossEncoder(reranker_checkpoint).predict(PAIRS)
    np.testing.assert_array_equal(CrossEncoder(broken).predict(PAIRS), expected)


def test_the_attention_that_the_caller_passes_counts(broken):
    for field in ("attn_implementation", "_attn_implementation"):
        config(**{field: KERNEL})(broken)
        for load in (AutoModelForSequenceClassification, LlamaBidirectionalForSequenceClassification):
            assert load.from_pretrained(broken, attn_implementation="eager").config._attn_implementation == "eager"
        config(**{field: None})(broken)


def test_code_of_a_tokenizer_does_not_run_for_whoever_asks(broken, caplog, tmp_path):
    code({"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")(broken)
    reranker = CrossEncoder(broken, tokenizer_kwargs={"trust_remote_code": True})
    assert "trust_remote_code is ignored, because code from a checkpoint never runs" in caplog.text
    assert "is not run; tokenizer.json is read directly" in caplog.text
    reranker.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_pickled_weights_are_read_by_the_safe_loader_when_asked(broken, reranker_checkpoint):
    pickled(broken)
    expected = CrossEncoder(reranker_checkpoint).predict(PAIRS)
    asked = {"use_safetensors": False}
    np.testing.assert_array_equal(CrossEncoder(broken, model_kwargs=asked).predict(PAIRS), expected)
    model = AutoModelForSequenceClassification.from_pretrained(broken, **asked)
    reranker = CrossEncoder(model, CrossEncoder(reranker_checkpoint).tokenizer)
    np.testing.assert_array_equal(reranker.predict(PAIRS), expected)
    with pytest.raises(ValueError, match="weights_only=False could run code from the weights file"):
        CrossEncoder(broken, model_kwargs={**asked, "weights_only": False})


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (armed("pytorch_model.bin"), r"pytorch_model\.bin' is refused by torch's safe loader, .*\(UnpicklingError\)"),
        (without(NO_WEIGHTS, then=put("pytorch_model.bin", b"x" * 99)), r"pytorch_model\.bin' is refused by torch's"),
        (without(NO_WEIGHTS, then=put("pytorch_model.bin", LFS_POINTER)), rf"pytorch_model\.bin{POINTER}"),
        (shards("../outside/a.bin", "pytorch_model.bin.index.json"), "names a file outside of its folder"),
    ],
)
def test_no_code_of_pickled_weights_runs_when_asked(spoil, pattern, broken):
    spoil(broken)
    for load in (LlamaBidirectionalForSequenceClassification, AutoModel, AutoModelForSequenceClassification):
        refusal(broken, pattern, lambda load=load: load.from_pretrained(broken, use_safetensors=False))
    refusal(broken, pattern, lambda: CrossEncoder(broken, model_kwargs={"use_safetensors": False}))


def test_the_armed_file_really_runs_code(tmp_path):
    (tmp_path / "folder").mkdir()
    armed("weights.bin")(tmp_path / "folder")
    torch.load(tmp_path / "folder" / "weights.bin", weights_only=False)
    assert (tmp_path / MARK).is_dir()


@pytest.mark.parametrize("location", ["../outside.bin", "{folder}/outside.bin"])
def test_a_graph_does_not_read_weights_outside_of_its_folder(location, graph_folder):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(graph_folder / "model.onnx")
    axis = graph.graph.initializer[0]
    (graph_folder.parent / "outside.bin").write_bytes(axis.raw_data or b"\1\0\0\0\0\0\0\0")
    axis.ClearField("raw_data")
    axis.ClearField("int64_data")
    axis.data_location = onnx.TensorProto.EXTERNAL
    entry = axis.external_data.add()
    entry.key, entry.value = "location", location.format(folder=graph_folder.parent)
    (graph_folder / "model.onnx").write_bytes(graph.SerializeToString())
    refusal(
        graph_folder,
        r"model\.onnx' cannot be loaded by onnxruntime: ",
        lambda: CrossEncoder(graph_folder, backend="onnx"),
    )
    put("model.onnx", LFS_POINTER)(graph_folder)
    refusal(graph_folder, rf"model\.onnx{POINTER}", lambda: CrossEncoder(graph_folder, backend="onnx"))


@pytest.mark.parametrize("verb", ["rerank", "export", "train", "merge"])
@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (config(attn_implementation=KERNEL), REFUSED),
        (put("config.json", TOO_DEEP), DEEP),
        (put("model.safetensors", LFS_POINTER), POINTER),
        (pickled, "holds its weights as a pickle"),
        (put("adapter_config.json", "[]"), "must hold a JSON object, got list"),
    ],
)
def test_the_command_line_says_it_in_one_line(verb, spoil, pattern, broken, capsys):
    spoil(broken)
    is_adapter = (broken / "adapter_config.json").exists()
    if is_adapter != (verb == "merge"):
        pytest.skip("merge takes adapters, the others take checkpoints here")
    files, output, rows = (
        write_collection(broken.parent, num_queries=5),
        broken.parent / "out",
        broken.parent / "rows.jsonl",
    )
    rows.write_text('{"query": "q", "pos_doc": ["p"], "neg_doc": ["n"]}\n')
    collection = f"--corpus {files.corpus} --queries {files.queries} --run {files.run}"
    arguments = {
        "rerank": f"--model {broken} {collection} --output {output}",
        "export": f"--model {broken} --format hub --output {output}",
        "train": f"quickstart --model-name-or-path {broken} --train {rows} --output-dir {output}",
        "merge": f"--adapter {broken} --output {output}",
    }[verb]
    assert main([verb, *arguments.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("llama-bidir: error: ")
    assert re.search(pattern, error)
    assert not (broken.parent / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (config(attn_implementation=KERNEL), REFUSED),
        (put("tokenizer.json", LFS_POINTER), POINTER),
        (pickled, "a pickle"),
    ],
)
def test_training_and_export_refuse_the_same(spoil, pattern, broken, tmp_path):
    pytest.importorskip("accelerate")
    from llama_bidir.training import CrossEncoderTrainingArguments, DataArguments, ModelArguments, train

    put("rows.jsonl", '{"query": "q", "pos_doc": ["p"], "neg_doc": ["n"]}\n')(tmp_path)
    spoil(broken)
    refusal(
        broken,
        pattern,
        lambda: train(
            ModelArguments(model_name_or_path=str(broken)),
            DataArguments(train=[str(tmp_path / "rows.jsonl")], group_size=2),
            CrossEncoderTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"),
        ),
    )
    refusal(broken, pattern, lambda: export_reranker(broken, tmp_path / "exported", format="hub"))


def test_a_question_never_waits_on_the_terminal(broken):
    code({"AutoTokenizer": ["tokenization_x.X", None]}, tokenizer_class="X")(broken)
    program = f"from llama_bidir import CrossEncoder; print(CrossEncoder({str(broken)!r}).predict(('q', 'p')))"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out = process.stdout.read()  # standard input stays open, so a question would wait
        assert process.wait() == 0, process.stderr.read()
    assert re.fullmatch(r"-?\d\.\d+\n", out)
