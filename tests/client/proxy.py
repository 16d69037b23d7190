"""A TCP proxy that does to connections what networks do."""

import asyncio
import contextlib
import socket
import struct
import threading
import time

_CHUNK_BYTES = 65536
_PACE_S = 0.01  # how finely the bandwidth is kept


class FaultyProxy:
    """Listens on a free port in front of a server; a context manager. Faults may be changed at any time.

    target: where new connections lead, (host, port).
    delay_s: how much later everything arrives, each way.
    bytes_per_s: the bandwidth of each connection, each way; None for no limit.
    accepted, open: connections so far and now; resets: those that were reset on purpose.
    to_server, to_client: bytes passed on.
    """

    def __init__(self, target_port, *, target_host="127.0.0.1", delay_s=0.0, bytes_per_s=None):
        self.target = target_host, target_port
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.accepted = self.resets = self.to_server = self.to_client = 0
        self._connections = set()
        self._reset_after = {}  # direction: bytes left
        self._listener = self._accepting = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._thread.start()
        self.port = 0
        self._do(self._start)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def address(self):
        """For a client."""
        return f"127.0.0.1:{self.port}"

    @property
    def open(self):
        return len(self._connections)

    def hang(self):
        """Accept, but pass nothing on, and connect to no server; what arrives is kept until `resume`."""
        self._do(self._flowing.clear)

    def resume(self):
        self._do(self._flowing.set)

    def reset(self):
        """Reset all connections at once (RST, by SO_LINGER 0), on both sides."""

        def reset():
            for connection in list(self._connections):
                connection.reset()

        self._do(reset)

    def reset_after(self, count, direction="to_server"):
        """Reset the connection over which the byte after the next `count` in a direction would pass.

        direction: "to_server" or "to_client".
        """
        if direction not in ("to_server", "to_client"):
            raise ValueError(f"expected to_server or to_client, got {direction!r}")
        self._do(lambda: self._reset_after.update({direction: count}))

    def refuse(self):
        """Refuse new connections: nobody listens. Those that are open stay."""
        self._do(self._stop_listening)

    def reopen(self):
        """Listen again, on the same port."""
        self._do(self._listen)

    def wait_until(self, holds, timeout_s=20.0):
        """Wait until `holds()`; raises TimeoutError."""
        end = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > end:
                raise TimeoutError(
                    f"still not after {timeout_s:g} s, with {self.accepted} accepted, {self.open} open"
                )
            time.sleep(0.005)

    def close(self):
        """Reset everything and end."""
        if self._loop.is_closed():
            return
        self._do(self._stop_listening)
        self.reset()
        self.wait_until(lambda: not self.open)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, action):
        async def run():
            result = action()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)

    def _start(self):
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._listen()

    def _listen(self):
        if self._listener is not None:
            return
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = self._loop.create_task(self._accept(self._listener))

    async def _stop_listening(self):
        if self._listener is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
            self._listener.close()
            self._listener = None

    async def _accept(self, listener):
        while True:
            client, _ = await self._loop.sock_accept(listener)
            client.setblocking(False)
            self.accepted += 1
            connection = _Connection(self, client)
            self._connections.add(connection)
            connection.task = self._loop.create_task(connection.run())


class _Connection:
    """Two sockets, and what is on its way between them."""

    def __init__(self, proxy, client):
        self._proxy, self._client, self._server = proxy, client, None
        self._loop = proxy._loop
        self.task = None
        self._was_reset = False

    def reset(self):
        if not self._was_reset:
            self._was_reset = True
            self._proxy.resets += 1
            self.task.cancel()

    async def run(self):
        try:
            requests = asyncio.Queue()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(self._client, requests))
                await self._wait(self._loop.time())
                self._server = socket.socket()
                self._server.setblocking(False)
                await self._loop.sock_connect(self._server, self._proxy.target)
                self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answers = asyncio.Queue()
                tasks.create_task(self._read(self._server, answers))
                tasks.create_task(self._write(self._server, requests, "to_server"))
                tasks.create_task(self._write(self._client, answers, "to_client"))
        except* (OSError, _ResetNowError):
            self._was_reset = True  # one side is gone: so is the other
        except* asyncio.CancelledError:
            pass
        finally:
            for end in (self._client, self._server):
                if end is not None:
                    if self._was_reset:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.close()
            self._proxy._connections.discard(self)

    async def _read(self, source, queue):
        while True:
            content = await self._loop.sock_recv(source, _CHUNK_BYTES)
            queue.put_nowait((self._loop.time(), content))
            if not content:
                return

    async def _write(self, sink, queue, direction):
        proxy = self._proxy
        while True:
            arrived, content = await queue.get()
            await self._wait(arrived)
            if not content:
                sink.shutdown(socket.SHUT_WR)
                return
            while content:
                piece = content
                if proxy.bytes_per_s:
                    piece = piece[: max(1, round(proxy.bytes_per_s * _PACE_S))]
                if (left := proxy._reset_after.get(direction)) is not None:
                    piece = piece[:left]
                    proxy._reset_after[direction] = left - len(piece)
                if not piece:
                    del proxy._reset_after[direction]
                    proxy.resets += 1
                    raise _ResetNowError
                if proxy.bytes_per_s:
                    await asyncio.sleep(len(piece) / proxy.bytes_per_s)
                await self._loop.sock_sendall(sink, piece)
                setattr(proxy, direction, getattr(proxy, direction) + len(piece))
                content = content[len(piece) :]

    async def _wait(self, arrived):
        while (left_s := arrived + self._proxy.delay_s - self._loop.time()) > 0:
            await asyncio.sleep(left_s)
        await self._proxy._flowing.wait()


class _ResetNowError(Exception):
    """The moment for which `reset_after` asked."""
