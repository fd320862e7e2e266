"""Everything that decides a training run: one typed object, from the command line or a YAML file.

The fields are the options of `ptmoe train`: their names, types, defaults and help come from here. Names are those of
`transformers.TrainingArguments` where it has them; any other of its arguments goes under `trainer`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from ptmoe.errors import PtmoeError, shown
from ptmoe.files import LONGEST_NAME, write_whole
from ptmoe.settings import Flag, Settings, method_name, parse_yaml, read_yaml, yaml_text

if TYPE_CHECKING:
    from ptmoe.tasks.local import Keys

Count = Annotated[int, Field(ge=1, lt=2**63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
BASE = "base"  # the method of a run that trains nothing
DEFAULT_METHOD = "pt-moe"
PLACES = {"data", "data_dir", "eval_data_dir", "forgetting"}  # may differ between machines: what they hold may not
METHOD = re.compile(r"((?:\s*peft:)?[^:]*)(?::(.*))?", re.IGNORECASE | re.DOTALL)  # a name, and fields


def method_entry(value: Any) -> Any:
    """`pt-moe` or `pt-moe:rank=8,num_experts=4` as `{"name": "pt-moe", …}`; anything but text is returned as it is.

    Raises:
        PtmoeError: a field without a value, or a name that is no text.
    """
    if not isinstance(value, str):
        if isinstance(value, dict) and not isinstance(value.get("name", ""), str):
            raise PtmoeError(f"method {shown(value)}: its name is no text")
        return value | {"name": method_name(value["name"])} if isinstance(value, dict) and "name" in value else value
    name, fields = METHOD.fullmatch(value).groups("")  # type: ignore[union-attr]
    entry: dict[str, Any] = {"name": method_name(name)}
    for field in re.split(r",(?![^\[]*\])", fields) if fields else []:  # a comma inside […] parts a list
        key, equals, text = field.partition("=")
        if not equals:
            raise PtmoeError(f"method {value!r}: {field!r} is not FIELD=VALUE")
        entry[key.strip()] = scalar(text)
    return entry


def scalar(text: str) -> Any:
    """What `text` would be in a YAML file."""
    try:
        return parse_yaml(text)
    except Exception:  # the parser ends in whatever it ends in
        return text


def _method(value: Any) -> Any:
    entry = method_entry(value)
    return {"name": DEFAULT_METHOD, **entry} if isinstance(entry, dict) else entry


SECRET_KEY = re.compile(r"(^|[_-])(token|password|passwd|secret|api[_-]?key|credentials?)$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}|://[^/\s:@]*:[^/\s@]+@")  # of the Hub; a URL with a password


def secret_in(value: Any, name: str = "a value") -> str | None:
    """Where something secret is, by its key or by its form; None where there is nothing."""
    if isinstance(value, str):
        return f"{name!r}, which holds a token or password," if SECRET_VALUE.search(value) else None
    if isinstance(value, list):
        return next((found for part in value if (found := secret_in(part, name))), None)
    for key, part in value.items() if isinstance(value, dict) else ():
        if part is not None and SECRET_KEY.search(str(key)):
            return repr(key)
        if found := secret_in(part, str(key)):
            return found
    return None


class SharedOptions(Settings):
    """What `ptmoe train` and `ptmoe compare` have in common."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    unwritten: ClassVar[set[str]] = {"output_dir"}  # fields that a YAML file leaves open

    model: str = "nano"
    """nano, smollm2, a folder, a GGUF file, or a Hugging Face Hub repository"""
    revision: str | None = None
    """of the Hub repository: a branch, a tag or a commit"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of the frozen base; auto is as saved"""
    quantization: Literal["8bit", "4bit"] | None = None
    """of the base's linear layers, by bitsandbytes; by default as saved"""
    data_dir: str | None = None
    """folder or file with the task's data set; by default it is downloaded"""
    skip_bad: bool = False
    """skip bad records, and report how many there were"""
    max_length: Count | None = None
    """real tokens of an example; longer contexts are cut; by default as many as the base has positions for"""
    max_examples: Count | None = None
    """train on the first N examples only"""
    eval_data_dir: str | None = None
    """where the evaluation tasks' data sets are; by default --data-dir, if that is a folder"""
    eval_examples: Count | None = None
    """evaluate on the first N examples of each task only"""
    forgetting: str | None = None
    """file with lines of text, of which 200 at most are read: measure how much worse the base predicts them with the
    adapter; on nano by default its own skills"""
    score: Literal["answers", "choices"] = "answers"
    """how evaluated tasks are answered: as the model writes, or, for classifications, with the most likely label"""
    eval_batch_size: Count = 200
    """rows computed at once on one device by the evaluation"""
    max_new_tokens: Count | None = None
    """of an evaluated answer; by default the task's own limit"""
    max_steps: int = -1
    """optimizer steps, instead of --num-train-epochs; -1 for none"""
    num_train_epochs: Rate = 3.0
    """passes over the training data"""
    per_device_train_batch_size: Annotated[Count, Flag(("--per-device-train-batch-size", "--batch-size"))] = 32
    """rows computed at once on one device by training"""
    gradient_accumulation_steps: Count = 1
    """batches added up for one optimizer step"""
    warmup_steps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """steps of increasing learning rate; below 1, a share of all steps"""
    output_dir: str | None = None
    """folder of the run; by default a new one under runs/"""

    @field_validator("model", "data_dir", "eval_data_dir", "forgetting", "output_dir", "data", check_fields=False)
    @classmethod
    def _a_name_for_a_file(cls, value: str | None) -> str | None:
        if any(len(part.encode()) > LONGEST_NAME for part in (value or "").split("/")):
            raise ValueError(f"{shown(value)} is no file: a name has at most {LONGEST_NAME} bytes")
        return value

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, values: Any) -> Any:
        """All of the options are written into the run folder and its report."""
        if found := secret_in(values):
            raise ValueError(f"{found} would be written into the run folder: set the variable HF_TOKEN instead")
        return values

    @model_validator(mode="after")
    def _at_least_one_step(self) -> Self:
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps={self.max_steps}: needs at least 1, or -1 for num_train_epochs")
        return self

    def text(self) -> str:
        """As YAML."""
        return yaml_text(self.model_dump(exclude=self.unwritten))

    def write(self, path: Path) -> None:
        """`text`, at once: an interruption leaves no partial file."""
        write_whole(path, self.text())


class TrainOptions(SharedOptions):
    """A training run. Each field is an option of `ptmoe train`, whose help describes it; `trainer` alone, a mapping of
    other arguments of `transformers.TrainingArguments`, has no option.

    `output_dir` must not hold a run, unless that is resumed. It is not written to `config.yaml`, so that `ptmoe train
    RUN/config.yaml` repeats a run in a new folder.
    """

    method: Annotated[dict[str, Any], BeforeValidator(_method), Flag(repeatable=False)] = {"name": DEFAULT_METHOD}
    """pt-moe, pt, lora, … (`ptmoe params` lists them), with fields as in pt-moe:rank=8,num_experts=4; `ptmoe train
    --method NAME --help` shows the method's own options"""
    task: str | None = None
    """a named task (`ptmoe tasks`), a group, or a mixture: gsm8k=2,mawps=1"""
    data: str | None = None
    """instead of a task: a JSON-lines file, or a folder of them"""
    prompt_key: str | None = None
    """the data's key that holds the prompt"""
    completion_key: str | None = None
    """the data's key that holds the completion"""
    separator: str = ""
    """text between the prompt and the completion of mapped keys"""
    chat: bool | None = None
    """put prompts in the tokenizer's chat template; by default for named tasks, where there is a template"""
    truncation: Literal["left_out", "cut"] = "left_out"
    """what happens to an example that is too long and has no context to cut: it is left out, or the beginning of its
    prompt is cut"""
    token_cache: bool = True
    """keep the tokens of large data in files, so that later runs start at once"""
    eval_task: str | None = None
    """tasks to evaluate greedily after training: a,b or a group; by default nano's own"""
    validation_examples: Count | None = None
    """evaluate on so many examples of the training task's validation split, and not on a test split; where it has none,
    on the first of the training split, which are then not trained on"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """of the initial values, the order of the data and the router's noise"""
    learning_rate: Rate | None = None
    """by default the method's own (docs/findings.md)"""
    lr_scheduler_type: str = "linear"
    """linear, cosine, constant, … as in transformers"""
    optim: str | None = None
    """by default AdamW; adafactor, galore_adamw, apollo_adamw, adalomo, schedule_free_adamw, … as in transformers, some
    of which need a package (docs/performance.md)"""
    optim_args: str | None = None
    """of --optim: rank=64,update_proj_gap=100, …"""
    optim_target_modules: str | list[str] | None = None
    """whose gradients galore and apollo project: all-linear, a regular expression, or, given several times, parts of
    names"""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """of AdamW"""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """gradients are clipped to this norm"""
    tokens_per_batch: Count | None = None
    """instead of a number of rows: as many rows as fit into this many tokens, virtual tokens included"""
    packing: bool | None = None
    """rows end to end, without padding; by default where that is exact, and --packing fails where it is not"""
    gradient_checkpointing: bool = False
    """compute the layers again in the backward pass: less memory, a third slower"""
    fsdp: bool = False
    """each process holds a part of the base, where it does not fit on one device (docs/scale.md)"""
    torch_compile: bool = False
    """compile the base's layers, which takes minutes at the start; falls back where it fails
    (docs/performance.md)"""
    bf16: bool = False
    """mixed precision in bfloat16"""
    fp16: bool = False
    """mixed precision in float16"""
    logging_steps: Count = 10
    """steps between two lines of metrics.jsonl"""
    save_steps: Count = 500
    """steps between two checkpoints"""
    save_total_limit: Count = 2
    """checkpoints to keep"""
    report_to: str = "none"
    """none, wandb, tensorboard, …"""
    trainer: dict[str, Any] = {}
    """other arguments of `transformers.TrainingArguments`"""

    @model_validator(mode="after")
    def _one_source_of_data(self) -> Self:
        if (self.task is None) == (self.data is None):
            raise ValueError(f"task={self.task!r}, data={self.data!r}: give one of the two")
        if self.data is not None and self.data_dir is not None:
            raise ValueError(f"data_dir={self.data_dir!r} is where a task's data set is: leave it out with data")
        return self

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True, fp16=True: give one of the two")
        return self

    @model_validator(mode="after")
    def _arguments_of_an_optimizer(self) -> Self:
        for name in ("optim_args", "optim_target_modules"):
            if self.optim is None and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r} belongs to an optimizer: name it with optim")
        if any(not re.fullmatch(r"\s*\w+\s*=[^=]+", part) for part in (self.optim_args or "a=b").split(",")):
            raise ValueError(f"optim_args={self.optim_args!r}: needs KEY=VALUE, several parted by commas")
        return self

    @model_validator(mode="after")
    def _a_time_to_wait(self) -> Self:
        """Read before `transformers` has checked it."""
        wait = self.trainer.get("ddp_timeout", 1)
        if not isinstance(wait, (int, float)) or not 0 < wait < float("inf"):
            raise ValueError(f"trainer: ddp_timeout={shown(wait)}: needs a number of seconds above 0")
        return self

    @property
    def keys(self) -> Keys:
        """Of a file's lines. One that is evaluated may have them too, or be in a form of its own."""
        from ptmoe.tasks.local import Keys

        return Keys(self.prompt_key, self.completion_key, self.separator, where_there=True)

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> Self:
        """From a YAML file; `changes` take precedence, for `method` field by field.

        Raises:
            PtmoeError: no such file, not YAML, or an unknown key or unfit value.
        """
        from ptmoe.runs.folders import CONFIG_FILE  # which imports what a command's help does not need

        path = Path(path)
        if (path / CONFIG_FILE).is_file():
            raise PtmoeError(
                f"{path} is a run's folder: give {path / CONFIG_FILE} to train anew as it says, or --resume "
                f"--output-dir {path} to go on with it"
            )
        if not path.is_file():
            raise PtmoeError(f"no config file {path}")
        written = read_yaml(path)
        options = {**written, **changes}
        try:
            entries = [method_entry(values.get("method", {})) for values in (written, changes)]
            if all(isinstance(entry, dict) for entry in entries):
                same = entries[1].get("name", entries[0].get("name")) == entries[0].get("name")
                options["method"] = {**entries[0], **entries[1]} if same else entries[1]
            return cls(**options)
        except PtmoeError as error:
            raise PtmoeError(f"{path}: {error}") from None


def method_config(method: dict[str, Any]) -> Any:
    """The config that `{"name": …, …}` describes.

    Raises:
        PtmoeError: an unknown method, or a field that it does not have or that does not fit.
    """
    from ptmoe.methods import method_named

    fields = dict(method)
    name = fields.pop("name", DEFAULT_METHOD)
    config = method_named(name)
    try:
        return config(**fields)
    except PtmoeError as error:
        raise PtmoeError(f"{name}: {error}") from None
