"""Segmentation without words: cluster centres of a dataset's patch features replace text features.

`spherical_kmeans` gives unit vectors in the feature space, so a patch's cluster is the centre with the
largest cosine, just as its class is the text with the largest cosine. The centres are therefore passed
as `query_features` to an `OpenVocabSegmentor`, and windows, merging, thresholds, refiners and masks
work as with words. `HungarianMetric` scores the result.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_main_process
from mmengine.registry import init_default_scope
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfp.data.datasets import DATASETS
from sfp.evaluation.compare import build_segmentor
from sfp.evaluation.journal import fingerprint
from sfp.evaluation.loading import Batches
from sfp.evaluation.settings import settings
from sfp.files import atomic_write
from sfp.functional.kmeans import spherical_kmeans
from sfp.registry import check_knobs

FILE = "clusters.safetensors"


def cluster_config(config: Config) -> Config:
    """Replaces the words of a config that has a node `clusters` by clusters, not yet fitted.

    Raises:
        ValueError: if the node or the metric is wrong.
    """
    node = config.clusters
    check_knobs(fit_clusters, node, "clusters")
    evaluators = config.test_evaluator
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators
    if [evaluator["type"] for evaluator in evaluators] != ["HungarianMetric"]:
        raise ValueError(
            "clusters have no names: set test_evaluator=dict(type='HungarianMetric'), which matches "
            "them to classes"
        )
    config = copy.deepcopy(config)  # `config.copy()` would share the model's settings
    config.test_evaluator = dict(evaluators[0], clusters=node["count"])
    config.model.classes = [f"cluster {i}" for i in range(node["count"])]
    return config


def ensure_clusters(config: Config) -> Config:
    """Fits the clusters of a config, or finds them in the work folder.

    Args:
        config: a config with the node `clusters`, the knobs of `fit_clusters`.

    Returns:
        A copy whose `model.query_features` names the file `clusters.safetensors` in the work folder.
        The file records the settings it was fitted with; if they change, it is fitted again.
    """
    config = cluster_config(config)
    path = Path(config.work_dir, FILE)
    if is_main_process():
        dataset = _dataset(config, config.clusters.get("dataset"))
        groups = settings(config, dataset=dataset)
        groups["run"] = {"files_sha256": groups["run"]["files_sha256"]}
        wanted = fingerprint(groups)
        if not path.is_file() or _made_for(path) != wanted:
            print(
                f"clustering the patches of {len(dataset)} images (clusters are saved in {path})",
                file=sys.stderr,
            )
            centres, score = fit_clusters(config, **config.clusters)
            meta = dict(fingerprint=wanted, mean_cosine=f"{score:.6f}")
            with atomic_write(path) as temporary:
                save_file(dict(queries=centres.cpu().contiguous()), temporary, meta)
    barrier()  # k-means may differ between devices, so one process does it for all
    config.model.query_features = str(path)
    return config


def _made_for(path: Path) -> str | None:
    """The fingerprint of the settings that a file's clusters were fitted with."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("fingerprint")
    except SafetensorError:
        return None


def fit_clusters(
    config: Config,
    *,
    count: int,
    dataset: Mapping[str, Any] | None = None,
    patches: int = 64,
    iterations: int = 100,
    restarts: int = 10,
    seed: int = 0,
) -> tuple[Tensor, float]:
    """k-means on the patch features of a dataset.

    Args:
        config: config whose model computes the features, with its own preprocessing.
        count: number of clusters.
        dataset: dataset whose images are clustered; None for the test set. Labels are not used.
        patches: number of patches drawn from each image, among all of its windows.
        iterations, restarts, seed: as for `spherical_kmeans`.

    Returns:
        (count, C) unit centres, and the mean cosine of a patch with its own.
    """
    segmentor = build_segmentor(config)
    built = _dataset(config, dataset)
    # all images in this process: mmengine's samplers would divide them among the processes
    loader = Batches(config.test_dataloader, built, range(len(built)))
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Tensor] = []
    for data in loader:
        for image in segmentor.data_preprocessor(data)["inputs"]:
            features = segmentor.patch_features(image)
            chosen = torch.randperm(len(features), generator=generator)[:patches]
            drawn.append(features[chosen.to(features.device)])
    return spherical_kmeans(
        torch.cat(drawn), count, iterations=iterations, restarts=restarts, seed=seed
    )


def _dataset(config: Config, node: Mapping[str, Any] | None = None) -> Any:
    init_default_scope(config.get("default_scope", "mmseg"))
    built = DATASETS.build(config.test_dataloader.dataset if node is None else node)
    built.full_init()
    return built
