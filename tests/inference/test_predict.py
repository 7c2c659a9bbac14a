# SPDX-License-Identifier: Apache-2.0
"""Images from anywhere, by one call: as Engine predicts them, in their order, relabelled and saved."""

import cv2
import numpy as np
import pytest
import torch
from anomalib.models import Padim
from commands import read_table
from conftest import SIDE, OwnBackbone, grey, product, write_products
from PIL import Image
from runs import datamodule

from anomalib_musc import MuSc, Predictions, predict
from anomalib_musc.inference.inputs import gather, to_pillow


@pytest.fixture(scope="module")
def pile(tmp_path_factory):
    """Ten good images and three broken ones, as files."""
    folder = tmp_path_factory.mktemp("pile")
    write_products(folder / "good", range(10))
    write_products(folder / "bad", range(30, 33), masks=folder.with_name("masks"))
    return folder


@pytest.fixture
def arrays():
    return [product(seed)[0] for seed in range(7)] + [product(30, defect=True)[0]]


def test_a_folder_as_engine_predicts_it(pile, make_engine):
    model = MuSc(OwnBackbone())
    batches = make_engine().predict(model, data_path=pile)
    ours, of_engine = predict(pile, OwnBackbone()), Predictions.from_engine(batches, model)
    expected = {str(path): item for batch in batches for path, item in zip(batch.image_path, batch, strict=True)}
    assert len(ours) == len(of_engine) == len(expected) == 13
    for predictions in (ours, of_engine):
        for found in predictions:
            item = expected[found.path]
            assert found.score == pytest.approx(item.pred_score.item(), abs=1e-6)
            assert found.label == ("anomalous" if item.pred_label else "normal")
            np.testing.assert_allclose(found.anomaly_map, item.anomaly_map.squeeze(), atol=1e-6)
            np.testing.assert_array_equal(found.mask, item.pred_mask.squeeze())
            assert sum(region.area for region in found.regions) == int(item.pred_mask.sum())
    assert ours.threshold == 0.5


def test_the_table_is_that_of_engine(pile, make_engine, tmp_path):
    make_engine().predict(MuSc(OwnBackbone()), data_path=pile)
    of_engine = read_table(tmp_path / "results")
    predictions = predict(pile, OwnBackbone())
    assert predictions.save(tmp_path / "ours") == tmp_path / "ours/predictions.csv"
    ours = read_table(tmp_path / "ours")
    assert {**{name: {**row, "picture": ""} for name, row in ours.items()}} == {
        name: {**row, "picture": ""} for name, row in of_engine.items()
    }
    for row in ours.values():
        with Image.open(tmp_path / "ours" / row["picture"]) as picture:
            assert min(picture.size) > SIDE
    assert (tmp_path / "ours/review.html").stat().st_size > 10_000
    with pytest.raises(FileExistsError, match="save to another folder"):
        predictions.save(tmp_path / "ours")


def test_all_kinds_are_the_same_images(arrays, tmp_path):
    files = []
    for index, image in enumerate(arrays):
        files.append(tmp_path / f"{index}.png")
        cv2.imwrite(str(files[-1]), image[..., ::-1])
    tensors = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    expected = predict(files, OwnBackbone())
    kinds = {
        "arrays": arrays,
        "a batch": np.stack(arrays),
        "floats": [image / 255 for image in arrays],
        "16 bits": [image.astype(np.uint16) * 257 for image in arrays],
        "Pillow": map(Image.fromarray, arrays),
        "tensors": tensors,
        "float tensors": list(tensors / 255),
        "objects": np.array([*arrays, None], dtype=object)[:-1],
        "a mixture": [arrays[0], Image.fromarray(arrays[1]), files[2], str(files[3]), *tensors[4:]],
    }
    for kind, images in kinds.items():
        found = predict(images, OwnBackbone())
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6, err_msg=kind)
        assert found.labels == expected.labels
    assert expected.labels[-1] == "anomalous"


def test_grey_images_of_more_than_8_bits(tmp_path):
    images = [grey(seed, defect=seed == 6).astype(np.uint16) * 40 for seed in range(7)]
    for index, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    expected = predict(tmp_path, OwnBackbone()).scores
    for values in (images, [image.astype(np.float32) for image in images], [image.astype(int) for image in images]):
        np.testing.assert_allclose(predict(values, OwnBackbone()).scores, expected, atol=1e-5)
    assert expected.argmax() == 6


def test_names_and_order(arrays):
    names = [f"camera {number}" for number in range(7, -1, -1)]
    found = predict(dict(zip(names, arrays, strict=True)), OwnBackbone())
    assert [prediction.path for prediction in found] == names
    assert "camera 0" in repr(found).splitlines()[1]
    assert [prediction.path for prediction in found[2:4]] == names[2:4]
    assert [prediction.path for prediction in predict(arrays, OwnBackbone())[:2]] == ["image 0", "image 1"]


def test_a_file_given_twice_is_there_twice(pile):
    files = [*sorted(pile.glob("good/*.png"))[:3], sorted(pile.glob("good/*.png"))[0]]
    found = predict(files, OwnBackbone())
    assert [prediction.path for prediction in found] == [str(file) for file in files]
    assert found[0].score == found[3].score


def test_a_file_reached_in_two_ways_is_one_image(pile, monkeypatch):
    monkeypatch.chdir(pile)
    found = predict(["good", "bad", "good/001.png", pile / "good/002.png"], OwnBackbone())
    assert len(found) == 15
    assert len(set(found.scores.round(6))) == 13
    assert not found.warnings


def test_two_images_under_one_name_are_refused(arrays):
    with pytest.raises(ValueError, match="two images are called 'image 0'"):
        predict({0: arrays[0], "image 0": arrays[1], 1: arrays[2]}, OwnBackbone())


def test_an_image_outlives_its_predictions(arrays):
    np.testing.assert_array_equal(predict(arrays, OwnBackbone())[2].image, arrays[2])
    np.testing.assert_array_equal(predict(arrays, OwnBackbone())[3:5][1].image, arrays[4])


def test_a_table_survives_what_happens_to_a_file(arrays, tmp_path, monkeypatch):
    for index, image in enumerate(arrays):
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    monkeypatch.chdir(tmp_path)
    found = predict([f"{index}.png" for index in range(8)], OwnBackbone())
    monkeypatch.chdir("/")
    (tmp_path / "2.png").unlink()
    found.save(tmp_path / "out")
    rows = read_table(tmp_path / "out")
    assert len(rows) == 8
    assert {name for name, row in rows.items() if "no picture" in row["note"]} == {"2.png"}


@pytest.mark.parametrize("name", ["\0n", "\ud800", "/", "a/../../b", ""])
def test_names_that_no_file_may_have(name, arrays, tmp_path):
    found = predict({name: arrays[0], **{str(index): image for index, image in enumerate(arrays[1:])}}, OwnBackbone())
    found.save(tmp_path / "out")
    assert sum(1 for _ in (tmp_path / "out/predictions.csv").open(encoding="utf-8-sig")) >= 9
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_numbers_of_other_libraries(arrays):
    found = predict(arrays, OwnBackbone(), threshold=np.float32(0.5))
    for value in (np.float32(0.25), torch.tensor(0.25), 0.25):
        found.threshold = value
        assert found.threshold == 0.25


def test_big_endian_images_of_pillow(tmp_path):
    images = [grey(seed, defect=seed == 6).astype(np.uint16) * 40 for seed in range(7)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    swapped = [Image.frombytes("I;16B", image.shape[::-1], image.astype(">u2").tobytes()) for image in images]
    np.testing.assert_allclose(
        predict(swapped, OwnBackbone()).scores, predict(tmp_path, OwnBackbone()).scores, atol=1e-5
    )


def test_an_empty_folder_among_others_is_passed_over(pile, tmp_path):
    with pytest.warns(UserWarning, match="No image lies in"):
        assert len(predict([pile, tmp_path], OwnBackbone())) == 13


def test_another_threshold_labels_anew(arrays, tmp_path):
    backbone = OwnBackbone()
    found = predict(arrays, backbone)
    assert found.labels.count("anomalous") == 1
    assert not found[0].mask.any()
    found.threshold = 0.0
    assert found.labels == ["anomalous"] * 8
    assert found[0].mask.any()
    assert found[0].regions
    found.threshold = 1.0
    assert {prediction.label for prediction in found} == {"normal"}
    assert not found[7].regions
    found.save(tmp_path, pictures=False, review=False)
    assert {(row["label"], row["threshold"]) for row in read_table(tmp_path).values()} == {("normal", "1.000000")}
    assert backbone.num_images == 8
    with pytest.raises(ValueError, match="threshold must be a number"):
        found.threshold = float("nan")


def test_a_data_frame_and_a_picture(arrays):
    found = predict(arrays, OwnBackbone())
    frame = found.to_pandas()
    assert frame["path"][0] == "image 7"
    assert (frame[frame.score > 0.5].label == "anomalous").all()
    assert 0 < frame.raw_score.mean() < 2
    assert frame["rank"].tolist() == list(range(1, 9))
    assert frame["label"].value_counts().to_dict() == {"normal": 7, "anomalous": 1}
    assert np.asarray(found.show(7)).shape[1] > np.asarray(found.show(0)).shape[1] - 1
    np.testing.assert_array_equal(found[7].image, arrays[7])


def test_files_that_cannot_be_read_keep_their_place(arrays, tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.warns(UserWarning, match=r"empty\.png: empty file"):
        found = predict([*arrays[:3], tmp_path / "empty.png", *arrays[3:]], OwnBackbone())
    assert found.labels[3] == "skipped"
    assert found[3].score is None
    assert found[3].mask is None
    assert found[3].notes == ["empty file"]
    assert np.isnan(found.scores[3])
    assert found.labels[8] == "anomalous"
    assert (found.to_pandas()["label"] == "skipped").sum() == 1


def test_several_folders_and_what_lies_in_them(tmp_path):
    for name, seeds in (("a", range(4)), ("b", range(4, 8))):
        write_products(tmp_path / name, seeds)
        (tmp_path / name / "notes.txt").touch()
    (tmp_path / "not asked for.txt").touch()
    found = predict([tmp_path / "a", tmp_path / "b"], OwnBackbone())
    assert len(found) == 8
    assert {name.removeprefix(str(tmp_path)) for name in found.skipped} == {"/a/notes.txt", "/b/notes.txt"}
    alone = predict(sorted((tmp_path / "a").glob("*.png")), OwnBackbone())
    assert len(alone) == 4
    assert not alone.skipped


def test_one_image_beside_references(arrays, tmp_path, mvtec_root, make_engine):
    found = predict(arrays[7], OwnBackbone(), references=arrays[:6])
    assert found.labels == ["anomalous"]
    write_products(tmp_path / "references", range(6))
    by_files = predict([arrays[7]], OwnBackbone(), references=tmp_path / "references")
    np.testing.assert_allclose(found.scores, by_files.scores, atol=1e-6)
    engine = make_engine()
    engine.fit(MuSc("musc-tiny", image_size=64, mode="reference", visualizer=False), datamodule=datamodule(mvtec_root))
    assert len(predict(arrays[7], checkpoint=engine.best_model_path)) == 1


def test_the_decision_by_hand(arrays):
    assert predict(arrays, OwnBackbone(), contamination=0.5).labels.count("anomalous") == 4
    assert predict(arrays, OwnBackbone(), threshold=2.0).labels.count("anomalous") == 0
    assert predict(arrays, OwnBackbone(), sensitivity=1.0).labels.count("anomalous") > 3


def test_another_model_of_engine(mvtec_root, make_engine):
    engine, model = make_engine(), Padim(backbone="resnet18", pre_trained=False)
    data = datamodule(mvtec_root)
    engine.fit(model, datamodule=data)
    batches = engine.predict(model, datamodule=data)
    found = Predictions.from_engine(batches, model)
    assert len(found) == 12
    assert found[0].anomaly_map.shape == (SIDE, SIDE)
    assert set(found.labels) <= {"anomalous", "normal"}


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images is empty"),
        (5, TypeError, "images must be a folder, or paths, arrays"),
        ([5, 6], TypeError, "must be a path, an array, a tensor or Pillow's, got int"),
        ("nowhere", FileNotFoundError, "there is no file or folder 'nowhere'"),
        ([np.zeros((3, 8, 8))] * 2, ValueError, r"images\[0\] must have the shape \(H, W\).*got \(3, 8, 8\)"),
        ([torch.zeros(8, 8, 3)] * 2, ValueError, r"must have the shape \(C, H, W\)"),
        ([np.full((8, 8, 3), 2.0)] * 2, ValueError, "must be from 0 to 1, got 2 to 2"),
        ([np.full((8, 8, 3), np.nan)] * 2, ValueError, "must be from 0 to 1, got nan"),
        ([np.zeros((8, 8, 3), int)] * 2, ValueError, "must be uint8, uint16 or floats"),
        ([np.full((8, 8), "a")] * 2, ValueError, "must hold numbers"),
        ([np.full((8, 8), 1e300)] * 2, ValueError, "beyond 3.4e\\+38"),
        ([np.zeros((0, 8), np.uint8)] * 2, ValueError, "must have the shape"),
        ([np.zeros((8, 8, 3), np.uint8)], ValueError, r"at least 2 of one product.* got 1 \(image 0\)"),
        ("", ValueError, "empty name"),
    ],
)
def test_what_is_no_image(images, error, message):
    with pytest.raises(error, match=message):
        predict(images, "musc-tiny", image_size=32)


def test_arguments_that_do_not_go_together(arrays):
    with pytest.raises(ValueError, match="device must be one of"):
        predict(arrays, OwnBackbone(), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda': this machine has none"):
            predict(arrays, OwnBackbone(), device="cuda")
    with pytest.raises(ValueError, match="image_sensitivity must be a number from 0 to 1"):
        predict(arrays, OwnBackbone(), sensitivity=3)
    with pytest.raises(ValueError, match="sensitivity are for the default post-processor"):
        predict(arrays, OwnBackbone(), sensitivity=0.4, post_processor=False)
    with pytest.raises(FileNotFoundError, match=r"checkpoint='none\.ckpt'"):
        predict(arrays, checkpoint="none.ckpt")


def test_a_photograph_from_memory_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(product(0)[0][:32]).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "turned.jpg") as image:
        assert to_pillow(image).size == (32, SIDE)
        inputs = gather([image, image])
        with Image.open(inputs.files[0]) as written:
            assert written.size == (32, SIDE)
