"""An AsyncClient behind Client's interface, so that one suite tests both."""

import asyncio
import threading

from graftserve.client import AsyncClient


class AsyncInThread:
    """Runs an event loop in a thread of its own; every method waits for the coroutine of that name."""

    def __init__(self, *arguments, **settings):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._client = self._run(self._make(arguments, settings))
        except BaseException:
            self._stop()
            raise

    async def _make(self, arguments, settings):
        return AsyncClient(*arguments, **settings)

    def __getattr__(self, name):
        method = getattr(self._client, name)
        return lambda *arguments, **settings: self._run(method(*arguments, **settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
        self._stop()

    def __repr__(self):
        return repr(self._client)

    def close(self):
        self._run(self._client.close())

    def stats(self):
        return self._client.stats()

    def stream(self, images, **settings):
        return self._iterate(self._client.stream(images, **settings))

    def stream_as_completed(self, images, **settings):
        return self._iterate(self._client.stream_as_completed(images, **settings))

    def _iterate(self, results):
        try:
            while True:
                try:
                    yield self._run(anext(results))
                except StopAsyncIteration:
                    return
        finally:
            self._run(results.aclose())

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
