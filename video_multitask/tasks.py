"""The behaviours that a feed predicts, and what kind each is: watch, interaction or negative."""

from recsys.schema import Task

WATCH, INTERACTION, NEGATIVE = "watch", "inter", "neg"

LABELS = {
    "effective_view": "is_click",
    "long_view": "long_view",
    "complete": "complete",
    "replay": "replay",
    "skip": "skip",
    "like": "is_like",
    "comment_stay": "comment_stay",
    "profile_enter": "is_profile_enter",
    "collect": "is_collect",
    "comment": "is_comment",
    "follow": "is_follow",
    "forward": "is_forward",
    "download": "is_download",
    "hate": "is_hate",
}
"""Column of each behaviour; those of KuaiRand keep their names."""

UNWANTED = frozenset({"skip", "hate"})
"""Behaviours that speak against a video: no list is ordered by them."""

NEEDS_DURATION = frozenset({"complete", "replay"})
KUAIRAND = (
    "effective_view", "long_view", "complete",
    "like", "follow", "comment", "forward", "profile_enter", "comment_stay", "hate",
)  # fmt: skip

POST_EXPOSURE = frozenset(
    {*LABELS.values(), "play_time_ms", "profile_stay_time", "comment_stay_time"}
)
"""Columns that exist only after the video was shown: labels and what they are made of."""


def category(behaviour: str) -> str:
    """Return the kind of a behaviour."""
    if behaviour in ("effective_view", "long_view", "complete", "replay", "skip"):
        return WATCH
    return NEGATIVE if behaviour == "hate" else INTERACTION


def simulated_tasks() -> tuple[Task, ...]:
    """Return the 14 tasks of the simulator; ``hate`` is an interaction."""
    kinds = {behaviour: category(behaviour) for behaviour in LABELS} | {"hate": INTERACTION}
    return tuple(Task(name, label=LABELS[name], category=kinds[name]) for name in LABELS)


def kuairand_tasks() -> tuple[Task, ...]:
    """Return the ten tasks of KuaiRand, ``hate`` in a category for itself.

    Those that need the duration, such as ``complete``, count only where it is known.
    """
    return tuple(
        Task(
            name,
            label=LABELS[name],
            category=category(name),
            mask="has_duration" if name in NEEDS_DURATION else "",
        )
        for name in KUAIRAND
    )
