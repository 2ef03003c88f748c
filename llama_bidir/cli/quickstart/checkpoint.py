"""A small Llama checkpoint with random weights and its own tokenizer."""

import os
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_checkpoint(
    directory: str | os.PathLike[str],
    texts: Iterable[str],
    seed: int = 42,
    *,
    vocab_size: int = 1024,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    initializer_range: float = 0.1,
) -> None:
    """
    Saves a Llama of 0.2 million parameters, which learns to match questions and passages within a minute on a CPU.

    `initializer_range` and `rope_theta` are larger than Llama's defaults of 0.02 and 10,000. With the defaults, a model
    of this size learns almost nothing in the same number of steps.

    Args:
        directory: folder for the model and the tokenizer.
        texts: texts from which the byte-level BPE vocabulary is learned.
        seed: seed of the weights.
        vocab_size, hidden_size, num_hidden_layers, initializer_range: values of the config.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end_of_text|>")

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
