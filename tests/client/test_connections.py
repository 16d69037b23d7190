"""How both clients reach servers: names, sockets, TLS, several targets, forks, interceptors."""

import gc
import inspect
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trustme

from graftserve.client import AsyncClient, Client, InternalError, UnavailableError
from tests.client.async_in_thread import AsyncInThread

EITHER = pytest.mark.parametrize("client_class", [Client, AsyncInThread])


def test_both_clients_have_the_same_methods_and_arguments():
    def public(kind):
        return {
            name: [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in inspect.signature(member).parameters.values()
            ]
            for name, member in inspect.getmembers(kind, callable)
            if not name.startswith("_") or name == "__init__"
        }

    assert public(Client) == public(AsyncClient)
    assert {"classify", "classify_many", "stream", "embed", "predict", "status"} <= set(public(Client))


@EITHER
def test_a_unix_socket(start_server, client_class, tmp_path):
    address = f"unix:{tmp_path}/socket"
    server = start_server(address=address)
    with client_class(address, "flowers") as client:
        assert client.classify(b"abc").label == "c3"
    assert len(server.requests) == 1


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@EITHER
def test_tls_needs_the_servers_authority(start_server, client_class, authority):
    certificate = authority.issue_cert("localhost")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    server = start_server(credentials=grpc.ssl_server_credentials([pair]))
    target = f"localhost:{server.port}"
    trusting = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with client_class(target, "flowers", credentials=trusting) as client:
        assert client.classify(b"abc").label == "c3"
    for credentials in (grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()), None):
        with (
            client_class(target, "flowers", credentials=credentials, timeout_s=20) as client,
            pytest.raises(UnavailableError),
        ):
            client.classify(b"abc")


@EITHER
def test_mutual_tls_shows_the_clients_certificate(start_server, client_class, authority):
    certificate, own = authority.issue_cert("localhost"), authority.issue_cert("client@shop.test")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    root = authority.cert_pem.bytes()
    server = start_server(
        credentials=grpc.ssl_server_credentials([pair], root_certificates=root, require_client_auth=True)
    )
    target = f"localhost:{server.port}"
    credentials = grpc.ssl_channel_credentials(
        root, own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    )
    with client_class(target, "flowers", credentials=credentials) as client:
        assert client.classify(b"abc").label == "c3"
    anonymous = grpc.ssl_channel_credentials(root)
    with (
        client_class(target, "flowers", credentials=anonymous, timeout_s=20) as client,
        pytest.raises(UnavailableError),
    ):
        client.classify(b"abc")


@EITHER
def test_all_addresses_of_a_name_are_asked(start_server, client_class):
    servers = [start_server() for _ in range(3)]
    addresses = ",".join(server.target for server in servers)
    with client_class(f"ipv4:{addresses}", "flowers") as client:
        client.wait_until_ready(20)
        for _ in range(60):
            client.classify(b"abc")
    assert all(len(server.requests) >= 10 for server in servers)


@EITHER
def test_several_targets_share_the_load_and_a_hanging_one_gets_no_more(start_server, client_class):
    servers = [start_server() for _ in range(3)]
    servers[0].hold = threading.Event()
    targets = [server.target for server in servers]
    with (
        client_class(targets, "flowers", max_batch_images=1) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        calls = [pool.submit(client.classify, b"x" * n) for n in range(1, 201)]
        done = [call.result(20).label for call in calls[100:]]
        assert done == [f"c{n % 10}" for n in range(101, 201)]
        assert len(servers[0].requests) < 20
        assert all(len(server.requests) > 50 for server in servers[1:])
        servers[0].hold.set()
        assert [call.result(20).label for call in calls] == [f"c{n % 10}" for n in range(1, 201)]


@EITHER
def test_a_target_that_is_not_there_is_left_alone(start_server, client_class):
    gone = start_server()
    gone.stop()
    server = start_server()
    with client_class([gone.target, server.target], "flowers") as client:
        assert [client.classify(b"x" * n).label for n in range(1, 10)] == [f"c{n}" for n in range(1, 10)]


class _Seen(grpc.UnaryUnaryClientInterceptor):
    def __init__(self):
        self.methods = []

    def intercept_unary_unary(self, continuation, details, request):
        self.methods.append(details.method)
        return continuation(details, request)


class _AsyncSeen(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self):
        self.methods = []

    async def intercept_unary_unary(self, continuation, details, request):
        method = details.method
        self.methods.append(method.decode() if isinstance(method, bytes) else method)
        return await continuation(details, request)


@pytest.mark.parametrize(("client_class", "kind"), [(Client, _Seen), (AsyncInThread, _AsyncSeen)])
def test_interceptors_see_every_request(server, client_class, kind):
    seen = kind()
    with client_class(server.target, "flowers", interceptors=[seen]) as client:
        client.classify(b"abc")
        client.status()
        client.classify_many([b"a"])
    assert [method.rpartition("/")[2] for method in seen.methods] == ["Predict", "GetModelStatus", "Predict"]


class _Broken(grpc.UnaryUnaryClientInterceptor):
    def intercept_unary_unary(self, continuation, details, request):
        raise ValueError("no token")


class _AsyncBroken(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation, details, request):
        raise ValueError("no token")


@pytest.mark.parametrize(("client_class", "kind"), [(Client, _Broken), (AsyncInThread, _AsyncBroken)])
def test_an_interceptor_that_fails_ends_the_call(server, client_class, kind):
    with client_class(server.target, "flowers", interceptors=[kind()]) as client:
        for call in (lambda: client.classify(b"abc"), lambda: client.classify_many([b"a"])):
            with pytest.raises(InternalError):
                call()


def test_an_error_keeps_no_call_of_grpcs(start_server):
    """At the end of a process Python stops gRPC's threads wherever they are. A call that is freed after that
    may wait for ever for a lock which one of them had.
    """
    gone = start_server()
    gone.stop()

    def calls():
        return sum(issubclass(type(item), grpc.Future) for item in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = calls()
        with Client(gone.target, "flowers") as client, pytest.raises(UnavailableError) as caught:
            client.classify_many([b"a"])
        deadline = time.monotonic() + 30
        while calls() > before:  # gRPC's thread may not be through with it yet
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()
    cause = caught.value.__cause__
    assert isinstance(cause, grpc.RpcError)
    assert (cause.code(), cause.details()) == (grpc.StatusCode.UNAVAILABLE, caught.value.details)
    assert str(cause) == f"UNAVAILABLE: {cause.details()}"


@EITHER
def test_channel_options_reach_grpc(server, client_class):
    options = {"grpc.primary_user_agent": "shop/1.0"}
    with client_class(server.target, "flowers", channel_options=options) as client:
        client.classify(b"abc")
    assert dict(server.metadata)["user-agent"].startswith("shop/1.0 ")


FORK = """
import os, sys
from graftserve.client import Client, ClosedError
target = sys.argv[1]
def say(*words):  # in one piece
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())
client = Client(target, "flowers")
{before}
pid = os.fork()
if pid:
    say("parent", client.classify(b"ab").label)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
try:
    client.classify(b"abc")
except ClosedError as error:
    say("child", error)
with Client(target, "flowers", timeout_s=20) as own:
    say("child", own.classify(b"abcd").label)
os._exit(0)
"""


@pytest.mark.parametrize("before", ["", "client.classify(b'a')"], ids=["unused", "used"])
def test_a_fork_gets_a_clear_error_and_can_make_a_client_of_its_own(server, before):
    result = subprocess.run(
        [sys.executable, "-c", FORK.format(before=before), server.target],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "true"},
    )
    assert result.returncode == 0, result.stderr
    lines = sorted(result.stdout.splitlines())
    assert lines[0] == "child c4"
    assert re.search(r"made in process \d+ and cannot be used in its fork \d+: make one there", lines[1])
    assert lines[2] == "parent c2"
