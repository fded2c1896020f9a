"""Two hosts on one machine: network namespaces of their own, joined by a virtual cable. Linux; no root needed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "cable"  # the network interface, on either host


class Hosts:
    """Two running hosts.

    Args:
        pids: A process in each.
    """

    def __init__(self, pids: tuple[int, int]) -> None:
        self._pids = pids

    def on(self, host: int, *command: str) -> list[str]:
        """`command` as run on this host."""
        return ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(self._pids[host]), *command]


def available() -> bool:
    """Whether this machine lets us make network namespaces."""
    with suppress(FileNotFoundError):
        return subprocess.run(["unshare", "-Urn", "ip", "link"], check=False, capture_output=True).returncode == 0
    return False


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Both up, each with its address on the cable; they end with the block."""
    with _waiting(["unshare", "-Urn"]) as first:
        into_user = ["nsenter", "--preserve-credentials", "-U", "-t", str(first)]
        with _waiting([*into_user, "unshare", "-n"]) as second:
            hosts = Hosts((first, second))
            cable = ["ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(second)]
            subprocess.run(hosts.on(0, *cable), check=True)
            for host, address in enumerate(ADDRESSES):
                subprocess.run(hosts.on(host, "ip", "address", "add", f"{address}/24", "dev", CABLE), check=True)
                for device in ("lo", CABLE):
                    subprocess.run(hosts.on(host, "ip", "link", "set", device, "up"), check=True)
            yield hosts


@contextmanager
def _waiting(entering: list[str]) -> Iterator[int]:
    """A process that waits in a namespace; its pid."""
    command = [*entering, "sh", "-c", "echo up; exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise OSError(f"no network namespace: {entering} failed")
            yield process.pid
        finally:
            process.kill()


def torchrun(hosts: Hosts, *command: str, ranks_per_host: int, limit_seconds: float) -> list[str]:
    """`python command` as launched by torchrun on both hosts, which meet over the cable; what each host wrote.

    Raises:
        AssertionError: If a host ended with another status than 0, with what it wrote.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CABLE}
    running = []
    for host, address in enumerate(ADDRESSES):
        rendezvous = {
            "rdzv-backend": "c10d",
            "rdzv-id": "test",
            "rdzv-endpoint": f"{ADDRESSES[0]}:29500",
            "rdzv-conf": f"is_host={int(host == 0)}",
            "local-addr": address,
        }
        options = {"nnodes": 2, "nproc-per-node": ranks_per_host} | rendezvous
        flags = [f"--{key}={value}" for key, value in options.items()]
        launch = [sys.executable, "-m", "torch.distributed.run", *flags]
        running.append(
            subprocess.Popen(
                hosts.on(host, *launch, *command),
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        written = [process.communicate(timeout=limit_seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0], "\n".join(written)
    return written
