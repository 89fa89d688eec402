"""A folder of photographs as a data set."""

import errno
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_resnet.data import Folder, Photos, Sizing, photos, without_bad
from flax_resnet.data.batches import TrainBatches, example_random
from flax_resnet.data.pictures import draw_part, frame_of, opened, read_for_training
from flax_resnet.errors import InputError
from tests.data.test_pictures import draw

SIZING = Sizing(16, 18)


@pytest.fixture
def pictures(tmp_path):
    """train/ and val/ with two classes, of 12 and 4 pictures each."""
    root = tmp_path / "pictures"
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("bees", "ants")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                draw(30 + i, 24 + label, seed=i).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def test_split_has_the_pictures_and_labels_of_its_classes(pictures):
    for split, count in (("train", 12), ("val", 4), ("test", 4), ("validation", 4)):
        folder = Folder(str(pictures), split)
        assert folder.class_names == ("ants", "bees")
        assert len(folder) == 2 * count
        names = [os.path.basename(os.path.dirname(path)) for path in folder.paths]
        assert names == [folder.class_names[label] for label in folder.labels]
        assert len(set(folder.paths)) == len(folder)


def test_test_and_val_are_not_each_other_where_both_are_there(pictures):
    shutil.copytree(pictures / "val", pictures / "test")
    (pictures / "test" / "ants" / "0.jpg").unlink()
    assert [len(Folder(str(pictures), split)) for split in ("val", "test")] == [8, 7]
    for split in ("validation", "train+valid"):
        with pytest.raises(InputError, match=r"has no split '.*'; it has: test, train, val"):
            Folder(str(pictures), split)


def test_files_that_are_no_pictures_by_their_endings_are_counted(pictures, capsys):
    for name in ("new.HEIC", "other.heic", "notes"):
        (pictures / "train" / "bees" / name).write_bytes(b"")
    assert len(Folder(str(pictures), "train")) == 24
    said = "3 files are no pictures by their endings, .HEIC, .heic, none"
    assert said in capsys.readouterr().err


def test_link_to_nothing_is_a_picture_that_cannot_be_read(pictures, user_cache, capsys):
    (pictures / "train" / "bees" / "away.jpg").symlink_to(pictures / "not-here.jpg")
    folder = Folder(str(pictures), "train")
    with pytest.raises(InputError, match=r"1 pictures of 25 cannot be read: .*/bees/away.jpg"):
        without_bad(folder, skip=False)
    rest, left_out = without_bad(folder, skip=True)
    assert (len(rest), left_out) == (24, 1)
    assert rest.fingerprint()


def test_parts_of_one_split_are_disjoint_and_mixed(pictures):
    flat = str(pictures / "train")
    whole = Folder(flat, "train")
    first, second = Folder(flat, "train[:75%]"), Folder(flat, "train[75%:]")
    assert first.paths + second.paths == whole.paths
    assert set(first.labels) == set(second.labels) == {0, 1}
    assert len(first) == 18
    assert Folder(str(pictures), "train").class_names == whole.class_names
    assert Folder(str(pictures), "train+val").paths == [
        *Folder(str(pictures), "train").paths,
        *Folder(str(pictures), "val").paths,
    ]


def test_order_does_not_depend_on_where_the_folder_lies(pictures):
    before = [os.path.relpath(path, pictures) for path in Folder(str(pictures), "train").paths]
    moved = pictures.rename(pictures.parent / "moved")
    after = [os.path.relpath(path, moved) for path in Folder(str(moved), "train").paths]
    assert after == before


def test_fingerprint_changes_with_the_pictures(pictures):
    def fingerprint():
        return Folder(str(pictures), "train").fingerprint()

    prints = [fingerprint(), fingerprint()]
    one = pictures / "train" / "ants" / "1.png"
    draw(80, 80).save(one)
    prints.append(fingerprint())
    one.rename(one.with_name("other.png"))
    prints.append(fingerprint())
    one.with_name("other.png").unlink()
    prints.append(fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def empty_class(root):
    (root / "train" / "wasps").mkdir()


def class_of_val_alone(root):
    (root / "val" / "wasps").mkdir()
    draw(9, 9).save(root / "val" / "wasps" / "1.png")


def nothing(root):
    for path in root.rglob("*.*"):
        path.unlink()
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir()


def link_to_itself(root):
    root.rename(root.with_name("gone"))
    root.symlink_to(root)


@pytest.mark.parametrize(
    ("change", "split", "message"),
    [
        (empty_class, "train", r"class .*/train/wasps has no pictures"),
        (class_of_val_alone, "val", r"/val has a class that train has not: wasps"),
        (nothing, "train", r"pictures has no folders, one a class, with pictures"),
        (None, "dev", r"has no split 'dev'; it has: train, val$"),
        (None, "train[:0]", r"split 'train\[:0\]' of .* is empty"),
        (
            lambda root: root.rename(root.with_name("gone")),
            "train",
            "there is no folder .*/pictures",
        ),
        (link_to_itself, "train", "there is no folder .*/pictures"),
    ],
)
def test_folders_that_cannot_be_used(pictures, change, split, message):
    if change:
        change(pictures)
    with pytest.raises(InputError, match=message):
        Folder(str(pictures), split)


def test_folder_whose_name_is_too_long(pictures):
    with pytest.raises(InputError, match=r"n cannot be read: File name too long"):
        Folder(str(pictures / (300 * "n")), "train")


def test_one_split_says_how_to_divide_it(pictures):
    with pytest.raises(InputError, match=r"'test'; it has: train; of one split, use train\[:90%\]"):
        Folder(str(pictures / "train"), "test")


# Pictures that cannot be read.


@pytest.fixture
def damaged(pictures):
    """Four of the 24 training pictures are."""
    for i in (1, 3, 5, 7):
        path = pictures / "train" / "ants" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:100])
    return pictures


def test_bad_pictures_are_named(damaged, user_cache):
    folder = Folder(str(damaged), "train")
    message = r"^4 pictures of 24 cannot be read: (\S+\.png, ){2}\S+\.png and 1 more; take them out"
    for _ in range(2):  # from the cache too
        with pytest.raises(InputError, match=message):
            without_bad(folder, skip=False)


def test_bad_pictures_are_left_out(damaged, user_cache, capsys):
    folder = Folder(str(damaged), "train")
    rest, count = without_bad(folder, skip=True)
    assert count == 4
    assert [p for p in folder.paths if p in rest.paths] == rest.paths
    assert len(rest) == len(rest.labels) == 20
    assert "left out as they cannot be read: " in capsys.readouterr().err
    assert Photos(rest, SIZING).load().images.shape == (20, 16, 16, 3)
    bad_alone = folder.without(i for i, p in enumerate(folder.paths) if p in rest.paths)
    with pytest.raises(InputError, match="4 pictures of 4 cannot be read"):
        without_bad(bad_alone, skip=True)


def test_pictures_are_looked_at_once(pictures, user_cache, monkeypatch):
    folder = Folder(str(pictures), "train")
    assert without_bad(folder, skip=False) == (folder, 0)
    monkeypatch.setattr(photos, "opened", None)
    assert without_bad(folder, skip=False) == (folder, 0)
    monkeypatch.undo()
    bad = pictures / "train" / "bees" / "2.jpg"
    bad.write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"1 pictures of 24 cannot be read: .*bees/2.jpg;"):
        without_bad(Folder(str(pictures), "train"), skip=False)


def test_picture_that_can_be_read_again(pictures, user_cache, monkeypatch):
    folder = Folder(str(pictures), "train")

    def refuses(path, **kwargs):
        if path == folder.paths[5]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **kwargs)

    real = Image.open
    monkeypatch.setattr(Image, "open", refuses)
    with pytest.raises(InputError, match="1 pictures of 24 cannot be read"):
        without_bad(folder, skip=False)
    monkeypatch.undo()
    assert without_bad(folder, skip=False) == (folder, 0)


def test_class_without_a_picture_left_is_named(pictures, user_cache, capsys):
    for path in (pictures / "train" / "bees").iterdir():
        path.write_bytes(b"damaged")
    without_bad(Folder(str(pictures), "train"), skip=True)
    assert "no picture is left of bees" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("above", "message"),
    [
        ("unpacked", "unpacked/pictures has a folder train, but pictures are PATH/train/CLASS"),
        ("Train", "has Train, val for classes: call the splits train and val"),
    ],
)
def test_splits_are_not_taken_for_classes(pictures, tmp_path, above, message):
    root = tmp_path / above
    root.mkdir()
    if above == "Train":
        (pictures / "train").rename(pictures / "Train")
        root = pictures
    else:
        pictures.rename(root / "pictures")
    with pytest.raises(InputError, match=message):
        Folder(str(root), "train")


@pytest.mark.parametrize("names", [("Training", "Testing"), ("seg_train", "seg_test")])
def test_splits_by_other_names_are_not_taken_for_classes(pictures, names):
    for old, new in zip(("train", "val"), names, strict=True):
        (pictures / old).rename(pictures / new)
    with pytest.raises(InputError, match="for classes: call the splits train and val"):
        Folder(str(pictures), "train")
    assert Folder(str(pictures / names[0]), "train").class_names == ("ants", "bees")


def test_classes_may_have_names_that_look_like_splits(pictures):
    for old, new in (("ants", "trainers"), ("bees", "valley")):
        (pictures / "train" / old).rename(pictures / "train" / new)
    assert Folder(str(pictures / "train"), "train").class_names == ("trainers", "valley")


def test_a_class_may_be_called_train(pictures):
    (pictures / "train" / "bees").rename(pictures / "train" / "Train")
    assert Folder(str(pictures / "train"), "train").class_names == ("Train", "ants")


def test_file_that_vanishes_is_named(pictures):
    folder = Folder(str(pictures), "train")
    split = Photos(folder, SIZING)
    os.unlink(folder.paths[5])
    with pytest.raises(InputError, match=r"/train/\w+/\d+\.\w+: No such file or directory"):
        split.read(np.array([4, 5]))


# What training sees.


def test_crop_depends_on_seed_epoch_and_index_alone(pictures):
    folder = Folder(str(pictures), "train")
    split = pickle.loads(pickle.dumps(Photos(folder, SIZING, random_crops=True)))

    def batches(size, share=slice(None), seed=0, rollbacks=0):
        made = TrainBatches(split, seed, size, share, 0, 2 * (24 // size), rollbacks)
        seen = {}
        for i in range(len(made)):
            batch = made[i]
            for image, label, index in zip(
                *(batch[k] for k in ("image", "label", "index")), strict=True
            ):
                assert label == folder.labels[index]
                seen[i // (24 // size), int(index)] = image.tobytes()
        return seen

    whole = batches(24)
    assert len(whole) == len(set(whole.values())) == 48  # another crop every epoch
    assert batches(6) == whole
    halves = [batches(12, share) for share in (slice(0, 6), slice(6, 12))]
    assert halves[0] | halves[1] == whole
    assert set(batches(24, seed=1).values()).isdisjoint(whole.values())
    assert set(batches(24, rollbacks=1).values()).isdisjoint(whole.values())
    expected = read_for_training(folder.paths[7], SIZING, example_random(0, 1, 7))
    assert whole[1, 7] == expected.tobytes()


def test_pictures_that_stay_in_memory_give_the_same_images(pictures):
    for i in range(3):  # of which a fraction is decoded, sometimes
        draw(80 + 30 * i, 100, seed=i).save(pictures / "train" / "ants" / f"large{i}.jpg")
    folder = Folder(str(pictures), "train")
    split = Photos(folder, SIZING, random_crops=True)
    kept, estimate, index = split.keeping(), split.estimate_kept(), np.arange(len(split))

    def images(split):
        crops = [
            split.read_crops(index, [example_random(0, epoch, int(i)) for i in index])
            for epoch in range(4)
        ]
        return np.stack([pixels for pixels, _ in [split.read(index), *crops]])

    expected = images(split)
    np.testing.assert_array_equal(images(kept), expected)
    pixels, factors = 0, set()
    for i, path in enumerate(folder.paths):
        with opened(path) as image:
            pixels += image.width * image.height
            randoms = [example_random(0, epoch, i) for epoch in range(4)]
            factors |= {draw_part(random, frame_of(image), SIZING)[1] for random in randoms}
        os.unlink(path)
    assert factors == {1, 2, 4}
    # Four bytes a pixel, and a third more for all fractions together.
    assert estimate == pytest.approx(pixels * 16 / 3, abs=1)
    np.testing.assert_array_equal(images(kept), expected)
