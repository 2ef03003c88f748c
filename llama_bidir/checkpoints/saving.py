"""A reranker to disk or to the Hub: model, configuration, tokenizer and model card."""

import logging
import os
import tempfile
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..scoring.int8 import is_int8
from ..utils.outputs import whole_folder
from .adapters import complete_adapter
from .chat_template import save_tokenizer
from .files import replaced_by_checkpoint
from .hub import add_code
from .model_card import read_measures, write_model_card

logger = logging.getLogger(__name__)


class SavedReranker:
    """Saving and sharing, for a class that holds a model and its tokenizer."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    _stored_dtype: torch.dtype | None
    """Of the checkpoint, where the model computes in another dtype."""

    @property
    def config(self) -> LlamaBidirectionalConfig:
        """The configuration of the model, which is saved with it."""
        config: LlamaBidirectionalConfig = self.model.config
        return config

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        model_id: str | None = None,
        with_code: bool = False,
        evaluation: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Saves model, configuration, tokenizer and, if the folder has none yet, a model card.

        The files of another checkpoint in the folder are replaced; all other files stay. If the process is killed, the
        folder holds the old checkpoint or the new one. [`~utils.outputs.whole_folder`] has the exceptions.

        Args:
            directory: created if it is missing.
            model_id: the name that the code in the card loads. Defaults to `directory`.
            with_code: also save the model code beside the weights. Users without this package can then load the folder
                with `trust_remote_code=True`.
            evaluation: a file from `llama-bidir evaluate --json` with measures for the card, which is then rewritten.
            kwargs: arguments of the model's `save_pretrained`, such as `max_shard_size`.

        Raises:
            TypeError: the model is an exported graph.
            ValueError: the model is in int8, or `evaluation` is not a file of that command.
            OSError: a file cannot be written; the folder is unchanged.
        """
        if not isinstance(self.model, torch.nn.Module):
            raise TypeError("an exported reranker (backend='onnx') is not saved again: copy its folder")
        if is_int8(self.model):
            raise ValueError(
                "a reranker in int8 is not saved, because other tools could not read its weights: load the checkpoint "
                "without dtype='int8' and save that, or use `llama-bidir quantize`"
            )
        if evaluation is not None:
            read_measures(evaluation)  # raises before anything is written
        if self._stored_dtype not in (None, self.model.dtype):
            logger.warning(
                f"saved in {self.model.dtype}, as this CPU computes; the checkpoint is stored in {self._stored_dtype}: "
                "load with dtype='auto' to save it as it was"
            )
        model: Any = self.model
        has_card = os.path.exists(os.path.join(directory, "README.md"))
        with whole_folder(directory, overwrite=True, replaces=replaced_by_checkpoint(directory)) as folder:
            model.save_pretrained(folder, **kwargs)
            complete_adapter(model, folder)
            self.config.save_pretrained(folder)  # an adapter does not save it
            save_tokenizer(self.tokenizer, folder, self.config)
            if with_code:
                add_code(folder)
            if evaluation is not None or not has_card:
                write_model_card(folder, self.config, model_id or os.fspath(directory), evaluation=evaluation)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload reranker",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """
        Uploads model, configuration, tokenizer and model card in one commit. A missing repository is created once all
        files are ready.

        Args:
            repo_id: `"name"` or `"organization/name"`.
            commit_message, private, token, revision, create_pr: as in huggingface_hub.
            kwargs: arguments of [`save_pretrained`]: `with_code`, `evaluation`, and others such as `max_shard_size`.

        Returns:
            the address of the commit.

        Raises:
            TypeError, ValueError: as in [`save_pretrained`]; nothing is created on the Hub.
            OSError: the Hub or the connection failed; the repository may be new, but nothing was committed.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, model_id=repo_id, **kwargs)
            try:
                # The Hub adds the user's name to a name without one, and the code in the card loads the whole name.
                full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if full_id != repo_id:
                    write_model_card(folder, self.config, full_id, evaluation=kwargs.get("evaluation"))
                commit = api.upload_folder(
                    repo_id=full_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=revision,
                    create_pr=create_pr,
                )
            except HFValidationError:  # the name of the repository breaks a rule
                raise
            except Exception as error:  # of the Hub, of the connection or of the upload, each of its own class
                raise OSError(f"not pushed to {repo_id!r}, where nothing was committed: {error}") from error
        return str(commit.commit_url)
