"""An own log, written without the project: what the commands make of it by default."""

import csv
import json
import math
import random
import re

import polars as pl
import pytest

PREPARE = ("--table.user", "reader", "--table.item", "book", "--table.time", "day")


def write_log(path, shuffled=False, rows=21_000, seed=7):
    """400 readers like books by three hidden tastes; cheap ones among them are bought."""
    draw, out = random.Random(seed), []
    tastes = [[draw.gauss(0, 1) for _ in range(3)] for _ in range(400)]
    kinds = [[draw.gauss(0, 1) for _ in range(3)] for _ in range(500)]
    appeal = [draw.gauss(0, 0.7) for _ in range(500)]
    for row in range(rows):
        reader, book = draw.randrange(400), min(int(draw.expovariate(1 / 120)), 499)
        price = round(math.exp(draw.gauss(2, 0.5)), 2)
        like = sum(a * b for a, b in zip(tastes[reader], kinds[book], strict=True)) + appeal[book]
        click = draw.random() < 1 / (1 + math.exp(1 - like))
        buy = click and draw.random() < 1 / (1 + math.exp(price / 8 - like))
        out.append([row // 1500, f"r{reader:04d}", f"b{book:04d}", price, int(click), int(buy)])
    labels = [line[4:] for line in out]
    if shuffled:
        draw.shuffle(labels)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["day", "reader", "book", "price", "click", "buy"])
        writer.writerows([*line[:4], *label] for line, label in zip(out, labels, strict=True))


@pytest.fixture(scope="module")
def own(gates_in, tmp_path_factory):
    """Commands in a folder with both logs, each with its draft."""
    gates = gates_in(tmp_path_factory.mktemp("own"))
    for name in ("log", "shuffled"):
        write_log(gates.folder / f"{name}.csv", shuffled=name == "shuffled")
        words = ["--table.labels", "{click: look, buy: act}", *PREPARE, "--output", f"draft_{name}"]
        said = gates.succeed("video", "prepare", f"{name}.csv", *words).out
        assert "- (reader) * (book): product, how well a user and an item fit" in said
        assert "hierarchy" not in said
        both = f"--config table --config draft_{name}/table.yaml --name draft_{name}\n"
        assert f"gates video fit {both}" in said
        assert f"gates video evaluate {both}" in said
    return gates


def fit(gates, name, *words):
    """``fit`` with the defaults of the table; the losses of the network and of base rates."""
    config = ("--config", "table", "--config", f"draft_{name}/table.yaml", "--name", name)
    said = gates.succeed("video", "fit", *config, *words).out
    first = re.search(r"^validation loss of base rates: (\S+)$", said, re.MULTILINE)
    last = re.search(r"validation loss of HoME: (\S+), of base rates: (\S+)", said)
    assert first[1] == last[2]
    assert said.index(first[0]) < said.index("epoch 0")
    return said, float(last[1]), float(last[2])


@pytest.mark.slow
def test_a_planted_signal_is_found_and_shuffled_labels_are_told(own):
    said, loss, base = fit(own, "log")
    assert loss < base - 0.05
    assert "WARNING" not in said
    epochs = [int(n) for n in re.findall(r"^epoch (\d+) ", said, re.MULTILINE)]
    assert 4 < max(epochs) < 39  # patience, not the cap
    said, loss, base = fit(own, "shuffled")
    assert loss > base - 0.01
    assert f"WARNING: HoME is not shown to beat base rates, {loss:.4f} against {base:.4f}" in said
    for name, epochs in (("log", 8), ("shuffled", 1)):
        words = ("--config", "table", "--config", f"draft_{name}/table.yaml", "--name", name)
        short = ("--contest.trials", 1, "--seeds", 0, "--trainer.max_epochs", epochs)
        said = own.succeed("video", "evaluate", *words, "--only", "home,base_rates", *short).out
        scores = json.loads((own.folder / f"runs/video/{name}/scores.json").read_text())
        rows = [r for r in scores["rows"] if r["metric"] == "summed log_loss" and not r["versus"]]
        found = {row["method"]: row["value"] for row in rows}
        assert (found["home"] < found["base_rates"] - 0.02) == (name == "log")
        told = "home is not shown to beat base rates" in said
        assert told == any("not shown to beat" in note for note in scores["notes"])
        assert told == (name == "shuffled")  # with intercepts both losses are level there


def test_ids_of_another_form_and_single_tasks_are_told(own, tmp_path):
    """r0365 in training, 365 in the rows to score; a rare new book alone is no warning."""
    words = ("--config", "table", "--config", "draft_log/table.yaml", "--name", "short")
    short = ("--trainer.max_steps", 2, "--trainer.limit_val_batches", 1)
    words += ("--data.source.init_args.schema.tasks", '[{"name": "click"}]')
    said = own.succeed("video", "fit", *words, *short).out
    assert "all tasks are in one category, so that the hierarchy of HoME is empty" in said
    rows = pl.read_csv(own.folder / "log.csv")[-1000:]
    rows = rows.with_columns(
        reader=pl.col("reader").str.slice(1).cast(int),
        book=pl.when(pl.int_range(pl.len()) < 30).then(pl.lit("b9999")).otherwise("book"),
    )
    rows.write_csv(tmp_path / "rows.csv")
    said = own.succeed("video", "score", tmp_path / "rows.csv", "--name", "short").out
    line = r"^WARNING: reader: 1,000 of 1,000 rows \(100\.0%\) hold values that training has not"
    known = r"0\.0% of those that validated it"
    right = rf"{line} seen, {known}: are they written as in training, as 'r\d{{4}}'\?$"
    assert re.search(right, said, re.MULTILINE)
    line = r"^book: [34]\d of 1,000 rows \([34]\.\d%\) hold values that training has not seen, "
    assert re.search(rf"{line}0\.\d% of those that validated it$", said, re.MULTILINE)
