"""Files of adapters that tests of several rooms share."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def dialects():
    """The independent writer: ``write``, ``product``, ``NAMES``, ``PREFIXES``, ``kinds_of`` …"""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("adapter_files.py"))))


@pytest.fixture(scope="session")
def relative_error():
    """The largest error of the layers of a bundle, relative to the largest entry of each ΔW."""
    from diffusion.evaluation.parity import delta_error

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
    import gguf

    def write(model, path):
        eight = gguf.GGMLQuantizationType.Q8_0
        writer = gguf.GGUFWriter(str(path), "flux")
        for name, tensor in model.state_dict().items():
            values, stored = tensor.float().numpy(), None
            if values.ndim == 2 and values.shape[1] % 32 == 0:
                values, stored = gguf.quants.quantize(values, eight), eight
            writer.add_tensor(name, values, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
