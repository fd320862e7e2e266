"""A comparison on a Ray cluster of two nodes, one of which goes while it runs: `python -m testing.ray_nodes FOLDER`.

In a process of its own: the tests' has a Ray of its own. What it found is printed as JSON.
"""

import json
import os
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

from ptmoe.compare import on_ray, prepare, read_plan
from ptmoe.compare.run import compare
from ptmoe.compare.watcher import Watcher
from testing.ray_cells import ATTEMPTS, Quick


class Nodes(Watcher):
    def __init__(self, cluster, node):
        self.cluster, self.node, self.ended_cells = cluster, node, []

    def ended(self, cell, outcome):
        self.ended_cells.append([cell.seed, outcome])
        if len(self.ended_cells) == 10:
            self.cluster.remove_node(self.node, allow_graceful=False)


def main(folder):
    on_ray.CellActor = Quick
    os.environ[ATTEMPTS] = str(folder / "attempts.txt")
    (folder / "attempts.txt").touch()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        plan = {"methods": ["pt"], "tasks": ["nano/mixed"], "seeds": 40, "max_steps": 2, "on": "ray://auto"}
        comparison = prepare(read_plan(None, {**plan, "output_dir": str(folder / "c")}), say=print)
        watcher = Nodes(cluster, node)
        failed = compare(comparison, watcher)
    finally:
        cluster.shutdown()
    print(json.dumps({"ended": watcher.ended_cells, "failed": [failure.error for failure in failed]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
