# SPDX-License-Identifier: Apache-2.0
"""How processes on several hosts find each other: flags of commands that train.

    --distributed                                        # where a cluster tells
    --coordinator=HOST:PORT --processes=N --process=I    # everywhere else

A cluster tells by Slurm, Open MPI, Kubernetes, or the hosts of a TPU slice.
"""

import os
import re
from typing import Any

import jax
from absl import flags

# Seconds without a sign of life after which a process counts as dead, and all end.
HEARTBEAT = 30
GIVEN = ("coordinator", "processes", "process")
VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")


def define_cluster() -> None:
    """Defines the flags."""
    flags.DEFINE_bool(
        "distributed", False, "Join the processes of a cluster, which run this as well."
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where no cluster tells it."
    )
    flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which one this is, from 0.", lower_bound=0)


def join_cluster(values: Any) -> None:
    """Joins the other processes, if the flags say so; before devices are used.

    Raises:
        ValueError: a part of the flags, ones that don't fit, or no cluster.
    """
    given = {name: values[name].value for name in GIVEN}
    missing = [f"--{name}" for name in GIVEN if given[name] is None]
    if not missing:
        check_cluster(**given)
        # Flags count: a cluster would add which of the devices are this process's.
        jax.distributed.initialize(
            *given.values(),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    elif len(missing) < len(GIVEN):
        raise ValueError(
            f"{' and '.join(missing)} missing: --coordinator, --processes and "
            "--process go together"
        )
    elif values["distributed"].value:
        _join_known()


def check_cluster(coordinator: str, processes: int, process: int) -> None:
    """Checks what flags say of a cluster.

    Raises:
        ValueError: no address, or a process that is not among so many.
    """
    if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[\da-fA-F:]+\]:\d{1,5}", coordinator):
        raise ValueError(
            f"coordinator {coordinator!r} is not HOST:PORT; give e.g. node1:12345, the "
            "same to all processes"
        )
    if process >= processes:
        raise ValueError(
            f"process {process} of {processes}: they count from 0 to {processes - 1}"
        )


def _join_known() -> None:
    """Joins the processes of which a cluster tells."""
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        raise ValueError(
            f"no cluster tells of the other processes ({error}); give --coordinator, "
            "--processes and --process"
        ) from error
    # JAX gives every process of Slurm one GPU; if a node has one process, it has all.
    nodes, tasks = (os.environ.get(f"SLURM_{x}") for x in ("STEP_NUM_NODES", "NTASKS"))
    if nodes and nodes == tasks and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        for name in VISIBLE:
            jax.config.update(name, "all")
