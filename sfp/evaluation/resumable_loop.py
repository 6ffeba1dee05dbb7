"""The test loop that continues where a killed evaluation stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.model import is_model_wrapper
from mmengine.registry import DATASETS, LOOPS
from mmengine.runner import Runner, TestLoop

from sfp.evaluation.configs import ConfigError
from sfp.evaluation.journal import Journal
from sfp.evaluation.loading import Batches
from sfp.evaluation.metrics import main_metric, name_apart, needs_every_image
from sfp.evaluation.scores import note, note_progress, note_turned
from sfp.evaluation.settings import GROUPS, image_names, settings
from sfp.terminal import progress


@LOOPS.register_module(force=True)  # modules may be imported again
class ResumableTestLoop(TestLoop):
    """mmengine's test loop over the images that the journal in the work folder does not have yet.

    The dataset is cut into its batches once, in order, and whole batches are dealt to the processes:
    which images go through the network together depends neither on what was done before nor on the
    number of processes, so neither can change a result. Nothing is padded or repeated to make the
    shares equal. Images that are done are not loaded.

    Args:
        runner, dataloader, evaluator, fp16: of `TestLoop`; the dataloader as config.
        resume: False forgets what is in the journal and starts over.

    Attributes:
        settings: what determines the results (`sfp.evaluation.card.settings`), on every process.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: Mapping[str, Any],
        evaluator: Evaluator | Mapping[str, Any] | Sequence[Any],
        fp16: bool = False,
        resume: bool = True,
    ) -> None:
        dataset = DATASETS.build(dataloader["dataset"])
        dataset.full_init()
        if not isinstance(evaluator, Evaluator):
            try:
                evaluator = runner.build_evaluator(evaluator)
            except TypeError as error:
                raise ConfigError(f"test_evaluator: {error}") from None
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        shared: list[Any] = [None]
        if is_main_process():
            device = next(model.parameters()).device.type
            shared = [settings(runner.cfg, model=model, dataset=dataset, device=device)]
            note_turned(shared[0]["data"])
        broadcast_object_list(shared)
        self.settings: dict[str, Any] = shared[0]

        size, count = dataloader.get("batch_size", 1), len(dataset)
        batches = [range(i, min(i + size, count)) for i in range(0, count, size)]
        name_apart(evaluator)
        if (metric := main_metric(evaluator)) is not None:
            journal = Journal(Path(runner.work_dir, "journal"), self.settings, get_rank())
            paths, names = image_names(dataset)
            metric.keep(journal, paths, names)
            resume = resume and not needs_every_image(evaluator)
            batches = _remaining(journal, names, batches, resume)
        self._remaining = sum(map(len, batches))
        own = [i for batch in batches[get_rank() :: get_world_size()] for i in batch]
        super().__init__(runner, Batches(dataloader, dataset, own), evaluator, fp16)

    def run(self) -> dict[str, float]:
        """Runs the test under a progress bar, which only the first process shows."""
        total = len(self.dataloader.dataset)
        with progress(disable=not is_main_process()) as self._bar:  # ends it also on an error
            self._task = self._bar.add_task(
                "evaluating", total=total, completed=total - self._remaining
            )
            return super().run()

    def run_iter(self, idx: int, data_batch: Mapping[str, Any]) -> None:
        """Runs a batch and counts it."""
        super().run_iter(idx, data_batch)
        # other processes' batches may be smaller, or one less
        done = self._bar.tasks[0].completed + len(data_batch["inputs"]) * get_world_size()
        self._bar.update(self._task, completed=min(done, len(self.dataloader.dataset)))


def _remaining(
    journal: Journal, names: Sequence[str], batches: list[range], resume: bool
) -> list[range]:
    """The batches that are not done, as the first process finds them and tells the others."""
    shared: list[Any] = [None]
    if is_main_process():
        if not resume:
            journal.clear()
        done = journal.read()
        shared = [[batch for batch in batches if any(names[i] not in done for i in batch)]]
        _say(journal, len(done), len(names))
    broadcast_object_list(shared)
    return shared[0]


def _say(journal: Journal, done: int, count: int) -> None:
    note_progress(done, count, f"({journal.folder})", journal.damaged)
    if journal.others and not done:
        old, new = journal.others[-1], journal.settings
        changed = [
            f"{group} {key}"
            for group in GROUPS
            for key in sorted({*old.get(group, {}), *new[group]})
            if old.get(group, {}).get(key) != new[group].get(key)
        ]
        note(
            f"{journal.folder} is of an evaluation with other settings ({', '.join(changed)}): "
            "starting over"
        )
