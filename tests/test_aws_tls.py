"""TLS: the CA bundle is loaded once per client, and every certificate is verified as before, also behind a proxy."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from botocore.exceptions import ProxyConnectionError, SSLError
from botocore.httpsession import get_cert_path
from conftest import Program, Serve
from endpoint import TIMEOUT, account, key, user

import iam_audit

ONE = "1" * 12
USERS = [user(f"user-{n}", keys=[key(f"AKIA{n:016}")]) for n in range(12)]
OURS, OTHERS = trustme.CA(), trustme.CA()  # only the first is in the CA bundle
Address = tuple[str, int]


class Relay:
    """Hands connections on to `target`, or as a proxy to what CONNECT names; speaks TLS if it has certificates.

    The first connection gets the first certificate, and so on; the last is for all others. `began` is called at the
    beginning of each.
    """

    def __init__(
        self, target: Address | None, *certificates: ssl.SSLContext, began: Any = lambda: None
    ) -> None:
        self.target, self.certificates, self.began = target, certificates, began
        self.opened, self.connects = 0, list[str]()
        self.carried = set[int]()  # the connections on which something was sent, from 1
        self.sockets, self.threads = list[socket.socket](), list[threading.Thread]()
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                client, _ = self.listening.accept()
                self.opened += 1
                self.began()
                self._start(self._serve, client, self.opened)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        self.threads.append(threading.Thread(target=work, args=args, daemon=True))
        self.threads[-1].start()

    def _serve(self, client: socket.socket, number: int) -> None:
        self.sockets.append(client)
        with contextlib.suppress(OSError):  # whoever refuses the certificate closes
            if self.certificates:
                context = self.certificates[min(number, len(self.certificates)) - 1]
                client = context.wrap_socket(client, server_side=True)
                self.sockets.append(client)
            server = socket.create_connection(self.target or self._connect(client))
            self.sockets.append(server)
            self._start(pump, server, client, lambda: None)
            pump(client, server, lambda: self.carried.add(number))

    def _connect(self, client: socket.socket) -> Address:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        method, target, *_ = head.decode().split()
        self.connects.append(f"{method} {target}")
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return address_of(f"//{target}")

    def drop(self) -> None:
        """Close the connections that are open; at the end both sides know it."""
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(TIMEOUT)
        self.sockets.clear()


def pump(source: socket.socket, sink: socket.socket, arrived: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            arrived()
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


def address_of(url: str) -> Address:
    host, _, port = url.partition("//")[2].rpartition(":")
    return host, int(port)


def certificate(name: str, authority: trustme.CA = OURS) -> ssl.SSLContext:
    """The TLS of a server with this name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


class Network:
    """An organization of one account, and what lies between it and the program."""

    def __init__(self, serve: Serve, bundle: Path) -> None:
        self.endpoint, self.bundle = serve(account(ONE, "one", users=USERS), latency=0.02), bundle
        self.relays = list[Relay]()
        # The SDK's own bundle, with our authority at its end
        bundle.write_bytes(Path(str(get_cert_path(True))).read_bytes() + OURS.cert_pem.bytes())

    def aws(self, *certificates: ssl.SSLContext, **options: Any) -> Relay:
        """AWS's endpoints, at https://localhost."""
        target = address_of(self.endpoint.url)
        return self._kept(Relay(target, *(certificates or [certificate("localhost")]), **options))

    def proxy(self, scheme: str, *certificates: ssl.SSLContext) -> Relay:
        """A proxy, at 127.0.0.1."""
        ours = certificates or [certificate("127.0.0.1")]
        return self._kept(Relay(None, *(ours if scheme == "https" else ())))

    def _kept(self, relay: Relay) -> Relay:
        self.relays.append(relay)
        return relay

    def env(self, aws: Relay) -> dict[str, str]:
        return {**self.endpoint.env(), "AWS_ENDPOINT_URL": f"https://localhost:{aws.port}"}


@pytest.fixture
def network(serve: Serve, tmp_path: Path) -> Iterator[Network]:
    made = Network(serve, tmp_path / "bundle.pem")
    yield made
    for relay in made.relays:
        relay.listening.close()
        relay.drop()


# --- what must work ---------------------------------------------------------------------------------------------------


@pytest.mark.program
def test_the_bundle_is_loaded_once_for_all_connections_of_a_client(
    network: Network, run_program: Program
) -> None:
    """When IAM's first connection begins, the file goes away: a connection that has to load it would fail."""
    bundle = network.bundle
    iam = network.aws(certificate("localhost"), began=lambda: bundle.unlink(missing_ok=True))
    env = {**network.endpoint.env(), "AWS_CA_BUNDLE": str(bundle)}
    result = run_program({**env, "AWS_ENDPOINT_URL_IAM": f"https://localhost:{iam.port}"})
    assert result.exit_code == 0, result
    assert result.csvs == {ONE}
    assert len(iam.carried) == iam.opened > 1
    assert not bundle.exists()


@pytest.mark.program
@pytest.mark.parametrize("how", ["AWS_CA_BUNDLE", "ca_bundle"])
@pytest.mark.parametrize("scheme", ["", "http", "https"], ids=["direct", "proxy", "TLS proxy"])
def test_an_authority_of_ones_own_is_trusted(
    network: Network, run_program: Program, how: str, scheme: str
) -> None:
    """Named in the environment or in the profile; AWS's certificates and the proxy's."""
    aws, proxy = network.aws(), network.proxy(scheme)
    env = network.env(aws)
    if how == "AWS_CA_BUNDLE":
        env["AWS_CA_BUNDLE"] = str(network.bundle)
    else:
        config = network.bundle.with_name("config")
        config.write_text(f"[default]\nca_bundle = {network.bundle}\n", encoding="utf-8")
        env["AWS_CONFIG_FILE"] = str(config)
    if scheme:
        env["HTTPS_PROXY"] = f"{scheme}://127.0.0.1:{proxy.port}"
    result = run_program(env)
    assert result.exit_code == 0, result
    assert result.csvs == {ONE}
    assert aws.opened > 4
    assert proxy.connects == ([f"CONNECT localhost:{aws.port}"] * aws.opened if scheme else [])


# --- what must be refused ---------------------------------------------------------------------------------------------


@pytest.fixture
def ask(network: Network, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], str]]:
    """`ask(aws)` makes one of the program's clients, which reaches AWS there, and asks with each call who it is."""

    def client_of(aws: Relay, proxy: str) -> Callable[[], str]:
        env = {**network.env(aws), "AWS_CA_BUNDLE": str(network.bundle), "HTTPS_PROXY": proxy}
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        session = iam_audit.open_session(None)
        sts = iam_audit.signed_client(session, "sts", "us-east-1")
        who: Any = session.get_credentials()
        return lambda: str(iam_audit.call_as(who, sts.get_caller_identity, {})["Account"])

    return client_of


# A certificate by what is wrong with it
WRONG: dict[str, Callable[[str], ssl.SSLContext]] = {
    "doesn't match": lambda _: certificate("other.example"),
    "unable to get local issuer": lambda name: certificate(name, OTHERS),
}


@pytest.mark.parametrize("scheme", ["", "http", "https"], ids=["direct", "proxy", "TLS proxy"])
@pytest.mark.parametrize("earlier", [0, 1], ids=["first connection", "later connection"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_certificate_is_refused(
    network: Network, ask: Any, scheme: str, earlier: int, wrong: str
) -> None:
    """Before anything is sent; also by a client that trusted the same address before."""
    certificates = [*[certificate("localhost")] * earlier, WRONG[wrong]("localhost")]
    aws, proxy = network.aws(*certificates), network.proxy(scheme)
    who = ask(aws, f"{scheme}://127.0.0.1:{proxy.port}" if scheme else "")
    for _ in range(earlier):
        assert who() == network.endpoint.world.management
        aws.drop()
        proxy.drop()
    with pytest.raises(SSLError, match=wrong):
        who()
    assert (aws.opened, len(aws.carried)) == (earlier + 1, earlier)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_proxy_with_a_wrong_certificate_is_refused(
    network: Network, ask: Any, wrong: str
) -> None:
    aws, proxy = network.aws(), network.proxy("https", WRONG[wrong]("127.0.0.1"))
    with pytest.raises((ProxyConnectionError, SSLError)):  # the second: of urllib3 1
        ask(aws, f"https://127.0.0.1:{proxy.port}")()
    assert (proxy.opened, proxy.connects, aws.opened) == (1, [], 0)


@pytest.mark.program
@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), ("", "no certificate"), ("other", "no certificate")],
)
def test_a_bundle_that_cannot_be_loaded_stops_the_program(
    network: Network, run_program: Program, content: str | None, why: str
) -> None:
    """It says why. It does not mean that nothing is verified."""
    network.bundle.unlink()
    if content is not None:
        network.bundle.write_text(content, encoding="utf-8")
    aws = network.aws()
    result = run_program({**network.env(aws), "AWS_CA_BUNDLE": str(network.bundle)})
    assert result.exit_code == 1
    assert why in result.stderr
    assert "AWS_CA_BUNDLE" in result.stderr
    assert aws.carried == set()
