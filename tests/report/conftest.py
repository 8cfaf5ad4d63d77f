"""A run as the other rooms write it: a tiny model measured on real shards, a log, a config."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from webdataset import TarWriter

from vlm.config.load import dump_config, load_config
from vlm.data.tally import Tally
from vlm.eval.suite import evaluate
from vlm.training.run_log import RunLog
from vlm.training.step import StepResult

COUNTERS = {"bad_samples": 1, "bad_by_reason": {"image.truncated": 1}, "skipped_steps": 1}
COLOURS = ["red", "green", "blue", "yellow", "black", "white"]


@pytest.fixture(scope="session")
def squares(encoded):
    """Writes 12 pictures of 6 colours; the largest is 200 pixels wide."""

    def squares(path, captions=lambda colour: [f"a {colour} square"]):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TarWriter(str(path)) as writer:
            for number, colour in enumerate(COLOURS * 2):
                meta = {"captions": captions(colour), "label": colour}
                png = encoded(colour, width=200 if number < 6 else 40)
                fields = {"png": png, "json": json.dumps(meta).encode()}
                writer.write({"__key__": f"{number // 6}-{colour}", **fields})
        return path

    return squares


@pytest.fixture(scope="session")
def parse():
    return Page


def write_log(path, num_steps=3):
    log = RunLog(path, num_steps=num_steps, global_batch_size=8, every_steps=1)
    for step in range(num_steps):
        loss = 3.0 / (step + 1)
        terms = {"loss": 2 * loss, "loss/contrastive": loss, "loss/caption": loss}
        skipped = step == 1
        result = StepResult(
            terms={**terms, "loss": float("nan")} if skipped else terms,
            grad_norm=1.0,
            skipped=skipped,
            lr=1e-3,
            logit_scale=14.3,
            num_valid=8,
            num_duplicates=0,
            num_tokens=99,
            padding_waste=0.25,
            bad=Tally(),
        )
        log.write(step, result, data_wait_s=0.0, counters=COUNTERS)
    log.close()


@pytest.fixture(scope="session")
def run(model, squares, tmp_path_factory) -> Path:
    """Everything a run folder can hold. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "squares"
    shards = squares(folder.parent / "data" / "squares-0000.tar")
    suite = folder.parent / "suite.yaml"
    tasks = [
        {"task": task, "split": split, "data": str(shards)}
        for split in ("val", "test")
        for task in ("zero_shot", "retrieval", "caption")
    ]
    suite.write_text(json.dumps({"tasks": tasks}))
    evaluate(model, suite, out=folder / "results.json", log=lambda line: None)
    config = folder.parent / "config.yaml"
    config.write_text("{train: {steps: 3, global_batch_size: 8}, optim: {warmup_steps: 1}}")
    (folder / "config.yaml").write_text(dump_config(load_config(config)))
    command = {"command": ["vlm", "train", "a b.yaml"], "vlm": "0.1.0", "torch": "2.x"}
    (folder / "command.json").write_text(json.dumps(command))
    write_log(folder / "metrics.jsonl")
    place = {"shard": "squares-0000.tar", "key": "0-<red>", "offset": 1536}
    row = {"reason": "image.truncated", "count": 1, "examples": [place]}
    (folder / "bad_samples.jsonl").write_text(json.dumps(row) + "\n")
    return folder


class Page(HTMLParser):
    """A parsed page: its elements, their text, and whether every element is closed."""

    VOID = ("img", "meta")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def of_class(self, name):
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]

    @property
    def headings(self):
        return [a["id"] for a in self.all("section")]
