"""Ray, and nothing else: who is in the cluster, actors in placement groups, and what a fleet's controller tells others.

Ray is asked for places and told when they are free again. It carries no request of a runner, and a TEE runner never
joins it: what its processes send each other is pickled, so whoever takes part runs code on all the others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

from teegpu import __version__, files
from teegpu.errors import ConfigError, ConnectionFailedError, UsageError
from teegpu.fleet import process
from teegpu.fleet.controller import Found, LostError
from teegpu.fleet.group import Group, Look, Order
from teegpu.units import printable

CONNECT_SECONDS: Final = 5.0
ASK_SECONDS: Final = 60.0
"""How long a machine may take to start a worker that says what serves there."""

STORE_BYTES: Final = 80 << 20
"""Of shared memory for Ray's objects, about the least that it takes: a fleet has none."""

BOARD_SECONDS: Final = 15.0
"""How long what the controller said may take to be read."""

FORGET_SECONDS: Final = 60.0
"""How long a group of an earlier fleet may take to end."""

_LONGEST_BASE: Final = 20
"""A socket's path may have 107 bytes, of which Ray's own names take most."""

_FIRST_WITH_TOKENS: Final = (2, 52)
"""Versions before take no notice of ``RAY_AUTH_MODE``."""

_BOARD: Final = "board"


def _ray(*, own: bool) -> Any:
    """Ray, set up before it is loaded. Raises ``UsageError`` where it is not installed."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0"}
    os.environ["RAY_NUM_REDIS_GET_RETRIES"] = "3"  # of attempts to join, a second apart
    if own:
        # As it has it on other systems: this machine is its loopback address, and nothing of it listens elsewhere.
        os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "AUTOSCALER_METRIC_PORT": "0"}
    try:
        import ray
    except ImportError:
        raise UsageError("a fleet is placed by Ray, which is not installed: pip install 'teegpu[fleet]'") from None
    if tuple(map(int, ray.__version__.split(".")[:2])) < _FIRST_WITH_TOKENS:
        raise UsageError(
            f"Ray {ray.__version__} knows no tokens, so it would let in whoever reaches it: pip install 'teegpu[fleet]'"
        )
    return ray


@contextlib.contextmanager
def started(fleet: str, cpus: float) -> Iterator[RayCluster]:
    """A Ray of this machine alone, which ends with the block. Others of this user find it by ``joined``."""
    folder = files.private_folder(process.folder(fleet))
    files.replace(folder / "token", secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
    os.environ.pop("RAY_AUTH_TOKEN", None)
    ray = _ray(own=True)
    base = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="teegpu-", dir=base if len(base) <= _LONGEST_BASE else "/tmp", ignore_cleanup_errors=True
    ) as temporary:
        left = folder / "temporary"
        with contextlib.suppress(OSError):
            shutil.rmtree(left.read_text(), ignore_errors=True)  # of one that was killed
        files.replace(left, temporary)
        _init(ray, fleet, "local", num_cpus=cpus, object_store_memory=STORE_BYTES, include_dashboard=False,
              _temp_dir=temporary)  # fmt: skip
        address = ray.get_runtime_context().gcs_address
        files.replace(folder / "ray", address)
        try:
            yield RayCluster(ray, fleet, address)
            ray.shutdown()
        finally:
            (folder / "ray").unlink(missing_ok=True)


@contextlib.contextmanager
def joined(fleet: str, address: str) -> Iterator[RayCluster]:
    """The cluster whose head is at ``address``, of which this machine is one. Raises ``ConnectionFailedError``."""
    own = address == recorded(fleet)
    if own:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(process.folder(fleet) / "token")
        os.environ.pop("RAY_AUTH_TOKEN", None)
    ray = _ray(own=own)
    if not _answers(address):
        raise ConnectionFailedError(
            f"no Ray answers at {address}: start it there with 'RAY_AUTH_MODE=token ray start --head', or leave out "
            "--ray, for a fleet on this machine alone"
        )
    _init(ray, fleet, address)
    yield RayCluster(ray, fleet, address)
    ray.shutdown()


@contextlib.contextmanager
def controlled(fleet: str) -> Iterator[None]:
    """Within it this process is ``fleet``'s controller on this machine. Raises ``UsageError`` where there is one."""
    folder = files.private_folder(process.folder(fleet))
    try:
        lock = files.Lock(folder / "up.lock", wait=False)
    except BlockingIOError:
        raise up_already(fleet) from None
    with lock:
        (folder / "ray").unlink(missing_ok=True)  # of one that was killed
        yield


def is_controlled(fleet: str) -> bool:
    """Whether ``fleet`` has a controller on this machine."""
    return files.locked(process.folder(fleet) / "up.lock")


def recorded(fleet: str) -> str:
    """Where ``fleet``'s own Ray on this machine answers; empty where there is none. It ends with the controller: at an
    address that one has left behind somebody else may listen, whom Ray would believe whatever he sends."""
    with contextlib.suppress(OSError):
        if is_controlled(fleet):
            return (process.folder(fleet) / "ray").read_text()
    return ""


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            return True
    except (OSError, ValueError):
        return False


def _init(ray: Any, fleet: str, address: str, **more: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, namespace=f"teegpu-{fleet}", log_to_driver=False, logging_level="error", **more)
    except SystemExit:  # by Ray's own handler
        raise KeyboardInterrupt from None
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionFailedError(f"Ray at {address} can't be used: {_line(error)}") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(error: Exception) -> str:
    return printable(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))


# What runs on the machines of the cluster


class _Actor:
    """A group's, in its placement group."""

    def __init__(self, name: str, order: Order) -> None:
        import ray

        here = ray.get_runtime_context()
        devices = ",".join(here.get_accelerator_ids()["GPU"])
        self._group = Group(name, order, host=ray.util.get_node_ip_address(), node=here.get_node_id(), devices=devices)

    def look(self) -> Look:
        return self._group.look()

    def end(self) -> None:
        self._group.end()


class _Board:
    """What a fleet's controller said last, and whether it is to end."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status
        self._to_end = False

    def post(self, status: dict[str, Any]) -> bool:
        self._status = status
        return self._to_end

    def read(self) -> dict[str, Any]:
        return self._status

    def ask_to_end(self) -> None:
        self._to_end = True


def serving(fleet: str) -> list[Found]:
    """What serves for ``fleet`` on this machine."""
    return [
        Found(each.name, each.about.get("order", ""), each.pid, each.about.get("address", ""))
        for each in process.living(fleet)
    ]


def end(fleet: str, names: Sequence[str], wait_seconds: float) -> int:
    """Ends those groups of ``fleet`` on this machine. → how many there were."""
    ending = [each for each in process.living(fleet) if each.name in names]
    process.end(ending, wait_seconds)
    return sum(not each.alive for each in ending)


def _tell(fleet: str) -> tuple[str, str, list[Found]]:
    return __version__, os.environ.get("RAY_AUTH_MODE", ""), serving(fleet)


# What runs beside the controller


class RayPlaced:
    """An actor in a placement group of one bundle, in which its processes have room."""

    def __init__(
        self, ray: Any, name: str, order: Order, bundle: dict[str, float], machine: str | None, unfit: Collection[str]
    ) -> None:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.name, self.machine, self.since = name, machine, time.monotonic()
        self._ray = ray
        where = machine or (f"!in({','.join(sorted(unfit))})" if unfit else "")
        self._room = ray.util.placement_group(
            [bundle], strategy="SPREAD", bundle_label_selector=[{"ray.io/node-id": where}] if where else None
        )
        self._actor = (
            ray.remote(_Actor)
            .options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=0),
            )
            .remote(name, order)
        )
        self._asked: Any = None
        self._seen: tuple[float, Look] | None = None
        self._ending: Any = None

    def look(self) -> tuple[float, Look] | None:
        if self._asked is None:
            self._asked = self._actor.look.remote()
        if self._ready(self._asked):
            asked, self._asked = self._asked, None
            with contextlib.suppress(self._ray.exceptions.ActorUnavailableError):  # it may be reached again
                self._seen = time.monotonic(), self._result(asked)
        return self._seen

    def end(self) -> None:
        self._ending = self._actor.end.remote()

    @property
    def ended(self) -> bool:
        if not self._ready(self._ending):
            return bool(self._ray.util.placement_group_table(self._room)["state"] == "PENDING")
        try:
            self._result(self._ending)
        except self._ray.exceptions.ActorUnavailableError as error:  # told twice it would end at once
            raise LostError(_line(error)) from None
        return True

    def leave(self) -> None:
        self._ray.kill(self._actor)
        self._ray.util.remove_placement_group(self._room)

    def _ready(self, asked: Any) -> bool:
        return bool(self._ray.wait([asked], timeout=0)[0])

    def _result(self, asked: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(asked)
        except errors.ActorUnavailableError:
            raise
        except errors.RayError as error:
            raise LostError(_line(error)) from None


class RayCluster:
    """The cluster that this process has joined."""

    def __init__(self, ray: Any, fleet: str, address: str) -> None:
        self._ray, self._fleet, self._address = ray, fleet, address
        self._asked: dict[str, tuple[float, Any]] = {}
        self._unfit: set[str] = set()
        self._board: Any = None
        self._posted: Any = None

    # As ``controller.Cluster`` has it

    def machines(self) -> frozenset[str]:
        if not _answers(self._address):
            raise ConnectionFailedError(
                f"Ray's head at {self._address} is gone: the groups serve on, and nobody watches them; start Ray, and "
                "'teegpu fleet up' again, which takes over what serves ('teegpu fleet down' ends it)"
            )
        return frozenset(node["NodeID"] for node in self._nodes())

    def found(self, machine: str) -> Sequence[Found] | None:
        if machine not in self._asked:
            self._asked[machine] = time.monotonic(), self._there(machine, _tell, self._fleet)
        at, asked = self._asked[machine]
        if not self._ray.wait([asked], timeout=0)[0]:
            if time.monotonic() - at < ASK_SECONDS:
                return None
            del self._asked[machine]
            raise ConfigError(f"machine {self._name(machine)}: Ray starts no worker there within {ASK_SECONDS:g} s")
        del self._asked[machine]
        try:
            return self._fit(machine, *self._answer(machine, asked))
        except ConfigError:
            self._unfit.add(machine)
            raise

    def _fit(self, machine: str, version: str, auth: str, found: Sequence[Found]) -> Sequence[Found]:
        if version != __version__:
            raise ConfigError(f"machine {self._name(machine)} has teegpu {version}, and this one {__version__}")
        if auth != "token":
            raise ConfigError(
                f"machine {self._name(machine)}: Ray lets in whoever reaches it, to run what he likes on all machines: "
                "start it anew with RAY_AUTH_MODE=token ('ray get-auth-token --generate' makes a token)"
            )
        return found

    def forget(self, machine: str, names: Sequence[str]) -> None:
        self._there(machine, end, self._fleet, list(names), FORGET_SECONDS)

    def place(self, name: str, order: Order, machine: str | None = None) -> RayPlaced:
        return RayPlaced(self._ray, name, order, self.bundle(order), machine, self._unfit)

    # For the command

    def bundle(self, order: Order) -> dict[str, float]:
        """What a group takes."""
        server = order.config.server
        resources = self._ray.cluster_resources()
        cuda = server.device.startswith("cuda") or (server.device == "auto" and resources.get("GPU", 0) > 0)
        made: dict[str, float] = {"CPU": max(1, server.threads)}
        return made | {"GPU": server.ranks} if cuda else made

    def hosts(self) -> list[str]:
        """The addresses of all machines."""
        return sorted({node["NodeManagerAddress"] for node in self._nodes()})

    def open_board(self, status: dict[str, Any]) -> None:
        """Raises ``UsageError`` where there is one of that fleet."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        try:
            self._board = (
                self._ray.remote(_Board)
                .options(name=_BOARD, num_cpus=0, max_restarts=-1, scheduling_strategy=here)
                .remote(status)
            )
        except ValueError:
            raise up_already(self._fleet) from None

    def post(self, status: dict[str, Any]) -> bool:
        """Tells ``status`` to those who ask. → whether one of them wants the fleet to end."""
        to_end = False
        if self._posted is not None and self._ray.wait([self._posted], timeout=0)[0]:
            with contextlib.suppress(self._ray.exceptions.RayError):  # it is started anew, and told again
                to_end = self._ray.get(self._posted)
            self._posted = None
        if self._posted is None:
            self._posted = self._board.post.remote(status)
        return to_end

    def status(self) -> dict[str, Any] | None:
        """What the fleet's controller said last; None where there is none. Raises ``ConnectionFailedError`` where
        that can't be told."""
        errors = self._ray.exceptions
        try:
            board = self._ray.get_actor(_BOARD)
            found: dict[str, Any] = self._ray.get(board.read.remote(), timeout=BOARD_SECONDS)
        except errors.GetTimeoutError:
            raise ConnectionFailedError(
                f"what the controller of fleet '{self._fleet}' said last is not to be had within {BOARD_SECONDS:g} s: "
                "try again"
            ) from None
        except (ValueError, errors.RayError):
            return None
        return found

    def ask_to_end(self) -> None:
        """Asks the controller to, which may have ended meanwhile."""
        with contextlib.suppress(ValueError, self._ray.exceptions.RayError):
            self._ray.get(self._ray.get_actor(_BOARD).ask_to_end.remote(), timeout=BOARD_SECONDS)

    def serving(self) -> list[Found]:
        """What serves on all machines. Raises ``ConfigError`` where one can't tell."""
        asked = {node["NodeID"]: self._there(node["NodeID"], _tell, self._fleet) for node in self._nodes()}
        return [found for machine, each in asked.items() for found in self._answer(machine, each)[2]]

    def end(self, names: Sequence[str], wait_seconds: float) -> int:
        """Ends those groups, wherever they are. → how many there were."""
        asked = {
            node["NodeID"]: self._there(node["NodeID"], end, self._fleet, list(names), wait_seconds)
            for node in self._nodes()
        }
        return sum(self._answer(machine, each) for machine, each in asked.items())

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _name(self, machine: str) -> str:
        return next((node["NodeManagerAddress"] for node in self._ray.nodes() if node["NodeID"] == machine), machine)

    def _there(self, machine: str, function: Any, *arguments: Any) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(machine, soft=False)
        task = self._ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
        return task.remote(*arguments)

    def _answer(self, machine: str, asked: Any) -> Any:
        try:
            return self._ray.get(asked, timeout=ASK_SECONDS)
        except self._ray.exceptions.RayError as error:
            raise ConfigError(
                f"machine {self._name(machine)} can't take part ({_line(error)}): is teegpu {__version__} installed "
                "there, for the same Python?"
            ) from None


def up_already(fleet: str) -> UsageError:
    return UsageError(f"a fleet '{fleet}' is up already: 'teegpu fleet down' ends it, and --name is for another one")
