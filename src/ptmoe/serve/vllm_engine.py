"""The engine that is vLLM in this process, with its continuous batching, paged attention and parallelism.

vLLM loads the base. This side holds the embedding matrix alone, as the gateway does, and rows go to it as embeddings.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from importlib.util import find_spec
from itertools import count
from typing import TYPE_CHECKING, Any

from torch import nn

from ptmoe.errors import PtmoeError, near
from ptmoe.serve.engine import LEAST, EngineError, Input, Sampling, Token, UnavailableError, check_room
from ptmoe.serve.vllm_request import TRIED, agree, parameters, probe

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.engine.arg_utils import AsyncEngineArgs

OLDEST = (0, 32)  # that was tried
NEEDED = f"vLLM {'.'.join(map(str, OLDEST))} or newer"
INSTALL = "`pip install vllm`, then `pip install --no-deps ptmoe`, in an environment of its own"
# Arguments that are not the user's, and the option that sets them where there is one.
OURS = {
    "model": "--model",
    "revision": "--revision",
    "dtype": "--dtype",
    "max_num_seqs": "--max-batch",
    "enable_prompt_embeds": "",
    "skip_tokenizer_init": "",
    "tokenizer": "",
    "tokenizer_revision": "",
    "generation_config": "",
}
WORDS = {"true": True, "false": False, "none": None}
# vLLM writes its log to standard output, where the address of the server belongs, and reports its use to its makers.
DEFAULTS = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}
STOPS = 30.0  # seconds that its processes have before they are killed

log = logging.getLogger(__name__)


class VllmEngine:
    """
    Args:
        arguments: of the engine.
        embedding: of the base, `(B, L)` ids to `(B, L, H)`.

    Attributes:
        on_step: called with the number of rows that go on after each step.

    Raises:
        PtmoeError: vLLM refuses the arguments.
    """

    name = "vllm"

    def __init__(self, arguments: AsyncEngineArgs, embedding: nn.Module) -> None:
        self._embedding = embedding
        self._model = arguments.model
        try:
            self._config = arguments.create_engine_config()
        except Exception as error:  # whatever its many checks raise
            raise _refusal(self._model, error) from error
        self.positions: int | None = self._config.model_config.max_model_len
        self.on_step: Callable[[int], None] = lambda rows: None
        self._numbers = count()

    async def start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._engine = AsyncLLM.from_vllm_config(self._config, stat_loggers=[self._steps()], disable_log_stats=True)
        except Exception as error:
            raise _refusal(self._model, error) from error
        try:
            await self._try()
        except BaseException:
            await self.stop()
            raise
        log.info("vLLM %s, model runner %s", *self._about().values())

    async def stop(self) -> None:
        self._engine.shutdown(timeout=STOPS)

    async def health(self) -> dict[str, Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.check_health()
        except EngineDeadError:
            return {"ok": False, "fault": "vLLM's engine has died: start the server again", **self._about()}
        return {"ok": True, "rows": self._engine.get_num_unfinished_requests(), **self._about()}

    async def generate(self, row: Input, sampling: Sampling) -> AsyncGenerator[Token, None]:
        """As `Engine.generate`."""
        check_room(row, sampling.max_tokens, self.positions)
        # Without the token ids and the mask that vLLM takes beside embeddings (`prompt_is_token_ids`): they would have
        # it look the real tokens up again, in a matrix that `start` has found to be ours, and its cache of prefixes
        # does not tell masks apart (issue 56655).
        prompt = {"prompt_embeds": row.embeds.to(self._config.model_config.dtype)}
        async with aclosing(self._ask(prompt, sampling)) as tokens:
            async for token in tokens:
                yield token

    # -- vLLM --------------------------------------------------------------------------------------------------------

    async def _ask(self, prompt: Any, sampling: Sampling) -> AsyncGenerator[Token, None]:
        from vllm import SamplingParams
        from vllm.exceptions import GracefulHTTPError, VLLMError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            wanted = SamplingParams(
                **parameters(sampling), detokenize=False, output_kind=RequestOutputKind.DELTA, skip_clone=True
            )
            # Closing it is what aborts the request.
            async with aclosing(self._engine.generate(prompt, wanted, str(next(self._numbers)))) as outputs:
                async for output in outputs:
                    for token in _tokens(output, sampling.logprobs):
                        yield token
        except EngineDeadError:
            raise UnavailableError("the inference engine has died: the server has to be started again") from None
        except GracefulHTTPError as error:
            raise UnavailableError(f"the inference engine takes no more requests ({error})") from None
        except (VLLMError, ValueError) as error:
            if not str(error):
                log.exception("vLLM failed on a request")
            raise EngineError(f"the inference engine fails on the request ({_said(error)})") from None

    async def _try(self) -> None:
        """
        Raises:
            PtmoeError: vLLM does not answer embeddings as it answers the tokens that they stand for.
        """
        ids, embeds = probe(self._embedding)
        dtype = self._config.model_config.dtype
        try:
            by_ids = [token async for token in self._ask({"prompt_token_ids": ids}, TRIED)]
            by_embeds = [token async for token in self._ask({"prompt_embeds": embeds.to(dtype)}, TRIED)]
        except EngineError as error:
            raise PtmoeError(f"vLLM cannot serve {self._model}: {error}") from None
        if not agree(by_ids, by_embeds):
            raise PtmoeError(
                f"vLLM does not answer embeddings of {self._model} as it answers the tokens that they stand for: it "
                "treats embeddings of this base in another way; leave --engine vllm out"
            )

    def _about(self) -> dict[str, Any]:
        import vllm

        return {"version": vllm.__version__, "model_runner": 2 if self._config.use_v2_model_runner else 1}

    def _steps(self) -> Any:
        """What vLLM calls to make something that it tells how many rows a step had."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        tell = self.on_step

        class Steps(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None and scheduler_stats.num_running_reqs:
                    tell(scheduler_stats.num_running_reqs)

            def log_engine_initialized(self) -> None: ...

        return Steps


def engine_arguments(options: Sequence[str], **ours: Any) -> AsyncEngineArgs:
    """vLLM's arguments.

    Args:
        options: `KEY=VALUE` for vLLM's own: a number, true, false, none, JSON, or else a text.
        **ours: arguments that are not the user's.

    Raises:
        PtmoeError: no vLLM, one that is too old, or an option that it does not have.
    """
    if find_spec("vllm") is None:
        raise PtmoeError(f"--engine vllm needs {NEEDED} in this environment: {INSTALL}")
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import vllm

    if vllm.__version__ != "dev" and vllm.__version_tuple__[:2] < OLDEST:
        raise PtmoeError(f"--engine vllm needs {NEEDED}, and this is {vllm.__version__}: update it")
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    theirs: dict[str, Any] = {}
    for option in options:
        key, given, value = option.partition("=")
        key = key.strip().replace("-", "_")
        if not given:
            raise PtmoeError(f"--engine-option {option!r}: needs KEY=VALUE, as in max_model_len=4096")
        if key in OURS:
            instead = f"use {OURS[key]}" if OURS[key] else "leave it out"
            raise PtmoeError(f"--engine-option {key}: the server sets it itself; {instead}")
        if key not in known:
            advice = near(key, known, most=3, otherwise="; `vllm serve --help` lists its options")
            raise PtmoeError(f"--engine-option {key}: vLLM {vllm.__version__} has no such argument{advice}")
        theirs[key] = _value(value)
    fixed = {"enable_prompt_embeds": True, "skip_tokenizer_init": True, "generation_config": "vllm"}
    try:
        return AsyncEngineArgs(**ours, **fixed, **theirs)
    except Exception as error:
        raise _refusal(ours["model"], error) from error


def _value(text: str) -> Any:
    try:
        return WORDS[text.lower()] if text.lower() in WORDS else json.loads(text)
    except ValueError:
        return text


def _tokens(output: RequestOutput, logprobs: int | None) -> list[Token]:
    """The new tokens of a row."""
    (answer,) = output.outputs
    if output.finished and answer.finish_reason not in ("stop", "length"):
        raise EngineError(f"the inference engine gave the request up ({answer.finish_reason})")
    if logprobs is None:
        return [Token(token) for token in answer.token_ids]
    tokens = []
    for token, about in zip(answer.token_ids, answer.logprobs, strict=True):
        best = sorted((one.rank, other, max(one.logprob, LEAST)) for other, one in about.items())
        top = tuple((other, value) for rank, other, value in best if rank <= logprobs)
        tokens.append(Token(token, max(about[token].logprob, LEAST), top))
    return tokens


def _refusal(model: str, error: Exception) -> PtmoeError:
    return PtmoeError(f"vLLM cannot serve {model}: {_said(error)} (VLLM_LOGGING_LEVEL=INFO shows more)")


def _said(error: Exception) -> str:
    """The first sentences of an error."""
    return " ".join((str(error) or type(error).__name__).split())[:400]
