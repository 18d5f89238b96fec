"""One thread a process: the models are tiny, and two test processes share two cores."""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

torch.set_num_threads(1)
FLASH = torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture(autouse=True)
def attention_as_torch_chooses() -> Iterator[None]:
    """What a test switches off for its process (the pretraining scripts do) stays off for that test alone."""
    torch.backends.cuda.enable_flash_sdp(FLASH)
    yield
    torch.backends.cuda.enable_flash_sdp(FLASH)


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """What a test changes of it is not for those that come after."""
    with patch.dict(os.environ):
        yield
