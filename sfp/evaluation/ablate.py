"""The ablation tables of SFP, CLIPtrase and GCLIP, on any config, with published numbers beside ours.

A study is data: rows of a label, a method with its knobs, and what the paper measured. `ablate` runs
all rows image by image with `compare.measure`, which shares the trunk's run and continues after a
kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.config import Config

from sfp.cli.method_table import markdown
from sfp.data.benchmarks import by_dataset
from sfp.evaluation import paired as bootstrap
from sfp.evaluation import scores
from sfp.evaluation.compare import measure
from sfp.files import atomic_write
from sfp.registry import list_ops, suggest

COLUMNS = scores.COLUMNS[:3]  # as the papers' tables have them
# two of Okabe and Ito's colours, told apart by every common kind of colour vision, bright under black
OURS, PUBLISHED = "#56B4E9", "#D55E00"


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        label: in tables and plots.
        method: what `build_method` takes.
        published: mIoU by the benchmark's title; text where the source leaves a digit open.
    """

    label: str
    method: Mapping[str, Any]
    published: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        title: what is varied.
        rows: in the order of the table.
        source: of the published numbers, or why there are none.
        axis: what the labels count, if they are numbers: the plot is then a line.
    """

    title: str
    rows: Sequence[Row]
    source: str
    axis: str | None = None


def _poster(label: str, voc: float | str, ade: float | str, **knobs: Any) -> Row:
    return Row(label, dict(type="sfp_paper", **knobs), {"VOC21": voc, "ADE20K": ade})


def _row(label: str, method: str, **knobs: Any) -> Row:
    return Row(label, dict(type=method, **knobs))


SFP_POSTER = "poster of SFP (Jin et al., ICCV 2025)"
STUDIES: Mapping[str, Study] = {
    "modules": Study(
        "SFP: the modules, one after the other",
        [
            _poster("none", 57.0, 16.7, purify=False, enhancer="qk", integrator=False),
            _poster("SOM", 60.1, 18.2, enhancer="qk", integrator=False),
            _poster("+ SAE", 62.3, 19.5, integrator=False),
            _poster("+ HAI", 63.9, 20.8),
        ],
        SFP_POSTER,
    ),
    "self_attention": Study(
        "SFP: attention of the last block, with SOM and without HAI",
        [
            _poster(enhancer, voc, ade, enhancer=enhancer, integrator=False)
            for enhancer, voc, ade in (
                ("qk", 60.1, 18.2),
                ("qq", 62.1, 19.3),
                ("kk", 62.0, 19.3),
                ("vv", 61.4, 18.9),
                ("qq+kk", 62.3, 19.5),
                ("qq+vv", 61.9, 19.1),
                ("kk+vv", 61.1, 18.7),
            )
        ],
        SFP_POSTER,
    ),
    "layers": Study(
        "SFP: the layer at which HAI starts",
        [
            # the poster counts layers from 1
            _poster(str(start), voc, ade, integrator_start=start - 1)
            for start, voc, ade in (
                (1, 63.9, 20.8),
                (5, 63.4, 20.5),
                (8, 63.0, 20.3),
                (10, 62.6, 19.9),
                (11, "62.x", "19.x"),
            )
        ],
        SFP_POSTER,
        axis="first layer, counted from 1",
    ),
    "cliptrase": Study(
        "CLIPtrase: SCR, clustering, denoising; cosine against softmax; the clustered layer",
        [
            _row("none", "cliptrase", correlation="none", cluster=False),
            _row("SCR", "cliptrase", cluster=False),
            _row("clustering", "cliptrase", correlation="none", denoise="none"),
            _row("SCR + clustering", "cliptrase", denoise="none"),
            _row("+ denoise as released", "cliptrase"),
            _row("+ denoise as in the paper", "cliptrase", denoise="paper"),
            _row("release, cosine", "cliptrase", correlation="cosine"),
            _row("release, layer -1", "cliptrase", layer=-1),
            _row("release, cosine, layer -1", "cliptrase", correlation="cosine", layer=-1),
            _row(
                "all as in the paper",
                "cliptrase",
                correlation="cosine",
                layer=-1,
                unit_rows=True,
                denoise="paper",
            ),
        ],
        "of centre crops with void pixels counted, which do not compare",
    ),
    "gclip": Study(
        "GCLIP: attention map fusion (AMF) and channel suppression (CS)",
        [
            _row("none", "gclip", blocks=(), suppress=False),
            _row("AMF", "gclip", suppress=False),
            _row("CS", "gclip", blocks=()),
            Row(
                "AMF + CS",
                dict(type="gclip"),
                {"ADE20K": 18.5, "Cityscapes": 33.7, "COCO-Stuff 164k": 24.8},
            ),
        ],
        "GCLIP (arXiv:2502.06818), second-hand",
    ),
    "backbones": Study(
        "plain CLIP and both forms of SFP, by weights",
        [_row(method, method) for method in ("clip", "sfp", "sfp_paper")],
        "none at hand",
    ),
}


def studies() -> dict[str, Study]:
    """All studies by name, with those whose rows depend on what is registered."""
    off = _row("none", "sfp", purify=False)
    detectors = [off, *(_row(name, "sfp", pm=name) for name in list_ops("detector"))]
    found = Study("SFP as released: the detector of outliers", detectors, "none at hand")
    return {**STUDIES, "detectors": found}


def find_study(name: str) -> Study:
    """A study.

    Raises:
        ValueError: if there is none of that name; the message names the closest.
    """
    known = studies()
    if name not in known:
        raise ValueError(f"unknown study {name!r}{suggest(name, known)}")
    return known[name]


def ablate(
    config: Config,
    name: str,
    *,
    weights: Sequence[str] = (),
    resume: bool = True,
    paired: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Runs a study and writes ablate_<name>.json, .md and .png into the work folder.

    Args:
        config: from `evaluate.load_config`; its `model.method` is not used.
        name: of the study.
        weights: of the study "backbones", one model in memory at a time; by default the config's.
        resume: False starts over.
        paired: label of the row that the others are paired with (of each weights' own), or "previous".
        progress: called with the weights that run, the images done and all of them.

    Returns:
        "rows": label, method, mIoU, mAcc and aAcc in percent, published mIoU by benchmark, and with
        `paired` the row's "difference", None for one that has no base.

    Raises:
        ValueError: for an unknown study or row, or weights for one that takes the config's.
    """
    study = find_study(name)
    if weights and name != "backbones":
        raise ValueError("several weights are for the study 'backbones'; others take the config's")
    if paired:
        bootstrap.bases([row.label for row in study.rows], paired)
    sources = list(dict.fromkeys(weights)) or [config.model.weights]
    rows = []
    for source in sources:
        own = config.copy()
        own.model.weights = source
        short = Path(str(source)).stem if Path(str(source)).is_file() else str(source)
        prefix = f"{short}: " if len(sources) > 1 else ""
        # names of journals, too: the study keeps rows of one label apart
        named = {f"{name} {prefix}{row.label}": row.method for row in study.rows}
        base = f"{name} {prefix}{paired}" if paired and paired != bootstrap.PREVIOUS else paired
        record = measure(
            own,
            named,
            resume=resume,
            paired=base,
            progress=partial(progress, str(source)),
        )
        for row, (row_name, measured) in zip(study.rows, record["methods"].items(), strict=True):
            numbers = {k: measured[k] for k in COLUMNS}
            label, published = prefix + row.label, dict(row.published)
            rows.append(dict(label=label, method=dict(row.method), **numbers, published=published))
            if paired:
                rows[-1]["difference"] = record["differences"].get(row_name)
    benchmark = by_dataset(config.test_dataloader.dataset.type)
    result = dict(
        study=name,
        title=study.title,
        config=Path(config.filename or "").name,
        benchmark=benchmark.title if benchmark else None,
        images=record["images"],
        weights=list(map(str, sources)),
        source=study.source,
        axis=study.axis,
        paired=paired,
        rows=rows,
    )
    _write(result, Path(config.work_dir, f"ablate_{name}"))
    return result


def _write(result: Mapping[str, Any], base: Path) -> None:
    """Writes a study as .json, .md and .png."""
    with atomic_write(base.with_suffix(".json")) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    with atomic_write(base.with_suffix(".md")) as path:
        path.write_text(report(result))
    plot(result, base.with_suffix(".png"))


def same_benchmark(result: Mapping[str, Any]) -> bool:
    """Whether there are published numbers of the benchmark that was run."""
    return any(result["benchmark"] in row["published"] for row in result["rows"])


def sheet(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: ours, then what is published on this benchmark, or else on others."""
    published: list[str] = list(dict.fromkeys(b for r in result["rows"] for b in r["published"]))
    if same_benchmark(result):
        published = [result["benchmark"]]
    between = [bootstrap.heading(result["paired"])] if result["paired"] else []
    header = ["variant", *COLUMNS, *between, *(f"{name}, published" for name in published)]
    rows = [
        [
            row["label"],
            *(scores.cell(row[k], decimals=1) for k in COLUMNS),
            *([bootstrap.cell(row["difference"])] if between else ()),
            *(str(row["published"].get(name, "-")) for name in published),
        ]
        for row in result["rows"]
    ]
    return header, rows


def caption(result: Mapping[str, Any]) -> str:
    """What was run, and where the published numbers are from."""
    weights = ", ".join(result["weights"])
    text = f"{result['config']}, {result['images']} images, weights {weights}."
    text += f" Published numbers: {result['source']}"
    if any(row["published"] for row in result["rows"]) and not same_benchmark(result):
        text += "; they are of other benchmarks than ours"
    return text + "."


def report(result: Mapping[str, Any]) -> str:
    """A study as Markdown."""
    table = markdown(*sheet(result))
    picture = f"ablate_{result['study']}.png"
    return f"# {result['title']}\n\n{caption(result)}\n\n{table}\n![mIoU by variant]({picture})\n"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: bars, or a line if the labels are numbers; published mIoU of the same benchmark."""
    rows = result["rows"]
    ours = [row["mIoU"] for row in rows]
    known = [
        (i, number)
        for i, row in enumerate(rows)
        if isinstance(number := row["published"].get(result["benchmark"]), float)
    ]
    where = result["benchmark"] or result["config"].removesuffix(".py")
    if result["axis"]:
        figure = Figure(figsize=(6.4, 4), dpi=110)
        axis = figure.add_subplot()
        x = [int(row["label"]) for row in rows]
        axis.plot(x, ours, "o-", color=OURS, label="here")
        axis.plot([x[i] for i, _ in known], [y for _, y in known], "D--", color=PUBLISHED)
        axis.set_xticks(x)
        axis.set_xlabel(result["axis"])
        axis.set_ylabel(f"mIoU on {where}, %")
        axis.margins(y=0.2)
    else:
        figure = Figure(figsize=(6.8, 1.5 + 0.34 * len(rows)), dpi=110)
        axis = figure.add_subplot()
        axis.barh(range(len(rows)), ours, height=0.6, color=OURS, label="here")
        for i, number in enumerate(ours):
            # at the foot of the bar, where no published point covers it
            axis.annotate(f"{number:.1f}", (0, i), (4, 0), textcoords="offset points", va="center")
        axis.plot(
            [y for _, y in known],
            [i for i, _ in known],
            "D",
            color=PUBLISHED,
            markeredgecolor="black",
        )
        axis.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel(f"mIoU on {where}, %")
        axis.margins(x=0.08)
    FigureCanvasAgg(figure)
    if known:
        axis.lines[-1].set_label("published")
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the data
    figure.suptitle(result["title"], fontsize=10)
    axis.grid(alpha=0.3, axis="y" if result["axis"] else "x")
    axis.set_axisbelow(True)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary)
