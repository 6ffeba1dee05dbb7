"""The ablation tables of SFP, CLIPtrase and GCLIP, on any config, with published numbers beside ours.

A study is data: each row has a label, a method with its knobs, and its published numbers. `ablate` runs
all rows image by image with `compare.measure`, which shares runs of the trunk and resumes interrupted
studies.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from textwrap import wrap
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.config import Config

from sfp.evaluation import paired as bootstrap
from sfp.evaluation import scores
from sfp.evaluation.compare import measure
from sfp.evaluation.published import (
    CONFIGS,
    Number,
    backbone_of,
    benchmark_of,
    published,
    reservation,
)
from sfp.evaluation.settings import settings
from sfp.files import atomic_write
from sfp.palette import SKY, VERMILLION
from sfp.registry import list_ops, suggest
from sfp.tables import markdown

COLUMNS = scores.COLUMNS[:3]  # as in the papers' tables
OURS, PUBLISHED = SKY, VERMILLION


@dataclass(frozen=True)
class Row:
    """A variant.

    Attributes:
        label: its name in tables and plots.
        method: argument of `build_method`; None if this package cannot run it.
        published: its published numbers.
        needs: what the config must have, or the row is skipped: a guide of this name, or "regions".
    """

    label: str
    method: Mapping[str, Any] | None
    published: Sequence[Number] = ()
    needs: str | None = None


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        title: what is varied.
        rows: the variants, in the order of the table.
        axis: meaning of the labels if they are numbers; the plot is then a line.
        note: remarks on rows, for the caption.
    """

    title: str
    rows: Sequence[Row]
    axis: str | None = None
    note: str = ""


def _numbers(table: str, *rows: str) -> list[Number]:
    """The published mIoU of rows of a table, without averages."""
    found = [n for row in rows for n in published().row(table, row).values()]
    return [n for n in found if n.benchmark in CONFIGS and n.metric == "mIoU"]


def _poster(label: str, table: str, row: str, **knobs: Any) -> Row:
    return Row(label, dict(type="sfp_paper", **knobs), _numbers(f"sfp_poster/{table}", row))


def _row(label: str, method: str, **knobs: Any) -> Row:
    return Row(label, dict(type=method, **knobs))


def _paper(label: str, table: int, row: str, **knobs: Any) -> Row:
    """A variant of CLIPtrase as its paper describes it."""
    own = dict(correlation="cosine", layer=-1, unit_rows=True, denoise="paper")
    method = dict(type="cliptrase", **{**own, **knobs})
    return Row(label, method, _numbers(f"cliptrase/{table}", row), knobs.get("guide"))


def _backbones(method: str, row: str, needs: str | None = None) -> Row:
    tables = [
        t
        for t in ("main", "ViT-B/32", "ViT-L/14")
        if published().find(table=f"sfp_poster/{t}", row=row)
    ]
    numbers = [n for table in tables for n in _numbers(f"sfp_poster/{table}", row)]
    return Row(method, dict(type=method), numbers, needs)


@cache
def _papers() -> dict[str, Study]:
    """The studies taken from papers, and similar ones."""
    return {
        "modules": Study(
            "SFP: modules added one by one",
            [
                _poster("none", "modules", "none", purify=False, enhancer="qk", integrator=False),
                _poster("SOM", "modules", "SOM", enhancer="qk", integrator=False),
                _poster("+ SAE", "modules", "SOM + SAE", integrator=False),
                _poster("+ HAI", "modules", "SOM + SAE + HAI"),
            ],
        ),
        "self_attention": Study(
            "SFP: attention of the last block, with SOM and without HAI",
            [
                _poster(pairs, "self_attention", pairs, enhancer=pairs, integrator=False)
                for pairs in ("qk", "qq", "kk", "vv", "qq+kk", "qq+vv", "kk+vv")
            ],
        ),
        "layers": Study(
            "SFP: the layer at which HAI starts",
            [
                # the poster counts layers from 1
                _poster(str(start), "layers", str(start), integrator_start=start - 1)
                for start in (1, 5, 8, 10, 11)
            ],
            axis="first layer, counted from 1",
        ),
        "cliptrase": Study(
            "CLIPtrase: the ablations of its paper (tables 2, 4 and 5, Eq. 14)",
            [
                _paper("CLIP", 2, "CLIP", correlation="none", cluster=False),
                _paper("SCR", 2, "SCR", cluster=False),
                _paper("SCR + PC", 2, "SCR + PC", denoise="none"),
                _paper("SCR + PC + D", 2, "SCR + PC + D"),
                _paper("inner product", 2, "inner product", correlation="softmax", product=True),
                _paper("features clustered", 2, "features clustered", features=True),
                *(
                    # SCR, and the correlations to cluster, from a layer counted from 1
                    _paper(f"layer {n}", 2, f"layer {n}", restore=n - 1, layer=n - 1)
                    for n in (9, 10, 11)
                ),
                Row("without SCR (table 4)", None, _numbers("cliptrase/4", "without SCR")),
                _paper("<x_i, x_i>", 4, "<x_i, x_i>", correlation="identity", cluster=False),
                _paper("<x_i, x_j>", 4, "<x_i, x_j>", correlation="softmax", cluster=False),
                Row("COS in ground truth", None, _numbers("cliptrase/4", "COS(x_i, x_j), j in GT")),
                _paper("DINOv2 masks", 5, "CLIPtrase + DINOv2", guide="dino"),
                Row("heads concatenated", _paper("", 2, "SCR + PC + D", concat=True).method),
            ],
            note="Inner product, clustered features, earlier layers and <x_i, x_i> are our "
            "interpretation of rows for which the paper gives no formula; it gives no number for "
            "concatenated heads. The published numbers of CLIP are those at 336 pixels (table 7). On "
            "VOC20 the release also multiplies by the class token's logits, these rows do not",
        ),
        "cliptrase_release": Study(
            "CLIPtrase as released: differences between its code and its paper",
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
            ],
        ),
        "gclip": Study(
            "GCLIP: attention map fusion (AMF) and channel suppression (CS)",
            [
                _row("none", "gclip", blocks=(), suppress=False),
                _row("AMF", "gclip", suppress=False),
                _row("CS", "gclip", blocks=()),
                Row("AMF + CS", dict(type="gclip"), _numbers("gclip", "GCLIP")),
            ],
        ),
        "backbones": Study(
            "methods by weights",
            [
                _backbones("clip", "CLIP"),
                _backbones("sclip", "SCLIP"),
                _backbones("naclip", "NACLIP"),
                _row("sfp", "sfp"),
                _backbones("sfp_paper", "SFP"),
                _backbones("proxyclip", "ProxyCLIP", needs="dino"),
                _backbones("lavg", "LaVG", needs="regions"),
            ],
        ),
    }


def studies() -> dict[str, Study]:
    """All studies by name, including those whose rows depend on the registry."""
    off = _row("none", "sfp", purify=False)
    detectors = [off, *(_row(name, "sfp", pm=name) for name in list_ops("detector"))]
    found = Study("SFP as released: the outlier detector", detectors)
    return {**_papers(), "detectors": found}


def find_study(name: str) -> Study:
    """A study.

    Raises:
        ValueError: if there is none of that name; the message suggests the closest.
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
        name: name of the study.
        weights: weights for the study "backbones", loaded one at a time; by default the config's.
        resume: False starts over.
        paired: label of the row that the others are paired with (for the same weights), or "previous".
        progress: called with the current weights, the number of finished images and the total.

    Returns:
        "rows": label, method, the scores "columns" in percent (mIoU, mAcc, aAcc and further ones of the
        config's metric; None for variants that are not run), and
        "published": benchmark, value and "tag" (how its setting differs from ours) of each published
        mIoU; with `paired` also "difference", None for a row without a base.

    Raises:
        ValueError: for an unknown study or row, or several weights for a study other than "backbones".
    """
    study = find_study(name)
    if weights and name != "backbones":
        raise ValueError(
            f"several --weights work only with the study 'backbones'; {name!r} takes one"
        )
    given = {None, *(config.model.get("guides") or {})}
    given |= {"regions"} if config.model.get("regions") else set()
    runs = [row for row in study.rows if row.method and row.needs in given]
    if paired:
        bootstrap.bases([row.label for row in runs], paired)
    sources = list(dict.fromkeys(weights)) or [config.model.weights]
    rows, benchmark = [], benchmark_of(config.test_dataloader.dataset.type)
    for source in sources:
        own = copy.deepcopy(config)
        own.model.weights = source
        short = Path(str(source)).stem if Path(str(source)).is_file() else str(source)
        prefix = f"{short}: " if len(sources) > 1 else ""
        # also the names of journals: the study's name keeps equal labels apart
        named = {f"{name} {prefix}{row.label}": row.method for row in runs if row.method}
        base = f"{name} {prefix}{paired}" if paired and paired != bootstrap.PREVIOUS else paired
        record = measure(
            own,
            named,
            resume=resume,
            paired=base,
            progress=partial(progress, str(source)),
        )
        measured = dict(zip((row.label for row in runs), record["methods"].values(), strict=True))
        found = scores.columns_of(record["methods"].values())
        columns = [name for name in found if name in COLUMNS or name not in scores.COLUMNS]
        groups = settings(own)
        backbone = backbone_of(groups["weights"])
        for row in study.rows:
            ours = {k: measured.get(row.label, {}).get(k) for k in columns}
            known = _of_weights(row, backbone)
            shown = [_shown(n, backbone, benchmark, groups) for n in known]
            method = dict(row.method) if row.method else None
            rows.append(dict(label=prefix + row.label, method=method, **ours, published=shown))
            if paired:
                rows[-1]["difference"] = record["differences"].get(f"{name} {prefix}{row.label}")
    numbers = [n for row in study.rows for n in row.published]
    result = dict(
        study=name,
        title=study.title,
        config=Path(config.filename or "").name,
        benchmark=benchmark,
        images=record["images"],
        weights=list(map(str, sources)),
        sources=list(dict.fromkeys(published().sources[n.source].text for n in numbers)),
        note=study.note,
        axis=study.axis,
        paired=paired,
        columns=columns,
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


def _of_weights(row: Row, weights: str) -> list[Number]:
    """Published numbers for the same backbone, or else for ViT-B/16, the papers' default."""
    same = [n for n in row.published if n.backbone == weights]
    return same or [n for n in row.published if n.backbone == "ViT-B/16"]


def _shown(
    number: Number, weights: str, benchmark: str | None, groups: Mapping[str, Any]
) -> dict[str, Any]:
    """A number in the format of results."""
    protocol = published().protocols[number.protocol]
    if number.benchmark == benchmark:
        why = reservation(number, groups)
    else:
        why = "" if protocol.options == {} else protocol.name  # {}: that of the shipped configs
    tag = "; ".join(filter(None, (number.backbone if number.backbone != weights else "", why)))
    return dict(benchmark=number.benchmark, value=number.value, tag=tag)


def same_benchmark(result: Mapping[str, Any]) -> bool:
    """Whether there are published numbers for the benchmark that was run."""
    numbers = (n for row in result["rows"] for n in row["published"])
    return any(n["benchmark"] == result["benchmark"] for n in numbers)


def _published(result: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The benchmarks whose published numbers are shown, this one or else others; marks of their tags.

    With a single tag, which headers then name, its mark is empty.
    """
    numbers = [n for row in result["rows"] for n in row["published"]]
    if same_benchmark(result):
        numbers = [n for n in numbers if n["benchmark"] == result["benchmark"]]
    tags = list(dict.fromkeys(n["tag"] for n in numbers))
    letters = iter(ascii_lowercase)
    marks = {tag: f" {next(letters)}" if tag and len(tags) > 1 else "" for tag in tags}
    return list(dict.fromkeys(n["benchmark"] for n in numbers)), marks


def sheet(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: our numbers, then published ones for this benchmark, or else for others."""
    benchmarks, marks = _published(result)
    tag = f" ({next(iter(marks))})" if len(marks) == 1 and all(marks) else ""
    rows = []
    for row in result["rows"]:
        values = {
            n["benchmark"]: f"{n['value']}{marks.get(n['tag'], '')}" for n in row["published"]
        }
        ours = scores.cells(row, 1, result["columns"])
        if result["paired"]:
            ours.append(bootstrap.cell(row["difference"]))
        rows.append([row["label"], *ours, *(values.get(name, "-") for name in benchmarks)])
    between = [bootstrap.heading(result["paired"])] if result["paired"] else []
    names = [f"{name}, published{tag}" for name in benchmarks]
    return ["variant", *result["columns"], *between, *names], rows


def caption(result: Mapping[str, Any]) -> str:
    """The caption: what was run, and the sources of the published numbers."""
    weights = ", ".join(result["weights"])
    text = f"{result['config']}, {result['images']} images, weights {weights}."
    text += f" Published numbers: {', '.join(result['sources']) or 'none'}"
    if result["sources"] and not same_benchmark(result):
        text += "; they are for other benchmarks"
    notes = [f"{mark.strip()}: {tag}" for tag, mark in _published(result)[1].items() if mark]
    text += f". {'. '.join(notes)}" if notes else ""
    text += f". {result['note']}" if result["note"] else ""
    if idle := [row["label"] for row in result["rows"] if row["mIoU"] is None]:
        text += (
            f". Not run: {', '.join(idle)} (not implemented, or the guide or regions are missing)"
        )
    return text + "."


def report(result: Mapping[str, Any]) -> str:
    """A study as Markdown."""
    table = markdown(*sheet(result))
    picture = f"ablate_{result['study']}.png"
    return f"# {result['title']}\n\n{caption(result)}\n\n{table}\n![mIoU by variant]({picture})\n"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: bars, or a line if the labels are numbers; published mIoU of the same benchmark."""
    rows = result["rows"]
    ours = [math.nan if row["mIoU"] is None else row["mIoU"] for row in rows]
    known = [
        (i, number["value"])
        for i, row in enumerate(rows)
        for number in row["published"]
        if number["benchmark"] == result["benchmark"] and isinstance(number["value"], float)
    ]
    tags = [
        n["tag"] for row in rows for n in row["published"] if n["benchmark"] == result["benchmark"]
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
            # at the foot of the bar, where published points do not cover it
            text = "not run" if math.isnan(number) else f"{number:.1f}"
            axis.annotate(text, (0, i), (4, 0), textcoords="offset points", va="center")
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
        tag = "; ".join(filter(None, dict.fromkeys(tags)))
        axis.lines[-1].set_label("\n".join(wrap(f"published ({tag})" if tag else "published", 30)))
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside the data
    figure.suptitle(result["title"], fontsize=10)
    axis.grid(alpha=0.3, axis="y" if result["axis"] else "x")
    axis.set_axisbelow(True)
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
