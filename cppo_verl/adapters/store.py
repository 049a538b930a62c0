"""The store through which the ranks of a process group meet: torch listens with it on every address of the machine, and
answers whoever asks."""

import importlib
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore

# The package has a function of the same name.
rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
_create = rendezvous._create_c10d_store


def listen_on_its_host() -> None:
    """From now on rank 0 of a group made with ``env://`` or ``tcp://`` listens on the host that these name only."""
    rendezvous._create_c10d_store = _create_on_host


def _create_on_host(
    hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> Store:
    """As torch's function of this place."""
    settings: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timeout, "use_libuv": use_libuv}
    if rank != 0 or rendezvous._torchelastic_use_agent_store():
        return _create(hostname, port, **settings)
    family, *_, address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM)[0]
    try:
        listener = socket.create_server((address[0], address[1]), family=family)
    except OSError:  # this process listens there already, and torch shares that; or torch says what is wrong
        return _create(hostname, port, **settings)
    return TCPStore(
        host_name=hostname,
        port=listener.getsockname()[1],
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
        use_libuv=use_libuv,
    )
