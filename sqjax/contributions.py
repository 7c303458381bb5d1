"""Where a file differs: what each group of its tensors contributes alone, and the tokens it disagrees on most."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sqjax import cache, evaluation, runtime
from sqjax.checkpoint import Checkpoint
from sqjax.config import is_matrix
from sqjax.measuring import Runtime
from sqjax.scoring import Scored, Scorer, Student, Suite
from sqjax.sources import load_model
from sqjax.tokens import ROLES, Tokenizer

Grouping = Literal["none", "kinds", "layers", "tensors"]

_KINDS = {
    "embedding": ("token_embd", "output"),
    "DeltaNet gates": ("ssm_alpha", "ssm_beta"),
    "DeltaNet projections": ("attn_qkv", "attn_gate", "ssm_out"),
    "attention": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "MLP": ("ffn_gate", "ffn_up", "ffn_down"),
}
_VECTORS = "norms and other vectors"
_BEST = 5
_PREFIX_TOKENS = 48


# ---------------------------------------------------------------------------------------------------------------------
# Groups of tensors


def group_of(name: str, shape: tuple[int, ...], grouping: Grouping) -> str:
    """Returns the group of a tensor: its kind, its layer, or itself."""
    attribute = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if grouping == "tensors":
        return name
    if grouping == "layers":
        return (
            f"layer {name.split('.')[1]}" if name.startswith("blk.") else attribute.replace("token_embd", "embedding")
        )
    if not is_matrix(name, shape):
        return _VECTORS
    return next(kind for kind, attributes in _KINDS.items() if attribute in attributes)


def groups(
    scorer: Scorer, student: Student, suites: Sequence[Suite], grouping: Grouping, seed: int = 0
) -> list[dict[str, Any]]:
    """Puts one group of a file's tensors at a time into the reference and measures what that alone costs.

    Groups that the file leaves as they are do not count. Keys of an entry: group, tensors (names), parameters, and
    kl, kl_interval, top1, gap and gap_interval over all suites.

    Raises:
      InputError: the file cannot be read.
    """
    if grouping == "none":
        return []
    checkpoint, found = student.open(), scorer.checkpoint
    members: dict[str, list[str]] = {}
    for name, shape in found.config.tensor_shapes().items():
        # A tied head is the embedding; a file that stores it apart has another embedding for another purpose.
        if name in checkpoint.tensors and _differ(checkpoint.tensors[name], found.tensors[name]):
            members.setdefault(group_of(name, shape, grouping), []).append(name)
    parts = {
        group: Student(
            f"{student.name}, {group} alone", f"{student.identity} {names}", _overlay(found, checkpoint, names)
        )
        for group, names in members.items()
    }
    scored = scorer.score(list(parts.values()), suites)
    entries = []
    for group, part in parts.items():
        scores, sequences = evaluation.join(
            [(scored[part.name][suite.name].scores, suite.sequences) for suite in suites]
        )
        summary = evaluation.summarize(scores, sequences, seed=seed)
        kept = {name: summary[name] for name in ("kl", "kl_interval", "top1", "gap", "gap_interval")}
        sizes = [int(np.prod(found.config.tensor_shapes()[name])) for name in members[group]]
        entries.append({"group": group, "tensors": members[group], "parameters": sum(sizes)} | kept)
    return entries


def _differ(first: np.ndarray, second: np.ndarray) -> bool:
    return not np.array_equal(first.astype(np.float32), second.astype(np.float32))


def _overlay(reference: Checkpoint, other: Checkpoint, names: Iterable[str]):
    """A function that returns the reference with some tensors of another checkpoint."""
    return lambda: dataclasses.replace(
        reference, tensors={name: (other if name in names else reference).tensors[name] for name in reference.tensors}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Disagreements


def disagreements(
    scorer: Scorer, student: Student, suites: Sequence[Suite], scored: Mapping[str, Scored], kind: Runtime, count: int
) -> list[dict[str, Any]]:
    """Returns the tokens of the largest KL divergence as readable text, largest first.

    Keys: suite, sequence, position, kl, role, prefix, true, probability and probability_reference (of the true token),
    and best and best_reference: the five most probable tokens, each {"token", "probability"}.

    Raises:
      InputError: the file cannot be read.
    """
    if count < 1:
        return []
    name = scorer.key(student, kind, suites=[suite.sha256 for suite in suites], disagreements=count)
    if not scorer.fresh and (kept := cache.load(name)):
        return kept[1]["disagreements"]
    ranked = sorted(
        (
            (float(scores.kl[place]), suite, int(place))
            for suite in suites
            for scores, place in _largest(scored, suite, count)
        ),
        key=lambda item: -item[0],
    )[:count]
    ranked = [item for item in ranked if item[0] > 0]
    entries: list[dict[str, Any]] = [{} for _ in ranked]
    for suite in suites:
        chosen = [index for index, (_, owner, _) in enumerate(ranked) if owner is suite]
        places = [_position(scored[suite.name], ranked[index][2]) for index in chosen]
        if not chosen:
            continue
        best = [_best(scorer, model, suite, places, kind) for model in (None, student)]
        for index, (sequence, position), reference_V, student_V in zip(chosen, places, *best):
            scores, place = scored[suite.name].scores, ranked[index][2]
            entries[index] = {
                "suite": suite.name,
                "sequence": sequence,
                "position": position + 1,
                "kl": ranked[index][0],
                "role": ROLES[scores.role[place]] if scores.role[place] >= 0 else None,
                "probability": float(np.exp(-scores.loss[place])),
                "probability_reference": float(np.exp(-scores.loss_reference[place])),
            }
            entries[index] |= _readable(scorer.checkpoint.tokenizer, suite.sequences.tokens[sequence], position)
            entries[index] |= {"best_reference": _five(scorer, reference_V), "best": _five(scorer, student_V)}
    cache.store(name, {}, {"disagreements": entries})
    return entries


def _largest(scored: Mapping[str, Scored], suite: Suite, count: int):
    scores = scored[suite.name].scores
    return [(scores, place) for place in np.argsort(-scores.kl, kind="stable")[:count]]


def _position(scored: Scored, place: int) -> tuple[int, int]:
    """The sequence of a scored token, and the position of the token that it was predicted after."""
    sequence = int(scored.scores.sequence[place])
    return sequence, place - int(np.searchsorted(scored.scores.sequence, sequence))


def _best(scorer: Scorer, student: Student | None, suite: Suite, places, kind: Runtime) -> np.ndarray:
    """Probabilities [K, V] at places (sequence, position) of the student, or of the reference."""
    if kind == "llama.cpp":
        file = scorer.reference_file if student is None else student.gguf()
        rows = runtime.logits_at(file, [suite.sequences.tokens[s] for s, _ in places], [[p] for _, p in places])
        logits_KV = np.concatenate(rows)
    else:
        model = scorer.reference if student is None else load_model(student.open(), dtype=scorer.dtype)
        logits_KV = evaluation.logits_at(model, suite.sequences, places)
    return np.asarray(jax.nn.softmax(jnp.asarray(logits_KV), axis=-1))


def _five(scorer: Scorer, probability_V: np.ndarray) -> list[dict[str, Any]]:
    best = np.argsort(-probability_V, kind="stable")[:_BEST]
    decode = scorer.checkpoint.tokenizer.decode
    return [{"token": decode([int(token)]), "probability": float(probability_V[token])} for token in best]


def _readable(tokenizer: Tokenizer, tokens_T: np.ndarray, position: int) -> dict[str, str]:
    first = max(0, position + 1 - _PREFIX_TOKENS)
    prefix = tokenizer.decode(tokens_T[first : position + 1])
    return {"prefix": ("…" if first else "") + prefix, "true": tokenizer.decode([int(tokens_T[position + 1])])}
