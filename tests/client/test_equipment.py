"""The proxy and the DNS server that other tests rely on do what they say."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import dns.message
import dns.query
import dns.rcode
import pytest

from graftserve.client import Client, DeadlineExceededError, RetryPolicy, UnavailableError
from graftserve.client.testing import FakeServer
from tests.client.dns import FakeDns
from tests.client.proxy import FaultyProxy

ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
def echo():
    """The port of a server that sends back what it gets."""

    def serve(connection):
        with connection:
            try:
                while content := connection.recv(65536):
                    connection.sendall(content)
            except OSError:
                return

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.fixture
def proxy(echo):
    with FaultyProxy(echo) as proxy:
        yield proxy


def connect(proxy):
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)


def ask(connection, content):
    connection.sendall(content)
    received = b""
    while len(received) < len(content):
        part = connection.recv(65536)
        assert part
        received += part
    return received


def drain(connection):
    while connection.recv(65536):
        pass


# The proxy


def test_bytes_pass_unchanged_and_are_counted(proxy):
    content = bytes(range(256)) * 5000
    with ThreadPoolExecutor(1) as pool, connect(proxy) as connection:
        sending = pool.submit(connection.sendall, content)
        received = b""
        while len(received) < len(content):
            received += connection.recv(65536)
        sending.result(20)
        assert received == content
        assert (proxy.accepted, proxy.open, proxy.resets) == (1, 1, 0)
        assert proxy.to_server == proxy.to_client == len(content)
    proxy.wait_until(lambda: proxy.open == 0)


def test_closing_one_way_leaves_the_other_open(proxy):
    with connect(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(100):
            received += part
        assert received == b"last words"


def test_a_delay_counts_each_way(proxy):
    with connect(proxy) as connection:
        ask(connection, b"warm")
        proxy.delay_s = 0.15
        begin = time.monotonic()
        assert ask(connection, b"slow") == b"slow"
        assert time.monotonic() - begin >= 0.3


def test_bandwidth_is_bounded(proxy):
    proxy.bytes_per_s = 100_000
    with connect(proxy) as connection:
        begin = time.monotonic()
        ask(connection, bytes(30_000))
        assert time.monotonic() - begin >= 0.3


def test_hanging_keeps_what_comes_until_it_goes_on(proxy):
    with connect(proxy) as before:
        ask(before, b"warm")
        proxy.hang()
        with connect(proxy) as during:
            for connection in (before, during):
                connection.sendall(b"hello")
                connection.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    connection.recv(10)
                connection.settimeout(20)
            assert (proxy.accepted, proxy.open) == (2, 2)
            assert proxy.to_server == 4
            proxy.resume()
            assert before.recv(10) == during.recv(10) == b"hello"


def test_a_reset_is_a_reset(proxy):
    with connect(proxy) as one, connect(proxy) as other:
        ask(one, b"a")
        ask(other, b"b")
        proxy.reset()
        for connection in (one, other):
            with pytest.raises(ConnectionResetError):
                connection.recv(10)
        assert proxy.resets == 2
    with connect(proxy) as connection:
        assert ask(connection, b"again") == b"again"


@pytest.mark.parametrize(("direction", "there", "back"), [("to_server", 7, 7), ("to_client", 20, 7)])
def test_a_reset_in_the_middle_comes_after_so_many_bytes(proxy, direction, there, back):
    with connect(proxy) as connection:
        ask(connection, b"warm")
        proxy.reset_after(7, direction)
        connection.sendall(b"x" * 20)
        with pytest.raises(ConnectionResetError):
            drain(connection)
    proxy.wait_until(lambda: proxy.open == 0)
    assert proxy.to_server == 4 + there
    assert proxy.to_client in range(4, 4 + back + 1)  # what came back for seven bytes may be lost with them
    assert proxy.resets == 1
    with connect(proxy) as connection:
        assert ask(connection, b"y" * 100) == b"y" * 100


def test_refusing_and_reopening_the_port(proxy):
    with connect(proxy) as connection:
        ask(connection, b"warm")
        port = proxy.port
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert ask(connection, b"still") == b"still"
        proxy.reopen()
        assert proxy.port == port
        with connect(proxy) as another:
            assert ask(another, b"new") == b"new"


def test_a_target_that_is_not_there_is_a_reset(proxy, echo):
    proxy.target = "127.0.0.1", 1

    def use():
        with connect(proxy) as connection:
            drain(connection)

    with pytest.raises(ConnectionResetError):  # from whichever of the two it reaches
        use()
    proxy.target = "127.0.0.1", echo
    with connect(proxy) as connection:
        assert ask(connection, b"back") == b"back"


def test_grpc_runs_through_it():
    with (
        FakeServer(answer=lambda image: "one") as one,
        FakeServer(answer=lambda image: "two") as two,
        FaultyProxy(one.port) as proxy,
        Client(proxy.address, "flowers", retry=ONCE) as client,
    ):
        assert client.classify(b"a").label == "one"
        proxy.hang()
        with pytest.raises(DeadlineExceededError):
            client.classify(b"a", timeout_s=0.3)
        proxy.resume()
        assert client.classify(b"a").label == "one"
        assert proxy.accepted == 1
        proxy.target = "127.0.0.1", two.port
        assert client.classify(b"a").label == "one"  # the connection is the old one
        proxy.reset_after(1000)
        with pytest.raises(UnavailableError):
            client.classify(b"a" * 2000)
        client.wait_until_ready(20)  # until gRPC has noticed that the connection is gone
        assert client.classify(b"a").label == "two"
        assert proxy.accepted == 2


# The DNS server


@pytest.mark.parametrize("ask", [dns.query.udp, dns.query.tcp], ids=["UDP", "TCP"])
def test_names_are_resolved_as_the_test_says(ask):
    with FakeDns({"flowers.test": ["127.0.0.1", "127.0.0.2"]}) as server:

        def resolve(name, kind="A"):
            answer = ask(dns.message.make_query(name, kind), "127.0.0.1", port=server.port, timeout=20)
            return answer.rcode(), sorted(item.to_text() for rrset in answer.answer for item in rrset)

        assert resolve("flowers.test") == (dns.rcode.NOERROR, ["127.0.0.1", "127.0.0.2"])
        assert resolve("FLOWERS.test", "AAAA") == (dns.rcode.NOERROR, [])
        assert resolve("other.test") == (dns.rcode.NXDOMAIN, [])
        server.addresses["flowers.test"] = ["127.0.0.3"]
        assert resolve("flowers.test") == (dns.rcode.NOERROR, ["127.0.0.3"])
        server.addresses["flowers.test"] = []
        assert resolve("flowers.test") == (dns.rcode.NOERROR, [])
        server.failing = True
        assert resolve("flowers.test") == (dns.rcode.SERVFAIL, [])
        assert server.queries[:2] == [("flowers.test", "A"), ("flowers.test", "AAAA")]


def test_grpc_finds_servers_by_it():
    with (
        FakeServer(answer=lambda image: "one") as one,
        FakeServer(answer=lambda image: "two", host="127.0.0.2", port=one.port) as two,
        FakeDns({"flowers.test": ["127.0.0.1"]}) as names,
        Client(names.target("flowers.test", one.port), "flowers", timeout_s=30) as client,
    ):
        assert client.classify(b"a").label == "one"
        assert ("flowers.test", "A") in names.queries
        names.addresses["flowers.test"] = ["127.0.0.2"]
        one.stop()  # a connection that ends has the name looked up again
        client.wait_until_ready(30)
        assert client.classify(b"a").label == "two"
        assert two.images
