"""What clients may send: strict, bounded, and refused by name where we do not do it. Field names are OpenAI's and mlx-lm's."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from radlads.sampling import Sampling

MAX_STOPS, MAX_STOP, MAX_TEXT, MAX_MESSAGES = 16, 256, 4 << 20, 4096

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


class Strict(BaseModel):
    """No guessing: 5 is no text, true is no number, an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; only text is understood, and nothing is ever fetched."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(None, max_length=256)

    def plain(self) -> dict[str, str]:
        """Role and text, as a chat template takes them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # "developer" is the newer name of "system", which templates do not know.
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    """Whether the last chunk of a stream counts the tokens."""

    include_usage: bool = False


class TextFormat(Strict):
    """The only format of an answer."""

    type: Literal["text"]


class Request(Strict):
    """What both kinds of completion share; a null means the default, as in OpenAI's protocol."""

    model: str = Field("default", max_length=512)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    # Understood, and only in the one value that means "off".
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    store: Literal[False] = False
    response_format: TextFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """The fields that say something."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None or name not in cls.model_fields}

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, seed: int) -> Sampling:
        """How tokens are chosen; `seed` where the client gives none."""
        chosen = self.seed if self.seed is not None else seed
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, chosen)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def one_limit(self) -> "ChatRequest":
        """The newer name of `max_tokens`, when it is used."""
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ")
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Text
    echo: Literal[False] = False


def first_problem(error: ValidationError) -> tuple[str, str]:
    """(what is wrong, the field) of the first problem pydantic found."""
    problem: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in problem["loc"] if part not in ("str", "list[TextPart]"))
    why = "this field is not supported" if problem["type"] == "extra_forbidden" else problem["msg"]
    return f"{field}: {why}" if field else why, field
