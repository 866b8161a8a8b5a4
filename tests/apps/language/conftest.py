"""A corpus of small files, a decoder that was trained on it, and commands in its folder."""

import pytest
import yaml

from tests.fixtures.gates_in_folder import GatesInFolder

FILES = 40
MODEL = {
    "vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "hidden_dim": 24, "context": 16, "qk_norm": True, "tie_embeddings": True,
}  # fmt: skip


class Gates(GatesInFolder):
    """``gates language`` with the configuration that the folder holds."""

    def succeed(self, verb: str, *words: object, config: str | None = "small") -> str:
        """Run a verb that must succeed, and return what it printed."""
        named = ["--config", config] if config else []
        return super().succeed("language", verb, *named, *words).out


def write_corpus(folder):
    """Write files that are alike, two of them the same."""
    folder.mkdir()
    for number in range(FILES):
        lines = [
            f"def add_{number}_{k}(a, b):\n    return a + b * {number * k}\n" for k in range(6)
        ]
        (folder / f"f{number}.py").write_text("\n\n".join(lines) + "# end\n" * (number % 7))
    (folder / "copy.py").write_text((folder / "f3.py").read_text())


def write_config(path, **model):
    content = {
        "seed_everything": 0,
        "model": {
            "model": {"class_path": "language.decoder.Decoder", "init_args": {**MODEL, **model}},
            "learning_rate": 5e-3,
            "warmup_steps": 2,
        },
        "data": {"corpus": ["corpus"], "context": 16, "batch_size": 8, "cache_folder": "cache"},
        "trainer": {"max_epochs": -1, "max_steps": 12, "log_every_n_steps": 1,
                    "limit_val_batches": 2, "val_check_interval": 6,
                    "check_val_every_n_epoch": None, "gradient_clip_val": 1.0},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture
def cut_off(monkeypatch):
    """``cut_off(owner, name, number)``: one call of a function is cut off; return what is called.

    A training run is saved after every step.
    """
    monkeypatch.setattr("harness.experiment.job.SAVED_EVERY", 0.0)

    def replace(owner, name, number):
        whole, calls = getattr(owner, name), []

        def cut(*arguments, **options):
            calls.append(name)
            if len(calls) == number:
                raise RuntimeError("cut off")
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, cut)
        return calls

    return replace


@pytest.fixture(scope="session")
def language_folder(tmp_path_factory):
    """A folder with a corpus and a configuration, ``small``; not to be changed."""
    folder = tmp_path_factory.mktemp("language")
    write_corpus(folder / "corpus")
    write_config(folder / "small.yaml")
    return folder


@pytest.fixture(scope="session")
def trained(language_folder):
    """Commands in that folder, in which ``fit`` and ``evaluate`` have run."""
    gates = Gates(language_folder)
    gates.untrained = gates.succeed("evaluate", "--name", "untrained", "--most_bits", 2.5)
    gates.succeed("fit")
    gates.evaluated = gates.succeed("evaluate", "--most_bits", 2.5)
    return gates


@pytest.fixture(scope="session")
def weights(trained):
    """The folder of the model."""
    return trained.folder / "runs/language/small/weights/decoder-s0"
