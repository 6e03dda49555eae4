"""Batches: every sample once an epoch, augmentation against a per-sample loop, normalisation against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfreeze.config.schema import DataConfig
from fedfreeze.data.batches import (
    Draws,
    augmented,
    draw_changes,
    drawn_batches,
    evaluation_batch,
    training_batches,
)
from fedfreeze.data.store import Data, Split, normalise

CPU = torch.device("cpu")
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def make_data(train: int = 23, test: int = 11, height: int = 8, width: int = 8) -> Data:
    """Random images; a label is the number of its sample, so that batches tell which samples they hold."""
    draw = np.random.default_rng(7)
    splits = [
        Split(draw.integers(0, 256, (count, 3, height, width), dtype=np.uint8), np.arange(count, dtype=np.int64))
        for count in (train, test)
    ]
    return Data(splits[0], splits[1], train, MEAN, STD)


def draws_of(seed: int) -> Draws:
    return Draws(*(torch.Generator().manual_seed(seed + number) for number in range(3)))


def batches_of(
    data: Data,
    rows: np.ndarray,
    *,
    batch_size: int,
    epochs: int = 1,
    augment: str = "none",
    seed: int = 0,
    views: int | None = None,
):
    config = DataConfig(augment=augment, views=views)
    height = data.image_shape[1]
    drawn = drawn_batches(config, len(rows), height, batch_size=batch_size, epochs=epochs, draws=draws_of(seed))
    return list(training_batches(data, rows, drawn, CPU))


def augment_batch(images: torch.Tensor, augment: str, generator: torch.Generator) -> torch.Tensor:
    return augmented(images, draw_changes(len(images), augment, images.shape[2], generator))


def normalised(images: np.ndarray) -> np.ndarray:
    """Normalise one sample and one channel at a time."""
    result = np.empty(images.shape)
    for sample in range(images.shape[0]):
        for channel in range(images.shape[1]):
            result[sample, channel] = (images[sample, channel] / 255 - MEAN[channel]) / STD[channel]
    return result


def crops(image: np.ndarray, padding: int) -> list[np.ndarray]:
    """Every crop of the zero-padded image, row by row, then the same ones mirrored."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    span = range(2 * padding + 1)
    plain = [padded[:, top : top + height, left : left + width] for top in span for left in span]
    return plain + [crop[:, :, ::-1] for crop in plain]


def test_every_sample_comes_exactly_once_an_epoch():
    rows = np.array([1, 2, 3, 5, 8, 13, 21, 4, 6, 7])
    batches = batches_of(make_data(), rows, batch_size=4, epochs=3)
    assert [len(labels) for _, labels in batches] == [4, 4, 2] * 3
    epochs = [torch.cat([labels for _, labels in batches[start : start + 3]]).tolist() for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(rows)
    # shuffled, and each epoch anew
    assert epochs[0] != rows.tolist()
    assert epochs[0] != epochs[1] != epochs[2]


def test_images_stay_with_their_labels():
    data = make_data()
    rows = np.arange(3, 20)
    for images, labels in batches_of(data, rows, batch_size=5):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        np.testing.assert_allclose(images, normalised(data.train.images[labels.numpy()]), atol=1e-5)


def test_last_batch_of_a_single_sample_is_dropped():
    batches = batches_of(make_data(), np.arange(9), batch_size=4, epochs=8)
    assert [len(labels) for _, labels in batches] == [4, 4] * 8
    seen = [set(torch.cat([batches[i][1], batches[i + 1][1]]).tolist()) for i in range(0, 16, 2)]
    left_out = [set(range(9)) - epoch for epoch in seen]
    assert all(len(missing) == 1 for missing in left_out)
    assert len(set.union(*left_out)) > 1  # not the same sample in every epoch


def test_a_last_batch_of_two_is_kept():
    assert [len(labels) for _, labels in batches_of(make_data(), np.arange(10), batch_size=4)] == [4, 4, 2]


def test_a_device_with_one_sample_still_has_a_batch():
    ((images, labels),) = batches_of(make_data(), np.array([6]), batch_size=4)
    assert images.shape == (1, 3, 8, 8)
    assert labels.tolist() == [6]


def test_batch_size_one_trains_on_every_sample():
    # only the odd one out at the end of an epoch may be dropped, not the whole epoch
    batches = batches_of(make_data(), np.arange(5), batch_size=1)
    assert sorted(label for _, labels in batches for label in labels.tolist()) == [0, 1, 2, 3, 4]


def test_same_generators_give_same_batches_and_other_ones_do_not():
    data, rows = make_data(), np.arange(20)
    first = batches_of(data, rows, batch_size=8, augment="crop_flip", seed=3)
    again = batches_of(data, rows, batch_size=8, augment="crop_flip", seed=3)
    other = batches_of(data, rows, batch_size=8, augment="crop_flip", seed=4)
    for (images, labels), (images2, labels2) in zip(first, again, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)
    assert not torch.equal(torch.cat([labels for _, labels in first]), torch.cat([labels for _, labels in other]))


def test_augmentation_does_not_change_the_order_nor_the_store():
    data, rows = make_data(), np.arange(20)
    before = data.train.images.copy()
    plain = batches_of(data, rows, batch_size=8)
    cropped = batches_of(data, rows, batch_size=8, augment="crop_flip")
    assert [labels.tolist() for _, labels in plain] == [labels.tolist() for _, labels in cropped]
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(plain, cropped, strict=True))
    np.testing.assert_array_equal(data.train.images, before)


def test_none_returns_the_same_images():
    images = torch.from_numpy(make_data().train.images)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert augment_batch(images, "none", generator) is images
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (5, 3, 32, 32), (4, 3, 16, 24), (1, 1, 5, 5)])
def test_augmentation_keeps_shape_and_dtype_and_its_input(augment, shape):
    images = torch.from_numpy(np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8))
    before = images.clone()
    result = augment_batch(images, augment, torch.Generator().manual_seed(0))
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
    assert torch.equal(images, before)


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_same_generator_gives_same_augmentation(augment):
    images = torch.from_numpy(make_data().train.images)
    first, again, other = (augment_batch(images, augment, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_flip_only_mirrors_left_and_right_half_of_the_time():
    images = np.random.default_rng(1).integers(0, 256, (600, 3, 4, 6), dtype=np.uint8)
    result = augment_batch(torch.from_numpy(images), "flip", torch.Generator().manual_seed(0)).numpy()
    mirrored = 0
    for before, after in zip(images, result, strict=True):
        same, flipped = np.array_equal(after, before), np.array_equal(after, before[:, :, ::-1])
        assert same != flipped
        mirrored += flipped
    assert 250 < mirrored < 350  # 300 expected, 4 standard deviations are 49


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 1), (16, 8, 2), (5, 5, 1)])
def test_crops_come_from_the_padded_image_and_all_of_them_come(height, width, padding):
    images = np.random.default_rng(2).integers(1, 256, (900, 2, height, width), dtype=np.uint8)
    result = augment_batch(torch.from_numpy(images), "crop_flip", torch.Generator().manual_seed(0)).numpy()
    counts = np.zeros(2 * (2 * padding + 1) ** 2, int)
    for before, after in zip(images, result, strict=True):
        matches = [i for i, crop in enumerate(crops(before, padding)) if np.array_equal(crop, after)]
        assert len(matches) == 1  # pixels are never zero, so that no two crops look alike
        counts[matches[0]] += 1
    expected = len(images) / len(counts)
    assert counts.min() > expected - 4.5 * expected**0.5
    assert counts.max() < expected + 4.5 * expected**0.5


def test_cifar_crops_use_the_usual_padding_of_four():
    images = torch.full((400, 3, 32, 32), 255, dtype=torch.uint8)
    result = augment_batch(images, "crop_flip", torch.Generator().manual_seed(0))
    black_rows = (result[:, 0].amax(2) == 0).sum(1)
    black_columns = (result[:, 0].amax(1) == 0).sum(1)
    assert black_rows.max() == 4
    assert black_columns.max() == 4
    assert set(black_rows.tolist()) == {0, 1, 2, 3, 4}


def test_normalise_against_numpy():
    images = make_data().train.images
    result = normalise(torch.from_numpy(images), MEAN, STD)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, normalised(images), atol=1e-5)


def test_normalised_training_images_have_zero_mean_and_unit_variance():
    images = make_data(train=200).train.images
    scaled = images / 255
    result = normalise(torch.from_numpy(images), tuple(scaled.mean((0, 2, 3))), tuple(scaled.std((0, 2, 3))))
    np.testing.assert_allclose(result.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std((0, 2, 3), correction=0), 1, atol=1e-5)


def test_evaluation_batches_cover_the_split_in_order():
    data = make_data(test=11)
    batches = [evaluation_batch(data, data.test, np.arange(11)[start : start + 4], CPU) for start in (0, 4, 8)]
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(11))
    np.testing.assert_allclose(torch.cat([images for images, _ in batches]), normalised(data.test.images), atol=1e-5)


def test_evaluation_batch_of_the_training_split_is_of_that_split():
    data = make_data()
    images, labels = evaluation_batch(data, data.train, np.array([20, 22]), CPU)
    assert labels.tolist() == [20, 22]
    np.testing.assert_allclose(images, normalised(data.train.images[[20, 22]]), atol=1e-5)


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_with_counted_views_a_sample_becomes_no_more_images_than_that(augment):
    data, rows = make_data(), np.arange(16)
    seen: dict[int, set[bytes]] = {int(row): set() for row in rows}
    for seed in (0, 0, 0):
        for images, labels in batches_of(data, rows, batch_size=4, epochs=40, augment=augment, views=3, seed=seed):
            for image, label in zip(images, labels.tolist(), strict=True):
                seen[label].add(image.numpy().tobytes())
    counts = [len(images) for images in seen.values()]
    assert max(counts) == (2 if augment == "flip" else 3)
    assert min(counts) == 2  # no sample comes in one direction alone


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["flip", "crop_flip"]))
@settings(max_examples=40, deadline=None)
def test_a_pass_over_the_data_takes_one_view(count, views, epochs, augment):
    config = DataConfig(augment=augment, views=views)
    drawn = list(drawn_batches(config, count, 8, batch_size=4, epochs=epochs, draws=draws_of(1)))
    per_epoch = len(drawn) // epochs
    for epoch in range(epochs):
        of_epoch = drawn[epoch * per_epoch : (epoch + 1) * per_epoch]
        taken = {view for batch in of_epoch for view in batch.views.tolist()}
        assert len(taken) == 1
        assert taken <= set(range(views))


def test_flips_without_counted_views_are_drawn_anew_for_each_image_and_are_two_views():
    drawn = list(drawn_batches(DataConfig(augment="flip"), 5, 8, batch_size=2, epochs=1, draws=draws_of(0)))
    assert [len(batch.chosen) for batch in drawn] == [2, 2]  # a last one of a single sample is left out
    for batch in drawn:
        assert torch.equal(batch.views.bool(), batch.changes.flips)
    crops = next(drawn_batches(DataConfig(augment="crop_flip"), 5, 8, batch_size=2, epochs=1, draws=draws_of(0)))
    assert crops.views is None


def test_counted_views_are_numbered():
    assert DataConfig().view_count == 1
    assert DataConfig(augment="flip").view_count == 2
    assert DataConfig(augment="flip", views=5).view_count == 5
    assert DataConfig(augment="crop_flip").view_count is None
    assert DataConfig(augment="crop_flip", views=4).view_count == 4
