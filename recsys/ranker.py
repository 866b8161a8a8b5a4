"""A ranking model: inputs of a row, then a multi-task network.

B rows, F sparse features, N dense inputs, D inputs of the network, T tasks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from recsys.embedding.bank import EmbeddingBank, spread_names
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.inputs import Encoded, InputLayer, UserPart, dense_inputs
from recsys.models.mmoe import Linear
from recsys.models.net import MultiTaskNet, whole
from recsys.regression import LogNormalHeads
from recsys.schema import FeatureSchema, Task

NetFactory = Callable[[int, Sequence[Task]], MultiTaskNet]
"""From the number of inputs and the tasks to a network."""


class NetSpec(NamedTuple):
    """How a network is built again.

    Attributes:
        name: Its name, see `recsys.models.network`.
        options: Its further arguments, plain values of JSON.
    """

    name: str
    options: dict[str, Any]


class Ranker(nn.Module):
    """Embeddings, encoders of histories and a multi-task network: from a row to logits.

    Args:
        schema: Features and tasks.
        sizes: Rows by name of the table, as a fitted transform gives them.
        dense_width: Dense inputs N, as a fitted transform gives them.
        net: Makes the network, given the number of inputs and the tasks. A network that wants
            several sets of embeddings gets them, each with its own encoders.
        prior: Features whose inputs the network gets as its prior.
        encoders: Further arguments of the encoders, by name of the history.
        calibrated: Whether it has intercepts, see `recsys.validation.calibrate`.
        spec: How ``net`` is built again from a file; see `build`.
        device: Device of tables and encoders.
        dtype: Floating dtype of tables and encoders.

    Attributes:
        layers: One `recsys.inputs.InputLayer` for each set of embeddings.
        net: The network.
        intercepts: Added to the logits (T,), 0 until it is calibrated; None for none.
        heads: From outputs of the network to logits, where the schema has regressions; else None.

    Raises:
        ValueError: Sizes, widths or names do not fit the schema or the network.
    """

    intercepts: Tensor | None
    heads: LogNormalHeads | None

    def __init__(
        self,
        schema: FeatureSchema,
        sizes: Mapping[str, int],
        dense_width: int,
        net: NetFactory,
        *,
        prior: Sequence[str] = (),
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        calibrated: bool = False,
        spec: NetSpec | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.schema, self.dense_width, self.spec = schema, dense_width, spec
        self.prior, self.encoders = tuple(prior), {n: dict(o) for n, o in (encoders or {}).items()}
        options: dict[str, Any] = {"encoders": self.encoders, "device": device, "dtype": dtype}
        first = InputLayer(schema, sizes, dense_width, **options)
        self.net = net(first.out_dim, schema.heads)
        dense_names = [name for name, _ in dense_inputs(schema)]
        self.heads = LogNormalHeads(schema, dense_names, device) if schema.regressions else None
        others = range(self.net.copies - 1)
        self.layers = nn.ModuleList(
            [first, *(InputLayer(schema, sizes, dense_width, **options) for _ in others)]
        )
        field_names = [field.name for field in first.bank.fields]
        if self.net.id_feature and self.net.id_feature not in field_names:
            raise ValueError(
                f"the network routes by {self.net.id_feature!r}, but the features with a table are "
                f"{', '.join(field_names)}"
            )
        self._check_ids(sizes, ValueError)
        start = torch.zeros(len(schema.tasks), device=device) if calibrated else None
        self.register_buffer("intercepts", start)
        columns = torch.tensor(first.columns(self.prior), dtype=torch.int64, device=device)
        self.register_buffer("prior_columns", columns, persistent=False)
        self.prior_columns: Tensor
        if len(columns) != self.net.prior_dim:
            raise ValueError(
                f"the network takes a prior of {self.net.prior_dim} inputs, but the features "
                f"{', '.join(self.prior) or '(none)'} have {len(columns)}: name them in prior"
            )

    @classmethod
    def build(
        cls,
        schema: FeatureSchema,
        sizes: Mapping[str, int],
        dense_width: int,
        name: str,
        options: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        **further: Any,
    ) -> Self:
        """Return a ranker with a network of the library, which can be saved.

        Args:
            schema: Features and tasks.
            sizes: Rows by name of the table.
            dense_width: Dense inputs N.
            name: Network, such as ``HoME``; see `recsys.models.network`.
            options: Its arguments, plain values of JSON.
            device: Device of everything.
            **further: See `Ranker`.

        Raises:
            GatesError: The network is unknown or has no such option.
            ValueError: Sizes, widths or names do not fit.
        """
        models: Any = importlib.import_module("recsys.models")
        made = dict(options or {})

        def net(input_dim: int, tasks: Sequence[Task]) -> MultiTaskNet:
            return cast(MultiTaskNet, models.build(name, made, input_dim, tasks, device=device))

        return cls(
            schema, sizes, dense_width, net, spec=NetSpec(name, made), device=device, **further
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by name of the table."""
        return dict(self.banks[0].sizes)

    def inputs(self, sparse: Tensor, dense: Tensor, sequences: Sequence[Tensor] = ()) -> Tensor:
        """Return the inputs of the network (B, D); (B, copies, D) if it wants several sets.

        Args:
            sparse: Rows of the tables (B, F), int64.
            dense: Scaled numbers and indicators (B, N).
            sequences: Rows of the tables (B, L) of each history.

        Raises:
            ValueError: A shape does not fit, or a row lies outside of its table.
        """
        return self._joined([layer(sparse, dense, sequences) for layer in self.input_layers])

    def forward(self, sparse: Tensor, dense: Tensor, sequences: Sequence[Tensor] = ()) -> Tensor:
        """Return the logits (B, T); see `inputs`."""
        return self.logits(self.inputs(sparse, dense, sequences), dense, self.ids(sparse))

    def ids(self, sparse: Tensor) -> Tensor | None:
        """Return what the network routes by (B,), of the rows of the tables (B, F); None if not."""
        name = self.net.id_feature
        return sparse[:, self.banks[0].column(name)] if name else None

    def logits(self, v: Tensor, dense: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return the logits (B, T) of `outputs` and dense inputs (B, N)."""
        return self.logits_of(self.outputs(v, ids), dense)

    def logits_of(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """Return the logits (B, T) of the outputs of the network (B, H) and dense inputs (B, N)."""
        logits = outputs if self.heads is None else cast(Tensor, self.heads(outputs, dense))
        return logits if self.intercepts is None else logits + self.intercepts.to(logits)

    def outputs(self, v: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return what the network gives (B, H) for inputs (B, D) or (B, copies, D), and ids."""
        further: list[Tensor | None] = []
        if self.prior:
            first = v if v.ndim == 2 else v[:, 0]
            further = [first.index_select(1, self.prior_columns)]
        if ids is not None:
            further = [*(further or [None]), ids]
        return cast(Tensor, self.net(v, *further))

    def user_inputs(self, user: Encoded) -> tuple[UserPart, ...]:
        """Return what is computed once for all candidates of a user.

        Args:
            user: One row, also a ``Batch``; its features of item and context are not read.

        Raises:
            ValueError: There are more rows, or a shape does not fit.
        """
        return tuple(layer.user_part(user) for layer in self.input_layers)

    def score_candidates(self, user: Encoded | tuple[UserPart, ...], candidates: Encoded) -> Tensor:
        """Return the logits (N, T) of N candidates, as `forward` of complete rows would.

        Args:
            user: One row, or what `user_inputs` made of it.
            candidates: N rows, also a ``Batch``; their features of the user are not read.

        Raises:
            ValueError: A shape does not fit, or a row lies outside of its table.
        """
        if hasattr(user, "dense"):
            user = self.user_inputs(cast(Encoded, user))
        pairs = zip(self.input_layers, cast(tuple[UserPart, ...], user), strict=True)
        inputs = [layer.with_user(part, candidates) for layer, part in pairs]
        rows, name = candidates.sparse, self.net.id_feature
        if name and self.banks[0].field(name).side == "user":
            rows = cast(tuple[UserPart, ...], user)[0].sparse.expand(len(rows), -1)
        return self.logits(self._joined(inputs), candidates.dense, self.ids(rows))

    def start_from(self, other: Ranker) -> None:
        """Take over tables, encoders, heads and linear model of a ranker with the net ``Linear``.

        Every set of embeddings starts as the other's. What is deep in ``WideAndDeep`` starts at
        zero, so that the logits are those of the other ranker; intercepts are left as they are.

        Args:
            other: Trained on rows of the same transform.

        Raises:
            GatesError: The network is neither ``Linear`` nor ``WideAndDeep``, the other's is not
                ``Linear``, or shapes differ.
        """
        if not isinstance(self.net, Linear) or type(other.net) is not Linear:
            raise GatesError(
                f"{type(self.net).__name__} cannot start from {type(other.net).__name__}: Linear "
                "and WideAndDeep start from Linear"
            )
        pairs: list[Any] = [
            *((layer, other.layers[0]) for layer in self.layers),
            (self.net.linear, other.net.linear),
            *([] if self.heads is None else [(self.heads, other.heads)]),
        ]
        try:
            for mine, theirs in pairs:
                mine.load_state_dict(theirs.state_dict())
        except (AttributeError, RuntimeError) as error:
            raise GatesError(
                "the ranker cannot start from one with another schema or other tables: "
                f"{' '.join(str(error).split())}"
            ) from error

    def tables(self) -> list[nn.Parameter]:
        """Return the embedding tables, for ``RowWiseAdagrad``."""
        return [table for bank in self.banks for table in bank.tables()]

    def dense_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but the tables, for Adam."""
        tables = {id(table) for table in self.tables()}
        return [parameter for parameter in self.parameters() if id(parameter) not in tables]

    def all_shared(self) -> list[tuple[nn.Parameter, slice]]:
        """Return every parameter that tasks share with its shared rows, tables aside, for PCGrad.

        These are parameters of the network, and encoders of histories.
        """
        layers = [self.input_layers[copy] for copy in self.net.shared_copies]
        return [*self.net.all_shared(), *whole(*(layer.encoders for layer in layers))]

    def count_params(self) -> dict[str, int]:
        """Return the number of weights of ``tables``, ``encoders`` and ``net``."""
        of_encoders = [p for layer in self.input_layers for p in layer.encoders.parameters()]
        return {
            "tables": sum(table.numel() for table in self.tables()),
            "encoders": sum(parameter.numel() for parameter in of_encoders),
            "net": sum(parameter.numel() for parameter in self.net.parameters()),
        }

    def grow(self, sizes: Mapping[str, int], optimizer: RowWiseAdagrad | None = None) -> None:
        """Append rows to the tables; see `recsys.embedding.bank.EmbeddingBank.grow`.

        Raises:
            GatesError: See there; or the network has fewer ids than rows to route.
        """
        self._check_ids(self.sizes | dict(sizes), GatesError)
        for bank in self.banks:
            bank.grow(sizes, optimizer)

    def folded(self, *, int8: bool = False) -> Self:
        """Return a copy for inference, batch normalization folded into weights where possible.

        Args:
            int8: Whether its tables become 8-bit integers with a scale per row.
        """
        made = deepcopy(self, {id(self.net): self.net.folded()})
        if int8:
            for bank in made.banks:
                bank.to_int8()
        for table in made.modules():
            if isinstance(table, nn.Embedding):
                table.sparse = False  # gradients only; compilers have no sparse lookup
        return made.requires_grad_(False).eval()

    def _check_ids(self, sizes: Mapping[str, int], error: type[Exception]) -> None:
        """Refuse a table with more rows than gates that route by identity have ids."""
        name, most = self.net.id_feature, self.net.num_ids
        if not name or most is None:
            return
        rows = sizes[self.banks[0].field(name).table]
        if rows > most:
            raise error(
                f"the network routes by {name!r}, whose table has {rows} rows, but its gates know "
                f"{most} ids: give its gate_options a num_ids of {rows} or more, room for later "
                "values included"
            )

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Tables that exchange gradients by themselves; read by ``DistributedDataParallel``."""
        return spread_names(self)

    @property
    def banks(self) -> list[EmbeddingBank]:
        """One bank of tables for each set of embeddings."""
        return [layer.bank for layer in self.input_layers]

    @property
    def input_layers(self) -> list[InputLayer]:
        """One layer of inputs for each set of embeddings."""
        return [cast(InputLayer, layer) for layer in self.layers]

    def _joined(self, inputs: list[Tensor]) -> Tensor:
        return inputs[0] if len(inputs) == 1 else torch.stack(inputs, 1)


def input_width(schema: FeatureSchema, **options: Any) -> int:
    """Return the number of inputs D of a network for a schema, whatever the sizes of its tables.

    Args:
        schema: Features.
        **options: Those of `recsys.inputs.InputLayer`.
    """
    from recsys.embedding.lookup import fields_of

    sizes = {field.table: 2 for field in fields_of(schema)}
    width = len(dense_inputs(schema))
    return InputLayer(schema, sizes, width, device="meta", **options).out_dim
