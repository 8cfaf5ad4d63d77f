"""Zero-shot classification: class names become the rows of a classifier (CLIP, 2103.00020, 3.1)."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor
from torch.nn.functional import normalize

from vlm.errors import ConfigError
from vlm.heads.class_names import check_class_names, distinct
from vlm.runtime import torchvision_guard
from vlm.runtime.files import write_atomic

_QUALITIES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
TEMPLATES = {
    "none": ("{}",),
    "simple": ("a photo of a {}.",),
    "cifar": tuple(  # openai/CLIP's data/prompts.md, for CIFAR-10 and CIFAR-100
        form
        for article in ("a", "the")
        for form in (
            *(f"a {quality}photo of {article} {{}}." for quality in _QUALITIES),
            *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
        )
    ),
}
_OPEN_CLIP_TEMPLATES = {
    "openai": "OPENAI_IMAGENET_TEMPLATES",  # 80
    "openai_simple": "SIMPLE_IMAGENET_TEMPLATES",  # the 7 of them that matter most
}
_SIGNED = "a photo"  # the text by whose features a model is known again
_MIN_COSINE = 0.999  # of these: other devices and precisions are above, other weights far below
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


@dataclass(frozen=True)
class ZeroShotClassifier:
    """Classes ready to be told apart, by the model that made it. See `zero_shot_classifier`.

    Attributes:
        class_names: C names, in the order of the class numbers.
        templates: What the names were put into.
        weights: A row of length 1 for each class, fp32, on the CPU.
        signature: The features of one fixed text, by which `check_model` knows the model again.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    weights: Float[Tensor, "C D"]
    signature: Float[Tensor, " D"]

    def check_model(self, model: TextEmbedder) -> None:
        """Refuse a model that did not make it; encodes one text.

        Raises:
            ConfigError: Its features of the text are of another size or direction.
        """
        features = model.embed_texts([_SIGNED])[0]
        self._check_size(len(features))
        cosine = float(features @ self.signature)
        if not cosine >= _MIN_COSINE:
            raise ConfigError(
                f"the classifier is of another model: the cosine of their features of {_SIGNED!r} "
                f"is {cosine:.3f}, below {_MIN_COSINE}; make one with this model: "
                "model.classifier(labels)"
            )

    def _check_size(self, dim: int) -> None:
        expected = self.weights.shape[1]
        if dim != expected:
            raise ConfigError(
                f"the classifier is for features of size {expected}, and this model's have {dim}; "
                "make one with this model: model.classifier(labels)"
            )

    def predict(
        self,
        image_features: Float[Tensor, "B D"],
        *,
        logit_scale: float = 100.0,
        top: int | None = None,
    ) -> list[Prediction]:
        """The ranked labels of each image, as `predict`; a repeated name comes with its number.

        Raises:
            ConfigError: The classifier is of a model with features of another size.
        """
        self._check_size(image_features.shape[1])
        names = distinct(self.class_names)
        return predict(image_features, self.weights, names, logit_scale=logit_scale, top=top)

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file: the tensors, and the texts in its metadata.

        Raises:
            ConfigError: The file exists.
            DiskError: It cannot be written.
        """
        path = Path(path)
        if path.exists():
            raise ConfigError(f"{path} exists; give a new file")
        texts = {"class_names": self.class_names, "templates": self.templates}
        metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in texts.items()}
        tensors = {"weights": self.weights.contiguous(), "signature": self.signature.contiguous()}
        write_atomic(path, tensor_bytes(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "ZeroShotClassifier":
        """What `save` wrote.

        Raises:
            ConfigError: There is no such file, or it is no classifier.
        """
        try:
            with safe_open(path, framework="pt") as file:
                texts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
                names, templates = tuple(texts["class_names"]), tuple(texts["templates"])
                weights, signature = (
                    file.get_tensor(name).float() for name in ("weights", "signature")
                )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, OSError) and not Path(path).is_file():
                raise ConfigError(f"{path}: no such file; classifier.save writes one") from None
            raise ConfigError(f"{path}: no zero-shot classifier, or a damaged one") from None
        if weights.ndim != 2 or len(weights) != len(names):
            raise ConfigError(f"{path}: {len(names)} class names for weights {[*weights.shape]}")
        if signature.shape != weights.shape[1:]:
            raise ConfigError(
                f"{path}: a signature {[*signature.shape]} for weights {[*weights.shape]}"
            )
        return cls(names, templates, weights, signature)


def resolve_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Templates, each with one `{}` where the class name goes.

    Args:
        templates: `none` (the bare name), `simple` (`a photo of a {}.`), `openai` or
            `openai_simple` (open_clip's 80 and 7 for ImageNet), `cifar` (OpenAI's 18 for CIFAR-10
            and CIFAR-100), the path of a text file with one template a line, or the templates
            themselves. CLIP_benchmark's `{c}` means the same as `{}`.

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


def zero_shot_classifier(
    model: TextEmbedder, class_names: Sequence[str], templates: str | Sequence[str] = "simple"
) -> ZeroShotClassifier:
    """A classifier of these classes; a name that repeats is encoded once, so its rows are equal.

    Raises:
        ConfigError: There are no class names, or blank ones, or a template is wrong.
    """
    check_class_names(class_names, may_repeat=True)
    forms = resolve_templates(templates)
    rows = {name: row for row, name in enumerate(dict.fromkeys(class_names))}
    weights = zero_shot_weights(model, list(rows), forms)
    signature = model.embed_texts([_SIGNED])[0]
    return ZeroShotClassifier(
        tuple(class_names), forms, weights[[rows[n] for n in class_names]], signature
    )


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


def _checked(templates: Sequence[str], where: str) -> tuple[str, ...]:
    templates = [form.replace("{c}", "{}") for form in templates]
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
    torchvision_guard.install()
    import open_clip

    return tuple(template("{}") for template in getattr(open_clip, name))
