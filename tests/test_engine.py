# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib's Engine: every entry point, every kind of data, and what must not change a result."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import oracle
import pytest
import torch
from anomalib.data import BTech, Folder, ImageBatch, PredictDataset, Visa
from anomalib.engine import Engine
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from conftest import SIDE, OwnBackbone, product, write_products
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from runs import PathlessDataset, Predictions, Recorder, assert_same, by_path, datamodule, predict_loader
from torch.utils.data import DataLoader

from anomalib_musc import MuSc, RsCINPostProcessor


@pytest.fixture
def reference(folder: Path, make_engine) -> Predictions:
    """What one ordinary prediction gives for the folder."""
    return by_path(make_engine().predict(MuSc(OwnBackbone()), data_path=folder))


# --- the numbers ---------------------------------------------------------------------------------------------------


def test_engine_gives_the_numbers_of_the_equations(mvtec_root, own_backbone, make_engine):
    recorder = Recorder()
    model = MuSc(own_backbone, post_processor=RsCINPostProcessor(enable_normalization=False))
    data = datamodule(mvtec_root, eval_batch_size=5)
    make_engine(callbacks=[recorder]).test(model, datamodule=data)
    seen = by_path(recorder.batches)

    images = ImageBatch.collate([data.test_data[i] for i in range(len(data.test_data))]).image
    maps, class_tokens = OwnBackbone()(model.pre_processor.transform(images))
    grid = maps[0].shape[-2:]
    maps = [torch.nn.functional.interpolate(m, grid, mode="bilinear").double().detach().numpy() for m in maps]
    expected = oracle.anomaly_scores(maps, class_tokens.double().detach().numpy(), image_size=SIDE)
    lowest, spread = expected.raw_scores.min(), np.ptp(expected.raw_scores)
    for index, path in enumerate(data.test_data.samples.image_path):
        assert seen[path][0] == pytest.approx(lowest + expected.rscin_scores[index] * spread, abs=1e-4)
        np.testing.assert_allclose(seen[path][1].cpu().numpy(), expected.anomaly_maps[index], atol=1e-4)


def test_defects_are_found(mvtec_root, own_backbone, make_engine):
    (metrics,) = make_engine().test(MuSc(own_backbone), datamodule=datamodule(mvtec_root))
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.95


# --- entry points and data -----------------------------------------------------------------------------------------


def test_train_validates_then_tests(mvtec_root, own_backbone, make_engine):
    (metrics,) = make_engine().train(MuSc(own_backbone), datamodule=datamodule(mvtec_root))
    assert metrics["image_F1Score"] > 0.8  # anomalib labels what lies above the threshold, not what lies on it


def test_fit_then_test_then_predict(mvtec_root, own_backbone, make_engine):
    engine, model, data = make_engine(), MuSc(own_backbone), datamodule(mvtec_root)
    engine.fit(model, datamodule=data)
    engine.validate(model, datamodule=data)
    engine.test(model, datamodule=data)
    predictions = by_path(engine.predict(model, datamodule=data))
    assert len(predictions) == 12
    assert own_backbone.num_images == 12  # one set of images was extracted once


def test_visa(tmp_path, own_backbone, make_engine):
    split = tmp_path / "visa/visa_pytorch/candle"
    write_products(split / "train/good", range(4))
    write_products(split / "test/good", range(10, 16))
    write_products(split / "test/bad", range(30, 33), masks=split / "ground_truth/bad")
    (metrics,) = make_engine().test(
        MuSc(own_backbone), datamodule=Visa(root=tmp_path / "visa", category="candle", num_workers=0)
    )
    assert metrics["pixel_AUPRO"] > 0.9


def test_btech(tmp_path, own_backbone, make_engine):
    root = tmp_path / "btech/01"
    write_products(root / "train/ok", range(4))
    write_products(root / "test/ok", range(10, 16))
    write_products(root / "test/ko", range(30, 33), masks=root / "ground_truth/ko")
    (metrics,) = make_engine().test(
        MuSc(own_backbone), datamodule=BTech(root=tmp_path / "btech", category="01", num_workers=0)
    )
    assert metrics["image_AUROC"] == 1


def folder_datamodule(root: Path, **kwargs) -> Folder:
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/scratch"}
    return Folder(name="widget", root=root / "widget", num_workers=0, **folders, **kwargs)


def test_folder_with_masks(mvtec_root, own_backbone, make_engine):
    data = folder_datamodule(mvtec_root, mask_dir="ground_truth/scratch")
    (metrics,) = make_engine().test(MuSc(own_backbone), datamodule=data)
    assert metrics["pixel_AUROC"] > 0.95


def test_folder_without_masks_leaves_the_pixel_metrics_out(mvtec_root, own_backbone, make_engine):
    (metrics,) = make_engine().test(MuSc(own_backbone), datamodule=folder_datamodule(mvtec_root))
    assert metrics["image_AUROC"] == 1
    assert all(np.isfinite(value) for value in metrics.values())
    assert not any(name.startswith("pixel_") for name in metrics)


def test_a_path_of_mixed_sizes_is_scored_on_one_scale(tmp_path, own_backbone, make_engine):
    paths = write_products(tmp_path / "pile", range(5))
    cv2.imwrite(str(paths[0]), cv2.resize(product(0)[0], (90, 50)))
    cv2.imwrite(str(paths[1]), product(31, defect=True)[0])
    predictions = by_path(make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "pile"))
    scores = [score for score, _ in predictions.values()]
    assert max(scores) <= 1
    assert min(scores) >= 0
    assert max(predictions, key=lambda path: predictions[path][1].max()) == str(paths[1])
    assert all(m.min() >= 0 and m.max() <= 1 for _, m in predictions.values())


def test_each_prediction_is_normalised_over_its_own_pool(tmp_path, folder, own_backbone, make_engine):
    engine, model = make_engine(), MuSc(own_backbone)
    engine.predict(model, data_path=folder)
    write_products(tmp_path / "others", range(40, 46))
    ours = by_path(engine.predict(model, data_path=tmp_path / "others"))
    fresh = by_path(make_engine().predict(MuSc(OwnBackbone()), data_path=tmp_path / "others"))
    assert_same(ours, fresh)


def test_a_datasets_thresholds_outlive_validation(mvtec_root, folder, own_backbone, make_engine):
    engine, model = make_engine(), MuSc(own_backbone)
    engine.validate(model, datamodule=datamodule(mvtec_root))
    threshold = model.post_processor.image_threshold.item()
    engine.predict(model, data_path=folder)
    assert model.post_processor.image_threshold.item() == threshold
    assert not np.isnan(threshold)


def test_images_without_paths_are_told_apart_by_content(folder, own_backbone, make_engine, reference):
    paths = sorted(folder.rglob("*.png"))
    loader = DataLoader(PathlessDataset(paths), batch_size=4, shuffle=True, collate_fn=ImageBatch.collate)
    engine, model = make_engine(), MuSc(own_backbone, visualizer=False)  # anomalib's names pictures after the paths
    batches = engine.predict(model, dataloaders=loader)
    scores = sorted(score.item() for batch in batches for score in batch.pred_score)
    assert scores == pytest.approx(sorted(score for score, _ in reference.values()), abs=5e-5)


# --- once for each set of images -----------------------------------------------------------------------------------


def test_the_same_images_are_extracted_once(mvtec_root, own_backbone, make_engine):
    recorder = Recorder()
    make_engine(callbacks=[recorder]).test(MuSc(own_backbone), datamodule=datamodule(mvtec_root))
    assert len(by_path(recorder.batches)) == 12
    assert own_backbone.num_images == 12


def test_other_images_are_extracted_anew(mvtec_root, own_backbone, make_engine):
    data = datamodule(mvtec_root, val_split_mode="from_test", val_split_ratio=0.5, seed=0)
    make_engine().test(MuSc(own_backbone), datamodule=data)
    assert own_backbone.num_images == len(data.val_data) + len(data.test_data) == 12
    assert not set(data.val_data.samples.image_path) & set(data.test_data.samples.image_path)


def test_a_changed_file_or_setting_is_noticed(tmp_path, own_backbone, make_engine):
    paths = write_products(tmp_path / "pile", range(4))
    engine, model = make_engine(), MuSc(own_backbone)
    before = by_path(engine.predict(model, data_path=tmp_path / "pile"))
    cv2.imwrite(str(paths[2]), product(31, defect=True)[0])
    after = by_path(engine.predict(model, data_path=tmp_path / "pile"))
    assert own_backbone.num_images == 8
    assert max(after, key=lambda path: after[path][1].max()) == str(paths[2])
    assert before.keys() == after.keys()
    model.model.interval = (0.0, 1.0)
    engine.predict(model, data_path=tmp_path / "pile")
    assert own_backbone.num_images == 12


# --- what changes no result ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 5},
        {"batch_size": 3, "shuffle": True},
        {"batch_size": 4, "num_workers": 2},
        {"batch_size": 4, "num_workers": 1, "persistent_workers": True},
    ],
    ids=["batches", "shuffled", "workers", "persistent workers"],
)
def test_loader_options_change_nothing(options, folder, own_backbone, make_engine, reference):
    predictions = make_engine().predict(MuSc(own_backbone), dataloaders=predict_loader(folder, **options))
    assert_same(by_path(predictions), reference)


def test_the_order_of_files_changes_nothing(folder, own_backbone, make_engine, reference):
    dataset = PredictDataset(folder)
    dataset.image_filenames = dataset.image_filenames[::-1]
    loader = DataLoader(dataset, batch_size=5, collate_fn=dataset.collate_fn)
    assert_same(by_path(make_engine().predict(MuSc(own_backbone), dataloaders=loader)), reference)


def test_bf16_mixed_is_close_to_float32(folder, make_engine):
    plain = {"pretrained": False, "post_processor": PostProcessor(enable_normalization=False)}
    whole, half = (
        by_path(make_engine(precision=precision).predict(MuSc("test_vit", **plain), data_path=folder))
        for precision in ("32-true", "bf16-mixed")
    )
    assert_same(half, whole, tolerance=0.02)
    assert any(half[path][0] != whole[path][0] for path in whole)


# --- what a Lightning user expects ---------------------------------------------------------------------------------


def test_each_of_several_loaders_is_a_pool_of_its_own(tmp_path, folder, own_backbone, make_engine):
    write_products(tmp_path / "others", range(40, 46))
    loaders = [predict_loader(folder, batch_size=4), predict_loader(tmp_path / "others", batch_size=4)]
    recorder = Recorder()
    make_engine(callbacks=[recorder]).test(MuSc(own_backbone, post_processor=False), dataloaders=loaders)
    expected = by_path(make_engine().predict(MuSc(OwnBackbone(), post_processor=False), data_path=folder))
    seen = by_path(recorder.batches)
    assert len(seen) == len(expected) + 6
    assert_same({path: seen[path] for path in expected}, expected)
    assert own_backbone.num_images == 18


@pytest.mark.parametrize("again", [False, True])
def test_each_of_several_pools_decides_for_itself(again, tmp_path, folder, own_backbone, make_engine):
    (tmp_path / "rough").mkdir()
    for seed in range(40, 52):  # good images of another product, whose patches are less alike than any of the first
        image = product(seed)[0].astype(float) + np.random.default_rng(seed).normal(0, 60, (SIDE, SIDE, 1))
        cv2.imwrite(str(tmp_path / f"rough/{seed}.png"), image.clip(0, 255).astype(np.uint8))
    recorder = Recorder()
    loaders = [predict_loader(folder), predict_loader(tmp_path / "rough"), *[predict_loader(folder)] * again]
    model = MuSc(own_backbone, post_processor=RsCINPostProcessor(windows=(1,)))
    make_engine(callbacks=[recorder]).test(model, dataloaders=loaders)
    labels = {
        path: label
        for batch in recorder.batches
        for path, label in zip(batch.image_path, batch.pred_label, strict=True)
    }
    flagged = {path for path, label in labels.items() if label}
    assert flagged >= {path for path in labels if "/scratch/" in path}
    assert len([path for path in flagged if "/rough/" in path]) <= 3  # of 12 good ones


def test_limit_test_batches_makes_the_pool(mvtec_root, own_backbone, make_engine):
    recorder = Recorder()
    engine = make_engine(callbacks=[recorder], limit_test_batches=2, limit_val_batches=2)
    engine.test(MuSc(own_backbone), datamodule=datamodule(mvtec_root, eval_batch_size=3))
    assert own_backbone.num_images == 6
    assert len(by_path(recorder.batches)) == 6


def test_a_limit_on_shuffled_images_still_finds_every_image(folder, own_backbone, make_engine):
    loader = predict_loader(folder, batch_size=2, shuffle=True)
    predictions = make_engine(limit_predict_batches=3).predict(MuSc(own_backbone), dataloaders=loader)
    assert len(by_path(predictions)) == 6
    assert own_backbone.num_images == 12  # the whole loader is the pool


def test_fast_dev_run(mvtec_root, folder, own_backbone, make_engine):
    recorder = Recorder()
    engine = make_engine(fast_dev_run=True, callbacks=[recorder])
    engine.test(MuSc(own_backbone), datamodule=datamodule(mvtec_root, eval_batch_size=4))
    assert len(by_path(recorder.batches)) == own_backbone.num_images == 4
    (batch,) = make_engine(fast_dev_run=True).predict(MuSc(own_backbone), data_path=folder)
    assert len(batch.image_path) == 1


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_is_shown_on_lightnings_bar(bar, folder, own_backbone, make_engine, capfd):
    make_engine(enable_progress_bar=True, callbacks=[bar()]).predict(MuSc(own_backbone), data_path=folder)
    shown = capfd.readouterr().out
    assert "MuSc: extracting features" in shown
    assert "MuSc: mutual scoring" in shown
    assert "396/396" in shown  # 12 * 11 / 2 pairs, 2 layers, 3 degrees


def test_no_progress_where_it_is_switched_off(folder, own_backbone, make_engine, capfd):
    make_engine(enable_progress_bar=False).predict(MuSc(own_backbone), data_path=folder)
    assert "MuSc:" not in capfd.readouterr().out


# --- post-processing -----------------------------------------------------------------------------------------------


def test_plain_post_processors_switch_rscin_off(mvtec_root, own_backbone, make_engine):
    plain = PostProcessor(enable_normalization=False)
    for post_processor in (plain, MEBinPostProcessor(sample_rate=32, enable_normalization=False)):
        recorder = Recorder()
        model = MuSc(own_backbone, post_processor=post_processor)
        make_engine(callbacks=[recorder]).test(model, datamodule=datamodule(mvtec_root))
        for score, anomaly_map in by_path(recorder.batches).values():
            assert score == pytest.approx(anomaly_map.max().item(), abs=1e-6)
        assert all(batch.pred_mask is not None for batch in recorder.batches)


def test_another_post_processor_needs_no_new_extraction(mvtec_root, own_backbone, make_engine):
    data, model, scores = datamodule(mvtec_root), MuSc(own_backbone), []
    for post_processor in (RsCINPostProcessor, MEBinPostProcessor):
        recorder = Recorder()
        model.post_processor = post_processor(enable_normalization=False, enable_thresholding=False)
        make_engine(callbacks=[recorder]).test(model, datamodule=data)
        scores.append({path: score for path, (score, _) in by_path(recorder.batches).items()})
        maxima = {path: anomaly_map.max().item() for path, (_, anomaly_map) in by_path(recorder.batches).items()}
    assert own_backbone.num_images == 12
    assert scores[0] != pytest.approx(maxima, abs=1e-3)
    assert scores[1] == pytest.approx(maxima, abs=1e-6)


def test_normalisation_and_sensitivity_are_anomalibs(mvtec_root, own_backbone, make_engine):
    flagged = []
    for sensitivity in (0.0, 0.5, 1.0):
        recorder = Recorder()
        model = MuSc(own_backbone, post_processor=RsCINPostProcessor(image_sensitivity=sensitivity))
        make_engine(callbacks=[recorder]).test(model, datamodule=datamodule(mvtec_root))
        labels = torch.cat([batch.pred_label for batch in recorder.batches if batch.pred_label is not None])
        scores = torch.tensor([score for score, _ in by_path(recorder.batches).values()])
        assert scores.min() >= 0
        assert scores.max() <= 1
        flagged.append(int(labels.sum()))
    assert flagged[0] < flagged[1] == 4 < flagged[2]


# --- pictures ------------------------------------------------------------------------------------------------------


def test_a_picture_is_written_for_every_image(tmp_path, mvtec_root, own_backbone, make_engine):
    make_engine().test(MuSc(own_backbone), datamodule=datamodule(mvtec_root))
    pictures = sorted(tmp_path.rglob("images/**/*.png"))
    assert len(pictures) == 12
    assert all(cv2.imread(str(picture)) is not None for picture in pictures)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [0, 1])
def test_too_few_images(num_images, tmp_path, own_backbone, make_engine):
    write_products(tmp_path / "few", range(num_images))
    with pytest.raises(ValueError, match=r"(Found 0 images|needs at least 2 images of one product)"):
        make_engine().predict(MuSc(own_backbone), data_path=tmp_path / "few")
    assert own_backbone.num_images == 0


def test_nan_features_are_named(folder, own_backbone, make_engine):
    own_backbone.fine.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="backbone returned NaN"):
        make_engine().predict(MuSc(own_backbone), data_path=folder)


def test_interval_that_ends_before_it_begins_in_this_pool(folder, own_backbone, make_engine):
    with pytest.raises(ValueError, match="interval"):
        make_engine().predict(MuSc(own_backbone, interval=(0.5, 2)), data_path=folder)
    assert own_backbone.num_images == 0


@pytest.mark.parametrize("content", [b"", b"this is no picture", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_corrupt_test_image_is_named_before_the_long_work(content, tmp_path, mvtec_root, own_backbone, make_engine):
    shutil.copytree(mvtec_root, tmp_path / "data")
    (tmp_path / "data/widget/test/good/zz_broken.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 13 images cannot be read.*zz_broken\.png"):
        make_engine().test(MuSc(own_backbone), datamodule=datamodule(tmp_path / "data"))
    assert own_backbone.num_images == 0


def test_truncated_test_image_is_named(tmp_path, mvtec_root, own_backbone, make_engine):
    shutil.copytree(mvtec_root, tmp_path / "data")
    truncated = tmp_path / "data/widget/test/good/zz_truncated.jpg"
    cv2.imwrite(str(truncated), product(0)[0])
    truncated.write_bytes(truncated.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"zz_truncated\.jpg.*truncated"):
        make_engine().test(MuSc(own_backbone), dataloaders=predict_loader(tmp_path / "data/widget/test"))
    assert own_backbone.num_images == 0


def test_read_only_output_is_named_before_the_long_work(tmp_path, folder, own_backbone):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the results should go")
    with pytest.raises(OSError, match=r"Results cannot be written to .*blocked.* Choose another default_root_dir"):
        Engine(default_root_dir=blocked, enable_progress_bar=False).predict(MuSc(own_backbone), data_path=folder)
    assert own_backbone.num_images == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aggregation_degrees": (2,)}, "aggregation_degrees"),
        ({"aggregation_degrees": ()}, "aggregation_degrees"),
        ({"aggregation_degrees": (1.5,)}, "aggregation_degrees"),
        ({"aggregation_degrees": 3}, "aggregation_degrees"),
        ({"interval": (0.3, 0.1)}, "interval"),
        ({"interval": (-1, 0.1)}, "interval"),
        ({"interval": (0, float("inf"))}, "interval"),
        ({"interval": 0.3}, "interval"),
        ({"layers": (2,)}, "layers"),
        ({"pretrained": False}, "pretrained"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": (64,)}, "image_size"),
        ({"image_size": 64.0}, "image_size"),
    ],
)
def test_bad_arguments_are_named_at_once(arguments, message, own_backbone):
    with pytest.raises(ValueError, match=message):
        MuSc(own_backbone, **arguments)


def test_own_backbone_without_a_size(own_backbone):
    del OwnBackbone.image_size
    try:
        with pytest.raises(ValueError, match="image_size must be given"):
            MuSc(own_backbone)
    finally:
        OwnBackbone.image_size = SIDE


def test_own_backbone_that_breaks_the_contract(folder, make_engine):
    class NoList(OwnBackbone):
        def forward(self, images):
            return super().forward(images)[0]

    with pytest.raises(ValueError, match="backbone must return"):
        make_engine().predict(MuSc(NoList()), data_path=folder)
