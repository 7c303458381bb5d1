"""What quantization costs: KL divergence, cross-entropy and agreement per token, with intervals over sequences.

Let B denote batch, T time, D model width, V vocabulary, N scored tokens, C tokens of one chunk of logits, S sequences,
R bootstrap draws. Losses and divergences are in nats per token.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32
from scipy import special

from sqjax import mesh as meshes
from sqjax.mesh import BY_BATCH
from sqjax.model import Qwen35
from sqjax.run import InputError
from sqjax.texts import Document, Texts
from sqjax.tokens import ROLES, Tokenizer, encode_conversation, pack_windows

_CHUNK_LOGITS = {"cpu": 1 << 22, "gpu": 1 << 26, "tpu": 1 << 26}
_BATCH_TOKENS = {"cpu": 2048, "gpu": 32768, "tpu": 32768}
_SHORTEST_BUCKET = 64
_DRAWS = 4000
_CONFIDENCE = 0.95
_BLOCKS_OF_ONE = 8
_DRAWS_KEPT_UNTIL = 2000
# Nats, four bins a decade.
HISTOGRAM_EDGES = tuple(float(10 ** (exponent / 4)) for exponent in range(-24, 9))


# ---------------------------------------------------------------------------------------------------------------------
# What is scored


@dataclass(frozen=True)
class Sequences:
    """Token sequences to score, each from its second token on.

    Attributes:
      tokens: one array [T] a sequence.
      domains: one name a sequence.
      roles: one array [T] a sequence, indices into `tokens.ROLES`; None for packed text, which has no roles.
      documents: what they were cut from.
    """

    tokens: tuple[Int32[np.ndarray, "T"], ...]
    domains: tuple[str, ...]
    roles: tuple[Int32[np.ndarray, "T"] | None, ...]
    documents: tuple[Document, ...] = ()

    @classmethod
    def of_windows(cls, tokens_WT: Int32[np.ndarray, "W T"], domain: str = "text") -> "Sequences":
        """Wraps windows that are already packed."""
        return cls(tuple(np.asarray(tokens_WT)), (domain,) * len(tokens_WT), (None,) * len(tokens_WT))


def prepare(texts: Texts, tokenizer: Tokenizer, length: int, windows: int | None = None) -> Sequences:
    """Packs text into the first `windows` windows of `length` tokens; encodes as many conversations one by one.

    Raises:
      InputError: the text does not fill one window, a conversation cannot be rendered, or nothing is left to score.
    """
    if windows is not None and windows < 1:
        raise InputError(f"{windows} windows cannot be scored; ask for 1 or more")
    plain, spoken = texts.by_kind()
    tokens, domains, roles, documents = [], [], [], []
    if plain.files:
        packed = pack_windows(_all_of(plain, is_spoken=False), tokenizer, length, windows)
        tokens, domains, documents = [*packed.tokens_WT], [*packed.domains], [*packed.documents]
        roles = [None] * len(tokens)
    for document in islice(_all_of(spoken, is_spoken=True), windows):
        conversation = encode_conversation(document, tokenizer)
        if len(conversation.tokens_T) > 1:
            tokens.append(conversation.tokens_T)
            roles.append(conversation.roles_T)
            domains.append(document.domain)
            documents.append(document)
    if not tokens:
        raise InputError("the text holds no token that can be scored; give more text")
    unread = [str(file) for file in texts.files if str(file) not in {document.source for document in documents}]
    if unread and windows is not None:
        print(f"not scored, because {windows} windows were asked for: {', '.join(unread)}", file=sys.stderr)
    return Sequences(tuple(tokens), tuple(domains), tuple(roles), tuple(documents))


def _all_of(texts: Texts, *, is_spoken: bool) -> Iterator[Document]:
    for document in texts:
        if (document.messages is not None) != is_spoken:
            raise InputError(f"{document.source} mixes `text` and `messages`; put them into two files")
        yield document


# ---------------------------------------------------------------------------------------------------------------------
# Scores per token


@dataclass(frozen=True)
class TokenScores:
    """What a quantized model did on every scored token, in the order of the sequences.

    Attributes:
      kl: KL(reference || student), nats.
      loss: -log of the student's probability of the true token, nats.
      loss_reference: the same of the reference.
      agree: whether the most probable token is the same.
      sequence: index of the token's sequence.
      role: index into `tokens.ROLES`, or -1.
    """

    kl: Float32[np.ndarray, "N"]
    loss: Float32[np.ndarray, "N"]
    loss_reference: Float32[np.ndarray, "N"]
    agree: Int32[np.ndarray, "N"]
    sequence: Int32[np.ndarray, "N"]
    role: Int32[np.ndarray, "N"]

    def where(self, mask) -> "TokenScores":
        """Keeps the tokens for which `mask` [N] is true."""
        return TokenScores(*(getattr(self, field.name)[mask] for field in fields(self)))


def divergence(
    logits_CV: Float[Array, "C V"], student_CV: Float[Array, "C V"], target_C: Int[Array, "C"]
) -> tuple[Float32[Array, "C"], ...]:
    """Returns KL(p || q), -log q(target), -log p(target) and agreement, for p and q given as float32 logits.

    The divergence is summed as p (log(p/q) + q/p - 1): equal, because both sum to one, but no term is negative and the
    rounding of the two normalizers enters squared. Equal logits give exactly zero.
    """
    log_p, log_q = jax.nn.log_softmax(logits_CV, axis=-1), jax.nn.log_softmax(student_CV, axis=-1)
    p_CV, q_CV = jnp.exp(log_p), jnp.exp(log_q)
    ratio = log_p - log_q
    # q/p - 1 overflows where q >> p and loses its digits where q = p: one form for each.
    near = jnp.clip(ratio, -1.0, 1.0)
    terms = jnp.where(jnp.abs(ratio) <= 1.0, p_CV * (jnp.expm1(-near) + near), p_CV * ratio + (q_CV - p_CV))
    loss, loss_reference = (-jnp.take_along_axis(x, target_C[:, None], axis=-1)[:, 0] for x in (log_q, log_p))
    agree = jnp.argmax(logits_CV, axis=-1) == jnp.argmax(student_CV, axis=-1)
    return jnp.sum(terms, axis=-1), loss, loss_reference, agree.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="mesh")
def _hidden(model: Qwen35, tokens_BT, *, mesh):
    # One executable for both models: two of them could differ in rounding, and equal models must have divergence zero.
    run = meshes.over(mesh, Qwen35.hidden, (meshes.rows, BY_BATCH), lambda _: BY_BATCH)
    return run(model, tokens_BT)


@functools.partial(jax.jit, static_argnames=("chunk", "mesh"))
def _score_batch(reference, student, hidden_BTD, student_BTD, tokens_BT, *, chunk, mesh):
    """Scores of all tokens but the first, [B, T - 1]; a device has logits of `chunk` tokens at a time."""
    inputs = (meshes.rows, meshes.rows, BY_BATCH, BY_BATCH, BY_BATCH)
    run = meshes.over(mesh, functools.partial(_scores, chunk=chunk), inputs, lambda _: BY_BATCH)
    return run(reference, student, hidden_BTD, student_BTD, tokens_BT)


def _scores(reference, student, hidden_BTD, student_BTD, tokens_BT, *, chunk):
    batch, time, width = hidden_BTD.shape
    count = batch * (time - 1)
    padding = -count % chunk
    rows = [x_BTD[:, :-1].reshape(count, width) for x_BTD in (hidden_BTD, student_BTD)]
    rows = [jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(-1, chunk, width) for x_ND in rows]
    target = jnp.pad(tokens_BT[:, 1:].reshape(-1), (0, padding)).reshape(-1, chunk)
    heads = [model.head() for model in (reference, student)]

    def one(inputs):
        *hidden_CD, target_C = inputs
        logits = (
            model.logits(x_CD[None], head)[0] for model, x_CD, head in zip((reference, student), hidden_CD, heads)
        )
        return divergence(*logits, target_C)

    scores = jax.lax.map(one, (*rows, target))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(batch, time - 1), scores)


def score(
    reference: Qwen35,
    student: Qwen35,
    sequences: Sequences | Int32[np.ndarray, "W T"],
    *,
    hidden: Sequence[Float32[np.ndarray, "B T D"]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Scores every token after the first of each sequence under both models.

    Args:
      reference: the model that was quantized.
      student: what became of it, of the same vocabulary.
      sequences: or windows as an array.
      hidden: what `hidden_states(reference, sequences)` returned, where several students meet one reference.
      mesh: devices that share each batch, and the weights as it says; all devices unless given.
      progress: called with the tokens done and their total after each batch.

    Raises:
      InputError: the models differ in vocabulary or width, or a token lies outside of the vocabulary.
    """
    sequences = sequences if isinstance(sequences, Sequences) else Sequences.of_windows(sequences)
    vocabulary = reference.config.vocab_size
    for what, key in (("vocabularies", "vocab_size"), ("widths", "hidden_size")):
        own, other = getattr(reference.config, key), getattr(student.config, key)
        if own != other:
            raise InputError(f"the {what} differ: {own} and {other}; give the model that the file was made from")
    if (highest := max(int(tokens.max()) for tokens in sequences.tokens)) >= vocabulary:
        raise InputError(f"token {highest} lies outside of the vocabulary of {vocabulary}; use the model's tokenizer")
    mesh = meshes.create() if mesh is None else mesh
    reference, student = (meshes.place(model, mesh, meshes.rows(model, mesh)) for model in (reference, student))
    chunk = _CHUNK_LOGITS.get(jax.default_backend(), 1 << 22) // vocabulary
    chunk = min(2048, max(256, chunk))
    results: list[Any] = [None] * len(sequences.tokens)
    done, total = 0, sum(len(tokens) - 1 for tokens in sequences.tokens)

    def start(number, rows, tokens_BT):
        tokens_BT = meshes.place(tokens_BT, mesh, BY_BATCH)
        if hidden is None:
            hidden_BTD = _hidden(reference, tokens_BT, mesh=mesh)
        else:
            hidden_BTD = meshes.place(hidden[number], mesh, BY_BATCH)
        student_BTD = _hidden(student, tokens_BT, mesh=mesh)
        return rows, _score_batch(reference, student, hidden_BTD, student_BTD, tokens_BT, chunk=chunk, mesh=mesh)

    for rows, scores in _one_ahead(start(n, *batch) for n, batch in enumerate(_batches(sequences, mesh.size))):
        scores = meshes.to_host(scores)
        for row, index in enumerate(rows):
            length = len(sequences.tokens[index]) - 1
            results[index] = [x_BT[row, :length] for x_BT in scores]
            done += length
        if progress is not None:
            progress(done, total)
    return collect(sequences, results)


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Starts each batch before the results of the one before it are waited for: the device need not wait for copies."""
    before = next(batches, None)
    for batch in batches:
        yield before
        before = batch
    if before is not None:
        yield before


def hidden_states(
    model: Qwen35, sequences: Sequences, *, mesh: jax.sharding.Mesh | None = None
) -> list[Float32[np.ndarray, "B T D"]]:
    """Returns a reference's final hidden states, batch by batch, for `score`; D floats a token of memory."""
    mesh = meshes.create() if mesh is None else mesh
    model = meshes.place(model, mesh, meshes.rows(model, mesh))
    batches = (meshes.place(tokens_BT, mesh, BY_BATCH) for _, tokens_BT in _batches(sequences, mesh.size))
    return [meshes.to_host(x_BTD) for x_BTD in _one_ahead(_hidden(model, batch, mesh=mesh) for batch in batches)]


def logits_at(model: Qwen35, sequences: Sequences, places: Sequence[tuple[int, int]]) -> Float32[np.ndarray, "K V"]:
    """Returns the logits after the tokens at `places`, each a sequence's index and a position in it."""
    mesh = meshes.create()
    spread = meshes.place(model, mesh, meshes.rows(model, mesh))
    found: dict[tuple[int, int], np.ndarray] = {}
    for rows, tokens_BT in _batches(sequences, mesh.size):
        wanted = [(sequence, position) for sequence, position in places if sequence in rows]
        if wanted:
            hidden_BTD = meshes.to_host(_hidden(spread, meshes.place(tokens_BT, mesh, BY_BATCH), mesh=mesh))
            found |= {place: hidden_BTD[rows.index(place[0]), place[1]] for place in wanted}
    return np.asarray(model.logits(jnp.asarray(np.stack([found[place] for place in places]))[None])[0])


def collect(sequences: Sequences, results: Sequence[Sequence[np.ndarray]]) -> TokenScores:
    """Joins per-sequence arrays [T - 1] of KL, loss, loss of the reference and agreement."""
    columns = [np.concatenate(column) for column in zip(*results)]
    lengths = [len(tokens) - 1 for tokens in sequences.tokens]
    index = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    roles = [np.full(n, -1, np.int32) if r is None else r[1:] for r, n in zip(sequences.roles, lengths)]
    return TokenScores(*columns, index, np.concatenate(roles))


def _batches(sequences: Sequences, devices: int = 1) -> list[tuple[list[int], Int32[np.ndarray, "B T"]]]:
    """Groups sequences into batches of few shapes, so that few are compiled; all windows of packed text have one.

    Padding is on the right, where no scored token sees it. A batch that is not full repeats no sequence: its other
    rows are zeros. The number of rows is a multiple of that of the devices.
    """
    budget = devices * _BATCH_TOKENS.get(jax.default_backend(), 2048)
    groups: dict[int, list[int]] = {}
    for index, (tokens, roles) in enumerate(zip(sequences.tokens, sequences.roles)):
        bucket = len(tokens) if roles is None else max(_SHORTEST_BUCKET, 1 << (len(tokens) - 1).bit_length())
        groups.setdefault(bucket, []).append(index)
    batches = []
    for bucket, members in groups.items():
        size = min(max(1, budget // bucket), len(members))
        for start in range(0, len(members), size):
            rows = members[start : start + size]
            tokens_BT = np.zeros((-(-size // devices) * devices, bucket), np.int32)
            for row, index in enumerate(rows):
                tokens_BT[row, : len(sequences.tokens[index])] = sequences.tokens[index]
            batches.append((rows, tokens_BT))
    return batches


# ---------------------------------------------------------------------------------------------------------------------
# Aggregates


def summarize(scores: TokenScores, sequences: Sequences, *, seed: int = 0) -> dict[str, Any]:
    """Returns the metrics of all tokens, and of each domain and each role where there are several.

    Keys: tokens, sequences, kl, kl_interval, kl_median, kl_p99, kl_p999, kl_max, top1, rms_probability_change,
    cross_entropy, cross_entropy_reference, gap, gap_interval; `domains` and `roles` map a name to the same keys.
    Intervals are at 95%, from resampling whole sequences, in which both models keep their tokens (paired).
    """
    summary = _metrics(scores, seed)
    domain_N = np.asarray(sequences.domains)[scores.sequence]
    domains = list(dict.fromkeys(sequences.domains))
    if len(domains) > 1:
        summary["domains"] = {name: _metrics(scores.where(domain_N == name), seed) for name in domains}
    present = [role for role in range(len(ROLES)) if np.any(scores.role == role)]
    if present:
        summary["roles"] = {ROLES[role]: _metrics(scores.where(scores.role == role), seed) for role in present}
    return summary


def _metrics(scores: TokenScores, seed: int) -> dict[str, Any]:
    kl, loss, loss_reference = (x.astype(np.float64) for x in (scores.kl, scores.loss, scores.loss_reference))
    median, p99, p999 = np.quantile(kl, [0.5, 0.99, 0.999])
    return {
        "tokens": len(kl),
        "sequences": len(np.unique(scores.sequence)),
        "kl": float(kl.mean()),
        "kl_interval": interval(kl, scores.sequence, seed=seed),
        "kl_median": float(median),
        "kl_p99": float(p99),
        "kl_p999": float(p999),
        "kl_max": float(kl.max()),
        "top1": float(scores.agree.mean()),
        "rms_probability_change": float(np.sqrt(np.mean((np.exp(-loss) - np.exp(-loss_reference)) ** 2))),
        "cross_entropy": float(loss.mean()),
        "cross_entropy_reference": float(loss_reference.mean()),
        "gap": float((loss - loss_reference).mean()),
        "gap_interval": interval(loss - loss_reference, scores.sequence, seed=seed),
    }


def join(parts: Sequence[tuple[TokenScores, Sequences]]) -> tuple[TokenScores, Sequences]:
    """Joins the scores of several suites into those of one, whose domains are no longer told apart."""
    first = np.cumsum([0] + [len(sequences.tokens) for _, sequences in parts])
    shifted = [dataclasses.replace(x, sequence=x.sequence + np.int32(n)) for (x, _), n in zip(parts, first)]
    scores = TokenScores(*(np.concatenate([getattr(x, field.name) for x in shifted]) for field in fields(TokenScores)))
    tokens, roles, documents = (
        tuple(item for _, sequences in parts for item in getattr(sequences, name))
        for name in ("tokens", "roles", "documents")
    )
    return scores, Sequences(tokens, ("all",) * len(tokens), roles, documents)


def histogram(kl_N: np.ndarray) -> list[int]:
    """Counts tokens by the logarithm of their KL divergence, between `HISTOGRAM_EDGES` and below and above them."""
    places = np.searchsorted(HISTOGRAM_EDGES, kl_N, side="right")
    return np.bincount(places, minlength=len(HISTOGRAM_EDGES) + 1).tolist()


def interval(values_N: np.ndarray, sequence_N: np.ndarray, *, seed: int = 0) -> list[float]:
    """Returns [low, high], a 95% bootstrap interval of the mean over tokens, resampling whole sequences.

    Percentiles are widened as Student's t asks for few sequences (Hesterberg, What Teachers Should Know About the
    Bootstrap, 2015, section 5.3). A single sequence is cut into eight stretches.
    """
    means_R = np.sort(_resampled(_sums(values_N, sequence_N), seed=seed)[:, 0])
    groups = max(2, len(np.unique(sequence_N)))
    tail = special.ndtr(math.sqrt(groups / (groups - 1)) * special.stdtrit(groups - 1, (1 - _CONFIDENCE) / 2))
    low, high = np.quantile(means_R, [tail, 1 - tail])
    return [float(low), float(high)]


def _sums(values_N: np.ndarray, sequence_N: np.ndarray) -> np.ndarray:
    """Sums [S, K + 1] of K values [N, K] over each sequence and, last, its number of tokens."""
    _, group_N = np.unique(sequence_N, return_inverse=True)
    if group_N.max() == 0:
        group_N = np.arange(len(group_N)) * min(_BLOCKS_OF_ONE, len(group_N)) // len(group_N)
    columns = [*np.asarray(values_N, np.float64).reshape(len(group_N), -1).T, np.ones(len(group_N))]
    return np.stack([np.bincount(group_N, column) for column in columns], axis=1)


def _resampled(sums: np.ndarray, *, seed: int) -> np.ndarray:
    """Means [R, K] over tokens in R draws of S sequences with replacement."""
    draw = _kept_draws if len(sums) <= _DRAWS_KEPT_UNTIL else _draws
    draws = np.concatenate([counts @ sums for counts in draw(len(sums), seed)])
    return draws[:, :-1] / draws[:, -1:]


def _draws(count: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(_DRAWS // 100):
        yield rng.multinomial(count, np.full(count, 1 / count), size=100).astype(np.int16)


@functools.lru_cache(maxsize=16)
def _kept_draws(count: int, seed: int) -> tuple[np.ndarray, ...]:
    """The draws depend on the number of sequences alone, and a table asks for hundreds of intervals."""
    return tuple(_draws(count, seed))


def recovery(plain: TokenScores, quantized: TokenScores, *, seed: int = 0) -> dict[str, Any] | None:
    """Returns which part of plain rounding's cross-entropy gap a better file closes, (plain - file) / (plain - BF16).

    Keys: value, interval (paired over sequences) and label, which is "fits the data" where the value is above one: the
    loss then fell because the model moved towards the text, not because quantization was undone. None where the gap
    is not larger than its interval, because the quotient then has no meaning.

    Raises:
      ValueError: the two were not scored on the same tokens.
    """
    if not np.array_equal(plain.sequence, quantized.sequence):
        raise ValueError("recovery needs both files scored on the same tokens")
    gap_N = plain.loss.astype(np.float64) - plain.loss_reference
    low, high = interval(gap_N, plain.sequence, seed=seed)
    if gap_N.mean() <= high - low:
        return None
    closed_N = plain.loss.astype(np.float64) - quantized.loss
    means_RK = _resampled(_sums(np.stack([closed_N, gap_N], axis=1), plain.sequence), seed=seed)
    tail = (1 - _CONFIDENCE) / 2
    bounds = np.quantile(means_RK[:, 0] / means_RK[:, 1], [tail, 1 - tail])
    value = float(closed_N.mean() / gap_N.mean())
    label = "fits the data" if value > 1 else "recovery"
    return {"value": value, "interval": [float(x) for x in bounds], "label": label}


def difference(first: TokenScores, second: TokenScores, *, seed: int = 0) -> Mapping[str, Any]:
    """Returns the first file's mean KL minus the second's, with its paired interval: keys kl and kl_interval.

    Raises:
      ValueError: the two were not scored on the same tokens.
    """
    if not np.array_equal(first.sequence, second.sequence):
        raise ValueError("a paired difference needs both files scored on the same tokens")
    change_N = first.kl.astype(np.float64) - second.kl
    return {"kl": float(change_N.mean()), "kl_interval": interval(change_N, first.sequence, seed=seed)}
