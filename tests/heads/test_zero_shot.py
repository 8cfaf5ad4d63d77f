import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from vlm.errors import ConfigError
from vlm.heads import zero_shot


class Embedder:
    """Rows of length 1 that depend on the text alone."""

    def embed_texts(self, texts):
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) for text in texts]
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def test_weights_follow_the_protocol_of_a_loop():
    names, forms = ["cat", "dog"], ["a {}.", "the {}!", "{}"]
    weights = zero_shot.zero_shot_weights(Embedder(), names, forms)
    for name, row in zip(names, weights, strict=True):
        features = [Embedder().embed_texts([form.format(name)])[0] for form in forms]
        mean = torch.stack(features).mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm())


def test_weights_do_not_depend_on_the_chunk(monkeypatch):
    names = [f"class {i}" for i in range(11)]
    whole = zero_shot.zero_shot_weights(Embedder(), names, ["{}", "a {}"])
    monkeypatch.setattr(zero_shot, "_TEXTS_AT_ONCE", 6)
    torch.testing.assert_close(
        zero_shot.zero_shot_weights(Embedder(), names, ["{}", "a {}"]), whole
    )


def test_weights_equal_open_clips_builder():
    zero_shot.resolve_templates("openai_simple")  # lets open_clip import
    import open_clip

    class OpenClipModel:
        def encode_text(self, texts, normalize):
            assert normalize
            return Embedder().embed_texts(texts)

    names = ["cat", "dog", "bird"]
    theirs = open_clip.build_zero_shot_classifier(
        OpenClipModel(),
        tokenizer=lambda texts: _Texts(texts),
        classnames=names,
        templates=open_clip.SIMPLE_IMAGENET_TEMPLATES,
        num_classes_per_batch=2,
    )
    ours = zero_shot.zero_shot_weights(Embedder(), names, "openai_simple")
    torch.testing.assert_close(ours, theirs.T)


class _Texts(list):
    def to(self, _device):
        return self


def test_template_lists_by_name():
    assert zero_shot.resolve_templates("none") == ("{}",)
    assert zero_shot.resolve_templates("simple") == ("a photo of a {}.",)
    assert len(zero_shot.resolve_templates("openai")) == 80
    assert len(zero_shot.resolve_templates("openai_simple")) == 7
    assert "a bad photo of the {}." in zero_shot.resolve_templates("openai")


def test_templates_of_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("an icon of {}\n\n{}, flat\n")
    assert zero_shot.resolve_templates(str(path)) == ("an icon of {}", "{}, flat")


def test_a_template_never_formats(monkeypatch):
    seen = []
    monkeypatch.setattr(
        Embedder, "embed_texts", lambda _, t: seen.extend(t) or torch.ones(len(t), 2)
    )
    zero_shot.zero_shot_weights(Embedder(), ["{0.__class__}", "a{}"], ["{} {0}"])
    assert seen == ["{0.__class__} {0}", "a{} {0}"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("simpel", "did you mean simple?"),
        (["a photo", "{}", "{} {}"], "template 'a photo' must have one {}"),
        ([], "no template"),
    ],
)
def test_wrong_templates_say_what_is_wrong(templates, message):
    with pytest.raises(ConfigError) as error:
        zero_shot.resolve_templates(templates)
    assert message in error.value.problems[0]


def test_each_wrong_template_has_its_line(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a photo\n{}\n{} {}\n")
    with pytest.raises(ConfigError) as error:
        zero_shot.resolve_templates(str(path))
    assert len(error.value.problems) == 2
    assert "templates.txt" in str(error.value)


def test_labels_must_differ_and_have_names():
    with pytest.raises(ConfigError, match="empty"):
        zero_shot.zero_shot_weights(Embedder(), [])
    with pytest.raises(ConfigError) as error:
        zero_shot.zero_shot_weights(Embedder(), ["cat", " ", "cat"])
    assert error.value.problems == [
        "label 2 of 3 is blank; remove it or name it",
        "label 'cat' is given more than once; keep one",
    ]


IMAGE = torch.tensor([[1.0, 0.0]])
WEIGHTS = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])


def test_logits_and_predictions_of_a_hand_worked_case():
    logits = zero_shot.zero_shot_logits(IMAGE, WEIGHTS, logit_scale=2.0)
    assert logits.tolist() == [[0.0, 2.0, 0.0]]
    (prediction,) = zero_shot.predict(IMAGE, WEIGHTS, ["a", "b", "c"], logit_scale=2.0)
    assert prediction.label == "b"
    assert prediction.probability == pytest.approx(torch.e**2 / (torch.e**2 + 2))
    assert [label for label, _ in prediction.ranking] == ["b", "a", "c"]  # a ties with c
    assert sum(p for _, p in prediction.ranking) == pytest.approx(1)


def test_the_top_of_a_ranking_has_the_whole_rankings_probabilities():
    (whole,) = zero_shot.predict(IMAGE, WEIGHTS, ["a", "b", "c"], logit_scale=2.0)
    (top,) = zero_shot.predict(IMAGE, WEIGHTS, ["a", "b", "c"], logit_scale=2.0, top=1)
    assert top.ranking == whole.ranking[:1]


def test_no_images_have_no_predictions():
    assert zero_shot.predict(IMAGE[:0], WEIGHTS, ["a", "b", "c"]) == []


@pytest.fixture
def classifier():
    return zero_shot.zero_shot_classifier(Embedder(), ["cat", "a dög", "cat"], ["a {}", "{c}!"])


def test_a_classifier_encodes_a_repeated_name_once(classifier, monkeypatch):
    assert torch.equal(classifier.weights[0], classifier.weights[2])
    expected = zero_shot.zero_shot_weights(Embedder(), ["cat", "a dög"], ["a {}", "{}!"])
    torch.testing.assert_close(classifier.weights[:2], expected)
    (prediction,) = classifier.predict(classifier.weights[:1], logit_scale=50.0)
    assert [name for name, _ in prediction.ranking] == ["cat (0)", "cat (2)", "a dög"]


def test_a_saved_classifier_predicts_the_same(classifier, tmp_path):
    path = tmp_path / "pets.safetensors"
    classifier.save(path)
    loaded = zero_shot.ZeroShotClassifier.load(path)
    assert (loaded.class_names, loaded.templates) == (("cat", "a dög", "cat"), ("a {}", "{}!"))
    assert torch.equal(loaded.weights, classifier.weights)
    assert torch.equal(loaded.signature, classifier.signature)
    images = torch.nn.functional.normalize(torch.randn(3, 6), dim=1)
    assert loaded.predict(images) == classifier.predict(images)
    with pytest.raises(ConfigError, match="exists; give a new file"):
        classifier.save(path)


def test_what_is_no_classifier_is_refused(classifier, tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        zero_shot.ZeroShotClassifier.load(tmp_path / "none")
    for content in (b"", b"{}", b"x" * 100):
        (tmp_path / "wrong").write_bytes(content)
        with pytest.raises(ConfigError, match="no zero-shot classifier, or a damaged one"):
            zero_shot.ZeroShotClassifier.load(tmp_path / "wrong")
    with pytest.raises(ConfigError, match="for features of size 6, and this model's have 2"):
        classifier.predict(IMAGE)


class Turned(Embedder):
    """Another model of the same width: its features are at an angle to the first one's."""

    def __init__(self, cosine):
        self.cosine = cosine

    def embed_texts(self, texts):
        rows = super().embed_texts(texts)
        beside = torch.nn.functional.normalize(rows.roll(1, 1) - 0.5, dim=1)
        beside = beside - (beside * rows).sum(1, keepdim=True) * rows
        beside = torch.nn.functional.normalize(beside, dim=1)
        return self.cosine * rows + (1 - self.cosine**2) ** 0.5 * beside


def test_a_classifier_knows_its_model_again(classifier, tmp_path):
    classifier.save(tmp_path / "pets")
    for one in (classifier, zero_shot.ZeroShotClassifier.load(tmp_path / "pets")):
        one.check_model(Embedder())
        one.check_model(Turned(0.9995))
        for cosine in (0.998, 0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError, match="the classifier is of another model"):
                one.check_model(Turned(cosine))


def test_a_model_of_another_width_is_refused(classifier, monkeypatch):
    # the same embedder, with features of another size
    monkeypatch.setattr(Embedder, "embed_texts", lambda _, texts: torch.ones(len(texts), 2))
    with pytest.raises(ConfigError, match="for features of size 6, and this model's have 2"):
        classifier.check_model(Embedder())


def test_a_classifier_without_its_models_signature_is_refused(classifier, tmp_path):
    path = tmp_path / "pets"
    texts = {"class_names": json.dumps(["a"] * 3), "templates": json.dumps(["{}"])}
    save_file({"weights": classifier.weights}, path, texts)
    with pytest.raises(ConfigError, match="no zero-shot classifier, or a damaged one"):
        zero_shot.ZeroShotClassifier.load(path)
    for wrong in (torch.ones(5), torch.ones(1, 6)):
        save_file({"weights": classifier.weights, "signature": wrong}, path, texts)
        with pytest.raises(ConfigError, match=r"a signature \[.*\] for weights \[3, 6\]"):
            zero_shot.ZeroShotClassifier.load(path)
