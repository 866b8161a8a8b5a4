import torch
from torch.testing import assert_close

from diffusion.evaluation.judge import pixel_errors, ranks_of


def test_the_wanted_drawing_is_ranked_among_all():
    drawings = torch.eye(4).view(4, 1, 2, 2)
    images = torch.tensor([[0.9, 0.2, 0.0, 0.0], [0.0, 0.3, 0.2, 0.1]]).view(2, 1, 2, 2)
    assert ranks_of(images, drawings, torch.tensor([0, 3])).tolist() == [1, 3]
    assert ranks_of(images, drawings, torch.tensor([1, 1])).tolist() == [2, 1]


def test_equally_near_drawings_do_not_count_against_the_wanted_one():
    drawings = torch.zeros(3, 1, 2, 2)
    assert ranks_of(torch.ones(1, 1, 2, 2), drawings, torch.tensor([2])).tolist() == [1]


def test_pixel_errors_are_roots_of_mean_squares():
    images = torch.zeros(2, 3, 2, 2)
    drawings = torch.stack([torch.full((3, 2, 2), 0.5), torch.zeros(3, 2, 2)])
    assert_close(pixel_errors(images, drawings), torch.tensor([0.5, 0.0], dtype=torch.float64))
