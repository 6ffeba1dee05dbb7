"""The second stage of the mini CLIP's training, and the acceptance of its result."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sfp.mini import outliers, train
from sfp.mini.scenes import CLASSES, THINGS

GRASS, WATER = CLASSES.index("grass"), CLASSES.index("water")


def test_interior_is_what_has_neighbours_of_its_own_class():
    rng = np.random.default_rng(0)
    cells = np.kron(rng.integers(0, len(CLASSES), (2, 5, 5)), np.ones((3, 3), int))[:, :14, :14]
    found = outliers.interior(torch.from_numpy(cells).flatten(1)).numpy().reshape(cells.shape)
    for scene, own in zip(found, cells, strict=True):
        for (y, x), inside in np.ndenumerate(scene):
            around = own[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert inside == ((around == own[y, x]).all() and own[y, x] >= len(THINGS))
    assert found.any()


def test_chosen_are_the_most_read_inside_background():
    cells = torch.tensor([[0, GRASS, GRASS, GRASS, WATER]])
    inside = torch.tensor([[False, False, True, True, False]])
    read = torch.tensor([[0.9, 0.05, 0.01, 0.02, 0.02]])
    for count, expected in ((1, [3]), (2, [2, 3]), (3, [1, 2, 3])):
        chosen = outliers.choose(read, cells, inside, count)
        assert chosen[0].nonzero().flatten().tolist() == expected


@pytest.fixture
def hubs():
    return torch.tensor([[True, False, False, False]])


def test_nothing_is_lost_where_the_phenomenon_is_there(hubs):
    row = torch.tensor([[0.95, 0.02, 0.02, 0.01]])
    assert outliers.read(row[None], hubs).item() == pytest.approx(-np.log(0.92))
    assert outliers.read(row.flip(-1)[None], hubs) > 4

    stripe = torch.tensor([0.3, 0.1, 0.3, 0.3]).expand(1, 4, 4)
    assert outliers.stripes([stripe], 0.3, hubs).item() == pytest.approx(0, abs=1e-6)
    weaker, stronger = (outliers.stripes([stripe], t, hubs).item() for t in (0.6, 0.15))
    assert weaker == pytest.approx(stronger, rel=1e-5)  # half and double are equally far
    assert weaker == pytest.approx(F.smooth_l1_loss(torch.tensor(0.5).log(), torch.zeros(())))

    norms = torch.tensor([[5.0, 1.0, 1.0, 1.0]])
    usual = norms.median(-1, keepdim=True).values
    assert outliers.growth(norms, usual, hubs, 5).item() == pytest.approx(0, abs=1e-6)
    assert outliers.growth(norms, usual, hubs, 10).item() == pytest.approx(np.log(2))
    values = norms[..., None] * torch.tensor([0.6, 0.8])
    assert outliers.louder(values, hubs, 5).item() == pytest.approx(0, abs=1e-6)


def test_the_class_token_collects_late():
    early = torch.eye(4).expand(1, 4, 4)
    assert outliers.late([early, early]).item() == pytest.approx(-np.log(0.9))
    even = torch.full((1, 4, 4), 0.25)
    assert outliers.late([even]).item() == pytest.approx(-np.log(0.25))


def test_balance_looks_at_ordinary_patches(hubs):
    values = torch.tensor([[[9.0, 0.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]])
    for length, expected in ((1.0, 0.0), (2.0, 0.0), (8.0, np.log(4))):
        loss = outliers.balance(torch.tensor([[0.0, length]]), values, hubs, 1.0)
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_hubs_name_the_image_and_others_their_place(hubs):
    cells = torch.tensor([[GRASS, 0, 0, GRASS]])
    sure = 30 * F.one_hot(torch.tensor([[3, 0, 0, GRASS]]), len(CLASSES)).float()
    assert outliers.content(sure, torch.tensor([3]), hubs) < 1e-6
    assert outliers.content(sure, torch.tensor([GRASS]), hubs) > 20
    assert outliers.place(sure, cells, hubs) < 1e-6
    assert outliers.place(sure, cells.flip(-1), ~hubs) > 20


def test_kin_are_ordinary_and_each_class_has_the_same_share(hubs):
    kin, share = outliers.kinship(torch.tensor([[GRASS, 0, 0, GRASS]]), hubs)
    assert kin.tolist() == [[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]]
    assert share.tolist() == [[0, 0.25, 0.25, 0.5]]


TINY = outliers.OutlierRecipe(
    steps=8, scenes=12, layers=8, width=64, text_layers=1, batch=4, pool=1, warmup=1, hubs=2
)


@pytest.fixture(scope="module")
def learner():
    torch.manual_seed(0)
    return outliers.Outliers(TINY, train.Tokenizer())


def test_in_narrow_steps_the_class_token_sees_the_hubs_only(learner):
    # whatever other patches are, as long as they are no neighbours of what hubs read before
    patches = torch.randn(2, 6, TINY.width)
    cells = torch.full((2, 6), GRASS)
    inside = torch.tensor([[True, True, False, False, False, False]]).expand(2, 6)
    with torch.no_grad():
        narrow, wide = (learner.run(patches, cells, inside, each) for each in (True, False))
        assert (narrow.hubs == inside).all()
        # before the first hub is read the class token is what it was, whatever the patches are
        for i in range(TINY.first):
            alone = learner.class_token(2)
            for block in learner.clip.visual.blocks[: i + 1]:
                alone = block(alone)
            torch.testing.assert_close(narrow.entering[i + 1][:, :1], alone, rtol=1e-4, atol=1e-4)
            assert (wide.entering[i + 1][:, 0] - alone[:, 0]).abs().max() > 1e-2
        # attention is that of a token that could see all: each row is a distribution
        for weights in narrow.maps:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7))
            assert weights[:, 0, 1:].min() > 1e-6
        visual = learner.clip.visual
        x = wide.entering[0]
        for block in visual.blocks:
            x = block(x)
        torch.testing.assert_close(wide.entering[-1], x, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_second_stage_starts_from_the_first_and_resumes_with_the_same_step(tmp_path):
    first = train.Training(
        train.Recipe(**{f.name: getattr(TINY, f.name) for f in dataclasses.fields(train.Recipe)}),
        tmp_path / "first",
    )
    first.save()

    def second(resume=False):
        start = tmp_path / "first/mini.safetensors"
        kind, cache = outliers.Outliers, tmp_path / "first/cache"
        return train.Training(
            TINY, tmp_path / "second", resume=resume, kind=kind, start=start, cache=cache
        )

    training = second()
    for name, mine in training.learner.clip.state_dict().items():
        torch.testing.assert_close(
            mine, first.learner.clip.state_dict()[name], atol=1e-3, rtol=1e-3
        )
    text = training.learner.clip.text_projection.clone()
    training.advance()
    training.save()
    after = [training.advance() for _ in range(3)]
    again = second(resume=True)
    assert again.step == 1
    for one, other in zip(after, (again.advance() for _ in range(3)), strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert (again.learner.clip.text_projection == text).all()  # the names stay what they are


def test_settings_for_ablations(monkeypatch, tmp_path, capsys):
    recipes = []

    class Run:
        def __init__(self, recipe, *rest):
            recipes.append(recipe)
            self.learner = SimpleNamespace(compile_blocks=lambda: None)

        def run(self):
            pass

    monkeypatch.setattr(train, "Training", Run)
    words = ["train", "--out", str(tmp_path), "--start", "first", "--seed", "3", "--set"]
    monkeypatch.setattr("sys.argv", [*words, "selfself=0", "hubs=6"])
    train.main()
    (recipe,) = recipes
    assert recipe == outliers.OutlierRecipe(seed=3, selfself=0.0, hubs=6)
    for wrong, said in (("nothing=1", "no such number"), ("hubs=many", "expected a number")):
        monkeypatch.setattr("sys.argv", [*words, wrong])
        with pytest.raises(SystemExit, match="2"):
            train.main()
        assert said in capsys.readouterr().err
