"""Files of adapters that tests of several rooms share."""

from types import SimpleNamespace

import pytest

from diffusion.evaluation.parity.files import dialects as names
from diffusion.evaluation.parity.files import factors, writer
from diffusion.evaluation.parity.files.reading import delta_error


@pytest.fixture(scope="session")
def dialects():
    """The independent writer: ``write``, ``product``, ``NAMES``, ``PREFIXES``, ``kinds_of`` …"""
    return SimpleNamespace(**vars(names) | vars(factors) | vars(writer))


@pytest.fixture(scope="session")
def relative_error():
    """The largest error of the layers of a bundle, relative to the largest entry of each ΔW."""
    return delta_error


@pytest.fixture(scope="session")
def one_line():
    """Return the message of a typed error, which must be one line of moderate length."""

    def call(kind, function, *args, **options):
        with pytest.raises(kind) as caught:
            function(*args, **options)
        message = str(caught.value)
        assert message
        assert message.isprintable()
        assert len(message) <= 1000
        return message

    return call


@pytest.fixture(scope="session")
def write_gguf():
    """``write_gguf(model, path)``: its matrices in Q8_0 where their rows allow it."""
    from diffusion.evaluation.parity.models import quantized

    return quantized.write_gguf
