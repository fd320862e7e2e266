"""`SavingModel`: writing adapter folders, here and on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ptmoe.adapters.folder import save_adapter
from ptmoe.adapters.identity import BaseIdentity
from ptmoe.errors import PtmoeError, near

if TYPE_CHECKING:
    from ptmoe.models.adapter_set import AdapterSet

KNOWN = ("adapter_name", "is_main_process", "push_to_hub", "repo_id")
OF_TRAINER = ("state_dict", "safe_serialization", "save_function", "max_shard_size")  # an adapter needs none of them


class SavingModel(nn.Module):
    """What of a model with adapters saves them."""

    adapters: AdapterSet
    config: Any
    name_or_path: Any
    _fingerprint: dict[str, Any] | None

    @property
    def identity(self) -> BaseIdentity:
        """The base that adapters are saved for."""
        hidden = cast(Tensor, cast(Any, self).get_input_embeddings().weight).shape[1]
        revision = getattr(self.config, "_commit_hash", None)
        return BaseIdentity(self.name_or_path, revision, hidden, self._fingerprint)

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
