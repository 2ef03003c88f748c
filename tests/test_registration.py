import json
import pickle
import subprocess
import sys

import pytest
from helpers import tiny_config

from llama_bidir import LlamaBidirectionalConfig


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_is_light():
    modules = run(
        "import json, sys, transformers, llama_bidir;"
        "print(json.dumps([name for name in ('torch', 'datasets', 'accelerate', 'peft', 'huggingface_hub.hf_api')"
        " if name in sys.modules]))"
    )
    assert "torch" not in modules
    assert not {"datasets", "accelerate", "peft"} & set(modules)


@pytest.mark.parametrize(
    "imports",
    [
        "import llama_bidir; from transformers import AutoConfig, AutoModelForSequenceClassification",
        "from transformers import AutoConfig, AutoModelForSequenceClassification; import llama_bidir",
        "import transformers, llama_bidir; from transformers import AutoConfig, AutoModelForSequenceClassification",
        "import llama_bidir, importlib, transformers; importlib.reload(llama_bidir);"
        "from transformers import AutoConfig, AutoModelForSequenceClassification",
        "from transformers import AutoConfig, AutoModelForSequenceClassification;"
        "from llama_bidir.configuration_llama_bidir import LlamaBidirectionalConfig; import llama_bidir",
        "import llama_bidir, importlib.util; importlib.util.find_spec('transformers.models.auto.configuration_auto');"
        "from transformers import AutoConfig, AutoModelForSequenceClassification",
        "import llama_bidir, importlib, transformers.models.auto.configuration_auto as auto; importlib.reload(auto);"
        "from transformers import AutoConfig, AutoModelForSequenceClassification",
        "import llama_bidir, transformers.models.bert.modeling_bert;"
        "from transformers import AutoConfig, AutoModelForSequenceClassification",
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


def test_config_alone_selects_the_model(base_checkpoint):
    name = run(
        "import json, llama_bidir\n"
        "from llama_bidir import LlamaBidirectionalConfig\n"
        "from transformers import AutoModelForSequenceClassification\n"
        f"config = LlamaBidirectionalConfig.from_pretrained({str(base_checkpoint)!r})\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(base_checkpoint)!r}, config=config)\n"
        "print(json.dumps(type(model).__name__))"
    )
    assert name == "LlamaBidirectionalForSequenceClassification"


def test_config_module_alone_brings_the_model(base_checkpoint):
    names = run(
        "import json\n"
        "from transformers import AutoModel\n"
        "from llama_bidir.configuration_llama_bidir import LlamaBidirectionalConfig\n"
        f"config = LlamaBidirectionalConfig.from_pretrained({str(base_checkpoint)!r})\n"
        "print(json.dumps(type(AutoModel.from_config(config)).__name__))"
    )
    assert names == "LlamaBidirectionalModel"


def test_config_mapping_holds_the_class_itself():
    facts = run(
        "import json, pickle, llama_bidir\n"
        "from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, LlamaConfig\n"
        "cls = CONFIG_MAPPING['llama_bidirec']\n"
        "same = pickle.loads(pickle.dumps(cls)) is cls and isinstance(cls(), cls) and issubclass(cls, LlamaConfig)\n"
        "count = list(CONFIG_MAPPING.keys()).count('llama_bidirec')\n"
        "print(json.dumps([same, count, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[cls].__name__]))"
    )
    assert facts == [True, 1, "LlamaBidirectionalForSequenceClassification"]


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


def test_auto_config_makes_one_for_the_model_type():
    fields = run(
        "import json, llama_bidir\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.for_model('llama_bidirec', pooling='cls')\n"
        "print(json.dumps([config.pooling, config.model_type]))"
    )
    assert fields == ["cls", "llama_bidirec"]


def test_unknown_attributes_are_attribute_errors():
    import llama_bidir

    with pytest.raises(AttributeError, match="module 'llama_bidir' has no attribute 'CrossEncodr'"):
        _ = llama_bidir.CrossEncodr
