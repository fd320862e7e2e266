"""Everything that decides a training run: one typed object, from flags or a YAML file.

Names are those of `transformers.TrainingArguments` where it has them; any other of its arguments goes under `trainer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptmoe.errors import PtmoeError, near
from ptmoe.settings import Settings, read_yaml

Count = Annotated[int, Field(ge=1)]
BASE = "base"  # the method of a run that trains nothing
DEFAULT_METHOD = "pt-moe"


class TrainOptions(Settings):
    """
    Attributes:
        model: `nano`, a folder, or a Hub repository; `revision` of the latter.
        dtype: of the frozen base.
        quantization: of its linear layers' weights, `8bit` or `4bit`, by `bitsandbytes`; by default as saved.
        method: `{"name": "pt-moe", …}` with the fields of that method's config.
        task: a named task, a group or a mixture (`gsm8k=2,mawps=1`); or `data`: a JSON-lines file or folder.
        data_dir: where the task's data set lies; by default it is downloaded.
        skip_bad: count and list bad records and go on without them.
        chat: put prompts in the tokenizer's chat template; by default a named task's, where there is a template.
        max_length: real tokens of an example; by default as many as the base has positions for.
        prompt_key: which of the data's own keys holds the prompt (`ptmoe.tasks.local`).
        completion_key: which holds the completion.
        separator: put between the two.
        truncation: what happens to a longer example that has no context to cut: `left_out`, or `cut` at the beginning
            of its prompt.
        token_cache: keep the tokens of large data in files, so that later runs start at once (`ptmoe.train.rows`).
        eval_task: tasks to evaluate greedily when trained, or a group; by default nano's own, which takes seconds.
        eval_data_dir: where their data sets lie; by default `data_dir`, if that is a folder.
        max_new_tokens: of an evaluated answer; by default the task's.
        output_dir: the run folder; it must not hold a run, unless that is resumed. By default a new one under `runs/`.
            It is not written to `config.yaml`, so that `ptmoe train RUN/config.yaml` repeats a run beside it.
        learning_rate: by default the method's (docs/findings.md has the search).
        max_steps: or `num_train_epochs`.
        per_device_train_batch_size: rows of a batch; or `tokens_per_batch`, as many rows as these tokens hold, virtual
            ones included.
        packing: rows end to end, without padding: by default where that is exact; `True` insists on it.
        gradient_checkpointing: compute the layers again in the backward pass instead of keeping what they computed.
        torch_compile: compile the base's layers, which takes minutes at the start; where it fails, go on without.
    """

    model: str = "nano"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["8bit", "4bit"] | None = None
    method: dict[str, Any] = {"name": DEFAULT_METHOD}
    task: str | None = None
    data: str | None = None
    data_dir: str | None = None
    skip_bad: bool = False
    chat: bool | None = None
    max_length: Count | None = None
    prompt_key: str | None = None
    completion_key: str | None = None
    separator: str = ""
    truncation: Literal["left_out", "cut"] = "left_out"
    max_examples: Count | None = None
    token_cache: bool = True
    eval_task: str | None = None
    eval_data_dir: str | None = None
    eval_examples: Count | None = None
    eval_batch_size: Count = 200
    max_new_tokens: Count | None = None
    output_dir: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    lr_scheduler_type: str = "linear"
    warmup_steps: Annotated[float, Field(ge=0)] = 20
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    max_steps: int = -1
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    per_device_train_batch_size: Count = 32
    tokens_per_batch: Count | None = None
    packing: bool | None = None
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    bf16: bool = False
    fp16: bool = False
    logging_steps: Count = 10
    save_steps: Count = 500
    save_total_limit: Count = 2
    report_to: str = "none"
    trainer: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source_of_data(self) -> Self:
        if (self.task is None) == (self.data is None):
            raise ValueError(f"task={self.task!r}, data={self.data!r}: give one of the two")
        if self.data is not None and self.data_dir is not None:
            raise ValueError(f"data_dir={self.data_dir!r} is where a task's data set lies: leave it out with data")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps={self.max_steps}: needs at least 1, or -1 for num_train_epochs")
        return self

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> TrainOptions:
        """From a YAML file, with flags given beside it taking precedence.

        Raises:
            PtmoeError: no such file, not YAML, or an unknown or unfit value.
        """
        path = Path(path)
        if not path.is_file():
            raise PtmoeError(f"no config file {path}")
        written = read_yaml(path)
        method = {**written.get("method", {}), **changes.pop("method", {})}
        try:
            return cls(**{**written, **({"method": method} if method else {}), **changes})
        except PtmoeError as error:
            raise PtmoeError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        import yaml

        path.write_text(yaml.safe_dump(self.model_dump(exclude={"output_dir"}), sort_keys=False, allow_unicode=True))


def method_config(method: dict[str, Any]) -> Any:
    """The config that `{"name": …, …}` describes.

    Raises:
        PtmoeError: an unknown method, or a field it does not have.
    """
    from ptmoe.methods import METHODS

    fields = dict(method)
    name = fields.pop("name", DEFAULT_METHOD)
    if name not in METHODS:
        raise PtmoeError(f"unknown method {name!r}{near(str(name), METHODS)}")
    return METHODS[name](**fields)
