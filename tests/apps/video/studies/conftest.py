import pytest

MODEL = {
    "model.net": "HoME",
    "model.options.dim": 4,
    "model.options.hidden_dims": [8],
    "model.options.rank": [2, 2],
    "model.options.tower_dims": [4],
    "model.learning_rate": 0.01,
    "model.embedding_learning_rate": 0.1,
}


@pytest.fixture(scope="session")
def settings():
    """Settings of a tiny network; rows of a source are added."""
    return {"seed": 0, **MODEL}
