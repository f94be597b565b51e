"""Two folders that every verb is tried on: a checkpoint such as the demo writes, and a tiny Hugging Face Qwen2.5-VL."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests import tiny
from thyme.verbs.config import RunConfig
from thyme.verbs.opening import open_model, save_model


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded toy as `thyme demo` saves it, untrained."""
    return save_model(open_model(RunConfig(threads=1)), tmp_path_factory.mktemp("demo") / "rl")


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: PreTrainedTokenizerFast) -> Path:
    """What transformers writes of a tiny Qwen2.5-VL; says no dialect."""
    return tiny.write_hub_folder(tmp_path_factory.mktemp("hub") / "Qwen2.5-VL-tiny", byte_level_tokenizer)
