"""Several adapters over one base that is held once.

    adapters = AdapterSet(model, {"bulk-modulus": "adapters/bulk-modulus"})
    adapters.model("bulk-modulus")(input_ids=ids).logits
    adapters.model("")(input_ids=ids).logits                        # the base as it is

Each adapter gets a model object of its own, which shares the base's weights and adds its own to them: nothing
is switched, so threads may compute with different adapters at the same time. An adapter is read when it is
first asked for; that it may share the base is checked before.

Not here: one adapter merged into its base, which is faster where only it is needed (adapters.py).
"""

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crystallm_kit.errors import ModelError, UnknownName
from crystallm_kit.models.adapters import adapter_settings, attach, rows_needed, weight_names

_PEFT_PREFIX = "base_model.model."  # of every name in an adapter's weights file


class AdapterSet:
    """The adapters of one base model.

    Args:
        model: The base, a causal LM of transformers, frozen: its weights stop asking for gradients once an
            adapter is read.
        adapters: Name -> folder. Names are free; "" is the base.

    Raises:
        ModelError: If a folder holds no LoRA, or one for more tokens than the base has rows.
    """

    def __init__(self, model: Any, adapters: Mapping[str, str | Path] | None = None) -> None:
        self._folders = {name: Path(folder) for name, folder in (adapters or {}).items()}
        self._models = {"": model}
        self._loading = threading.Lock()
        for name, folder in self._folders.items():
            self._check(name, folder)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that can be asked for, the base's "" left out."""
        return tuple(self._folders)

    def check(self, name: str) -> None:
        """Raise UnknownName if no adapter has this name; "" is the base."""
        if name and name not in self._folders:
            raise UnknownName.among("adapter", name, self._folders)

    def model(self, name: str) -> Any:
        """Return the model that computes with this adapter; "": the base.

        Raises:
            UnknownName: If there is no such adapter.
            ModelError: If it cannot be read, or does not fit the base.
        """
        self.check(name)
        if name not in self._models:
            with self._loading:
                if name not in self._models:
                    self._models[name] = self._adapted(self._folders[name])
        return self._models[name]

    def _adapted(self, folder: Path) -> Any:
        base = self._models[""]
        # peft writes what the file holds of the base's own weights (whole embeddings, biases) over them
        replaced = {name.removeprefix(_PEFT_PREFIX) for name in weight_names(folder)}
        shared = [tensor for name, tensor in base.named_parameters() if name not in replaced]
        shared += list(base.buffers())
        model = copy.deepcopy(base, {id(tensor): tensor for tensor in shared})
        device = str(next(base.parameters()).device)
        attach(model, folder, getattr(base.config, "name_or_path", "") or type(base).__name__, device)
        return model.requires_grad_(False).eval()

    def _check(self, name: str, folder: Path) -> None:
        if not name:
            raise ModelError(f"{folder}: an adapter needs a name; '' is the base.")
        rows = rows_needed(folder, adapter_settings(folder))
        known = self._models[""].get_input_embeddings().weight.shape[0]
        if rows > known:
            raise ModelError(
                f"{folder}: adapter '{name}' has {rows} tokens, the base {known}: it cannot share the base. "
                "Merge it into a model of its own: crystallm-kit merge."
            )
