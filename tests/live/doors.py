"""Where the processes of a live run listen, seen in a network that has an address for others; and planted secrets."""

import ipaddress
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

CANARIES = {
    "WANDB_API_KEY": "ca9a12" + "0" * 34,  # wandb wants 40 characters
    "HF_TOKEN": "canary-hf-77b1",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-5588",
    "VLLM_API_KEY": "canary-vllm-93d0",
    "CPPO_JUDGE_PASSWORD": "canary-password-6",
    "OPENAI_API_KEY": "canary-openai-9a",
}

# A cable whose other end leads nowhere: its address is the one that programs find when they ask for the machine's.
_NETWORK = (
    "ip link set lo up && ip link add ext0 type veth peer name ext1 && ip addr add 10.231.8.1/24 dev ext0 && "
    "ip link set ext0 up && ip link set ext1 up && ip route add default via 10.231.8.254"
)


def own_network() -> list[str]:
    """What goes before a command to run it in a network of its own; nothing where that is not allowed."""
    allowed = subprocess.run(["unshare", "-n", "sh", "-c", _NETWORK], capture_output=True).returncode == 0
    return ["unshare", "-n", "sh", "-c", f'{_NETWORK} && exec "$@"', "sh"] if allowed else []


@contextmanager
def listeners(run: Path) -> Iterator[set[tuple[str, str]]]:
    """(process, address) of every TCP socket that a process of the run has listened on meanwhile."""
    found: set[tuple[str, str]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(1):
            for process in psutil.process_iter():
                try:
                    if process.environ().get("CPPO_RUN_FOLDER") == str(run):
                        name = Path(process.cmdline()[0].split()[0]).name
                        found.update((name, address) for address in _listening(Path(f"/proc/{process.pid}")))
                except (psutil.Error, OSError, IndexError):
                    continue

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def _listening(process: Path) -> Iterator[str]:
    """As the process's own network has it; psutil looks at this process's."""
    sockets = set()
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            sockets.add(os.readlink(descriptor))
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                number = bytes.fromhex(words[1].partition(":")[0])  # in words of four bytes, least significant first
                parts = (number[start : start + 4][::-1] for start in range(0, len(number), 4))
                yield str(ipaddress.ip_address(b"".join(parts)))


def is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def files_with(words: Iterator[str] | list[str], *folders: Path) -> list[tuple[Path, str]]:
    """Every (file, word) where a file under the folders holds the word, byte by byte."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    wanted = list(words)
    contents = ((path, path.read_bytes()) for path in files)
    return [(path, word) for path, content in contents for word in wanted if word.encode() in content]
