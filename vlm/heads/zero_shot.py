"""Zero-shot classification: class names become the rows of a classifier (CLIP, 2103.00020, 3.1)."""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlm.errors import ConfigError

TEMPLATES = {"none": ("{}",), "simple": ("a photo of a {}.",)}
_OPEN_CLIP_TEMPLATES = {
    "openai": "OPENAI_IMAGENET_TEMPLATES",  # 80
    "openai_simple": "SIMPLE_IMAGENET_TEMPLATES",  # the 7 of them that matter most
}
_TEXTS_AT_ONCE = 8192  # bounds memory: 1,000 classes in 80 templates are 80,000 texts


@runtime_checkable  # for the tests, which check every argument's type
class TextEmbedder(Protocol):
    """What a classifier is built with: `vlm.inference.VisionLanguageModel` is one."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Embed texts as float32 rows of length 1, on the CPU."""
        ...


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of an image, and all labels with their probabilities, likeliest first."""

    label: str
    probability: float
    ranking: list[tuple[str, float]]


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates, each with one `{}` where the class name goes.

    Args:
        templates: `none` (the bare name), `simple` (`a photo of a {}.`), `openai` or
            `openai_simple` (open_clip's 80 and 7 for ImageNet), the path of a text file with one
            template a line, or the templates themselves.

    Raises:
        ConfigError: There is no such list or file, it is empty, or a template has not one `{}`.
    """
    if not isinstance(templates, str):
        return _checked(templates, "templates")
    if templates in _OPEN_CLIP_TEMPLATES:
        return _from_open_clip(_OPEN_CLIP_TEMPLATES[templates])
    if templates in TEMPLATES:
        return TEMPLATES[templates]
    return _checked(_read_lines(templates), templates)


def zero_shot_weights(
    model: TextEmbedder, class_names: Sequence[str], templates: str | Sequence[str] = "simple"
) -> Float[Tensor, "C D"]:
    """One row of length 1 for each class: the classifier's weights, on the CPU.

    Each template with each name is encoded and normalised, a class's rows are averaged over the
    templates, and the mean is normalised again: open_clip's `build_zero_shot_classifier`, exactly.

    Raises:
        ConfigError: There are no class names, blank ones or repeated ones, or a template is wrong.
    """
    check_class_names(class_names)
    forms = resolve_templates(templates)
    step = max(1, _TEXTS_AT_ONCE // len(forms))
    rows = []
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        # replace, not str.format: a template is data, and a name may hold braces.
        texts = [form.replace("{}", name) for name in names for form in forms]
        features = model.embed_texts(texts).reshape(len(names), len(forms), -1)  # [c, T, D]
        rows.append(normalize(features.mean(dim=1), dim=-1))
    return torch.cat(rows)


def zero_shot_logits(
    image_features: Float[Tensor, "B D"],
    weights: Float[Tensor, "C D"],
    *,
    logit_scale: float = 100.0,
) -> Float[Tensor, "B C"]:
    """Scaled cosines of images and classes.

    Args:
        image_features: Rows of length 1.
        weights: From `zero_shot_weights`.
        logit_scale: The model's own, after `exp`, or the field's 100. It changes probabilities, and
            never the order of the classes.
    """
    return logit_scale * image_features @ weights.T


def predict(
    image_features: Float[Tensor, "B D"],
    weights: Float[Tensor, "C D"],
    class_names: Sequence[str],
    *,
    logit_scale: float = 100.0,
    top: int | None = None,
) -> list[Prediction]:
    """The ranked labels of each image; classes that tie keep their given order.

    Args:
        image_features: Rows of length 1.
        weights: From `zero_shot_weights`.
        class_names: C names.
        logit_scale: As for `zero_shot_logits`.
        top: Rank only so many; probabilities are over all classes either way.
    """
    logits = zero_shot_logits(image_features, weights, logit_scale=logit_scale)
    # Sorted before the softmax, in which classes that differ can round to the same probability.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)[:, :top].tolist()
    results = []
    for row, ids in zip(probabilities, order[:, :top].tolist(), strict=True):
        ranking = [(class_names[i], p) for i, p in zip(ids, row, strict=True)]
        results.append(Prediction(*ranking[0], ranking))
    return results


def check_class_names(class_names: Sequence[str]) -> None:
    """Refuse a list of labels that cannot be told apart.

    Raises:
        ConfigError: It is empty, or has blank or repeated names; one line for each problem.
    """
    if not class_names:
        raise ConfigError("the list of labels is empty; give at least one")
    problems = [
        f"label {i} of {len(class_names)} is blank; remove it or name it"
        for i, name in enumerate(class_names, start=1)
        if not name.strip()
    ]
    repeated = [name for name, n in Counter(class_names).items() if n > 1 and name.strip()]
    problems += [f"label {name!r} is given more than once; keep one" for name in repeated]
    if problems:
        raise ConfigError(problems)


def _checked(templates: Sequence[str], where: str) -> tuple[str, ...]:
    if not templates:
        raise ConfigError(f"{where}: no template; give at least one, as 'a photo of a {{}}.'")
    wrong = [form for form in templates if form.count("{}") != 1]
    if wrong:
        rule = "must have one {} where the class name goes, as 'a photo of a {}.'"
        raise ConfigError([f"{where}: template {form!r} {rule}" for form in wrong])
    return tuple(templates)


def _read_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        names = [*TEMPLATES, *_OPEN_CLIP_TEMPLATES]
        near = difflib.get_close_matches(path, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"templates {path!r} is neither a readable file nor one of {', '.join(names)}{hint}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: templates must be a UTF-8 text file") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _from_open_clip(name: str) -> tuple[str, ...]:
    """A list of open_clip's, whose templates are functions of the class name."""
    from vlm.runtime import torchvision_guard

    torchvision_guard.install()
    import open_clip

    return tuple(template("{}") for template in getattr(open_clip, name))
