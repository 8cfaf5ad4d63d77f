"""The contrastive losses as their formulas stand in the docstrings: a loop over valid rows."""

import torch
import torch.nn.functional as F


def info_nce(image, text, scale, bias, pairs, smoothing=0.0):
    keep = torch.nonzero(pairs.valid)[:, 0].tolist()
    total = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i in keep:
            match = [j for j in keep if is_match(pairs, i, j)]
            columns = keep
            if pairs.duplicates == "ignore":
                columns = [j for j in keep if j == i or j not in match]
            if pairs.duplicates != "positive":
                match = [i]
            s = scale * (keys @ queries[i])
            target = (1 - smoothing) * s[match].mean() + smoothing * s[columns].mean()
            total = total + s[columns].logsumexp(0) - target
    return total / (2 * len(keep))


def sigmoid(image, text, scale, bias, pairs, smoothing=0.0):
    keep = torch.nonzero(pairs.valid)[:, 0].tolist()
    total = 0.0
    for i in keep:
        match = [j for j in keep if is_match(pairs, i, j)]
        columns = keep
        if pairs.duplicates == "ignore":
            columns = [j for j in keep if j == i or j not in match]
        if pairs.duplicates != "positive":
            match = [i]
        z = torch.tensor([1.0 if j in match else -1.0 for j in columns], dtype=image.dtype)
        total = total + F.softplus(-z * (scale * (text[columns] @ image[i]) + bias)).sum()
    return total / len(keep)


def is_match(pairs, i, j):
    return bool(
        pairs.sample_ids[i] == pairs.sample_ids[j] or pairs.caption_ids[i] == pairs.caption_ids[j]
    )
