"""What is only the recipes' of pictures: classical baselines, bounds, judgements and drawings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moekit.config.errors import ConfigError
from moekit.data.examples import Examples, TaskData
from moekit.evaluate.drawing import boxes_picture, coloured, in_rows, mask_picture, save_png
from moekit.recipes import canvases, generation, motion
from moekit.recipes.tasks import load_recipe
from moekit.train.run import load_task_run, train_run

pytest.importorskip("sklearn")
SHAPES = {"trouser": (10, 4), "bag": (4, 10), "coat": (8, 8)}


def page(things: list[tuple[str, int, int]], rng: np.random.Generator) -> np.ndarray:
    image = np.zeros((32, 32, 1), np.uint8)
    for name, y, x in things:
        height, width = SHAPES[name]
        image[y : y + height, x : x + width, 0] = rng.integers(100, 256, (height, width))
    return image


def pages(n: int, seed: int) -> Examples:
    """One thing above or below the middle, or both; classes are shapes."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {"image": [], "boxes": [], "labels": [], "mask": []}
    from moekit.data.task_sources.images import FASHION_LABELS

    for _ in range(n):
        halves = [[0], [16], [0, 16]][rng.integers(3)]
        things = [
            (str(rng.choice(list(SHAPES))), top + int(rng.integers(5)), int(rng.integers(20)))
            for top in halves
        ]
        image = page(things, rng)
        mask = np.zeros((32, 32), np.int64)
        for name, y, x in things:
            mask[y : y + SHAPES[name][0], x : x + SHAPES[name][1]] = 1 + FASHION_LABELS.index(name)
        columns["image"].append(image)
        columns["boxes"].append([[y, x, *SHAPES[name]] for name, y, x in things])
        columns["labels"].append([name for name, _, _ in things])
        columns["mask"].append(mask)
    return Examples({**columns, "image": np.stack(columns["image"]), "mask": np.stack(columns["mask"])})


PAGES = TaskData(pages(60, 0), pages(20, 1), pages(30, 2), given_test=True)


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_things_apart_are_found_as_connected_pixels(name):
    recipe = load_recipe(name)
    row = canvases.baseline("components", recipe, recipe.config(), PAGES)
    assert set(row["scores"]) == {measure.key for measure in recipe.measures}
    assert all(value > 0.95 for value in row["scores"].values()), row


def test_parts_of_a_thing_are_joined_within_reach():
    image = np.zeros((20, 20), np.uint8)
    image[2:5, 3:9], image[7:9, 3:9] = 50, 60
    boxes = {
        reach: [box for _, box in canvases.Components(reach, [], None).find(image)] for reach in (0, 1, 2)
    }
    # two rows lie between: pixels a row apart are neighbours once both sides have grown by one
    assert boxes[0] == [[2, 3, 3, 6], [7, 3, 2, 6]]
    assert boxes[1] == boxes[2] == [[2, 3, 7, 6]]


def test_a_thing_is_centred_and_cut_to_its_square():
    image = np.zeros((40, 40), np.uint8)
    image[1:3, 2:5] = 255
    crop = canvases.centred(image, [1, 2, 2, 3]).reshape(28, 28)
    assert crop.sum() == 6
    assert crop[13:15, 12:15].sum() == 6
    assert canvases.centred(np.full((40, 40), 255, np.uint8), [0, 0, 40, 31]).sum() == 28 * 28


def clips(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for _ in range(n):
        frame = np.zeros((16, 16), np.uint8)
        y, x = rng.integers(12, size=2)
        frame[y : y + 3, x : x + 4] = rng.integers(100, 256, (3, 4))
        label = str(rng.choice(["down", "left"]))
        step = {"down": (2, 0), "left": (0, -1)}[label]
        found.append(np.stack([np.roll(frame, (step[0] * t, step[1] * t), (0, 1)) for t in range(4)]))
        labels.append(label)
    return Examples({"clip": np.stack(found), "label": labels})


def test_steps_of_clips_tell_their_direction():
    recipe = load_recipe("motion")
    data = TaskData(clips(60, 0), clips(10, 1), clips(40, 2))
    scores = {
        name: motion.baseline(name, recipe, recipe.config(), data)["scores"]["label.accuracy"]
        for name in recipe.baselines
    }
    assert scores["phase correlation"] == 1.0
    assert scores["linear on differences"] < 1.0
    assert set(motion.steps(data.train["clip"])) == {(2, 0), (0, -1)}
    with pytest.raises(ConfigError, match="recipe motion has no baseline 'nearest'; known: linear on"):
        motion.baseline("nearest", recipe, recipe.config(), data)


def signs(n: int, seed: int) -> Examples:
    """A bright square in the left or in the right half of a dark picture."""
    rng = np.random.default_rng(seed)
    images, labels = np.zeros((n, 8, 16, 1), np.uint8), []
    for image in images:
        labels.append(str(rng.choice(["left", "right"])))
        top, column = int(rng.integers(2)) * 4, int(rng.integers(2)) * 4 + 8 * (labels[-1] == "right")
        image[top : top + 4, column : column + 4] = 200
    return Examples({"image": images, "label": labels})


SIGNS = TaskData(signs(200, 0), signs(40, 1), signs(80, 2))


@pytest.fixture(scope="module")
def drawer(tmp_path_factory):
    config = load_recipe("generation").config(overrides=[
        "targets.picture.codes=2", "epochs=12", "model.d_model=16", "model.n_layers=1", "model.n_heads=2",
        "model.moe.d_expert=8", "model.dropout=0", "train.batch_size=20", "train.schedule.warmup_steps=5",
        "train.optimizer.lr=1e-2", f"runs_dir={tmp_path_factory.mktemp('drawer')}",
    ])  # fmt: skip
    return config, load_task_run(train_run(config, data=SIGNS, quiet=True).folder)


def test_a_model_draws_what_it_is_asked_for(drawer):
    _, loaded = drawer
    found = generation.measure(loaded, SIGNS)
    assert found["recognised"] > 0.9
    assert found["copied"] == 1.0  # there are but eight pictures
    # four places are alike often, of eight patches: two bits a picture
    assert found["bits"] == pytest.approx(2 / 8, abs=0.05)
    asked, _ = generation.halves(SIGNS)
    pictures, codes = generation.drawn(loaded, asked)
    again, _ = generation.drawn(loaded, asked)
    np.testing.assert_array_equal(pictures, again)
    assert pictures.shape == (40, 8, 16, 1)
    assert len({row.tobytes() for row in codes}) == 8
    other, _ = generation.drawn(loaded, asked, seed=1)
    assert (other != pictures).any()


def test_bounds_and_baselines_of_drawings(drawer):
    config, _ = drawer
    recipe = load_recipe("generation")
    rows = {name: generation.baseline(name, recipe, config, SIGNS)["scores"] for name in recipe.baselines}
    # the codebook of two patches is exact here
    assert rows["bound: codebook"] == rows["bound: real pictures"]
    assert rows["bound: codebook"]["recognised"] == 1.0
    # each patch by itself: four places, one of them bright: 0.81 bits each in the half, none in the other
    assert rows["independent patches"]["bits"] == pytest.approx(0.811 / 2, abs=0.05)
    assert rows["independent patches"]["distance"] > rows["bound: real pictures"]["distance"]
    with pytest.raises(ConfigError, match="recipe generation has no baseline 'nearest'; known: bound"):
        generation.baseline("nearest", recipe, config, SIGNS)


def test_drawn_pictures_lie_beside_the_run(drawer):
    pytest.importorskip("PIL")
    from PIL import Image

    _, loaded = drawer
    said = generation.notes(loaded, SIGNS)
    path = loaded.folder / "drawn.png"
    assert str(path) in said
    # two rows of eight, doubled, with white between
    assert np.asarray(Image.open(path)).shape == (2 * 16 + 4, 8 * 32 + 7 * 4, 3)


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_answers_are_drawn_beside_the_truth(tmp_path, name):
    pytest.importorskip("PIL")
    config = load_recipe(name).config(overrides=[
        "epochs=1", "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.moe.d_expert=8",
        "train.batch_size=20", f"runs_dir={tmp_path}",
    ])  # fmt: skip
    loaded = load_task_run(train_run(config, data=PAGES, quiet=True).folder)
    assert "examples.png" in canvases.notes(loaded, PAGES)
    some = PAGES.test.rows(range(2))
    picture = canvases.answers_picture(loaded, some)
    scale, each = (4, 2) if name == "detection" else (3, 3)
    assert picture.shape[:2] == (32 * scale, min(6, 2 * each) * (32 * scale + 4) - 4)
    # the truth stands in its colours
    left = (32 * scale + 4) * (0 if name == "detection" else 1)
    assert len(np.unique(picture[:, left : left + 32 * scale].reshape(-1, 3), axis=0)) > 2


def test_drawings_by_hand(tmp_path):
    assert coloured(np.array([[1, 2]])).tolist() == [[[1] * 3, [2] * 3]]
    rows = in_rows([np.full((2, 2), value) for value in (1, 2, 3)], columns=2)
    assert rows[:2, :2, 0].tolist() == [[1, 1], [1, 1]]
    assert rows[:2, 6:, 0].tolist() == [[2, 2], [2, 2]]
    assert rows[6:, :2, 0].tolist() == [[3, 3], [3, 3]]
    assert (rows[6:, 2:] == 255).all()
    masks = mask_picture(np.arange(12).reshape(3, 4))
    assert len({tuple(pixel) for pixel in masks.reshape(-1, 3)}) == 12
    assert masks[0, 0].tolist() == [0, 0, 0]
    pytest.importorskip("PIL")
    from PIL import Image

    drawn = boxes_picture(
        np.zeros((8, 8), np.uint8), [{"box": [2, 1, 4, 5], "label": "b"}], ["a", "b"], scale=4
    )
    rows_, columns_ = np.nonzero(drawn[8:].any(axis=2))
    assert (rows_.max() + 8, columns_.min(), columns_.max()) == (23, 4, 23)
    assert np.asarray(Image.open(save_png(tmp_path / "new" / "x.png", drawn))).shape == (32, 32, 3)


def test_every_picture_recipe_has_metrics_or_its_own_measure():
    for name, variant in itertools.chain(
        *([(name, v) for v in load_recipe(name).variants] for name in
          ("detection", "segmentation", "generation", "motion", "spoken-numbers"))
    ):  # fmt: skip
        recipe = load_recipe(name)
        assert recipe.measures or hasattr(recipe.code(), "measure")
        recipe.config(variant)
        recipe.config(variant, short=True)
