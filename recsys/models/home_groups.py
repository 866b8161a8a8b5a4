"""Who sees whom in HoME: the groups of tasks, their experts and the masks of their gates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core_gates.errors import check_at_least
from recsys.schema import Task

SHARED = "shared"
Counts = int | Mapping[str, int]


@dataclass(frozen=True)
class Forest:
    """Tasks by category, in order of appearance; both layers of HoME are made of it.

    Attributes:
        categories: Names of the categories.
        tasks: Names of the tasks of each category.
    """

    categories: tuple[str, ...]
    tasks: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> "Forest":
        """Return the forest of some tasks.

        Raises:
            ValueError: A category or a task has the name of another group.
        """
        categories = tuple(dict.fromkeys(task.category for task in tasks))
        members = [tuple(t.name for t in tasks if t.category == c) for c in categories]
        names = [*categories, *(name for row in members for name in row), SHARED]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"tasks, categories and {SHARED!r} are groups of experts and need different names,"
                f" but {', '.join(map(repr, repeated))} name two groups: rename the categories"
            )
        return cls(categories, tuple(members))

    @property
    def meta_groups(self) -> tuple[str, ...]:
        """Groups of the first layer: the categories, then the shared one."""
        return (*self.categories, SHARED)

    @property
    def task_names(self) -> tuple[str, ...]:
        """Tasks, those of a category next to each other."""
        return tuple(name for row in self.tasks for name in row)

    @property
    def task_groups(self) -> tuple[str, ...]:
        """Groups of the second layer: every category after its tasks, then the shared one."""
        rows = zip(self.tasks, self.categories, strict=True)
        return (*(name for tasks, category in rows for name in (*tasks, category)), SHARED)

    def category_of(self, group: str) -> int:
        """Return the number of the category of a task, or of a category."""
        rows = zip(self.tasks, self.categories, strict=True)
        return next(c for c, (tasks, name) in enumerate(rows) if group in (*tasks, name))


def counts_of(counts: Counts, groups: Sequence[str], name: str) -> list[int]:
    """Return the number of experts of each group, from one number for all or from a table.

    Groups that the table lacks have one expert.

    Raises:
        ValueError: A number is below 1, or the table names another group.
    """
    if isinstance(counts, int):
        table = dict.fromkeys(groups, counts)
    else:
        table = dict.fromkeys(groups, 1) | dict(counts)
    if strangers := sorted(set(table) - set(groups)):
        raise ValueError(
            f"{name} names {', '.join(map(repr, strangers))}; the groups are {', '.join(groups)}"
        )
    check_at_least(1, **{f"{name}[{group!r}]": number for group, number in table.items()})
    return [table[group] for group in groups]


def owners(groups: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return the group of every expert."""
    return [group for group, count in zip(groups, counts, strict=True) for _ in range(count)]


def meta_masks(
    forest: Forest, owner: Sequence[str], *, mask: bool, self_gate: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the masks of gates and self gates (categories + 1, experts) of the first layer.

    A category sees its own experts and the shared ones, the shared group all.
    """
    groups = forest.meta_groups
    seen = [[not mask or g == SHARED or o in (g, SHARED) for o in owner] for g in groups]
    return torch.tensor(seen), _self_mask(groups, owner) if self_gate else None


def task_masks(
    forest: Forest, owner: Sequence[str], runs: Sequence[int], *, mask: bool, self_gate: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the masks of gates and self gates (tasks, outputs) of the second layer.

    A task sees its own experts, those of its category and the shared ones; of an expert that is
    applied to the input of every category, the output for its own category.

    Args:
        forest: Groups.
        owner: Group of the expert of every output.
        runs: Which of the outputs of its expert every output is; -1 for the only one.
        mask: Whether gates see their groups only.
        self_gate: Whether there are self gates.
    """
    groups, seen = forest.task_names, []
    for task in groups:
        c = forest.category_of(task)
        mine = (task, forest.categories[c], SHARED)
        outputs = zip(owner, runs, strict=True)
        seen.append([(not mask or o in mine) and run in (-1, c) for o, run in outputs])
    return torch.tensor(seen), _self_mask(groups, owner) if self_gate else None


def _self_mask(groups: Sequence[str], owner: Sequence[str]) -> Tensor:
    return torch.tensor([[o == g for o in owner] for g in groups])
