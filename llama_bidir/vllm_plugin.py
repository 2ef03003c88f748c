"""
What vLLM finds under its entry point `vllm.general_plugins`: with this package installed it serves checkpoints of type
`llama_bidirec` as they are.
"""

ARCHITECTURE = "LlamaBidirectionalForSequenceClassification"


def register() -> None:
    """Called by vLLM in each of its processes: transformers knows the configuration then, and vLLM the model."""
    from vllm import ModelRegistry

    import llama_bidir  # noqa: F401  # registers the configuration

    ModelRegistry.register_model(ARCHITECTURE, f"llama_bidir.vllm_model:{ARCHITECTURE}")
