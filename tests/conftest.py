"""What the tests share: 240 drawings as a data set, and flags that make a run of seconds."""

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import train

torch.set_num_threads(1)

# Few enough images and channels for seconds; every phase and every term of the loss has its turn
FLAGS = dict(
    dataset="known", device="cpu", seed=3, latent_channels=2, bottom_up_channels=32, max_depth=4,
    max_leaves=5, initial_epochs=3, grow_epochs=3, intermediate_epochs=2, finetune_epochs=3,
    tree_batch_size=32, grow_batch_size=16, kl_start=0.05, kl_start_later=0.15, kl_per_epoch=0.1,
    contrastive=50.0, cut=100.0, unet_channels=8, unet_multipliers="1,2",
    dropout=0.1, diffusion_epochs=2, diffusion_batch_size=32, diffusion_lr=2e-3, warmup_steps=5,
    ema_decay=0.5)


def as_argv(**changes):
    """The flags above, some of them changed, as a command line."""
    settings = FLAGS | changes
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.fixture(scope="session")
def data():
    """240 drawings of eight classes for training, 80 for testing; a train.Data."""
    classes = [str(k) for k in range(8)]
    return train.Data(*train.draw_shapes(240, 5, False), *train.draw_shapes(80, 6, False), classes)


@pytest.fixture
def known(data, monkeypatch):
    """These drawings as the data set "known"."""
    monkeypatch.setitem(train.DATASETS, "known", train.DataSet(lambda config: data))
    return data
