"""How many operations a document costs, counted by hand."""

from dataclasses import replace

from arithmetic import LAYERS, STANDING

from qtune.plan.throughput import _operations


def test_a_token_costs_its_weights_and_its_attention() -> None:
    """4 operations a frozen weight and token, 6 a trained one; of attention, forward and 2.5 times that backward."""
    tokens, heads_channels = 100, STANDING.attention_width
    weights = 4 * (STANDING.active_parameters + STANDING.head_parameters) + 6 * STANDING.trained_parameters
    forward = LAYERS * 2 * 2 * tokens * heads_channels / 2  # two products, of which a token sees half
    attention = (1 + 2.5) * forward
    assert _operations(STANDING, (tokens,)) == tokens * (weights + attention)
    assert _operations(STANDING, (tokens, 7)) == _operations(STANDING, (tokens,)) + _operations(STANDING, (7,))
    wider = replace(STANDING, attention_width=2 * heads_channels)
    assert _operations(wider, (tokens,)) == tokens * (weights + 2 * attention)
