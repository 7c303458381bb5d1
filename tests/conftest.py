"""JAX is strict under test: no silent promotion of types, no silent broadcast of ranks."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
