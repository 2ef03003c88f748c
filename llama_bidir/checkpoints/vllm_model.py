"""vLLM's bidirectional Llama with a temperature, which vLLM does not read. It imports only where vLLM is installed."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.models import llama


class LlamaBidirectionalForSequenceClassification(llama.LlamaBidirectionalForSequenceClassification):
    """Divides the head's weight by the temperature of the configuration, and so the logits."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        temperature = getattr(self.config, "temperature", 1.0)  # a plain Llama has none
        return super().load_weights(
            (name, weight.float() / temperature if name == "score.weight" else weight) for name, weight in weights
        )
