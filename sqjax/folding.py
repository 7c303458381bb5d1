"""Channel scales folded into a model, at the four places where they cost nothing, and found again in a file.

Letters: O out features, I in features.

Per norm (gain / s, columns of its readers * s), per MLP channel (rows of ffn_up / s, columns of ffn_down * s), per
value-head channel (ssm_norm / s, columns of ssm_out * s) and per value channel (rows of attn_v / s, columns of
attn_output * s): the model's function stays as it is, what rounding does to it does not.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sqjax.config import READERS, ModelConfig, is_matrix, tensor_name
from sqjax.equalize import equalizing_scale
from sqjax.objective import conditional_variance, damp
from sqjax.q4_k import Q4K, dequantize
from sqjax.run import OnDemand
from sqjax.statistics import Statistics


def equalize(
    config: ModelConfig, tensors: Mapping[str, Array], statistics: Statistics, damping: float
) -> tuple[dict[str, Array], Statistics]:
    """Folds the best channel scales into the four places; returns the tensors and the statistics that they would give.

    The search takes the expected rounding error under the conditional variance of the damped input Gram, which is what
    an error costs once feedback does its work, and the diagonal of the output Gram.
    """
    tensors, input_scales, output_scales = dict(tensors), {}, {}
    inputs, outputs = _scaled(statistics.inputs, input_scales), _scaled(statistics.outputs, output_scales)
    for layer, kind in enumerate(config.layer_types):
        name = functools.partial(tensor_name, layer)
        for attributes in READERS[kind]:
            names = [name(attribute) for attribute in attributes]
            gram_II = jnp.asarray(inputs[names[0]])
            readers = [(tensors[n].astype(jnp.float32), jnp.diagonal(jnp.asarray(outputs[n]))) for n in names]
            source, tie_I = _scale_source(config, attributes[0])
            cost_I = conditional_variance(damp(gram_II, damping))
            scale_I = equalizing_scale(readers, cost_I, jnp.asarray(tie_I))
            input_scales[names[0]] = scale_I
            for n, (weight_OI, _) in zip(names, readers):
                tensors[n] = weight_OI * scale_I[None, :]
            # One column of each tie stands for all of them.
            _, first = np.unique(tie_I, return_index=True)
            inverse = 1.0 / scale_I[first]
            writer = name(source)
            if writer in outputs:
                tensors[writer] = tensors[writer].astype(jnp.float32) * inverse[:, None]
                output_scales[writer] = inverse
            else:
                tensors[writer] = tensors[writer] * inverse
    return tensors, dataclasses.replace(statistics, inputs=inputs, outputs=outputs)


def _scaled(grams: Mapping[str, Any], scales: Mapping[str, Array]) -> OnDemand:
    """Grams of channels that were divided by their scales, each computed when asked for, by the scales known then.

    All of them at once are ten times the size of the model's file.
    """

    def scaled(name: str) -> Any:
        gram_II, scale_I = grams[name], scales.get(name)
        return gram_II if scale_I is None else gram_II / (scale_I[:, None] * scale_I[None, :])

    return OnDemand(grams, scaled)


def refold(config: ModelConfig, tensors: Mapping[str, Array], file: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """Returns a checkpoint's tensors under the channel scales that `equalize` folded into a file of it.

    Norm gains tell them exactly; rows of ffn_up and attn_v by least squares between the file's weights and the
    checkpoint's. Vectors are the file's. A matrix is read and scaled when it is asked for.
    """
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for layer, kind in enumerate(config.layer_types):
        name = functools.partial(tensor_name, layer)
        for attributes in READERS[kind]:
            source, tie_I = _scale_source(config, attributes[0])
            writer = name(source)
            old, new = np.asarray(tensors[writer], np.float32), file[writer]
            if is_matrix(writer, old.shape):
                # Its own columns were scaled before its rows were.
                old = old * columns[writer][None, :] if writer in columns else old
                new = np.asarray(dequantize(jax.tree.map(jnp.asarray, new)) if isinstance(new, Q4K) else new)
                inverse = np.sum(new * old, axis=1) / np.maximum(np.sum(old * old, axis=1), 1e-30)
                rows[writer] = inverse
            else:
                inverse = np.asarray(new) / np.where(old == 0, 1.0, old)
            scale_I = 1.0 / np.where(inverse == 0, 1.0, inverse)[tie_I]
            columns |= dict.fromkeys(map(name, attributes), scale_I)

    def scaled(name: str) -> np.ndarray:
        if not is_matrix(name, config.tensor_shapes()[name]):
            return np.asarray(file[name])
        weight_OI = np.asarray(tensors[name], np.float32)
        weight_OI = weight_OI * columns[name][None, :] if name in columns else weight_OI
        return weight_OI * rows[name][:, None] if name in rows else weight_OI

    return OnDemand(config.tensor_shapes(), scaled)


def _scale_source(config: ModelConfig, reader: str) -> tuple[str, np.ndarray]:
    """Where the scale of a reader's columns comes from, and which of its channels each column reads."""
    if reader in ("attn_qkv", "attn_q"):
        return "attn_norm", np.arange(config.hidden_size)
    if reader == "ffn_gate":
        return "post_attention_norm", np.arange(config.hidden_size)
    if reader == "ffn_down":
        return "ffn_up", np.arange(config.intermediate_size)
    if reader == "ssm_out":
        return "ssm_norm", np.tile(np.arange(config.linear_value_head_dim), config.linear_num_value_heads)
    heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    per_key_head = np.arange(key_heads * width).reshape(key_heads, width)
    return "attn_v", np.repeat(per_key_head, heads // key_heads, axis=0).reshape(-1)
