import json
import pickle
import subprocess
import sys

import pytest
from helpers import tiny_config

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def packages_after(imports):
    return set(
        run(f"{imports}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))")
    )


def test_import_brings_what_transformers_brings_and_nothing_else():
    of_transformers = packages_after(
        "from transformers import AutoModel, AutoModelForSequenceClassification, LlamaModel"
    )
    assert packages_after("import llama_bidir") - of_transformers == {"llama_bidir"}


@pytest.mark.parametrize(
    "imports",
    [
        "import llama_bidir; from transformers import AutoConfig, AutoModelForSequenceClassification",
        "from transformers import AutoConfig, AutoModelForSequenceClassification; import llama_bidir",
        "import llama_bidir, importlib, transformers; importlib.reload(llama_bidir);"
        "from transformers import AutoConfig, AutoModelForSequenceClassification",
        "from transformers import AutoConfig, AutoModelForSequenceClassification;"
        "from llama_bidir.configuration_llama_bidir import LlamaBidirectionalConfig; import llama_bidir",
    ],
)
def test_auto_classes_know_the_model_in_any_import_order(imports, reranker_checkpoint):
    names = run(
        f"{imports}\nimport json\n"
        f"config = AutoConfig.from_pretrained({str(reranker_checkpoint)!r})\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(reranker_checkpoint)!r})\n"
        "print(json.dumps([type(config).__qualname__, type(config).__module__, type(model).__qualname__]))"
    )
    assert names == [
        "LlamaBidirectionalConfig",
        "llama_bidir.configuration_llama_bidir",
        "LlamaBidirectionalForSequenceClassification",
    ]


def test_config_module_alone_brings_the_model(base_checkpoint):
    names = run(
        "import json\n"
        "from transformers import AutoModel\n"
        "from llama_bidir.configuration_llama_bidir import LlamaBidirectionalConfig\n"
        f"config = LlamaBidirectionalConfig.from_pretrained({str(base_checkpoint)!r})\n"
        "print(json.dumps(type(AutoModel.from_config(config)).__name__))"
    )
    assert names == "LlamaBidirectionalModel"


def test_config_alone_selects_the_model(base_checkpoint):
    facts = run(
        "import json, pickle, llama_bidir\n"
        "from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, LlamaConfig\n"
        "from transformers import AutoConfig, AutoModelForSequenceClassification\n"
        "cls = CONFIG_MAPPING['llama_bidirec']\n"
        "same = pickle.loads(pickle.dumps(cls)) is cls and isinstance(cls(), cls) and issubclass(cls, LlamaConfig)\n"
        "count = list(CONFIG_MAPPING.keys()).count('llama_bidirec')\n"
        "made = AutoConfig.for_model('llama_bidirec', pooling='cls')\n"
        f"config = llama_bidir.LlamaBidirectionalConfig.from_pretrained({str(base_checkpoint)!r})\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(base_checkpoint)!r}, config=config)\n"
        "names = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[cls].__name__, type(model).__name__]\n"
        "print(json.dumps([same, count, made.pooling, made.model_type, *names]))"
    )
    assert facts == [True, 1, "cls", "llama_bidirec", *["LlamaBidirectionalForSequenceClassification"] * 2]


def test_a_pickled_config_finds_its_model_in_a_new_process(tmp_path):
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(LlamaBidirectionalConfig(**tiny_config())))
    name = run(
        "import json, pickle\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f"config = pickle.loads(open({str(path)!r}, 'rb').read())\n"
        "print(json.dumps(type(AutoModelForSequenceClassification.from_config(config)).__name__))"
    )
    assert name == "LlamaBidirectionalForSequenceClassification"


def test_unknown_attributes_are_attribute_errors():
    import llama_bidir

    with pytest.raises(AttributeError, match="module 'llama_bidir' has no attribute 'CrossEncodr'"):
        _ = llama_bidir.CrossEncodr


OTHERS = """
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaModel


class OtherConfig(LlamaConfig):
    model_type = "llama_bidirec"


class OtherModel(LlamaModel):
    config_class = OtherConfig


def register(**options):
    AutoConfig.register("llama_bidirec", OtherConfig, **options)
    AutoModelForSequenceClassification.register(OtherConfig, OtherModel, **options)

"""
SCORE = """
import json
from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
path = {path!r}
config = LlamaBidirectionalConfig.from_pretrained(path)
by_auto = AutoModelForSequenceClassification.from_pretrained(path, config=config)
reranker = CrossEncoder(path, device="cpu", dtype="float32")
scores = [
    reranker.predict(("a", "b")).item(),
    CrossEncoder(by_auto, AutoTokenizer.from_pretrained(path), device="cpu").predict(("a", "b")).item(),
]
print(json.dumps([type(AutoConfig.from_pretrained(path)).__name__, *scores]))
"""


@pytest.mark.parametrize(
    ("order", "known"),
    [
        ("register()\nimport llama_bidir", "LlamaBidirectionalConfig"),
        ("import llama_bidir\nregister()", "OtherConfig"),
        ("import llama_bidir\nregister(exist_ok=True)", "OtherConfig"),
    ],
)
def test_others_may_register_the_same_model_type(order, known, reranker_checkpoint):
    name, *scores = run(OTHERS + order + SCORE.format(path=str(reranker_checkpoint)))
    assert name == known
    assert scores[0] == scores[1] == CrossEncoder(reranker_checkpoint, device="cpu").predict(("a", "b")).item()
