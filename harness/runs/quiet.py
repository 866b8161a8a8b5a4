"""Messages of libraries that nobody needs, kept off the terminal."""

import logging
import os
import warnings

UNWANTED = (
    "The number of training batches",  # the log's interval exceeds the epoch: on purpose
    "The '.*dataloader' does not have many workers",  # small data is loaded faster without any
    "Your `IterableDataset` has `__len__` defined",  # streams here count their own steps
    "You're resuming from a checkpoint that ended before the epoch ended",  # see harness.runs.loops
    "`isinstance\\(treespec, LeafSpec\\)`",  # Lightning's use of torch
    "isinstance\\(treespec, LeafSpec\\)",
)


def quiet_lightning() -> None:
    """Keep Lightning to its warnings that matter here: no adverts, no list of absent hardware."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls of it
    for message in UNWANTED:
        warnings.filterwarnings("ignore", message=message)
