"""Makes transformers' Auto classes know `llama_bidirec`, without importing torch to do so.

`import llama_bidir` puts a stand-in for the config class into `CONFIG_MAPPING`. Its first use imports the real classes
and registers them with AutoConfig, AutoModel and AutoModelForSequenceClassification.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODEL_TYPE = "llama_bidirec"
AUTO_MODULE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Registers the classes with the Auto classes, now and whole; a second call changes nothing."""
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    from .configuration_llama_bidir import LlamaBidirectionalConfig
    from .modeling_llama_bidir import LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel

    AutoConfig.register(MODEL_TYPE, LlamaBidirectionalConfig, exist_ok=True)
    AutoModel.register(LlamaBidirectionalConfig, LlamaBidirectionalModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification, exist_ok=True
    )


def register_lazily() -> None:
    """Registers on first use: at once where the Auto classes are already imported, else as soon as they are."""
    if auto_module := sys.modules.get(AUTO_MODULE):
        _add_stand_in(auto_module)
    elif not any(isinstance(finder, _AutoModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModuleFinder())


class _StandInMeta(type):
    def __getattr__(cls, name: str) -> Any:
        return getattr(_load_config_class(), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _load_config_class()(*args, **kwargs)


class _StandIn(metaclass=_StandInMeta):
    """Acts as LlamaBidirectionalConfig for what the Auto classes ask of a config class."""


_StandIn.__name__ = _StandIn.__qualname__ = "LlamaBidirectionalConfig"


def _load_config_class() -> Any:
    from .configuration_llama_bidir import LlamaBidirectionalConfig

    register()
    return LlamaBidirectionalConfig


def _add_stand_in(auto_module: ModuleType) -> None:
    if f"{__package__}.configuration_llama_bidir" in sys.modules:
        register()
    else:
        auto_module.CONFIG_MAPPING.register(MODEL_TYPE, _StandIn, exist_ok=True)


class _AutoModuleFinder(importlib.abc.MetaPathFinder):
    """Adds the stand-in right after the module of `CONFIG_MAPPING` is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _add_stand_in(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
