import logging
import re

import pytest

pytest.importorskip("accelerate")

import torch
from transformers import HfArgumentParser, get_scheduler

from llama_bidir.training import CrossEncoderTrainingArguments
from llama_bidir.training.recipes import describe_recipe, list_recipes, load_recipe, parse_overrides
from llama_bidir.training.recipes.recipe import _fit_to_machine

BUNDLED = ["llama3_1_8b", "llama3_2_1b", "llama3_2_1b_lora", "quickstart"]


def load_text(text, tmp_path, overrides=None):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_bundled_recipe_with_overrides(tmp_path):
    recipe = load_recipe("quickstart", {"training": {"max_steps": 3, "output_dir": str(tmp_path)}})
    assert (recipe.training.max_steps, recipe.training.learning_rate) == (3, 2e-3)
    assert recipe.data.group_size == 8
    assert recipe.model.pooling == "avg"
    assert recipe.lora is None


def test_bundled_recipes_begin_with_their_command():
    assert list_recipes() == BUNDLED
    for name in BUNDLED:
        recipe = load_recipe(name)
        assert recipe.training.loss == "listwise_cross_entropy"
        assert recipe.training.seed == 42
    assert describe_recipe("llama3_2_1b") == (
        "Fine-tunes Llama 3.2 1B with the data and the values of NeMo AutoModel's cross-encoder recipe."
    )
    assert describe_recipe("quickstart").startswith("Fine-tunes the small Llama that the quickstart makes")


def test_reference_recipe_has_the_reference_values():
    model, data, training, lora = load_recipe("llama3_2_1b")
    assert (model.model_name_or_path, model.pooling, model.temperature, model.dtype) == (
        "meta-llama/Llama-3.2-1B",
        "avg",
        1.0,
        "bfloat16",
    )
    subsets = ("FEVER", "SyntheticClassificationData")
    assert data.train == [f"hf://nvidia/embed-nemotron-dataset-v1/{subset}" for subset in subsets]
    assert (data.group_size, data.rerank_max_length, data.positives) == (5, 512, "cycle")
    assert (data.negatives, data.short_groups) == ("first", "repeat")
    assert data.prompt_template == "question:{query} \n \n passage:{passage}"
    assert (training.global_batch_size, training.per_device_train_batch_size) == (128, 4)
    assert training.gradient_accumulation_steps * 4 * max(1, training.n_gpu) == 128
    assert (training.num_train_epochs, training.learning_rate, training.weight_decay) == (1, 3e-6, 0.01)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (training.bf16, training.max_grad_norm, training.save_steps) == (True, 1.0, 500)
    assert lora is None


def test_reference_recipe_has_the_reference_schedule():
    """NeMo AutoModel warms up from a tenth of the rate, then follows a cosine down to a hundredth of it."""
    training = load_recipe("llama3_2_1b").training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(300),
        num_training_steps=300,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    factors = []
    for _ in range(300):
        factors.append(scheduler.get_last_lr()[0] / 3e-6)
        optimizer.step()
        scheduler.step()
    assert [factors[step] for step in (0, 99, 199, 299)] == pytest.approx([0.1, 1.0, 0.505, 0.01])


def test_a_different_schedule_drops_the_keywords_of_the_first():
    training = load_recipe("llama3_2_1b", {"training": {"lr_scheduler_type": "linear"}}).training
    assert (training.lr_scheduler_type, training.lr_scheduler_kwargs) == ("linear", None)
    overrides = {"training": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}}}
    assert load_recipe("llama3_2_1b", overrides).training.lr_scheduler_kwargs == {"num_cycles": 1}


def test_one_process_runs_without_fsdp(caplog, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with caplog.at_level(logging.WARNING, logger="llama_bidir"):
        training = load_recipe("llama3_1_8b").training
    assert caplog.messages == [
        "llama3_1_8b: training.fsdp is left out: it shards weights between processes, and this is one"
    ]
    assert not training.fsdp
    assert training.gradient_checkpointing is True  # in place of the activation checkpointing of FSDP
    assert load_recipe("llama3_2_1b").training.gradient_checkpointing is False


def test_several_processes_keep_fsdp(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    training = {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}}
    _fit_to_machine(training, "recipe")
    assert training["fsdp"] is True
    assert training["fsdp_config"] == {"version": 2, "activation_checkpointing": True}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_bfloat16_without_an_accelerator_computes_on_the_cpu(tmp_path):
    training = load_recipe("llama3_2_1b").training
    assert (training.bf16, training.use_cpu, training.device.type) == (True, True, "cpu")
    assert load_text("model: {model_name_or_path: m}", tmp_path).training.use_cpu is False


@pytest.mark.parametrize(
    ("content", "strategy"),
    [
        ("", "no"),
        ("training: {eval_steps: 5}", "no"),
        ("data: {eval: [a.jsonl]}", "epoch"),
        ("data: {eval: [a.jsonl]}\ntraining: {eval_steps: 5}", "steps"),
        ("data: {eval: [a.jsonl]}\ntraining: {eval_strategy: 'no'}", "no"),
    ],
)
def test_evaluation_follows_from_eval_data(content, strategy, tmp_path):
    assert load_text(f"model: {{model_name_or_path: m}}\n{content}", tmp_path).training.eval_strategy == strategy


def test_lora_block(tmp_path):
    base = "model: {model_name_or_path: m}\n"
    assert load_text(base, tmp_path).lora is None
    assert load_text(base + "lora:", tmp_path).lora is None
    assert load_text(base + "lora: {}", tmp_path).lora == {}
    assert load_text(base + "lora: {r: '8', lora_dropout: 1e-1}", tmp_path).lora == {"r": 8, "lora_dropout": 0.1}
    assert load_text(base, tmp_path, {"lora": {"r": 4}}).lora == {"r": 4}
    assert load_recipe("llama3_2_1b_lora").lora == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
    }


def test_values_fit_their_fields(tmp_path):
    recipe = load_text(
        """
        model: {model_name_or_path: m, revision: '12', temperature: 2}
        data: {train: a.jsonl, eval: {path: b.jsonl, weight: 2}, group_size: 4.0}
        training: {learning_rate: 1e-5, max_steps: 1e3, bf16_full_eval: 'no', packing: 'true', logging_steps: '5'}
        """,
        tmp_path,
    )
    assert (recipe.model.revision, recipe.model.temperature) == ("12", 2)
    assert recipe.data.train == ["a.jsonl"]
    assert recipe.data.eval == [{"path": "b.jsonl", "weight": 2}]
    assert repr(recipe.data.group_size) == "4"  # not 4.0
    training = recipe.training
    assert (training.learning_rate, training.max_steps, training.logging_steps) == (1e-5, 1000, 5)
    assert (training.bf16_full_eval, training.packing) == (False, True)


def test_the_arguments_are_parsed_as_flags(tmp_path):
    parser = HfArgumentParser(CrossEncoderTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--loss", "ranknet", "--use_cpu"])
    assert parsed.loss == "ranknet"


def test_a_mixture_of_losses(tmp_path):
    base = "model: {model_name_or_path: m}\n"
    recipe = load_text(
        base + "training: {loss: {listwise_cross_entropy: 1, mse: 5e-1}, loss_temperature: 5e-1}", tmp_path
    )
    assert recipe.training.loss == {"listwise_cross_entropy": 1, "mse": 0.5}
    assert recipe.training.loss_temperature == 0.5
    for loss, message in (
        ("{mse: 0}", r"the weight of the loss 'mse' must be a finite number above 0, got 0"),
        ("{mse: much}", r"training: loss\.mse must be a number, got 'much'"),
        ("{ms: 1}", r"loss must be a function or one of .*, got 'ms'; the nearest is 'mse'"),
        ("{}", "a mixture of losses must name at least one of listwise_cross_entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(base + f"training: {{loss: {loss}}}", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: {}", "unknown key 'modle'; the nearest known one is 'model'"),
        (
            "training: {learning_rat: 1.0}",
            "training: unknown key 'learning_rat'; the nearest known one is 'learning_rate'",
        ),
        ("model: {poolng: avg}", "model: unknown key 'poolng'; the nearest known one is 'pooling'"),
        ("lora: {lora_alfa: 8}", "lora: unknown key 'lora_alfa'; the nearest known one is 'lora_alpha'"),
        ("model: {pooling: avg}", "model: model_name_or_path is required"),
        ("- 1", "a recipe holds the blocks model, data, training, lora, got list"),
        ("a: [", "a recipe is a YAML file: while parsing"),
        ("a: " + "[" * 2000, "a recipe is a YAML file: maximum recursion depth exceeded"),
        ("a: 2001-99-99", "a recipe is a YAML file: month must be in 1..12"),
        ("a: 0x_", "a recipe is a YAML file: invalid literal for int() with base 16: ''"),
        ("training: 5", "training must be a mapping of keys to values, got 5"),
        ("training: {learning_rate: x}", "training: learning_rate must be a number, got 'x'"),
        ("training: {learning_rate: true}", "training: learning_rate must be a number, got True"),
        ("training: {learning_rate: }", "training: learning_rate must be a number, got None"),
        ("training: {learning_rate: .nan}", "training: learning_rate must be a finite number, got nan"),
        ("training: {learning_rate: inf}", "training: learning_rate must be a finite number, got 'inf'"),
        ("training: {max_steps: 2.5}", "training: max_steps must be a whole number, got 2.5"),
        ("training: {bf16: 1}", "training: bf16 must be true or false, got 1"),
        ("training: {save_strategy: no}", "training: save_strategy must be text, got False: put it in quotes"),
        ("model: {revision: 12}", "model: revision must be text, got 12: put it in quotes"),
        ("lora: {target_modules: [q_proj, no]}", "lora: target_modules[1] must be text, got False: put it in quotes"),
        ("a: 1\n---\nb: 2", "a recipe is a YAML file: expected a single document"),
        ("training:\n\tseed: 1", "a recipe is a YAML file: while scanning for the next token found character '\\t'"),
        ("data: {train: 5}", "data: train must be a list, got 5"),
        ("lora: {r: many}", "lora: r must be a whole number, got 'many'"),
        ("training: {lr_scheduler_type: sloped}", "training: sloped is not a valid SchedulerType"),
        ("training: {global_batch_size: 6}", "training: global_batch_size must be a multiple of"),
    ],
)
def test_wrong_recipes(content, message, tmp_path):
    base = "" if content.startswith(("model", "-", "a:")) else "model: {model_name_or_path: m}\n"
    with pytest.raises(ValueError, match=re.escape(f"recipe.yaml: {message}")):
        load_text(base + content, tmp_path)


REPEATED = "is there already, in line {}; keep one of them"
BASE_8 = "is not a plain number in YAML: a leading zero makes it base 8; write a plain number, or put text in quotes"
BASE_60 = "is not a plain number in YAML: a colon makes it base 60; write a plain number, or put text in quotes"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("training:\n  seed: 1\n  max_steps: 2\n  seed: 3\n", f":5: the key 'seed' {REPEATED.format(3)}"),
        ("data: {train: a}\ntraining: {seed: 1}\ndata: {eval: b}\n", f":4: the key 'data' {REPEATED.format(2)}"),
        ("training: {seed: 1, seed: 1}\n", f":2: the key 'seed' {REPEATED.format(2)}"),
        ("training: {seed: 1, 'seed': 1}\n", f":2: the key 'seed' {REPEATED.format(2)}"),
        ("data:\n  train:\n    - {path: a,\n       path: b}\n", f":5: the key 'path' {REPEATED.format(4)}"),
        ("training: {<<: {seed: 1}, <<: {seed: 2}}\n", f":2: the key '<<' {REPEATED.format(2)}"),
        ("training:\n  warmup_steps: 010\n", f":3: 010 {BASE_8}"),
        ("model: {revision: 0012}\n", f":2: 0012 {BASE_8}"),
        ("training: {eval_steps: 1:30}\n", f":2: 1:30 {BASE_60}"),
        ("training: {learning_rate: 1:30.5}\n", f":2: 1:30.5 {BASE_60}"),
    ],
)
def test_what_yaml_would_silently_change_is_refused_with_file_and_line(content, message, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(f'recipe.yaml{message}')}$"):
        load_text("# a recipe\n" + content, tmp_path)


def test_anchors_merged_keys_dates_and_a_byte_order_mark_are_read(tmp_path):
    recipe = load_text(
        """\ufeff
        model: {model_name_or_path: m}
        data:
          train: &sources [{path: a, weight: 2}]
          eval: *sources
        training: &base
          <<: {seed: 1, max_steps: 5}
          seed: 3
          run_name: 2026-11-27
          logging_steps: 0x10
        lora:
        """,
        tmp_path,
    )
    assert recipe.data.train == recipe.data.eval == [{"path": "a", "weight": 2}]
    training = recipe.training
    assert (training.seed, training.max_steps, training.run_name, training.logging_steps) == (3, 5, "2026-11-27", 16)


def test_a_repeated_override_is_told(caplog):
    assert parse_overrides(["--seed", "1", "--training.seed=2"]) == {"training": {"seed": 2}}
    assert caplog.messages == ["--training.seed is given more than once: the last value is used"]
    with pytest.raises(ValueError, match=r"^--training\.fsdp_config:1: the key 'version' is there already, in line 1"):
        parse_overrides(["--training.fsdp_config", "{version: 1, version: 2}"])


def test_a_file_that_a_key_names_is_missing():
    with pytest.raises(
        FileNotFoundError, match=r"^quickstart: training: \[Errno 2\] No such file or directory: 'gone'$"
    ):
        load_recipe("quickstart", {"training": {"accelerator_config": "gone"}})


def test_missing_recipe():
    with pytest.raises(FileNotFoundError, match=r"there is no recipe 'nope': pass a YAML file or one of .*quickstart"):
        load_recipe("nope")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--training.learning_rate", "1e-5"], {"training": {"learning_rate": "1e-5"}}),
        (["--training.learning-rate=1e-5"], {"training": {"learning_rate": "1e-5"}}),
        (["--learning_rate", "0.5", "--r", "8"], {"training": {"learning_rate": 0.5}, "lora": {"r": 8}}),
        (["--training.max_steps", "-1"], {"training": {"max_steps": -1}}),
        (["--training.bf16", "--training.fsdp", "no"], {"training": {"bf16": True, "fsdp": False}}),
        (["--training.save_strategy", "no"], {"training": {"save_strategy": "no"}}),
        (["--training.fsdp_config", "{version: 2}"], {"training": {"fsdp_config": {"version": 2}}}),
        (["--training.run_name", "007"], {"training": {"run_name": "007"}}),
        (["--data.train", "a.jsonl", "b.jsonl"], {"data": {"train": ["a.jsonl", "b.jsonl"]}}),
        (["--data.train", "2024"], {"data": {"train": "2024"}}),
        (["--data.train", "{path: a, weight: 2}", "b"], {"data": {"train": [{"path": "a", "weight": 2}, "b"]}}),
        (["--data.eval", ""], {"data": {"eval": None}}),
        (["--data.eval=null"], {"data": {"eval": None}}),
        (["--data.prompt_template={query}: {passage}"], {"data": {"prompt_template": "{query}: {passage}"}}),
        (["--lora.target_modules", "q_proj", "v_proj"], {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
        (["--lora.layers_to_transform", "0", "1"], {"lora": {"layers_to_transform": [0, 1]}}),
        (["--training.seed", "1", "--training.seed", "2"], {"training": {"seed": 2}}),
    ],
)
def test_overrides(arguments, expected):
    assert parse_overrides(arguments) == expected


def test_overrides_replace_the_values_of_a_recipe(tmp_path):
    text = "model: {model_name_or_path: m}\ndata: {eval: [a.jsonl], rerank_max_length: 64}\ntraining: {seed: 7}"
    arguments = ["--data.eval", "null", "--data.rerank_max_length", "null", "--learning_rate", "1e-5", "--r", "4"]
    overrides = parse_overrides(arguments)
    recipe = load_text(text, tmp_path, overrides)
    assert (recipe.data.eval, recipe.data.rerank_max_length) == ([], None)
    assert (recipe.training.learning_rate, recipe.training.seed) == (1e-5, 7)
    assert recipe.lora == {"r": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--training.learning_rat 1", "unknown option '--training.learning_rat'; the nearest is"),
        ("--learning-rat 1", "unknown option '--learning-rat'; the nearest is '--training.learning_rate'"),
        ("--trainin.seed 1", "unknown option '--trainin.seed'; the nearest is '--training.seed'"),
        ("--dryrun", "unknown option '--dryrun'; the nearest is '--dry-run'"),
        ("--revision x", "several blocks have the option '--revision': write --model.revision or --lora.revision"),
        ("--training.seed", "--training.seed needs a value"),
        ("--training.seed 1 2", "--training.seed takes one value, got 2: 1 2"),
        ("--training.seed {", "--training.seed: '{' is not a value in YAML: while parsing"),
        ("--training.seed 2001-99-99", "--training.seed: '2001-99-99' is not a value in YAML: month must be in 1..12"),
        ("x --training.seed 1", "unexpected argument 'x': write --block.key before a value"),
    ],
)
def test_wrong_overrides(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_overrides(arguments.split(), options=["--dry-run", "--overwrite"])
