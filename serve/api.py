"""The HTTP API: OpenAI's chat completions with steering, the features of the SAEs, and the playground."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.resources import files
from pathlib import Path as FilePath
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sae_ray import report
from sae_ray.images import BadImage

from .catalogue import SaeEntry, Sort, Summary
from .errors import ApiError, as_api_error
from .images import as_data_url
from .middleware import ApiMiddleware, answer_errors, api_key
from .schemas import (
    MAX_INDEX,
    ActiveFeature,
    Answer,
    ChatRequest,
    ChatResponse,
    Choice,
    ErrorBody,
    FeatureDetail,
    Features,
    FeatureSummary,
    Inspection,
    InspectRequest,
    Model,
    ModelEdit,
    Models,
    Reply,
    Sae,
    Saes,
    SteerRequest,
    SteerResponse,
    TopImage,
    chunk,
)
from .service import Completion, Event, Service, Whole, collect

PLAYGROUND = FilePath(__file__).parent / "playground"
SWAGGER = FilePath(str(files("fastapi_swagger.resources")))
"""Swagger UI itself, so that the documentation needs no network."""
ASSETS = {
    "/": (PLAYGROUND / "index.html", "text/html; charset=utf-8"),
    "/playground.css": (PLAYGROUND / "playground.css", "text/css; charset=utf-8"),
    "/playground.js": (PLAYGROUND / "playground.js", "text/javascript; charset=utf-8"),
    "/report.css": (FilePath(report.__file__).parent / "assets" / "report.css", "text/css; charset=utf-8"),
    "/theme.js": (FilePath(report.__file__).parent / "assets" / "theme.js", "text/javascript; charset=utf-8"),
    "/swagger-ui-bundle.js": (SWAGGER / "swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    "/swagger-ui.css": (SWAGGER / "swagger-ui.css", "text/css; charset=utf-8"),
}
OPEN_TO_ALL = {"", *ASSETS, "/health", "/ready", "/metrics", "/docs", "/openapi.json"}
"""Paths that need no key: they reveal nothing about the study and compute nothing."""
SAFE = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in (("4XX", "The request is invalid."), ("5XX", "The server failed."))
}
SORTED = "Defaults to `similarity` with `search`, else to `ms`, with features of classes that the study ignores last."
SaeId = Annotated[str, Path(description="The id of an SAE, as listed by `/v1/saes`.", max_length=200)]
Index = Annotated[int, Path(description="The index of a feature.", ge=0, le=MAX_INDEX)]


class EventStream(StreamingResponse):
    """Server-sent events. The source is closed as soon as the response ends, however it ends."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]  # a generator
            await super().__call__(scope, receive, send)


def create_api(service: Service) -> FastAPI:
    """The API as an ASGI application."""
    app = FastAPI(
        title="sae-ray",
        summary="A LLaVA steered by the features of sparse autoencoders.",
        version="1",
        responses=FAILURES,
        docs_url=None,
        redoc_url=None,
    )
    limits = service.config.limits
    key = api_key(service.config)
    app.add_middleware(
        ApiMiddleware, key=key, open_to_all=OPEN_TO_ALL, max_bytes=limits.body_mb * 1e6, metrics=service.metrics
    )
    # Outermost, since a browser asks for permission without the key, and must be allowed to read errors, too.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=service.config.allowed_origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=("Retry-After", "X-Request-ID"),
    )
    answer_errors(app)
    _add_answers(app, service)
    _add_features(app, service)
    _add_operations(app, service)
    _add_playground(app)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    stream_docs: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }

    @app.post("/v1/chat/completions", response_model=ChatResponse, responses=stream_docs)
    async def complete_chat(request: ChatRequest) -> Any:
        """A chat completion, with or without steering. With `stream` it is sent as server-sent events."""
        completion = service.check(request)
        if request.stream:
            return await _stream(service, completion)
        answers = await _complete(service, completion)
        choices = [
            Choice(
                index=index,
                message=Reply(content=answer.text),
                finish_reason=answer.finish,
                logprobs=completion.logprobs(answer.scored),
                steering_type=kind,
            )
            for index, (answer, kind) in enumerate(zip(answers, completion.types, strict=True))
        ]
        return ChatResponse(
            id=f"chatcmpl-{completion.id}",
            created=completion.created,
            model=service.model,
            choices=choices,
            usage=completion.usage,
        )

    @app.post("/v1/steer")
    async def steer(request: SteerRequest) -> SteerResponse:
        """Asks one question about one image and returns the most likely answer, with features edited."""
        completion = service.check(request.chat(), image_names=["image"])
        answers = await _complete(service, completion)
        return SteerResponse(
            answers=[
                Answer(steering_type=kind, text=answer.text)
                for answer, kind in zip(answers, completion.types, strict=True)
            ],
            usage=completion.usage,
        )


async def _complete(service: Service, completion: Completion) -> list[Whole]:
    try:
        return await collect(service.events(completion), len(completion.types))
    except Exception as error:
        raise as_api_error(error) from error


async def _stream(service: Service, completion: Completion) -> Response:
    """Starts the response with the first event, so that earlier failures get an error status."""
    events = service.events(completion)
    try:
        first = await anext(events)
    except BaseException as error:
        await events.aclose()
        if isinstance(error, Exception):
            raise as_api_error(error) from error
        raise
    # Proxies such as nginx would hold the events back.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventStream(_lines(service, completion, first, events), headers=headers)


async def _lines(
    service: Service, completion: Completion, first: Event, events: AsyncGenerator[Event, None]
) -> AsyncGenerator[str, None]:
    base = {"id": f"chatcmpl-{completion.id}", "created": completion.created, "model": service.model}
    options = completion.request.stream_options

    def line(value: Any) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    def of_choice(index: int, delta: dict[str, str], finish: str | None = None, logprobs: Any = None) -> str:
        kind = completion.types[index]
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs, "steering_type": kind}
        return line(chunk(base, [choice]))

    async with aclosing(events):
        try:
            for index in range(len(completion.types)):
                yield of_choice(index, {"role": "assistant", "content": ""})
            event: Event | None = first
            while event is not None:
                if event.text or event.scored:
                    logprobs = completion.logprobs(event.scored)
                    said = {"content": event.text}
                    yield of_choice(event.choice, said, logprobs=None if logprobs is None else logprobs.model_dump())
                if event.finish is not None:
                    yield of_choice(event.choice, {}, event.finish)
                event = await anext(events, None)
        except Exception as error:
            yield line(as_api_error(error).body())
            return
        if options is not None and options.include_usage:
            yield line(chunk(base, [], completion.usage))
        yield "data: [DONE]\n\n"


def _model(service: Service) -> Model:
    facts = service.edit
    if facts is None:
        return Model(id=service.model, created=service.started)
    edit = ModelEdit(sae=PurePath(facts.sae).name, feature=facts.latent, mode=facts.mode, scope=facts.scope)
    return Model(id=service.model, created=service.started, edit=edit)


def _add_features(app: FastAPI, service: Service) -> None:
    def entry_of(sae: str) -> SaeEntry:
        return service.sae(sae)

    def summary_of(entry: SaeEntry, index: int) -> Summary:
        try:
            return entry.summary(index)
        except KeyError:
            message = (
                f"feature {index} of {entry.name} does not exist or never fired; "
                f"the SAE has {entry.n_features} features, listed at /v1/saes/{entry.name}/features"
            )
            raise ApiError(404, "unknown_feature", message, "index") from None

    @app.get("/v1/models")
    async def list_models() -> Models:
        """Lists the model: the LLaVA."""
        return Models(data=[_model(service)])

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Model:
        """Returns the model, if it has this id."""
        service.check_model(model)
        return _model(service)

    @app.get("/v1/saes")
    async def list_saes() -> Saes:
        """Lists the SAEs that can steer the model."""
        return Saes(
            data=[
                Sae(
                    id=entry.name,
                    architecture=entry.train.grid_cell.cell.architecture,
                    d_in=entry.train.activations.width,
                    n_features=entry.n_features,
                    layer=entry.train.grid_cell.site.layer or 0,
                    site=entry.train.grid_cell.site.name,
                )
                for entry in service.saes.values()
            ]
        )

    @app.get("/v1/saes/{sae}/features")
    def list_features(
        sae: SaeId,
        search: Annotated[str | None, Query(max_length=200, description="A text such as `star`.")] = None,
        sort: Annotated[Sort | None, Query(description=SORTED)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        offset: Annotated[int, Query(ge=0, le=MAX_INDEX)] = 0,
    ) -> Features:
        """Lists the features that fired at least once, best first. With `search`, those that match a text."""
        entry = entry_of(sae)
        try:
            found = entry.search(search, sort)
        except Exception as error:
            raise as_api_error(error) from error
        return Features(data=[_summary(one) for one in found[offset : offset + limit]], total=len(found))

    @app.get("/v1/saes/{sae}/features/{index}")
    def get_feature(request: Request, sae: SaeId, index: Index) -> FeatureDetail:
        """Returns a feature's scores, histogram, name and top images."""
        entry = entry_of(sae)
        summary = _summary(summary_of(entry, index))
        base = f"{request.scope.get('root_path', '')}/v1/saes/{sae}/features/{index}/images"
        images = [TopImage(**top._asdict(), url=f"{base}/{top.rank}") for top in entry.top(index)]
        return FeatureDetail(**summary.model_dump(), histogram=entry.bins(index), images=images)  # type: ignore[arg-type]

    @app.get(
        "/v1/saes/{sae}/features/{index}/images/{rank}",
        response_class=Response,
        responses={200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    def get_image(sae: SaeId, index: Index, rank: Annotated[int, Path(ge=0, le=MAX_INDEX)]) -> Response:
        """Returns a thumbnail of a top image."""
        try:
            picture = entry_of(sae).picture(index, rank)
        except (BadImage, OSError) as error:
            raise ApiError(404, "unknown_image", f"the image can no longer be read ({error})", "rank") from error
        if picture is None:
            raise ApiError(404, "unknown_image", f"feature {index} has no top image of rank {rank}", "rank")
        return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    @app.post("/v1/features/inspect")
    async def inspect(request: InspectRequest) -> Inspection:
        """Returns the most active features of an image, and where they fire in it."""
        try:
            entry, look = await service.inspect(request.image, request.sae, request.limit)
        except Exception as error:
            raise as_api_error(error) from error
        return Inspection(
            sae=entry.name,
            image=as_data_url(look.pixels),
            data=[
                ActiveFeature(
                    **_summary(summary_of(entry, one.latent)).model_dump(),
                    strongest=float(one.patches.max()),
                    heat=one.patches.tolist(),
                )
                for one in look.active
                if one.latent in entry.concepts
            ],
        )


def _summary(one: Summary) -> FeatureSummary:
    return FeatureSummary(
        index=one.concept.latent,
        name=one.name and one.name.name,
        name_method=one.name and one.name.method,
        name_score=one.name and one.name.score,
        label=one.label,
        purity=one.concept.purity,
        ms=one.ms,
        frequency=one.concept.frequency,
        max_token=one.concept.max_token,
        n_images=one.n_images,
        similarity=one.similarity,
    )


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Succeeds if this replica is running."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Succeeds if the vision tower and the language model respond."""
        if not await service.ready():
            raise ApiError(503, "not_ready", "the vision tower or the language model does not respond yet; retry later")
        return {"status": "ready"}

    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", response_class=Response, responses=text)
    async def metrics() -> Response:
        """Returns this replica's metrics in Prometheus format."""
        return Response(service.metrics.text(), headers={"Content-Type": service.metrics.content_type})


def _add_playground(app: FastAPI) -> None:
    def add(route: str, file: FilePath, media_type: str) -> None:
        content = file.read_bytes()

        @app.get(route, include_in_schema=False)
        async def asset() -> Response:
            return Response(content, headers=SAFE | {"Content-Type": media_type, "Cache-Control": "no-cache"})

    for route, (file, media_type) in ASSETS.items():
        add(route, file, media_type)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        # Relative addresses, which also hold behind a prefix.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="sae-ray",
            swagger_js_url="swagger-ui-bundle.js",
            swagger_css_url="swagger-ui.css",
            swagger_favicon_url="data:,",
        )
