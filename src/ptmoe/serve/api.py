"""The bodies of OpenAI's API, as far as they are honoured here; what is not is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

LONGEST = 256  # characters of a name or a stop text
# Parameters that no engine honours here, and the values at which they change nothing. (Penalties, on embeddings, have
# ended vLLM's engine: issue 57719.)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# What the messages of answers hold beside their text, which clients send back as part of the conversation.
OF_ANSWERS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}

Name = Annotated[str, Field(min_length=1, max_length=LONGEST)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}  # as `NEUTRAL`; null always is

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_honoured(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in values.keys() & cls.neutral.keys():
            if values[name] is not None and values[name] not in cls.neutral[name]:
                raise _not_honoured(name, f"{name} cannot be honoured by this server: leave it out")
        return {name: value for name, value in values.items() if name not in cls.neutral}


def _not_honoured(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("not_honoured", "{message}", {"param": param, "message": message})


class StreamOptions(Body):
    """Attributes:
    include_usage: send the usage in a last chunk of its own.
    """

    include_usage: bool = False


class Parameters(Body):
    """What both kinds of completion share.

    Attributes:
        model: an adapter's name, or the base's.
        seed: the same seed gives the same answer, in any company.
        ptmoe: tell how the input was routed.
        user: taken and not used, as it changes no answer.
    """

    neutral: ClassVar = NEUTRAL
    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    ptmoe: bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(Parameters):
    """Attributes:
    prompt: a text, several, token ids, or several lists of them.
    logprobs: of the chosen token and so many of the most likely ones.
    """

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    neutral: ClassVar = OF_ANSWERS
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatBody(Parameters):
    """Attributes:
    messages: the conversation so far.
    max_completion_tokens: another name for `max_tokens`.
    logprobs: report log-probabilities, with `top_logprobs` alternatives.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _no_parameter_against_another(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:  # vLLM takes a 0 as well
            raise _not_honoured("top_logprobs", "top_logprobs needs logprobs=true")
        if None not in (limits := {self.max_tokens, self.max_completion_tokens}) and len(limits) > 1:
            raise _not_honoured("max_tokens", "max_tokens and max_completion_tokens are one limit: give one of them")
        return self


# -- answers -----------------------------------------------------------------------------------------------------------


class Details(BaseModel):
    """Attributes:
    virtual_tokens: of the soft prompts; counted neither in `prompt_tokens` nor in `total_tokens`.
    """

    virtual_tokens: int


class Usage(BaseModel):
    """Attributes:
    prompt_tokens: of the texts, each once however many answers it gets.
    completion_tokens: that were generated, end tokens included.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Details


class RoutingInfo(BaseModel):
    """Attributes:
    expert: with the highest gate; None where the adapter does not route.
    gate: the factor of each expert.
    """

    expert: int | None
    gate: list[float] | None


class Choice(BaseModel):
    """A choice of a completion or of a chunk of one; a chat's has a `message` or `delta` instead of `text`."""

    index: int
    text: str | None = None
    message: dict[str, Any] | None = None
    delta: dict[str, Any] | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    ptmoe: RoutingInfo | None = None


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
