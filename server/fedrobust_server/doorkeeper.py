"""Stands before every call, before it is known whose it is: time limits in, refusals out."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from fedrobust_server.limits import Limits, Slots, due, prompt
from fedrobust_server.reception import BarredError, DeniedError, LeavingError
from fedrobust_server.refusals import MalformedError, RefusedError, StalledError

LOG = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_GONE = "a caller was gone before it was answered"
"""It has hung up: nobody is there to be told anything."""


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Bounds how long a caller may take to say what it wants, and turns refusals into statuses.

    gRPC itself would wait for ever for the message of a call that has begun. So calls with one message
    are served as streams of one, which is the same on the wire, and the message is waited for here.
    """

    def __init__(self, service: str, limits: Limits) -> None:
        """Keep these limits.

        Args:
            service: full name of the one whose calls carry sessions; calls of others are strangers'.
            limits: for everybody.
        """
        self._ours, self._limits = f"/{service}/", limits
        each = max(1, limits.strangers // 2)  # no address leaves none to the others
        self._strangers = Slots("health or reflection calls", limits.strangers, each)
        self._arriving = Slots(
            "calls that have not said whose they are", limits.calls, limits.arriving_per_address
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of a call."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC says so
            return handler
        stranger = not handler_call_details.method.startswith(self._ours)
        serve = _behaviour(handler)

        async def one(messages: AsyncIterator[Any], context: Context) -> Any:  # noqa: ANN401 (any message)
            async with self._attended(context, stranger=stranger) as named:
                return await serve(await self._request(handler, messages, named), context)

        async def many(messages: AsyncIterator[Any], context: Context) -> None:
            async with self._attended(context, stranger=stranger) as named:
                answers = serve(await self._request(handler, messages, named), context)
                if inspect.isawaitable(answers):  # it writes to the context by itself
                    await answers
                    return
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        await self._send(context, answer)

        wrap = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        wrapped: Handler = wrap(
            many if handler.response_streaming else one,
            partial(_weighed, handler.request_deserializer),
            handler.response_serializer,
        )
        return wrapped

    async def _request(
        self, handler: Handler, messages: AsyncIterator[Any], named: Callable[[], None]
    ) -> Any:  # noqa: ANN401
        """What a handler is called with: a stream, or its one message; `named` once that has come."""
        if handler.request_streaming:
            return _announced(prompt(messages, self._limits), named)
        weighed = await due(messages, self._limits.message_timeout)
        named()
        if weighed is None:
            raise MalformedError("the call ended without its message")
        return weighed[0]

    async def _send(self, context: Context, answer: Any) -> None:  # noqa: ANN401 (any message)
        """Answer, if the caller takes it: what waits to be sent keeps a model in memory."""
        try:
            async with asyncio.timeout(self._limits.message_timeout):  # as in `due`
                await context.write(answer)
        except TimeoutError:
            raise StalledError(
                f"no answer was taken for {self._limits.message_timeout:g} seconds"
            ) from None

    @contextlib.asynccontextmanager
    async def _attended(self, context: Context, *, stranger: bool) -> AsyncIterator[Callable[[], None]]:
        """Tell the caller why it is refused; keep to ourselves what has broken on our side.

        Gives what is to be called when the call has said whose it is.
        """
        try:
            if stranger:
                take(self._strangers, _address(context.peer()), context)
            with contextlib.ExitStack() as arriving:
                arriving.callback(self._arriving.take(_address(context.peer())))
                yield arriving.close
        except RefusedError as error:
            await _abort(context, error.code, str(error))
        except BarredError as error:
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, str(error))
        except DeniedError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except LeavingError as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except grpc.aio.InternalError:
            LOG.debug(_GONE)
        except grpc.aio.BaseError:  # aborted
            raise
        except Exception:
            LOG.exception("a call broke the server's code")
            await _abort(context, grpc.StatusCode.INTERNAL, "the server failed; its log says how")


async def _abort(context: Context, code: grpc.StatusCode, why: str) -> None:
    try:
        await context.abort(code, why)
    except grpc.aio.InternalError:
        LOG.debug(_GONE)


def take(slots: Slots, holder: str, context: Context) -> None:
    """Take a slot until the call is over: later than its handler, if the caller will not hear its end.

    Raises:
        ExhaustedError: none is free.
    """
    release = slots.take(holder)
    # The stubs ask for an instance of a class that exists in them alone.
    context.add_done_callback(lambda _: release())  # type: ignore[arg-type]


async def _announced(
    messages: AsyncGenerator[Any, None], named: Callable[[], None]
) -> AsyncGenerator[Any, None]:
    """A stream that says so when its first message has come."""
    async with contextlib.aclosing(messages):
        async for message in messages:
            named()
            yield message


def _address(peer: str) -> str:
    """The address of a peer, as gRPC names it, without the port."""
    return peer.rpartition(":")[0]


def _weighed(read: Callable[[bytes], Any] | None, data: bytes) -> tuple[Any, int]:
    """A message and its size on the wire."""
    try:
        return read(data) if read else data, len(data)
    except DecodeError:
        raise MalformedError("the message cannot be read; is the client of another version?") from None


def _behaviour(handler: Handler) -> Any:  # noqa: ANN401 (one of four functions)
    behaviours = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(serve for serve in behaviours if serve is not None)
