"""Class names: files, lists, and their errors."""

from __future__ import annotations

import json
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conformance import ROOT

from sfp.data import benchmarks
from sfp.vocabulary import (
    Vocabulary,
    as_vocabulary,
    background_threshold,
    check_threshold,
    load_vocabulary,
    parse_words,
)

CONFIGS = Path(__file__).parents[1] / "configs"

GOLDEN = ROOT / "class_files.json"
# As the official parser reads them (goldens/class_files.json): (text, queries, index).
OFFICIAL = {
    "plain": (
        "sky, wall\ncat\ntv monitor, screen, tv\n",
        ["sky", "wall", "cat", "tv monitor", "screen", "tv"],
        [0, 0, 1, 2, 2, 2],
    ),
    "no_final_newline": ("a\nb, c\nd", ["a", "b", "c", "d"], [0, 1, 1, 2]),
    "crlf": ("a, b\r\nc\r\n", ["a", "b", "c"], [0, 0, 1]),
    "nospace_comma": ("a,b\nc, d,e\n", ["a,b", "c", "d,e"], [0, 1, 1]),
    "semicolon": ("a; b\nc;d\ne, f\n", ["a; b", "c;d", "e", "f"], [0, 1, 2, 2]),
}
# Where the official parser keeps stray blanks and empty names, and what is right instead.
CORRECTED = {
    "trailing_space": ("a \n b, c \n", ["a", "b", "c"], [0, 1, 1]),
    "trailing_sep": ("a, \nb,\n", ["a", "b"], [0, 1]),
    "trailing_blank_lines": ("a\nb\n\n \n", ["a", "b"], [0, 1]),
    "byte_order_mark": ("\ufeffa\nb\n", ["a", "b"], [0, 1]),
}
COUNTS = {  # classes, queries
    "voc21": (21, 56),
    "context60": (60, 60),
    "coco_object": (81, 113),
    "voc20": (20, 30),
    "context59": (59, 59),
    "coco_stuff": (171, 171),
    "ade20k": (150, 150),
    "city_scapes": (19, 19),
    "city_scapes27": (27, 27),
    "coco27": (27, 171),
    "mini": (18, 18),
}


def load(tmp_path: Path, text: str) -> Vocabulary:
    path = tmp_path / "cls.txt"
    path.write_bytes(text.encode())
    return load_vocabulary(path)


@pytest.mark.filterwarnings(
    "ignore:.*is taken as one name"
)  # that is what the field does with them
@pytest.mark.parametrize("case", [*OFFICIAL, *CORRECTED])
def test_files(tmp_path, case):
    text, queries, index = (OFFICIAL | CORRECTED)[case]
    vocabulary = load(tmp_path, text)
    assert list(vocabulary.queries) == queries
    assert list(vocabulary.index) == index
    assert vocabulary.num_classes == max(index) + 1
    assert list(vocabulary.names) == [queries[index.index(k)] for k in range(max(index) + 1)]


@pytest.mark.skipif(not GOLDEN.exists(), reason="this folder of goldens has none of class files")
def test_the_official_cases_are_the_goldens():
    golden = json.loads(GOLDEN.read_text())
    for case, (text, queries, index) in OFFICIAL.items():
        assert golden["files"][case] == text
        assert golden["result"]["SFP"][case] == {"names": queries, "idx": index}
    for case in ("trailing_space", "trailing_sep"):
        text, queries, _ = CORRECTED[case]
        assert golden["files"][case] == text
        official = golden["result"]["SFP"][case]["names"]
        assert official != queries
        assert any(n != n.strip() or n in ("", "b,") for n in official)
    assert "" in golden["result"]["SFP"]["blank_line"]["names"]  # an error here, see below


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("a\n\nb\n", 2, "no name"),
        ("\na\n", 1, "no name"),
        ("a\n,\nb\n", 2, "no name"),
        ("a, , b\n", 1, "empty"),
        ("a\nb, c, b\n", 2, "'b' appears twice"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, line, why):
    with pytest.raises(ValueError, match=why) as error:
        load(tmp_path, text)
    assert f"{tmp_path / 'cls.txt'}, line {line}:" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.txt.*one class per line.*\['cat', 'dog'\]"
    ):
        load_vocabulary(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path, "\n \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        load_vocabulary(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("grass|lawn", [["grass", "lawn"]]),
        ("grass | lawn, meadow |", [["grass", "lawn", "meadow"]]),
        ("tree, cat", [["tree", "cat"]]),
    ],
)
def test_separators_of_synonyms_mean_the_same_in_files_and_typed_text(tmp_path, text, names):
    vocabulary = load(tmp_path, f"{text}\nsky\n")
    assert vocabulary == load_vocabulary([*names, "sky"])
    if "," not in text:
        assert vocabulary == load_vocabulary(parse_words(f"{text}, sky"))


@pytest.mark.parametrize(
    "line",
    [
        "tree,cat",
        "tree;cat",
        "tree; cat",
        "tree\tcat",
        "# my words",
        "// tree",
        "0: tree",
        "1. tree",
        "- tree",
        '"tree"',
        "'tree'",
    ],
)
def test_names_that_look_like_several_are_said(tmp_path, line):
    with pytest.warns(
        UserWarning, match=r"cls\.txt, line 2: .* is taken as one name\. A class file"
    ):
        vocabulary = load(tmp_path, f"sky\n{line}\n")
    assert vocabulary.names == ("sky", line)
    with pytest.warns(UserWarning, match="entry 0 of the class list: .*, and 1 more like it"):
        load_vocabulary([line, line + "x;y"])


@pytest.mark.parametrize(
    "line", ["a red, round ball", "3d printer", "T-shirt", "O'Neil's", "5 o'clock"]
)
def test_names_that_are_fine(line):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_vocabulary([line]).names == (line,)


def test_classes_on_one_line_are_said_to_be_synonyms(tmp_path):
    with pytest.warns(UserWarning, match="one class with 3 synonyms.*write one per line"):
        assert load(tmp_path, "tree, cat, sky\n").num_classes == 1


@pytest.mark.filterwarnings("ignore:.*is read as UTF-16")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_as_windows_saves_them(tmp_path, encoding):
    path = tmp_path / "cls.txt"
    path.write_bytes("caf\xe9, bar\r\nsky\r\n".encode(encoding))
    assert load_vocabulary(path).queries == ("caf\xe9", "bar", "sky")


def test_typed_text():
    assert parse_words("cat | kitten, sky,\n, floor|") == [["cat", "kitten"], ["sky"], ["floor"]]
    for text in ("", " , ", "|", "\n"):
        with pytest.raises(ValueError, match="separated by commas"):
            parse_words(text)


# -- background and thresholds -------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [0.3, np.float32(0.3), np.float64(0.3), Fraction(3, 10)],
    ids=lambda x: type(x).__name__,
)
def test_thresholds_of_any_type(value):
    assert background_threshold(value) == pytest.approx(0.3)
    assert as_vocabulary(["a", "b"], value) == load_vocabulary(["a", "b"])


@pytest.mark.parametrize("value", [True, np.True_, {"a"}, {"a": 1}, b"wall", 1j], ids=repr)
def test_backgrounds_that_are_nothing_of_the_kind(value):
    with pytest.raises(ValueError, match="expected None, words, or a probability"):
        background_threshold(value)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, 30, float("nan"), np.float32(2)], ids=repr)
def test_thresholds_that_no_probability_has(value):
    with pytest.raises(ValueError, match="a threshold must be between 0 and 1"):
        background_threshold(value)


@pytest.mark.parametrize(
    ("classes", "background", "threshold", "said"),
    [
        (["cat"], None, 0.99, "only query.*the threshold 0.99 has no effect"),
        (["cat"], None, None, "only query.*1 at every pixel"),
        (["cat", "dog"], None, 0.5, "at least 0.5"),
        (["cat", "dog"], None, 0.3, "the threshold 0.3 has no effect: among 2 queries"),
        ([["cat", "kitten"], "dog"], None, 1 / 3, "among 3 queries"),
        (["cat"], ["wall"], 0.4, "among 2 queries"),
    ],
)
def test_thresholds_that_cannot_act_are_said(classes, background, threshold, said):
    vocabulary = as_vocabulary(classes, background)
    with pytest.warns(UserWarning, match=said):
        check_threshold(vocabulary, threshold)


@pytest.mark.parametrize(
    ("classes", "threshold"),
    [(["cat", "dog"], 0.51), ([["cat", "kitten"]], 0.6), (["cat", "dog"], None), ("voc21", 0.15)],
)
def test_thresholds_that_act(classes, threshold):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_threshold(as_vocabulary(classes), threshold)


def test_lists():
    vocabulary = load_vocabulary(["cat", ["dog", " puppy "], ("a red, round ball",)])
    assert vocabulary.queries == ("cat", "dog", "puppy", "a red, round ball")
    assert vocabulary.index == (0, 1, 1, 2)
    assert vocabulary.names == ("cat", "dog", "a red, round ball")


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ([], "class list is empty"),
        (["a", ""], "entry 1 of the class list: the class has no name"),
        ([["a", " "]], "entry 0 of the class list: a synonym is empty"),
        (["a", []], "entry 1 of the class list: expected a name"),
        (["a", [3]], r"entry 1 of the class list: expected a name or a list of names, got \[3\]"),
    ],
)
def test_lists_that_are_wrong(classes, why):
    with pytest.raises(ValueError, match=why):
        load_vocabulary(classes)


def test_a_name_in_two_classes_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"line 3: the name 'a' is also in .*line 1"):
        vocabulary = load(tmp_path, "a, b\nc\nd, a\n")
    assert vocabulary.queries == ("a", "b", "c", "d", "a")
    assert vocabulary.index == (0, 0, 1, 2, 2)


@pytest.mark.parametrize("name", COUNTS)
def test_shipped_files(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vocabulary = load_vocabulary(CONFIGS / f"cls_{name}.txt")
    assert (vocabulary.num_classes, len(vocabulary.queries)) == COUNTS[name]
    # The field's COCO-Object file has "bed" among the background words and as a thing.
    assert [("'bed'" in str(w.message)) for w in caught] == [True] * (name == "coco_object")


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_benchmarks_by_name_and_alias(name):
    """The queries of the class file, under the names that the row gives them."""
    row = benchmarks.BENCHMARKS[name]
    if not row.class_file:
        with pytest.raises(FileNotFoundError, match=f"sfp data prepare {name}"):
            as_vocabulary(name)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        listed = load_vocabulary(CONFIGS / row.class_file)
    for word in (name, *row.aliases):
        vocabulary = as_vocabulary(word)
        assert (vocabulary.queries, vocabulary.index) == (listed.queries, listed.index)
        assert vocabulary.names == row.class_names
    assert len(row.class_names) == row.classes == listed.num_classes
    assert set(row.renamed) <= set(listed.names)
    assert row.config.is_file()


def test_every_shipped_file_is_counted():
    assert {path.stem.removeprefix("cls_") for path in CONFIGS.glob("cls_*.txt")} == set(COUNTS)
