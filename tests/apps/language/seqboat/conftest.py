"""Small recordings and a configuration of a small SeqBoat."""

import shutil

import pytest
import yaml

from tests.fixtures.gates_in_folder import GatesInFolder
from tests.language.seqboat.conftest import speech_folder, wave_writer  # noqa: F401

CONFIG = {
    "seed_everything": 0,
    "model": {
        "model": {
            "class_path": "language.seqboat.sequence_model.SeqBoat",
            "init_args": {
                "front": {
                    "class_path": "language.seqboat.front_ends.FilterBank",
                    "init_args": {"dim": 8, "filters": 8},
                },
                "outputs": 3, "num_layers": 2, "key_dim": 4, "hidden_dim": 8, "num_states": 2,
                "window": 4,
            },
        },
        "learning_rate": 1e-2,
        "warmup_steps": 2,
    },
    "data": {
        "class_path": "language.seqboat.speech.SpeechData",
        "init_args": {"folder": "speech", "batch_size": 4, "length": 500},
    },
    "trainer": {"max_epochs": 2, "gradient_clip_val": 1.0, "log_every_n_steps": 1},
    "checkpoint": {"monitor": "validation/accuracy", "mode": "max"},
    "evaluate": {"seeds": [0, 1]},
}  # fmt: skip


@pytest.fixture
def gates(tmp_path, speech_folder):  # noqa: F811
    """``gates`` in a folder with small recordings and the configuration ``small``."""
    shutil.copytree(speech_folder, tmp_path / "speech")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return GatesInFolder(tmp_path)
