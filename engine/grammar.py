"""Which tokens may follow in requests that have a grammar.

A request's place in its grammar is a function of its output tokens: the matcher is given those it has not seen yet each
time a mask is wanted. So tokens that came with a request (sampled by a prefill worker, or before another worker died)
and those sampled here pass through the same lines, and preemption changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from mesh.errors import GrammarError
from mesh.grammar import check_matcher
from mesh.params import SamplingParams

Flags = npt.NDArray[np.bool_]


class Matcher:
    """One request's place in its grammar. Used by one thread."""

    __slots__ = ("_bits", "_matcher", "_num_seen", "cost_s", "eos_token_ids")

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self.cost_s = 0.0
        """Processor time of the last mask."""
        self._matcher = matcher
        self._num_seen = 0
        self._bits = np.zeros(-(-vocab_size // 32), np.uint32)

    def copy(self) -> Matcher:
        """For another request with the same grammar; before the first mask only."""
        return Matcher(self._matcher.deep_copy(), len(self._bits) * 32, self.eos_token_ids)

    def allowed(self, output: Sequence[int], params: SamplingParams, begin: int = 0) -> Flags:
        """Per token id whether it may follow `output`, of which the grammar has what comes from `begin` on; at least
        one may. Raises `GrammarError`.

        An end of the sequence that would not end the request (`ignore_eos`, `min_tokens`) may only follow where
        nothing else may: the grammar is complete.
        """
        began = time.thread_time()
        new = output[begin + self._num_seen :]
        self._matcher.consume_tokens(list(new))
        self._num_seen += len(new)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self.cost_s = time.thread_time() - began
        check_matcher(self._matcher)
        flags = np.unpackbits(self._bits.view(np.uint8), bitorder="little").view(np.bool_)
        early = len(output) < params.min_tokens
        unwanted = [token for token in self.eos_token_ids if early or token not in params.stop_token_ids]
        if early:
            unwanted += [token for token in params.stop_token_ids if token < len(flags)]
        if unwanted:
            wanted = flags.copy()
            wanted[unwanted] = False
            if wanted.any():
                return wanted
        if not flags.any():
            raise GrammarError("no token of this model can continue the grammar")
        return flags
