"""What watching the experts costs: training steps with and without their report.

The report is that of ``ExpertReportCallback`` with its defaults: 1,024 rows, the same each time.
"""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from benchmarks.recsys.networks import SIZES, home_of
from benchmarks.registry import Call, Comparison, Load

EVERY = 100
BAR = 1.05
SINGLE_CALLS = {"3.2 M weights": 1, "tiny": 8}


def reported(size: str) -> Comparison:
    """Return a step of HoME alone, and with a report of its experts in one of a hundred.

    Args:
        size: Name of the sizes.
    """
    sizes = SIZES[size]

    def build(load: Load) -> Mapping[str, Call]:
        home = home_of(load, sizes).train()
        draw = torch.Generator().manual_seed(1)
        shape = sizes.rows, sizes.tasks
        batch = load("recsys.diagnosis.diagnose").Rows(
            torch.randn(sizes.rows, sizes.inputs, generator=draw),
            torch.randint(2, shape, generator=draw).float(),
            torch.ones(shape, dtype=torch.bool),
            torch.ones(sizes.rows),
        )
        adam = torch.optim.Adam(home.parameters(), fused=True)
        kind = load("recsys.diagnosis.diagnose").ExpertReportCallback
        report = kind(EVERY, forward=lambda rows: home(rows.v))
        trainer = SimpleNamespace(global_step=0, loggers=[], is_global_zero=True)
        home.device = torch.device("cpu")  # of a Lightning module

        def step() -> None:
            loss = F.binary_cross_entropy_with_logits(home(batch.v), batch.labels)
            adam.zero_grad()
            loss.backward()
            adam.step()

        def step_of(number: int) -> object:
            step()
            trainer.global_step += number
            report.on_train_batch_end(trainer, home, None, batch, 0)
            return report.report

        def passed_over() -> object:
            return step_of(0)  # that of the last report

        def measured() -> object:
            return step_of(1 if report.report is None else EVERY)

        return {"alone": step, "step passed over": passed_over, "step reported": measured}

    return Comparison(
        name=f"training step of HoME of {size}, one in {EVERY} reported",
        op="expert_report",
        build=build,
        baseline="alone",
        bars={"ExpertReport": BAR},
        mixtures={"ExpertReport": {"step passed over": 1 - 1 / EVERY, "step reported": 1 / EVERY}},
        single_calls=SINGLE_CALLS[size],
        unit="step",
        memory=2.0e9,
    )
