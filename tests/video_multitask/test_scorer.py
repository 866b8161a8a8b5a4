import polars as pl
import pytest
import torch
from torch import nn

from core_gates.errors import GatesError
from recsys.models.net import MultiTaskNet
from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse
from video_multitask.feed import add_context, add_sides, simulated_tasks
from video_multitask.history import add_history
from video_multitask.scorer import FusedScore, Scorer

ranker = pytest.importorskip("recsys.ranker")
transforms = pytest.importorskip("recsys.transform")

SCHEMA = FeatureSchema(
    tasks=simulated_tasks()[:6],
    sparse=(
        Sparse("user_id", side="user"), Sparse("onehot_feat1", side="user"), Sparse("tab"),
        Sparse("video_id", side="item"), Sparse("first_tag", side="item"),
    ),
    dense=(
        Dense("follow_user_num", side="user"), Dense("duration_ms", side="item"),
        Dense("position", scaling="standardize"),
    ),
    sequences=(History("past_video_id", "video_id", 8, "target_attention"),),
    crossed=(Crossed(("onehot_feat1", "first_tag"), buckets=64),),
    user="user_id",
)  # fmt: skip


class Net(MultiTaskNet):
    def __init__(self, input_dim, tasks):
        super().__init__(input_dim, tasks)
        self.layer = nn.Linear(input_dim, len(tasks))

    def forward(self, v, prior=None):
        return self.layer(v)


@pytest.fixture(scope="module")
def rows(feed):
    log = add_history(feed.log[:4_000], 8, ("video_id",))
    return add_context(add_sides(log, feed.users, feed.videos))


@pytest.fixture(scope="module")
def scorer(rows):
    torch.manual_seed(0)
    transform = transforms.FeatureTransform(SCHEMA).fit(rows)
    made = ranker.Ranker(SCHEMA, transform.sizes, transform.dense_width, Net)
    for table in made.tables():
        nn.init.normal_(table, std=0.5)
    fused = FusedScore(SCHEMA.task_names, {"effective_view": 1.0, "like": 0.5}, {"like": 0.1})
    return Scorer(made, transform, fused, at_once=7)


VIDEO = ["video_id", "first_tag", "duration_ms"]


@pytest.fixture(scope="module")
def request_and_candidates(rows):
    return rows[3_000:3_001].drop(VIDEO), rows[100:130].select(VIDEO)


def test_candidates_get_what_complete_rows_get(scorer, request_and_candidates):
    request, candidates = request_and_candidates
    found = scorer.probabilities(scorer.visitor(request), candidates)
    batch = scorer.transform.batch(pl.concat([request] * len(candidates)).with_columns(candidates))
    with torch.no_grad():
        expected = scorer.ranker(batch.sparse, batch.dense, batch.sequences).sigmoid()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_user_is_encoded_once(scorer, request_and_candidates, monkeypatch):
    request, candidates = request_and_candidates
    calls = []
    original = scorer.ranker.user_inputs
    monkeypatch.setattr(scorer.ranker, "user_inputs", lambda u: calls.append(1) or original(u))
    visitor = scorer.visitor(request)
    first = scorer.probabilities(visitor, candidates[:10])
    second = scorer.probabilities(visitor, candidates[10:])
    assert len(calls) == 1
    together = scorer.probabilities(visitor, candidates)
    torch.testing.assert_close(torch.cat([first, second]), together)


def test_a_ranked_list_is_ordered_by_the_fused_score(scorer, request_and_candidates):
    request, candidates = request_and_candidates
    ranked = scorer.rank(request, candidates, top=5)
    assert ranked.columns == [*VIDEO, *SCHEMA.task_names, "score"]
    assert ranked["score"].is_sorted(descending=True)
    found = scorer.probabilities(scorer.visitor(request), candidates)
    best = scorer.fused(found).argmax()
    assert ranked["video_id"][0] == candidates["video_id"][int(best)]
    assert ranked["score"][0] == pytest.approx(float(scorer.fused(found).max()))
    assert len(scorer.rank(scorer.visitor(request), candidates[:0])) == 0


def test_columns_of_the_moment_may_differ_between_candidates(scorer, request_and_candidates):
    request, candidates = request_and_candidates
    visitor = scorer.visitor(request)
    here = scorer.probabilities(visitor, candidates)
    later = scorer.probabilities(visitor, candidates.with_columns(position=pl.lit(40)))
    assert (here - later).abs().max() > 1e-3


def test_wrong_requests_are_refused(scorer, request_and_candidates, refuses):
    request, candidates = request_and_candidates
    with pytest.raises(GatesError, match="a request needs one row of its user, got 2"):
        scorer.visitor(pl.concat([request, request]))
    visitor = scorer.visitor(request)
    refuses(
        GatesError,
        (
            "the candidates lack duration_ms; they have video_id",
            lambda: scorer.probabilities(visitor, candidates.drop("duration_ms")),
        ),
        (
            "the candidates have columns like, which are results",
            lambda: scorer.rank(visitor, candidates.with_columns(like=pl.lit(1))),
        ),
    )
    plain = Scorer(scorer.ranker, scorer.transform)
    with pytest.raises(GatesError, match="are ordered by a fused score; give one to the scorer"):
        plain.rank(visitor, candidates)
