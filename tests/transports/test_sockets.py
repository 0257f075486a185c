from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import transports
from transports.errors import BadAddressError


def test_port_0_becomes_the_real_one():
    for address in ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*"):
        with transports.listen(address) as server:
            host, _, port = server.address.rpartition(":")
            assert host == "tcp://127.0.0.1"
            assert int(port) > 0


def test_port_taken():
    with transports.listen("tcp://127.0.0.1:0") as server, pytest.raises(BadAddressError, match="another program"):
        transports.listen(server.address)


def test_an_address_that_is_not_ours():
    with pytest.raises(BadAddressError, match="no interface"):
        transports.listen("tcp://192.0.2.1:5555")


def test_an_address_is_free_again_after_close(tmp_path: Path):
    for address in ("tcp://127.0.0.1:0", f"ipc://{tmp_path}/socket", "inprocess://again"):
        with transports.listen(address) as server:
            address = server.address
        transports.listen(address).close()


def test_ipc_is_private_from_the_start(tmp_path: Path):
    path = tmp_path / "new" / "deep" / "socket"
    with transports.listen(f"ipc://{path}") as server:
        assert server.address == f"ipc://{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with transports.listen(f"ipc://{path}"):
        assert path.is_socket()


def test_a_living_servers_socket_is_not(tmp_path: Path):
    address = f"ipc://{tmp_path}/socket"
    with transports.listen(address):
        with pytest.raises(BadAddressError, match="another server listens"):
            transports.listen(address)
        assert (tmp_path / "socket").is_socket()


def test_a_file_is_never_removed(tmp_path: Path):
    path = tmp_path / "letter"
    path.write_text("dear reader")
    with pytest.raises(BadAddressError, match="not a socket"):
        transports.listen(f"ipc://{path}")
    assert path.read_text() == "dear reader"


def test_a_directory_that_can_not_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BadAddressError, match="can't listen"):
        transports.listen(f"ipc://{tmp_path}/file/socket")


def test_an_inprocess_name_taken():
    with transports.listen("inprocess://one"), pytest.raises(BadAddressError, match="another server"):
        transports.listen("inprocess://one")


LIMITED = """
import resource, sys
import transports
from transports.errors import LimitError

soft, hard, clients = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    transports.listen("tcp://127.0.0.1:0", transports.ServerOptions(max_clients=clients)).close()
except LimitError as error:
    print(error)
else:
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def listening(soft: int, hard: int, clients: int) -> str:
    """The soft limit on descriptors of a process that listens for ``clients``, or why it does not."""
    command = [sys.executable, "-c", LIMITED, *map(str, (soft, hard, clients))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_server_takes_the_descriptors_that_its_clients_may_need() -> None:
    assert int(listening(256, 4096, 256)) == 2 * (256 + 64) + 128
    assert int(listening(2048, 4096, 256)) == 2048


def test_a_server_that_may_not_have_them_does_not_start() -> None:
    """It would spin where the last one is gone, and accept nobody."""
    assert listening(256, 1024, 450).startswith(
        "limits.clients: so many clients may need 1156 descriptors, and this process may have 1024: allow fewer"
    )
