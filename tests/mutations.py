"""Implementations that are wrong, each by one patch on every rank: what `helix.verify` has to find."""

from mutations_attention import ATTENTION
from mutations_decoding import DECODING
from mutations_exchanges import EXCHANGES

MUTATIONS = (*ATTENTION, *EXCHANGES, *DECODING)
