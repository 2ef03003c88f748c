"""What a folder held before, the modes of files, and saves that are interrupted, by every save path."""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PAIRS, ROWS, arguments, make_model, make_tokenizer, names
from safetensors.torch import save_file

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.checkpoints.files import replaced_by_checkpoint
from llama_bidir.checkpoints.hub import CODE
from llama_bidir.files_llama_bidir import INTERRUPTED_SAVE
from llama_bidir.utils import outputs

SAVED = {
    "README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "vllm_template.jinja",
}  # fmt: skip
PERSONAL = {
    "notes.txt": "mine",
    "train.py": "print('mine')",
    "README.md": "# mine",
    "checkpoint-5/config.json": "{}",
    "checkpoint-5/model.safetensors": "mine",
    "data/deep/rows.jsonl": "{}",
    "model_notes.json": "{}",
}
FORMER = (
    "adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "model.safetensors.index.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.fp16.safetensors",
    "model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.onnx", "model.onnx.data",
    "model_int8.onnx", "onnx/model.onnx", "onnx/model_quantized.onnx", "openvino/openvino_model.xml",
    "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "additional_chat_templates/tool_use.jinja", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "modeling_other.py", "configuration_other.py", "tokenization_other.py", "training_args.bin",
)  # fmt: skip


def make_reranker(seed=5, **fields):
    return CrossEncoder(
        make_model(seed=seed, rerank_max_length=64, **fields), make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    )


def fill(folder):
    """Fills a folder with checkpoints of every layout, one over the other, and with files of a person."""
    for name in (*FORMER, *PERSONAL):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PERSONAL.get(name, "of another checkpoint"))
    save_file({"linear.weight": torch.ones(1, 32)}, folder / "2_Dense" / "model.safetensors")
    modules = [{"path": path, "type": f"x.{kind}"} for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"))]
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "2_Dense", "type": "x.Dense"}]))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gone", "peft_type": "LORA"}))
    code = {"AutoConfig": "configuration_other.C", "AutoModel": "modeling_other.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": code}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_other.T", None]}, "tokenizer_class": "OtherTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("notes.txt")


def check_personal(folder):
    for name, content in PERSONAL.items():
        assert (folder / name).read_text() == content, name
    assert (folder / "empty").is_dir()
    assert os.readlink(folder / "link") == "notes.txt"


def save_full(reranker, folder):
    reranker.save_pretrained(folder)


def save_sharded(reranker, folder):
    reranker.save_pretrained(folder, max_shard_size="60KB")


def save_with_code(reranker, folder):
    reranker.save_pretrained(folder, with_code=True)


def save_by_trainer(reranker, folder):
    pytest.importorskip("accelerate")
    make_trainer(reranker, folder).save_model()


def save_merged(reranker, folder):
    from llama_bidir.training import merge_adapter

    adapter = save_adapter(reranker, Path(f"{folder}-adapter"))
    merge_adapter(adapter, folder, overwrite=True)


def save_export(reranker, folder):
    reranker.save_pretrained(f"{folder}-source")
    export_reranker(f"{folder}-source", folder, format="hub", overwrite=True)


def make_trainer(reranker, folder, **kwargs):
    from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments

    training = arguments(CrossEncoderTrainingArguments, folder, max_steps=1, **kwargs)
    return CrossEncoderTrainer(reranker.model, training, ROWS, processing_class=reranker.tokenizer, group_size=2)


def add_lora(reranker, base):
    """An adapter on the reranker, which is saved to `base`. Its scores differ from the base's."""
    peft = pytest.importorskip("peft")
    reranker.save_pretrained(base)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"])
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    return CrossEncoder(model, reranker.tokenizer)


def save_adapter(reranker, folder):
    add_lora(reranker, Path(f"{folder}-base")).save_pretrained(folder)
    return folder


def test_code_goes_with_the_checkpoint_that_it_is_for(tmp_path):
    reranker, folder = make_reranker(), tmp_path / "out"
    reranker.save_pretrained(folder, with_code=True)
    (folder / "train.py").write_text("print('mine')")
    reranker.save_pretrained(folder)
    assert set(names(folder)) == SAVED | {"README.md", "train.py"}


@pytest.mark.parametrize(
    ("save", "new"),
    [
        (save_full, set()),
        (save_with_code, set(CODE)),
        (save_by_trainer, {"training_args.bin"}),
        (save_export, set(CODE)),
    ],
)
def test_what_was_saved_is_what_loads_and_nothing_else_is_removed(tmp_path, save, new):
    reranker, folder = make_reranker(pooling="last", temperature=0.5), tmp_path / "out"
    expected = reranker.predict(PAIRS)
    fill(folder)
    save(reranker, folder)
    assert CrossEncoder(folder).predict(PAIRS).tolist() == expected.tolist()
    assert CrossEncoder(folder, model_kwargs={"use_safetensors": True}).config.pooling == "last"
    personal = {name.split("/")[0] for name in PERSONAL} | {"empty", "link"}
    assert set(names(folder)) == SAVED | personal | new
    check_personal(folder)
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_shards_over_one_file_and_one_file_over_shards(tmp_path):
    for seed, save in enumerate((save_full, save_sharded, save_full, save_sharded, save_sharded)):
        reranker = make_reranker(seed=seed)
        save(reranker, tmp_path / "out")
        assert CrossEncoder(tmp_path / "out").predict(PAIRS).tolist() == reranker.predict(PAIRS).tolist()
        assert (tmp_path / "out" / "model.safetensors").exists() == (save is save_full)


def test_adapters_and_whole_models_over_each_other(tmp_path):
    folder = tmp_path / "out"
    fill(folder)
    save_adapter(make_reranker(), folder)
    adapted = CrossEncoder(folder).predict(PAIRS)
    plain = {"notes.txt", "train.py", "model_notes.json", "checkpoint-5", "data", "empty", "link"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(names(folder)) == SAVED - {"model.safetensors"} | plain | adapter
    check_personal(folder)
    other = make_reranker(seed=6)
    other.save_pretrained(folder)
    assert set(names(folder)) == SAVED | plain
    scores = CrossEncoder(folder).predict(PAIRS)
    assert scores.tolist() == other.predict(PAIRS).tolist()
    assert np.abs(scores - adapted).max() > 0.01
    save_merged(make_reranker(), folder)
    np.testing.assert_allclose(CrossEncoder(folder).predict(PAIRS), adapted, rtol=0, atol=1e-5)
    check_personal(folder)


def test_the_model_alone_replaces_all_weights_but_no_tokenizer(tmp_path):
    reranker = make_reranker()
    fill(tmp_path)
    kept = {"tokenizer.model", "onnx", "1_Pooling", "modeling_other.py", *(name.split("/")[0] for name in PERSONAL)}
    for options in ({"max_shard_size": "60KB"}, {}):
        reranker.model.save_pretrained(tmp_path, **options)
        model = LlamaBidirectionalForSequenceClassification.from_pretrained(tmp_path)
        for name, weight in reranker.model.state_dict().items():
            assert torch.equal(weight, model.state_dict()[name]), name
        assert kept <= set(names(tmp_path))
        assert not [
            name for name in names(tmp_path) if name.startswith((".", "adapter", "pytorch", "modules", "model.f"))
        ]
    loaded = CrossEncoder(tmp_path, reranker.tokenizer)  # whose files are those of another kind
    assert loaded.predict(PAIRS).tolist() == reranker.predict(PAIRS).tolist()
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "config.json").stat().st_mode
    )


def test_files_that_a_checkpoint_does_not_replace(tmp_path):
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "org/other--modeling_far.M"}}')
    is_replaced = replaced_by_checkpoint(tmp_path)
    for name in ("modeling_far.py", "train.py", "model.gguf", "notes.json", "runs/model.safetensors", "README.md",
                 "history.jsonl", "training_run.json", "1_data/config.json", "a/1_Pooling/config.json"):  # fmt: skip
        assert not is_replaced(Path(name)), name


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_follow_the_umask(tmp_path, umask):
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    former = os.umask(umask)
    try:
        reranker = make_reranker()
        save_full(reranker, tmp_path / "full")
        save_sharded(reranker, tmp_path / "shards")
        reranker.model.save_pretrained(tmp_path / "model")
        save_merged(reranker, tmp_path / "merged")  # and an adapter with its base
        for format in ("hub", "vllm", "sentence-transformers"):
            export_reranker(tmp_path / "full", tmp_path / format, format=format)
        trainer = make_trainer(reranker, tmp_path / "trained", save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
        save_full(reranker, tmp_path / "full")  # again, over the former one
    finally:
        os.umask(former)
    wrong = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777)
        for path in tmp_path.rglob("*")
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
    assert (tmp_path / "trained" / "checkpoint-1" / "optimizer.pt").is_file()


def test_the_rights_of_a_folder_stay(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(mode=0o700)
    folder.chmod(0o2750)
    make_reranker().save_pretrained(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2750


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to("disk")
    make_reranker().save_pretrained(tmp_path / "latest")
    assert os.readlink(tmp_path / "latest") == "disk"
    assert set(names(tmp_path / "disk")) == SAVED


def test_the_working_folder_can_be_saved_into(tmp_path, monkeypatch):
    fill(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    reranker = make_reranker()
    reranker.save_pretrained(".")
    assert CrossEncoder("./").predict(PAIRS).tolist() == reranker.predict(PAIRS).tolist()
    check_personal(Path("."))
    assert os.path.samefile(".", tmp_path / "out")


def load_all(folder):
    """The errors of each way to load a folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    ways = (
        CrossEncoder,
        LlamaBidirectionalConfig.from_pretrained,
        LlamaBidirectionalForSequenceClassification.from_pretrained,
        AutoConfig.from_pretrained,
        AutoModelForSequenceClassification.from_pretrained,
    )
    errors = []
    for load in ways:
        with pytest.raises((OSError, ValueError)) as caught:
            load(folder)
        errors.append(str(caught.value))
    return errors


@pytest.mark.parametrize("save", [save_full, lambda reranker, folder: reranker.model.save_pretrained(folder)])
def test_a_save_that_is_interrupted_between_two_files_says_so_and_can_be_finished(tmp_path, monkeypatch, save):
    """Where folders cannot be exchanged, each moment between two moved files leaves a folder that does not load."""
    monkeypatch.setattr(outputs, "exchange", lambda first, second: False)
    replace = Path.replace
    moves = []

    def stop_after(count, folder):
        def move(path, target):
            if path.parent == folder / INTERRUPTED_SAVE:
                if len(moves) == count:
                    raise KeyboardInterrupt
                moves.append(target)
            return replace(path, target)

        return move

    new = make_reranker(seed=6)
    for count in range(20):
        folder = tmp_path / str(count)
        make_reranker(seed=5).save_pretrained(folder)
        moves.clear()
        monkeypatch.setattr(Path, "replace", stop_after(count, folder))
        try:
            save(new, folder)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(Path, "replace", replace)
        errors = load_all(folder)
        for error in errors[:3]:
            assert error == (
                f"{str(folder)!r} is not a checkpoint: a save into it was interrupted or has not finished. Save into "
                f"it again, or move the new files that are still in {str(folder / INTERRUPTED_SAVE)!r} up into "
                f"{str(folder)!r} to finish that save"
            )
        finished = tmp_path / f"{count}-finished"
        shutil.copytree(folder, finished)
        for path in (finished / INTERRUPTED_SAVE).iterdir():
            path.replace(finished / path.name)
        assert CrossEncoder(finished).predict(PAIRS).tolist() == new.predict(PAIRS).tolist()
        new.save_pretrained(folder)
        assert CrossEncoder(folder).predict(PAIRS).tolist() == new.predict(PAIRS).tolist()
        assert not (folder / INTERRUPTED_SAVE).exists()
    assert count >= 2
    assert moves[-1].name == "config.json"
