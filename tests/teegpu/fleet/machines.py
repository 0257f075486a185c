"""``python -m tests.teegpu.fleet.machines FOLDER``: a Ray cluster on loopback, whose machines are processes here.

It says where its head answers. Each line on standard input is answered by ``done``: ``add N``, ``lose N`` (at once, as
by a cut cable) for a machine whose user has the state folder ``FOLDER/N``, and ``headless``. It ends with its input.
"""

from __future__ import annotations

import sys
from typing import Any

from ray.cluster_utils import Cluster

SMALL: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False, "include_log_monitor": False}


def main(folder: str) -> None:
    cluster = Cluster()
    head = cluster.add_node(num_cpus=0, **SMALL)
    print(cluster.address, flush=True)
    machines: dict[str, Any] = {}
    for line in sys.stdin:
        match line.split():
            case ["add", name]:
                machines[name] = cluster.add_node(num_cpus=1, env_vars={"XDG_STATE_HOME": f"{folder}/{name}"}, **SMALL)
            case ["lose", name]:
                cluster.remove_node(machines.pop(name), allow_graceful=False)
            case ["headless"]:
                head.kill_gcs_server()
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
