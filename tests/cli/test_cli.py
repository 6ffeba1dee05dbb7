"""The command `sfp`: its exit codes, the names of its configs, and the installed wheel."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from setuptools import find_packages

import sfp
from sfp import cli
from sfp.cli import method_table, methods, options
from sfp.clip.checkpoints import loading
from sfp.data.images import ImageError
from sfp.evaluation import configs as shipped
from sfp.registry import METHODS
from sfp.terminal import print_table

ROOT = Path(__file__).parents[2]
FEW = ["--cfg-options", "test_dataloader.dataset.scenes=2", "test_dataloader.num_workers=0"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, and no data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_ROOT", raising=False)
    return tmp_path


# -- exit codes ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("eval voc22", 2, "there is no config voc22: .* did you mean 'voc21'"),
        ("eval configs/cfg_voc22.py", 2, "there is no config configs/cfg_voc22.py"),
        ("eval voc21", 3, r"no image folder .*/data/VOCdevkit.* DATA_ROOT"),
        ("eval mini --method scilp", 2, "did you mean 'sclip'"),
        ("eval mini --weights ViT-B/61", 3, "did you mean 'ViT-B/16'"),
        ("eval mini --weights broken.pt", 3, r"broken\.pt"),
        ("eval mini --cfg-options mdoel.pamr_steps=1", 2, "mdoel.pamr_steps: .* mean 'model'"),
        ("eval mini --cfg-options model=3", 2, "has no model.type"),
        ("eval mini --cfg-options test_dataloader.num_wrokers=1", 2, "did you mean 'num_workers'"),
        ("eval mini --cfg-options model.data_preprocessor.x=1", 2, r"model\.data_prepro.* 'x'"),
        ("eval mini --cfg-options test_dataloader.dataset.scenes=x", 2, "scenes='x': expected"),
        ("compare mini --methods scilp", 2, "did you mean 'sclip'"),
        ("compare voc21", 3, "no image folder"),
        ("ablate mini --study layer", 2, "did you mean 'layers'"),
        ("ablate mini --study modules --weights mini mini", 2, "study 'backbones'"),
        ("audit nowhere mini", 2, "there is no config nowhere"),
        ("audit broken.pt mini", 2, r"broken\.pt is not a card"),
        ("label photos --out out", 2, "no classes given"),
        ("label photos --out out --config voc22", 2, "did you mean 'voc21'"),
        ("label photos --out out --classes cat", 3, "photos does not exist"),
        ("label . --out out --classes cat --part 3/2", 3, "no image or archive"),
        ("label broken.pt --out out --classes cat --part 3/2", 2, "--part 3/2: expected I/N"),
        ("label broken.pt --out out --classes cat --weights broken.pt", 3, r"broken\.pt"),
        ("methods spf", 2, "did you mean 'sfp'"),
        ("methods --kind detectr", 2, "did you mean 'detector'"),
    ],
)
def test_exit_codes(command, code, message, elsewhere, capsys):
    (elsewhere / "broken.pt").write_bytes(b"no weights")
    few = FEW if re.match("(eval|compare|ablate) mini(?!.*scenes=)", command) else []
    assert cli.main([*command.split(), *few]) == code
    printed = capsys.readouterr()
    assert not printed.out
    lines = printed.err.strip().splitlines()
    assert re.match(rf"error: .*{message}", lines[-1])
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no model.type"),
        ('model = dict(type="OpenVocabSegmentor")', "has no model.classes"),
        ("model = undefined", "cannot be read as a config: NameError: name 'undefined'"),
        ("model = dict(", "cannot be read as a config: SyntaxError"),
        (
            'custom_imports = dict(imports=["no_such"])',
            "ModuleNotFoundError: No module named 'no_such'; .* on PYTHONPATH",
        ),
        ('_base_ = "base_config.py"', "cannot be read as a config: .*base_config.py"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "audit mini"])
def test_configs_that_are_none(command, text, message, elsewhere, capsys):
    (elsewhere / "mine.py").write_text(text)
    assert cli.main([*command.split(), "mine.py"]) == 2
    assert re.match(rf"error: mine\.py .*{message}", capsys.readouterr().err)


def test_ctrl_c(capsys):
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    assert cli.guarded(run, argparse.Namespace()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "command",
    ["", "evl mini", "eval", "eval mini --launcher mpi", "eval mini --cfg-options model.method"],
)
def test_wrong_command_lines(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(command.split())
    assert capsys.readouterr().err.startswith("usage: sfp")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("setting"), 2),
        (shipped.ConfigError("config"), 2),
        (sfp.DataError("label"), 3),  # a ValueError as well
        (ImageError("image"), 3),
        (sfp.WeightsError("weights"), 3),
        (FileNotFoundError(2, "no such file", "a.png"), 3),
        (FloatingPointError("NaN"), 3),
        (ModuleNotFoundError("ray: pip install 'sfp[scale]'"), 3),
    ],
)
def test_errors_become_a_line_and_a_code(error, code, capsys):
    def run(args: argparse.Namespace) -> int:
        raise error

    assert cli.guarded(run, argparse.Namespace()) == code
    text = "a.png: no such file" if getattr(error, "filename", None) else error
    assert capsys.readouterr().err == f"error: {text}\n"


def test_a_full_disk_says_what_to_do():
    full = OSError(errno.ENOSPC, "No space left on device")
    assert cli.message(full).startswith("No space left on device: free some, or choose another")
    full.filename = b"a/b.png"
    assert cli.message(full) == "a/b.png: No space left on device"


def test_warnings_are_a_line_each_and_told_once(monkeypatch):
    shown = []

    def run(args: argparse.Namespace) -> int:  # pytest records warnings before they are written
        shown.extend(
            warnings.formatwarning(UserWarning(text), UserWarning, "code.py", 1)
            for text in ("first", "second", "first")
        )
        return 0

    monkeypatch.setattr("sfp.cli.version.run", run)
    before = warnings.formatwarning
    assert cli.main(["version"]) == 0
    assert warnings.formatwarning is before
    assert shown == ["warning: first\n", "warning: second\n", ""]


def test_bugs_are_not_hidden():
    def run(args: argparse.Namespace) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.guarded(run, argparse.Namespace())


@pytest.mark.process
def test_a_reader_that_leaves():
    """`sfp methods | head -1`, the reader gone before the table comes: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sfp", "methods"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(writer)
    assert done.returncode == 1
    assert not done.stderr


# -- help, versions, completion ------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (
        a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_every_command_is_there_and_explained(capsys):
    modules = {path.stem for path in (ROOT / "sfp/cli").glob("*.py")}
    assert (
        set(commands())
        == set(cli.COMMANDS)
        == modules - {*("__init__", "method_table", "options", "terminal")}
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    overview = capsys.readouterr().out
    for name, parser in commands().items():
        assert re.search(rf"^    {name}\s+\S", overview, re.MULTILINE)
        text = parser.format_help()
        assert re.search(rf"[Ee]xamples?:\n(.*\n)*  +(.* )?sfp {name}\b", text), name
        undocumented = [a.dest for a in parser._actions if not a.help and not a.choices]
        assert not undocumented, name


def test_examples_of_the_help_parse():
    """Every command line that a help shows is one that the parser takes."""
    parser = cli.build_parser()
    shown = []
    for command in commands().values():
        text = command.format_help().replace("\\\n", " ")
        for block in re.findall(r"^[Ee]xamples?:\n((?: .*\n)+)", text, re.MULTILINE):
            shown += [line.split("#")[0].split(" > ")[0] for line in block.splitlines()]
    assert len(shown) > 20
    for line in shown:
        assert len(re.findall(rf"\bsfp ({'|'.join(cli.COMMANDS)})\b", line)) == 1, line
        words = re.findall(r'"[^"]*"|\S+', line.split("sfp ", 1)[1])
        parser.parse_args([word.strip('"') for word in words])


def test_tables_show_text_as_it_is(capsys):
    """rich takes words in brackets for styles and words between colons for emoji."""
    print_table(["method", "[a] mIoU"], [["clip [names]", ":cat:"]], title="[bold]")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("clip [names]", "[a] mIoU", ":cat:", "[bold]"))


def test_versions(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"sfp {sfp.__version__}\n"
    assert cli.main(["version"]) == 0
    printed = capsys.readouterr().out
    for line in (f"sfp {sfp.__version__}", "torch 2", "onedl-mmsegmentation 1", "GPU: "):
        assert f"\n{line}" in f"\n{printed}"


@pytest.mark.process
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("eva", {"eval"}),
        ("eval ade20", {"ade20k"}),
        ("eval voc21 --wei", {"--weights"}),
        ("eval voc21 --method sf", {"sfp", "sfp_paper"}),
        ("compare voc21 --methods clip sc", {"sclip", "scclip"}),
        ("ablate mini --study mod", {"modules"}),
        ("ablate mini --weights min", {"mini"}),
        ("methods --kind mit", {"mitigator"}),
        ("data prepare ade", {"ade20k", "ade847"}),
    ],
)
def test_completion_in_bash(typed, offered, tmp_path, capsys):
    """What TAB offers, asked from bash itself."""
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "sfp.bash"
    script.write_text(capsys.readouterr().out)
    words = f"COMP_WORDS=(sfp {typed}); COMP_CWORD={len(typed.split())}"
    ask = f'. {script}; {words}; _shtab_sfp; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered
    assert not done.stderr


def test_completion_asks_for_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "zsh"]) == 3
    assert "pip install 'sfp[completion]'" in capsys.readouterr().err


# -- settings, modules of one's own, listings ----------------------------------------------------


VALUES = st.recursive(
    st.sampled_from(["1", "-2.5", "1e-3", "True", "none", "None", "som", "'q'", "x=(1)"]),
    lambda inner: st.tuples(
        st.sampled_from(["[{}]", "({})"]), st.lists(inner, max_size=3).map(",".join)
    ).map(lambda pair: pair[0].format(pair[1])),
)


@pytest.mark.slow
@given(st.one_of(VALUES, st.lists(VALUES, min_size=2, max_size=3).map(",".join)))
def test_settings_are_read_as_mmengine_reads_them(text):
    config = pytest.importorskip("mmengine.config")
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="+", action=config.DictAction)
    try:
        theirs = parser.parse_args(["--set", f"key={text}"]).set["key"]
    except RecursionError:  # such as "(1),(2)"
        return
    assert options.parse_value(text) == theirs


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/data/my maps", "/data/my maps"),
        (" ( 1, a b ) ", (1, "a b")),
        ("['a photo of a {}, drawn', \"(x\", a]", ["a photo of a {}, drawn", "(x", "a"]),
        ("John's maps, dogs'", ["John's maps", "dogs'"]),
        ("'1'", "1"),
        ("''", ""),
    ],
)
def test_settings_keep_blanks_and_what_is_quoted(text, value):
    assert options.parse_value(text) == value


def test_knobs_keep_blanks_and_what_is_quoted():
    maps = options.parse_regions("files:folder=/data/my maps")
    assert maps == dict(type="files", folder="/data/my maps")
    method = options.parse_method("mine:pm=lof, layers=[-3, -2], words='a, b=c'")
    assert method == dict(type="mine", pm="lof", layers=[-3, -2], words="a, b=c")


def test_settings_with_quotes_that_do_not_match():
    with pytest.raises(ValueError, match="quotes do not match"):
        options.parse_value("'a, b")


@pytest.mark.parametrize("text", ["(", "[1)", "1]", "a,[b"])
def test_settings_with_brackets_that_do_not_match(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["eval", "mini", "--cfg-options", f"model.x={text}"])
    assert "brackets do not match" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "segment a.jpg --classes a",
        "demo",
        "eval mini",
        "compare mini",
        "ablate mini --study layers",
        "audit mini mini",
        "label a --out b",
        "visualize",
        "plant",
        "hubs",
        "fit templates a --classes a",
        "export a.pt2 --classes a",
        "methods",
    ],
)
def test_commands_that_know_methods_import_ones_own(words):
    args = cli.build_parser().parse_args([*words.split(), "--import", "mine.py", "other"])
    assert args.modules == ["mine.py", "other"]


@pytest.mark.parametrize(
    "words",
    [
        "segment a.png --classes cat --weights mini --method proxyclip",
        "label a.png --classes cat --weights mini --out out --method proxyclip",
        "fit templates . --classes voc20 --weights mini --method proxyclip",
        "export a.onnx --classes cat --weights mini --method proxyclip",
        "eval mini --check --method proxyclip",
        "compare mini --methods clip proxyclip",
    ],
)
def test_a_method_without_its_guide_is_refused_before_weights_are_read(
    words, elsewhere, monkeypatch, capsys
):
    Image.new("RGB", (8, 8)).save("a.png")
    monkeypatch.setattr(loading, "open_weights", None)
    assert cli.main(words.split()) == 2
    assert "needs the guide 'dino'" in capsys.readouterr().err
    assert not Path("out").exists()


MINE = '''
"""A paper of one's own."""
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from sfp.registry import METHODS

@dataclass
class Settings:
    shared: ClassVar[int] = 0  # evaluated in the module's entry of sys.modules

@METHODS.register_module()
def of_mine_{0}(*, rule="kk"):
    """Keys with keys."""
    return dict(readouts=[dict(attention=dict(type="self_self", pairs=[rule]))])
'''


@pytest.mark.parametrize("spelling", ["mine_{}", "mine_{}.py", "./mine_{}.py"])
def test_methods_of_ones_own(spelling, elsewhere, capsys):
    number = len(spelling)
    (elsewhere / f"mine_{number}.py").write_text(MINE.format(number))
    words = ["methods", f"of_mine_{number}", "--import", spelling.format(number)]
    try:
        assert cli.main(words) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("A paper of one's own.\n\nKeys with keys.")
        assert "rule='kk'" in printed
        assert cli.main(["methods", *words[2:]]) == 0
        assert f"of_mine_{number}" in capsys.readouterr().out
    finally:
        METHODS.module_dict.pop(f"of_mine_{number}", None)
        sys.modules.pop(f"mine_{number}", None)


def test_modules_that_cannot_be_imported(elsewhere, capsys):
    (elsewhere / "bad.py").write_text("1 / 0")
    (elsewhere / "json.py").write_text("")
    for name, message in (
        ("bad.py", "ZeroDivisionError: division by zero"),
        ("bad", "ZeroDivisionError"),
        ("absent.py", "FileNotFoundError"),
        ("no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json.py", "ValueError: another module is called 'json': rename the file"),
    ):
        assert cli.main(["methods", "--import", name]) == 2
        assert f"error: --import {name}: {message}" in capsys.readouterr().err


def test_listed_methods_are_the_registered_ones(capsys):
    """Read off the sources, and off the functions."""
    assert list(methods.shipped_methods()) == method_table.methods_rows()
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in sfp.list_methods())


def test_listed_ops(capsys):
    for words, names in (
        (["--ops"], sfp.list_ops()),
        (["--kind", "detector"], sfp.list_ops("detector")),
    ):
        assert cli.main(["methods", *words]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in names)
        assert ("neighbour_mean" in printed) == (words == ["--ops"])
    assert cli.main(["methods", "sfp"]) == 0
    assert "integrator_start" in capsys.readouterr().out


# -- configs by name -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["voc21", "cfg_voc21", "cfg_voc21.py", "configs/cfg_voc21.py"])
def test_shipped_configs_by_name(name, elsewhere):
    found = ROOT / "configs/cfg_voc21.py"
    assert shipped.find_config(name) == found
    (elsewhere / "configs").mkdir()
    (elsewhere / "voc21").mkdir()  # a folder is no config
    assert shipped.find_config(name) == found


def test_an_alias_of_a_benchmark():
    assert shipped.find_config("cityscapes") == ROOT / "configs/cfg_city_scapes.py"


def test_files_come_before_names(elsewhere):
    Path("mini").write_text("")
    assert shipped.find_config("mini") == Path("mini")
    assert shipped.find_config(elsewhere / "mini") == elsewhere / "mini"
    assert shipped.find_config("cfg_mini") == ROOT / "configs/cfg_mini.py"


def test_every_shipped_config_has_a_name():
    assert shipped.find_config("protocol_cliptrase").name == "protocol_cliptrase.py"
    names = shipped.config_names()
    assert {"mini", "voc20", "voc21", "city_scapes", "coco_stuff164k"} <= set(names)
    assert len(names) == len(list((ROOT / "configs").glob("cfg_*.py")))
    assert all(shipped.find_config(name).is_file() for name in names)
    for name in ("base_config", "elsewhere/cfg_mini.py", "minnie", "cls_mini.txt"):
        with pytest.raises(shipped.ConfigError, match="there is no config"):
            shipped.find_config(name)


# -- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What pip would put into site-packages, of a wheel that is built from what the wheel needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("sfp", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.process
def test_the_wheel_has_everything(installed):
    for kept, here in (("sfp/configs", "configs"), ("sfp", "sfp")):
        for path in (ROOT / here).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                packed = installed / kept / path.relative_to(ROOT / here)
                assert packed.read_bytes() == path.read_bytes()
    folders = {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")}
    assert folders == {"sfp"}
    assert find_packages(str(installed)) == find_packages(str(ROOT), include=["sfp", "sfp.*"])
    (entry,) = installed.glob("*.dist-info/entry_points.txt")
    assert "sfp = sfp.cli:main" in entry.read_text()
