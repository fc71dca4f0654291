"""How to start, where a scheduler starts the processes, what `gspmd launch` starts on one machine.

Each text gives every process the three variables that `gspmd.distributed` reads.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from types import MappingProxyType

from gspmd.cli.launch import Launch
from gspmd.distributed import ADDRESS, COUNT, NUMBER, DistributedError
from gspmd.errors import nearest

PORT = 12355  # on hosts of our own, any that is free


def how_to_start(launch: Launch, where: str) -> str:
    """A script for `where`: slurm, gke or mpirun.

    Raises:
      DistributedError: it is none of these.
    """
    if where not in CLUSTERS:
        raise DistributedError(
            f"{where!r} is not a way to start processes{nearest(where, CLUSTERS)} There is "
            f"{', '.join(CLUSTERS)}."
        )
    return CLUSTERS[where](launch)


def _slurm(launch: Launch) -> str:
    return f"""\
#!/bin/bash
# Submit with: sbatch FILE
#SBATCH --job-name=gspmd
#SBATCH --ntasks={launch.processes}
#SBATCH --gpus-per-task={launch.devices}
#SBATCH --signal=TERM@120
# The last line sends SIGTERM two minutes before the time is up: the run saves a checkpoint.
# Without GPUs, leave out theirs and: export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={launch.devices}
export {COUNT}={launch.processes}
export {ADDRESS}="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{PORT}"
srun --kill-on-bad-exit=1 bash -c '{NUMBER}=$SLURM_PROCID exec "$@"' - \\
  {shlex.join(launch.command)}
"""


def _mpirun(launch: Launch) -> str:
    return f"""\
#!/bin/bash
# Run on the first host of a HOSTFILE that lists the others as well.
# Without GPUs: export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={launch.devices}, on every host.
mpirun -n {launch.processes} --hostfile "${{1:?name a HOSTFILE}}" \\
  bash -c '{NUMBER}=${{OMPI_COMM_WORLD_RANK:-$PMI_RANK}} exec "$@"' - \\
  env {COUNT}={launch.processes} {ADDRESS}="$(hostname):{PORT}" \\
  {shlex.join(launch.command)}
"""


def _gke(launch: Launch) -> str:
    command = "\n".join(f"        - {json.dumps(word)}" for word in launch.command)
    return f"""\
# Put in the image that has gspmd, then: kubectl apply -f FILE
apiVersion: v1
kind: Service
metadata:
  name: gspmd
spec:
  clusterIP: None # gives each pod of the job a name
  publishNotReadyAddresses: true
  selector:
    job-name: gspmd
---
apiVersion: batch/v1
kind: Job
metadata:
  name: gspmd
spec:
  completions: {launch.processes}
  parallelism: {launch.processes}
  completionMode: Indexed
  backoffLimit: 0 # a process that fails ends the run
  template:
    spec:
      subdomain: gspmd
      restartPolicy: Never
      terminationGracePeriodSeconds: 120 # SIGTERM first: the run saves a checkpoint
      containers:
      - name: gspmd
        image: IMAGE
        command:
{command}
        env:
        - name: {ADDRESS}
          value: gspmd-0.gspmd:{PORT}
        - name: {COUNT}
          value: "{launch.processes}"
        - name: {NUMBER}
          valueFrom:
            fieldRef:
              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
        resources:
          limits:
            nvidia.com/gpu: {launch.devices} # or google.com/tpu
"""


CLUSTERS: Mapping[str, Callable[[Launch], str]] = MappingProxyType(
    {"slurm": _slurm, "gke": _gke, "mpirun": _mpirun}
)
