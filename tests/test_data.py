"""Data sets: each in its public layout on disk, and the user's own images, good and bad."""

import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from test_train import write_idx
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

import metrics
import train

RNG = np.random.default_rng(0)
SMALL = "--preset tiny --device cpu --bottom-up-channels 8 --tree-width 2 --max-depth 3 --max-leaves 4".split()


def pixels(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save_images(folder, n, side=28, channels=3, end="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        to_pil_image(torch.from_numpy(pixels(channels, *np.broadcast_to(side, 2)))).save(folder / f"{k}.{end}")


# -- the data sets of the papers, in small ----------------------------------------------------------------------------

def make_mnist(root, name="MNIST"):
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 30), ("t10k", 10)):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels(n, 28, 28))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)


def make_cifar(root, folder, files, labels, meta):
    (root / folder).mkdir()
    for name in files:
        (root / folder / name).write_bytes(pickle.dumps({"data": pixels(20, 3072)} | labels))
    (root / folder / meta[0]).write_bytes(pickle.dumps(meta[1]))


def make_omniglot(root):
    for alphabet in ("background/Braille", "background/Greek", "evaluation/Oriya", "evaluation/Bengali"):
        for character in ("character01", "character02"):
            save_images(root / "omniglot-py" / f"images_{alphabet}" / character, 20, 105, 1)


def make_celeba(root):
    save_images(root / "celeba" / "img_align_celeba", 12, (218, 178), end="jpg")
    (root / "celeba" / "list_eval_partition.txt").write_text("".join(f"{k}.jpg {k % 3}\n" for k in range(12)))


def make_cubicc(root):
    (root / "CUBICC").mkdir()
    torch.save(torch.rand(30, 3, 64, 64), root / "CUBICC" / "images.pt")
    torch.save(torch.arange(30) % 8, root / "CUBICC" / "labels.pt")
    for part, rows in (("train", range(20)), ("validation", range(20, 24)), ("test", range(24, 30))):
        np.save(root / "CUBICC" / f"{part}_split.npy", np.array(rows))


def make_news20(root):
    for part, n in (("train", 8), ("test", 3)):
        for group, words in (("sci.space", "orbit moon The launch"), ("rec.autos", "car engine the brake")):
            folder = root / f"20news-bydate-{part}" / group
            folder.mkdir(parents=True)
            for k in range(n):
                (folder / str(k)).write_text(f"{words} {words.split()[k % 2]} a caf\xe9 word{k}", "latin-1")


TENS, FINE = dict(labels=[k % 10 for k in range(20)]), dict(fine_labels=list(range(20)))
PUBLIC = {                                       # name -> how to make it; images for training, for testing; shape; classes
    "shapes": (lambda root: None, 8000, 2000, (1, 28, 28), 8),
    "shapes-rgb": (lambda root: None, 8000, 2000, (3, 32, 32), 8),
    "mnist": (make_mnist, 30, 10, (1, 28, 28), 10),
    "fashion": (lambda root: make_mnist(root, "FashionMNIST"), 30, 10, (1, 28, 28), 10),
    "cifar10": (lambda root: make_cifar(root, "cifar-10-batches-py", [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"],
                                        TENS, ("batches.meta", {"label_names": list("abcdefghij")})), 100, 20, (3, 32, 32), 10),
    "cifar100": (lambda root: make_cifar(root, "cifar-100-python", ["train", "test"], FINE,
                                         ("meta", {"coarse_label_names": list("abcdefghijklmnopqrst")})),
                 20, 20, (3, 32, 32), 20),
    "omniglot": (make_omniglot, 96, 24, (1, 28, 28), 3),
    "omniglot-50": (make_omniglot, 128, 32, (1, 28, 28), 4),
    "celeba": (make_celeba, 8, 4, (3, 64, 64), 0),
    "cubicc": (make_cubicc, 20, 10, (3, 64, 64), 8),
    "news20": (make_news20, 16, 6, (16,), 2),
}


class Done(Exception):
    pass


@pytest.mark.parametrize("name", PUBLIC)
def test_a_data_set_loads_from_its_public_layout_and_its_first_step_trains(tmp_path, monkeypatch, name):
    make, n, n_test, shape, n_classes = PUBLIC[name]
    make(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: os.path.exists(path))
    config, _ = train.parse_flags(["--dataset", name, "--data-root", str(tmp_path), *SMALL])
    data = train.load_data(config)
    assert data.images.shape == (n, *shape) and data.test_images.shape == (n_test, *shape) and data.images.dtype == torch.uint8
    assert data.labels.shape == (n,) and data.test_labels.shape == (n_test,) and len(data.classes) == n_classes
    assert data.labels.max() < max(1, n_classes) and (data.views is None) == (len(shape) == 1)
    tree, train_phase = train.build_tree(config, shape), train.train_phase
    assert tree.likelihood == ("gaussian" if shape[0] == 3 else "bernoulli")
    def one_step(run, title, step_loss, network, images, epochs, batch_size, *rest):
        before = network.encoder.state_dict()
        before = {key: value.clone() for key, value in before.items()}
        train_phase(run, title, step_loss, network, images[:8], 1, 8, *rest)
        assert all(value.isfinite().all() for value in network.state_dict().values())
        assert any(not torch.equal(before[key], value) for key, value in network.encoder.state_dict().items())
        raise Done
    monkeypatch.setattr(train, "train_phase", one_step)
    with pytest.raises(Done):
        train.train_tree(train.Run(config, torch.device("cpu")), tree, data)


def test_superclasses_of_cifar100():
    """Five fine classes each; some by name: 0 apple, 53 orange, 57 pear; 1 aquarium fish, 91 trout; 8 bicycle, 90 train."""
    letters = train.CIFAR20.superclass
    assert sorted(letters) == sorted("abcdefghijklmnopqrst" * 5)
    for fine in ((0, 53, 57), (1, 91), (8, 90), (30, 55, 95)):
        assert len({letters[k] for k in fine}) == 1


def test_omniglot_holds_out_a_fifth_of_each_character(tmp_path):
    make_omniglot(tmp_path)
    for file in (tmp_path / "omniglot-py").rglob("character02/*.png"):
        save_image(torch.zeros(1, 105, 105), file)
    for file in (tmp_path / "omniglot-py").rglob("character01/*.png"):
        save_image(torch.ones(1, 105, 105), file)
    data = train.load_data(train.Config(dataset="omniglot", data_root=str(tmp_path), image_size=28))
    assert data.classes == ["Bengali", "Braille", "Oriya"] and torch.bincount(data.test_labels).tolist() == [8, 8, 8]
    for label in range(3):
        assert data.test_images[data.test_labels == label].float().mean() == 127.5          # four of each of the two characters


def test_tf_idf_by_hand(tmp_path):
    texts = {"train": ["cat cat dog", "dog bird", "The dog, the DOG"], "test": ["bird fish"]}
    for part, lines in texts.items():
        for k, line in enumerate(lines):
            file = tmp_path / f"20news-bydate-{part}" / f"group{k % 2}" / str(k)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(line)
    data = train.load_data(train.Config(dataset="news20", data_root=str(tmp_path)))
    assert data.words == ["bird", "cat", "dog", "the"]
    idf = {word: np.log(4 / (1 + df)) + 1 for word, df in dict(bird=1, cat=1, dog=3, the=1).items()}
    rows = []
    for counts in (dict(cat=2, dog=1), dict(dog=1, bird=1), dict(the=2, dog=2)):
        row = np.array([counts.get(word, 0) * idf[word] for word in data.words])
        rows.append(tuple(np.round(255 * row / np.linalg.norm(row)).astype(int).tolist()))
    assert set(map(tuple, data.images.tolist())) == set(rows)
    assert data.test_images.tolist() == [[255, 0, 0, 0]]


def test_vectors_have_no_stage_2(tmp_path, capsys):
    make_news20(tmp_path)
    run = tmp_path / "run"
    start = ["--dataset", "news20", "--data-root", str(tmp_path), "--quick", *SMALL, "--out", str(run)]
    with pytest.raises(SystemExit) as stop:
        train.main([*start, "--diffusion-epochs", "1"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--diffusion-epochs must be 0" in error and "stage 2" in error and not run.exists()
    train.main(start)
    assert "no stage 2" in capsys.readouterr().out and (run / "tree.pt").exists() and (run / "growth.png").exists()
    metrics.main([str(run), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "no images, no classifier" in said and "| normalized mutual info" in said


def no_network(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize("name", ["mnist", "cifar100", "omniglot", "celeba", "cubicc", "news20"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch, name, fresh):
    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", no_network)
    root = tmp_path / "data" / "deep"
    if not fresh:
        root.mkdir(parents=True)
        (root / "mine").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", name, "--data-root", str(root), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(root) in error
    assert [path.name for path in root.iterdir()] == ["mine"] if not fresh else list(tmp_path.iterdir()) == []


def test_a_download_arrives_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    def half(folder, **kwargs):
        make_mnist(train.File(folder))
        raise KeyboardInterrupt
    class Downloaded(torchvision.datasets.MNIST):
        def download(self):
            if not os.path.exists(self.raw_folder):
                fill(self.root)
    Downloaded.__name__ = "MNIST"
    monkeypatch.setitem(train.DATASETS, "mnist", train.DataSet(lambda config: train.load_arrays(Downloaded, config)))
    config = train.Config(dataset="mnist", data_root=str(tmp_path / "data"))
    fill = half
    with pytest.raises(KeyboardInterrupt):
        train.load_data(config)
    assert list(tmp_path.iterdir()) == []
    def fill(folder):
        make_mnist(train.File(folder))
    assert len(train.load_data(config).images) == 30
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    damaged = tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100])
    assert len(train.load_data(config).images) == 30 and len(damaged.read_bytes()) == len(whole)    # damaged: downloaded again


# -- the user's own images --------------------------------------------------------------------------------------------

def load(path, *flags):
    return train.load_data(train.parse_flags(["--dataset", str(path), "--data-root", str(path.parent / "data"), *flags])[0])


def test_a_folder_for_each_class(tmp_path):
    for name in ("cat", "dog", "cat/kittens"):
        save_images(tmp_path / "pets" / name, 20, 40)
    data = load(tmp_path / "pets")
    assert data.images.shape == (54, 3, 32, 32) and data.test_images.shape[0] == 6 and data.classes == ["cat", "dog"]
    assert torch.bincount(data.test_labels).tolist() == [4, 2] and data.labels[:10].unique().numel() == 2    # not class by class
    again = load(tmp_path / "pets")
    assert torch.equal(data.images, again.images) and torch.equal(data.labels, again.labels)
    assert load(tmp_path / "pets", "--image-size", "64").images.shape[2:] == (64, 64)
    assert train.parse_flags(["--dataset", str(tmp_path / "pets")])[0].out == "runs/pets"


def test_a_folder_without_classes_grey_and_of_other_sizes(tmp_path, capsys):
    save_images(tmp_path / "scans", 6, (30, 50), 1)
    save_images(tmp_path / "scans", 5, (90, 20), 1, "jpg")
    save_images(tmp_path / "scans" / "more", 9, 28, 1, "bmp")
    data = load(tmp_path / "scans")
    assert data.images.shape == (18, 1, 28, 28) and data.classes == [] and not data.labels.any()
    assert "decoded 20 images; the middle square of each is now 28 x 28" in capsys.readouterr().out


def test_a_folder_with_parts_for_training_and_testing(tmp_path):
    for part, n in (("train", 12), ("test", 3), ("other", 5)):
        for name in ("cat", "dog"):
            save_images(tmp_path / "pets" / part / name, n)
    data = load(tmp_path / "pets")
    assert (len(data.images), len(data.test_images), data.classes) == (24, 6, ["cat", "dog"])


def test_the_middle_of_an_image_is_what_stays(tmp_path):
    x = torch.zeros(3, 28, 84)
    x[:, :, 28:56] = torch.rand(3, 28, 28)
    (tmp_path / "wide").mkdir()
    for k in range(2):
        save_image(x, tmp_path / "wide" / f"{k}.png")
    assert torch.equal(load(tmp_path / "wide").images[0], (255 * x[:, :, 28:56] + 0.5).clamp(0, 255).byte())


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    x = torch.zeros(3, 28, 28, dtype=torch.uint8)
    x[:, :14] = 255                                                            # the upper half is white
    for orientation, white in ((1, (0, 5)), (3, (27, 5)), (4, (27, 5)), (5, (5, 0)), (6, (5, 27)), (7, (5, 27)), (8, (5, 0)), (99, (0, 5))):
        image = to_pil_image(x)
        image.getexif()[274] = orientation
        image.save(tmp_path / "photo.png", exif=image.getexif())
        y = train.decode(tmp_path / "photo.png", 100)[0]
        assert y[white] == 255 and y[27 - white[0], 27 - white[1]] == 0, orientation


def test_bad_images_are_named_skipped_and_counted(tmp_path, capsys):
    folder = tmp_path / "pets"
    save_images(folder, 20)
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text\n.png").write_text("not an image")
    (folder / "notes.txt").write_text("no image, and not meant to be")
    (folder / "._0.png").write_bytes(b"what macOS leaves")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "deep.png").write_bytes(whole[:24] + b"\x10\0" + whole[26:])      # grey, of 16 bits
    size = struct.pack(">II", 30000, 30000)                                     # 900 million pixels
    header = b"IHDR" + size + whole[24:29]
    (folder / "bomb.png").write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    data = load(folder)
    error = capsys.readouterr().err
    assert len(data.images) + len(data.test_images) == 20 and error.count("\n") == 1
    assert "6 of 26 images cannot be read and are left out" in error and "bomb" in error and "'cut.png'" in error and "16 bits" in error


def test_a_cache_is_used_kept_true_and_not_trusted(tmp_path, capsys, monkeypatch):
    folder, cache = tmp_path / "pets", tmp_path / "pets.cache"
    save_images(folder / "cat", 10)
    save_images(folder / "dog", 10)
    (folder / "dog" / "bad.png").write_bytes(b"")
    monkeypatch.setattr(train, "CACHE_SECONDS", 0.0)
    data = load(folder)
    assert cache.exists() and "bad.png" in capsys.readouterr().err
    def same(path):
        return torch.equal(load(path).images, data.images)
    with monkeypatch.context() as patch:
        patch.setattr(train, "decode", None)
        assert same(folder)                                                     # without decoding
    captured = capsys.readouterr()
    assert captured.out == "" and "bad.png" in captured.err
    whole = cache.read_bytes()
    for damaged in (b"", whole[:-100], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:], pickle.dumps({"key": 1})):
        cache.write_bytes(damaged)
        assert same(folder) and "decoded" in capsys.readouterr().out and cache.stat().st_size == len(whole)
    save_images(folder / "dog", 11)                                             # other images
    assert not same(folder) and "decoded 21" in capsys.readouterr().out
    cache.unlink()
    replace_file = train.replace_file
    def read_only(path, save, old=None):
        if path.parent == tmp_path:
            raise OSError(30, "Read-only file system")
        replace_file(path, save, old)
    monkeypatch.setattr(train, "replace_file", read_only)
    load(folder)
    assert not cache.exists() and (tmp_path / "data" / "pets.cache").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train, "decode", None)
        load(folder)


def test_decoding_counts(tmp_path, capsys, monkeypatch):
    save_images(tmp_path / "many", 3)
    for k in range(700):
        (tmp_path / "many" / f"link{k}.png").symlink_to(tmp_path / "many" / "0.png")
    monkeypatch.setattr(train, "pause", lambda: 0)
    load(tmp_path / "many")
    assert "decoded 500 of 703 images" in capsys.readouterr().out


@pytest.mark.parametrize("images, shape, first", [
    (pixels(20, 28, 28), (1, 28, 28), None),
    (pixels(20, 32, 32, 3), (3, 32, 32), None),
    (pixels(20, 3, 60, 70), (3, 64, 64), None),
    (pixels(20, 28, 28, 1), (1, 28, 28), None),
    (np.full((20, 28, 28), 0.5), (1, 28, 28), 128),
    (np.full((20, 28, 28), 200.4, np.float32), (1, 28, 28), 200),
    (np.full((20, 28, 28), True), (1, 28, 28), 255),
    (np.full((20, 28, 28), 1, np.int64), (1, 28, 28), 255),
    (np.zeros((20, 28, 28), np.float16), (1, 28, 28), 0),
    (np.full((20, 28, 28), 7, ">u2"), (1, 28, 28), 7),
])
def test_arrays_of_any_usual_kind(tmp_path, images, shape, first):
    np.savez_compressed(tmp_path / "mine.npz", images=images)
    data = load(tmp_path / "mine.npz")
    assert data.images.shape == (18, *shape) and data.test_images.shape == (2, *shape) and data.classes == []
    assert first is None or data.images[0, 0, 0, 0] == first
    if images.shape == (20, 28, 28) and first is None:
        assert sorted(torch.cat([data.images, data.test_images]).flatten(1).tolist()) == sorted(images.reshape(20, -1).tolist())


@pytest.mark.parametrize("labels, classes", [(np.arange(20) % 11, [str(k) for k in range(11)]), (np.zeros(20, int), []),
                                             (np.array(["b", "a"] * 10), ["a", "b"])])
def test_labels_are_numbers_or_names(tmp_path, capsys, labels, classes):
    images = np.zeros((20, 28, 28), np.uint8) + np.unique(labels, return_inverse=True)[1].astype(np.uint8)[:, None, None] * 10 + 2
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    data = load(tmp_path / "mine.npz")
    assert data.classes == classes and (10 * data.labels + 2 == data.images[:, 0, 0, 0]).all()
    assert ("one class only" in capsys.readouterr().err) == (not classes)


def test_an_npz_that_would_burst_is_refused(tmp_path, capsys):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((1000, 28, 28), np.uint8))
    archive = bytearray((tmp_path / "bomb.npz").read_bytes())
    size = archive.rindex(b"PK\1\2") + 24                               # in the archive's directory: the size of what is in it
    archive[size:size + 4] = struct.pack("<I", 2 ** 32 - 2)
    (tmp_path / "bomb.npz").write_bytes(archive)
    with pytest.raises(SystemExit) as stop:
        load(tmp_path / "bomb.npz")
    assert stop.value.code == 2 and "decompression bomb" in capsys.readouterr().err
