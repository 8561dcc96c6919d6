"""A TCP proxy that breaks what passes through it: latency, bandwidth, slices, silence, resets."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close() sends RST


@dataclass
class Toxics:
    """What is done to the bytes of both directions; may be changed at any time."""

    latency: float = 0.0
    """Seconds that each piece waits."""
    bandwidth: float = 0.0
    """Bytes a second; 0 for no limit."""
    slice: int = 0
    """Bytes of a piece at most; 0 for as they come."""
    frozen: bool = False
    """Nothing passes, nothing is closed: a partition that drops packets."""
    refuse: bool = False
    """New connections are reset at once."""


class FaultProxy:
    """Listens on a port of 127.0.0.1 and passes on to `target`, in a thread of its own.

    TLS hides what the bytes mean. `on_client_bytes` sees how many the client has sent on a connection; it may raise
    ConnectionResetError to cut that connection, after the bytes were passed on or before.
    """

    def __init__(self, target: int) -> None:
        """Take the port to pass on to."""
        self.toxics = Toxics()
        self.connections = 0
        self.port = 0
        self.swallow_answers: Callable[[], bool] = lambda: False
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    def start(self) -> "FaultProxy":
        """Listen."""
        self._thread.start()
        self._call(self._listen())
        return self

    def stop(self) -> None:
        """Reset all connections and listen no more."""
        self.toxics = Toxics(refuse=True)
        self.reset()
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def reset(self) -> None:
        """Reset every connection."""
        self._call(self._reset())

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reset(self) -> None:
        for writer in list(self._writers):
            _abort(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.toxics.refuse:
            _abort(writer)
            return
        self.connections += 1
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _abort(writer)
            return
        self._writers.add(back)
        await asyncio.gather(self._pump(reader, back, answers=False), self._pump(there, writer, answers=True))
        self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        try:
            while data := await reader.read(self.toxics.slice or 65536):
                if self.toxics.latency:
                    await asyncio.sleep(self.toxics.latency)
                if self.toxics.bandwidth:
                    await asyncio.sleep(len(data) / self.toxics.bandwidth)
                while self.toxics.frozen:
                    await asyncio.sleep(0.05)
                if answers and self.swallow_answers():
                    await self._reset()  # the client never learns what became of what it asked for
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # a client that was killed: its transaction must end with it, or its successor waits for the locks
        finally:
            writer.close()

    def _call(self, coroutine: Any) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        future.result(10)


def _abort(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


@contextmanager
def fault_proxy(target: int) -> Iterator[FaultProxy]:
    """Run a proxy for a port."""
    proxy = FaultProxy(target).start()
    try:
        yield proxy
    finally:
        proxy.stop()
