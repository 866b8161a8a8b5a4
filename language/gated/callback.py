"""Output gates next to the adapter of PEFT, in every checkpoint of `transformers.Trainer`."""

import functools
import warnings
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError
from language.gated.attach import output_gates
from language.gated.state import load_gates, save_gates
from language.hf.locate import require_transformers

FILE = "gates.safetensors"


class GateCallback(require_transformers().TrainerCallback):  # type: ignore[misc]
    """Write and read the output gates of a PeftModel wherever its adapter is written and read.

    PEFT writes adapters alone. With ``Trainer(..., callbacks=[GateCallback()])`` every checkpoint,
    and every folder of ``save_model``, holds ``gates.safetensors`` next to the adapter; the gates
    are read from it by ``train(resume_from_checkpoint=...)`` and ``load_best_model_at_end``.
    Another model is saved whole, gates included, and left as it is.
    """

    def on_init_end(
        self, _args: Any, _state: Any, _control: Any, model: Any = None, **_others: Any
    ) -> None:
        """Let the model keep its gates from now on.

        Raises:
            GatesError: It has none.
        """
        gates = output_gates(model)
        if hasattr(model, "get_base_model") and not any(g.is_kept for g in gates.values()):
            model.save_pretrained = functools.partial(_save, model, model.save_pretrained)
            model.load_adapter = functools.partial(_load, model, model.load_adapter)
        for gate in gates.values():
            gate.is_kept = True

    def on_train_begin(
        self, _args: Any, _state: Any, _control: Any, model: Any = None, **_others: Any
    ) -> None:
        """Refuse a callback that came too late to read the gates of a checkpoint.

        Raises:
            GatesError: It was not given to the constructor, or the gates are others since.
        """
        if not all(gate.is_kept for gate in output_gates(model).values()):
            raise GatesError(
                "the gates of this model are not kept: attach them first, then give"
                " Trainer(..., callbacks=[GateCallback()])"
            )


def _save(model: Any, save: Any, save_directory: Any, *args: Any, **options: Any) -> None:
    save(save_directory, *args, **options)
    save_gates(model, Path(save_directory) / FILE)


def _load(model: Any, load: Any, model_id: Any, *args: Any, **options: Any) -> Any:
    """Read an adapter, and the gates in its folder, or in that of all adapters above it."""
    loaded = load(model_id, *args, **options)
    if path := next(filter(Path.is_file, (Path(model_id, FILE), Path(model_id, "..", FILE))), None):
        load_gates(model, path)
    else:
        warnings.warn(
            f"{model_id} holds no {FILE}, so that the output gates stay as they are: it was saved"
            " without GateCallback",
            stacklevel=2,
        )
    return loaded
