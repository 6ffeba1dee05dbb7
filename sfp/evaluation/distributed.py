"""Distributed evaluation: starting the process group, and wrapping the model."""

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
    """Replaces DistributedDataParallel, since without training nothing needs synchronising."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def test_step(self, data: Any) -> Any:
        """Calls the wrapped model."""
        return self.module.test_step(data)  # type: ignore[operator]


def start_processes(config: Config) -> None:
    """Joins the process group of `config.launcher`, unless that is "none".

    Raises:
        ValueError: if the launcher's environment variables are missing.
    """
    launcher = config.get("launcher", "none")
    if launcher == "none" or torch.distributed.is_initialized():
        return
    if not torch.cuda.is_available():
        # mmengine's own function requires CUDA, but accepts an existing group
        if launcher == "slurm":
            os.environ.update(slurm_group())
        torch.distributed.init_process_group("gloo")
    elif "clusters" in config:  # otherwise the runner does it
        init_dist(launcher, **config.env_cfg.dist_cfg)


def slurm_group() -> dict[str, str]:
    """The environment variables for `torch.distributed`, from those that `srun` sets.

    Raises:
        ValueError: if they are not set, or the first node cannot be determined.
    """
    try:
        rank, size, nodes = (
            os.environ[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "NODELIST")
        )
    except KeyError as error:
        raise ValueError(
            f"--launcher slurm needs the environment variables of srun, but {error} is not set: start "
            "it with srun (docs/scaling.md), or use torchrun and --launcher pytorch"
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
                f"--launcher slurm: scontrol could not determine the first of the nodes {nodes} "
                f"({error}): set MASTER_ADDR to its address"
            ) from None
        address = listed.stdout.split()[0]
    port = os.environ.get("MASTER_PORT", "29500")
    return dict(RANK=rank, WORLD_SIZE=size, MASTER_ADDR=address, MASTER_PORT=port)
