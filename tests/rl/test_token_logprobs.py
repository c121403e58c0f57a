"""Log-probabilities of tokens, whole or in chunks, against the softmax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.rl_policy import bound, log_softmax, policy

from mer_r1_jax.rl import losses


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1000, 8, 5])
def test_token_logprobs_equal_the_whole_softmax_in_value_and_gradient(chunk):
    config, _, params = policy()
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(2, 3, 4, config.text.hidden_size)).astype(np.float32))
    ids = rng.integers(0, config.text.vocab_size, (2, 3, 4)).astype(np.int32)
    weight = rng.normal(size=(2, 3, 4)).astype(np.float32)

    def chunked(params, h):
        logprob, entropy = losses.token_logprobs(bound(params), h, ids, temperature=0.7, chunk=chunk)
        return jnp.sum(logprob * weight), (logprob, entropy)

    def whole(params, h):
        logprobs = jax.nn.log_softmax(bound(params).logits(h) / 0.7)
        return jnp.sum(jnp.take_along_axis(logprobs, ids[..., None], -1)[..., 0] * weight)

    (_, (logprob, entropy)), gradients = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(params, h)
    expected_gradients = jax.jit(jax.grad(whole, (0, 1)))(params, h)
    logprobs = log_softmax(np.asarray(bound().logits(h)) / 0.7)
    np.testing.assert_allclose(logprob, np.take_along_axis(logprobs, ids[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(logprobs) * logprobs).sum(-1), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients, expected_gradients)


@pytest.mark.slow
def test_logprobs_at_zero_temperature_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        losses.token_logprobs(bound(), jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32), temperature=0.0)
