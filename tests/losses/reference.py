"""The contrastive losses as their formulas stand in the docstrings: a loop over valid rows."""

import torch
import torch.nn.functional as F


def info_nce(image, text, scale, bias, pairs, smoothing=0.0):
    keep = torch.nonzero(pairs.valid)[:, 0].tolist()
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i in keep:
            positives, columns = row(pairs, keep, i)
            s = scale * (keys @ queries[i])
            target = (1 - smoothing) * s[positives].mean() + smoothing * s[columns].mean()
            total = total + s[columns].logsumexp(0) - target
    return total / (2 * len(keep))


def sigmoid(image, text, scale, bias, pairs, smoothing=0.0):
    keep = torch.nonzero(pairs.valid)[:, 0].tolist()
    total = 0.0
    for i in keep:
        positives, columns = row(pairs, keep, i)
        z = torch.tensor([1.0 if j in positives else -1.0 for j in columns], dtype=image.dtype)
        total = total + F.softplus(-z * (scale * (text[columns] @ image[i]) + bias)).sum()
    return total / len(keep)


def row(pairs, keep, i):
    """The positives of a row, and the columns that count in it."""
    match = [j for j in keep if is_match(pairs, i, j)]
    if pairs.duplicates == "positive":
        return match, keep
    if pairs.duplicates == "negative":
        return [i], keep
    return [i], [j for j in keep if j == i or j not in match]


def is_match(pairs, i, j):
    return bool(
        pairs.sample_ids[i] == pairs.sample_ids[j] or pairs.caption_ids[i] == pairs.caption_ids[j]
    )
