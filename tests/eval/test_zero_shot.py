"""The zero_shot task against CLIP_benchmark, on its own layout and on real pictures."""

import gc
import json

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from vlm.curate.source import open_data
from vlm.data.dataset import open_shards
from vlm.data.transforms import normalize
from vlm.errors import ConfigError, DataError
from vlm.eval.classification import zero_shot
from vlm.eval.finished import inputs_hash
from vlm.eval.labels import true_classes
from vlm.eval.source import Source
from vlm.eval.suite import evaluate
from vlm.eval.tasks import ZeroShotTask
from vlm.heads.zero_shot import ZeroShotClassifier, zero_shot_logits
from vlm.metrics import classification
from vlm.retrieval.embed import Item
from vlm.runtime import torchvision_guard

COLOURS = ["red", "green", "blue", "yellow", "black", "white"]
pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")


@pytest.fixture
def theirs(monkeypatch):
    """CLIP_benchmark's own functions."""
    torchvision_guard.install()
    from clip_benchmark.metrics import zeroshot_classification as module

    # 1.6.2 calls float() on arrays of one element, which NumPy 2.4 refuses.
    number = lambda value: value if isinstance(value, float) else value.item()  # noqa: E731
    monkeypatch.setattr(module, "float", number, raising=False)
    return module


@pytest.fixture(scope="module")
def folder(encoded, tmp_path_factory):
    """18 pictures as CLIP_benchmark's `convert_dataset` writes them; "blue" names two classes."""
    folder = tmp_path_factory.mktemp("wds") / "colours"
    names = [*COLOURS, "blue"]
    for split, num_shards in (("test", 11), ("train", 1)):
        (folder / split).mkdir(parents=True)
        (folder / split / "nshards.txt").write_text(f"{num_shards}\n")
        for shard in range(num_shards):
            with TarWriter(str(folder / split / f"{shard}.tar")) as writer:
                for number in range(shard, 18, num_shards):
                    sample = {"__key__": f"s{number:07}", "cls": number % 7}
                    png = encoded(names[number % 7], width=20 + number)
                    writer.write({**sample, "png": png})
    (folder / "classnames.txt").write_text("\n".join(names) + "\n")
    templates = folder / "zeroshot_classification_templates.txt"
    templates.write_text("a {c} square.\nthe {c}\n")
    return folder


class OpenClip:
    """Our model behind open_clip's methods."""

    def __init__(self, model):
        self.encode_image, self.encode_text = model.encode_image, model.encode_text


class Batches:
    """What CLIP_benchmark asks of a data loader."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        for pictures, labels in self.dataset.batched(4):
            yield torch.as_tensor(pictures), torch.as_tensor(labels)


def rows_of(outcome):
    return {row.metric: row for row in outcome.rows}


def values(results):
    return {result["metric"]: result["value"] for result in results}


def suite_of(path, **task):
    path.write_text(json.dumps({"tasks": [{"task": "zero_shot", "split": "a", **task}]}))
    return path


@pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle", "ignore::ResourceWarning")  # theirs
def test_a_folder_of_clip_benchmarks_gives_its_own_figures(model, folder, theirs, tmp_path):
    from clip_benchmark.datasets.builder import build_wds_dataset

    def transform(picture):
        return normalize(model.transform(picture), model.preprocess.mean, model.preprocess.std)

    dataset = build_wds_dataset("colours", transform, data_dir=str(folder))
    batches = Batches(dataset)
    expected = theirs.evaluate(
        OpenClip(model), batches, model.tokenizer, dataset.classes, dataset.templates, "cpu",
        amp=False,
    )  # fmt: skip
    gc.collect()  # the last shard, which webdataset leaves open
    suite = suite_of(tmp_path / "suite.yaml", data=str(folder))
    found = values(evaluate(model, suite, log=lambda _: None))
    assert expected["acc1"] > 0
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=1e-6)


def test_a_split_of_a_folder_takes_the_folders_names(model, folder, tmp_path):
    suite = suite_of(tmp_path / "suite.yaml", data=str(folder / "train"))
    evaluate(model, suite, out=tmp_path / "out.json", log=lambda _: None)
    details = json.loads((tmp_path / "out-eval" / "zero_shot-a.json").read_text())
    assert details["class_names"] == [*COLOURS, "blue"]
    assert details["templates"] == ["a {} square.", "the {}"]
    assert len(details["samples"]) == 18
    assert details["samples"][2]["truth"] == "blue (2)"


def test_what_a_suite_says_goes_before_the_folder(model, folder, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    given = {"labels": str(tmp_path / "names.txt"), "templates": ["{}"]}
    suite = suite_of(tmp_path / "suite.yaml", data=str(folder), **given)
    evaluate(model, suite, out=tmp_path / "out.json", log=lambda _: None)
    details = json.loads((tmp_path / "out-eval" / "zero_shot-a.json").read_text())
    assert (details["class_names"], details["templates"]) == (list("abcdefgh"), ["{}"])


def test_a_named_set_brings_its_names_and_templates(model, folder, tmp_path):
    suite = suite_of(tmp_path / "suite.yaml", data=str(folder / "test/*.tar"), labels="cifar100")
    evaluate(model, suite, out=tmp_path / "out.json", log=lambda _: None)
    details = json.loads((tmp_path / "out-eval" / "zero_shot-a.json").read_text())
    assert (len(details["class_names"]), len(details["templates"])) == (100, 18)
    assert details["samples"][0]["truth"] == "apple"  # its .cls is 0


@pytest.fixture(scope="module")
def emoji(make_model):
    """The emoji validation pictures, seen by a tiny model."""
    dataset = open_shards("datasets/emoji/val_artist-*.tar")
    return Source(make_model(), dataset, batch_size=128, log=lambda _: None)


def saved(source, field="label"):
    """Labels and logits of all pictures, from the features alone."""
    labels = [item.meta[field] for item in source.embedded.items]
    names = sorted(set(labels))
    weights = source.classifier(names, ["{}"]).weights
    return torch.tensor([names.index(label) for label in labels]), zero_shot_logits(
        source.embedded.features, weights
    )


def test_figures_on_real_pictures_equal_clip_benchmarks(emoji, theirs):
    from sklearn.metrics import balanced_accuracy_score

    rows = rows_of(zero_shot(emoji, templates="none"))
    labels, logits = saved(emoji)
    acc1, acc5 = theirs.accuracy(logits, labels, topk=(1, 5))
    assert rows["acc1"].value == pytest.approx(acc1, abs=1e-6)
    assert rows["acc5"].value == pytest.approx(acc5, abs=1e-6)
    recall = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert rows["mean_per_class_recall"].value == pytest.approx(recall, abs=1e-6)
    assert {row.n for row in rows.values()} == {len(labels)}
    assert all(row.ci95[0] <= row.value <= row.ci95[1] for row in rows.values())


def test_the_calibration_error_is_that_of_the_models_own_temperature(emoji):
    row = rows_of(zero_shot(emoji, templates="none"))["calibration_error"]
    labels, logits = saved(emoji)
    shares, first = (logits / 100 * emoji.model.logit_scale).softmax(dim=1).max(dim=1)
    hits = (first == labels).numpy()
    expected = classification.calibration_error(shares.double().numpy(), hits)
    assert row.value == pytest.approx(float(expected[0]), abs=1e-6)
    assert 0 < row.chance < 0.1
    sharper = (logits.softmax(dim=1).max(dim=1).values).double().numpy()
    assert classification.calibration_error(sharper, hits)[0] != pytest.approx(row.value, abs=1e-3)


def test_figures_do_not_depend_on_the_chunk(emoji, monkeypatch):
    whole = zero_shot(emoji, templates="none")
    monkeypatch.setattr("vlm.eval.classification._SCORES_AT_ONCE", 50_000)
    parts = zero_shot(emoji, templates="none")
    assert [row.value for row in parts.rows] == pytest.approx([row.value for row in whole.rows])
    assert parts.details["confusions"] == whole.details["confusions"]


def several(source, num_classes=6):
    """Each item with a list of labels, and the items of a source changed so."""
    generator = np.random.default_rng(0)
    for item in source.embedded.items:
        chosen = generator.random(num_classes) < 0.3
        item.meta["tags"] = [COLOURS[n] for n in np.flatnonzero(chosen)]


def test_labels_that_are_lists_give_clip_benchmarks_mean_average_precision(model, shards, theirs):
    source = Source(model, open_shards(str(shards)), log=lambda _: None)
    several(source)
    outcome = zero_shot(source, label="tags", class_names=[*COLOURS, "pink"], templates="none")
    (row,) = outcome.rows
    weights = source.classifier([*COLOURS, "pink"], ["{}"]).weights
    logits = zero_shot_logits(source.embedded.features, weights)
    tags = [item.meta["tags"] for item in source.embedded.items]
    targets = torch.tensor([[name in row for name in [*COLOURS, "pink"]] for row in tags])
    expected = theirs.average_precision_per_class(logits, targets)
    assert row.metric == "mean_average_precision"
    assert row.value == pytest.approx(float(expected.mean()), abs=1e-6)
    assert row.n == 12
    assert row.ci95[0] <= row.value <= row.ci95[1]
    assert outcome.details["average_precision"]["pink"] == 0
    first = outcome.details["samples"][0]
    assert (first["labels"], first["truth"]) == (
        sorted(tags[0], key=COLOURS.index),
        ", ".join(sorted(tags[0], key=COLOURS.index)),
    )


def test_a_jsonl_may_hold_lists_of_labels(model, encoded, tmp_path):
    tags = {"red": ["red", 3], "blue": ["blue"]}
    for colour in tags:
        (tmp_path / f"{colour}.png").write_bytes(encoded(colour))
    rows = [{"image": f"{colour}.png", "objects": listed} for colour, listed in tags.items()]
    (tmp_path / "voc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = open_data(str(tmp_path / "voc.jsonl"), cache_dir=tmp_path, log=lambda _: None)
    source = Source(model, dataset, log=lambda _: None)
    details = zero_shot(source, label="objects", class_names=COLOURS).details
    assert [sample["labels"] for sample in details["samples"]] == [["red", "yellow"], ["blue"]]


def items(*labels):
    return [Item(str(n), (), {} if v is None else {"cls": v}) for n, v in enumerate(labels)]


def test_a_class_may_be_given_by_its_number():
    truth = true_classes(items(1, "cat", None), None, ["cat", "dog"])
    assert (truth.field, truth.rows, truth.classes) == ("cls", [0, 1], [[1], [0]])


def test_a_number_is_a_number_also_where_a_name_looks_like_it():
    assert true_classes(items(1, "1"), None, ["1", "0"]).classes == [[1], [0]]
    assert true_classes(items(10, 9), None, None).class_names == ["10", "9"]


def test_a_text_of_digits_is_a_number_unless_it_is_a_name():
    assert true_classes(items("1", "0", "dog"), None, ["cat", "dog"]).classes == [[1], [0], [1]]
    assert true_classes(items(["1", "cat"]), None, ["cat", "dog"]).classes == [[0, 1]]
    assert true_classes(items("1", "0"), None, ["1", "2"]).classes == [[0], [0]]


@pytest.mark.parametrize("text", ["2", "-1", "1.0", "²", "9" * 5000])
def test_another_text_is_no_number(text):
    with pytest.raises(ConfigError, match="1 labels of the data are not among the 2 class names"):
        true_classes(items(text), None, ["cat", "dog"])


def relabelled(model, shards, name, values):
    """The squares, with a field of other values, which repeat."""
    source = Source(model, open_shards(str(shards)), log=lambda _: None)
    for number, item in enumerate(source.embedded.items):
        item.meta[name] = values[number % len(values)]
    return source


@pytest.mark.parametrize("values", [[0, 1, 2], ["0", "1", "2"], [-1, "07"], [[0, 1], [2], []]])
def test_numbers_without_names_are_refused(model, shards, values):
    source = relabelled(model, shards, "number", values)
    with pytest.raises(ConfigError, match=r"labels in 'number' are numbers .*give labels: FILE"):
        zero_shot(source, label="number", templates="none")


def test_a_name_among_numbers_makes_them_names(model, shards):
    source = relabelled(model, shards, "number", [0, 1, "many"])
    details = zero_shot(source, label="number", templates="none").details
    assert details["class_names"] == ["0", "1", "many"]


def pets(*numbers, names=("bird", "cat", "dog")):
    """Pictures of class folders, a number each."""
    return [
        Item(label, (), {"label": label, "cls": number, "path": f"{label}/a/1.png"})
        for label, number in zip(names, numbers, strict=True)
    ]


def test_folders_number_the_classes_if_all_are_there():
    names = ["bird", "cat", "dog"]
    assert true_classes(pets(0, 1, 2), "cls", names).classes == [[0], [1], [2]]
    for names in (["bird", "cat", "cow", "dog"], ["bird", "dog"]):
        problem = f"the 3 folders that are there, but there are {len(names)} class names; use label"
        with pytest.raises(ConfigError, match=problem):
            true_classes([*pets(0, 1, 2), *items(None)], "cls", names)


def test_numbers_that_are_not_of_folders_may_leave_out_classes():
    names = ["ape", "bird", "cat", "dog"]
    assert true_classes(pets(1, 2, 3), "cls", names).classes == [[1], [2], [3]]
    named = [Item(n, (), {"label": n, "cls": names.index(n)}) for n in ("ape", "bird")]
    assert true_classes(named, "cls", names).classes == [[0], [1]]
    assert true_classes(pets(0, 1, 2), "label", names).classes == [[1], [2], [3]]


def test_a_folder_that_lacks_a_class_is_refused(model, encoded, tmp_path):
    for colour in ("blue", "red"):
        (tmp_path / "squares" / colour).mkdir(parents=True)
        (tmp_path / "squares" / colour / "1.png").write_bytes(encoded(colour))
    dataset = open_data(str(tmp_path / "squares"), cache_dir=tmp_path, log=lambda _: None)
    source = Source(model, dataset, log=lambda _: None)
    with pytest.raises(ConfigError, match="numbers the 2 folders that are there, but there are 3"):
        zero_shot(source, label="cls", class_names=["blue", "green", "red"])
    assert zero_shot(source, class_names=["blue", "green", "red"]).details["samples"]
    assert zero_shot(source, label="cls", class_names=["sky", "blood"]).details["samples"]


def test_lists_of_labels_hold_names_and_numbers():
    truth = true_classes(items(["b", 0, "b"], [], "b"), None, ["a", "b"])
    assert truth.is_multi_label
    assert truth.classes == [[0, 1], [], [1]]


def test_a_name_of_several_classes_needs_numbers():
    names = ["missile", "cat", "missile"]
    assert true_classes(items(0, 2, "cat"), None, names).classes == [[0], [2], [1]]
    with pytest.raises(ConfigError, match=r"label 'missile' is the name of 2 classes \(0, 2\)"):
        true_classes(items("missile"), None, names)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_beyond_the_classes_is_named(number):
    with pytest.raises(ConfigError, match=f"1 labels of the data are not among the 2 .* {number};"):
        true_classes(items(number), None, ["cat", "dog"])


def test_without_any_label_the_fields_are_told():
    with pytest.raises(DataError, match="'label' or 'cls'; its fields are: none"):
        true_classes(items(None), None, None)


def test_a_suite_encodes_the_texts_of_a_classifier_once(make_model, shards, tmp_path, monkeypatch):
    model, calls = make_model(), []
    embed = model.embed_texts
    monkeypatch.setattr(model, "embed_texts", lambda texts: calls.append(texts) or embed(texts))
    again = tmp_path / "again.tar"
    again.write_bytes(shards.read_bytes())
    common = {"task": "zero_shot", "templates": "none"}
    tasks = [
        {**common, "split": "a", "data": str(shards)},
        {**common, "split": "b", "data": str(again)},
        {**common, "split": "c", "data": str(shards), "label": "concept"},
        {**common, "split": "d", "data": str(shards), "templates": "simple"},
    ]
    (tmp_path / "suite.yaml").write_text(json.dumps({"tasks": tasks}))
    evaluate(model, tmp_path / "suite.yaml", log=lambda _: None)
    names, signed = sorted(COLOURS), ["a photo"]
    assert calls == [names, signed, [f"a photo of a {name}." for name in names], signed]


def test_a_kept_classifier_encodes_no_name_again(make_model, encoded, tmp_path, monkeypatch):
    model = make_model()
    pictures = [encoded(colour) for colour in COLOURS]
    expected = model.classify(pictures, COLOURS, templates=["a {}", "the {}"])
    model.classifier(COLOURS, ["a {}", "the {}"]).save(tmp_path / "colours.safetensors")
    embed = {"a photo": model.embed_texts(["a photo"])}
    # no text but the one that the model is known by
    monkeypatch.setattr(model, "embed_texts", lambda texts: embed[texts[0]])
    kept = ZeroShotClassifier.load(tmp_path / "colours.safetensors")
    assert model.classify(pictures, kept) == expected
    with pytest.raises(ConfigError, match="templates are part of a classifier"):
        model.classify(pictures, kept, templates="simple")


def test_the_confusion_matrix_counts_every_picture(model, shards):
    source = Source(model, open_shards(str(shards)), log=lambda _: None)
    details = zero_shot(source).details
    matrix = np.array(details["confusion_matrix"])
    names = details["class_names"]
    for sample in details["samples"]:
        matrix[names.index(sample["truth"]), names.index(sample["top"][0][0])] -= 1
    assert not matrix.any()


@pytest.mark.parametrize("text", ["", "x", "0"])
def test_a_folder_whose_number_of_shards_is_none(tmp_path, text):
    (tmp_path / "nshards.txt").write_text(text)
    with pytest.raises(DataError, match=r"nshards\.txt: must hold the number of shards"):
        open_data(str(tmp_path))


def test_a_shard_that_is_missing_is_named(folder, tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("2")
    (tmp_path / "test/0.tar").write_bytes((folder / "test/0.tar").read_bytes())
    with pytest.raises(DataError, match=r"test/1\.tar"):
        open_data(str(tmp_path))


def test_the_names_and_templates_of_a_folder_are_part_of_what_results_follow_from(folder, tmp_path):
    def inputs():
        task = ZeroShotTask(task="zero_shot", data=str(tmp_path), split="test")
        return inputs_hash(task, "model", ["data"])

    found = [inputs()]
    (tmp_path / "test").mkdir()
    (tmp_path / "test/nshards.txt").write_text("1")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        found.append(inputs())
    (tmp_path / "classnames.txt").write_text("other\n")
    found.append(inputs())
    assert len(set(found)) == 4
    assert inputs() == found[-1]
