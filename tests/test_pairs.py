"""CCC on generated images: the walk, fractional severities, the stream, the calibration file."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from test_streams import make

from driftline.core.errors import UserError
from driftline.streams import corruptions as C
from driftline.streams.pairs import (
    EMBEDDED,
    corrupt_pair,
    key,
    published,
    read_calibration,
    route,
    walk,
)
from driftline.streams.severities import NAMES, interpolated
from scripts.calibrate_ccc import main as calibrate

SETTINGS = {"seed": 4, "preset": "cifar", "jpeg_quality": None, "frost_dir": None}


def grids(names: tuple[str, ...], side: int = 21, falls: float = 0.06) -> dict[str, list]:
    """Accuracies that fall with both severities, from 80 %."""
    sums = np.add.outer(np.arange(side), np.arange(side)) * 20 / (side - 1)
    grid = (80 * np.exp(-falls * sums)).tolist()
    return {key(pair): grid for pair in itertools.permutations(names, 2)}


def levels(count: int = 3) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draws)


# ------------------------------------------------------------------------ severities


@pytest.mark.parametrize("preset", C.PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_severities_between_lie_between_and_whole_ones_are_the_table(name, preset):
    rows = C.parameters(name, preset)
    assert [interpolated(name, float(s), preset) for s in range(1, 6)] == list(rows)
    for severity in (0.25, 1.75, 3.5, 4.25):
        found = np.atleast_1d(interpolated(name, severity, preset)).astype(float)
        assert np.isfinite(found).all()
        if severity > 1:
            pair = np.asarray([np.atleast_1d(r) for r in rows[int(severity) - 1 :][:2]], float)
            assert (pair.min(0) <= found).all() and (found <= pair.max(0)).all()
    assert len(NAMES) == 15 and "spatter" not in NAMES


def test_severities_are_interpolated_as_in_the_official_code():
    assert interpolated("gaussian_noise", 0.5, "imagenet") == pytest.approx(0.04)
    assert interpolated("shot_noise", 4.5, "imagenet") == pytest.approx(1 / (0.5 / 5 + 0.5 / 3))
    assert interpolated("jpeg_compression", 0.25, "imagenet") == 70
    assert interpolated("glass_blur", 1.5, "imagenet") == (pytest.approx(0.8), 2, 2)
    assert interpolated("motion_blur", 0.25, "imagenet") == (3, pytest.approx(0.75))
    assert interpolated("zoom_blur", 2.5, "imagenet") == pytest.approx((1.185, 0.015))
    assert interpolated("snow", 0.5, "imagenet") == pytest.approx((0.1, 0.3, 3, 0.75, 10, 4, 0.9))
    assert interpolated("contrast", 0.5, "imagenet") == pytest.approx(0.7)
    for severity in (0, -1, 5.25, 2.1):
        with pytest.raises(ValueError, match=r"multiple of 0\.25"):
            interpolated("fog", severity, "imagenet")
    with pytest.raises(ValueError, match="spatter"):
        interpolated("spatter", 1.5, "imagenet")


@pytest.mark.parametrize("name", NAMES)
def test_every_corruption_runs_at_every_quarter(name):
    x = levels(1)
    found = [
        corrupt_pair(x, (name, "fog"), (quarters, 0), [0], **SETTINGS) for quarters in range(1, 21)
    ]
    assert all(f.shape == x.shape and f.dtype == torch.uint8 for f in found)
    assert torch.equal(found[11], C.corrupt_batch(x, name, 3, [0], preset="cifar", seed=4))
    changed = [float((f.float() - x.float()).abs().mean()) for f in found]
    if name in ("gaussian_noise", "shot_noise", "impulse_noise", "brightness", "contrast"):
        for unit in range(0, 20, 4):  # the draws are those of the severity above
            assert changed[unit : unit + 4] == sorted(changed[unit : unit + 4])
        assert changed[0] < changed[3] < changed[7] < changed[19]


def test_two_corruptions_follow_each_other_and_zero_leaves_images_alone():
    x = levels()
    both = corrupt_pair(x, ("fog", "contrast"), (8, 12), [5, 6, 7], **SETTINGS)
    first = C.corrupt_batch(x, "fog", 2, [5, 6, 7], preset="cifar", seed=4)
    want = C.corrupt_batch(first, "contrast", 3, [5, 6, 7], preset="cifar", seed=4)
    assert torch.equal(both, want)
    assert torch.equal(corrupt_pair(x, ("fog", "contrast"), (0, 0), [0, 1, 2], **SETTINGS), x)
    jpeg = corrupt_pair(
        x, ("fog", "contrast"), (8, 12), [5, 6, 7], **SETTINGS | {"jpeg_quality": 85}
    )
    want = C.corrupt_batch(first, "contrast", 3, [5, 6, 7], preset="cifar", seed=4, jpeg_quality=85)
    assert torch.equal(jpeg, want)


# ------------------------------------------------------------------------ the walk


def by_recursion(grid: np.ndarray, baseline: float) -> list[tuple[int, int]]:
    """The rule of the official code, stated cell by cell."""
    known: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def mean(cells: list[tuple[int, int]]) -> float:
        return sum(grid[c] for c in reversed(cells)) / len(cells)

    for i in range(len(grid)):
        for j in reversed(range(len(grid))):
            if i == 0:
                known[i, j] = [(i, j)]
                continue
            right = [[(i, j), *known[i, j + 1]]] if j + 1 < len(grid) else []
            options = [*right, [(i, j), *known[i - 1, j]]]
            known[i, j] = min(options, key=lambda cells: abs(mean(cells) - baseline))
    return min((known[i, 0] for i in range(1, len(grid))), key=lambda c: abs(mean(c) - baseline))


@pytest.mark.parametrize("baseline", [0, 20, 40])
def test_a_walk_holds_the_baseline_along_neighbouring_cells(baseline):
    rng = np.random.default_rng(baseline)
    for side in (21, 11, 6):
        sums = np.add.outer(np.arange(side), np.arange(side)) * 20 / (side - 1)
        grid = np.clip(76 * np.exp(-0.08 * sums) + rng.normal(0, 1.5, (side, side)), 0, 100)
        cells = walk(grid, baseline)
        assert cells == by_recursion(grid, baseline)
        assert cells[0][1] == 0 and cells[-1][0] == 0 and cells[0][0] > 0
        steps = np.diff(np.asarray(cells), axis=0).tolist()
        assert all(step in ([-1, 0], [0, 1]) for step in steps)
        if baseline:
            assert abs(np.mean([grid[c] for c in cells]) - baseline) < 1


def test_pairs_are_chained_and_drawn_from_the_seed():
    names = published(20)
    found = list(itertools.islice(route(names, 43), 50))
    assert found == list(itertools.islice(route(names, 43), 50))
    assert found != list(itertools.islice(route(names, 44), 50))
    assert all(a != b for a, b in found)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(found))
    assert [len(published(b)) for b in (0, 20, 40)] == [4, 13, 14]
    assert not any("brightness" in published(b) for b in (0, 20, 40))


# ------------------------------------------------------------------------ the stream


def ccc(configure, *more: str, workers: int = 0, **settings):
    words = ["scenario=ccc", "scenario.images=60", "scenario.speed=4", "scenario.clean_images=20"]
    return make(configure(*words, *more), workers=workers, **settings)


def delivered(stream) -> torch.Tensor:
    return torch.cat([b.x for s in stream.segments for b in s.batches()])


def test_the_stream_is_a_function_of_its_seed(configure):
    stream = ccc(configure)
    images = delivered(stream)
    assert len(images) == 60 == sum(s.images for s in stream.segments)
    assert torch.equal(images, delivered(ccc(configure, "scenario.batch_size=7")))
    assert torch.equal(images, delivered(ccc(configure, workers=2)))
    late = torch.cat([b.x for b in ccc(configure, "scenario.batch_size=7").segments[0].batches(2)])
    assert torch.equal(late, images[14 : stream.segments[0].images])
    for change in ("walk_seed=44", "corruption_seed=1", "baseline=60"):
        other = ccc(configure, f"scenario.{change}")
        assert not torch.equal(images, delivered(other)), change
        assert other.facts["fingerprint"] != stream.facts["fingerprint"], change


def test_each_image_shows_what_the_stored_order_says(configure):
    stream = ccc(configure)
    order = stream.order
    images = (delivered(stream) * 255).round().to(torch.uint8)
    for key_, field in (("row", "index"), ("label", "y"), ("domain", "domain")):
        got = torch.cat([getattr(b, field) for s in stream.segments for b in s.batches()])
        assert np.array_equal(got.numpy(), order[key_])
    from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

    clean = EmbeddedImages(SHIFT_CLASSES, split="test", per_class=40)
    for n in (0, 31, 59):
        names = stream.domains[order["domain"][n]].split(":")[0].split("+")
        x = torch.from_numpy(np.array(clean.image(int(order["image"][n])))).permute(2, 0, 1)[None]
        for name, severity in zip(names, order["severities"][n].tolist(), strict=True):
            if severity:
                x = C.corrupt_batch(
                    x, name, math.ceil(severity), [n],
                    parameters=interpolated(name, severity, "imagenet"),
                )  # fmt: skip
        assert torch.equal(images[n], x[0]), n
        assert clean.labels[order["image"][n]] == order["label"][n]


def test_severities_change_smoothly_and_pairs_share_a_corruption(configure):
    stream = ccc(configure, "scenario.images=2000")
    order = stream.order
    for segment in stream.segments[:-1]:
        cells = order["severities"][order["segment"] == segment.index]
        assert cells[0][1] == 0 and cells[-1][0] == 0
        counts = [len(list(g)) for _, g in itertools.groupby(cells.tolist())]
        assert set(counts) == {4}
        assert {0.5} == {float(d.sum()) for d in np.abs(np.diff(cells[::4], axis=0))}
    names = [s.name.split("/")[1].split("+") for s in stream.segments]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(names))
    assert abs(stream.facts["calibrated_accuracy"] - 40) < 3
    assert stream.facts["calibration"]["network"]["tag"] == "embedded/embedded_resnet"
    assert "ccc (generated)" in stream.facts["corruptions"] and stream.name == "ccc[embedded]"


def test_real_images_are_cropped_at_random_and_labelled_generated(configure, tmp_path):
    root = tmp_path / "data"
    write_images(root / "val" / "n01440764", ["a.png", "b.png"], 80)
    write_images(root / "val" / "n01443537", ["c.png"], 80, 1)
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"accuracy": grids(("contrast", "pixelate"), 6)}))
    words = [f"data.root={root}", f"scenario.calibration={path}", "scenario.images=8"]
    words += ["scenario.corruptions=[contrast,pixelate]", "scenario.speed=4"]
    stream = ccc(configure, *words)
    images = delivered(stream)
    assert stream.name == "ccc[generated]" and images.shape == (8, 3, 224, 224)
    assert torch.equal(images, delivered(ccc(configure, *words, workers=1)))
    assert stream.facts["jpeg_quality"] == 85 and stream.num_classes == 1000
    rows = stream.order["image"]
    assert set(rows) == {0, 1, 2}  # four from three: one comes twice, with another crop
    twice = [n for n in range(4) if (rows[:4] == rows[n]).sum() == 2]
    assert not torch.equal(images[twice[0]], images[twice[1]])
    with pytest.raises(UserError, match=r"scripts/calibrate_ccc\.py"):
        ccc(configure, *words, "scenario.calibration=null")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("scenario.corruptions=[gaussian_noise,spatter]", "'spatter' cannot be part of a pair"),
        ("scenario.corruptions=[contrst,fog]", "did you mean 'contrast'"),
        ("scenario.corruptions=[fog]", "a list of at least 2"),
        ("scenario.corruptions=[contrast,fog]", "lacks 2 of 2 pairs.*first: contrast then fog"),
        ("scenario.baseline=101", "scenario.baseline must be a number, at least 0 and at most 100"),
        ("scenario.speed=0", "scenario.speed must be a whole number, at least 1"),
    ],
)
def test_wrong_settings_are_named(configure, word, message):
    with pytest.raises(UserError, match=message):
        ccc(configure, word)


# ------------------------------------------------------------------------ the calibration file


def test_bad_calibration_files_are_refused(tmp_path):
    names = ("fog", "snow")
    good = grids(names)
    cases: list[tuple[str, object, str]] = [
        ("absent.json", None, "cannot be read as a calibration .FileNotFoundError"),
        ("text.json", "hello", "cannot be read as a calibration .JSONDecodeError"),
        ("bare.json", json.dumps(good), "cannot be read as a calibration .KeyError"),
        ("ragged.json", json.dumps({"accuracy": {"n1_fog_n2_snow": [[1], [1, 2]]}}), "ValueError"),
        ("half.json", json.dumps({"accuracy": dict([*good.items()][:1])}), "lacks 1 of 2 pairs"),
        ("shape.json", json.dumps({"accuracy": grids(names, 8)}), "21 x 21.*found"),
        ("share.json", json.dumps({"accuracy": {
            k: (np.asarray(v) / 100).tolist() for k, v in good.items()}}), "percentages"),
        ("nan.json", json.dumps({"accuracy": {
            k: (np.asarray(v) * np.nan).tolist() for k, v in good.items()}}), "percentages"),
        ("ccc.pickle", "x", "numpy.savez"),
    ]  # fmt: skip
    for file, content, message in cases:
        path = tmp_path / file
        if isinstance(content, str):
            path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_calibration(path, names)
        assert f"scenario.calibration={path}" in str(caught.value)


def test_the_official_names_are_understood(tmp_path):
    found = grids(("elastic", "jpeg", "fog"))
    path = tmp_path / "ccc.npz"
    np.savez(path, **{k: np.asarray(v) for k, v in found.items()})
    names = ["elastic_transform", "jpeg_compression", "fog"]
    calibration = read_calibration(path, names)
    assert len(calibration.grids) == 6 and calibration.step == 1


def test_calibration_is_resumed_and_measures_the_network(tmp_path, capsys):
    out = tmp_path / "grid.json"
    words = ["scenario=ccc", "scenario.corruptions=[contrast,brightness]", "--out", str(out)]
    words += ["--images", "20", "--step", "2.5"]
    calibrate(words)
    whole = out.read_text()
    content = json.loads(whole)
    second = content["accuracy"].pop("n1_brightness_n2_contrast")
    assert np.shape(second) == (3, 3) and second[0][0] > 60 > second[0][2]
    assert content["settings"]["images_from"] == "outside the stream"
    assert content["accuracy"]["n1_contrast_n2_brightness"][2][0] == second[0][2]
    out.write_text(json.dumps(content))
    capsys.readouterr()
    calibrate(words)
    assert out.read_text() == whole and "contrast then brightness" not in capsys.readouterr().out
    assert read_calibration(out, ["contrast", "brightness"]).step == 10
    for change, message in (
        (["--images", "21"], "other settings .images"),
        (["--step", "0.3"], "--step=0.3 must be"),
        (["--images", "0"], "--images=0"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate([*words, *change])
    with pytest.raises(UserError, match="use scenario=ccc"):
        calibrate(["scenario=imagenet_c", "--out", str(out)])


def test_the_shipped_grid_belongs_to_the_shipped_network(configure):
    found = read_calibration(EMBEDDED, configure("scenario=ccc").scenario.embedded.corruptions)
    assert found.step == 2 and found.about["dataset"] == "embedded"
    assert Path(EMBEDDED).is_relative_to(ROOT)
