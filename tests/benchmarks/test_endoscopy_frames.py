import torch
from torch.testing import assert_close

from benchmarks import endoscopy
from benchmarks.comparison import load_head


def test_all_renderers_draw_the_same_objects(monkeypatch):
    monkeypatch.setattr(endoscopy, "SIDE", 32)
    monkeypatch.setattr(endoscopy, "RENDERED", 2)
    comparison = endoscopy.frames()
    calls = comparison.build(load_head)
    assert (calls.keys(), comparison.units[endoscopy.FRAMES_OURS]) == (comparison.units.keys(), 2)
    for number in range(3):
        seen = {name: call() for name, call in calls.items()}
        expected = seen[endoscopy.EAGER_RENDERER]
        assert expected.number == number
        assert torch.equal(expected.images, seen[endoscopy.APERTURE].images)
        difference = seen[endoscopy.FRAMES_OURS].images.float() - expected.images.float()
        assert difference.abs().median() <= 2
        assert not torch.equal(seen[endoscopy.FRAMES_OURS].depths, expected.depths)


def test_every_form_of_the_seam_has_the_gradients_of_the_formula():
    calls = endoscopy.gated_residual_norm((2, 5, 16)).build(load_head)
    expected = calls[endoscopy.EAGER]()
    assert len(expected) == 5
    assert all(grad.abs().sum() > 0 for grad in expected)
    assert_close(calls[endoscopy.OURS](), expected, rtol=1e-4, atol=1e-5)
