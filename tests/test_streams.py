"""Streams: layouts, orders, class orders, independence of workers, errors that help."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from conftest import write_images
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms as T

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Skipped
from driftline.runs.execute import complete
from driftline.streams import corruptions as C
from driftline.streams import loading
from driftline.streams.class_incremental import order_of_classes, task_sizes
from driftline.streams.corrupted import corrupted
from driftline.streams.images import Derived, Files
from driftline.streams.orders import plan
from driftline.streams.pipelines import Geometry, pipeline, seeded
from driftline.streams.store import ImageStore


def make(cfg, size: int = 32, workers: int = 0, store: ImageStore | None = None):
    """The stream of a configuration."""
    cfg = complete(cfg)
    return build(
        cfg.scenario,
        at="scenario",
        data_root=cfg.data.root,
        on_error=cfg.data.on_error,
        cache=cfg.data.cache,
        workers=workers,
        seed=cfg.seed,
        geometry=Geometry(size=size),
        store=store or ImageStore(),
    )


def rows_of(segment, start: int = 0) -> list[tuple[int, int]]:
    """(domain, image) pairs in the order in which a segment delivers them."""
    return [
        pair
        for batch in segment.batches(start)
        for pair in zip(batch.domain.tolist(), batch.index.tolist(), strict=True)
    ]


# ------------------------------------------------------------------------ class orders


@pytest.mark.parametrize(
    ("classes", "first", "digest"),
    [
        (100, [68, 56, 78, 8, 23, 84, 90, 65, 74, 76], "997a048a5344d216"),
        (200, [168, 136, 51, 9, 183, 101, 171, 99, 42, 159], "1d364b99a5915405"),
        (300, [169, 221, 146, 296, 92, 229, 49, 70, 126, 77], "18613efa7667417c"),
    ],
)
def test_class_order_is_the_published_one(classes, first, digest):
    order = order_of_classes(classes, "seeded", 1993)
    assert order[:10] == first
    assert hashlib.sha256(",".join(map(str, order)).encode()).hexdigest()[:16] == digest


def test_class_order_list_must_be_a_permutation():
    assert order_of_classes(3, [2, 0, 1], 0) == [2, 0, 1]
    assert order_of_classes(3, "fixed", 0) == [0, 1, 2]
    with pytest.raises(UserError, match="class_order"):
        order_of_classes(3, [0, 0, 1], 0)


@pytest.mark.parametrize(
    ("classes", "base", "increment", "sizes"),
    [
        (100, 0, 10, [10] * 10),
        (100, 50, 10, [50] + [10] * 5),
        (10, 4, 3, [4, 3, 3]),
        (10, 0, 4, [4, 4, 2]),
        (10, 0, 10, [10]),
    ],
)
def test_task_sizes_follow_the_rule_of_pilot(classes, base, increment, sizes):
    assert task_sizes(classes, base, increment) == sizes


def test_task_sizes_refuse_what_does_not_fit():
    with pytest.raises(UserError, match="increment=0"):
        task_sizes(10, 0, 0)
    with pytest.raises(UserError, match="base=11"):
        task_sizes(10, 11, 1)


# ------------------------------------------------------------------------ task streams


def test_tasks_partition_classes_and_images(configure, image_folder_root):
    cfg = configure(
        "scenario=split_imagefolder",
        f"data.root={image_folder_root}",
        "scenario.increment=2",
        "scenario.batch_size=5",
        "scenario.pipeline=plain",
    )
    stream = make(cfg)
    assert [list(t.classes) for t in stream.tasks] == [[0, 1], [2, 3]]
    order = stream.facts["class_order"]
    seen = set()
    for task in stream.tasks:
        batches = list(task.train(0))
        assert [len(b.y) for b in batches] == [5, 5, 2] and task.steps == 3
        for batch in batches:
            assert set(batch.y.tolist()) <= set(task.classes)
            # label position p means class order[p]; the folder's rows come six per class
            assert [order[p] for p in batch.y.tolist()] == (batch.index // 6).tolist()
            seen |= set(batch.index.tolist())
    assert seen == set(range(24))


def test_training_order_and_augmentation_are_functions_of_seed_and_epoch(
    configure, image_folder_root
):
    cfg = configure(
        "scenario=split_imagefolder", f"data.root={image_folder_root}", "scenario.increment=4"
    )
    task = make(cfg).tasks[0]
    again = make(cfg, workers=2).tasks[0]
    list(task.test())  # evaluating more often must not move the next epoch
    first = torch.cat([b.x for b in task.train(0)])
    assert torch.equal(first, torch.cat([b.x for b in again.train(0)]))
    assert not torch.equal(first, torch.cat([b.x for b in task.train(1)]))
    cfg.seed = 1
    assert not torch.equal(first, torch.cat([b.x for b in make(cfg).tasks[0].train(0)]))


def test_a_later_start_gives_the_same_batches(configure, image_folder_root):
    cfg = configure(
        "scenario=split_imagefolder",
        f"data.root={image_folder_root}",
        "scenario.increment=4",
        "scenario.batch_size=5",
    )
    task = make(cfg).tasks[0]
    whole, tail = list(task.train(3)), list(task.train(3, 2))
    assert len(tail) == len(whole) - 2
    assert all(torch.equal(a.x, b.x) for a, b in zip(whole[2:], tail, strict=True))


def test_loading_leaves_the_global_generator_alone(configure, image_folder_root):
    cfg = configure(
        "scenario=split_imagefolder", f"data.root={image_folder_root}", "scenario.increment=4"
    )
    task = make(cfg).tasks[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(task.train(0))
    assert torch.equal(before, torch.get_rng_state())


def test_cifar_is_read_in_torchvisions_layout(configure, tmp_path, monkeypatch):
    """But for the MD5 sums, which are not those of our files."""
    monkeypatch.setattr("driftline.streams.data.cifar10.intact", lambda *a: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        with open(folder / name, "wb") as file:
            pickle.dump({"data": data, "labels": list(range(10)) * 2}, file)
    with open(folder / "batches.meta", "wb") as file:
        pickle.dump({"label_names": [str(i) for i in range(10)]}, file)
    stream = make(configure("scenario=split_cifar10", f"data.root={tmp_path}"))
    assert len(stream.tasks) == 5 and stream.name == "split_cifar10"
    assert sum(len(b.y) for b in stream.tasks[0].test()) == 4


@pytest.mark.parametrize("name", ["split_cifar10", "split_cifar100", "cifar10_c", "imagenet_c"])
def test_missing_data_names_path_layout_and_origin(configure, tmp_path, name):
    with pytest.raises(UserError) as caught:
        make(configure(f"scenario={name}", f"data.root={tmp_path}"))
    text = str(caught.value)
    assert str(tmp_path) in text and "Expected layout" in text and "https://" in text
    with pytest.raises(UserError, match="no such folder"):
        make(configure(f"scenario={name}", "data.root=/nowhere/at/all"))


# ------------------------------------------------------------------------ pipelines


def test_test_pipelines_are_pil_resize_and_crop():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    wide = Geometry(size=224)
    pilot = pipeline("pilot", wide, train=False, cifar=True)(image)
    want = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.CenterCrop(224)])(image)
    assert np.array_equal(np.asarray(pilot), np.asarray(want))
    ranpac = pipeline("ranpac", wide, train=False, cifar=True)(image)
    assert np.array_equal(np.asarray(ranpac), np.asarray(image.resize((224, 224), Image.BICUBIC)))
    coda = pipeline("coda", wide, train=False, cifar=True)(image)
    assert np.array_equal(np.asarray(coda), np.asarray(image.resize((224, 224), Image.BILINEAR)))
    lae = pipeline("lae", wide, train=False, cifar=True)(image)
    assert not np.array_equal(np.asarray(lae), np.asarray(pilot))
    assert pipeline("plain", Geometry(size=32), train=False, cifar=True)(image) is image


def test_seeded_pipeline_draws_once_per_seed():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    change = pipeline("pilot", Geometry(size=32), train=True, cifar=True)
    first, again, other = (np.asarray(seeded(change, image, s)) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ------------------------------------------------------------------------ shift streams


def test_gradual_orders_have_the_published_lengths():
    names = [f"c{i}" for i in range(15)]
    gradual, full = plan("gradual", names, [5], 1), plan("gradual_full", names, [5], 1)
    assert len(gradual) == 131 and len(full) == 135
    assert [s.domain[1] for s in gradual[:5]] == [5, 4, 3, 2, 1]
    assert [s.domain[1] for s in gradual[5:14]] == [1, 2, 3, 4, 5, 4, 3, 2, 1]


def small(configure, *more: str):
    return configure(
        "scenario=imagenet_c",
        "scenario.corruptions=[contrast,brightness,pixelate]",
        "scenario.images=40",
        "scenario.batch_size=16",
        "scenario.probe_images=20",
        "scenario.clean_images=20",
        *more,
    )


def test_embedded_stream_says_so(configure):
    stream = make(small(configure))
    assert stream.name == "imagenet_c[embedded]"
    assert stream.facts["label_space"] == "embedded"


@pytest.mark.parametrize("order", ["continual", "mixed", "correlated", "recurring"])
def test_every_image_comes_once_per_domain_and_round(configure, order):
    stream = make(small(configure, f"scenario.order={order}", "scenario.rounds=2"))
    times = 2 if order == "recurring" else 1
    pairs = [p for s in stream.segments for p in rows_of(s)]
    assert len(pairs) == 3 * 40 * times
    assert {pairs.count(p) for p in set(pairs)} == {times}
    if order == "mixed":
        assert len(stream.segments) == 1
        domains = [d for d, _ in pairs]
        assert domains != sorted(domains)
    if order == "correlated":
        for segment in stream.segments:
            labels = torch.cat([b.y for b in segment.batches()])
            assert torch.equal(labels, labels.sort().values)


def test_stream_does_not_depend_on_workers_or_batch_size(configure):
    cfg = small(configure, "scenario.order=mixed")
    one = torch.cat([b.x for b in make(cfg).segments[0].batches()])
    two = torch.cat([b.x for b in make(cfg, workers=2).segments[0].batches()])
    cfg.scenario.batch_size = 7
    three = torch.cat([b.x for b in make(cfg).segments[0].batches()])
    assert torch.equal(one, two) and torch.equal(one, three)


def test_batches_are_float_in_unit_range_and_keep_the_short_last_one(configure):
    sizes = []
    for batch in make(small(configure)).segments[0].batches():
        sizes.append(len(batch.y))
        assert batch.x.dtype == torch.float32 and batch.x.shape[1:] == (3, 32, 32)
        assert batch.x.min() >= 0 and batch.x.max() <= 1
    assert sizes == [16, 16, 8]


def test_fingerprint_follows_the_images_and_their_order(configure):
    base = make(small(configure)).facts["fingerprint"]
    assert make(small(configure)).facts["fingerprint"] == base
    for change in ("order=mixed", "severity=3", "images=39", "corruption_seed=1"):
        other = make(small(configure, f"scenario.{change}")).facts["fingerprint"]
        assert other != base, change


def test_unknown_corruption_suggests_the_nearest(configure):
    with pytest.raises(UserError, match="did you mean 'gaussian_noise'"):
        make(small(configure, "scenario.corruptions=[gausian_noise]"))


def test_cifar_c_reads_the_rows_of_a_severity(configure, cifar10_c_root):
    cfg = configure(
        "scenario=cifar10_c",
        f"data.root={cifar10_c_root}",
        "scenario.corruptions=[gaussian_noise,fog]",
        "scenario.severity=3",
        "scenario.probe_images=4",
    )
    stream = make(cfg)
    batch = next(iter(stream.segments[1].batches()))
    want = np.load(cifar10_c_root / "CIFAR-10-C" / "fog.npy")[20:30]
    assert torch.equal(
        (batch.x * 255).round().to(torch.uint8), torch.from_numpy(want).movedim(3, 1)
    )
    assert batch.index.tolist() == list(range(10))
    cfg.scenario.corruptions = ["gaussian_noise", "fog", "snow"]
    with pytest.raises(UserError, match=r"lacks 1 of 4 files: snow\.npy"):
        make(cfg)


def released(configure, root, *more: str):
    return configure(
        "scenario=imagenet_c",
        f"data.root={root}",
        "scenario.corruptions=[gaussian_noise,fog]",
        "scenario.image_list=all",
        "scenario.probe_images=4",
        *more,
    )


def test_imagenet_c_labels_are_the_canonical_ones(configure, imagenet_c_root):
    stream = make(released(configure, imagenet_c_root))
    assert stream.num_classes == 1000 and stream.name == "imagenet_c"
    labels = torch.cat([b.y for b in stream.segments[0].batches()])
    assert sorted(set(labels.tolist())) == [0, 1, 2]


def test_imagenet_c_names_missing_corruptions(configure, imagenet_c_root):
    cfg = released(configure, imagenet_c_root, "scenario.severity=4")
    with pytest.raises(UserError, match="lacks 2 of 2 corruption folders: gaussian_noise/4, fog/4"):
        make(cfg)
    cfg = released(configure, imagenet_c_root)
    cfg.scenario.corruptions = ["gaussian_noise", "fog", "snow"]
    with pytest.raises(UserError, match="lacks 1 of 3 corruption folders: snow/5"):
        make(cfg)
    with pytest.raises(UserError, match="image_list=published"):
        make(released(configure, imagenet_c_root, "scenario.image_list=published"))


def test_unreadable_image_is_named_or_skipped(configure, imagenet_c_root):
    broken = next(imagenet_c_root.glob("ImageNet-C/fog/5/*/*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:40])
    for workers in (0, 2):
        stream = make(released(configure, imagenet_c_root), workers=workers)
        with pytest.raises(UserError, match=f"{broken.name}.*data.on_error=skip"):
            list(stream.segments[1].batches())
    stream = make(released(configure, imagenet_c_root, "data.on_error=skip"))
    with pytest.warns(UserWarning, match=broken.name):
        kept = sum(len(b.y) for b in stream.segments[1].batches())
    assert kept == 11


def test_images_of_different_sizes_are_refused_with_a_remedy(configure, tmp_path):
    root = tmp_path / "mixed"
    write_images(root, ["train/a/0.png", "test/a/0.png"], size=16)
    write_images(root, ["train/a/1.png"], size=24)
    cfg = configure(
        "scenario=split_imagefolder",
        f"data.root={root}",
        "scenario.increment=1",
        "scenario.pipeline=raw",
    )
    with pytest.raises(UserError, match="differ in size.*16x16, 24x24"):
        list(make(cfg).tasks[0].fit())


def test_published_list_is_complete():
    from driftline.streams.data.imagenet import published_list, wnids

    names = published_list()
    classes = {n.split("/")[0] for n in names}
    assert len(names) == len(set(names)) == 5000
    assert len(classes) == 997 and classes <= set(wnids())


def test_derived_cache_gives_the_same_image_and_survives_damage(tmp_path):
    write_images(tmp_path, ["a/0.png", "a/1.png"])
    base = Files(tmp_path / "a", ["0.png", "1.png"], np.zeros(2), ["a"])
    calls = []

    def change(image, row):
        calls.append(row)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    cached = Derived(base, change, "flip", tmp_path / "cache")
    want = np.asarray(base.image(1))[:, ::-1]
    assert np.array_equal(np.asarray(cached.image(1)), want)
    assert np.array_equal(np.asarray(cached.image(1)), want) and calls == [1]
    stored = next((tmp_path / "cache").rglob("*.npy"))
    stored.write_bytes(stored.read_bytes()[:50])
    assert np.array_equal(np.asarray(cached.image(1)), want) and calls == [1, 1]
    assert Derived(base, change, "other", tmp_path / "cache").content() != cached.content()


# ------------------------------------------------------------------------ corruptions on the fly


def on_the_fly(configure, root, *more: str):
    return configure(
        "scenario=imagenet_c",
        "scenario.corrupt=on_the_fly",
        f"data.root={root}",
        "scenario.corruptions=[gaussian_noise,frost]",
        "scenario.order=mixed",
        "scenario.image_list=all",
        "scenario.images=4",
        "scenario.probe_images=2",
        *more,
    )


def test_generated_images_depend_on_no_setting_of_the_run(
    configure, imagenet_clean_root, tmp_path, monkeypatch
):
    """Batch size, workers, cache and where images are generated: the same bytes."""

    def images(cfg, **options) -> torch.Tensor:
        return torch.cat([b.x for b in make(cfg, **options).segments[0].batches()])

    cfg = on_the_fly(configure, imagenet_clean_root, "scenario.batch_size=20")
    whole = images(cfg)
    assert whole.shape == (8, 3, 224, 224)
    assert torch.equal(whole, images(cfg, workers=2))
    cfg.scenario.batch_size = 3
    assert torch.equal(whole, images(cfg, workers=1))
    cfg.data.cache = str(tmp_path / "cache")
    assert torch.equal(whole, images(cfg, workers=2))
    stored = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(stored) == 8
    for path in stored[::2]:  # some are read, some made again
        path.unlink()
    assert torch.equal(whole, images(cfg))
    # As on a GPU: workers read, the main process corrupts on the device.
    monkeypatch.setattr(loading, "GENERATING", ("cpu",))
    for path in stored[::2]:
        path.unlink()
    assert torch.equal(whole, images(cfg, workers=1)) and all(p.exists() for p in stored)
    cfg.data.cache = None
    assert torch.equal(whole, images(cfg, workers=1))
    small = on_the_fly(configure, imagenet_clean_root, "scenario.resize=48")
    generated = images(small)
    monkeypatch.undo()
    assert torch.equal(generated, images(small)) and generated.shape[-1] == 48


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_generated_on_a_gpu_are_those_of_the_host(configure, imagenet_clean_root):
    cfg = on_the_fly(configure, imagenet_clean_root, "scenario.batch_size=8")
    host, device = (
        torch.cat([b.x.cpu() for b in make(cfg, workers=2, store=s).segments[0].batches()])
        for s in (ImageStore(), ImageStore("cuda"))
    )
    assert torch.equal(host, device)


def test_generated_images_and_cache_keys_stay_what_they_were(configure):
    """Recorded when images were corrupted one by one: caches filled then stay valid."""
    stream = make(
        configure("scenario=cifar10_c", "scenario.images=40", "scenario.corruptions=[fog,snow]")
    )
    assert stream.facts["fingerprint"] == "18e5bfcfcedf"
    digest = hashlib.sha256()
    for segment in stream.segments:
        for batch in segment.batches():
            digest.update((batch.x * 255).round().to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:12] == "191f3b0e93ea"


def test_generated_images_are_equal_to_corrupt(configure, imagenet_clean_root):
    cfg = on_the_fly(configure, imagenet_clean_root)
    stream = make(cfg)
    batch = next(iter(stream.segments[0].batches()))
    name, severity = stream.domains[int(batch.domain[0])].split(":")
    row = int(batch.index[0])
    clean = T.Compose([T.Resize(256, T.InterpolationMode.BILINEAR), T.CenterCrop(224)])(
        Image.open(imagenet_clean_root / f"image{row:02d}.png")
    )
    want = C.corrupt(np.asarray(clean), name, int(severity), index=row, jpeg_quality=85)
    got = (batch.x[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(got, want)


def test_grey_and_transparent_files_are_read_as_rgb(configure, imagenet_clean_root):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 40), np.uint8)
    Image.fromarray(grey).save(imagenet_clean_root / "image00.png")
    alpha = rng.integers(0, 256, (40, 40, 4), np.uint8)
    Image.fromarray(alpha).save(imagenet_clean_root / "image01.png")
    cfg = on_the_fly(configure, imagenet_clean_root, "scenario.images=12")
    cfg.scenario.corruptions = ["brightness"]
    cfg.scenario.clean_images = 12
    stream = make(cfg)
    assert sum(len(b.y) for b in stream.segments[0].batches()) == 12
    clean = {int(i): x for b in stream.holdout() for i, x in zip(b.index, b.x, strict=True)}
    assert torch.equal(clean[0][0], clean[0][1]) and torch.equal(clean[0][0], clean[0][2])
    opaque = T.Resize(256, T.InterpolationMode.BILINEAR)(Image.fromarray(alpha[..., :3]))
    want = T.functional.pil_to_tensor(T.CenterCrop(224)(opaque))
    assert torch.equal((clean[1] * 255).round().to(torch.uint8), want)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_corrupted_are_one_clear_error(tmp_path, workers):
    write_images(tmp_path, ["0.png", "1.png"], size=20)
    base = Files(tmp_path, ["0.png", "1.png"], np.zeros(2), ["a"])
    options = {"preset": "cifar", "seed": 0, "jpeg_quality": None, "frost_dir": None}
    images = corrupted(base, [("fog", 1)], None, **options)["fog", 1]
    reader = loading.Reader([images], Skipped(), workers)
    rows = loading.Rows.of(images, np.arange(2))
    with pytest.raises(UserError, match="on_the_fly, fog:1: image is 20 x 20 px.*from 32") as found:
        list(reader.batches(rows, 2, loading.as_stored))
    assert "Traceback" not in str(found.value)


def test_frost_photographs_must_be_there(configure, imagenet_clean_root, tmp_path):
    words = [f"scenario.frost_dir={tmp_path / 'frost'}"]
    with pytest.raises(UserError, match=r"scenario\.frost_dir=.*lacks frost1\.png"):
        make(on_the_fly(configure, imagenet_clean_root, *words))


def test_generated_files_are_told_from_the_released_ones(configure, cifar10_c_root):
    words = ["scenario=cifar10_c", f"data.root={cifar10_c_root}", "scenario.probe_images=4"]
    words += ["scenario.corruptions=[fog]", "scenario.severity=3"]
    assert make(configure(*words)).facts["corruptions"] == "released files"
    manifest = cifar10_c_root / "CIFAR-10-C" / "manifest.json"
    manifest.write_text('{"settings": {"seed": 7, "frost": "synthetic texture"}}')
    stream = make(configure(*words))
    assert stream.name == "cifar10_c[generated]"
    assert str(stream.facts["corruptions"]).startswith("generated files")
    assert stream.facts["generated"] == {"seed": 7, "frost": "synthetic texture"}
    manifest.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        make(configure(*words))


def test_scenarios_build_without_unknown_options(configure):
    """Every scenario's YAML names exactly the parameters of its function."""
    from conftest import ROOT

    from driftline.core.build import locate, options_of

    live = {"data_root", "on_error", "cache", "workers", "seed", "geometry", "store"}
    for path in sorted((ROOT / "conf" / "scenario").glob("*.yaml")):
        node = complete(configure(f"scenario={path.stem}")).scenario
        options = set(options_of(locate(node._target_), node))
        assert set(OmegaConf.to_container(node)) - {"_target_", "name"} == options - live, path


# ------------------------------------------------------------------------ further task protocols


def task_stream(configure, *words: str, store: ImageStore | None = None):
    cfg = complete(configure(*words))
    return build(
        cfg.scenario,
        at="scenario",
        data_root=cfg.data.root,
        on_error="raise",
        workers=0,
        seed=0,
        geometry=Geometry(size=32),
        store=store or ImageStore(),
    )


def test_few_shot_sessions_hold_so_many_images_after_the_first_task(configure):
    words = ["scenario=split_cifar10", "scenario.embedded_images=[6,3]", "scenario.shots=2"]
    stream = task_stream(configure, *words)
    counts = [
        torch.bincount(torch.cat([b.y for b in t.train(0)]))[t.classes.start :].tolist()
        for t in stream.tasks
    ]
    assert counts[0] == [6, 6] and all(c == [2, 2] for c in counts[1:])
    assert stream.facts["shots"] == 2
    full = task_stream(configure, *words[:2])
    assert full.facts["fingerprint"] != stream.facts["fingerprint"]
    for task, other in zip(stream.tasks[1:], full.tasks[1:], strict=True):
        few, every = ({int(i) for b in t.train(0) for i in b.index} for t in (task, other))
        assert few < every


def test_the_stored_order_is_what_the_first_epoch_delivers(configure):
    stream = task_stream(configure, "scenario=split_cifar10", "scenario.embedded_images=[6,3]")
    rows = torch.cat([b.index for t in stream.tasks for b in t.train(0)]).numpy()
    labels = torch.cat([b.y for t in stream.tasks for b in t.train(0)]).numpy()
    assert np.array_equal(stream.order["row"], rows)
    assert np.array_equal(stream.order["label"], labels)


def test_domain_stream_keeps_the_classes_and_changes_the_images(configure):
    words = ["scenario=domains_imagefolder", "scenario.embedded_images=[3,2]"]
    stream = task_stream(configure, *words)
    assert [t.classes for t in stream.tasks] == [range(10)] * 5
    first, second = (next(iter(t.test())) for t in stream.tasks[:2])
    assert torch.equal(first.y, second.y) and not torch.equal(first.x, second.x)
    assert "new_classes" not in stream.provides
    with pytest.raises(UserError, match="no embedded domain; did you mean 'contrast'"):
        task_stream(configure, *words, "scenario.domains=[contrst]")


def test_domain_folders_must_agree_in_their_classes(configure, tmp_path):
    from conftest import write_images

    for domain in ("art", "photo"):
        for split in ("train", "test"):
            write_images(tmp_path / domain / split, ["a/0.png", "b/0.png"], size=32)
    words = ["scenario=domains_imagefolder", f"data.root={tmp_path}"]
    stream = task_stream(configure, *words)
    assert [t.name for t in stream.tasks] == ["art", "photo"] and stream.num_classes == 2
    write_images(tmp_path / "photo" / "train", ["c/0.png"], size=32)
    with pytest.raises(UserError, match="'photo' has other classes"):
        task_stream(configure, *words)
