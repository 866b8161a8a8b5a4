"""The endoscopy stop of the tour, with the shipped network on a few rendered polyps."""

from apps.endoscopy import tour as endoscopy_tour
from harness.report.page import Page


def test_the_stop_sizes_fresh_polyps_beside_both_baselines(monkeypatch, tmp_path):
    monkeypatch.setattr(endoscopy_tour, "OBJECTS", 12)
    monkeypatch.setattr(endoscopy_tour, "TRAINING_OBJECTS", 20)
    monkeypatch.setattr(endoscopy_tour, "VALIDATION_OBJECTS", 10)
    said = []
    stop = endoscopy_tour.tour(tmp_path, said.append)
    assert said[0] == "rendered 42 objects"
    assert [row.system for row in stop.rows] == [
        "Feature-selection gates, gradient routing",
        "Conformal intervals",
    ]
    error = float(stop.rows[0].value.split()[0])
    assert error < 0.25 < float(stop.rows[0].baseline.removeprefix("constant ").split(",")[0])
    page = Page("tour")
    stop.draw(page)
    assert page.html().count("data:image/png;base64,") == 3
    assert "Research only" in page.html()
