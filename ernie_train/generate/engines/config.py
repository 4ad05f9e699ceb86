"""Settings of the engine that samples a stage's rollouts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ernie_train.core.config import HARMLESS, NonNegativeInt, Positive, PositiveInt, StrictConfig


class EngineConfig(StrictConfig):
    """Settings of who samples: our own sampler, or a vLLM or FastDeploy server."""

    kind: Literal["own", "vllm", "fastdeploy"] = "own"
    """What samples: the built-in sampler (`own`), `vllm` or `fastdeploy`."""
    url: Annotated[str | None, Field(pattern=r"^https?://[^/\s]+/?$"), HARMLESS] = None
    """A vLLM server that runs already, up to and without `/v1`."""
    python: Annotated[str | None, Field(min_length=1), HARMLESS] = None
    """The interpreter that starts the server; by default `bin/python` of the environment that
    `ERNIE_TRAIN_VLLM` names.
    """
    args: Annotated[list[str], HARMLESS] = []
    """Further arguments of the server's command line."""
    gpus: Annotated[list[NonNegativeInt] | None, Field(min_length=1), HARMLESS] = None
    """Numbers of the GPUs that the server gets, as `CUDA_VISIBLE_DEVICES`; those that the run may
    use, from the first, unless given.
    """
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that it is given; that of the model unless given."""
    directory: Annotated[str | None, Field(min_length=1), HARMLESS] = None
    """Directory in which a folder of the run takes each version of the weights; `engine/` in the
    stage's directory unless given.
    """
    parallel: Annotated[PositiveInt, HARMLESS] = 512
    """Requests at a time, of one sequence each; a connection each, so beyond some 900 `ulimit -n`
    must be raised.
    """
    sleep: Annotated[bool, HARMLESS] = False
    """Gives the GPU memory of a server that the stage starts to the learner between sampling and
    the next weights: vLLM sleeps, FastDeploy ends until it is started again.
    """
    timeout_s: Annotated[Positive, HARMLESS] = 1800.0
    """Seconds that all completions of an iteration, or of a turn of its episodes, may take."""
    start_timeout_s: Annotated[Positive, HARMLESS] = 900.0
    """Seconds that a start, loading new weights, or any other request may take."""

    @field_validator("url")
    @classmethod
    def _can_be_asked(cls, url: str | None) -> str | None:
        if url is None:
            return None
        import httpx  # takes 0.2 s

        try:
            parts = httpx.URL(url)
            parts.host.encode("idna")  # as the look-up of its address does
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"no host and port: {error}") from None
        if not parts.host or not 1 <= (80 if parts.port is None else parts.port) <= 65535:
            raise ValueError("it needs a host, and a port between 1 and 65535 if any")
        if parts.query or parts.fragment or "?" in url or "#" in url:
            raise ValueError("it must be up to and without /v1, without a query")
        return url

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        given = sorted(self.model_dump(exclude_defaults=True).keys() - {"kind"})
        if self.kind == "own" and given:
            raise ValueError(f"{', '.join(given)}: no effect with kind: own; say kind: vllm")
        if self.url is not None and (unused := {"python", "args", "gpus"} & set(given)):
            raise ValueError(f"{', '.join(sorted(unused))}: no effect beside a url, which runs")
        if self.url is not None and self.sleep:
            raise ValueError(
                "sleep: no effect beside a url: only a server that the stage starts is put to "
                "sleep, as others may use one that runs; leave the url out"
            )
        if self.kind == "fastdeploy" and self.url is not None:
            raise ValueError(
                "fastdeploy cannot be given new weights at a url: name the python that starts it"
            )
        if self.kind == "fastdeploy" and self.python is None:
            raise ValueError("fastdeploy needs python: the interpreter that starts it")
        return self
