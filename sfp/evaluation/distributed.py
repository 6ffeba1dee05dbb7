"""Several processes that evaluate together: how they find each other, and what wraps the model."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.registry import MODEL_WRAPPERS
from torch import nn


@MODEL_WRAPPERS.register_module(force=True)  # modules may be imported again
class FrozenReplica(nn.Module):
    """Takes the place of DistributedDataParallel: nothing is trained, so nothing is synchronised."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def test_step(self, data: Any) -> Any:
        """The wrapped model's."""
        return self.module.test_step(data)  # type: ignore[operator]


def start_processes(config: Config) -> None:
    """Joins this process to the others that `config.launcher` has started, if it is not "none".

    Raises:
        ValueError: if the launcher's environment variables are not there.
    """
    launcher = config.get("launcher", "none")
    if launcher == "none":
        return
    config.model_wrapper_cfg = dict(type="FrozenReplica")
    if torch.distributed.is_initialized():
        return
    if not torch.cuda.is_available():
        # mmengine's own start asks for CUDA, and leaves a group that is there alone
        if launcher == "slurm":
            os.environ.update(slurm_group())
        torch.distributed.init_process_group("gloo")
    elif "clusters" in config:  # else the runner does it
        init_dist(launcher, **config.env_cfg.dist_cfg)


def slurm_group() -> dict[str, str]:
    """What `torch.distributed` reads from the environment, out of what `srun` sets there.

    Raises:
        ValueError: if nothing of that is set, or the first node cannot be told.
    """
    try:
        rank, size, nodes = (
            os.environ[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "NODELIST")
        )
    except KeyError as error:
        raise ValueError(
            f"--launcher slurm goes by the variables of srun, and {error} is not set: start it with "
            "srun (docs/scaling.md), or use torchrun and --launcher pytorch"
        ) from None
    address = os.environ.get("MASTER_ADDR")
    if address is None and not set(nodes) & set("[,"):
        address = nodes
    elif address is None:
        command = ["scontrol", "show", "hostnames", nodes]  # of "n[1-4]", one a line
        try:
            listed = subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"--launcher slurm: scontrol cannot tell the first of the nodes {nodes} ({error}): set "
                "MASTER_ADDR to its address"
            ) from None
        address = listed.stdout.split()[0]
    port = os.environ.get("MASTER_PORT", "29500")
    return dict(RANK=rank, WORLD_SIZE=size, MASTER_ADDR=address, MASTER_PORT=port)
