"""Makes transformers' Auto classes know `llama_bidirec`, without importing torch to do so.

`import llama_bidir` adds the name of the config class to transformers' lazy table of names, as soon as that exists.
Whatever imports the config class, from that table or by hand, brings the model classes along and registers them too.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MODEL_TYPE = "llama_bidirec"
AUTO_MODULE = "transformers.models.auto.configuration_auto"
CONFIG_MODULE = f"{__package__}.configuration_llama_bidir"
MODEL_MODULE = f"{__package__}.modeling_llama_bidir"


def register_lazily() -> None:
    """Makes `AutoConfig` and the other Auto classes find the model; a second call changes nothing."""
    if not any(isinstance(finder, _WatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchingFinder())
    for name in (AUTO_MODULE, MODEL_MODULE):
        if name in sys.modules:
            _after_import(name)


def _after_import(name: str) -> None:
    if name == AUTO_MODULE:
        # The table maps a model type to a class name in the module `transformers.models.<model type>`.
        sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules[str(__package__)]
        sys.modules[AUTO_MODULE].CONFIG_MAPPING_NAMES[MODEL_TYPE] = "LlamaBidirectionalConfig"
    elif name == CONFIG_MODULE and MODEL_MODULE not in sys.modules:
        importlib.import_module(MODEL_MODULE)
    elif name == MODEL_MODULE:
        _register_models()


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    from .configuration_llama_bidir import LlamaBidirectionalConfig
    from .modeling_llama_bidir import LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel

    AutoModel.register(LlamaBidirectionalConfig, LlamaBidirectionalModel, exist_ok=True)
    AutoModelForSequenceClassification.register(
        LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification, exist_ok=True
    )


class _WatchingFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has `_after_import` called once one of the three modules is executed.

    The two model files cannot register themselves: they may live beside a checkpoint, where there is no registration.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (AUTO_MODULE, CONFIG_MODULE, MODEL_MODULE):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                _follow(spec)
                return spec
        return None


def _follow(spec: importlib.machinery.ModuleSpec) -> None:
    execute = spec.loader.exec_module  # type: ignore[union-attr]

    def execute_and_follow(module: ModuleType) -> None:
        execute(module)
        _after_import(spec.name)

    spec.loader.exec_module = execute_and_follow  # type: ignore[union-attr, method-assign]
