"""The losses as their formulas stand in the docstrings: a loop over valid rows."""

import torch
import torch.nn.functional as F


def info_nce(image, text, scale, bias, pairs, smoothing=0.0):
    keep = torch.nonzero(pairs.valid)[:, 0].tolist()
    total, rows = 0.0, rows_of(pairs, keep)
    for queries, keys in ((image, text), (text, image)):
        for i in keep:
            positives, columns = rows[i]
            s = scale * (keys @ queries[i])
            target = (1 - smoothing) * s[positives].mean() + smoothing * s[columns].mean()
            total = total + s[columns].logsumexp(0) - target
    return total / (2 * len(keep))


def sigmoid(image, text, scale, bias, pairs, smoothing=0.0):
    keep = torch.nonzero(pairs.valid)[:, 0].tolist()
    total, rows = 0.0, rows_of(pairs, keep)
    for i in keep:
        positives, columns = rows[i]
        z = image.new_tensor([1.0 if j in positives else -1.0 for j in columns])
        total = total + F.softplus(-z * (scale * (text[columns] @ image[i]) + bias)).sum()
    return total / len(keep)


def captions(module, images, tokens, valid, eot_id):
    """One picture after the other, its caption at its own length, all logits at once."""
    total, count = 0.0, 0
    for i in torch.nonzero(valid)[:, 0].tolist():
        length = tokens[i].tolist().index(eot_id) + 1
        context = module.encoders(images[[i]], tokens[[i]]).image_tokens
        logits = (
            module.captioner(context, tokens[[i], : length - 1])[0] @ module.captioner.vocabulary.T
        )
        total = total + F.cross_entropy(logits, tokens[i, 1:length], reduction="sum")
        count += length - 1
    return total / count


def rows_of(pairs, keep):
    """The positives of each row, and the columns that count in it."""
    ids, texts = pairs.sample_ids.tolist(), pairs.caption_ids.tolist()
    return {i: row(pairs.duplicates, ids, texts, keep, i) for i in keep}


def row(duplicates, ids, texts, keep, i):
    match = [j for j in keep if ids[i] == ids[j] or texts[i] == texts[j]]
    if duplicates == "positive":
        return match, keep
    if duplicates == "negative":
        return [i], keep
    return [i], [j for j in keep if j == i or j not in match]
