import pytest

from vlm.errors import ConfigError
from vlm.heads import class_names
from vlm.heads.zero_shot import resolve_templates


@pytest.mark.parametrize(
    ("name", "count", "some"),
    [
        ("imagenet", 1000, {0: "tench", 657: "missile", 744: "missile", 999: "toilet paper"}),
        ("cifar10", 10, {0: "airplane", 9: "truck"}),
        ("cifar100", 100, {0: "apple", 1: "aquarium fish", 41: "lawn mower", 99: "worm"}),
    ],
)
def test_sets_by_name(name, count, some):
    names = class_names.resolve_class_names(name)
    assert len(names) == count
    assert {number: names[number] for number in some} == some
    assert resolve_templates(class_names.NAMED_SETS[name].templates)


def test_templates_of_cifar_are_clip_benchmarks():
    import json
    from importlib.resources import files

    folder = files("clip_benchmark.datasets")
    listed = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    assert resolve_templates("cifar") == resolve_templates(listed["cifar10"])
    assert listed["cifar10"] == listed["cifar100"]


def test_names_of_a_list_or_a_file_may_not_repeat(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\n dog\n\n")
    assert class_names.resolve_class_names(str(path)) == ["cat", "dog"]
    path.write_text("cat\ncat\n")
    for labels in (str(path), ["cat", "cat"]):
        with pytest.raises(ConfigError, match="label 'cat' is given more than once"):
            class_names.resolve_class_names(labels)


def test_a_blank_line_between_names_is_refused(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\n\ndog\n")
    with pytest.raises(ConfigError, match="label 2 of 3 is blank"):
        class_names.resolve_class_names(str(path))


def test_a_repeated_name_is_shown_with_its_number():
    shown = class_names.distinct(class_names.resolve_class_names("imagenet"))
    assert len(set(shown)) == 1000
    assert shown[657] == "missile (657)"
    assert shown[0] == "tench"


def test_neither_a_set_nor_a_file():
    with pytest.raises(ConfigError, match=r"can't be read: .* one of imagenet, cifar10, cifar100"):
        class_names.read_labels("imagenette")
