import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import weather
from core_gates.errors import GatesError
from weather.baselines.covariance import GridPoints
from weather.experiments.ensemble.source import Era5EnsembleSource
from weather.grid import gaussian_grid
from weather.models.adas.analysis import AdasAnalysis, AnalysisForm, load_weights, save_weights
from weather.observations.gridded import GriddedObservations, innovation_sd
from weather.state import Normalizer
from weather.training.stream import stack

SHAPE = (2, 3, 16, 32)
MEAN = torch.tensor([10000.0, 5.0, -2.0])
STD = torch.tensor([300.0, 15.0, 11.0])
SIGMA = torch.tensor([40.0, 4.0, 2.0])


class Stub(nn.Module):
    """Answers ``factor`` times the gated observation stream, whatever the form."""

    increment_mode = False

    def __init__(self, output, factor=1.0):
        super().__init__()
        self.output, self.factor = output, factor

    def forward(self, background, observation, gate):
        self.seen = background, observation, gate
        return self.factor * gate * observation


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(dtype=torch.float32):
    noise = torch.randn(2, *SHAPE, generator=draw(), dtype=dtype)
    background = MEAN.to(dtype)[:, None, None] + STD.to(dtype)[:, None, None] * noise[0]
    values = background + 3 * SIGMA.to(dtype)[:, None, None] * noise[1]
    errors = SIGMA.to(dtype)[:, None, None] * (0.5 + torch.rand(SHAPE, generator=draw(1)).to(dtype))
    seen = torch.rand(SHAPE, generator=draw(2)) < 0.3
    return background, GriddedObservations(values, errors).withhold(seen)


def analysis_of(network, kind="error", scale=1.0):
    options = {"confidence_kind": kind, "confidence_scale": scale}
    return AdasAnalysis(network, Normalizer(MEAN, STD), SIGMA, **options)


def test_a_unit_increment_is_scalar_optimal_interpolation():
    """With ``net = c d`` the increment form must be x_b + (y - x_b) sigma_b^2/(sigma_b^2 + s^2)."""
    background, observations = problem(torch.float64)
    analysis = analysis_of(Stub("increment"))(background, observations)
    variance = SIGMA.double()[:, None, None] ** 2
    weight = variance / (variance + observations.errors**2)
    expected = background + weight * (observations.values - background)
    assert_close(analysis, torch.where(observations.mask, expected, background))
    assert analysis.dtype == torch.float64


def test_the_official_form_takes_and_returns_normalized_states():
    background, observations = problem(torch.float64)
    network = Stub("analysis")
    analysis = analysis_of(network, "binary")(background, observations)
    units = Normalizer(MEAN, STD)
    expected = units.normalize(observations.values) * observations.mask
    assert_close(network.seen, (units.normalize(background), expected, observations.mask.double()))
    assert_close(analysis, units.denormalize(expected))
    unseen = ~observations.mask  # a normalised zero is the climatological mean
    assert_close(analysis[unseen], MEAN.double()[:, None, None].expand_as(analysis)[unseen])


def test_absent_observations_cannot_be_seen(small_adas):
    """What an absent cell holds, be it the climate or a wild value, changes nothing."""
    background, observations = problem()
    wild = torch.where(observations.mask, observations.values, 1e6)
    for output in ("increment", "analysis"):
        network = small_adas(output=output)
        nn.init.normal_(network.recovery.surface.weight, std=0.1)
        analysis = analysis_of(network)
        same = analysis(background, observations._replace(values=wild))
        assert torch.equal(analysis(background, observations), same)


def test_background_error_estimated_from_the_innovations():
    """Its factor scales what the network sees, the confidence and the increment alike."""
    background, observations = problem(torch.float64)
    network = Stub("increment")
    options = {"background_error": "innovation", "confidence_scale": 2.0}
    analysis = AdasAnalysis(network, Normalizer(MEAN, STD), SIGMA, **options)
    found = innovation_sd(background, observations, SIGMA)
    assert (found > 1.5 * SIGMA).all()  # the departures of `problem` have three times the errors
    unit = found[..., None, None]
    result = analysis(background, observations)
    innovation = torch.where(observations.mask, observations.values - background, 0) / unit
    gate = 4 * unit**2 / (4 * unit**2 + observations.errors**2)
    assert_close((network.seen[1], network.seen[2]), (innovation, gate))
    assert_close(result, background + unit * gate * innovation)


@pytest.mark.parametrize("output", ["increment", "analysis"])
@pytest.mark.parametrize("kind", ["error", "binary"])
def test_background_error_of_each_problem(output, kind):
    """A (B,C) argument acts row by row; in the official form it acts through the gate alone."""
    background, observations = problem()
    sd = torch.stack((SIGMA, 3 * SIGMA))
    analysis = analysis_of(Stub(output), kind)
    both = analysis(background, observations, sd)
    for row in range(2):
        one = GriddedObservations(
            observations.values[row : row + 1], observations.errors[row, None]
        )
        alone = analysis.expecting(sd[row]).analyze(background[row : row + 1, None], one)[:, 0]
        assert_close(both[row : row + 1], alone)
        assert_close(analysis(background[row : row + 1], one, sd[row]), alone)
    own = analysis(background, observations)
    assert_close(own[:1], both[:1])
    unaffected = kind == "binary"  # increments in units of sigma come back in units of sigma
    assert torch.allclose(own[1], both[1], rtol=1e-5, atol=1e-3) is unaffected


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("output", ["increment", "analysis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_observations_the_background_stays(small_adas, output, dtype, mode):
    """To the last bit, also of one problem among others; in increment mode by the network alone."""
    network = small_adas(output=output, increment_mode=mode)
    for weights in network.recovery.parameters():
        nn.init.normal_(weights, std=0.3)  # an increment starts at zero, which proves nothing
    analysis = analysis_of(network.to(dtype)).to(dtype)
    background, observations = problem(dtype)
    nothing = observations.withhold(torch.tensor(False))
    assert torch.equal(analysis(background, nothing), background)
    sd = SIGMA.to(dtype)[:, None, None].expand_as(background)
    assert torch.equal(analysis._analysis(background, nothing, sd), background) is mode
    first = observations.withhold(torch.tensor([True, False])[:, None, None, None])
    found = analysis(background, first)
    assert torch.equal(found[1], background[1])
    assert_close(found[0], analysis(background, observations)[0])
    assert ((found[0] - background[0]).abs().mean((-2, -1)) > 1e-2 * SIGMA).all()


def test_shipped_networks_of_real_fields_keep_a_background_without_observations():
    source = Era5EnsembleSource()
    source.setup()
    folder = Path(weather.__file__).parent / "weights/era5_ensemble/weights/adas_increment-s0"
    analysis = AnalysisForm().load(folder)
    problems = stack([source.problem(step, 0) for step in (0, 1)])
    silent = problems.observations.withhold(torch.tensor([False, True])[:, None, None, None])
    found = analysis.analyze(problems.background.unsqueeze(1), silent)[:, 0]
    assert torch.equal(found[0], problems.background[0])
    assert not torch.equal(found[1], problems.background[1])


def test_float32_observations_of_a_float64_network(small_adas):
    background, observations = problem(torch.float64)
    for output in ("increment", "analysis"):
        analysis = analysis_of(small_adas(output=output).double())
        assert analysis(background, observations.to(torch.float32)).dtype == torch.float64


@pytest.mark.fault("46 W2")
def test_increments_end_with_the_reports(small_adas):
    """The whole increment within 2,500 km of a report, none of it from 5,000 km on."""
    analysis = analysis_of(small_adas().double())
    for weights in analysis.network.recovery.parameters():
        nn.init.normal_(weights, std=0.3)  # an increment starts at zero, which proves nothing
    grid, (fields, reports) = gaussian_grid(16, 32), problem(torch.float64)
    seen = torch.zeros(2, 1, 16, 32, dtype=torch.bool)
    places = [3 * 32 + 2, 5 * 32 + 8], [31]
    for row, cells in enumerate(places):
        seen[row].view(-1)[cells] = True
    background = fields.unsqueeze(1)
    reports = GriddedObservations(reports.values, torch.where(seen, 1.0, torch.inf).expand(SHAPE))
    whole = analysis.analyze(background, reports) - background
    ended = analysis.expecting(SIGMA, grid).analyze(background, reports) - background
    for row, cells in enumerate(places):
        km = GridPoints(grid).distances(torch.tensor(cells)).amin(0).view(16, 32)
        share = 0.5 + 0.5 * (torch.pi * (km / 2500 - 1).clamp(0, 1)).cos()
        assert whole[row][..., km > 5000].abs().max() > 1
        assert ended[row][..., km >= 5000].abs().max() == 0
        assert_close(ended[row], whole[row] * share, rtol=0, atol=1e-6)


def test_a_network_learns_after_an_analysis_and_from_it(small_adas):
    background, observations = problem()
    analysis = analysis_of(small_adas(seed=1))
    first = analysis.analyze(background.unsqueeze(1), observations).squeeze(1)
    assert (first.is_inference(), first.requires_grad) == (False, False)
    (analysis(first, observations) * first).sum().backward()
    assert all(p.grad is not None for p in analysis.parameters())


def test_weights_come_back_as_bfloat16(small_adas, tmp_path):
    analysis, path = analysis_of(small_adas(seed=1)), tmp_path / "new" / "a.b.safetensors"
    save_weights(path, analysis, form="adas_increment", seed=3)
    assert [file.name for file in path.parent.iterdir()] == ["a.b.safetensors"]
    loaded = analysis_of(small_adas(seed=2))
    loaded.background_sd.fill_(1.0)
    assert load_weights(path, loaded) == {"form": "adas_increment", "seed": 3}
    assert torch.equal(loaded.background_sd, SIGMA)  # units are not rounded
    assert torch.equal(loaded.normalizer.mean, MEAN)
    for name, value in analysis.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value.bfloat16().float())
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("network.position").dtype == torch.bfloat16


def refusal(path, analysis):
    before = {name: value.clone() for name, value in analysis.state_dict().items()}
    with pytest.raises(GatesError) as caught:
        load_weights(path, analysis)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    after = analysis.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return message


def test_unreadable_weights_are_one_line(small_adas, tmp_path):
    analysis, path = analysis_of(small_adas()), tmp_path / "w.safetensors"
    assert "not readable" in refusal(path, analysis)
    assert "not readable" in refusal(tmp_path, analysis)  # a folder
    save_weights(path, analysis)
    whole = path.read_bytes()
    for length in (0, 4, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "not readable" in refusal(path, analysis)
    path.write_bytes(b"\x93NUMPY" + whole)
    assert "not readable" in refusal(path, analysis)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 8}, "dim is 4, expected 8"),
        ({"decoder_depth": 2}, "decoder_depth is 1, expected 2"),
        ({"output": "analysis"}, "output is increment, expected analysis"),
        ({"gated": False}, "gated is True, expected False"),
        ({"circular_longitude": False}, "circular_longitude is True, expected False"),
    ],
)
def test_weights_of_another_configuration_are_named(small_adas, tmp_path, changes, named):
    """Three of these have the same tensors: only the stored form distinguishes them."""
    path = tmp_path / "w.safetensors"
    save_weights(path, analysis_of(small_adas()))
    assert named in refusal(path, analysis_of(small_adas(**changes)))
    assert "confidence_kind" in refusal(path, analysis_of(small_adas(), "binary"))
    assert "confidence_scale" in refusal(path, analysis_of(small_adas(), scale=0.5))
    load_weights(path, analysis_of(small_adas(drop_path=0.3)))  # has no bearing on the weights


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("background_sd", torch.ones(4), "1 tensors differ, first background_sd"),
        ("extra", torch.ones(1), "1 tensors differ, first extra"),
        ("background_sd", SIGMA * torch.inf, "1 tensors are not finite, first background_sd; give"),
        (
            "normalizer.mean",
            MEAN * torch.nan,
            "1 tensors are not finite, first normalizer.mean; give",
        ),
    ],
)
def test_other_tensors_and_numbers_that_are_not_finite_are_refused(
    small_adas, tmp_path, name, tensor, words
):
    path, analysis = tmp_path / "w.safetensors", analysis_of(small_adas())
    tensors = {key: value.clone() for key, value in analysis.state_dict().items()}
    save_file(tensors | {name: tensor}, path, metadata={"facts": json.dumps({})})
    assert words in refusal(path, analysis)


@pytest.mark.parametrize("key", ["form", "facts"])
@pytest.mark.parametrize("content", ["{", "3", "[1]"])
def test_metadata_that_is_no_json_is_refused(small_adas, tmp_path, key, content):
    path, analysis = tmp_path / "w.safetensors", analysis_of(small_adas())
    save_file(analysis.state_dict(), path, metadata={key: content})
    assert "not readable" in refusal(path, analysis)


@pytest.mark.fault("weather Bg")
def test_weights_of_another_grid_blame_the_grid(small_adas, tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(path, analysis_of(small_adas(grid_shape=(16, 64)), "binary"))
    words = "weights of another grid ([16, 64] points, expected [16, 32]); give weights"
    assert words in refusal(path, analysis_of(small_adas()))


def test_weights_say_their_form_and_seed(small_adas, tmp_path, refused):
    path, analysis = tmp_path / "w.safetensors", analysis_of(small_adas())
    save_weights(path, analysis, form="adas_increment", seed=1)
    assert load_weights(path, analysis, form="adas_increment", seed=1)["seed"] == 1
    refused(
        "weights of seed 1, expected 2; give the file",
        load_weights,
        path,
        analysis,
        form="adas_increment",
        seed=2,
    )


class Seen(nn.Module):
    """A network of four variables, two of them on two levels, that keeps what it is given."""

    output, increment_mode, num_channels = "increment", False, 12
    arguments = {"num_surface": 4, "num_upper": 4, "num_levels": 2}  # noqa: RUF012

    def forward(self, background, observation, gate):
        self.given = background, observation, gate
        return torch.arange(12.0)[None, :, None, None].expand_as(background)


def test_a_guided_network_sees_the_increment_next_to_every_variable(refuses):
    network, sd = Seen(), torch.full((6,), 2.0)
    units = Normalizer(torch.zeros(6), torch.ones(6))
    analysis = AdasAnalysis(network, units, sd, guided=True)
    background = torch.randn(1, 6, 4, 8, generator=draw())
    observations = GriddedObservations(background + 4.0, torch.ones_like(background))
    found = analysis(background, observations, interpolated=background + 6.0)
    state, innovation, gate = (part[0].mean((1, 2)) for part in network.given)
    own = background[0].mean((1, 2))
    three = torch.full((1,), 3.0)
    # Two surface variables, their increments, two variables on two levels, their increments.
    assert_close(state, torch.cat((own[:2], three.repeat(2), own[2:], three.repeat(4))))
    assert_close(innovation, torch.tensor([2.0] * 2 + [3.0] * 2 + [2.0] * 4 + [3.0] * 4))
    assert_close(gate[[2, 3, 8, 11]], torch.ones(4))
    assert float(gate[0]) == pytest.approx(0.8)
    increments = torch.tensor([0.0, 1.0, 4.0, 5.0, 6.0, 7.0])[:, None, None]
    assert_close(found, background + 2 * increments)
    refuses(
        ValueError,
        (
            "scale must be positive, got 0",
            lambda: AdasAnalysis(network, units, sd, confidence_scale=0),
        ),
        (
            "'training' or 'innovation', got 'guess'",
            lambda: AdasAnalysis(network, units, sd, background_error="guess"),
        ),
        ("needs the analysis of interpolation", lambda: analysis(background, observations)),
        ("returns an increment", lambda: AdasAnalysis(Stub("analysis"), units, sd, guided=True)),
    )


def test_a_guided_network_is_kept_as_one(small_adas, tmp_path, refused):
    network = small_adas(num_surface=6)
    units = Normalizer(torch.zeros(3), torch.ones(3))
    analysis = AdasAnalysis(network, units, SIGMA, guided=True)
    for weights in network.recovery.parameters():
        nn.init.normal_(weights, std=0.3)
    AnalysisForm().save(tmp_path, analysis)
    found = AnalysisForm().load(tmp_path)
    background, observations = problem()
    guess = background + 5.0
    expected = analysis(background, observations, interpolated=guess)
    assert found.guided
    assert_close(found(background, observations, interpolated=guess), expected, rtol=0.1, atol=3.0)
    refused(
        "guided", load_weights, tmp_path / AnalysisForm.FILE, analysis_of(small_adas(num_surface=6))
    )
