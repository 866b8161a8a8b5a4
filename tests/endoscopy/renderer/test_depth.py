import torch
from torch.testing import assert_close

from endoscopy.renderer import light as depths
from endoscopy.renderer.light import degrade


def _depth():
    far = torch.linspace(8, 60, 40).expand(2, 40, 40).clone()
    far[:, :3] = 0
    return far


def _degrade(depth, seed=0):
    return degrade(depth, torch.Generator().manual_seed(seed))


def test_inverse_depth_is_known_up_to_an_affine_map(monkeypatch):
    monkeypatch.setattr(depths, "NOISE", 0.0)
    depth = _depth()
    seen = _degrade(depth)
    inner = (slice(None), slice(5, -2), slice(2, -2))
    for frame, truth in zip(1 / seen[inner], 1 / depth[inner], strict=True):
        design = torch.stack([truth.flatten(), torch.ones(truth.numel())], 1)
        fit = torch.linalg.lstsq(design, frame.flatten().unsqueeze(1)).solution
        assert_close(design @ fit, frame.flatten().unsqueeze(1), rtol=0.02, atol=0)
        assert 0.45 < fit[0] < 1.55
        assert fit[1] > 0
    assert (seen - depth).abs()[inner].median() > 1


def test_maps_differ_between_frames_and_absent_depth_stays_absent():
    depth = _depth()
    seen = _degrade(depth)
    assert torch.equal(seen == 0, depth == 0)
    ratio = (seen / depth.clamp(min=1)).flatten(1).median(1).values
    assert abs(ratio[0] - ratio[1]) > 0.01
    assert torch.equal(seen, _degrade(depth))
    assert not torch.equal(seen, _degrade(depth, 1))
