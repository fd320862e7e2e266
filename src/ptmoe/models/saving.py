"""`SavingModel`: adapter folders, here and on the Hub, and what checkpoints of other trainers hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptmoe.adapters.folder import save_adapter
from ptmoe.adapters.identity import BaseIdentity
from ptmoe.errors import PtmoeError, near
from ptmoe.models.adapter_set import AdapterSet

KNOWN = ("adapter_name", "is_main_process", "push_to_hub", "repo_id")
FINGERPRINT = "base_fingerprint"  # in `state_dict()`
OF_TRAINER = ("state_dict", "safe_serialization", "save_function", "max_shard_size")  # an adapter needs none of them


class SavingModel(nn.Module):
    """What of a model with adapters saves them. The base is not part of `state_dict()`, which holds adapters only."""

    _keys_to_ignore_on_save = None  # `Trainer` asks for it where a checkpoint lacks an adapter
    adapters: AdapterSet
    config: Any
    name_or_path: Any
    _fingerprint: dict[str, Any]

    @property
    def peft_config(self) -> None:
        raise AttributeError("peft_config")

    @peft_config.setter
    def peft_config(self, config: object) -> None:
        """`peft` sets it when it has changed the layers of a model.

        Raises:
            PtmoeError: always, as what it has made would not be saved with the adapter here.
        """
        raise PtmoeError(
            "peft has put an adapter of its own into this model's base, which would not be saved with this one's: load "
            "the base again, and use either ptmoe.attach or peft"
        )

    @property
    def identity(self) -> BaseIdentity:
        """The base that adapters are saved for."""
        hidden = cast(Tensor, cast(Any, self).get_input_embeddings().weight).shape[1]
        revision = getattr(self.config, "_commit_hash", None)
        return BaseIdentity(self.name_or_path, revision, hidden, self._fingerprint)

    def check_saved(self, saved: BaseIdentity, adapter: object) -> None:
        """
        Raises:
            PtmoeError: the base that an adapter belongs to, which the message calls `adapter`, is not this model's.
        """
        if saved.fingerprint is None or saved.fingerprint != self._fingerprint:  # `ft` changes the embedding itself
            saved.check(cast(Any, self).get_input_embeddings().weight, adapter, self.name_or_path)

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters' tensors as they are in training, and `base_fingerprint (65,)`: which base they are trained on,
        which has a folder of its own."""
        prefix = options.pop("prefix", "")
        state = self.adapters.encoders.state_dict(*arguments, prefix=f"{prefix}encoders.", **options)
        mark = self._fingerprint
        state[f"{prefix}{FINGERPRINT}"] = torch.tensor([mark["vocabulary"], *mark["values"]], dtype=torch.float64)
        return cast(dict[str, Any], state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict()` gives.

        Raises:
            PtmoeError: tensors of another base, method or shape than this model's.
        """
        tensors = {key.removeprefix("encoders."): value for key, value in state_dict.items()}
        if (mark := tensors.pop(FINGERPRINT, None)) is not None:  # earlier versions wrote none
            size, *values = mark.tolist()
            self.check_saved(
                BaseIdentity(None, fingerprint={"vocabulary": int(size), "values": values}), "what is to be loaded"
            )
        encoders = self.adapters.encoders
        for key, own in encoders.state_dict().items():
            if key in tensors and tensors[key].shape != own.shape:
                raise PtmoeError(
                    f"{key} has shape {tuple(tensors[key].shape)} in what is to be loaded and {tuple(own.shape)} in "
                    "this adapter: it was trained with other options (num_experts, rank, …); use those, or start again"
                )
        loaded = encoders.load_state_dict(tensors, strict=strict, assign=assign)
        unmatched = [*loaded.unexpected_keys, *loaded.missing_keys]
        for name in {key.partition(".")[0] for key in tensors} & encoders.keys():
            if lacking := [key for key in unmatched if key.startswith(f"{name}.")]:
                raise PtmoeError(
                    f"what is to be loaded and this {self.adapters[name].config.method} adapter are not of one method "
                    f"with the same options: only one of them has {lacking[0]}"
                )
        return loaded

    def save_pretrained(
        self,
        save_directory: str | Path,
        adapter_name: str | None = None,
        *,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the adapter folder of the active adapter, or of a named one.

        Args:
            save_directory: the folder.
            adapter_name: of the adapter.
            is_main_process: others write nothing, as in `transformers`.
            push_to_hub: upload it, too; with `repo_id` and other options as in `transformers`.
            repo_id: by default the folder's name.
            **options: of the upload.

        Raises:
            PtmoeError: an option that is none of them.
        """
        options = {name: value for name, value in options.items() if name not in OF_TRAINER}
        if options and not push_to_hub:
            name = next(iter(options))
            meant = "; name one adapter with adapter_name" if name == "selected_adapters" else near(name, KNOWN)
            raise PtmoeError(f"save_pretrained takes no {name!r}{meant}")
        if not is_main_process:
            return
        save_adapter(self.adapters[adapter_name or self.adapters.active], self.identity, save_directory)
        if push_to_hub:
            self._upload(save_directory, repo_id or Path(save_directory).name, **options)

    def push_to_hub(self, repo_id: str, adapter_name: str | None = None, **options: Any) -> None:
        """Upload the adapter folder to the Hugging Face Hub; `options` go to `huggingface_hub.upload_folder`."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_name)
            self._upload(folder, repo_id, **options)

    def _upload(self, folder: str | Path, repo_id: str, **options: Any) -> None:
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        created = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, **options)
