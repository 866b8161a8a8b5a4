"""What is compared: variants of one computation, their limits, and what is measured of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

Load = Callable[[str], ModuleType]
Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What one call must at least do, for the fraction of the machine's limit.

    Attributes:
        bytes: Bytes that must be read and written.
        flops: Floating-point operations that must be done.
    """

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Peaks:
    """What variants need of memory at once beyond the baseline, on the CPU.

    Attributes:
        bars: Variant -> largest extra peak over ``whole``; None for a figure without a bar.
        whole: Bytes that the extra peak is compared with.
        name: What these bytes are.
    """

    bars: Mapping[str, float | None]
    whole: float
    name: str


@dataclass(frozen=True)
class Figure:
    """What else is measured once, such as an error or the memory of a process.

    Attributes:
        measure: Returns the figure.
        unit: Its unit.
        bar: Largest figure over ``whole``.
        whole: What the figure is compared with, in its unit.
        name: What this is.
    """

    measure: Callable[[], float]
    unit: str
    bar: float
    whole: float = 1.0
    name: str = "1"


@dataclass(frozen=True)
class Comparison:
    """Variants of one computation, timed alternately.

    Attributes:
        name: What is computed.
        op: Name under which ``--op`` finds it.
        build: Makes the inputs and returns the variants, name to function. It gets a function that
            imports a module, of this tree or of the one that ``--base`` names.
        baseline: The variant that the ratios refer to; without ratios if it is absent.
        bars: Highest ratio to the baseline that a variant may have.
        work: What one call must do; None where no limit makes sense.
        units: How many units of work a call of a variant does (members, days), one if not named;
            times are given per unit.
        unit: Unit of work, for the name of the figure.
        rate: Unit of a second figure for every variant, units of work in a second; empty for none.
        first_calls: Variants whose first call is reported too, since it compiles.
        absent: Variants that cannot be timed here, name to reason; reported, never passed over.
        memory: Bytes needed at once; a comparison that does not fit is skipped.
        single_calls: That many single calls of every variant, interleaved, take the place of one
            sample, for differences smaller than the drift of the machine between two samples.
        tails: Variants whose 99th percentile of the times is compared with their median, name to
            highest ratio; with ``single_calls``, so that there are enough of them.
        mixtures: Further variants, name to the weight of each variant that their time is made of.
        also: Variants whose ratio to another variant is reported, too, without a bar.
        peaks: Memory of variants; None if it is not measured.
        seconds: Variants whose time is limited, name to the most seconds of a unit of work.
        figures: What else is measured after the times, by name.
    """

    name: str
    op: str
    build: Callable[[Load], Mapping[str, Call]]
    baseline: str
    bars: Mapping[str, float] = field(default_factory=dict)
    work: Work | None = None
    units: Mapping[str, float] = field(default_factory=dict)
    unit: str = "call"
    rate: str = ""
    first_calls: Sequence[str] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    memory: float = 0.0
    single_calls: int = 0
    tails: Mapping[str, float] = field(default_factory=dict)
    mixtures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    peaks: Peaks | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
