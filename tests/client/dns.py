"""A DNS server whose answers a test changes."""

import errno
import socketserver
import threading

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class FakeDns:
    """Answers A queries over UDP and TCP on a free port of 127.0.0.1; a context manager.

    addresses: the IPv4 addresses by name, to be changed by the test; time to live 0. Every other type, AAAA
        among them, has no records, and every other name does not exist.
    failing: whether every query is answered with SERVFAIL.
    queries: what was asked, as (name, type), such as ("flowers.test", "A").
    """

    def __init__(self, addresses):
        self.addresses = {name: list(found) for name, found in addresses.items()}
        self.failing = False
        self.queries = []
        self._tcp, self._udp = self._listen()
        self.port = self._tcp.server_address[1]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            for server in (self._udp, self._tcp)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def target(self, name, port):
        """For a gRPC client: this name at this port, asked of this server and no other.

        Source: https://github.com/grpc/grpc/blob/master/doc/naming.md; an authority is heeded by c-ares only.
        """
        return f"dns://127.0.0.1:{self.port}/{name}:{port}"

    def close(self):
        for server in (self._udp, self._tcp):
            server.shutdown()
            server.server_close()
        for thread in self._threads:
            thread.join()

    def _listen(self):
        while True:
            tcp = _Tcp(("127.0.0.1", 0), self)
            try:
                return tcp, _Udp(tcp.server_address, self)
            except OSError as error:
                tcp.server_close()
                if error.errno != errno.EADDRINUSE:
                    raise
                # The port is free for TCP only: take another.

    def answer(self, request):
        """A query's answer, both as on the wire."""
        query = dns.message.from_wire(request)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True).lower()
        self.queries.append((name, dns.rdatatype.to_text(question.rdtype)))
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA
        if self.failing:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif name not in self.addresses:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif question.rdtype == dns.rdatatype.A and self.addresses[name]:
            response.answer.append(dns.rrset.from_text(question.name, 0, "IN", "A", *self.addresses[name]))
        return response.to_wire()


class _Server:
    daemon_threads = True

    def __init__(self, address, owner):
        super().__init__(address, self.handler)
        self.owner = owner


class _UdpHandler(socketserver.BaseRequestHandler):
    def handle(self):
        request, socket = self.request
        socket.sendto(self.server.owner.answer(request), self.client_address)


class _TcpHandler(socketserver.StreamRequestHandler):
    def handle(self):
        while length := self.rfile.read(2):
            answer = self.server.owner.answer(self.rfile.read(int.from_bytes(length)))
            self.wfile.write(len(answer).to_bytes(2) + answer)


class _Udp(_Server, socketserver.ThreadingUDPServer):
    handler = _UdpHandler


class _Tcp(_Server, socketserver.ThreadingTCPServer):
    allow_reuse_address = True  # for UDP that would share a port that somebody has
    handler = _TcpHandler
