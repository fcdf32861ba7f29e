"""Opens the model behind a judge: weights on this machine, or a server."""

from __future__ import annotations

from dataclasses import dataclass, replace

from saro.config import DataConfig, ModelConfig
from saro.data.chat_format import ChatFormat
from saro.draws.endpoint import EndpointGenerator, EndpointOptions
from saro.draws.lazy import LazyGenerator
from saro.draws.request import Generator
from saro.errors import SaroError
from saro.evaluate.judge_spec import JudgeSpec
from saro.evaluate.options import JudgeOptions
from saro.evaluate.rules import RULES
from saro.evaluate.subjects import FIXED_DATE
from saro.model.source import find_model
from saro.runs.finished import this_device


@dataclass(frozen=True)
class JudgeModel:
    """A judge's model, ready to draw.

    Attributes:
        generator: draws its replies.
        chat: format of a model on this machine; None for a server, which renders conversations itself.
    """

    generator: Generator
    chat: ChatFormat | None


def open_judge_model(
    spec: JudgeSpec,
    name: str = "",
    server: EndpointOptions | None = None,
    *,
    option: str = "--judge.model",
    progress: bool = True,
) -> JudgeModel:
    """Open the model of a judge. Weights on this machine are read when the first reply is drawn.

    Args:
        name: folder, hub name, or address of a server with OpenAI's API; empty for the one that the judge's file names.
        server: how a server is asked; ``name`` is its address.
        option: what names a model on the command line, for the error message.

    Raises:
        SaroError: neither the file nor ``name`` gives a model, or it cannot be opened.
    """
    name = name or spec.model or ""
    if not name:
        raise SaroError(f"judge {spec.name}: works with any instruction model; name one with {option}")
    if name.startswith(("http://", "https://")):
        return JudgeModel(EndpointGenerator(replace(server or EndpointOptions(), url=name)), None)
    # Without an adapter, lora loads the plain model.
    options = ModelConfig(name=name, method="lora")
    source = find_model(options)
    chat = source.chat_format(DataConfig(), FIXED_DATE)
    generator = LazyGenerator(source, options, source.stop_ids, this_device(), progress=progress)
    return JudgeModel(generator, chat)


def find_judge_model(spec: JudgeSpec, options: JudgeOptions, progress: bool = True) -> JudgeModel | None:
    """Return the model of a judge that a user has named; None for the rules, which need none.

    Raises:
        SaroError: it does not exist, or the rules are given a model.
    """
    if spec.form == RULES:
        if options.model or options.endpoint:
            raise SaroError(f"--judge {spec.name} needs no model; name a judge that has one, or leave the model out")
        return None
    server = EndpointOptions(model=options.model, key_env=options.key_env, revision=options.revision)
    name = options.endpoint or options.model or ""
    return open_judge_model(spec, name, server, progress=progress)
