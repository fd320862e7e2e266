"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on an adapter.

    python -m ptmoe.evaluate.harness --model ptmoe --model_args adapter=runs/mine --tasks gsm8k,hellaswag --batch_size 8

    import lm_eval
    from ptmoe.evaluate.harness import PromptedLM  # registers the model "ptmoe" with the harness

    lm_eval.simple_evaluate(model="ptmoe", model_args={"adapter": "runs/mine"}, tasks=["gsm8k", "hellaswag"])
    lm_eval.simple_evaluate(model=PromptedLM(pretrained=model, tokenizer=tokenizer), tasks=["hellaswag"])

The harness asks two things of a model. `generate_until`: complete a context. `loglikelihood`: how probable is a
continuation after a context, which is what multiple choice compares. In the latter the sequence contains an answer, and
a router that averaged it as well would choose another prompt than in generation, and a different one for each choice.
So here, always,

    P = encoder(context)        log p(continuation | P, context)
"""

import importlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from ptmoe.adapters.folder import local_folder
from ptmoe.errors import PtmoeError
from ptmoe.models.attach import LoadedRun, load_adapter, load_run
from ptmoe.models.bases import locate, place
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.runs.environment import world_size
from ptmoe.tasks.chat import fixed_date

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ImportError as error:
    raise PtmoeError(f"lm-evaluation-harness cannot be imported ({error}): pip install 'ptmoe[lm-eval]'") from None

from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Options with which `HFLM` assembles a model itself, or spreads it over several devices.
REFUSED = "autogptq delta device_map gguf_file gptqmodel parallelize peft subfolder tp_plan".split()

# What the harness scores: the two texts, where there are any, and the tokens of the context and of its continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# One row of a batch: the indices of the requests that it answers, its context and its continuation. These requests
# share the context and all but the last token of the continuation, so one row of logits serves them all.
Row = tuple[list[int], list[int], list[int]]


class PromptedLM(HFLM):
    """A base model with an adapter, as the harness sees it: `hf` with a soft prompt composed for each context.

    Batching (including `batch_size="auto"`), chat templates, stop sequences, truncation and caching are `HFLM`'s own.
    What differs: the router reads the context alone, and `max_length` leaves room for the virtual tokens. The context
    is what the harness passes as such: its trailing spaces belong to the continuation, an empty context is the prefix
    token (the tokenizer's BOS, else its EOS; `prefix_token_id` overrides it), a context that is too long loses its
    beginning, and in `loglikelihood_rolling` the context is what precedes each window.

    `HFLM(pretrained=model)` itself does not accept a `PromptedCausalLM`: its scoring calls the model with context and
    continuation as one text, and nothing in that call tells them apart.

    Args:
        pretrained: the base by name (`"nano"`, a folder, a Hub repository), by default the base that the adapter names;
            or a loaded base; or a `PromptedCausalLM`, which is used with its active adapter.
        adapter: an adapter folder, a run folder that holds one, or a Hub repository.
        tokenizer: a tokenizer or its name; by default the base's.
        revision: of the base, by default the adapter's own.
        dtype: of a base given by name: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        quantization: of a base given by name: `"8bit"` or `"4bit"`.
        device: where the model computes; by default the accelerator, where there is one, and a loaded model stays where
            it is. `cuda` means the default on a machine without CUDA, where lm_eval's command names it nevertheless.
        **options: those of `HFLM` (`batch_size`, `max_batch_size`, `max_length`, `truncation`, `logits_cache`,
            `add_bos_token`, `prefix_token_id`, `softmax_dtype`, `mixed_precision_dtype`, `think_end_token`,
            `enable_thinking`, `chat_template_args`, `trust_remote_code`); others go to the base's `from_pretrained`.

    Raises:
        PtmoeError: no adapter, an adapter of another base, an unknown base, a `max_length` beyond the base's positions,
            an encoder-decoder, several processes or devices, or a `peft` adapter, which the harness's own `hf`
            evaluates.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | PromptedCausalLM | None = None,
        adapter: str | Path | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        _check_options(options)
        known = inspect.signature(HFLM.__init__).parameters
        loading = {name: options.pop(name) for name in list(options) if name not in known}
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None
        target = place(device)
        if pretrained is None or isinstance(pretrained, str):
            if options.get("trust_remote_code"):
                loading["trust_remote_code"] = True
            revision = None if revision is None else str(revision)  # the harness parses what looks like a number
            base = {"revision": revision, "dtype": dtype, "quantization": quantization, "device": target}
            run = _load(adapter, pretrained, base, loading)
            model, tokenizer, self._templated = run.model, tokenizer or run.tokenizer, run.chat is not True
        else:
            if loading:
                raise PtmoeError(f"{', '.join(loading)}: no option of the harness's hf, and the base is loaded already")
            model = _prompted(pretrained, adapter)
            if device is not None:
                model.to(target)
            self._templated = True  # or not known to be needed
        name = model.name_or_path
        # `HFLM` warns that it ignores loading options for a loaded model; here they have been used already.
        harness = logging.getLogger(HFLM.__module__)
        level = harness.level
        harness.setLevel(logging.ERROR)
        try:
            tokenizer = tokenizer or locate(name)
            super().__init__(model.base_model, **options | {"backend": "causal", "tokenizer": tokenizer})
        finally:
            harness.setLevel(level)
        if self.tokenizer.chat_template is not None:
            given: dict[str, Any] = vars(self)["chat_template_args"] or {}
            self.chat_template_args = fixed_date(self.tokenizer) | given
        self._model = model.eval()
        self.adapter = None if adapter is None else str(adapter)
        if self._max_length and self._max_length > self._room:
            raise PtmoeError(
                f"max_length={self._max_length} exceeds the {self._room} positions that the base {name!r} has beside "
                f"{self.model.num_virtual_tokens} virtual tokens: lower it, or leave it out"
            )

    @property
    def _room(self) -> int:
        """The number of tokens that the base has positions for beside the virtual tokens."""
        return int(self.model.max_positions or super().max_length) - int(self.model.num_virtual_tokens)

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of context and continuation."""
        return int(self._max_length or self._room)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
        self._templated = True
        return cast(str, super().apply_chat_template(*arguments, **options))

    def _check_template(self) -> None:
        """Say once where plain prompts are given to an adapter that was trained in the chat template."""
        if not self._templated:
            self._templated = True
            logger.warning("the adapter was trained in the chat template, and got plain prompts: --apply_chat_template")

    def tok_batch_encode(self, strings: list[str], *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask `(B, L)` of contexts to complete; an empty context is the prefix token."""
        self._check_template()
        ids, mask = super().tok_batch_encode(strings, *arguments, **options)
        if ids.shape[1] == 0:
            ids, mask = ids.new_zeros(len(strings), 1, dtype=torch.long), mask.new_zeros(len(strings), 1)
        empty = mask.sum(1) == 0
        ids[empty, -1] = self.prefix_token_id
        mask[empty, -1] = 1
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is the greedy continuation.

        `HFLM` lets requests with equal inputs share logits. Here their contexts have to be equal as well: "a b" before
        "c" and "a" before "b c" are one input with two prompts.

        Args:
            requests: texts, context and continuation of each.
            disable_tqdm: show no progress.
            override_bs: the batch size to use instead of an automatic one.

        Raises:
            PtmoeError: a context or continuation without tokens, or a continuation longer than `max_length`.
        """
        answers = [(0.0, False)] * len(requests)
        self.batch_sizes: dict[int, int] = {}  # found for these requests
        size = override_bs or self.batch_size
        find_size = self._batch_scheduler if size == "auto" else None
        batches = Collator.get_chunks(self._rows(requests), n=size, fn=find_size)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=hidden, desc="Running loglikelihood requests") as progress:
            for batch in batches:
                for (indices, _, _), scores in zip(batch, self._scores(batch), strict=True):
                    wanted = torch.tensor([requests[index][2] for index in indices], device=scores.device)  # (M, C)
                    likelihoods = scores.gather(1, wanted.T).float().sum(0).tolist()
                    greedy = (scores.argmax(1) == wanted).all(1).tolist()
                    for index, likelihood, is_greedy in zip(indices, likelihoods, greedy, strict=True):
                        answers[index] = (likelihood, is_greedy)
                        if requests[index][0] is not None:  # windows of a longer text are cached together
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                    progress.update(len(indices))
        return answers

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        """The rows that answer all requests, longest first, their contexts cut to `max_length`."""
        self._check_template()
        rows: dict[Any, Row] = {}
        longest, cut = self.max_length, 0
        for index, (texts, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise PtmoeError(f"request {index}, {texts!r}: its context or its continuation has no token of its own")
            if len(continuation) > longest:
                raise PtmoeError(
                    f"a continuation of {len(continuation)} tokens exceeds the {longest} that fit beside "
                    f"{self.model.num_virtual_tokens} virtual tokens: shorten it"
                )
            kept = context[-(longest + 1 - len(continuation)) :]  # + 1: the last token is not an input
            cut += len(kept) < len(context)
            key = tuple(kept), tuple(continuation[:-1]), None if self.logits_cache else index
            rows.setdefault(key, ([], kept, continuation))[0].append(index)
        if cut:
            logger.warning("%d of %d contexts are cut on the left to fit %d tokens", cut, len(requests), longest)
        return sorted(rows.values(), key=lambda row: -len(row[1]) - len(row[2]))

    @torch.no_grad()
    def _scores(self, batch: list[Row]) -> Iterator[Tensor]:
        """For each row, `(C, V)`: the log-probabilities of every token at each position of its continuation."""
        inputs = [torch.tensor(context + continuation[:-1]) for _, context, continuation in batch]
        ids = pad_sequence(inputs, batch_first=True).to(self.device)  # (B, L)
        real, readable = (
            (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long().to(self.device)
            for lengths in ([len(row) for row in inputs], [len(context) for _, context, _ in batch])
        )
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            logits = self.model(ids, attention_mask=real, input_mask=readable).logits
        for scores, row, (_, context, _) in zip(logits, inputs, batch, strict=True):
            yield scores[len(context) - 1 : len(row)].log_softmax(-1, dtype=self.softmax_dtype)

    def get_model_info(self) -> dict[str, Any]:
        """What the results record about the model. Unlike `HFLM`'s version it makes no request to the Hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": getattr(self.model.config, "_commit_hash", None),
            "base_model": self.model.name_or_path,
            "adapter": self.adapter,
            "method": self.model.method_config.method if self.model.active_adapter else None,
            "num_virtual_tokens": self.model.num_virtual_tokens,
        }


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options of `HFLM` that do not work with an adapter."""
    for name in REFUSED:
        if options.get(name):
            other = "; the harness's own hf model evaluates it" if name == "peft" else ""
            raise PtmoeError(
                f"{name}={options[name]!r}: ptmoe evaluates one adapter on one device, leave it out{other}"
            )
    if options.get("backend", "default") not in ("default", "causal"):
        raise PtmoeError(f"backend={options['backend']!r}: an adapter goes before a causal language model")
    if world_size() > 1:
        raise PtmoeError(f"{world_size()} processes: each would evaluate everything; start one process")


def _load(adapter: str | Path | None, name: str | None, base: dict[str, Any], options: dict[str, Any]) -> LoadedRun:
    """An adapter on its base, or on the base `name`."""
    if adapter is None:
        raise PtmoeError("no adapter: give --model_args adapter=FOLDER, an adapter folder or a run folder")
    try:
        return load_run(str(adapter), model=name, **base, **options)
    except TypeError as error:  # an option that neither transformers nor the model's class has
        base_name = repr(name) if name else f"the base of {adapter}"
        raise PtmoeError(f"{', '.join(options) or 'the base'}: {base_name} does not load with it ({error})") from None


def _prompted(model: PreTrainedModel | PromptedCausalLM, adapter: str | Path | None) -> PromptedCausalLM:
    """A loaded model with its adapter."""
    if isinstance(model, PromptedCausalLM):
        if adapter is not None:
            raise PtmoeError(f"adapter={str(adapter)!r} and a model that has an adapter: give only one of them")
        return model
    if adapter is None:
        raise PtmoeError(f"{type(model).__name__} without an adapter: give adapter=FOLDER, or use the harness's own hf")
    return load_adapter(model, str(adapter))


def main(arguments: Sequence[str] | None = None) -> None:
    """The harness's own command line, with the model `ptmoe`; by default with the process's arguments.

    Raises:
        SystemExit: with status 2 on bad input.
    """
    from lm_eval.__main__ import cli_evaluate

    if arguments is not None:
        sys.argv = ["lm_eval", *arguments]  # where the harness reads its arguments
    try:
        for adapter in re.findall(r"(?:^|[,=])adapter=([^,\n]+)", "\n".join(sys.argv), re.MULTILINE):
            local_folder(adapter)  # the harness would first load its tasks
        cli_evaluate()
    except PtmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    # So the harness registers the class that other code imports, not a copy in `__main__`.
    importlib.import_module("ptmoe.evaluate.harness").main()
else:
    register_model("ptmoe")(PromptedLM)
