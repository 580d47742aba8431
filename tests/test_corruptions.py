"""Image corruptions: the reference's outputs, its statistics, and facts that need no data.

`C.corrupt` is `C.corrupt_batch` of one image, so what holds for one holds for the other.
"""

from __future__ import annotations

import colorsys
import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from driftline.streams import corruptions as C
from driftline.streams.corruption_ops import blur, common, digital, frost, noise, spatter, weather

ALL = C.STANDARD + C.EXTRA
PRESETS = {"imagenet": "imagenet224", "cifar": "cifar32"}
SEVERITIES = (1, 3, 5)
DETERMINISTIC = (
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
)
SEEDED = (
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
    "spatter",
)
STATISTICS = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", *SEEDED)
# Per corruption: largest difference in levels, and the largest share of values that may differ.
EXACT = (0, 0.0)
TOLERANCE = {
    "defocus_blur": (1, 1e-3),
    "gaussian_blur": (1, 1e-3),
    "zoom_blur": (1, 1e-4),
    "motion_blur": (1, 1e-2),
    "snow": (2, 1e-2),
    "elastic_transform": (4, 0.15),
    "spatter": (1, 1e-3),
}


def picture(h: int = 64, w: int = 64, seed: int = 0) -> np.ndarray:
    """Cloudy random colours with the 1/f spectrum of photographs, uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.normal(size=(3, h, w))) / frequency**1.3
    planes = np.fft.irfft2(noise, s=(h, w))
    planes *= 45 / planes.std(axis=(1, 2), keepdims=True)
    return np.clip(planes.transpose(1, 2, 0) + 120, 0, 255).astype(np.uint8)


def flat(colour: tuple[int, int, int], side: int = 40) -> np.ndarray:
    """An image of one colour."""
    return np.full((side, side, 3), colour, dtype=np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute differences as integers."""
    return np.abs(a.astype(int) - b.astype(int))


# ------------------------------------------------------------------ the reference's outputs


@lru_cache(maxsize=1)
def _golden(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


@pytest.fixture
def golden() -> dict[str, np.ndarray]:
    """Outputs of the reference code."""
    path = Path(os.environ.get("REALDATA", "")) / "corruption_golden" / "golden.npz"
    if not os.environ.get("REALDATA") or not path.is_file():
        pytest.skip("REALDATA names no folder with corruption_golden/golden.npz")
    return _golden(str(path))


def frost_dir(name: str) -> Path | None:
    """The frost photographs, where the test needs them."""
    if name != "frost":
        return None
    folder = Path(os.environ.get("REALDATA", "")) / "frost"
    if not all((folder / file).is_file() for file in C.FROST_FILES):
        pytest.skip("REALDATA has no folder frost with the reference's photographs")
    return folder


def check(name: str, own: np.ndarray, expected: np.ndarray) -> None:
    """Compares with the tolerance of the corruption."""
    difference = levels(own, expected)
    most, share = TOLERANCE.get(name, EXACT)
    assert difference.max() <= most
    assert np.mean(difference > 0) <= share


@pytest.mark.realdata
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("preset", PRESETS)
def test_deterministic_corruptions_equal_the_reference(golden, preset, name, severity):
    image = golden[f"clean/{PRESETS[preset]}"]
    own = C.corrupt(image, name, severity, preset=preset)
    check(name, own, golden[f"exact/{PRESETS[preset]}/{name}/{severity}"])


@pytest.mark.realdata
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("preset", PRESETS)
def test_random_corruptions_equal_the_reference_given_its_draws(golden, preset, name, severity):
    image = golden[f"clean/{PRESETS[preset]}"]
    folder = frost_dir(name)
    draws = C.draw(
        name,
        severity,
        image.shape[:2],
        preset=preset,
        rng=np.random.RandomState(0),
        frost_dir=folder,
    )
    own = C.apply(image, name, severity, draws, preset=preset, frost_dir=folder)
    check(name, own, golden[f"seed0/{PRESETS[preset]}/{name}/{severity}"])


@pytest.mark.one_in(4)
@pytest.mark.realdata
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("preset", PRESETS)
def test_statistics_equal_the_reference(golden, preset, name, severity):
    image = golden[f"clean/{PRESETS[preset]}"]
    folder = frost_dir(name)
    rows, spectra = [], []
    for index in range(16 if preset == "imagenet" else 32):
        own = C.corrupt(image, name, severity, preset=preset, index=index, frost_dir=folder)
        values = own.astype(np.float64)
        rows.append([*values.mean((0, 1)), *values.std((0, 1)), psnr(own, image)])
        spectra.append(np.log(radial_power(values)))
    mean, error = golden[f"stat/{PRESETS[preset]}/{name}/{severity}"]
    own_error = np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
    limit = 5 * np.hypot(error, own_error) + 0.05
    assert (np.abs(np.mean(rows, axis=0) - mean) <= limit).all()
    if name in SEEDED:  # one image of the reference among ours
        reference = golden[f"seed0/{PRESETS[preset]}/{name}/{severity}"].astype(np.float64)
        distance = np.abs(np.log(radial_power(reference)) - np.mean(spectra, axis=0))
        assert (distance <= 5 * np.std(spectra, axis=0, ddof=1) + 0.05).all()


def radial_power(values: np.ndarray) -> np.ndarray:
    """Power spectrum of [H, W, 3] in twelve rings of equal width, without the mean."""
    h, w = values.shape[:2]
    power = (np.abs(np.fft.fft2(values, axes=(0, 1))) ** 2).mean(2) / (h * w)
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    ring = np.minimum((radius * 24).astype(int), 11)
    power[0, 0], count = 0, np.bincount(ring.ravel())
    count[0] -= 1
    return np.bincount(ring.ravel(), power.ravel()) / count


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"])
def test_noise_is_white(name):
    """On a grey image all frequencies have the power of the variance."""
    image = np.full((64, 64, 3), 128, np.uint8)
    own = [C.corrupt(image, name, 3, index=i).astype(np.float64) for i in range(16)]
    rings = np.stack([radial_power(values) / values.var((0, 1)).mean() for values in own])
    error = rings.std(0, ddof=1) / 4
    assert (np.abs(rings.mean(0) - 1) <= 5 * error).all()


# ------------------------------------------------------------------ interface


def test_names():
    assert len(C.STANDARD) == 15 and len(C.EXTRA) == 4 and len(set(ALL)) == 19
    assert isinstance(C.VERSION, int)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ALL)
def test_types_sizes_and_input(name, preset):
    for severity, size in ((1, (32, 32)), (5, (32, 32)), (3, (47, 33)), (5, (96, 130))):
        image = picture(*size)
        image.flags.writeable = False
        before = image.copy()
        own = C.corrupt(image, name, severity, preset=preset)
        assert own.dtype == np.uint8 and own.shape == image.shape
        assert own.flags.c_contiguous and own.flags.writeable
        assert not np.shares_memory(own, image)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("name", ALL)
def test_largest_size(name):
    image = picture(512, 320)
    assert C.corrupt(image, name, 5).shape == image.shape


@pytest.mark.parametrize("name", ALL)
def test_draws_belong_to_the_image_and_not_to_the_visit(name):
    images = [picture(seed=i) for i in range(4)]

    def make(i: int) -> np.ndarray:
        return C.corrupt(images[i], name, 4, preset="cifar", seed=3, index=i)

    forward = [make(i) for i in range(4)]
    backward = [make(i) for i in reversed(range(4))][::-1]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(make, range(4)))
    for a, b, c in zip(forward, backward, together, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


@pytest.mark.parametrize("name", [n for n in ALL if n not in DETERMINISTIC])
def test_other_seed_index_or_severity_means_other_draws(name):
    def draws(seed: int, severity: int, index: int) -> list[np.ndarray]:
        rng = C.generator(seed, name, severity, index)
        return list(C.draw(name, 3, (40, 36), preset="imagenet", rng=rng).values())

    base = draws(0, 1, 0)
    assert base
    assert all(np.array_equal(a, b) for a, b in zip(base, draws(0, 1, 0), strict=True))
    for other in (draws(1, 1, 0), draws(0, 2, 0), draws(0, 1, 1)):
        assert any(not np.array_equal(a, b) for a, b in zip(base, other, strict=True))


def test_deterministic_corruptions_draw_nothing():
    for name in DETERMINISTIC:
        rng = np.random.default_rng(0)
        state = rng.bit_generator.state
        assert C.draw(name, 2, (32, 32), preset="cifar", rng=rng) == {}
        assert rng.bit_generator.state == state


def test_both_presets_differ():
    image = picture()
    for name in ALL:
        a = C.corrupt(image, name, 3, preset="imagenet")
        assert not np.array_equal(a, C.corrupt(image, name, 3, preset="cifar"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "name",
    [
        *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur"),
        *("contrast", "brightness", "pixelate", "jpeg_compression", "gaussian_blur"),
    ],
)
def test_severity_orders_the_distortion(name, preset):
    image = picture(128, 128)
    quality = [psnr(C.corrupt(image, name, s, preset=preset), image) for s in range(1, 6)]
    assert quality == sorted(quality, reverse=True) and len(set(quality)) == 5


def test_closing_jpeg_step():
    image = picture()
    own = C.corrupt(image, "contrast", 2, jpeg_quality=85)
    buffer = io.BytesIO()
    Image.fromarray(C.corrupt(image, "contrast", 2)).save(buffer, "JPEG", quality=85, optimize=True)
    assert np.array_equal(own, np.array(Image.open(buffer)))
    both = torch.from_numpy(np.stack([image, image])).permute(0, 3, 1, 2)
    for one in C.corrupt_batch(both, "contrast", 2, [0, 0], jpeg_quality=85, chunk=1):
        assert np.array_equal(own, one.permute(1, 2, 0).numpy())


# ------------------------------------------------------------------ batches


def batch(count: int, h: int = 48, w: int = 40) -> torch.Tensor:
    """Different pictures, uint8 [count, 3, h, w]."""
    return torch.stack([torch.from_numpy(picture(h, w, i)).permute(2, 0, 1) for i in range(count)])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ALL)
def test_an_image_does_not_depend_on_its_batch(name, preset, precision):
    x, ids = batch(5), [7, 0, 3, 11, 2]
    before = x.clone()

    def make(rows: list[int], severity: int, **options: int) -> torch.Tensor:
        return C.corrupt_batch(
            x[rows],
            name,
            severity,
            [ids[i] for i in rows],
            preset=preset,
            seed=4,
            precision=precision,
            **options,
        )

    for severity in (1, 3, 5):
        whole = make([0, 1, 2, 3, 4], severity)
        assert whole.dtype == torch.uint8 and whole.shape == x.shape
        assert torch.equal(make([4, 3, 2, 1, 0], severity).flip(0), whole)
        assert torch.equal(torch.cat([make([0, 1], severity), make([2, 3, 4], severity)]), whole)
        for chunk in (1, 2, 5):
            assert torch.equal(make([0, 1, 2, 3, 4], severity, chunk=chunk), whole)
        if precision == "exact":
            for i in range(5):
                single = C.corrupt(
                    x[i].permute(1, 2, 0).numpy(),
                    name,
                    severity,
                    preset=preset,
                    seed=4,
                    index=ids[i],
                )
                assert np.array_equal(single, whole[i].permute(1, 2, 0).numpy())
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ALL)
def test_an_image_does_not_depend_on_threads_or_memory_format(name):
    x = batch(2, 230, 200)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(C.corrupt_batch(x, name, 4, [0, 1], chunk=2))
    finally:
        torch.set_num_threads(threads)
    results.append(
        C.corrupt_batch(x.contiguous(memory_format=torch.channels_last), name, 4, [0, 1])
    )
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", ALL)
def test_float_images_are_levels_over_255(name):
    x = batch(2)
    expected = C.corrupt_batch(x, name, 3, [0, 1])
    for dtype in (torch.float32, torch.float64, torch.float16):
        own = C.corrupt_batch(x.to(dtype) / 255, name, 3, torch.tensor([0, 1]))
        assert own.dtype == dtype
        assert torch.equal(own, expected.to(dtype) / 255)


# Largest share of values that float32 may move by one level.
FAST = {"saturate": 0.3, "defocus_blur": 0.03, "brightness": 0.03, "frost": 0.03}


@pytest.mark.parametrize("name", ALL)
def test_fast_precision_stays_within_one_level(name):
    x = batch(2, 96, 96)
    for severity in (1, 3, 5):
        exact = C.corrupt_batch(x, name, severity, [0, 1]).numpy()
        fast = C.corrupt_batch(x, name, severity, [0, 1], precision="fast").numpy()
        difference = levels(fast, exact)
        assert difference.max() <= 1
        assert np.mean(difference > 0) <= FAST.get(name, 0.005)


@pytest.mark.parametrize(("h", "w"), [(32, 32), (33, 91), (512, 32), (300, 512), (90, 45)])
def test_deterministic_operations_at_other_sizes(h, w):
    """The integer arithmetic of defocus and pixelation, against its plain definition."""
    ndimage = pytest.importorskip("scipy.ndimage")
    image = picture(h, w)
    for severity in (1, 4):
        factor = C._PARAMETERS["cifar"]["pixelate"][severity - 1]
        sides = int(w * factor), int(h * factor)
        # One side at a time: which one Pillow shrinks first depends on its version.
        first = (w, sides[1]) if h > 2 * w else (sides[0], h)
        small = Image.fromarray(image).resize(first, Image.Resampling.BOX)
        small = small.resize(sides, Image.Resampling.BOX)
        expected = np.array(small.resize((w, h), Image.Resampling.BOX))
        assert np.array_equal(C.corrupt(image, "pixelate", severity, preset="cifar"), expected)
        kernel = blur.disc_kernel(*C._PARAMETERS["cifar"]["defocus_blur"][severity - 1])
        kernel = kernel.astype(np.float64)
        sharp = ndimage.correlate(image[..., 1].astype(np.float64), kernel, mode="mirror")
        own = C.corrupt(image, "defocus_blur", severity, preset="cifar")[..., 1]
        # equal unless the exact value is an integer
        near = np.abs(sharp - np.rint(sharp)) < 1e-6
        assert np.array_equal(own[~near], np.clip(sharp, 0, 255).astype(np.uint8)[~near])


def test_sums_of_the_defocus_transform_are_exact():
    """The error of the transform before rounding is far below one half."""
    image = torch.full((1, 3, 512, 512), 255, dtype=torch.uint8)
    image[..., ::3, ::5] = 0
    kernel = np.rint(blur.disc_kernel(10, 0.5) * 2.0**36)
    h = w = 512
    rows = common.reflect101(torch.arange(-10, h + 10), h).long()
    padded = image[0, 0][rows][:, rows].to(torch.float64)
    size = (blur._fft_length(h + 20), blur._fft_length(w + 20))
    spectrum = torch.fft.rfft2(padded, s=size) * blur._disc_spectrum(10, 0.5, size, torch.float64)
    sums = torch.fft.irfft2(spectrum, s=size)[20 : 20 + h, 20 : 20 + w] * 2.0**36
    assert (sums - sums.round()).abs().max() < 0.1
    window = padded[:21, :21].numpy()
    assert sums[0, 0].round() == (window.astype(np.int64) * kernel.astype(np.int64)).sum()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_gpu_images_equal_cpu_images(name):
    x = batch(3, 224, 224)
    for severity in (1, 5):
        own = C.corrupt_batch(x.cuda(), name, severity, [0, 1, 2])
        assert own.device.type == "cuda"
        assert torch.equal(own.cpu(), C.corrupt_batch(x, name, severity, [0, 1, 2]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros((1, 1, 32, 32)), r"got \[1, 1, 32, 32\]; repeat the grey channel"),
        (torch.zeros((1, 4, 32, 32), dtype=torch.uint8), r"\[1, 4, 32, 32\]; drop the alpha"),
        (torch.zeros((3, 32, 32)), r"must be \[B, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros((1, 3, 31, 40)), "31 x 40 px; both sides must be from 32"),
        (torch.zeros((1, 3, 40, 513)), "40 x 513 px"),
        (torch.zeros((1, 3, 32, 32), dtype=torch.int64), "uint8 or float tensor.*torch.int64"),
        (np.zeros((1, 3, 32, 32), np.uint8), "uint8 or float tensor.*got ndarray"),
        (torch.full((1, 3, 32, 32), 1.01), r"must lie in \[0, 1\] without NaN"),
        (torch.full((1, 3, 32, 32), -0.01), r"must lie in \[0, 1\]"),
        (torch.full((1, 3, 32, 32), float("nan")), "without NaN"),
    ],
)
def test_bad_batches(x, message):
    with pytest.raises(ValueError, match=message):
        C.corrupt_batch(x, "fog", 1, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "pixelete"}, "did you mean 'pixelate'"),
        ({"severity": 0}, "severity must be from 1 to 5, got 0"),
        ({"severity": 6}, "severity must be from 1 to 5, got 6"),
        ({"indices": [0, 1, 2]}, "must number the 2 images of the batch, got 3"),
        ({"indices": [0, -1]}, "index -1"),
        ({"precision": "float16"}, "unknown precision 'float16'; allowed: exact, fast"),
        ({"chunk": 0}, "chunk must be at least 1 image or None, got 0"),
        ({"jpeg_quality": 96}, "jpeg_quality must be from 1 to 95"),
    ],
)
def test_bad_settings_of_a_batch(change, message):
    given = {"x": batch(2, 32, 32), "name": "fog", "severity": 1, "indices": [0, 1], **change}
    with pytest.raises(ValueError, match=message):
        C.corrupt_batch(**given)


def test_empty_batch():
    assert C.corrupt_batch(torch.zeros((0, 3, 32, 32)), "snow", 1, []).shape == (0, 3, 32, 32)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "gausian_noise"}, "did you mean 'gaussian_noise'"),
        ({"name": "rain"}, "unknown corruption 'rain'.*jpeg_compression"),
        ({"severity": 0}, "severity must be from 1 to 5, got 0"),
        ({"severity": 6}, "severity must be from 1 to 5, got 6"),
        ({"severity": 2.0}, "severity must be an integer from 1 to 5, got 2.0"),
        ({"preset": "tiny"}, "unknown preset 'tiny'; allowed: imagenet, cifar"),
        ({"image": np.zeros((32, 32, 3))}, r"uint8 \[H, W, 3\], got float64"),
        ({"image": np.zeros((32, 32), np.uint8)}, r"got uint8 \[32, 32\]; repeat the grey"),
        ({"image": np.zeros((32, 32, 4), np.uint8)}, r"got uint8 \[32, 32, 4\]; drop the alpha"),
        ({"image": np.zeros((3, 32, 32), np.uint8)}, r"got uint8 \[3, 32, 32\]"),
        ({"image": [[0]]}, "NumPy array"),
        ({"image": np.zeros((31, 64, 3), np.uint8)}, "31 x 64 px; both sides must be from 32 to"),
        ({"image": np.zeros((64, 513, 3), np.uint8)}, "64 x 513 px"),
        ({"seed": -1}, "seed and index must be >= 0, got seed -1"),
        ({"index": -2}, "index -2"),
        ({"jpeg_quality": 0}, "jpeg_quality must be from 1 to 95"),
    ],
)
def test_errors_name_what_was_given_and_what_is_allowed(change, message):
    given = {"image": np.zeros((32, 32, 3), np.uint8), "name": "fog", "severity": 1, **change}
    with pytest.raises(ValueError, match=message):
        C.corrupt(**given)


def test_draws_of_another_size_or_corruption_are_refused():
    image = picture(40, 40)
    rng = np.random.default_rng(0)
    draws = C.draw("snow", 1, (40, 44), preset="imagenet", rng=rng)
    with pytest.raises(ValueError, match=r"shape \(40, 44\); this image needs \(40, 40\)"):
        C.apply(image, "snow", 1, draws, preset="imagenet")
    with pytest.raises(ValueError, match="draws lack 'shifts'"):
        C.apply(image, "glass_blur", 1, draws, preset="imagenet")


# ------------------------------------------------------------------ facts checked by hand


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 100, 201)])
def test_flat_images_stay_flat(colour):
    image = flat(colour)
    for name in ("motion_blur", "pixelate"):
        assert np.array_equal(C.corrupt(image, name, 5), image)
    # weights that sum to 1 - 1e-16 may lose one level to the truncation
    for name in ("glass_blur", "zoom_blur", "gaussian_blur", "contrast"):
        assert levels(C.corrupt(image, name, 5), image).max() <= 1
    assert levels(C.corrupt(image, "defocus_blur", 3), image).max() <= 1
    # the reference's kernel of radius 10 sums to 1.0108
    assert levels(C.corrupt(image, "defocus_blur", 5), image).max() <= 3
    assert levels(C.corrupt(image, "elastic_transform", 5), image).max() <= 1


def test_black_stays_black_where_the_noise_is_multiplied():
    black = flat((0, 0, 0))
    for name in ("shot_noise", "speckle_noise", "fog"):
        assert not C.corrupt(black, name, 5).any()


def test_brightness_and_saturation_of_grey():
    assert (C.corrupt(flat((0, 0, 0)), "brightness", 5) == 127).all()  # trunc(255 * .5)
    assert (C.corrupt(flat((200, 200, 200)), "brightness", 5) == 255).all()
    assert levels(C.corrupt(flat((90, 90, 90)), "saturate", 1), flat((90, 90, 90))).max() <= 1
    reddish = C.corrupt(flat((90, 90, 90)), "saturate", 5)[0, 0]
    assert reddish[0] == 90 and reddish[1] == reddish[2] < 90


def test_hsv_against_the_standard_library():
    values = np.random.default_rng(0).integers(0, 256, (40, 3))
    values[:6] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0], [0, 8, 8], [7, 0, 7]]
    unit = torch.from_numpy(values.T.reshape(1, 3, 40, 1) / 255)
    hsv = digital.rgb_to_hsv(unit)
    expected = np.array([colorsys.rgb_to_hsv(*row) for row in values / 255])
    np.testing.assert_allclose(torch.stack(hsv, -1)[0, :, 0], expected, atol=1e-12)
    back = digital.hsv_to_levels(*hsv)[0, :, :, 0].T.numpy()
    assert levels(back, values).max() <= 1  # truncated


def test_contrast_by_hand():
    image = flat((0, 0, 0))
    image[:, ::2] = 200  # mean 100, factor .4: 60 and 140
    own = C.corrupt(image, "contrast", 1)
    assert levels(own[0, 0], np.array(140)).max() <= 1
    assert levels(own[0, 1], np.array(60)).max() <= 1


def test_impulses_hit_single_channels():
    image = np.full((200, 200, 3), 100, dtype=np.uint8)
    own = C.corrupt(image, "impulse_noise", 5)
    assert set(np.unique(own)) <= {0, 99, 100, 255}
    assert abs(np.mean(own == 0) - 0.135) < 0.005 and abs(np.mean(own == 255) - 0.135) < 0.005
    assert abs(np.mean((own == 255).all(-1)) - 0.135**3) < 0.003


def test_impulses_against_scikit_image():
    util = pytest.importorskip("skimage.util")
    image = picture()
    for severity, amount in enumerate(C._PARAMETERS["imagenet"]["impulse_noise"], start=1):
        rng = np.random.default_rng(severity)
        draws = C.draw("impulse_noise", severity, (64, 64), preset="imagenet", rng=rng)
        own = C.apply(image, "impulse_noise", severity, draws, preset="imagenet")
        noisy = util.random_noise(image / 255.0, mode="s&p", amount=amount, rng=severity)
        assert np.array_equal(own, common.to_levels(torch.from_numpy(noisy)).numpy())


@pytest.mark.parametrize("photons", [3, 60, 500])
def test_poisson_counts(photons):
    stats = pytest.importorskip("scipy.stats")
    uniform = np.random.default_rng(0).uniform(size=(1, 32, 50, 3))
    uniform[0, 0, :3, 0] = [0.0, 1e-12, 1 - 1e-12]
    for level in (0, 1, 77, 255):
        image = torch.full((1, 3, 32, 50), level, dtype=torch.uint8)
        draws = {"uniform": torch.from_numpy(uniform)}
        own = noise.shot_noise(image, photons, draws, torch.float64)
        counts = np.maximum(stats.poisson.ppf(uniform[0], photons * level / 255), 0)
        expected = np.trunc(np.minimum(counts / photons, 1) * 255).astype(np.uint8)
        assert np.array_equal(own[0].permute(1, 2, 0).numpy(), expected)


def test_gaussian_filters_against_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    values = np.random.default_rng(0).uniform(size=(37, 50))
    for sigma in (0.05, 0.4, 1.5, 6):
        own = common.gaussian_blur_nearest(torch.from_numpy(values)[None], sigma)[0].numpy()
        assert np.array_equal(own, ndimage.gaussian_filter(values, sigma, mode="nearest"))
    for sigma in (0.64, 2.44, 30):  # the last has a radius beyond the image
        own = common.smooth_rows(torch.from_numpy(values), sigma, 3.0)
        own = common.smooth_rows(own.T, sigma, 3.0).T.numpy()
        expected = ndimage.gaussian_filter(values, sigma, mode="reflect", truncate=3.0)
        np.testing.assert_allclose(own, expected, atol=1e-12)


@pytest.mark.parametrize("repeats_edge", [True, False])
def test_bilinear_samples_against_scipy(repeats_edge):
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(2, 3, 33, 40))
    places = rng.uniform(-200, 200, size=(2, 2, 33, 40))  # several widths beyond the border
    places[0, 0] = np.rint(places[0, 0])
    own = digital._bilinear(torch.from_numpy(image), *torch.tensor(places), repeats_edge)
    mode = "reflect" if repeats_edge else "mirror"
    for i in range(2):
        for c in range(3):
            expected = ndimage.map_coordinates(image[i, c], places[:, i], order=1, mode=mode)
            np.testing.assert_allclose(own[i, c].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(32, 45), (224, 224)])
def test_central_zoom_against_scipy(shape):
    ndimage = pytest.importorskip("scipy.ndimage")
    values = np.random.default_rng(0).uniform(size=shape)
    for factor in (1.0, 1.07, 1.3, 2.5, 4.5):
        crop = [int(np.ceil(n / factor)) for n in shape]
        first = [(n - c) // 2 for n, c in zip(shape, crop, strict=True)]
        inside = values[first[0] : first[0] + crop[0], first[1] : first[1] + crop[1]]
        large = ndimage.zoom(inside, factor, order=1)
        trim = [(a - b) // 2 for a, b in zip(large.shape, shape, strict=True)]
        expected = large[trim[0] : trim[0] + shape[0], trim[1] : trim[1] + shape[1]]
        own = common.central_zoom(torch.from_numpy(values), factor).T
        np.testing.assert_allclose(own, expected, atol=1e-12)


def test_number_of_zoom_factors():
    for preset, expected in (("imagenet", (12, 16, 11, 13, 11)), ("cifar", (7, 12, 16, 21, 26))):
        counts = [len(np.arange(1, *p)) for p in C._PARAMETERS[preset]["zoom_blur"]]
        assert tuple(counts) == expected


@pytest.mark.parametrize("severity", [1, 2, 5])
def test_defocus_is_the_direct_correlation(severity):
    ndimage = pytest.importorskip("scipy.ndimage")
    image = picture(48, 60)
    kernel = blur.disc_kernel(*C._PARAMETERS["imagenet"]["defocus_blur"][severity - 1])
    assert kernel.sum() == pytest.approx(1.0108 if severity == 5 else 1, abs=1e-4)
    sharp = image / 255.0
    blurred = [ndimage.correlate(sharp[..., c], kernel, mode="mirror") for c in range(3)]
    own = C.corrupt(image, "defocus_blur", severity)
    expected = common.to_levels(torch.from_numpy(np.stack(blurred, -1))).numpy()
    assert levels(own, expected).max() <= 1


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_copies_equal_the_sequential_loop(reach):
    h, w = 34, 41
    rng = np.random.default_rng(reach)
    sites = [(y, x) for y in range(h - reach, reach, -1) for x in range(w - reach, reach, -1)]
    shifts = rng.integers(-reach, reach, size=(len(sites), 2))
    pixels = np.arange(h * w).reshape(h, w)
    for (y, x), (dx, dy) in zip(sites, shifts, strict=True):
        pixels[y, x] = pixels[y + dy, x + dx]  # one way: the partner keeps its value
    both = torch.from_numpy(np.stack([shifts, shifts])).to(torch.int8)
    sources = blur.glass_sources(both, reach, h, w).view(2, -1)
    assert np.array_equal(sources[0], pixels.ravel())
    assert np.array_equal(sources[1] - h * w, pixels.ravel())
    assert len(np.unique(pixels)) < h * w


def test_motion_by_hand():
    image = torch.zeros((2, 1, 40, 40), dtype=torch.uint8)
    image[..., 20, 20] = 255
    angles = torch.tensor([0.0, 90.0])
    across, down = common.motion(image, 2, 1.0, angles, torch.float64)[:, 0].numpy()
    weights = np.exp(-(np.arange(5) ** 2) / 2)
    expected = 255 * weights / weights.sum()
    # reads to the right: the dot smears to the left
    assert np.allclose(across[20, 20:15:-1], expected, atol=1) and across[20, 21] == 0
    assert np.count_nonzero(across) == np.count_nonzero(expected >= 1)
    assert np.array_equal(down, across.T)


def test_fog_surface():
    params = C._PARAMETERS["imagenet"]["fog"][0]
    rng = np.random.default_rng(0)
    draws = C.draw("fog", 1, (224, 224), preset="imagenet", rng=rng)
    assert sum(v.size for v in draws.values()) == 3 * (4**8 - 1) // 3  # every point but the first
    batch = {key: torch.from_numpy(value)[None] for key, value in draws.items()}
    surface = weather.height_map(256, params[1], batch, torch.float64, torch.device("cpu"))
    surface = surface[0].numpy()
    assert surface.min() == 0 and surface.max() == 1
    # periodic: the seam is no rougher than the inside
    inside = np.abs(np.diff(surface, axis=0)).mean()
    assert np.abs(surface[0] - surface[-1]).mean() < 2 * inside


def test_fog_keeps_the_maximum():
    image = picture()
    assert C.corrupt(image, "fog", 3).max() <= image.max()


def test_edges_and_distances():
    step = np.zeros((32, 40), np.uint8)
    step[:, 20:] = 200
    edges = spatter.canny(step, 50, 150)
    assert edges.any(axis=1).all() and (edges.sum(axis=1) == 1).all()
    column = int(np.flatnonzero(edges[0])[0])
    assert column in (19, 20)
    distance = spatter.edge_distance(edges, 20.0)
    assert np.array_equal(distance[5], np.minimum(np.abs(np.arange(40) - column), 20))
    dot = np.zeros((32, 32), bool)
    dot[10, 10] = True
    distance = spatter.edge_distance(dot, 20.0)
    assert distance[12, 11] == pytest.approx(2.1969, abs=1e-4)
    assert distance[13, 13] == pytest.approx(4.2, abs=1e-4)
    assert distance[31, 31] == 20


def test_spatter_without_a_drop_changes_nothing():
    image = picture(32, 32)
    draws = {"normal": np.full((32, 32), -3.0)}
    for severity in range(1, 6):
        own = C.apply(image, "spatter", severity, draws, preset="imagenet")
        assert levels(own, image).max() <= 1


# ------------------------------------------------------------------ frost


def test_frost_texture_is_an_image_of_ice():
    for index in range(5):
        texture = frost.frost_texture(index)
        target, deviation, *_ = frost.TEXTURES[index]
        assert np.abs(texture.mean((0, 1)) - target).max() < 5
        assert abs(texture.std((0, 1)).mean() - deviation) < 5
    assert C.frost_source(None) == "synthetic texture"
    assert "synthetic" in C.FROST_NOTE


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Five random pictures under the names of the photographs, 60 to 100 px high."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(C.FROST_FILES):
        pixels = rng.integers(0, 256, (60 + 10 * i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def test_frost_with_photographs(photographs):
    image = picture(40, 48)
    draws = {key: np.asarray(v) for key, v in (("index", 2), ("top", 7), ("left", 3))}
    own = C.apply(image, "frost", 2, draws, preset="imagenet", frost_dir=photographs)
    ice = np.array(Image.open(photographs / C.FROST_FILES[2]))[7:47, 3:51]
    expected = np.clip(0.8 * image + 0.6 * ice, 0, 255).astype(np.uint8)
    assert np.array_equal(own, expected)
    assert C.frost_source(photographs) == "photographs"


def test_frost_refuses_what_does_not_fit(photographs):
    with pytest.raises(ValueError, match="120 x 40 does not fit into frost"):
        C.corrupt(picture(120, 40), "frost", 1, frost_dir=photographs)
    (photographs / "frost4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks frost4\.jpg"):
        C.corrupt(picture(40, 40), "frost", 1, frost_dir=photographs)
