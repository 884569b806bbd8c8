"""OpenAI's HTTP interface in front of a controller, in a process of its own: a client like any other.

Invariant: every request ends with a body or an error in OpenAI's form, and a reader that leaves ends its generation. A
controller that crashes and resumes is a pause here too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import ssl
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from pathlib import Path

from aiohttp import web

import blitzjax
from blitzjax.addresses import check_free, joined
from blitzjax.config import ORIGINS
from blitzjax.errors import BlitzError, InvalidRequest, Unauthenticated, UnknownModel, reason
from blitzjax.serve import access, metrics, openai, replies
from blitzjax.serve.asking import Chunk, Prompt, Result, collect_all
from blitzjax.serve.client import AsyncClient
from blitzjax.serve.origins import Origins, asks_first, granted, origins
from blitzjax.v1 import inference_pb2 as pb

_BODY_BYTES = 64 << 20
_AT_ONCE = 512  # answers of bodies that have many prompts: half of what may wait by default
_SHUTDOWN_S = 30.0  # requests in flight may finish after SIGTERM
_RETRY_AFTER_S = "1"
_ASK_S = 2.0  # for a controller, and between two tries
_OPEN = ("/health", "/ping")  # without the key
_ID = "X-Request-Id"
_log = logging.getLogger("blitzjax.gateway")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """Handlers. Holds nothing but the client, and places for the prompts of bodies that have many."""

    def __init__(self, client: AsyncClient, api_key: str, pages: Collection[str] = ()):
        """`pages`: origins whose pages may call."""
        self._client, self._key, self._started = client, api_key, int(time.time())
        self._origins = Origins(pages, api_key)
        self._places = asyncio.Semaphore(_AT_ONCE)  # first come, first served; a body with one prompt needs none

    def application(self) -> web.Application:
        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[self._answer_errors])
        app.on_response_prepare.append(self._add_headers)
        app.add_routes([
            web.get("/health", self.health), web.get("/ping", self.ping), web.get("/version", self.version),
            web.get("/metrics", self.metrics),
            web.get("/v1/models", self.models), web.get("/v1/models/{name:.+}", self.model),
            web.post("/v1/completions", self.completions), web.post("/v1/chat/completions", self.chat),
            web.post("/tokenize", self.tokenize), web.post("/detokenize", self.detokenize)])
        return app

    async def health(self, request: web.Request) -> web.Response:
        """200 when an instance serves, or a model at zero can have one; 503 otherwise."""
        return web.Response(status=200 if await self._client.ready() else 503)

    async def ping(self, request: web.Request) -> web.Response:
        """200 as long as this process answers."""
        return web.Response()

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": blitzjax.__version__})

    async def metrics(self, request: web.Request) -> web.Response:
        """What the controller's picture tells: gauges, which routers and autoscalers read, and prefix caches."""
        return web.Response(text=metrics.render(await self._client.status(), {}), headers={"Content-Type": metrics.TYPE})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response(replies.models(await self._client.status(), self._started))

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        for known in (await self._client.status()).models:
            if known.name == name:
                return web.json_response(replies.model(known, self._started))
        raise UnknownModel(f"no model {name!r} is served; see /v1/models")

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._reply(request, openai.completion(await _body(request)))

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._reply(request, openai.chat(await _body(request)))

    async def tokenize(self, request: web.Request) -> web.Response:
        prompt, options = openai.tokenize(await _body(request))
        known = await self._client.tokenize(prompt, model=options["model"], tools=options.get("tools", ()))
        return web.json_response({"tokens": list(known.token_ids), "count": len(known.token_ids),
                                  "max_model_len": known.max_model_len})

    async def detokenize(self, request: web.Request) -> web.Response:
        tokens, model = openai.detokenize(await _body(request))
        return web.json_response({"prompt": (await self._client.tokenize(tokens, model=model)).text})

    async def _reply(self, request: web.Request, asked: openai.Asked) -> web.StreamResponse:
        reply = replies.Reply(asked, asked.options.get("model") or await self._first_model(), request.match_info[_ID])
        if asked.stream:
            return await self._stream(request, asked, reply)
        return web.json_response(reply.whole(await self._whole(asked)))

    async def _first_model(self) -> str:
        """What a request without a model gets."""
        models = (await self._client.status()).models
        if not models:
            raise UnknownModel("no model is served; `blitzjax deploy MODEL` adds one")
        return models[0].name

    async def _whole(self, asked: openai.Asked) -> Sequence[Sequence[Result]]:
        chunks: list[list[Chunk]] = [[] for _ in asked.prompts]
        async with contextlib.aclosing(self._chunks(asked)) as arriving:
            async for number, chunk in arriving:
                chunks[number].append(chunk)
        return [collect_all(of_prompt) for of_prompt in chunks]

    async def _stream(self, request: web.Request, asked: openai.Asked, reply: replies.Reply) -> web.StreamResponse:
        """Server-sent events. What fails before the first is an HTTP status; afterwards, an event."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        usages: list[list[pb.Usage]] = [[] for _ in asked.prompts]
        async with contextlib.aclosing(self._chunks(asked)) as arriving:
            try:
                async for number, chunk in arriving:
                    if not response.prepared:
                        await response.prepare(request)
                    if (event := reply.piece(number, chunk)) is not None:
                        await _event(response, event)
                    if chunk.usage is not None:
                        usages[number].append(chunk.usage)
            except ConnectionError:  # the reader left
                raise
            except Exception as e:
                if not response.prepared:
                    raise
                await _event(response, replies.failure(_told(e, request))[1])
            else:
                if asked.include_usage:
                    await _event(response, reply.total(usages))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _chunks(self, asked: openai.Asked) -> AsyncGenerator[tuple[int, Chunk]]:
        """Of the answers to all prompts, as they come, each with its prompt's number. Closing it ends all."""
        queue: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue()
        room = asyncio.Semaphore(max(1, _AT_ONCE // max(1, asked.answers)))
        places = self._places if len(asked.prompts) > 1 else contextlib.nullcontext()

        async def read(number: int, prompt: Prompt) -> None:
            async with room, places:
                async for chunk in self._client.stream(prompt, **asked.options):
                    queue.put_nowait((number, replies.asked_for(chunk, asked)))

        async def read_all() -> None:
            try:
                async with asyncio.TaskGroup() as readers:
                    for number, prompt in enumerate(asked.prompts):
                        readers.create_task(read(number, prompt))
            finally:
                queue.put_nowait(None)

        reading = asyncio.create_task(read_all())
        try:
            while (item := await queue.get()) is not None:
                yield item
            await reading
        except ExceptionGroup as group:  # the first failure cancelled the others
            raise group.exceptions[0] from None
        finally:
            reading.cancel()
            await asyncio.wait([reading])

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Checks the key, names the request and gives every failure OpenAI's form."""
        request.match_info[_ID] = request.headers.get(_ID) or uuid.uuid4().hex
        try:
            if asks_first(request):
                return self._may(request)
            if request.path not in _OPEN:
                access.check(request.headers.get("Authorization", ""), self._key)
            return await handler(request)
        except web.HTTPNotFound:
            return _failed(UnknownModel(f"{request.method} {request.path} is not there"))
        except web.HTTPMethodNotAllowed as e:
            allowed = sorted(e.allowed_methods)
            response = _refused(e, f"{request.path} takes {' and '.join(allowed)}, not {e.method}")
            response.headers["Allow"] = ", ".join(allowed)
            return response
        except web.HTTPRequestEntityTooLarge as e:
            return _refused(e, f"a body may have {_BODY_BYTES >> 20} MiB; send less at once")
        except web.HTTPException as e:
            return _refused(e, e.reason)
        except ConnectionError:  # the reader left
            raise
        except Exception as e:
            return _failed(_told(e, request))

    def _may(self, request: web.Request) -> web.Response:
        """Raises HTTPForbidden."""
        origin = request.headers["Origin"]
        if not self._origins.may(origin):
            raise web.HTTPForbidden(reason="pages of this origin may not call; name it with --allowed-origins "
                                           "(serve.allowed_origins)")
        return web.Response(status=204, headers=granted(request))

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """To every answer, just before it begins."""
        response.headers[_ID] = request.match_info[_ID]
        response.headers.update(self._origins.headers(request.headers.get("Origin", "")))


def _told(error: Exception, request: web.Request) -> BlitzError:
    """What the caller hears of it: of a bug in here only where to look."""
    if isinstance(error, BlitzError):
        return error
    name = request.match_info[_ID]
    _log.error("request %s failed", name, exc_info=error)
    return BlitzError(f"the server failed; its log says more about request {name}")


def _failed(error: BlitzError) -> web.Response:
    status, body = replies.failure(error)
    headers = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else None
    return web.json_response(body, status=status, headers=headers)


def _refused(error: web.HTTPException, message: str) -> web.Response:
    """What has a status of HTTP's own."""
    return web.json_response({"error": {"message": message, "type": "invalid_request_error", "param": None,
                                        "code": error.status}}, status=error.status)


async def _body(request: web.Request) -> openai.JSON:
    if "Origin" in request.headers and request.content_type != "application/json":  # a browser would not ask first
        raise web.HTTPUnsupportedMediaType(reason="a page has to send a Content-Type of application/json")
    try:
        return await request.json()
    except (ValueError, LookupError, RecursionError, web.RequestPayloadError) as e:  # LookupError: in an encoding that is none
        raise InvalidRequest(f"the body is not JSON: {e}") from e


async def _event(response: web.StreamResponse, body: openai.JSON) -> None:
    await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")


async def run(args: argparse.Namespace, api_key: str, tls: ssl.SSLContext | None) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is in flight. Raises OSError if the port is taken."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncClient(args.address, api_key=api_key, cacert=args.cacert) as client:
        runner = web.AppRunner(Gateway(client, api_key, args.allowed_origins).application(), handler_cancellation=True,
                               access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, args.host, args.port, ssl_context=tls).start()
            where = joined(args.host, runner.addresses[0][1])
            with contextlib.suppress(OSError):  # a full disk
                print(f"OpenAI's interface to {args.address}: {'https' if tls else 'http'}://{where}/v1", flush=True)
            await _until(stopping, client)
        finally:
            await runner.cleanup()


async def _until(stopping: asyncio.Event, client: AsyncClient) -> None:
    """Raises Unauthenticated if the controller, as soon as it answers, does not take our key."""
    introduction, stop = (asyncio.ensure_future(waiting) for waiting in (_introduce(client), stopping.wait()))
    try:
        await asyncio.wait({introduction, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            introduction.result()
        await stop
    finally:
        introduction.cancel()
        stop.cancel()


async def _introduce(client: AsyncClient) -> None:
    said = ""
    while True:
        try:
            await client.status(_ASK_S)
            return
        except Unauthenticated:
            raise
        except BlitzError as e:
            if str(e) != said:
                _log.warning("%s; requests fail until a controller answers there", e)
            said = str(e)
        await asyncio.sleep(_ASK_S)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="blitzjax gateway", description="OpenAI's HTTP interface in front of a controller.",
                                     epilog="With BLITZJAX_API_KEY in the environment, callers must send that key, and the "
                                            "controller gets it.")
    parser.add_argument("--address", default="127.0.0.1:50051", metavar="HOST:PORT",
                        help="the controller (default 127.0.0.1:50051); grpcs://HOST:PORT over TLS")
    parser.add_argument("--host", default="127.0.0.1", help="listen here")
    parser.add_argument("--port", type=int, default=8000, help="listen here (default 8000; 0: any free port)")
    parser.add_argument("--cacert", type=Path, metavar="FILE", help="who signed the controller's certificate, PEM")
    parser.add_argument("--ssl-certfile", default="", metavar="FILE", help="certificate, PEM: HTTPS instead of HTTP")
    parser.add_argument("--ssl-keyfile", default="", metavar="FILE", help="its key, PEM")
    parser.add_argument("--allowed-origins", type=origins, default=(), metavar="JSON",
                        help=f"whose web pages may call, as {ORIGINS} (default: any if there is a key, else none)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        check_free(joined(args.host, args.port))
        asyncio.run(run(args, access.api_key(), access.server_context(args.ssl_certfile, args.ssl_keyfile)))
    except BlitzError as e:
        print(f"blitzjax gateway: {e}", file=sys.stderr)
        return 2
    except OSError as e:  # somebody else was quicker
        print(f"blitzjax gateway: cannot listen on {joined(args.host, args.port)}: {reason(e)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
