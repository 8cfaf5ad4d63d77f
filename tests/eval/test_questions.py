"""Answers compared word by word, against what the question alone gives away."""

import json

import pytest
import torch
from webdataset import TarWriter

from vlm.data.dataset import open_shards
from vlm.errors import DataError
from vlm.eval.questions import Asked, Blind, asked_of, questions
from vlm.eval.source import Source
from vlm.eval.statistics import mean_interval
from vlm.inference import VisionLanguageModel

COLOURS = ["red", "lime", "blue"]


class Looking(VisionLanguageModel):
    """Answers what colour the middle pixel is, and "Yes." to all else."""

    def __init__(self, model):
        super().__init__(model.model, model.config, model.tokenizer, torch.device("cpu"))
        self.batches = []

    def caption_pixels(self, images, *, prompt):
        assert len(images) == len(prompt)
        self.batches.append(len(images))
        middle = images[:, :, 16, 16].argmax(dim=1).tolist()
        return [
            COLOURS[colour] if "colour" in question else "Yes."
            for colour, question in zip(middle, prompt, strict=True)
        ]


def write(path, encoded, answers, pairs=True):
    """A picture for each colour, asked for its colour, and whether it is red."""
    with TarWriter(str(path)) as writer:
        for number, colour in enumerate(answers):
            meta = {
                "pair": f"p{number // 2}" if pairs else None,
                "qa": [
                    {"question": "what colour is it?", "answer": colour, "type": "colour"},
                    {
                        "question": f"is it {colour}?",
                        "answer": "no" if number % 4 == 3 else "yes",
                        "type": "exists",
                    },
                ],
            }
            fields = {"png": encoded(colour), "json": json.dumps(meta).encode()}
            writer.write({"__key__": f"{number}", **fields})
        writer.write({"__key__": "silent", "png": encoded("red"), "json": b"{}"})
    return open_shards(str(path), log=lambda _: None)


@pytest.fixture(scope="module")
def looking(make_model):
    return Looking(make_model())


@pytest.fixture(scope="module")
def dataset(encoded, tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "asked-0000.tar"
    return write(path, encoded, ["red", "red", "red", "blue", "lime", "red", "blue", "red"])


def test_answers_are_counted_by_type(looking, dataset):
    outcome = questions(Source(looking, dataset, log=lambda _: None))
    rows = {row.metric: row for row in outcome.rows}
    assert list(rows) == ["accuracy", "accuracy/colour", "accuracy/exists"]
    assert [row.n for row in rows.values()] == [16, 8, 8]
    assert rows["accuracy/colour"].value == 1
    assert rows["accuracy/exists"].value == 6 / 8  # always "Yes.", which is "yes"
    assert rows["accuracy"].value == 14 / 16
    # Without training data: red is right 5 of 8 times, yes 6 of 8
    assert [row.chance for row in rows.values()] == [11 / 16, 5 / 8, 6 / 8]
    assert outcome.details["num_without_question"] == 1
    wrong = [s for s in outcome.details["samples"] if not s["right"]]
    assert [s["key"] for s in wrong] == ["3", "7"]
    assert wrong[0]["generated"] == "Yes."


def test_intervals_resample_pairs(looking, dataset):
    row = questions(Source(looking, dataset, log=lambda _: None)).rows[2]
    right = [number % 4 != 3 for number in range(8)]
    assert row.ci95 == mean_interval(right, [number // 2 for number in range(8)])


def test_the_batch_size_is_that_of_questions_and_changes_nothing(looking, dataset):
    looking.batches.clear()
    results = [
        questions(Source(looking, dataset, batch_size=size, log=lambda _: None)).rows
        for size in (3, 64)
    ]
    assert results[0] == results[1]
    assert max(looking.batches[:-1]) == 3
    assert sum(looking.batches) == 32


def test_chance_is_what_the_question_alone_tells_where_that_is_more(
    looking, dataset, encoded, tmp_path
):
    train = write(tmp_path / "train-0000.tar", encoded, ["blue", "blue", "blue", "lime"])
    outcome = questions(Source(looking, dataset, log=lambda _: None), train_data=train)
    without = outcome.details["without_looking"]
    assert without["colour"] == {"best_constant": 5 / 8, "question_only": 2 / 8}  # all "blue"
    # "is it lime?" was "no" in training, all else "yes": wrong for lime and for what is "no" here
    assert without["exists"] == {"best_constant": 6 / 8, "question_only": 5 / 8}
    knowing = write(tmp_path / "knowing-0000.tar", encoded, ["red"] * 3 + ["blue", "lime"])
    told = questions(Source(looking, dataset, log=lambda _: None), train_data=knowing)
    rows = {row.metric: row for row in told.rows}
    assert told.details["without_looking"]["exists"]["question_only"] == 6 / 8
    assert rows["accuracy/colour"].chance == 5 / 8
    assert rows["accuracy"].chance == 11 / 16
    assert len({o.protocol for o in (outcome, told)}) == 2


def test_a_question_that_tells_its_answer_raises_chance(looking, encoded, tmp_path):
    data = write(tmp_path / "b-0000.tar", encoded, ["red", "red", "red", "blue"])
    outcome = questions(Source(looking, data, log=lambda _: None), train_data=data)
    rows = {row.metric: row for row in outcome.rows}
    assert rows["accuracy/exists"].chance == 1  # "is it blue?" is "no", "is it red?" is "yes"
    assert rows["accuracy/colour"].chance == 3 / 4
    assert rows["accuracy"].chance == 7 / 8


def test_blind_answers_by_question_then_by_type():
    pairs = [
        Asked("Is there a dog?", "no", "exists"),
        Asked("is there a dog", "No.", "exists"),
        Asked("is there a cat?", "yes", "exists"),
        Asked("is there a cow?", "yes", "exists"),
        Asked("is there a fox?", "yes", "exists"),
    ]
    blind = Blind(pairs)
    assert blind("is there a dog?", "exists") == "no"
    assert blind("is there an owl?", "exists") == "yes"
    assert blind("how many?", "count") == ""


def test_questions_that_are_none_are_told(looking, shards):
    for bad in ("text", ["x"], [{"question": "x", "answer": 3, "type": "t"}], [{"question": "x"}]):
        with pytest.raises(DataError, match='k: "qa" must be a list of'):
            asked_of({"qa": bad}, "k")
    source = Source(looking, open_shards(str(shards)), log=lambda _: None)
    with pytest.raises(DataError, match="no readable picture has a question"):
        questions(source)
