"""What stops a run and what it was given: kills, signals, full disks, damaged files, other runs, wrong data."""

import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch

import sample
import train

TINY = ("--quick --device cpu --preset tiny --max-leaves 3 --max-depth 2 --initial-epochs 1 "
        "--subtree-epochs 1 --intermediate-epochs 0 --finetune-epochs 1 --tree-batch-size 16 --subtree-batch-size 16 "
        "--bottom-up-channels 8 --tree-width 2 --unet-channels 4 --unet-multipliers 1,2 --diffusion-batch-size 16").split()


@pytest.fixture(scope="module", autouse=True)
def sigint_is_heard():
    """A job in the background is started with SIGINT ignored; these tests want it as a terminal has it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module", autouse=True)
def paths_of_two_batches():
    """Stage 2 can stop after every second of its batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PATHS_AHEAD", 32)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "drawn.npz"
    x, labels = train.draw_shapes(72, 0)
    np.savez(file, images=x.numpy(), labels=labels.numpy())
    return file


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train.main([*TINY, "--dataset", str(images), "--out", str(folder)])
    return folder


def weights(folder):
    tree, networks = (train.read_saved(folder / name) for name in ("tree.pt", "diffusion.pt"))
    tree_weights = {f"tree.{key}": value for key, value in tree["state_dict"].items()}
    return dict(parents=torch.tensor(tree["parents"]), **tree_weights, **networks)


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refused(capsys, *argv, program=train):
    """What a program says, in one line, when it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "draw_training", lambda *args: None)


@pytest.fixture
def every_step(monkeypatch):
    """Checkpoints after every step."""
    monkeypatch.setattr(train, "SAVE_SECONDS", -1.0)


# -- killed -----------------------------------------------------------------------------------------------------------

def run_and_tell(argv, pipe, folder):
    """A run in a process of its own, which says through the pipe whenever it has come a step or a file further."""
    torch.set_num_threads(1)
    os.chdir(folder)
    train.SAVE_SECONDS, train.PATHS_AHEAD = -1.0, 32
    train.draw_training = lambda *args: None
    def telling(function):
        def told(*args):
            pipe.send_bytes(b"before")
            result = function(*args)
            pipe.send_bytes(b"after")
            return result
        return told
    os.fsync, os.replace, train.Run.due = telling(os.fsync), telling(os.replace), telling(lambda run: False)
    train.main(argv)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts a process a second where there is no fork")
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_weights(images, tmp_path):
    context, rng, kills = multiprocessing.get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(["train"])
    def go(folder, argv, moment=10 ** 9):
        """Run until it has told so often, and then SIGKILL. -> how often it has"""
        here, there = context.Pipe(duplex=False)
        process, told = context.Process(target=run_and_tell, args=(argv, there, str(tmp_path))), 0
        process.start()
        there.close()
        try:
            while told < moment:
                here.recv_bytes()
                told += 1
            process.kill()
        except EOFError:
            pass
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if told == moment else 0)
        return told
    start = [*TINY, "--dataset", str(images), "--out"]
    whole = go(tmp_path / "whole", [*start, str(tmp_path / "whole")])
    folders, done = [], True
    while kills < 20:
        if done:                                                                # it came to its end between two kills
            folders.append(tmp_path / f"killed{len(folders)}")
        argv = ["--resume", "--out", str(folders[-1])] if (folders[-1] / "config.json").exists() else [*start, str(folders[-1])]
        moment = rng.randint(1, whole // 10)
        done = go(folders[-1], argv, moment) < moment
        kills += not done
    go(folders[-1], ["--resume", "--out", str(folders[-1])])
    for folder in folders:
        assert same(folder, tmp_path / "whole") and not [path for path in folder.iterdir() if path.suffix == ".part"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when, name, time", [
    ("before", "config.json", 1), ("after", "config.json", 1), ("before", "log.csv", 9), ("before", "checkpoint_old.pt", 5),
    ("before", "checkpoint.pt", 12), ("before", "tree.pt", 1), ("before", "diffusion.pt", 1), ("after", "diffusion.pt", 1)])
def test_killed_between_two_files(images, finished, tmp_path, monkeypatch, every_step, when, name, time):
    folder, replace, times = tmp_path / "run", os.replace, [0]
    start = [*TINY, "--dataset", str(images), "--out", str(folder)]
    def die(part, path):
        times[0] += os.path.basename(path) == name
        last = times[0] == time and os.path.basename(path) == name
        if last and when == "before":
            raise Killed
        replace(part, path)
        if last:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            train.main(start)
    train.main(["--resume", "--out", str(folder)] if (folder / "config.json").exists() else start)
    assert same(folder, finished)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [2, 21])
def test_signals_save_and_exit(images, finished, tmp_path, monkeypatch, capsys, number, code, step):
    folder, steps, before = tmp_path / "run", [0], signal.getsignal(number)
    def due(run):
        steps[0] += 1
        if steps[0] == step:
            signal.raise_signal(number)
        return False
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "due", due)
        with pytest.raises(SystemExit) as stop:
            train.main([*TINY, "--dataset", str(images), "--out", str(folder)])
    captured = capsys.readouterr()
    assert stop.value.code == code and steps[0] == step + (step == 21) and captured.err == "" and signal.getsignal(number) == before
    assert captured.out.splitlines()[-1] == f"stopped and saved; it goes on with python train.py --resume --out {folder}"
    train.main(["--resume", "--out", str(folder)])
    assert same(folder, finished)


def test_a_second_signal_does_not_ask(images, tmp_path, monkeypatch):
    def twice(run):
        signal.raise_signal(signal.SIGINT)
        assert run.stop == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train.Run, "due", twice)
    with pytest.raises(KeyboardInterrupt):
        train.main([*TINY, "--dataset", str(images), "--out", str(tmp_path / "run")])


def test_a_program_ends_without_a_traceback(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with pytest.raises(SystemExit) as stop:
                train.run_program(lambda: signal.raise_signal(number))
            assert stop.value.code == code and "stopped" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


# -- other runs -------------------------------------------------------------------------------------------------------

def hold(folder, pipe):
    with train.alone_in(folder):
        pipe.send_bytes(b"held")
        pipe.recv_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the lock is held by a forked process")
def test_a_folder_in_use_is_refused_until_its_process_is_dead(images, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(folder, there))
    process.start()
    assert here.recv_bytes() == b"held"
    assert "in use by another run" in refused(capsys, "--resume", "--out", folder)
    assert "in use by another run" in refused(capsys, *TINY, "--overwrite", "--dataset", images, "--out", folder)
    process.kill()
    process.join()
    train.main(["--resume", "--out", str(folder)])
    assert same(folder, finished)


def test_the_lock_where_there_is_no_fcntl(tmp_path, monkeypatch, capsys):
    class Windows:
        LK_NBLCK, held = 2, set()
        def locking(self, number, mode, size):
            if os.fstat(number).st_ino in self.held:
                raise PermissionError(13, "Permission denied")
            self.held.add(os.fstat(number).st_ino)
    monkeypatch.setattr(train, "fcntl", None)
    monkeypatch.setattr(train, "msvcrt", Windows(), raising=False)
    with train.alone_in(tmp_path / "run"), pytest.raises(SystemExit), train.alone_in(tmp_path / "run"):
        pass
    assert "in use by another run" in capsys.readouterr().err


def test_overwrite_takes_a_run_and_nothing_else(images, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "holiday.png").write_text("mine")
    (folder / "metrics.json").write_text("of the old run")
    start = [*TINY, "--dataset", str(images), "--out", str(folder), "--seed", "5", "--diffusion-epochs", "0"]
    assert "holds a run already" in refused(capsys, *start) and same(folder, finished)
    train.main([*start, "--overwrite"])
    names = {path.name for path in folder.iterdir()}
    assert "holiday.png" in names and not names & {"metrics.json", "diffusion.pt"}
    assert json.loads((folder / "config.json").read_text())["seed"] == 5
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text('{"name": "not a run"}')
    assert "not a run's settings" in refused(capsys, *TINY, "--overwrite", "--dataset", images, "--out", tmp_path / "project")
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["config.json"]


# -- the machine ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("time", [1, 3, 20])
def test_a_full_disk_is_one_sentence_and_costs_nothing(images, finished, tmp_path, monkeypatch, capsys, every_step, time):
    folder, fsync, times = tmp_path / "run", os.fsync, [0]
    start = [*TINY, "--dataset", str(images), "--out", str(folder)]
    def full(number):
        times[0] += 1
        if times[0] == time:
            raise OSError(28, "No space left on device")
        fsync(number)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        error = refused(capsys, *start)
    assert "No space left on device" in error and not list(folder.glob("*.part"))
    train.main(["--resume", "--out", str(folder)] if (folder / "config.json").exists() else start)
    assert same(folder, finished)


def test_a_disk_that_fills_up_while_torch_writes_is_named(tmp_path):
    """torch.save turns the error of a file that it writes to into another one."""
    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 3000:
                raise OSError(28, "No space left on device")
            return super().write(data)
    (tmp_path / "x.pt").write_text("before")
    with pytest.raises(OSError, match="No space left"):
        train.replace_file(tmp_path / "x.pt", lambda file: torch.save({"a": torch.zeros(9999)}, Full()))
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"] and (tmp_path / "x.pt").read_text() == "before"


@pytest.mark.parametrize("phase, flag", [("initial", "--tree-batch-size"), ("grow", "--subtree-batch-size"),
                                         ("diffusion", "--diffusion-batch-size")])
def test_out_of_memory_names_the_setting_to_halve(images, tmp_path, monkeypatch, capsys, phase, flag):
    train_phase = train.train_phase
    def out_of_memory(run, title, *args):
        if title.startswith(phase):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        train_phase(run, title, *args)
    monkeypatch.setattr(train, "train_phase", out_of_memory)
    error = refused(capsys, *TINY, "--dataset", images, "--out", tmp_path / "run")
    assert f"halve {flag}, which is 16" in error and f"phase {phase}" in error


@pytest.mark.parametrize("what", ["a term", "a weight"])
def test_a_loss_that_is_not_a_number_stops_the_run_and_spares_its_state(images, tmp_path, monkeypatch, capsys, every_step, what):
    loss, steps = train.TreeVAE.loss, [0]
    def broken(tree, *args):
        steps[0] += 1
        total, terms = loss(tree, *args)
        if steps[0] == 7:
            total = total * float("nan")
            terms = terms | ({"kl_root": total} if what == "a term" else {})
        return total, terms
    monkeypatch.setattr(train.TreeVAE, "loss", broken)
    error = refused(capsys, *TINY, "--dataset", images, "--out", tmp_path / "run")
    assert f"grow 0, epoch 1, step 3: {'kl_root' if what == 'a term' else what} is not a number" in error
    state = train.read_saved(tmp_path / "run" / "checkpoint.pt")
    assert state["batch"] == 2 and all(value.isfinite().all() for value in state["training"]["network"].values())


# -- damaged and foreign files ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stopped(images, tmp_path_factory):
    """A run that stopped in the middle, with both its checkpoints."""
    folder, steps = tmp_path_factory.mktemp("stopped") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1.0)
        patch.setattr(train.Run, "due", lambda run: steps.append(0) or len(steps) == 14 and signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit):
            train.main([*TINY, "--dataset", str(images), "--out", str(folder)])
    return folder


@pytest.fixture
def half_way(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "half")


class Evil:
    """What a pickle can hold: a call of any function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_evil(file, path):
    torch.save({"tree": Evil(path)}, file)


FOREIGN = {
    "cut": lambda file, mark: file.write_bytes(file.read_bytes()[:-1000]),
    "empty": lambda file, mark: file.write_bytes(b""),
    "text": lambda file, mark: file.write_text("checkpoint"),
    "a byte changed": lambda file, mark: file.write_bytes((whole := file.read_bytes())[:9999] + b"?" + whole[10000:]),
    "a pickle": lambda file, mark: file.write_bytes(pickle.dumps(Evil(mark))),
    "a pickle in a zip": save_evil,
    "a list": lambda file, mark: torch.save([1, 2], file),
    "a tensor": lambda file, mark: torch.save(torch.zeros(3), file),
    "other weights": lambda file, mark: torch.save(torch.nn.Linear(2, 2).state_dict(), file),
    "another run's": lambda file, mark: torch.save(train.read_saved(file) | dict(config=dict(seed=9)), file),
    "of other images": lambda file, mark: torch.save(train.read_saved(file) | dict(images=1), file),
    "missing": lambda file, mark: file.unlink(),
}


@pytest.mark.parametrize("how", FOREIGN)
def test_a_checkpoint_that_cannot_be_used_falls_back_to_the_one_before(half_way, tmp_path, capsys, how):
    config, old = train.load_config(half_way), train.read_saved(half_way / "checkpoint_old.pt")
    new = train.load_state(config)
    FOREIGN[how](half_way / "checkpoint.pt", tmp_path / "mark")
    capsys.readouterr()
    assert train.load_state(config, new["images"])["batch"] == old["batch"] != new["batch"] and not (tmp_path / "mark").exists()
    error = capsys.readouterr().err
    assert how == "missing" and error == "" or error.count("\n") == 1 and "going on from checkpoint_old.pt" in error


def test_from_the_checkpoint_before_come_the_same_weights(half_way, finished):
    (half_way / "checkpoint.pt").write_bytes(b"cut")
    train.main(["--resume", "--out", str(half_way)])
    assert same(half_way, finished)


@pytest.mark.parametrize("how", sorted(FOREIGN.keys() - {"missing"}))
def test_without_a_checkpoint_that_can_be_used_it_is_one_sentence(half_way, tmp_path, capsys, how):
    for name in ("checkpoint.pt", "checkpoint_old.pt"):
        FOREIGN[how](half_way / name, tmp_path / "mark")
    files = {path: path.read_bytes() for path in half_way.iterdir()}
    assert "checkpoint_old.pt cannot be used" in refused(capsys, "--resume", "--out", half_way)
    assert {path: path.read_bytes() for path in half_way.iterdir()} == files and not (tmp_path / "mark").exists()


def test_random_damage_is_refused_or_harmless(half_way, finished, images, tmp_path, capsys, monkeypatch):
    """200 byte flips and truncations: a program goes on as if nothing was, or refuses in one sentence; there is no third."""
    rng, refusals = random.Random(0), 0
    original = train.load_state(train.load_config(half_way))
    data, good = train.load_own(train.Config(dataset=str(images))), {}
    def checkpoint(file):
        state = train.load_state(train.load_config(half_way))
        assert all(torch.equal(value, original["tree"][key]) for key, value in state["tree"].items())
    def config(file):
        train.load_config(half_way)
    def arrays(file):
        one = train.load_own(train.Config(dataset=str(file)))
        assert torch.equal(one.images, data.images) and torch.equal(one.labels, data.labels)
    def weights_of(file):
        train.load_run(finished, "cpu")
    (half_way / "checkpoint_old.pt").unlink()
    packed = tmp_path / "packed.npz"
    with np.load(images) as content:
        np.savez_compressed(packed, **content)
    targets = [(half_way / "checkpoint.pt", checkpoint), (half_way / "config.json", config), (packed, arrays),
               (finished / "tree.pt", weights_of)]
    for k in range(200):
        file, use = targets[k % len(targets)]
        whole = good.setdefault(file, file.read_bytes())
        place, damaged = rng.randrange(len(whole)), bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(whole[:place] if k // len(targets) % 4 == 3 else damaged)
        try:
            use(file)
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            refusals += 1
        finally:
            file.write_bytes(whole)
    assert 120 < refusals <= 200


# -- what a user may hand in ------------------------------------------------------------------------------------------

def npz(**arrays):
    def make(path):
        np.savez(path / "x.npz", **arrays)
        return path / "x.npz"
    return make


def header(text):
    """An .npz whose `images` begin with a header of the given text, and go no further."""
    def make(path):
        with zipfile.ZipFile(path / "x.npz", "w") as archive:
            archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + b"abc")
        return path / "x.npz"
    return make


def written(name, content=b""):
    def make(path):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        return path / name.split("/")[0]
    return make


def cubicc(**changes):
    def make(path):
        (path / "birds").mkdir()
        parts = dict(images=torch.rand(9, 3, 8, 8), labels=torch.arange(9) % 2, train=range(5), validation=[5, 6], test=[7, 8])
        parts |= changes
        for name in ("images", "labels"):
            torch.save(parts[name] if parts[name] != "evil" else Evil(path / "mark"), path / "birds" / f"{name}.pt")
        for name in ("train", "validation", "test"):
            np.save(path / "birds" / f"{name}_split.npy", np.array(parts[name]))
        return path / "birds"
    return make


OK = np.zeros((30, 28, 28), np.uint8)


def evil_array(path):
    array = np.empty(1, object)
    array[0] = Evil(path / "mark")
    np.savez(path / "x.npz", images=array)
    return path / "x.npz"


def one_png(path):
    train.save_figure(train.plt.figure(figsize=(0.3, 0.3)), path / "one.png")
    (path / "one").mkdir()
    (path / "one.png").rename(path / "one" / "one.png")
    return path / "one"


BAD_DATA = {
    "no such file": (lambda path: path / "nothing.npz", "invalid choice"),
    "no images in it": (npz(pictures=OK), "KeyError"),
    "text for an npz": (written("x.npz", b"images"), "not a folder of images, nor an .npz"),
    "an empty npz": (written("x.npz"), "nor an .npz"),
    "a picture for a data set": (written("x.png", b"\x89PNG"), "nor an .npz"),
    "a pickle for an npz": (lambda path: written("x.npz", pickle.dumps(Evil(path / "mark")))(path), "nor an .npz"),
    "a pickle in an npz": (evil_array, "allow_pickle"),
    "an npy that lies about its size": (header("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999, 99999, 99999)}\n"),
                                        "nor an .npz"),
    "an npy that ends too early": (header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 28, 28)}\n"), "nor an .npz"),
    "an npy with code for a header": (header("__import__('os').mkdir('mark')\n"), "nor an .npz"),
    "one dimension": (npz(images=np.zeros(30)), "of shape (N, H, W)"),
    "two dimensions": (npz(images=np.zeros((30, 784))), "of shape (N, H, W)"),
    "five channels": (npz(images=np.zeros((30, 28, 28, 5))), "of shape (N, H, W)"),
    "no image": (npz(images=np.zeros((0, 28, 28))), "of shape (N, H, W)"),
    "images without pixels": (npz(images=np.zeros((30, 0, 28))), "of shape (N, H, W)"),
    "words for pixels": (npz(images=np.full((30, 28, 28), "a")), "must be numbers"),
    "complex pixels": (npz(images=OK * 1j), "must be numbers"),
    "NaN": (npz(images=np.where(np.arange(28) == 3, np.nan, OK)), "nan..nan"),
    "infinity": (npz(images=np.where(np.arange(28) == 3, np.inf, OK)), "0.0..inf"),
    "pixels in -1..1": (npz(images=OK - 1.0), "in -1.0..-1.0"),
    "pixels of 16 bits": (npz(images=OK.astype(np.uint16) + 256), "256..256"),
    "one image": (npz(images=OK[:1]), "has 1 image to train on"),
    "too few labels": (npz(images=OK, labels=np.zeros(29, int)), "30 whole numbers or names"),
    "too many labels": (npz(images=OK, labels=np.zeros(31, int)), "30 whole numbers or names"),
    "labels in two dimensions": (npz(images=OK, labels=np.zeros((30, 2), int)), "30 whole numbers or names"),
    "fractions for labels": (npz(images=OK, labels=np.full(30, 0.5)), "30 whole numbers or names"),
    "objects for labels": (npz(images=OK, labels=np.array([None] * 30)), "allow_pickle"),
    "an empty folder": (lambda path: (path / "empty").mkdir() or path / "empty", "there is no image in"),
    "a folder of text": (written("texts/a.txt", b"text"), "there is no image in"),
    "a folder of one bad image": (written("images/a.png", b"text"), "there is no image in"),
    "a folder of one good image": (one_png, "has 1 image to train on"),
    "tensors with a pickle": (cubicc(images="evil"), "nor an .npz"),
    "tensors with too few labels": (cubicc(labels=torch.arange(8)), "9 whole numbers"),
    "tensors with rows that are not there": (cubicc(test=[7, 9]), "IndexError"),
    "tensors with a fraction for a row": (cubicc(test=[7.5]), "IndexError"),
    "tensors with NaN": (cubicc(images=torch.full((9, 3, 8, 8), torch.nan)), "nan..nan"),
    "tensors that are none": (cubicc(images=[1, 2]), "nor an .npz"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys, what):
    make, words = BAD_DATA[what]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--dataset", str(path)])
    *notes, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and error.startswith("error: ") and words in error and str(path) in error, error
    assert all(line.startswith("note: 1 of 1 images cannot be read") for line in notes)
    assert sorted(tmp_path.rglob("*")) == before


BAD_CONFIG = {
    "cut": ('{"seed": 1', "not a run's settings"),
    "not utf-8": (b'{"seed": "\xff"}', "not a run's settings"),
    "a list": ("[1, 2]", "not a run's settings"),
    "a number": ("7", "not a run's settings"),
    "nested": ("[" * 100000, "not a run's settings"),
    "an unknown setting": ('{"colour": 1}', "not a run's settings"),
    "a word for a number": ('{"seed": "1"}', "must be of type int"),
    "a truth for a number": ('{"seed": true}', "must be of type int"),
    "nothing for a number": ('{"tree_lr": null}', "must be of type float"),
    "not a number": ('{"tree_lr": NaN}', "must be a number"),
    "a huge number": ('{"seed": 1' + "0" * 5000 + "}", "not a run's settings"),
    "infinity": ('{"tree_lr": 1e999}', "must be a number"),
    "no such data": ('{"dataset": "/no/such/data"}', "invalid choice"),
    "data with a zero byte": ('{"dataset": "a\\u0000b"}', "invalid choice"),
    "data with half a character": ('{"dataset": "\\ud800"}', "invalid choice"),
    "an image size that does not halve": ('{"image_size": 30}', "must be one of 0, 28, 32, 64"),
    "other settings": ('{"seed": 3}', "other settings"),
}


@pytest.mark.parametrize("what", BAD_CONFIG)
def test_a_bad_config_is_one_sentence(finished, images, tmp_path, capsys, what):
    shutil.copytree(finished, tmp_path / "run")
    content, words = BAD_CONFIG[what]
    content = content if isinstance(content, bytes) else content.encode()
    if what == "other settings":
        content = json.dumps(json.loads((finished / "config.json").read_text()) | {"seed": 3}).encode()
    (tmp_path / "run" / "config.json").write_bytes(content)
    assert words in refused(capsys, "--resume", "--out", tmp_path / "run")
    if what != "other settings":
        assert words in refused(capsys, tmp_path / "run", program=sample)


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "/dev/full/run"])
def test_a_folder_that_cannot_be_is_one_sentence(images, tmp_path, capsys, out):
    (tmp_path / "file").write_text("a file")
    assert "the run's folder cannot be written" in refused(capsys, *TINY, "--dataset", images, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "a file"


def test_fewer_images_than_a_batch_and_two_images(tmp_path, capsys):
    for n in (2, 14):
        np.savez(tmp_path / f"{n}.npz", images=np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8))
        train.main([*TINY, "--dataset", str(tmp_path / f"{n}.npz"), "--out", str(tmp_path / str(n))])
        error = capsys.readouterr().err
        assert f"{n - (n >= 10)} images are fewer than a batch of 16" in error and error.count("\n") == 1
        assert (tmp_path / str(n) / "diffusion.pt").exists()


def test_images_that_change_under_a_run_are_noticed(half_way, images, capsys):
    whole = images.read_bytes()
    try:
        with np.load(io.BytesIO(whole)) as content:
            np.savez(images, images=255 - content["images"], labels=content["labels"])
        assert "other images" in refused(capsys, "--resume", "--out", half_way)
    finally:
        images.write_bytes(whole)
