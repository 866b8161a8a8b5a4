"""Files of adapters that tests of several rooms share."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.evaluation.parity.files import dialects as names
from diffusion.evaluation.parity.files import factors, writer


@pytest.fixture(scope="session")
def dialects():
    """The independent writer: ``write``, ``product``, ``NAMES``, ``PREFIXES``, ``kinds_of`` …"""
    return SimpleNamespace(**vars(names) | vars(factors) | vars(writer))


@pytest.fixture(scope="session")
def relative_error():
    """The largest error of the layers of a bundle, relative to the largest entry of each ΔW."""

    def measure(bundle, expected, base=None):
        assert set(bundle.modules) == set(expected)
        errors = []
        for name, delta in expected.items():
            weight = None if base is None else base[name]
            found = bundle.delta_weight(name, weight).double().numpy()
            errors.append(np.abs(found - delta).max() / np.abs(delta).max())
        return max(errors)

    return measure


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
    import gguf

    def write(model, path):
        eight = gguf.GGMLQuantizationType.Q8_0
        writer = gguf.GGUFWriter(str(path), "flux")
        for name, tensor in model.state_dict().items():
            values = tensor.float().numpy()
            if values.ndim == 2 and values.shape[1] % 32 == 0:
                writer.add_tensor(name, gguf.quants.quantize(values, eight), raw_dtype=eight)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
