"""What the captioner learns beside captions: questions with their answers."""

import io
import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from vlm.data.dataset import open_shards
from vlm.data.loader import training_batches
from vlm.data.order import SampleOrder
from vlm.data.questions import NOTHING, Questions, conversation
from vlm.data.transforms import TrainTransform
from vlm.tokenizer import train_bpe

NUM = 12
PAIRS = [{"question": "what is it?", "answer": "a cat"}, {"question": "how many?", "answer": "two"}]


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["a picture", *(f"{p['question']} {p['answer']}" for p in PAIRS)]
    return train_bpe(texts, vocab_size=300, context_length=12)


@pytest.fixture
def start(make_shard, tokenizer):
    """Batches of samples of which the first has no questions, and the second broken ones."""
    opened = []

    def start(questions, **options):
        fields = [{}, {"qa": [{"question": 5}]}, *({"qa": PAIRS} for _ in range(NUM - 2))]
        samples = [
            (f"s{n:02}", {"json": json.dumps({"caption": "a picture", **more}).encode()})
            for n, more in enumerate(fields)
        ]
        dataset = open_shards(str(make_shard(with_pictures(samples), "part-0.tar")))
        batches = training_batches(
            dataset,
            SampleOrder(dataset.shard_sizes, seed=1, streams=1, global_batch_size=NUM),
            transform=TrainTransform(8),
            tokenizer=tokenizer,
            seed=0,
            micro_batch_size=NUM,
            questions=questions,
            **options,
        )
        opened.append(batches)
        return batches

    yield start
    for batches in opened:
        batches.close()


def with_pictures(samples):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return [(key, {**fields, "png": file.getvalue()}) for key, fields in samples]


def turns(tokens, targets, tokenizer):
    """What is given and what is learned of it, in turns; each ends where the end is learned."""
    found, given, said = [], [], []
    for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        if not said and token != tokenizer.sot_id:
            given.append(token)
        if target != NOTHING:
            said.append(target)
        if target == tokenizer.eot_id:
            found.append((tokenizer.decode(given), tokenizer.decode(said)))
            given, said = [], []
    return found


def given_and_learned(batch, tokenizer, row):
    texts = batch.head_texts
    return turns(texts.tokens[row], texts.targets[row], tokenizer)


def learned(batch, tokenizer):
    rows = [row for row in range(NUM) if batch.valid[row]]
    return {int(batch.sample_ids[r]): given_and_learned(batch, tokenizer, r) for r in rows}


def test_only_the_answer_is_learned_and_the_caption_is_left_to_the_encoders(start, tokenizer):
    batch = next(start(Questions("qa", 1.0)))
    found = learned(batch, tokenizer)
    assert found.pop(0) == [("", "a picture")]
    expected = {(pair["question"], pair["answer"]) for pair in PAIRS}
    assert {turn for turns in found.values() for turn in turns} == expected
    for row in batch.valid.nonzero()[:, 0]:
        assert tokenizer.decode(batch.tokens[row][1:]) == "a picture"


def test_a_broken_field_is_a_bad_sample(start):
    batch = next(start(Questions("qa", 1.0)))
    assert batch.bad.as_json()["counts"] == {"text.questions": 1}
    assert int((~batch.valid).sum()) == 1


def test_the_fraction_decides_how_often(start, tokenizer):
    asked = 0
    for batch in islice(start(Questions("qa", 0.25)), 60):
        asked += sum(turns[0][0] != "" for turns in learned(batch, tokenizer).values())
    assert asked / (60 * (NUM - 2)) == pytest.approx(0.25, abs=0.06)


def test_what_is_asked_depends_on_no_worker_and_no_start(start, tokenizer):
    questions = Questions("qa", 0.5)
    expected = [learned(b, tokenizer) for b in islice(start(questions), 6)]
    late = start(questions, num_workers=2, first_micro_batch=3)
    assert [learned(b, tokenizer) for b in islice(late, 3)] == expected[3:]


def test_pictures_and_captions_are_those_of_a_run_without_questions(start):
    plain, asked = next(start(None)), next(start(Questions("qa", 0.5)))
    assert plain.head_texts is None
    rows = asked.valid
    assert plain.images[rows].equal(asked.images[rows])
    assert plain.tokens[rows].equal(asked.tokens[rows])


def answers_of(pairs, tokenizer, context_length):
    def encode(text):
        ids = tokenizer.encode(text)
        return np.array(
            ids if len(ids) <= context_length else [*ids[: context_length - 1], ids[-1]]
        )

    text = conversation(pairs, encode, context_length)
    assert len(text.tokens) == len(text.targets) <= context_length
    assert text.tokens[0] == tokenizer.sot_id
    assert list(text.tokens).index(tokenizer.eot_id) == len(text.tokens) - 1
    # what is learned follows what is read, or is the end where another turn begins
    follows = np.append(text.tokens[1:], NOTHING)
    assert set(text.targets[text.targets != follows]) <= {NOTHING, tokenizer.eot_id}
    return turns(text.tokens, text.targets, tokenizer)


def test_questions_follow_one_another_while_there_is_room(tokenizer):
    pairs = [(pair["question"], pair["answer"]) for pair in PAIRS]
    lengths = [len(tokenizer.encode(f"{q} {a}")) - 2 for q, a in pairs]
    assert answers_of(pairs, tokenizer, 2 + sum(lengths)) == pairs
    assert answers_of(pairs, tokenizer, 1 + sum(lengths)) == pairs[:1]
    assert answers_of(pairs[::-1], tokenizer, 1 + sum(lengths)) == pairs[:0:-1]


def test_a_shorter_question_takes_the_room_that_a_longer_one_does_not_fit_in(tokenizer):
    pairs = [("how many?", "two"), ("what is it?", "a cat a cat a cat"), ("how many?", "two")]
    short, long = (len(tokenizer.encode(f"{q} {a}")) - 2 for q, a in pairs[:2])
    assert long > short
    assert answers_of(pairs, tokenizer, 2 + 2 * short) == [pairs[0], pairs[2]]


def test_an_answer_without_room_is_cut_where_nothing_else_fits(tokenizer):
    long, short = ("what is it?", "a cat a cat"), ("how many?", "two")
    length = len(tokenizer.encode(long[0])) + 1
    [(question, answer)] = answers_of([long], tokenizer, length)
    assert question == long[0]
    assert long[1].startswith(answer.strip())
    if len(tokenizer.encode(" ".join(short))) < length:
        assert answers_of([long, short], tokenizer, length) == [short]


def test_a_question_without_room_for_its_answer_is_not_asked(tokenizer):
    def encode(text):
        ids = tokenizer.encode(text)
        return np.array(ids if len(ids) <= length else [*ids[: length - 1], ids[-1]])

    length = len(tokenizer.encode("what is it?"))
    assert conversation([("what is it?", "a cat")], encode, length) is None
