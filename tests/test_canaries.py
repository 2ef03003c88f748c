"""
What this package leans on in transformers, peft, accelerate and torch, tested without this package.

A failure here says what changed, and which part of the package to look at.
"""

import ast
import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import make_tokenizer, names, tiny_config
from torch.utils.data import BatchSampler, IterableDataset
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import (
    AttentionMaskInterface,
    create_bidirectional_mask,
    packed_sequence_mask_function,
    sdpa_mask,
)

PACKAGE = Path(__file__).parents[1] / "llama_bidir"
LIBRARIES = ("transformers", "peft", "accelerate", "torch")
# Methods of the Trainer that CrossEncoderTrainer replaces, and those that this package calls.
REPLACED = (
    "_get_dataloader", "_get_eval_sampler", "_get_train_sampler", "_run_epoch", "_save", "_save_rng_state",
    "_set_signature_columns_if_needed", "compute_loss", "create_accelerator_and_postprocess", "create_model_card",
    "evaluate", "evaluation_loop", "get_batch_samples", "get_eval_dataloader", "get_test_dataloader", "predict",
    "prediction_step", "save_model",
)  # fmt: skip
CALLED = ("_finish_current_push", "_prepare_inputs", "init_hf_repo")
# Names that are not in the public interface of their library.
PRIVATE = {
    "torch.nn.attention.varlen.varlen_attn": "scoring/packing.py: attention on a GPU",
    "transformers.activations.ACT2FN": "scoring/forward.py: the activation of a layer",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "scoring/packing.py: input that is not packed",
    "transformers.dynamic_module_utils.get_relative_import_files": "checkpoints/files.py: code beside a checkpoint",
    "transformers.masking_utils.AttentionMaskInterface": "scoring/packing.py: the mask of packed attention",
    "transformers.masking_utils.create_bidirectional_mask": "modeling_llama_bidir.py: the mask of packed input",
    "transformers.masking_utils.packed_sequence_mask_function": "modeling_llama_bidir.py: the mask of packed input",
    "transformers.masking_utils.sdpa_mask": "scoring/packing.py: the mask of packed attention",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "modeling_llama_bidir.py: outputs",
    "transformers.modeling_outputs.SequenceClassifierOutput": "modeling_llama_bidir.py: outputs",
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS": "configuration_llama_bidir.py: the known rope types",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "scoring/forward.py: the attention of a layer",
    **{
        f"transformers.models.llama.modeling_llama.{name}": "scoring/forward.py: which layers it can replace"
        for name in ("LlamaAttention", "LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm", "LlamaRotaryEmbedding")
    },
    "transformers.models.llama.modeling_llama.LlamaPreTrainedModel": "pretrained_llama_bidir.py: the base class",
    "transformers.quantizers.auto.AutoQuantizationConfig": "checkpoints: quantized weights",
    "transformers.trainer_pt_utils.LengthGroupedSampler": "training/sampling.py: group_by_length",
    "transformers.trainer_utils.EvalLoopOutput": "training/trainer.py: evaluation",
    "transformers.utils.generic.can_return_tuple": "modeling_llama_bidir.py: return_dict=False",
    "transformers.utils.hub.cached_file": "files_llama_bidir.py: files of a folder or of the Hub",
    "transformers.utils.hub.get_checkpoint_shard_files": "weights_llama_bidir.py: the shards of a checkpoint",
    "transformers.utils.import_utils.is_peft_available": "pretrained_llama_bidir.py: whether adapters can be loaded",
    "transformers.utils.peft_utils.find_adapter_config_file": "checkpoints: whether a folder is an adapter",
}


def holds(condition, changed, leans):
    """Fails with what changed in a library, and what of this package leans on it."""
    assert condition, f"transformers {transformers.__version__}: {changed}. This package leans on it in {leans}"


def test_private_names():
    for path, leans in PRIVATE.items():
        module, _, name = path.rpartition(".")
        holds(hasattr(importlib.import_module(module), name), f"{path} is gone", leans)


def test_private_names_are_all_listed():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                root, _, rest = node.module.partition(".")
                used |= {f"{node.module}.{alias.name}" for alias in node.names if root in LIBRARIES and rest}
    public = ("torch.utils.data.", "torch.nn.functional.", "torch.distributed.", "transformers.utils.logging")
    private = {name for name in used if not name.startswith(public)}
    assert private == PRIVATE.keys(), f"PRIVATE and the package differ in {sorted(private ^ PRIVATE.keys())}"


@pytest.mark.parametrize("rows", [1, 40])
def test_products_of_int8_are_exact(rows):
    leans = "scoring/int8.py"
    holds(hasattr(torch, "_int_mm"), "torch._int_mm is gone", leans)
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (rows, 4096), generator=generator, dtype=torch.int8)
    right = torch.randint(-127, 128, (24, 4096), generator=generator, dtype=torch.int8)
    left[0], right[0] = 127, -127  # sums of pairs that overflow int16
    memory = torch.empty(rows, 24, dtype=torch.float32)
    product = torch._int_mm(left, right.t(), out=memory.view(torch.int32))
    holds(torch.equal(product.long(), left.long() @ right.long().t()), "torch._int_mm rounds", leans)
    memory.copy_(product)  # from the same memory
    holds(torch.equal(memory.double(), left.double() @ right.double().t()), "a tensor is not copied in place", leans)


@torch.no_grad()
def first_token_moves(**fields):
    """Whether the hidden state of the first token changes with the last token."""
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**tiny_config(), **fields)).eval()
    for layer in model.layers:
        layer.self_attn.is_causal = getattr(model.config, "is_causal", True)
    first, second = (model(torch.tensor([[5, 6, last]])).last_hidden_state[0, 0] for last in (7, 8))
    return not torch.equal(first, second)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_is_causal_decides_on_the_mask(attention):
    leans = "modeling_llama_bidir.py: LlamaBidirectionalModel attends in both directions"
    fields = {"attn_implementation": attention}
    holds(first_token_moves(is_causal=False, **fields), "a Llama with config.is_causal=False is causal", leans)
    holds(not first_token_moves(**fields), "a Llama without is_causal attends in both directions", leans)


def test_the_mask_of_packed_sequences():
    mask = create_bidirectional_mask(
        config=LlamaConfig(**tiny_config(), attn_implementation="sdpa"),
        inputs_embeds=torch.zeros(1, 3, 32),
        attention_mask=None,
        and_mask_function=packed_sequence_mask_function(torch.tensor([[0, 0, 1]])),
    )
    expected = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    holds(torch.equal(mask[0, 0], expected), "packed sequences see each other", "modeling_llama_bidir.py: forward")


def test_registered_attention_gets_the_keywords_of_packed_input():
    seen = {}

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs)
        return query.transpose(1, 2), None

    AttentionInterface.register("canary_attention", attention)
    AttentionMaskInterface.register("canary_attention", sdpa_mask)
    model = LlamaModel(LlamaConfig(**tiny_config(), attn_implementation="canary_attention"))
    ends = torch.tensor([0, 1, 3])
    model(torch.tensor([[5, 6, 7]]), cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=2, max_length_k=2)
    leans = "scoring/packing.py: packed_attention"
    holds(seen.get("cu_seq_lens_q") is ends, "attention functions do not get cu_seq_lens_q", leans)
    holds(seen.get("max_length_q") == 2, "attention functions do not get max_length_q", leans)


def test_the_collator_of_packed_batches_names_these_keywords():
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    expected = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "input_ids"}
    holds(expected <= batch.keys(), f"packed batches have {sorted(batch)}", "modeling_llama_bidir.py: forward")


class CanaryConfig(PreTrainedConfig):
    model_type = "canary_of_auto_classes"


def test_a_registered_class_wins_over_code_in_the_folder(tmp_path):
    AutoConfig.register(CanaryConfig.model_type, CanaryConfig, exist_ok=True)
    (tmp_path / "code.py").write_text("raise RuntimeError('this code must not run')\n")
    config = {"model_type": CanaryConfig.model_type, "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    holds(type(loaded) is CanaryConfig, "auto_map wins over a registered class", "__init__.py: no code is executed")


def test_the_attention_of_a_folder_must_exist(tmp_path):
    LlamaForSequenceClassification(LlamaConfig(**tiny_config())).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "no_such_attention"}))
    try:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    except ValueError as error:
        holds("no_such_attention" in str(error), f"the error is {error}", "checkpoints/vllm.py: ONLY_VLLM")
    else:
        holds(False, "a folder with an unknown attention loads", "checkpoints/vllm.py: ONLY_VLLM")


def test_loaded_weights_are_marked_before_the_others_are_initialized(tmp_path):
    marks = {}

    class Reader(LlamaForSequenceClassification):
        def _init_weights(self, module):
            marks.update({id(weight): getattr(weight, "_is_hf_initialized", False) for weight in module.parameters()})
            super()._init_weights(module)

    LlamaForCausalLM(LlamaConfig(**tiny_config())).save_pretrained(tmp_path)
    model = Reader.from_pretrained(tmp_path)
    leans = "modeling_llama_bidir.py: the warning of a new head"
    holds(marks.get(id(model.score.weight)) is False, "a missing weight is marked _is_hf_initialized", leans)
    loaded = [marks.get(id(weight), True) for weight in model.model.parameters()]
    holds(all(loaded), "a loaded weight is not marked _is_hf_initialized", leans)


def test_names_of_saved_files(tmp_path):
    leans = "checkpoints: what a folder held before, and its completeness"
    model = LlamaForSequenceClassification(LlamaConfig(**tiny_config()))
    model.save_pretrained(tmp_path / "one")
    holds(names(tmp_path / "one") == ["config.json", "model.safetensors"], names(tmp_path / "one"), leans)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    found = names(tmp_path / "shards")
    count = len(found) - 2
    shards = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    expected = ["config.json", *shards, "model.safetensors.index.json"]
    holds(count > 1 and found == expected, f"a sharded model is saved as {found}", leans)
    tokenizer = make_tokenizer(eos_token="<|end|>")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = names(tmp_path / "tokenizer")
    expected = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    holds(found == expected, f"a tokenizer is saved as {found}", leans)


def test_names_of_a_saved_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers.utils.peft_utils import find_adapter_config_file

    model = LlamaForSequenceClassification(LlamaConfig(**tiny_config()))
    peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    leans = "checkpoints: whether a folder is an adapter"
    holds({"adapter_config.json", "adapter_model.safetensors"} <= set(names(tmp_path)), names(tmp_path), leans)
    found = find_adapter_config_file(str(tmp_path))
    holds(found == str(tmp_path / "adapter_config.json"), f"find_adapter_config_file returns {found}", leans)
    (tmp_path / "adapter_config.json").unlink()
    holds(find_adapter_config_file(str(tmp_path)) is None, "find_adapter_config_file finds what is not there", leans)


def test_code_is_saved_with_what_it_imports(tmp_path, monkeypatch):
    from transformers.dynamic_module_utils import custom_object_save

    package = tmp_path / "canary_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text("ONE = 1\n")
    (package / "code.py").write_text("from .base import ONE\n\n\nclass Thing:\n    number = ONE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    thing = importlib.import_module("canary_package.code").Thing
    (tmp_path / "saved").mkdir()
    custom_object_save(thing(), tmp_path / "saved")
    for module in ("canary_package", "canary_package.base", "canary_package.code"):
        sys.modules.pop(module)
    found = [name for name in names(tmp_path / "saved") if name.endswith(".py")]
    leans = "modeling_llama_bidir.py: register_for_auto_class saves both model files"
    holds({"base.py", "code.py"} <= set(found), f"custom_object_save saves {found}", leans)


class Line(torch.nn.Module):
    accepts_loss_kwargs = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x - labels).square().mean()}


LINE = [{"x": float(n), "labels": 0.0} for n in range(8)]


class Recorder(Trainer):
    """Says that a step has 5 items, and records what the Trainer does with that."""

    def __init__(self, path, **fields):
        defaults = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.01, "lr_scheduler_type": "constant"}
        defaults |= {"max_grad_norm": 0, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
        super().__init__(Line(), TrainingArguments(str(path), **{**defaults, **fields}), train_dataset=LINE)
        self.items, self.steps, self.states = [], [], []

    def get_batch_samples(self, *args):
        return super().get_batch_samples(*args)[0], 5

    def compute_loss(self, *args, num_items_in_batch=None, **kwargs):
        self.items.append(num_items_in_batch)
        self.steps.append(self.current_gradient_accumulation_steps)
        return super().compute_loss(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        self.states.append((Path(output_dir) / "trainer_state.json").exists())
        super()._save_rng_state(output_dir)


def test_the_trainer_divides_the_loss_by_the_accumulated_batches(tmp_path):
    pytest.importorskip("accelerate")
    leans = "training/trainer.py: compute_loss weighs the batches of a step"
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = Recorder(tmp_path, **fields)
        holds(trainer.model_accepts_loss_kwargs is False, "accepts_loss_kwargs of a model is not read", leans)
        trainer.train()
        weights.append(trainer.model.weight.item())
        holds(trainer.items == [5] * accumulation, f"compute_loss gets num_items_in_batch {trainer.items}", leans)
        holds(trainer.steps == [accumulation] * accumulation, f"accumulated batches are {trainer.steps}", leans)
    # The gradient at weight 1 is 2 * mean(x^2) = 2 * 140 / 8 = 35.
    holds(weights == pytest.approx([1 - 0.35] * 2, abs=1e-6), f"the weights after a step are {weights}", leans)


def test_the_state_that_completes_a_checkpoint_is_written_last(tmp_path):
    pytest.importorskip("accelerate")
    trainer = Recorder(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    leans = "training/checkpoints.py: last_whole_checkpoint"
    holds(trainer.states == [False], "trainer_state.json is not the last file of a checkpoint", leans)
    holds((tmp_path / "checkpoint-1" / "trainer_state.json").exists(), "a checkpoint has no trainer_state.json", leans)


def test_methods_of_the_trainer():
    pytest.importorskip("accelerate")
    from llama_bidir import CrossEncoderTrainer

    leans = "training/trainer.py"
    for name in (*REPLACED, *CALLED):
        holds(hasattr(Trainer, name), f"Trainer.{name} is gone", leans)
    for name in REPLACED:
        methods = getattr(CrossEncoderTrainer, name), getattr(Trainer, name)
        ours, theirs = (inspect.signature(method).parameters for method in methods)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values()):
            changed = f"Trainer.{name} takes {list(theirs)}"
            holds(list(ours) == list(theirs), changed, f"{leans}, where it takes {list(ours)}")


def test_full_batches_are_dealt_to_the_processes_in_turn():
    data_loader = pytest.importorskip("accelerate.data_loader")
    leans = "training/steps.py: stand-ins fill the last batches, so nothing is repeated"
    batches = BatchSampler(range(8), batch_size=2, drop_last=False)
    shards = [list(data_loader.BatchSamplerShard(batches, 2, index)) for index in (0, 1)]
    holds(shards == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]], f"accelerate deals {shards}", leans)

    class Numbers(IterableDataset):
        def __iter__(self):
            return iter(range(8))

    shards = [
        list(data_loader.IterableDatasetShard(Numbers(), batch_size=2, num_processes=2, process_index=index))
        for index in (0, 1)
    ]
    holds(shards == [[0, 1, 4, 5], [2, 3, 6, 7]], f"accelerate deals a stream as {shards}", leans)
