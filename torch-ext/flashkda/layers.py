"""Layers for the kernels library: what transformers' Kimi Delta Attention models call.

Same names, arguments and results as the layers of `kernels-community/fla`. They have no state: the
kernels library puts their `forward` in the place of a model's own function.
"""

from __future__ import annotations

from torch import nn

from .chunk import chunk_kda
from .recurrent import fused_recurrent_kda

_SHARED = (
    "scale",
    "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "lower_bound",
    "A_log",
    "dt_bias",
)


def _known(kwargs: dict, *more: str) -> dict:
    """What the functions take, out of what a model hands to all of its layers."""
    return {name: kwargs[name] for name in _SHARED + more if name in kwargs}


def _cu_seqlens(kwargs: dict):
    """transformers calls them cu_seq_lens_q, flash-linear-attention cu_seqlens."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    return kwargs.get("cu_seqlens") if cu_seqlens is None else cu_seqlens


def _fp32(state):
    return None if state is None else state.float()


class chunk_kimi_delta_attention(nn.Module):
    """`chunk_kda` as transformers calls it: prefill, packed sequences and training.

    query, key [B, T, H, K], value [B, T, HV, V], g [B, T, HV, K], beta [B, T, HV], initial_state
    [N, HV, K, V] or None. Takes `cu_seqlens` or `cu_seq_lens_q` ([N + 1], B = 1) and chunk_kda's
    other keywords except those about the state's layout; ignores what it does not know. Returns o
    [B, T, HV, V] and the final state, fp32 [N, HV, K, V], or None. Errors are chunk_kda's.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query,
        key,
        value,
        g,
        beta,
        chunk_size=64,
        initial_state=None,
        output_final_state=False,
        use_qk_l2norm_in_kernel=False,
        **kwargs,
    ):
        return chunk_kda(
            query,
            key,
            value,
            g,
            beta,
            initial_state=_fp32(initial_state),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=_cu_seqlens(kwargs),
            **_known(kwargs, "safe_gate"),
        )


class recurrent_kimi_delta_attention(nn.Module):
    """`fused_recurrent_kda` as transformers calls it: one token a sequence, or few.

    Arguments and results as in `chunk_kimi_delta_attention`.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        query,
        key,
        value,
        g,
        beta,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel=False,
        **kwargs,
    ):
        return fused_recurrent_kda(
            query,
            key,
            value,
            g,
            beta,
            initial_state=_fp32(initial_state),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=_cu_seqlens(kwargs),
            **_known(kwargs),
        )


__all__ = ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"]
